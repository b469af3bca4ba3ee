"""`python -m bench.compare [OLD NEW]`: lists the ratios that fell between two saved runs, by default the last two.

It compares ratios, not times: both sides of a ratio were measured in interleaved rounds on one machine. The exit code
is 1 where one fell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.draw import ROOT, Saved, read

FALLEN = 0.10  # fraction of a ratio that may be lost: rounds on a shared machine differ by some percent


class Change(NamedTuple):
    """A ratio in the old and in the new file; larger is faster."""

    name: str
    old: float
    new: float

    @property
    def fell(self) -> bool:
        return self.new < (1 - FALLEN) * self.old


def speeds(saved: Saved) -> dict[str, float]:
    """Returns the ratios of a file by case and implementation."""
    found = {f"{row.case}, {row.implementation}": row.ratio for row in (*saved.operators, *saved.steps)}
    return {name: ratio.median for name, ratio in found.items() if ratio is not None}


def changes(old: Saved, new: Saved) -> list[Change]:
    """Returns the change of every ratio that both files have."""
    before, after = speeds(old), speeds(new)
    return [Change(name, before[name], after[name]) for name in after if name in before]


def newest(folder: Path) -> list[Path]:
    """Returns the last two result files, the older first.

    Raises:
        SystemExit: the folder holds fewer than two.
    """
    found = sorted(path for path in folder.glob("*.json") if path.stem[:1].isdigit())
    if len(found) < 2:
        raise SystemExit(f"{folder} holds {len(found)} results, and a comparison needs two; run make bench")
    return found[-2:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="two JSON files of make bench, the older first")
    paths = parser.parse_args(arguments).results or newest(ROOT / "bench" / "results")
    if len(paths) != 2:
        parser.error(f"{len(paths)} files were given, and two are compared")
    old, new = map(read, paths)
    print(f"old: {paths[0]}: {old.source}\nnew: {paths[1]}: {new.source}")
    if old.device != new.device:
        raise SystemExit("measured on different machines, whose ratios differ; compare results of one machine")
    compared = changes(old, new)
    if not compared:
        raise SystemExit("the two files have no ratio in common")
    fallen = [change for change in compared if change.fell]
    for change in fallen:
        print(f"FELL  {change.name}: {change.old:.2f} -> {change.new:.2f}")
    print(f"{len(compared)} ratios compared, {len(fallen)} fell by more than {FALLEN:.0%}")
    return int(bool(fallen))


if __name__ == "__main__":
    sys.exit(main())
