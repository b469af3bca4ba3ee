"""SIGKILL at every operation on a file and at random times; then the same command again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.faults import children
from bench.faults.commands import Attacked, Place
from bench.faults.contents import differences
from bench.faults.operations import kill_before, kill_within_a_write, list_operations
from bench.faults.outcome import Row

COMMANDS = ("train", "report", "knn", "export", "embed", "pack", "unpack")


def attack(count: int, seed: int, folder: Path, names: tuple[str, ...] = COMMANDS) -> Iterator[Row]:
    """Kills each command before each of its operations on files, and the training at `count` random times and writes.

    Args:
        count: kills of the training at random times; a quarter as many within a write.
        seed: of the times, and of which of several equal operations is chosen.
        folder: an empty folder to work in.
        names: some of COMMANDS.
    """
    draw, place = random.Random(seed), Place(folder)
    for name in names:
        attacked = place.undisturbed(name)
        row = Row(f"{name}: SIGKILL before each operation on a file")
        for operation, times in operations_of(place, attacked).items():
            number = draw.randint(1, times)
            hook = partial(kill_before, place.work, operation, number)
            row.add(f"{operation} ({number} of {times})", killed(place, attacked, hook))
        yield row
        if name == "train":
            row = Row("train: SIGKILL at a random time")
            while row.tried < count:
                at_a_random_time(place, attacked, draw.uniform(0, attacked.seconds), row)
            yield row
            row = Row("train: SIGKILL within a write")
            largest = max(path.stat().st_size for path in place.trained().rglob("*") if path.is_file())
            for _ in range(max(1, count // 4)):
                size = draw.randrange(8192, largest)
                row.add(f"at {size} bytes", killed(place, attacked, partial(kill_within_a_write, size)))
            yield row


def operations_of(place: Place, attacked: Attacked) -> Counter[str]:
    """Returns how often a command does each of its changes to files."""
    listed = place.folder / "operations"
    listed.unlink(missing_ok=True)
    place.begin(attacked.before)
    place.run(attacked.name, partial(list_operations, place.work, listed))
    return Counter(line for line in listed.read_text().splitlines() if not line.startswith("read "))


def killed(place: Place, attacked: Attacked, hook: partial[None]) -> list[str]:
    """Runs a command that the hook kills, and again; returns what is lost."""
    place.begin(attacked.before)
    end = place.run(attacked.name, hook)
    if end.code not in (-signal.SIGKILL, -signal.SIGXFSZ):
        return [f"was not killed, but ended with {end.code}"]
    return again(place, attacked)


def at_a_random_time(place: Place, attacked: Attacked, after: float, row: Row) -> None:
    """Kills a command after so many seconds; one that has ended before is not counted."""
    place.begin(attacked.before)
    place.log.unlink(missing_ok=True)
    child = children.start(attacked.arguments, place.log)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    if children.wait(child, place.log).code == -signal.SIGKILL:
        row.add(f"after {after:.2f} s", again(place, attacked))


def again(place: Place, attacked: Attacked) -> list[str]:
    """Gives a command again after it was disturbed; returns what is not as in the undisturbed one."""
    end = place.run(attacked.name)
    if end.code != 0:
        return [f"again ended with {end.code}: {end.text.strip()[-300:]}"]
    return differences(place.work, attacked.true)
