"""One training step: forward, backward, message to other ranks, guard, optimizer, then the method's own updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mnclglf.config import EngineConfig, OptimConfig
from mnclglf.data.loader import Batch
from mnclglf.methods.base import Losses, Method
from mnclglf.training.guard import Guard
from mnclglf.training.message import StepMessage
from mnclglf.training.optim import make_optimizer, rate_tensor, scheduled_groups
from mnclglf.training.speedups import Forward, checkpoint_activations, compiled, share_casts, sum_in_half


class Recorded(Protocol):
    """A recorded step that is replayed: whole_step.py."""

    def __call__(self, batch: Batch) -> tuple[Losses, Tensor]: ...


class TrainStep:
    """Trains a method, batch by batch, without waiting for the device.

    Args:
        method: the method to train, on the device, in train mode, in the memory format that `engine` asks for.
        optim: settings of the optimizer.
        engine: the optimizations to apply.
        dtype: autocast dtype; float32 switches autocast off.
        compile: "off", "on", "graphs", which also replays CUDA graphs, or "step", whose forward is compiled to be
            recorded with the whole step.
        labels: labels of the run's images, int64 [n], on the device; used by a method that needs them.

    Attributes:
        combo_kernels: whether a forward that is compiled from now on merges independent kernels; see choices.py.
        compile: how the forward is made, as the argument says.
        optimizer: optimizer of optim.py; its learning rates are tensors on the device.
        guard: keeps non-finite values out of the state; its `raise_if_failed` waits for the device.
        scaler: loss scaling for float16; disabled in the other dtypes.
        input: where CUDA graphs read the views of every step; None to copy them into the graphs' own memory.
        overflows: number of steps of this process in which a forward without gradient overflowed in fp16, on the
            device.
        mark: called with the name of each phase of a step as it ends: "data", "forward", "backward".
        number: global step, int64, 0-D, on the device. Like momentum and rates it is written before a step, so that a
            step that was recorded reads it.
        momentum: m of the momentum network, fp64, 0-D, on the device.
        rates: the learning rates that follow the schedule, 0-D each, on the device.
        augment: makes the views [V * N, 3, S, S] of a step from rows [N] and parameters [V * N, 13] on the device; None
            where the loader makes them elsewhere.
        recorded: the whole step as one CUDA graph, which is replayed instead of launching it; None without one.
        message: what ranks tell each other after backward; None in a run of one process.
    """

    def __init__(
        self,
        method: Method,
        optim: OptimConfig,
        engine: EngineConfig,
        dtype: torch.dtype,
        *,
        compile: str = "off",
        labels: Tensor | None = None,
    ) -> None:
        self.method = method
        self.dtype = dtype
        self.labels = labels if method.needs_labels else None
        self.optim = optim
        self.clip_norm = optim.clip_norm
        self.device = next(method.parameters()).device
        self.memory_format = torch.channels_last if engine.channels_last else torch.contiguous_format
        if engine.activation_checkpointing:
            checkpoint_activations(method)
        sum_in_half(method, engine.half_sums_online)
        self.combo_kernels = engine.combo_kernels == "on" and self.device.type == "cuda"
        self.compile = compile
        self.forward = self.forward_of(compile)
        self.optimizer = make_optimizer(method, optim)
        self.rates = self._rates()
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)
        self.momentum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.guard = Guard(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.overflows = torch.zeros((), dtype=torch.int64, device=self.device)
        self.input: Tensor | None = None
        self.mark: Callable[[str], object] = lambda phase: None
        self.augment: Callable[[Tensor, Tensor], Tensor] | None = None
        self.recorded: Recorded | None = None
        self.message = StepMessage(method, self.device, reduce_dtype=engine.reduce_dtype) if method.ranks > 1 else None

    def __call__(self, step: int, batch: Batch, *, lr: float, momentum: float) -> tuple[Losses, Tensor]:
        """Trains on one batch.

        If a loss, the gradient or the queue keys are not finite, weights, momentum network and queue do not change, in
        this step or any later one. An fp16 overflow skips the step; one of the gradient halves the loss scale.

        Returns:
            The losses and the gradient's norm before clipping, both still on the device. A replay writes them where the
            next one does. Losses are means over all ranks; features and neighbors are of this rank's images.
        """
        self.set_schedule(step, lr=lr, momentum=momentum)
        return self.launch(batch) if self.recorded is None else self.recorded(batch)

    def launch(self, batch: Batch) -> tuple[Losses, Tensor]:
        """Trains on one batch as `__call__` does, kernel by kernel, at the step and the rates that the device has."""
        losses = self.backward(batch)
        return losses, self.update(losses, batch)

    def set_schedule(self, step: int, *, lr: float, momentum: float) -> None:
        """Writes what changes from step to step to the device: a number in a launch would be part of a recording."""
        self.number.fill_(step)
        self.momentum.fill_(momentum)
        for rate in self.rates:
            rate.fill_(lr)  # in place: a float would recompile, too

    def forward_of(self, compile: str) -> Forward:
        """Returns the method's forward with shared casts: eager ("off"), compiled ("on") or replayed ("graphs").

        A forward that is recorded with the whole step ("step") is compiled as for "on".
        """
        eager = share_casts(self.method, self.dtype)
        if compile == "off":
            return eager
        return compiled(eager, graphs=compile == "graphs", combo_kernels=self.combo_kernels)

    def fix_input(self, shape: Sequence[int]) -> Tensor:
        """Makes the tensor in which CUDA graphs read the views of every step; what a loader writes there is not copied.

        Args:
            shape: [V * N, 3, S, S].
        """
        from torch._dynamo import mark_static_address  # takes a second, which an eager run need not wait for

        self.input = torch.empty(tuple(shape), dtype=self.dtype, device=self.device, memory_format=self.memory_format)
        mark_static_address(self.input)
        return self.input

    def backward(self, batch: Batch) -> Losses:
        """Returns the losses of a batch, with their gradients, times the loss scale, in the parameters.

        Of several ranks both are means over the ranks.
        """
        # No copy if the loader already made the views channels_last, and in the graphs' input where there is one.
        views = batch.views.contiguous(memory_format=self.memory_format)
        if self.input is not None:
            if views.data_ptr() != self.input.data_ptr():
                self.input.copy_(views)
            views = self.input
        self.mark("data")
        with nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype):
            losses = self.forward(views, None if self.labels is None else self.labels[batch.indices])
        self.mark("forward")
        # Backward runs outside autocast, as PyTorch's documentation recommends: it uses the dtypes of the forward.
        self.scaler.scale(losses.total).backward()
        self.mark("backward")
        if self.message is None:
            return losses
        losses = self.message.average(losses, [*self.parameters()])
        self.mark("message")
        return losses

    def update(self, losses: Losses, batch: Batch) -> Tensor:
        """Updates weights, momentum network and queue after `backward`; returns the gradient's norm before clipping."""
        # Unscale before the norm is taken: the guard, the clipping and the log need the true gradient.
        self.scaler.unscale_(self.optimizer)
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        # Decided on the device: an `if` would make the host wait. The host learns of it when it next logs or saves.
        should_update = self.should_update(losses, gradient_norm)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), self.clip_norm, gradient_norm)
        # GradScaler's contract: an optimizer that reads found_inf = 1 on the device changes nothing. It is set here and
        # not by scaler.step(), which would overwrite it with the overflow of this step alone and ignore the guard.
        self.optimizer.found_inf = (~should_update).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler.update()
        # After the optimizer: Algorithm 1 moves the momentum network towards the new weights, then enqueues the keys.
        self.method.after_step(losses, batch.indices, momentum=self.momentum, should_update=should_update)
        return gradient_norm

    def should_update(self, losses: Losses, gradient_norm: Tensor) -> Tensor:
        """Returns whether the step may change the state: bool, 0-D, on the device."""
        keys = losses.keys if self.message is None else self.message.keys
        values = {**losses.terms, "gradient": gradient_norm} | ({} if keys is None else {"keys": keys})
        gates: list[Tensor] = []
        overflowed = self._overflowed()
        if overflowed is not None:  # the guard would take what follows from it for the end of the run
            values = {name: torch.where(overflowed, 0, value) for name, value in values.items()}
            gates.append(~overflowed)
        if self.scaler.is_enabled():
            # An overflow at a scale of 1 or more only shows that the scale is too large, and GradScaler halves it.
            # Below 1 the unscaled gradient itself is not finite, which no scale can mend: the guard has to see it.
            scale: Tensor = self.scaler._scale  # pyright: ignore  # get_scale() would wait for the device
            gates.append(gradient_norm.isfinite())
            values["gradient"] = torch.where(scale < 1, values["gradient"], 0)
        return reduce(torch.logical_and, gates, self.guard.check(self.number, values))

    def _overflowed(self) -> Tensor | None:
        """Returns whether a forward in fp16 without gradient overflowed in this step, and counts it; None without one.

        Its features are NaN then, and so is what follows from them.
        """
        flags = [encoder.overflow for encoder in self.method.encoders() if encoder.half_sums]
        if not flags:
            return None
        overflowed = torch.stack(flags).any()
        self.overflows += overflowed
        torch._foreach_zero_(flags)  # pyright: ignore
        return overflowed

    def _rates(self) -> list[Tensor]:
        """Returns the learning rates that follow the schedule."""
        return [cast(Tensor, group["lr"]) for group in scheduled_groups(self.optimizer, self.optim)]

    def parameters(self) -> Iterator[Tensor]:
        """Iterates over the parameters that the optimizer updates."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer and the loss scale."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that `state_dict` returned; without a loss scale in it, the current scale stays.

        The optimizer's state is then elsewhere in memory, so a recorded step is dropped.
        """
        self.recorded = None
        self.optimizer.load_state_dict(state["optimizer"])
        # The fused kernels go through a state as its parameter lies in memory, whose format may have changed.
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if value.shape == parameter.shape:
                    kept[name] = torch.empty_like(parameter).copy_(value)
                elif name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):  # which torch does not compare
                    raise ValueError(f"{name} of shape {tuple(value.shape)} for a weight of {tuple(parameter.shape)}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate_tensor(group["lr"], next(self.parameters()))  # that of an older state is a number
        self.rates = self._rates()
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
