"""One training step, and the optimisations that it runs under.

An optimisation is one function, applied to a method that knows nothing of it, and EngineConfig switches each alone;
without all of them the step gives the same numbers, up to rounding.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from mnclglf.config import EngineConfig, OptimConfig
from mnclglf.data.loader import Batch
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import running_statistics_kept
from mnclglf.training.guard import Guard


class Forward(Protocol):
    """A method, or what computes the same losses faster."""

    def __call__(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Losses: ...


class TrainStep:
    """Trains a method, batch by batch; nothing in it waits for the device.

    Args:
        method: on the device, in train mode, its weights in the memory format that `engine` asks for.
        optim: of the optimizer.
        engine: which optimisations to apply.
        dtype: autocast's; float32 for none.
        compile: "off", "on", or "graphs", which also replays CUDA graphs.
        labels: of all of the run's images, int64 on the device, for a labelled method.

    Attributes:
        optimizer: fused SGD; its first group follows the schedule.
        guard: keeps anything non-finite out; ask it, when the device may be waited for, with `raise_if_failed`.
        scaler: of the loss; does nothing unless `dtype` is float16.
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
        self.method, self.dtype = method, dtype
        self.labels = labels if method.labelled else None
        self.clip_norm = optim.clip_norm
        self.device = next(method.parameters()).device
        self.memory_format = torch.channels_last if engine.channels_last else torch.contiguous_format
        if engine.activation_checkpointing:
            checkpoint_activations(method)
        self.forward = share_casts(method, dtype) if compile == "off" else compiled(method, graphs=compile == "graphs")
        self.optimizer = make_optimizer(method, optim)
        self.guard = Guard(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def __call__(self, step: int, batch: Batch, *, lr: float, momentum: float) -> tuple[Losses, Tensor]:
        """Trains on one batch; gives the losses and the gradient's norm (unclipped), both still on the device.

        Where loss, gradient or queue keys are not finite, now or in an earlier step, weights, momentum network and
        queue stay as they are. In fp16 a gradient that overflows only costs its step, and the loss scale falls.
        """
        views = [view.contiguous(memory_format=self.memory_format) for view in batch.views]
        with nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype):
            losses = self.forward(views, None if self.labels is None else self.labels[batch.indices])
        self.scaler.scale(losses.total).backward()
        self.scaler.unscale_(self.optimizer)
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        keep = self.kept(step, losses, gradient_norm)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), self.clip_norm, gradient_norm)
        # What torch's GradScaler does: the fused kernel reads it on the device, and leaves everything as it is.
        self.optimizer.found_inf = (~keep).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.param_groups[0]["lr"].fill_(lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler.update()
        self.method.after_step(losses, batch.indices, momentum=momentum, should_update=keep)
        return losses, gradient_norm

    def kept(self, step: int, losses: Losses, gradient_norm: Tensor) -> Tensor:
        """Whether the step is to be kept: bool, 0-D, on the device."""
        keys = {} if losses.keys is None else {"keys": losses.keys}
        if not self.scaler.is_enabled():
            return self.guard.check(step, {**losses.terms, "gradient": gradient_norm, **keys})
        # Overflow is how the scale finds its size; a gradient that is not finite unscaled is broken for good.
        scale: Tensor = self.scaler._scale  # pyright: ignore  # get_scale() would wait for the device
        gradient = torch.where(scale < 1, gradient_norm, torch.zeros_like(gradient_norm))
        return self.guard.check(step, {**losses.terms, "gradient": gradient, **keys}) & gradient_norm.isfinite()

    def parameters(self) -> Iterator[Tensor]:
        """What the optimizer updates."""
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and loss scale."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; a state without a loss scale leaves it as it is."""
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in self.optimizer.state.items():
            if "momentum_buffer" in kept:  # in the parameter's memory format, which the fused kernel takes for granted
                kept["momentum_buffer"] = torch.empty_like(parameter).copy_(kept["momentum_buffer"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate_tensor(group["lr"], group["params"][0])  # that of an older state is a number
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def make_optimizer(method: Method, config: OptimConfig) -> torch.optim.SGD:
    """SGD in one kernel over all weights that the method trains, or one for each of `parameter_groups`.

    A learning rate is a tensor on the device, so that a CUDA graph sees a new one. The momentum starts at 0, which is
    what SGD's first step amounts to.
    """
    groups = parameter_groups(method, constant_predictor_lr=config.constant_predictor_lr)
    optimizer = torch.optim.SGD(
        [{"params": parameters} for parameters in groups],
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate_tensor(config.lr, group["params"][0])
        for parameter in group["params"]:
            if config.sgd_momentum:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def rate_tensor(rate: float | Tensor, parameter: nn.Parameter) -> Tensor:
    """A learning rate beside a parameter and in its dtype; in fp32 on a GPU, whose fused kernel reads no other."""
    return torch.as_tensor(rate).to(parameter.device, torch.float32 if parameter.is_cuda else parameter.dtype)


def parameter_groups(method: Method, *, constant_predictor_lr: bool) -> list[list[nn.Parameter]]:
    """What trains at the schedule's learning rate; then, where that one's is to be constant, the predictor.

    Raises:
        ValueError: the method has no predictor whose rate could be constant.
    """
    trained = method.trained_parameters()
    if not constant_predictor_lr:
        return [trained]
    predictor = {parameter for name, parameter in method.named_parameters() if name.startswith("predictor.")}
    if not predictor:
        raise ValueError(f"{type(method).__name__} has no predictor; leave --constant-predictor-lr out")
    return [[p for p in trained if p not in predictor], [p for p in trained if p in predictor]]


def use_fast_math(config: EngineConfig, dtype: torch.dtype) -> None:
    """For all of the process, on a GPU: TF32 for a run in fp32, and cuDNN's fastest algorithms.

    What stays in fp32 under autocast does so for its precision: losses, and the lookup's scores.
    """
    precision = "tf32" if config.tf32 and dtype == torch.float32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # pyright: ignore
    torch.backends.cudnn.benchmark = config.cudnn_benchmark


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed, for all of the process; false where there is no glibc.

    A step on a CPU else gets its large tensors anew from the system each time, page by page: 0.9 million page faults
    and a sixth of the time (docs/performance.md).
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, -1))


class _Cast(torch.autograd.Function):
    """Tensors in another dtype, by one multi-tensor copy either way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *cast(gradients, torch.float32)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in another dtype, each in its own memory format."""
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)  # pyright: ignore
    return results


def share_casts(method: Method, dtype: torch.dtype) -> Forward:
    """The method's forward with weights that are cast once a step, for all the forwards of its networks.

    Autocast by itself casts a momentum network's weights in each of its forwards: it keeps only casts that carry
    gradients.
    """
    if dtype == torch.float32:
        return method
    weights = {
        f"{path}.{name}": parameter
        for path, module in method.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for name, parameter in module.named_parameters(recurse=False)
    }
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    followed = {name: weight for name, weight in weights.items() if not weight.requires_grad}

    def forward(views: Sequence[Tensor], labels: Tensor | None = None) -> Losses:
        casts = dict(zip(trained, _Cast.apply(dtype, *trained.values()), strict=True))
        if followed:
            casts |= zip(followed, cast([*followed.values()], dtype), strict=True)
        return functional_call(method, casts, (views, labels))

    return forward


def compiled(method: Method, *, graphs: bool) -> Forward:
    """The method's forward as one graph of torch.compile; with `graphs` replayed as CUDA graphs.

    One graph rather than the encoder's compiled once for all of its forwards: it is as fast, CUDA graphs want it, and
    equal casts of a weight become one; it takes 1.6 times as long to compile (docs/performance.md).
    """
    from torch._functorch import config  # a second, which an eager run need not wait for

    one_graph = torch.compile(method, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None)

    def forward(views: Sequence[Tensor], labels: Tensor | None = None) -> Losses:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten now
        # The backward runs outside of autocast, as it does in eager mode: traced under it, the fp32 products of a loss
        # would be in bf16. It is compiled with the forward, so that what cannot be compiled shows in the first call.
        with config.patch(backward_pass_autocast="off", force_non_lazy_backward_lowering=True):
            return one_graph(views, labels)

    return forward


def checkpoint_activations(method: Method) -> None:
    """Lets the encoder's residual blocks keep their inputs only, and compute the rest again in backward.

    What is computed again leaves the running statistics alone: they have seen the batch.
    """
    for block in method.encoder.modules():
        if isinstance(block, BasicBlock):
            plain = block.forward
            contexts = partial(_first_and_again, block)
            block.forward = partial(
                checkpoint, plain, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
            )


def _first_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), running_statistics_kept(block)
