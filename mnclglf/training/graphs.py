"""CUDA graphs of a step: whether a run can replay them, and the proof that its replays compute what the launches do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from mnclglf.config import EngineConfig
from mnclglf.data.loader import Batch
from mnclglf.methods.base import Losses
from mnclglf.training.speedups import Forward
from mnclglf.training.step import TrainStep

REPLAYS = 2  # compared with the launches
USED = f"used, {REPLAYS} replays were bit-equal to the compiled step"


def ruled_out(engine: EngineConfig, device: torch.device, ranks: int = 1) -> str | None:
    """Returns what rules CUDA graphs out of a run of `ranks` processes, or None; torch.compile may lack more."""
    reasons = {
        "--graphs off": engine.graphs == "off",
        "the run is on the CPU": device.type != "cuda",
        "--compile off": engine.compile == "off",
        "--activation-checkpointing is not compiled": engine.activation_checkpointing,
        f"--lookup {engine.lookup} cannot be in a graph": engine.lookup != "auto",
        f"--graphs auto leaves them out over {ranks} ranks": ranks > 1 and engine.graphs == "auto",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def problem_of_replays(step: TrainStep, batch: Batch, *, lr: float, momentum: float) -> str | None:
    """Returns why the CUDA graphs of `step.forward`, which was not called before, cannot be trusted; None if they can.

    The first call of a forward of mode "reduce-overhead" launches the compiled kernels one by one, as without graphs;
    the second one records them, and replays begin with the third. So one compilation gives both sides.

    Raises:
        TorchDynamoException: the forward cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.utils import counters  # takes a second, which an eager run need not wait for

    before = counters["inductor"]["cudagraph_skips"]
    try:
        problem = first_difference(step, step.forward, step.forward, batch, lr=lr, momentum=momentum)
    except TorchDynamoException:
        raise
    except RuntimeError as error:  # of the recording: too little memory, or a kernel that cannot be recorded
        return f"they fail: {' '.join(str(error).split()[:40])}"
    if problem is None and counters["inductor"]["cudagraph_skips"] > before:
        return "torch cannot record this step; TORCH_LOGS=cudagraphs says why"
    return problem


def first_difference(
    step: TrainStep, plain: Forward, replayed: Forward, batch: Batch, *, lr: float, momentum: float
) -> str | None:
    """Compares training steps by two forwards from the same state, which is restored afterwards, bit for bit.

    Takes five steps. Before each replay that is compared, a step on other images and from another state records or
    replays the graphs, so that a replay of old inputs or old weights shows.

    Returns:
        The first loss, gradient or tensor of the method's state after the step that is not bit-equal; None if all are.
    """
    other = Batch(batch.views.roll(1, 0), batch.indices.roll(1, 0))
    batch = Batch(batch.views.clone(), batch.indices)  # they may lie where the steps on `other` write their input
    start = saved_state(step)
    try:
        expected = _outcome(step, plain, batch, lr, momentum)
        for _ in range(REPLAYS):
            _outcome(step, replayed, other, lr, momentum)
            restore_state(step, start)
            problem = difference(expected, _outcome(step, replayed, batch, lr, momentum))
            if problem is not None:
                return f"the first difference is in {problem}"
        return None
    finally:
        restore_state(step, start)
        if step.input is not None:
            step.input.copy_(batch.views)


def _outcome(step: TrainStep, forward: Forward, batch: Batch, lr: float, momentum: float) -> dict[str, Tensor]:
    """Takes one step by `forward`; returns copies of its losses, its gradients and the method's state after it."""
    kept, step.forward = step.forward, forward
    step.set_schedule(0, lr=lr, momentum=momentum)
    try:
        losses = step.backward(batch)
    finally:
        step.forward = kept
    found = copies(tensors_of(losses) | gradients_of(step.method))  # now: the next replay writes where these lie
    step.update(losses, batch)
    return found | copies(step.method.state_dict())


def tensors_of(losses: Losses) -> dict[str, Tensor]:
    """Returns the result of a forward by name."""
    found = {"total": losses.total, **losses.terms, "features": losses.features}
    return found | {name: x for name, x in (("keys", losses.keys), ("neighbors", losses.neighbors)) if x is not None}


def gradients_of(method: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients of a method's parameters, by the words that name them to a user."""
    return {f"the gradient of {name}": x.grad for name, x in method.named_parameters() if x.grad is not None}


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """Returns the first name whose tensors are not bit-equal, and how many of its values differ."""
    for name in {**expected, **found}:
        if name not in expected or name not in found:
            return f"{name}, which only one of both has"
        size = expected[name].itemsize
        a, b = (x[name].contiguous().view(-1).view(torch.uint8).view(-1, size) for x in (expected, found))
        if not torch.equal(a, b):
            return f"{name}: {int((a != b).any(1).sum()):,} of {len(a):,} values"
    return None


def copies(values: Any) -> Any:
    """Returns nested values with each tensor copied into host memory, where a step of the largest batch leaves room."""
    return tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), values)


def saved_state(step: TrainStep) -> dict[str, Any]:
    """Returns a copy of everything that a step changes."""
    return copies(
        {
            "method": dict(step.method.state_dict()),
            "step": step.state_dict(),
            "guard": vars(step.guard),
            "overflows": step.overflows,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(step.device) if step.device.type == "cuda" else None,
        }
    )


def restore_state(step: TrainStep, saved: dict[str, Any]) -> None:
    """Sets everything that a step changes to what is `saved`, in the place where graphs read and write it.

    Only what an optimizer makes in its first step is elsewhere afterwards; `load_state_dict` then drops a recorded one.
    """
    for name, x in step.method.state_dict().items():
        x.copy_(saved["method"][name])
    step.optimizer.zero_grad()  # of a step that was broken off
    step.overflows.copy_(saved["overflows"])
    for encoder in step.method.encoders():
        if encoder.half_sums:
            encoder.overflow.zero_()
    values, structure = tree_flatten(step.optimizer.state_dict())
    before, structure_before = tree_flatten(saved["step"]["optimizer"])
    if structure == structure_before:
        for x, y in zip(values, before, strict=True):
            if isinstance(x, Tensor):
                x.copy_(y)
        if saved["step"]["scaler"]:
            step.scaler.load_state_dict(saved["step"]["scaler"])
    else:
        step.load_state_dict(copies(saved["step"]))
    guard, finite = step.guard, saved["guard"]["finite"]
    guard.failed_step.copy_(saved["guard"]["failed_step"])
    guard.finite.copy_(finite if finite.shape == guard.finite.shape else torch.ones_like(guard.finite))
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"] is not None:
        torch.cuda.set_rng_state(saved["cuda_rng"], step.device)
