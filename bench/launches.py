"""`python -m bench.launches`: counts the kernels that a step launches on CUDA in eager mode, the reference's and ours.

It counts on a CPU at small sizes, on which the number does not depend. Each PyTorch operation that makes no view and no
empty memory is one launch, which is the least (a multi-tensor update or norm is a few). Our Triton kernels are
interpreted, and their launches counted as they are made. Copies inside cuDNN are not seen.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.steps import ABLATION, EAGER, Size, config_of, our_step
from mnclglf_kernels import Backends
from mnclglf_kernels._triton import launch

SMALL = Size(images=4, side=8, width=2)


class Launches(TorchDispatchMode):
    """Counts the launches within it."""

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

    def __enter__(self) -> Launches:
        launch.run, self.uncounted = self.run, launch.run
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        launch.run = self.uncounted
        super().__exit__(*error)

    def run(self, launches: Sequence[launch.Launch], device: torch.device) -> None:
        self.count += len(launches)
        self.uncounted(launches, device)


def launches(name: str) -> int:
    """Counts one step of a variant of the ablation."""
    cpu = torch.device("cpu")
    if name == EAGER:
        step = our_step(config_of(SMALL), SMALL.side, cpu, backends=Backends.all("triton"))
    else:
        step = ABLATION[name](SMALL, cpu)
    step()
    with Launches() as counted:
        step()
    return counted.count


def main() -> None:
    names = list(ABLATION)[: list(ABLATION).index(EAGER) + 1]
    print("| step, eager | launches at least |\n|---|--:|")
    for name in names:
        print(f"| {name} | {launches(name):,} |")


if __name__ == "__main__":
    main()
