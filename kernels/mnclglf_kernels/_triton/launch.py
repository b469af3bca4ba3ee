"""A kernel launch as a value: what is launched on a GPU is what is compiled ahead of time for one that is not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch. Its tensors may be on the meta device: such a launch can be compiled, not run.

    Attributes:
        kernel: what triton.jit made.
        grid: programs by axis.
        arguments: by parameter name, all of them. Tensors, tuples of tensors and floats are passed; everything else is
            a constant of the compiled kernel, so a variant is a kernel, these constants and the dtypes.
        warps: of 32 threads, a program.
        stages: of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Launches in order, on the current stream of `device`."""
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1 changes nothing
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps, num_stages=launch.stages)


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
