"""The ladder: a training step of the paper recipe, from Algorithm 1 as printed to ours, one optimisation a rung.

Every rung is a process of its own; all take turns, and a large matrix product in the autocast dtype takes its turn too:
the rate that a step is held against. Then the parts of our step are measured beside their least times.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.roofline import measured_parts, small_share, table
from bench.side_by_side import AUTOCAST, DEVICE, QUICK
from bench.steps import COMPILED, GRAPHS, Size, config_of, rungs
from bench.turns import Comparison
from mnclglf.training.roofline import name_of, peaks_of, step_parts
from mnclglf.training.start import compiler_problem

SIZE = Size(images=32) if QUICK else Size()
NAMES = [
    name for name in rungs(DEVICE) if name not in (COMPILED, GRAPHS) or (not QUICK and compiler_problem(DEVICE) is None)
]  # compiling takes minutes
LADDER = Comparison(kind="ladder", names=tuple(NAMES), size=SIZE, rounds=2 if QUICK else 3)


@pytest.mark.parametrize("name", NAMES)
def test_ladder(name, in_turns) -> None:
    in_turns(LADDER, name)


def test_parts(say: Callable[[str], None]) -> None:
    config = config_of(SIZE)
    measured = measured_parts(config, SIZE.side, DEVICE)
    peaks = peaks_of(DEVICE, AUTOCAST, tf32=True)
    parts = step_parts(config, SIZE.side, name_of(AUTOCAST), pads=peaks.pads)
    say(f"parts of our eager step, {SIZE}, beside their least on {peaks.name}")
    for line in table(parts, peaks, SIZE.images, measured).splitlines():
        say(f"  {line}")
    say(f"  operators and moving average: {small_share(measured):.1%} of what was measured")
