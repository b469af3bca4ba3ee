"""Estimates the time of runs from finished runs of the same kind on this machine, or else from a few measured steps.

A kind is a method on a data set. Runs of a kind differ in their seeds and in weights that hardly change a step's time.

As a program it measures: `python -m mnclglf.reproduce.estimate` reads a configuration and protocols as JSON, and prints
a cost. Its own process gives the memory free again, the GPU's too, and makes the start of a process part of the figure.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mnclglf.config import KnnConfig, LinearConfig, LogisticConfig, RunConfig, from_dict, to_dict
from mnclglf.data.splits import with_labels
from mnclglf.evaluation.linear import total_steps, train_linear
from mnclglf.evaluation.run import (
    EvalContext,
    by_stored_features,
    epoch_steps,
    feature_protocols,
    training_loader,
)
from mnclglf.reproduce.plan import Run, Scale, evaluation_of
from mnclglf.reproduce.results import missing_evaluations, steps_done
from mnclglf.runs.environment import describe_machine
from mnclglf.runs.files import read_config, read_object, write_json
from mnclglf.runs.metrics import stream_records
from mnclglf.training.loop import Trainer
from mnclglf.training.schedule import Schedule
from mnclglf.training.start import choose_machine, elsewhere
from mnclglf.training.timing import WARM_UP_STEPS, StepClock, Waiting

MEASURED_STEPS = 8
MEASURED_LINEAR_STEPS = 20
MEASURED_SHARE, MEASURED_IMAGES = 0.1, 1000  # an evaluation is measured on this share of the images, at least so many
COST_FILE = "cost.json"  # in the directory of a run that is done


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of the parts of a run."""

    start: float
    """Beside the steps: start of the process, loading, compilation, checkpoints."""
    step: float
    evaluation: float
    """All protocols of the scale, for one epoch and one representation."""

    def seconds(self, steps: int, evaluations: int) -> float:
        """Returns the time of what a run still lacks; a run that is trained does not start a training."""
        return (self.start + steps * self.step if steps else 0.0) + evaluations * self.evaluation


def kind_of(config: RunConfig) -> str:
    """Returns what the runs of one cost have in common."""
    return f"{config.method} on {config.dataset}"


def remaining(run: Run, runs: Path, scale: Scale, images: int) -> tuple[int, int]:
    """Returns the steps and the evaluations that a run still lacks; `images` is the number that it trains on."""
    total = Schedule.of(run.config, images // run.config.optim.batch_size).total_steps
    return total - steps_done(runs / run.name), sum(map(len, missing_evaluations(run, runs, scale).values()))


def record_cost(folder: Path, config: RunConfig, training_seconds: float, evaluation_seconds: float) -> None:
    """Saves the cost of a run that this process has trained and evaluated, if its steps were timed.

    Args:
        folder: the run directory.
        config: the run.
        training_seconds: time of the training in this process.
        evaluation_seconds: time of the evaluations, per epoch and representation.
    """
    times, last = array("d"), 0
    for records, _ in stream_records(folder / "metrics.jsonl"):
        times.extend(record["step_seconds"] for record in records if isinstance(record.get("step_seconds"), float))
        last = max([last, *(record["step"] for record in records)])
    if not times:
        return
    step = statistics.median(times)
    start = max(0.0, training_seconds - step * last)
    cost = Cost(start=start, step=step, evaluation=evaluation_seconds)
    write_json(folder / COST_FILE, asdict(cost) | {"machine": machine_of(config)})


def recorded_cost(runs: Path, config: RunConfig) -> tuple[Cost, int] | None:
    """Returns the median cost of the finished runs of the kind on this machine, and their number; None without any."""
    found: list[dict[str, Any]] = []
    for path in sorted(runs.glob(f"*/{COST_FILE}")):
        saved = read_object(path) or {}
        if saved.pop("machine", None) == machine_of(config) and kind_of(read_config(path.parent)) == kind_of(config):
            found.append(saved)
    if not found:
        return None
    return Cost(**{part: statistics.median(cost[part] for cost in found) for part in found[0]}), len(found)


def machine_of(config: RunConfig) -> dict[str, Any]:
    """Returns what the machine of a run is known by: device and threads."""
    return describe_machine(choose_machine(config.engine).device)


def measured_cost(config: RunConfig, protocols: Mapping[Any, Mapping[str, Any]]) -> Cost | str:
    """Measures a run's cost in a process of its own; returns the last line of its output if it fails."""
    request = json.dumps({"config": to_dict(config), "protocols": {name: dict(of) for name, of in protocols.items()}})
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mnclglf.reproduce.estimate"], input=request, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - began
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    parts = json.loads(done.stdout.splitlines()[-1])
    return Cost(start=took - parts["taken"], step=parts["step"], evaluation=parts["evaluation"])


def measure(config: RunConfig, protocols: Mapping[Any, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the seconds per step and per evaluation, and those `taken` to measure them."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), console=console)
    times = time_steps(trainer)
    began = time.perf_counter()
    evaluation = sum(
        time_evaluation(trainer, evaluation_of(name, settings, None), console) for name, settings in protocols.items()
    )
    taken = sum(times) + time.perf_counter() - began
    return {"step": statistics.median(times), "evaluation": evaluation, "taken": taken}


def time_steps(trainer: Trainer) -> list[float]:
    """Returns the seconds of a few steps after the warm-up; the first one compiles."""
    clock = StepClock(trainer.device)
    total = min(trainer.schedule.total_steps, WARM_UP_STEPS + MEASURED_STEPS)
    for step, batch, wait in Waiting().timed(trainer.loader, 0, total):
        trainer.step(step, batch, lr=trainer.schedule.lr(step), momentum=trainer.schedule.ema_momentum(step))
        clock.stop(wait)
    trainer.step.guard.raise_if_failed()  # waits for the device
    return clock.take()[1]


def time_evaluation(trainer: Trainer, evaluation: KnnConfig | LinearConfig | LogisticConfig, console: Console) -> float:
    """Returns the estimated seconds of an evaluation: steps of the linear one, the others on a part of the images.

    The fits of logistic regression take a time that is nearly proportional to the images; k-NN's votes, which grow
    faster, are a small part.
    """
    data, encoder = trainer.started.data, trainer.method.encoder
    assert data.test is not None, "the paper's data sets have test images"
    seed, count = trainer.config.seed, len(data.train)
    share = min(1.0, max(MEASURED_SHARE, MEASURED_IMAGES / count))
    context = EvalContext(
        config=replace(trainer.config, engine=elsewhere(trainer.config.engine, trainer.config.engine.device)),
        console=console,
        train=data.train,
        labeled=data.train if isinstance(evaluation, LinearConfig) else with_labels(data.train, share, seed=seed),
        test=with_labels(data.test, share, seed=seed),
        statistics=(trainer.loader.mean, trainer.loader.std),
        side=data.side,
        machine=trainer.started.machine,
        steps_per_epoch=trainer.loader.steps_per_epoch,
    )
    if isinstance(evaluation, LinearConfig):
        loader, per_epoch = training_loader(context, evaluation), epoch_steps(context, evaluation)
        labels = torch.from_numpy(data.train.labels).to(trainer.device)

        def seconds(steps: int) -> float:
            began = time.perf_counter()
            train_linear(
                encoder,
                loader,
                labels,
                replace(evaluation, epochs=LinearConfig.epochs, steps=steps),  # one of them may be given
                classes=context.classes,
                steps_per_epoch=per_epoch,
                dtype=trainer.dtype,
                seed=seed,
                say=context.say,
            )
            return time.perf_counter() - began

        seconds(WARM_UP_STEPS)
        return seconds(MEASURED_LINEAR_STEPS) / MEASURED_LINEAR_STEPS * total_steps(evaluation, per_epoch)
    began = time.perf_counter()
    by_stored_features(context, evaluation, feature_protocols(context, evaluation), ["pretrained"], encoder, 0)
    return (time.perf_counter() - began) / share


def main() -> None:
    request = json.load(sys.stdin)
    sys.stdout.write(json.dumps(measure(from_dict(request["config"]), request["protocols"])) + "\n")


if __name__ == "__main__":
    main()
