"""The parts of `python -m bench.faults`, by name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.faults import checkpoints, disk, inputs, kills, pairs, ranks, signals
from bench.faults.bombs import BOMBS
from bench.faults.outcome import Row


def attack_inputs(count: int, seed: int, folder: Path) -> Iterable[Row]:
    """Reads damaged inputs, `count` in all, and every bomb."""
    counts = inputs.counts_of(count)
    rows = [Row(f"inputs: damaged, of {len(counts) - len(BOMBS)} kinds"), Row("inputs: bombs, each of another kind")]
    for tally in inputs.attack(counts, seed):
        row = rows[tally.kind.startswith("bomb: ")]
        row.tried += tally.tried
        row.lost += [f"{tally.kind} {lost}" for lost in tally.lost]
    yield from rows


Attack = Callable[[int, int, Path], Iterable[Row]]
PARTS: dict[str, tuple[Attack, int]] = {
    "kills": (kills.attack, 100),
    "disk": (disk.attack, 24),
    "pairs": (pairs.attack, 20),
    "signals": (signals.attack, 20),
    "ranks": (ranks.attack, 4),
    "checkpoints": (checkpoints.attack, 500),
    "inputs": (attack_inputs, 10_000),
}
"""Each part, and how often it attacks; what is counted is said by the part."""


def run(part: str, count: int | None, seed: int) -> list[Row]:
    """Runs one part."""
    attack, usual = PARTS[part]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return list(attack(usual if count is None else count, seed, Path(folder)))
