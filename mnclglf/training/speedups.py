"""Optimizations of a training step, one function each.

Each is applied to a method that knows nothing of it, and EngineConfig switches each one separately. Without them a step
computes the same numbers, up to rounding.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ParamSpec, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mnclglf.config import EngineConfig, HalfSums
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import running_statistics_kept
from mnclglf_kernels import conv2d

P = ParamSpec("P")


class Forward(Protocol):
    """A method, or a faster form of its forward with the same losses."""

    def __call__(self, views: Tensor, labels: Tensor | None = None) -> Losses: ...


def use_fast_math(config: EngineConfig, dtype: torch.dtype) -> None:
    """Sets TF32 (for a run in fp32) and cuDNN's algorithm search on a GPU, for the whole process."""
    # TF32 only without autocast: under it the remaining fp32 products are those of the losses and of the lookup's
    # scores, which need their full precision.
    precision = "tf32" if config.tf32 and dtype == torch.float32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # pyright: ignore
    torch.backends.cudnn.benchmark = config.cudnn_benchmark and not config.deterministic


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory, for the whole process; returns False without glibc.

    By default glibc returns large tensors to the system, and the next step on a CPU faults them in again, page by page.
    Measured: 940,000 page faults and 2.6 s of system time per step on two cores (docs/lab/performance.md).
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(mmap_max, 0)) and bool(libc.mallopt(trim_threshold, -1))


class Cast(torch.autograd.Function):
    """Casts tensors to another dtype, and their gradients back, by one multi-tensor copy each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(cast(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *cast(gradients, torch.float32)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Returns the tensors in another dtype, each in its own memory format."""
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)  # pyright: ignore
    return results


def share_casts(method: Method, dtype: torch.dtype) -> Forward:
    """Returns the method's forward with each weight cast once per step, for all forwards of its networks.

    Autocast caches only casts of weights that require gradients. It casts a momentum network's weights again in each
    forward. In a compiled forward Inductor merges equal casts, but launches one kernel per weight: here it launches one
    per multi-tensor copy.
    """
    if dtype == torch.float32:
        return method
    layers = {path: module for path, module in method.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    # Of forwards without gradient that compute in fp16. A momentum network has no others.
    halves = {f"{path}.half_weight": module.weight for path, module in layers.items() if hasattr(module, "half_weight")}
    weights = {
        f"{path}.{name}": parameter
        for path, module in layers.items()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad or not hasattr(module, "half_weight")
    }
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    followed = {name: weight for name, weight in weights.items() if not weight.requires_grad}

    def forward(views: Tensor, labels: Tensor | None = None) -> Losses:
        casts = dict(zip(trained, Cast.apply(dtype, *trained.values()), strict=True))
        for names, half in ((followed, dtype), (halves, torch.float16)):
            if names:
                casts |= zip(names, cast([*names.values()], half), strict=True)
        return functional_call(method, casts, (views, labels))

    return forward


def compiled(method: Forward, *, graphs: bool, combo_kernels: bool = False) -> Forward:
    """Returns a method's forward as one graph of torch.compile; with `graphs`, replayed as CUDA graphs.

    The alternative, a compiled encoder that each forward calls, is as fast on a CPU, and its first step took 77 s there
    instead of 125 s (docs/lab/performance.md). But CUDA graphs need one graph. `combo_kernels` merges kernels that do
    not depend on each other into one launch; Inductor can do that on a GPU only.
    """
    from torch._functorch import config  # takes a second, which an eager run need not wait for

    how: dict[str, Any] = {"mode": "reduce-overhead" if graphs else None}
    if combo_kernels:  # torch.compile takes a mode or options; the mode stands for this option
        how = {"options": {"triton.cudagraphs": graphs, "combo_kernels": True}}
    one_graph = torch.compile(method, fullgraph=True, dynamic=False, **how)

    def forward(views: Tensor, labels: Tensor | None = None) -> Losses:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten now
        # backward_pass_autocast: the backward is traced outside autocast, as it runs in eager mode; otherwise the fp32
        # products of a loss would be in bf16. force_non_lazy_backward_lowering: the backward is compiled with the
        # forward, so that a failure shows in the first call, where or_eager catches it.
        with config.patch(backward_pass_autocast="off", force_non_lazy_backward_lowering=True):
            return one_graph(views, labels)

    return forward


def or_eager(
    forward: Callable[P, Losses], eager: Callable[P, Losses], say: Callable[[str], object]
) -> Callable[P, Losses]:
    """Returns a forward that falls back to the eager one, with a message, if compilation fails."""
    chosen = forward

    def run(*args: P.args, **kwargs: P.kwargs) -> Losses:
        nonlocal chosen
        from torch._dynamo.exc import TorchDynamoException  # takes a second, which an eager run need not wait for

        try:
            return chosen(*args, **kwargs)
        except TorchDynamoException as error:
            if chosen is eager:
                raise
            say(f"torch.compile failed: {' '.join(str(error).split()[:40])}")
            chosen = eager
            return chosen(*args, **kwargs)

    return run


def checkpoint_activations(method: Method) -> None:
    """Makes the encoder's residual blocks keep only their inputs and recompute the rest in backward.

    The recomputation does not update batch norm's running statistics: the forward has already done so.
    """
    for block in method.encoder.blocks():
        contexts = partial(_first_and_again, block)
        # preserve_rng_state=False: a residual block draws no random numbers, so there is no state to restore.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
        )


def sum_in_half(method: Method, parts: HalfSums) -> None:
    """Lets the convolutions of the online encoder sum in fp16: forward, the gradient of their input, or both."""
    if parts == "off":
        return
    of_result, of_gradient = parts in ("forward", "both"), parts in ("input-gradient", "both")

    def forward(layer: nn.Conv2d, input: Tensor) -> Tensor:
        return conv2d(
            input.to(layer.weight.dtype),  # share_casts has cast the weight
            layer.weight,
            stride=layer.stride[0],
            padding=int(layer.padding[0]),
            half_sums_forward=of_result,
            half_sums_input_gradient=of_gradient,
        )

    for layer in method.encoder.modules():
        if isinstance(layer, nn.Conv2d):
            layer.forward = partial(forward, layer)


def _first_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), running_statistics_kept(block)
