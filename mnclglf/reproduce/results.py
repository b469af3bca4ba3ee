"""Reads the run directories of a table: the runs that are done, the missing ones, and the measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mnclglf.config import RunConfig
from mnclglf.reproduce.plan import Reproduce, Row, Run, Scale, Table, make_table, run_name
from mnclglf.runs.checkpoint import checkpoint_path, list_checkpoints
from mnclglf.runs.files import differences, read_config
from mnclglf.runs.metrics import last_record
from mnclglf.runs.results import Result, load_results


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Accuracies of a run at one epoch, as fractions, with settings and environment."""

    run: str
    seed: int
    epoch: int
    step: int
    top1: float
    top5: float
    knn_top1: float | None
    """Top-1 of k-NN; None if the scale has no k-NN protocol."""
    settings: dict[str, Any]
    """Settings of the evaluation."""
    environment: dict[str, Any]
    """Contents of environment.json, of the process that trained last: device, commit, precision, versions."""
    training_seconds: float | None
    """None if the metrics do not say it."""


def whole_table(request: Reproduce, runs: Path) -> Table:
    """Returns the whole table: every data set, with the requested seeds and those that have been begun."""
    table = make_table(replace(request, dataset=()))
    rows = [replace(row, configs=_with_begun_seeds(row.configs, runs)) for row in table.rows]
    return replace(table, rows=tuple(rows))


def _with_begun_seeds(configs: Sequence[RunConfig], runs: Path) -> tuple[RunConfig, ...]:
    """Returns the runs of a row, and those of further seeds that have a run directory."""
    first = configs[0]
    stem = run_name(first).removesuffix(str(first.seed))
    begun = [int(seed) for path in runs.glob(f"{stem}*/") if (seed := path.name.removeprefix(stem)).isdecimal()]
    seeds = {config.seed for config in configs}.union(begun)
    return tuple(replace(first, seed=seed) for seed in sorted(seeds))


def results_path(folder: Path, config: RunConfig, epoch: int) -> Path:
    """Returns the file of an epoch's evaluations: evaluation.json for the last epoch, a separate one per milestone."""
    return folder / ("evaluation.json" if epoch == config.optim.epochs else f"evaluation-epoch{epoch}.json")


def step_of_epoch(folder: Path, epoch: int) -> int | None:
    """Returns the number of steps after `epoch` epochs of a run; None if nothing has been logged."""
    last = last_record(folder / "metrics.jsonl", "epoch")
    return epoch * round(last["step"] / last["epoch"]) if last is not None and last["epoch"] > 0 else None


def steps_done(folder: Path) -> int:
    """Returns the step of the newest checkpoint."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    return checkpoints[-1][0] if checkpoints else 0


def is_trained(folder: Path, config: RunConfig) -> bool:
    """Returns whether the run's last step has a checkpoint."""
    step = step_of_epoch(folder, config.optim.epochs)
    return step is not None and checkpoint_path(folder / "checkpoints", step).exists()


def other_settings(folder: Path, config: RunConfig) -> list[str]:
    """Returns the settings in which the run in this folder differs from `config`; empty if there is no run."""
    return differences(read_config(folder), config) if (folder / "config.json").exists() else []


def missing_evaluations(run: Run, runs: Path, scale: Scale) -> dict[int, list[str]]:
    """Returns the representations still to be evaluated, by epoch; all of them for a run that is not trained."""
    folder = runs / run.name
    missing = {
        epoch: [name for name in names if None in find_results(folder, run.config, epoch, name, scale).values()]
        for epoch, names in run.asked.items()
    }
    return {epoch: names for epoch, names in missing.items() if names}


def find_results(
    folder: Path, config: RunConfig, epoch: int, representation: str, scale: Scale
) -> dict[str, Result | None]:
    """Returns the results of a run's epoch on the test images, by protocol."""
    step = step_of_epoch(folder, epoch)
    if step is None or other_settings(folder, config):
        return dict.fromkeys(scale.protocols)
    saved = load_results(results_path(folder, config, epoch))
    return {
        protocol: _find(saved, protocol, representation, {**settings, "step": step})
        for protocol, settings in scale.protocols.items()
    }


def _find(saved: Sequence[Result], protocol: str, representation: str, settings: Mapping[str, Any]) -> Result | None:
    for result in saved:
        found = (result.protocol, result.representation, result.dataset, result.split, result.label_share)
        same_settings = all(result.settings.get(name) == value for name, value in settings.items())
        if found == (protocol, representation, None, "test", 1.0) and same_settings:
            return result
    return None


def measurements(row: Row, runs: Path, scale: Scale) -> list[Measurement]:
    """Returns the measurements of a row, one per seed whose run and evaluations are done."""
    found = [_measurement(row, config, runs, scale) for config in row.configs]
    return [measurement for measurement in found if measurement is not None]


def _measurement(row: Row, config: RunConfig, runs: Path, scale: Scale) -> Measurement | None:
    folder = runs / run_name(config)
    found = find_results(folder, config, row.epoch, row.representation, scale)
    shown, knn = next(iter(found.values())), found.get("knn")
    last = last_record(folder / "metrics.jsonl")
    timed = last_record(folder / "metrics.jsonl", "elapsed_seconds")
    if shown is None or last is None or None in found.values():
        return None
    return Measurement(
        run=folder.name,
        seed=config.seed,
        epoch=row.epoch,
        step=shown.settings["step"],
        top1=shown.top1,
        top5=shown.top5,
        knn_top1=None if knn is None else knn.top1,
        settings=shown.settings,
        environment=json.loads((folder / "environment.json").read_text()),
        training_seconds=None if timed is None else float(timed["elapsed_seconds"]),
    )
