"""Measures the ablation: a training step of the paper recipe, from Algorithm 1 as printed to ours.

Every variant has one optimization more and runs in a process of its own, in interleaved rounds. Each round also times a
large matrix product in the autocast dtype, to compare the step's FLOP/s with. Then the parts of our step are measured
and printed beside their roofline times.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.harness import AUTOCAST, DEVICE, QUICK
from bench.roofline import measured_parts, small_share, table
from bench.rounds import Comparison
from bench.steps import COMPILED, GRAPHS, Size, config_of, variants
from mnclglf.training.roofline import peaks_of, short_name, step_parts
from mnclglf.training.start import compiler_problem

SIZE = Size(images=32) if QUICK else Size()
NAMES = [
    name
    for name in variants(DEVICE)
    if name not in (COMPILED, GRAPHS) or (not QUICK and compiler_problem(DEVICE) is None)  # compiling takes minutes
]
ABLATION = Comparison(kind="ablation", names=tuple(NAMES), size=SIZE, rounds=2 if QUICK else 3)


@pytest.mark.parametrize("name", NAMES)
def test_ablation(name: str, interleaved: Callable[[Comparison, str], None]) -> None:
    interleaved(ABLATION, name)


def test_parts(say: Callable[[str], None]) -> None:
    config = config_of(SIZE)
    measured = measured_parts(config, SIZE.side, DEVICE)
    peaks = peaks_of(DEVICE, AUTOCAST, tf32=True)
    parts = step_parts(config, SIZE.side, short_name(AUTOCAST), pads=peaks.pads)
    say(f"parts of our eager step, {SIZE}, beside their roofline times on {peaks.name}")
    for line in table(parts, peaks, SIZE.images, measured).splitlines():
        say(f"  {line}")
    say(f"  operators and moving average: {small_share(measured):.1%} of the measured time")
