"""A kernel launch as a value: what is launched on a GPU is what is compiled ahead of time for one that is not here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor


class Traffic(NamedTuple):
    """Operations and bytes of one launch.

    Unique bytes are what any implementation has to move: each element read once, each result written once. Issued
    bytes are what the programs ask for, tiles that are read again included: on a GPU L2 serves the difference.
    """

    flops: int  # multiplications and additions of the matrix products; the rest is not counted
    unique_bytes: int
    issued_bytes: int


@dataclass(frozen=True)
class Launch:
    """One launch. Its tensors may be on the meta device: such a launch can be compiled, not run.

    Attributes:
        kernel: what triton.jit made.
        count: the traffic in closed form, from grid and arguments.
        grid: programs by axis.
        arguments: by parameter name, all of them. Tensors, tuples of tensors and floats are passed; everything else is
            a constant of the compiled kernel, so a variant is a kernel, these constants and the dtypes.
        warps: of 32 threads, a program.
        stages: of the software pipeline.
    """

    kernel: Any
    count: Callable[[tuple[int, ...], dict[str, Any]], Traffic]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    @property
    def traffic(self) -> Traffic:
        """Operations and bytes of this launch (tests hold the closed form to what the interpreter counts)."""
        return self.count(self.grid, self.arguments)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launches in order, on the current stream of `device`."""
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1 changes nothing
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps, num_stages=launch.stages)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, each counted once."""
    return sum({id(x): x.numel() * x.itemsize for x in tensors}.values())


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return -(-count // size)


def architecture(tensor: Tensor) -> int:
    """86 for sm_86; also where there is none to ask, in the interpreter and for launches that are only compiled."""
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        return 10 * properties.major + properties.minor
    return 86


def sum_dtype(tensor: Tensor) -> tl.dtype:
    """What an operator sums in: fp64 for fp64, fp32 for everything else."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
