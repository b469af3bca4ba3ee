"""`python -m bench.launches`: counts the kernels that a step launches on CUDA in eager mode, the reference's and ours,
and those that a step with CUDA graphs launches beside its graphs, for each method.

It counts on a CPU at small sizes, on which the number does not depend. Each PyTorch operation that makes no view and no
empty memory is one launch, which is the least (a multi-tensor update or norm is a few). Our Triton kernels are
interpreted, and their launches counted as they are made. Copies inside cuDNN are not seen.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.steps import ABLATION, EAGER, Size, config_of, our_step
from mnclglf.config import METHOD_NAMES, MethodName, ViewConfig
from mnclglf.data.images import ImageArray
from mnclglf.data.loaders.resident import ResidentLoader
from mnclglf.training.start import build_method
from mnclglf.training.step import TrainStep
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


def beside_graphs(name: MethodName) -> tuple[int, int]:
    """Counts what a step with the loader resident launches beside its CUDA graphs.

    Returns:
        The number with a graph of forward and one of backward, and that with one graph of the whole step. Both hold the
        two copies of the views' rows and parameters from the host; none holds the launches of the graphs.
    """
    config, cpu = config_of(SMALL, name), torch.device("cpu")
    config = replace(config, model=replace(config.model, classes=2))
    method = build_method(config, torch.bfloat16).train()
    # What is beside the graphs; the rest is interpreted for minutes, and counted nowhere here.
    method.backends = Backends.all("torch")._replace(augment="triton", enqueue="triton")
    labels = torch.zeros(SMALL.images, dtype=torch.int64)
    step = TrainStep(method, config.optim, config.engine, torch.bfloat16, labels=labels)
    pixels = np.zeros((SMALL.images, SMALL.side, SMALL.side, 3), np.uint8)
    images = ImageArray(name="zeros", split="train", images=pixels, labels=labels.numpy(), classes=("any",))
    loader = ResidentLoader(
        images,
        ViewConfig(blur_probability=0),  # without the blur, whose window is wider than these views
        views=method.views,
        side=SMALL.side,
        batch_size=SMALL.images,
        seed=0,
        dtype=torch.bfloat16,
        device=cpu,
        threads=1,
        statistics=(np.zeros(3, np.float32), np.ones(3, np.float32)),
        backend="triton",
    )
    (batch,) = loader.batches(0, 1)
    assert batch.parameters is not None
    step(0, batch, lr=0.1, momentum=0.99)  # what is made once
    with Launches() as views:
        loader.views_of(batch.indices, batch.parameters)
    with Launches() as schedule:
        step.set_schedule(0, lr=0.1, momentum=0.99)
    losses = step.backward(batch)
    with Launches() as update:
        step.update(losses, batch)
    copies, gradient = 2, 1  # rows and parameters from the host; the gradient of the loss, a fill of ones
    labeled = int(step.labels is not None)  # those of the batch are picked
    before = copies + views.count + labeled + schedule.count + gradient + update.count
    return before, copies + schedule.count + copies  # and to where the recorded step reads them


def main() -> None:
    names = list(ABLATION)[: list(ABLATION).index(EAGER) + 1]
    print("| step, eager | launches at least |\n|---|--:|")
    for name in names:
        print(f"| {name} | {launches(name):,} |")
    print("\n| launches beside CUDA graphs | of forward and backward | of the whole step |\n|---|--:|--:|")
    for name in METHOD_NAMES:
        print("| {} | {} | {} |".format(name, *beside_graphs(name)))


if __name__ == "__main__":
    main()
