"""Two commands at once in one run directory: the second waits or is refused by name, and nothing is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from bench.faults import children
from bench.faults.commands import Place
from bench.faults.contents import contents_of, differences
from bench.faults.outcome import Row

PAIRS = [
    *[("train", other) for other in ("train", "report", "knn", "linear", "export", "embed")],
    *[(name, name) for name in ("report", "knn", "export", "embed", "pack", "unpack")],
    *[("report", "knn"), ("knn", "linear"), ("knn", "logistic"), ("export", "embed"), ("linear", "report")],
]
REFUSED = (
    "is being trained by process",
    "was trained by another process",
    "is being written by another process",
    "is being packed by process",
)


def attack(count: int, seed: int, folder: Path) -> Iterator[Row]:
    """Starts each pair `count` times, the second after up to the time that the first takes.

    Args:
        count: times of each pair.
        seed: of the times between the two starts.
        folder: an empty folder to work in.
    """
    draw, place = random.Random(seed), Place(folder)
    seconds = {name: place.undisturbed(name).seconds for name in {name for pair in PAIRS for name in pair}}
    for pair in PAIRS:
        row = Row(f"{pair[0]} and {pair[1]} at once")
        before = place.half_trained() if "train" in pair else place.trained()
        if pair[0] in ("pack", "unpack"):
            before = place.folder / "empty"
        true = one_after_the_other(place, before, pair)
        for _ in range(count):
            after = draw.choice([0.0, draw.uniform(0, seconds[pair[0]])])
            row.add(f"{after:.3f} s later", at_once(place, before, pair, after, true))
        yield row


def one_after_the_other(place: Place, before: Path, pair: tuple[str, str]) -> dict[str, object]:
    """Returns what the folder holds after both commands."""
    place.begin(before)
    for name in pair:
        place.succeed(name)
    return contents_of(place.work)


def at_once(place: Place, before: Path, pair: tuple[str, str], after: float, true: dict[str, object]) -> list[str]:
    """Runs a pair of commands at once; returns what is wrong: their ends, and what the folder holds then."""
    place.begin(before)
    logs = [place.folder / f"log-{number}" for number in (1, 2)]
    started: list[int] = []
    for name, log in zip(pair, logs, strict=True):
        log.unlink(missing_ok=True)
        started.append(children.start(place.command(name), log))
        time.sleep(after if len(started) == 1 else 0)
    ends = [children.wait(child, log) for child, log in zip(started, logs, strict=True)]
    problems: list[str] = []
    for name, end in zip(pair, ends, strict=True):
        refused = end.code == 1 and any(words in " ".join(end.text.split()) for words in REFUSED)
        if end.code != 0 and not refused:
            problems.append(f"{name} ended with {end.code}: {end.text.strip()[-400:]}")
    if all(end.code != 0 for end in ends):
        problems.append("both were refused")
    # What a refused one, or one that came before the training ended, has not done is done now.
    for name in pair:
        end = place.run(name)
        if end.code != 0:
            problems.append(f"{name}, again, ended with {end.code}: {end.text.strip()[-400:]}")
    return problems + differences(place.work, true)
