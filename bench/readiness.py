"""Measures when the gradient of each weight is ready in backward: what a message during backward could take along.

In a step today one multi-tensor copy casts all weights, and one copies all gradients back: see share_casts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.rank_messages import Link, Messages
from bench.steps import Size, config_of, noise
from mnclglf.data.loader import Batch
from mnclglf.methods.base import Losses, Method
from mnclglf.training.speedups import Cast, Forward, cast
from mnclglf.training.start import build_method
from mnclglf.training.step import TrainStep

BUCKET = 25 * 2**20  # bytes of gradients in a message, as in DistributedDataParallel
SHARED, COMPILED, AUTOCAST, STAGED = (
    "shared casts (today)",
    "shared casts, compiled",
    "autocast's casts",
    "casts by block",
)


class Ready(NamedTuple):
    """When gradients were ready.

    Attributes:
        at: fraction of backward after which each was, and its bytes, in this order.
        backward: fraction of the step that backward takes.
    """

    at: list[tuple[float, int]]
    backward: float

    def share(self, by: float) -> float:
        """Returns the fraction of the bytes that are ready by this fraction of backward."""
        return sum(size for when, size in self.at if when <= by) / sum(size for _, size in self.at)


def cast_by_block(method: Method, dtype: torch.dtype) -> Forward:
    """Returns the method's forward with one cast per residual block and head, made as the block first runs.

    It has to be made there: backward runs what is ready in the reverse order of forward, so casts that were made before
    all else would still come last.
    """
    made: dict[nn.Module, Mapping[str, Tensor]] = {}
    heads = [getattr(method, name) for name in ("projector", "predictor") if hasattr(method, name)]
    inside: set[nn.Module] = set()

    def run(module: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if module in inside:
            return plain(*args, **kwargs)
        if module not in made:
            weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
            made[module] = dict(zip(weights, Cast.apply(dtype, *weights.values()), strict=True))
        inside.add(module)
        try:
            return functional_call(module, dict(made[module]), args, kwargs)
        finally:
            inside.remove(module)

    for module in (method.encoder.get_submodule("conv1"), *method.encoder.blocks(), *heads):
        module.forward = partial(run, module, module.forward)
    followed = {name: p for name, p in method.named_parameters() if not p.requires_grad and p.dim() > 1}

    def forward(views: Tensor, labels: Tensor | None = None) -> Losses:
        made.clear()
        return functional_call(
            method, dict(zip(followed, cast([*followed.values()], dtype), strict=True)), (views, labels)
        )

    return forward


def readiness(how: str, size: Size, steps: int = 5) -> Ready:
    """Measures steps of MNCLGLF in bf16 on noise, in one process on the CPU; returns that of the fastest backward."""
    dtype, config = torch.bfloat16, config_of(size)
    method = build_method(config, dtype).train()
    step = TrainStep(method, config.optim, config.engine, dtype, compile="on" if how == COMPILED else "off")
    if how == AUTOCAST:
        step.forward = method
    elif how == STAGED:
        step.forward = cast_by_block(method, dtype)
    marks: dict[str, float] = {}
    done: dict[Tensor, float] = {}
    step.mark = lambda part: marks.__setitem__(part, time.perf_counter())
    for parameter in method.trained_parameters():
        parameter.register_post_accumulate_grad_hook(lambda own: done.__setitem__(own, time.perf_counter()))
    views = torch.cat(noise(size, torch.device("cpu"), method.views)).to(dtype, memory_format=torch.channels_last)
    batch, found = Batch(views, torch.arange(size.images)), list[tuple[float, Ready]]()
    for number in range(steps):
        since = time.perf_counter()
        step(number, batch, lr=0.01, momentum=0.99)
        whole, backward = time.perf_counter() - since, marks["backward"] - marks["forward"]
        at = sorted(((when - marks["forward"]) / backward, p.numel() * p.itemsize) for p, when in done.items())
        found.append((backward, Ready(at, backward / whole)))
    return min(found[1:], key=lambda own: own[0])[1]  # the first one compiles


def exposed(ready: Ready, backward: float, link: Link, ranks: int) -> float:
    """Returns the seconds after backward until the last gradients are averaged, by messages of BUCKET bytes.

    A message is sent as soon as its gradients are ready and the message before it is done; it slows nothing down.

    Args:
        ready: when gradients are ready.
        backward: its seconds.
        link: how ranks are connected.
        ranks: W.
    """
    free, held = 0.0, 0
    for number, (when, size) in enumerate(ready.at):
        held += size
        if held >= BUCKET or number == len(ready.at) - 1:
            free = max(free, when * backward) + Messages("all_reduce", 1, held).seconds(link, ranks)
            held = 0
    return max(0.0, free - backward)
