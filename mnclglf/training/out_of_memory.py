"""What to change when a run does not fit the memory: the largest batch that does, and the switch that saves most."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch

from mnclglf.config import RunConfig, UsageError
from mnclglf.training.memory import RESERVED, largest_batch, step_memory
from mnclglf.training.start import Machine, name_of
from mnclglf_kernels.backend import HAS_TRITON

_GIB = 2**30
_HOPELESS = 2.0  # times the memory of a device; the estimate is of eager mode, and a compiled step needs less
_WORTH = 0.97  # share of the memory below which a switch is named
_SIDES = (3 / 4, 1 / 2)  # of the views' side, tried where no switch helps


@contextmanager
def explained(config: RunConfig, side: int, machine: Machine) -> Generator[None]:
    """Context that turns an out-of-memory error into a UsageError that names what fits; for the start of a run."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(advice(config, side, machine, available_bytes(machine.device))) from error


def check_memory(config: RunConfig, side: int, machine: Machine, ranks: int) -> None:
    """Raises UsageError, before anything is allocated, for a run that needs far more memory than its device has.

    Linux promises a process more memory than there is, and ends the process, or another one, when it is used.
    """
    if not HAS_TRITON:  # the estimate counts its kernels
        return
    with torch.random.fork_rng(devices=[]):
        needed = step_memory(config, config.optim.batch_size // ranks, side, machine.dtype).total
    available = available_bytes(machine.device)
    if needed > _HOPELESS * available:
        raise UsageError(advice(config, side, machine, available))


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that a device's memory is full; a CPU's has no class of its own in torch."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def available_bytes(device: torch.device) -> int:
    """Returns the bytes that this process can have on a device: those that are free, and those that it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def advice(config: RunConfig, side: int, machine: Machine, available: int, *, peak: int = 0) -> str:
    """Returns what was too large, the largest batch that fits, and the switch that saves most.

    Args:
        config: the run that did not fit.
        side: side of a view in pixels.
        machine: its device and autocast dtype.
        available: bytes of the device that this process can have.
        peak: most bytes that tensors have taken; 0 if not measured.
    """
    batch, dtype = config.optim.batch_size, machine.dtype
    needed = step_memory(config, batch, side, dtype).total
    usable = max(available - RESERVED, available // 2)
    # The run did not fit, so its tensors need what there is at least, and what was measured: the estimate is scaled by
    # that. Where it was too low, a tenth is left free besides.
    factor = max(1.0, usable / needed, peak / needed)
    budget = RESERVED + int(usable / factor * (1 if factor == 1 else 0.9))
    measured = f", {peak / _GIB:.2g} GiB measured until then" if peak else ""
    text = (
        f"out of memory: a step on {batch} images of side {side} needs about {factor * needed / _GIB:.2g} GiB"
        f"{measured}, and {available / _GIB:.2g} GiB can be had"
    )
    fits = _at_most(largest_batch(config, side, dtype, budget), batch - 1)
    if fits:
        text += f"; the largest batch that fits is about {fits}: --batch-size {fits}, in another --out"
    else:
        text += "; no batch fits at this side"
    return f"{text}. {_best_switch(config, side, dtype, budget, needed)}"


def _best_switch(config: RunConfig, side: int, dtype: torch.dtype, budget: int, needed: int) -> str:
    """Returns a sentence about the switch that saves most memory, else about a smaller side of the views."""
    engine, batch = config.engine, config.optim.batch_size
    tried: dict[str, tuple[RunConfig, torch.dtype]] = {}
    if not engine.activation_checkpointing and "on" not in (engine.compile, engine.graphs):
        checkpointed = replace(config, engine=replace(engine, activation_checkpointing=True))
        tried["--activation-checkpointing"] = checkpointed, dtype
    if dtype == torch.float32:
        tried["--precision bf16"] = config, torch.bfloat16
    taken = {name: step_memory(changed, batch, side, other).total for name, (changed, other) in tried.items()}
    best = min(taken, key=lambda name: taken[name], default=None)
    fits = _at_most(largest_batch(tried[best][0], side, tried[best][1], budget)) if best is not None else 0
    if best is not None and fits and taken[best] < _WORTH * needed:
        saved = 1 - taken[best] / needed
        return f"The switch that saves most is {best}: {saved:.0%} of it, so that about {fits} fit"
    smaller = [2 * round(share * side / 2) for share in _SIDES]
    found = {at: largest_batch(config, at, dtype, budget) for at in smaller if at >= 8}
    told = ", ".join(f"--image-size {at} about {_at_most(fits)}" for at, fits in found.items() if fits)
    no = f"No switch saves memory in {name_of(dtype)} here"
    return f"{no}; smaller views do: {told} fit" if told else f"{no}; take a smaller --width"


def _at_most(fits: int, most: int | None = None) -> int:
    """Returns a batch for a message: a multiple of 8 where it is at least 16, and at most `most`."""
    fits = fits if most is None else min(fits, most)
    return fits // 8 * 8 if fits >= 16 else fits if fits >= 2 else 0
