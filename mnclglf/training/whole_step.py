"""The whole step as one CUDA graph: augmentation, forward, backward, guard, optimizer, moving average and queue.

It needs images that stay on the device. What changes from step to step is written to the device before a replay: the
rows and parameters of the views, the step's number, the learning rates and m. A number that the host passed to a launch
would be replayed as it was when the step was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mnclglf.data.loader import Batch
from mnclglf.methods.base import Losses
from mnclglf.training.graphs import REPLAYS, copies, difference, restore_state, saved_state, tensors_of
from mnclglf.training.step import TrainStep

USED_WHOLE = f"used for the whole step, {REPLAYS} replays were bit-equal to the launched step"
OUTSIDE = "the loader makes the views outside of the step"
T = TypeVar("T")


class WholeStep:
    """A training step that was recorded once and is replayed.

    Args:
        step: the step to record, which may take two more steps for it; its forward is not to replay graphs of its own.
        batch: a batch of the loader whose views `step.augment` makes.

    Raises:
        RuntimeError: it cannot be recorded, for instance as it waits for the device.
    """

    def __init__(self, step: TrainStep, batch: Batch) -> None:
        augment = step.augment
        if augment is None or batch.parameters is None:
            raise RuntimeError(OUTSIDE)
        self.rows, self.parameters = batch.indices.clone(), batch.parameters.clone()
        # Kept as long as the graph: kernels are unloaded with a compiled forward, and choices.py makes buffers anew.
        self.kept = step.forward, [*step.method.buffers()]

        def launched() -> tuple[Losses, Tensor]:
            found = step.launch(Batch(augment(self.rows, self.parameters), self.rows, self.parameters))
            # Detached: autograd's nodes remember their stream, which another recording may not use.
            return tree_map_only(Tensor, Tensor.detach, found)

        mark, step.mark = step.mark, lambda phase: None  # an event that is recorded has no time
        try:
            self.replay, self.outcome = record(launched, step.device)
        finally:
            step.mark = mark

    def __call__(self, batch: Batch) -> tuple[Losses, Tensor]:
        """Takes a step on a batch; its views are not read. The next call overwrites what this one returns."""
        assert batch.parameters is not None, "a batch of the loader that made the recorded one"
        self.rows.copy_(batch.indices)
        self.parameters.copy_(batch.parameters)
        self.replay()
        return self.outcome


def record(run: Callable[[], T], device: torch.device) -> tuple[Callable[[], None], T]:
    """Runs a function once and records it as a CUDA graph; returns what replays it, and where each replay's result is.

    Source: PyTorch's notes on CUDA semantics, "CUDA Graphs".
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # makes what is made once: workspaces of the libraries, the loss scale, compiled kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread pins memory meanwhile, which is forbidden while "global" records.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result


def problem_of_whole_step(step: TrainStep, batch: Batch, *, lr: float, momentum: float) -> str | None:
    """Records the whole step and keeps it in `step.recorded`, if its replays are bit-equal to the launched step.

    It is recorded, and before each replay that is compared it is replayed, with other images, rates and step number,
    so that what is part of the recording shows. Everything that a step changes is as before afterwards.

    Args:
        step: the step, with a forward that is compiled or eager, without graphs of its own.
        batch: the first batch, with its views.
        lr: learning rate of the steps that are compared.
        momentum: m of them.

    Returns:
        Why it cannot be replayed; None if it can.

    Raises:
        TorchDynamoException: the forward cannot be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second, which an eager run need not wait for

    step.recorded = None
    if step.augment is None or batch.parameters is None:
        return OUTSIDE
    other = Batch(batch.views, batch.indices.roll(1), batch.parameters.roll(1, 0))
    start, problem, proved = saved_state(step), None, None
    try:
        expected = _outcome(step, batch, 0, lr, momentum)
        step.set_schedule(1, lr=lr / 2, momentum=momentum / 2)
        step.recorded = whole = WholeStep(step, other)
        for _ in range(REPLAYS):
            _outcome(step, other, 1, lr / 2, momentum / 2)
            restore_state(step, start)
            if step.recorded is not whole:
                problem = "the optimizer makes its state in its first step"
            else:
                problem = difference(expected, _outcome(step, batch, 0, lr, momentum))
                problem = problem and f"the first difference is in {problem}"
            if problem is not None:
                break
        else:
            proved = whole
    except TorchDynamoException:
        raise
    except RuntimeError as error:  # of the recording: it waits for the device, or the memory is full
        problem = f"it cannot be recorded: {' '.join(str(error).split()[:40])}"
    finally:
        restore_state(step, start)
        step.augment(batch.indices, batch.parameters)  # again, where every batch's views are written to one place
        step.recorded = proved
    return problem


def _outcome(step: TrainStep, batch: Batch, number: int, lr: float, momentum: float) -> dict[str, Tensor]:
    """Takes one step; returns copies of its losses and of all that it changed."""
    losses, gradient_norm = step(number, batch, lr=lr, momentum=momentum)
    found = tensors_of(losses) | {"the gradient's norm": gradient_norm} | step.method.state_dict()
    for i, x in enumerate(tree_leaves(step.state_dict())):
        if isinstance(x, Tensor | float | int):
            found[f"number {i} of the optimizer's state and the loss scale"] = torch.as_tensor(x)
    return copies(found | {"overflows": step.overflows, "the guard": step.guard.failed_step})
