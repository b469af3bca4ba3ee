"""The command mnclglf reproduce: checks, estimates the time, makes the missing runs, writes the table.

Each run has its own process, and two processes never make the same run.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mnclglf.config import RunConfig, require
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet
from mnclglf.data.splits import split_train
from mnclglf.evaluation.run import evaluate_run
from mnclglf.reports.page import write_report
from mnclglf.reproduce.estimate import (
    MEASURED_STEPS,
    Cost,
    kind_of,
    measured_cost,
    record_cost,
    recorded_cost,
    remaining,
)
from mnclglf.reproduce.plan import Reproduce, Run, Scale, Table, evaluation_of, make_table
from mnclglf.reproduce.results import (
    is_trained,
    missing_evaluations,
    other_settings,
    results_path,
    step_of_epoch,
    steps_done,
    whole_table,
)
from mnclglf.reproduce.table import lines_of, write_table
from mnclglf.runs.checkpoint import checkpoint_path
from mnclglf.runs.console import say
from mnclglf.runs.files import check_writable, read_config
from mnclglf.runs.locks import held
from mnclglf.training.loop import Trainer, TrainingError
from mnclglf.training.progress import duration
from mnclglf.training.start import choose_machine
from mnclglf.training.stop import StopRequest

PROGRAM = (sys.executable, "-m", "mnclglf")
TAKEN = 75  # exit code if another process is making the run: EX_TEMPFAIL of sysexits.h
POLL_SECONDS = 1.0
LOG_LINES = 12  # lines shown of the log of a failed run


def reproduce(request: Reproduce, console: Console) -> int:
    """Makes the requested part of a table of the paper and writes the whole table, or prints the commands of its runs.

    Returns:
        0 if everything requested is done; 1 if a run failed; TAKEN if other processes are still making some of it;
        128 + N if stopped by signal N.
    """
    table, runs = make_table(request), request.folder / "runs"
    wanted = table.runs() if request.only is None else [table.run(request.only)]
    missing = [run for run in wanted if missing_evaluations(run, runs, table.scale)]
    if request.plan:
        sys.stdout.writelines(f"{shlex.join(command_of(request, run.name))}\n" for run in missing)
        return 0
    check_settings(wanted, runs)
    lines_of(whole_table(request, runs), runs)  # raises for a damaged file of any run before work is done
    images = load_images(missing) if request.only is None else {}  # a single run loads its own
    check_writable(runs, "give another --out")
    runs.mkdir(parents=True, exist_ok=True)
    if request.only is not None:
        code = make_run(wanted[0], runs, table.scale, console)
        _write(request)
        return code
    if missing:
        say(console, f"{table.name} at scale {request.scale}, in {request.folder}")
        describe_work(missing, len(wanted), runs, table.scale, images, console)
    del images  # each run loads its own, and needs the memory
    made = make_runs(request, table, runs, console)
    for path in _write(request):
        say(console, f"written: {path}")
    if made.stopped:
        say(
            console,
            "stopped; with the same command training goes on from its last step, and an evaluation begins again",
        )
        return 128 + made.stopped
    if made.taken:
        names = ", ".join(made.taken)
        say(console, f"being made by other processes: {names}; the same command adds them once they are done")
    if made.failed:
        say(console, f"failed: {', '.join(made.failed)}; the same command tries them again")
        return 1
    return TAKEN if made.taken else 0


def check_settings(runs: Sequence[Run], folder: Path) -> None:
    """Raises ValueError if a run cannot be made on this machine, or its directory holds another run."""
    for run in runs:
        choose_machine(run.config.engine)
        changed = other_settings(folder / run.name, run.config)
        require(
            not changed,
            f"{folder / run.name} holds a run of other settings ({'; '.join(changed)}); give another --out, or move it "
            "away",
        )


def load_images(runs: Sequence[Run]) -> dict[str, ImageSet]:
    """Loads the images that each data set of the runs pre-trains on.

    Raises:
        DataError: a data set's files are missing or damaged.
    """
    data = {run.config.dataset: run.config.data for run in runs}
    return {
        name: split_train(load_dataset(name, config.data_dir, download=config.download)[0], config)[0]
        for name, config in data.items()
    }


def describe_work(
    missing: Sequence[Run], wanted: int, runs: Path, scale: Scale, images: Mapping[str, ImageSet], console: Console
) -> None:
    """Prints the runs to be made, with their estimated hours on this machine and what the estimate rests on."""
    first = {kind_of(run.config): run.config for run in reversed(missing)}
    costs = {kind: estimate_cost(config, runs, scale, console) for kind, config in sorted(first.items())}
    known: list[float] = []
    for run in missing:
        cost = costs[kind_of(run.config)]
        if cost is None:
            say(console, f"  {run.name}: unknown")
            continue
        hours = cost.seconds(*remaining(run, runs, scale, len(images[run.config.dataset]))) / 3600
        known.append(hours)
        say(console, f"  {run.name}: {hours:.2f} h")
    total = f"{sum(known):.2f} h" if len(known) == len(missing) else "how long they take is not known"
    say(
        console,
        f"{wanted} runs, {wanted - len(missing)} done, {len(missing)} to make: {total} on this machine, one after the "
        "other, evaluations included",
    )


def estimate_cost(config: RunConfig, runs: Path, scale: Scale, console: Console) -> Cost | None:
    """Returns the cost of the runs of a kind, and prints its source; None if it cannot be measured."""
    kind, recorded = kind_of(config), recorded_cost(runs, config)
    if recorded is None:
        say(console, f"{kind}: measuring a few steps and a part of the evaluation ...")
        cost = measured_cost(config, scale.protocols)
        if isinstance(cost, str):
            say(console, f"{kind}: not measured, its time is unknown: {cost}")
            return None
        source = f"{MEASURED_STEPS} steps measured now"
    else:
        cost, count = recorded
        source = f"as in {count} finished run{'s' * (count != 1)} of the folder"
    say(
        console,
        f"{kind}: {cost.step:.3g} s per step, {duration(cost.start)} of start-up, {duration(cost.evaluation)} per "
        f"evaluation; {source}",
    )
    return cost


def _write(request: Reproduce) -> list[Path]:
    runs = request.folder / "runs"
    # Without the lock another process could overwrite the table with an older state.
    with held(lock_of(request.table, runs), wait=True):
        return write_table(whole_table(request, runs), request.folder)


@dataclass(kw_only=True)
class Made:
    """Outcome of making the missing runs."""

    failed: list[str] = field(default_factory=list[str])
    taken: list[str] = field(default_factory=list[str])
    """Names of the runs that other processes are making."""
    stopped: int | None = None
    """Signal that ended the work; None if none did."""


def lock_of(name: str, runs: Path) -> Path:
    return runs / f"{name}.lock"


def command_of(request: Reproduce, name: str) -> list[str]:
    """Returns the command that makes one run of the table."""
    options = ["--scale", request.scale, "--seeds", str(request.seeds), "--out", str(request.folder)]
    if request.dataset:
        options += ["--dataset", *request.dataset]
    if request.data_folder is not None:
        options += ["--data-dir", str(request.data_folder)]
    if request.download:
        options += ["--download"]
    return [*PROGRAM, "reproduce", request.table, *options, "--only", name]


def make_run(run: Run, runs: Path, scale: Scale, console: Console) -> int:
    """Trains a run to its end and evaluates it, in this process; skips the parts that are done.

    Returns:
        0; TAKEN if another process is making the run; 128 + N if stopped by signal N.
    """
    folder = runs / run.name
    with held(lock_of(run.name, runs)) as mine:
        if not mine:
            say(console, f"{run.name} is being made by another process")
            return TAKEN
        began, trained = time.perf_counter(), is_trained(folder, run.config)
        fresh = not trained and steps_done(folder) == 0
        if not trained:
            stopped = train(run, folder, console)
            if stopped:
                say(console, "stopped and saved; the same command resumes there")
                return 128 + stopped
        config = replace(read_config(folder), data=run.config.data)  # the images may have moved since
        training_seconds, began = time.perf_counter() - began, time.perf_counter()
        missing = missing_evaluations(run, runs, scale)
        for epoch, representations in missing.items():
            step = step_of_epoch(folder, epoch)
            assert step is not None  # it is trained
            say(console, f"evaluating after epoch {epoch}")
            last = epoch == run.config.optim.epochs
            checkpoint = None if last else checkpoint_path(folder / "checkpoints", step)
            for protocol, settings in scale.protocols.items():
                evaluate_run(
                    folder,
                    evaluation_of(protocol, settings, checkpoint),
                    console,
                    config=config,
                    representations=representations,
                    file=results_path(folder, run.config, epoch),
                )
        if fresh:
            evaluations = sum(map(len, missing.values()))
            record_cost(folder, run.config, training_seconds, (time.perf_counter() - began) / evaluations)
        write_report(folder)
    return 0


def train(run: Run, folder: Path, console: Console) -> int | None:
    """Trains to the end and returns None, or to a signal and returns its number."""
    trainer = Trainer(run.config, folder, console=console)
    try:
        return trainer.train()
    except TrainingError:
        write_report(folder)  # also after a failure: it shows where the run stopped
        raise


def make_runs(request: Reproduce, table: Table, runs: Path, console: Console) -> Made:
    """Makes the missing runs one after the other, except those that other processes are making."""
    made = Made()
    waiting = [run for run in table.runs() if missing_evaluations(run, runs, table.scale)]
    with StopRequest() as stop:
        while waiting and not stop.signal:
            passed = len(waiting)
            waiting = [run for run in waiting if _attempt(request, table, run, runs, made, stop, console)]
            if len(waiting) == passed:  # other processes have all of them
                break
    made.taken, made.stopped = [run.name for run in waiting], stop.signal
    return made


def _attempt(
    request: Reproduce, table: Table, run: Run, runs: Path, made: Made, stop: StopRequest, console: Console
) -> bool:
    """Makes a run unless it is done or the work is stopping; returns True if another process is making it."""
    if stop.signal or not missing_evaluations(run, runs, table.scale):
        return False
    with held(lock_of(run.name, runs)) as free:
        if free and not missing_evaluations(run, runs, table.scale):  # another process has finished it meanwhile
            return False
    if not free:
        return True
    log, began = runs / f"{run.name}.log", time.perf_counter()
    code = _watch(command_of(request, run.name), log, stop, console)
    if code == TAKEN:
        return True
    took = duration(time.perf_counter() - began)
    if code == 0:
        say(console, f"{run.name}: done in {took}")
    elif not stop.signal:
        made.failed.append(run.name)
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        say(console, f"{run.name}: FAILED after {took} ({how}); {log} ends with")
        say(console, "\n".join(last_lines(log, LOG_LINES)))
    return False


def _watch(command: Sequence[str], log: Path, stop: StopRequest, console: Console) -> int:
    """Runs a command to its end with its output in `log`, and passes a stop signal on to it, once."""
    with log.open("ab") as output, console.status(Text(log.stem)) as status:
        # Its own session: otherwise Ctrl-C in a terminal would reach it twice, and a second signal ends a run unsaved.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        told = False
        try:
            while True:
                try:
                    return process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    status.update(Text(f"{log.stem}  {''.join(last_lines(log, 1))}"))  # a str would be markup
                if stop.signal and not told:
                    process.send_signal(stop.signal)
                    told = True
        except BaseException:  # a second Ctrl-C
            process.terminate()
            raise


def last_lines(log: Path, count: int) -> list[str]:
    """Returns the last lines of a text file."""
    with log.open(errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=count)]
