"""`mnclglf reproduce` at a scale of seconds (8 x 8 digits, a network of width 2), and finished runs written by hand.

Run as a program it is mnclglf with that scale as `small`, for the subprocesses of tests.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mnclglf.config import DataConfig, EngineConfig, ModelConfig, RunConfig, to_dict
from mnclglf.recipes import quick
from mnclglf.reproduce import run as execute
from mnclglf.reproduce.plan import SCALES, Reproduce, Table, TableName, make_table, run_name
from mnclglf.reproduce.results import results_path
from mnclglf.runs.results import Protocol, Result, save_results

IMAGES, BATCH, EPOCHS = 96, 32, 4
PER_EPOCH = IMAGES // BATCH


def tiny(method: str, dataset: str) -> RunConfig:
    config = quick(method, "digits")
    return replace(
        config,
        data=DataConfig(image_size=8, train_images=IMAGES, loader="reference", loader_threads=1),
        view=replace(config.view, rotation_degrees=0.0, jitter_probability=0.0, gray_probability=0.0),
        model=ModelConfig(width=2, projector_width=16, predictor_width=8),
        objective=replace(config.objective, queue_size=64),
        optim=replace(config.optim, epochs=EPOCHS, batch_size=BATCH),
        engine=EngineConfig(device="cpu", precision="fp32", log_every=1),
    )


TINY = replace(SCALES["small"], configure=tiny)


def tiny_table(name: TableName, *, seeds: int = 1) -> Table:
    """Returns a table at the scale `small`."""
    return make_table(Reproduce(table=name, scale="small", seeds=seeds))


class HandMade:
    """Writes the files of finished runs, with any accuracies."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def train(self, config: RunConfig, *, share: float | None = 0.5) -> Path:
        folder = self.runs / run_name(config)
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        environment = {"device": "an abacus", "commit": "abc1234", "packages": {"torch": "2"}}
        (folder / "environment.json").write_text(json.dumps(environment))
        steps = config.optim.epochs * PER_EPOCH
        records = [
            {"step": step, "epoch": step / PER_EPOCH, "elapsed_seconds": 2.0 * step, "roofline_fraction": share}
            for step in range(1, steps + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "checkpoints" / f"step-{steps:08d}.pt").touch()
        return folder

    def evaluate(self, config: RunConfig, top1: float, *, epoch: int | None = None, **changes: Any) -> None:
        """Writes top1 for the linear protocol and half of it for k-NN; top5 is halfway from top1 to 1."""
        epoch = epoch or config.optim.epochs
        accuracies: dict[Protocol, float] = {"logistic": top1, "knn": top1 / 2}
        results = []
        for protocol, value in accuracies.items():
            settings = {"step": PER_EPOCH * epoch, **SCALES["small"].protocols[protocol]}
            usual: dict[str, Any] = {"representation": "pretrained", "split": "test", "settings": settings}
            results.append(Result(protocol=protocol, top1=value, top5=(1 + value) / 2, **(usual | changes)))
        save_results(results_path(self.runs / run_name(config), config, epoch), results)


if __name__ == "__main__":
    from mnclglf.cli import main

    SCALES["small"] = TINY
    execute.PROGRAM = (sys.executable, __file__)
    raise SystemExit(main())
