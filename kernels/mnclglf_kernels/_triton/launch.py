"""Kernel launches as data objects, reused for running, compiling ahead of time, interpreting and counting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor


class Traffic(NamedTuple):
    """Operations and bytes of one launch.

    Unique bytes count each element read once and each result written once: no implementation moves fewer. Issued
    bytes count what the programs request, with every tile that is read again. On a GPU the L2 cache serves the
    difference.
    """

    flops: int  # multiplications and additions of the matrix products only
    unique_bytes: int
    issued_bytes: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch. With tensors on the meta device it can be compiled but not run.

    Attributes:
        kernel: function decorated with triton.jit.
        count: closed form of the traffic, computed from grid and arguments.
        grid: number of programs per axis.
        arguments: all arguments by parameter name. Tensors, tuples of tensors and floats are passed at run time.
            Everything else is a constant of the compiled kernel, so a kernel, these constants and the dtypes make a
            variant.
        warps: number of warps (of 32 threads) per program.
        stages: number of stages of the software pipeline.
    """

    kernel: Any
    count: Callable[[tuple[int, ...], dict[str, Any]], Traffic]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    @property
    def traffic(self) -> Traffic:
        """Operations and bytes of this launch. The tests compare the closed form with the interpreter's count."""
        return self.count(self.grid, self.arguments)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Runs the launches in order on the current stream of `device`."""
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1 keeps the current device
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps, num_stages=launch.stages)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of these tensors; a tensor that is given twice counts once."""
    return sum({id(x): x.numel() * x.itemsize for x in tensors}.values())


def blocks(count: int, size: int) -> int:
    """Returns the number of blocks of `size` elements that cover `count` elements."""
    return -(-count // size)


def architecture(tensor: Tensor) -> int:
    """Returns the compute capability of the tensor's GPU, 86 for sm_86.

    It is 86 too without a GPU: in the interpreter, and for launches that are only compiled.
    """
    if tensor.is_cuda:
        properties = torch.cuda.get_device_properties(tensor.device)
        return 10 * properties.major + properties.minor
    return 86


def sum_dtype(tensor: Tensor) -> tl.dtype:
    """Returns the dtype of an operator's sums: fp64 for fp64 input, fp32 for all others."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
