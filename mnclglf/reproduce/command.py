"""mnclglf reproduce: checks, says what it will make and how long that takes, makes it, writes the table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mnclglf.config import require
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet
from mnclglf.data.splits import split_train
from mnclglf.reproduce.estimate import expected_share, training_hours
from mnclglf.reproduce.plan import Reproduce, Run, make_table
from mnclglf.reproduce.results import missing_evaluations, other_settings, whole_table
from mnclglf.reproduce.run import TAKEN, check_writable, command_of, held, lock_of, make_run, make_runs, say
from mnclglf.reproduce.table import lines_of, write_table
from mnclglf.training.device import choose_device


def reproduce(request: Reproduce, console: Console) -> int:
    """Makes what is asked for of a table of the paper and writes the whole table, or prints the commands of its runs.

    Returns:
        0 when all that was asked for is there; 1 where a run failed; TAKEN where other processes are still at work on
        some; 128 + N when stopped by signal N.
    """
    table, runs = make_table(request), request.folder / "runs"
    wanted = table.runs() if request.only is None else [table.run(request.only)]
    missing = [run for run in wanted if missing_evaluations(run, runs, table.scale)]
    if request.plan:
        sys.stdout.writelines(f"{shlex.join(command_of(request, run.name))}\n" for run in missing)
        return 0
    check_settings(wanted, runs)
    lines_of(whole_table(request, runs), runs)  # a damaged file of any run shows before work is done
    images = load_images(missing) if request.only is None else {}  # a single run loads its own
    check_writable(runs)
    if request.only is not None:
        code = make_run(wanted[0], runs, table.scale, console)
        _write(request)
        return code
    if missing:
        say(console, f"{table.name} at scale {request.scale}, in {request.folder}")
        describe_work(missing, len(wanted), runs, images, console)
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
    """ValueError where a run cannot be made on this machine, or its directory holds another one."""
    for run in runs:
        choose_device(run.config.engine)
        changed = other_settings(folder / run.name, run.config)
        require(
            not changed,
            f"{folder / run.name} holds a run of other settings ({'; '.join(changed)}); give another --out, or move it "
            "away",
        )


def load_images(runs: Sequence[Run]) -> dict[str, ImageSet]:
    """The images that each data set of the runs pre-trains on.

    Raises:
        DataError: a data set's files are missing or damaged.
    """
    data = {run.config.dataset: run.config.data for run in runs}
    return {
        name: split_train(load_dataset(name, config.data_dir, download=config.download)[0], config)[0]
        for name, config in data.items()
    }


def describe_work(
    missing: Sequence[Run], wanted: int, runs: Path, images: dict[str, ImageSet], console: Console
) -> None:
    """Prints the runs that will be made, with their estimated hours on this machine."""
    share, source = expected_share(runs)
    hours = [training_hours(run, runs, images, share) for run in missing]
    known = [value for value in hours if value is not None]
    for run, value in zip(missing, hours, strict=True):
        say(console, f"  {run.name}: {_hours(value)}")
    total = f"{_hours(sum(known))} of training" if len(known) == len(hours) else "how long they take is not known"
    say(
        console,
        f"{wanted} runs, {wanted - len(missing)} done, {len(missing)} to make: {total} on this machine, without the "
        "evaluations"
        + (f"; at {share:.0%} of the machine's limit, {source}" if known else " (the estimate needs Triton)"),
    )


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:.2f} h"


def _write(request: Reproduce) -> list[Path]:
    runs = request.folder / "runs"
    with held(lock_of(request.table, runs), wait=True):  # else the older of two states may be written last
        return write_table(whole_table(request, runs), request.folder)
