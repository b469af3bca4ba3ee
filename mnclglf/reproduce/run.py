"""Makes the runs of a table: each in a process of its own, and never in two at once."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from mnclglf.evaluation.results import save_results
from mnclglf.reports.page import write_report
from mnclglf.reproduce.evaluate import evaluate_checkpoint
from mnclglf.reproduce.plan import Reproduce, Run, Scale, Table
from mnclglf.reproduce.results import is_trained, missing_evaluations, results_path, step_of_epoch
from mnclglf.runs.checkpoint import checkpoint_path
from mnclglf.training.loop import StopRequest, Trainer, TrainingError
from mnclglf.training.progress import duration
from mnclglf.training.run_directory import read_config

PROGRAM = (sys.executable, "-m", "mnclglf")
TAKEN = 75  # exit code of a process whose run is another's: EX_TEMPFAIL of sysexits.h
POLL_SECONDS = 1.0
LOCK_TRIES = 5  # a tenth of a second apart
LOG_LINES = 12  # of a run that failed


@dataclass(kw_only=True)
class Made:
    """What became of the missing runs."""

    failed: list[str] = field(default_factory=list[str])
    taken: list[str] = field(default_factory=list[str])
    """Being made by other processes."""
    stopped: int | None = None
    """The signal that ended the work."""


@contextmanager
def held(lock: Path, *, wait: bool = False) -> Generator[bool, None, None]:
    """Holds a lock file, which the system gives free when this process ends, however it does.

    Args:
        lock: the file; made where it is missing, and left, as it cannot be deleted without a race.
        wait: for whoever holds it; else the result is False where somebody does.
    """
    with lock.open("w") as file:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield wait or _try_lock(file)


def _try_lock(file: TextIO) -> bool:
    """Whether the lock could be had; a process that only asks whether a run is free holds it for a moment."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return True
    return False


def lock_of(name: str, runs: Path) -> Path:
    return runs / f"{name}.lock"


def command_of(request: Reproduce, name: str) -> list[str]:
    """The command that makes one run of the table."""
    options = ["--scale", request.scale, "--seeds", str(request.seeds), "--out", str(request.folder)]
    if request.dataset:
        options += ["--dataset", *request.dataset]
    if request.data_folder is not None:
        options += ["--data-dir", str(request.data_folder)]
    if request.download:
        options += ["--download"]
    return [*PROGRAM, "reproduce", request.table, *options, "--only", name]


def make_run(run: Run, runs: Path, scale: Scale, console: Console) -> int:
    """Trains a run to its end and evaluates it, as far as that is missing, in this process.

    Returns:
        0; TAKEN where another process makes it; 128 + N when stopped by signal N.
    """
    folder = runs / run.name
    with held(lock_of(run.name, runs)) as mine:
        if not mine:
            say(console, f"{run.name} is being made by another process")
            return TAKEN
        if not is_trained(folder, run.config):
            stopped = train(run, folder, console)
            if stopped:
                say(console, "stopped and saved; the same command goes on from there")
                return 128 + stopped
        config = replace(read_config(folder), data=run.config.data)  # the images may have lain elsewhere then
        for epoch, representations in missing_evaluations(run, runs, scale).items():
            step = step_of_epoch(folder, epoch)
            assert step is not None  # it is trained
            say(console, f"evaluating after epoch {epoch}")
            checkpoint = checkpoint_path(folder / "checkpoints", step)
            results = evaluate_checkpoint(folder, config, checkpoint, scale.protocols, representations, console)
            save_results(results_path(folder, run.config, epoch), results)
        write_report(folder)
    return 0


def train(run: Run, folder: Path, console: Console) -> int | None:
    """Trains to the end, or to a signal, whose number it gives."""
    trainer = Trainer(run.config, folder, console=console)
    try:
        return trainer.train()
    except TrainingError:
        write_report(folder)  # it says where the run stopped
        raise


def make_runs(request: Reproduce, table: Table, runs: Path, console: Console) -> Made:
    """Makes the missing runs one after the other, leaving out those that other processes make."""
    made = Made()
    waiting = [run for run in table.runs() if missing_evaluations(run, runs, table.scale)]
    with StopRequest() as stop:
        while waiting and not stop.signal:
            passed = len(waiting)
            waiting = [run for run in waiting if _attempt(request, table, run, runs, made, stop, console)]
            if len(waiting) == passed:  # none was free
                break
    made.taken, made.stopped = [run.name for run in waiting], stop.signal
    return made


def _attempt(
    request: Reproduce, table: Table, run: Run, runs: Path, made: Made, stop: StopRequest, console: Console
) -> bool:
    """Makes a run, unless it is done, or nothing more is to be begun; True where another process has it."""
    if stop.signal or not missing_evaluations(run, runs, table.scale):
        return False
    with held(lock_of(run.name, runs)) as free:
        pass
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
    """Runs a command to its end, its output in `log`; a signal to stop is passed on to it, once."""
    with log.open("ab") as output, console.status(log.stem) as status:
        # A session of its own: Ctrl-C in a terminal reaches it through us alone, and a second signal would end it.
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


def say(console: Console, text: str) -> None:
    """Prints text as it is: a path or a log may hold what rich takes for markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of a text file."""
    with log.open(errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=count)]


def check_writable(runs: Path) -> None:
    """OSError unless files can be written into the folder, which is made where it is missing."""
    runs.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=runs).close()
