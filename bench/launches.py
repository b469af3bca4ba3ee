"""`python -m bench.launches`: kernels that a step launches on CUDA in eager mode, the reference's against ours.

Counted on a CPU, at small sizes, which change none of them: each operation of PyTorch that makes no view and no empty
memory is one launch, which is the least (a multi-tensor update or norm is a few); our Triton kernels are interpreted
and their launches counted as they are made. What cuDNN copies for itself is not seen.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.steps import EAGER, LADDER, Size, config_of, our_step
from mnclglf_kernels import Backends
from mnclglf_kernels._triton.launch import Launch, run

SMALL = Size(images=4, side=8, width=2)


class Launches(TorchDispatchMode):
    """Counts within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        nothing = func.is_view or name.startswith("empty") or name in ("new_empty", "detach", "_local_scalar_dense")
        if func.namespace != "mnclglf" and not nothing:  # ours count themselves
            self.count += 1
        return result

    def run(self, launches: Sequence[Launch], device: torch.device) -> None:
        self.count += len(launches)
        run(launches, device)


def launches(name: str) -> int:
    """Of one step of a rung of the ladder."""
    cpu = torch.device("cpu")
    if name == EAGER:
        step = our_step(config_of(SMALL), SMALL.side, cpu, backends=Backends.all("triton"))
    else:
        step = LADDER[name](SMALL, cpu)
    step()
    with Launches() as counted, mock.patch("mnclglf_kernels._triton.launch.run", counted.run):
        step()
    return counted.count


def main() -> None:
    names = list(LADDER)[: list(LADDER).index(EAGER) + 1]
    print("| step, eager | launches at least |\n|---|--:|")
    for name in names:
        print(f"| {name} | {launches(name):,} |")


if __name__ == "__main__":
    main()
