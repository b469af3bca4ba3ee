"""`python -m bench.compare [OLD NEW]`: which ratios of saved benchmarks have fallen; by default of the last two.

Ratios, not times: both sides of a ratio were measured in turns on one machine. Ends with 1 where one fell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.draw import ROOT, Saved, read

FALLEN = 0.10  # share of a ratio that it may lose; turns on a shared machine differ by some percent


class Change(NamedTuple):
    """A ratio then and now, as large as it is fast."""

    name: str
    old: float
    new: float

    @property
    def fell(self) -> bool:
        return self.new < (1 - FALLEN) * self.old


def speeds(saved: Saved) -> dict[str, float]:
    """The ratios of a file, by what they are of."""
    found = {f"{row.case}, {row.implementation}": row.ratio for row in (*saved.rows, *saved.steps)}
    return {name: ratio.median for name, ratio in found.items() if ratio is not None}


def changes(old: Saved, new: Saved) -> list[Change]:
    """Of every ratio that both have."""
    before, after = speeds(old), speeds(new)
    return [Change(name, before[name], after[name]) for name in after if name in before]


def newest(folder: Path) -> list[Path]:
    """The last two results, the older first.

    Raises:
        SystemExit: there are not two.
    """
    found = sorted(path for path in folder.glob("*.json") if path.stem[:1].isdigit())
    if len(found) < 2:
        raise SystemExit(f"{folder} holds {len(found)} results, and comparing needs two; run make bench")
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
        raise SystemExit("measured on different machines, whose ratios differ; compare results of one")
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
