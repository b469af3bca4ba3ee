"""Compares a step's estimated memory with its measured memory, with and without activation checkpointing.

Measured is the allocator's peak on a GPU, and on a CPU the most tensor bytes that PyTorch's profiler saw alive at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bench.harness import AUTOCAST, DEVICE, QUICK, peak_bytes
from bench.steps import Size, config_of, our_step
from mnclglf.training.memory import largest_batch, step_memory

SIZE = Size(images=32 if QUICK else 128)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_memory(checkpointing: bool, say: Callable[[str], None]) -> None:
    config = config_of(SIZE)
    config = replace(config, engine=replace(config.engine, activation_checkpointing=checkpointing))
    step = our_step(config, SIZE.side, DEVICE)
    step()
    alive = peak_bytes(step)
    estimate = step_memory(config, SIZE.images, SIZE.side, AUTOCAST)
    fits = largest_batch(config, SIZE.side, AUTOCAST, 24 * 2**30)
    say(
        f"memory, {SIZE}{', activation checkpointing' if checkpointing else ''}: a step had {alive / 2**20:,.0f} MiB "
        f"alive beyond weights and queue, estimated {estimate.for_step / 2**20:,.0f}; "
        f"about {fits:,} images per step fit in 24 GiB"
    )
