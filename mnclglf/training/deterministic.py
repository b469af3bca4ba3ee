"""--deterministic: the same bits in every run on one machine, on a GPU too, and what that costs.

On a CPU runs have the same bits anyway, so nothing is changed there.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping

import torch

from mnclglf.config import EngineConfig
from mnclglf.data.loader import Batch
from mnclglf.training.graphs import restore_state, saved_state
from mnclglf.training.step import TrainStep
from mnclglf.training.timing import StepClock

WARM_UP, STEPS = 3, 10  # steps per setting; the first ones load kernels


def use_deterministic(on: bool = True) -> None:
    """Makes PyTorch, cuDNN, cuBLAS and Inductor use deterministic algorithms, for the whole process.

    An operator that has none raises RuntimeError and names itself. Before the first product: cuBLAS reads its variable
    once. Source: PyTorch's notes on reproducibility.
    """
    import torch._inductor.config as inductor

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    # By default each allocation is filled, which changes no result: no operator reads what it has not written.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # the stub lacks it
    inductor.deterministic = on


def cost_of(step: TrainStep, batch: Batch, rates: Mapping[str, float], engine: EngineConfig) -> str:
    """Returns a line with the time of an eager step with and without deterministic algorithms; changes no state.

    Args:
        step: the step.
        batch: batch to time it on.
        rates: learning rate and momentum.
        engine: settings as they were asked for.
    """
    if step.device.type != "cuda":
        return "deterministic: no cost, runs on a CPU have the same bits anyway"
    saved, forward, milliseconds = saved_state(step), step.forward, dict[bool, float]()
    step.forward = step.forward_of("off")
    for on in (False, True):  # ends as the run goes on
        use_deterministic(on)
        torch.backends.cudnn.benchmark = engine.cudnn_benchmark and not on
        watch = StepClock(step.device, WARM_UP)
        for _ in range(WARM_UP + STEPS):
            step(0, batch, lr=rates["lr"], momentum=rates["momentum"])
            watch.stop(0.0)
        torch.cuda.synchronize(step.device)
        milliseconds[on] = 1e3 * statistics.median(watch.take()[1])
    step.forward = forward
    restore_state(step, saved)
    return f"deterministic: {milliseconds[True]:.1f} ms instead of {milliseconds[False]:.1f} ms per step, both eager"
