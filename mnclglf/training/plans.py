"""Proof of cuDNN's plans at a run's start: each convolution that they will compute is compared with PyTorch in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mnclglf.config import HalfSums
from mnclglf.methods.base import Method
from mnclglf.models.encoder import Block, Encoder
from mnclglf_kernels import Backends


class Convolution(NamedTuple):
    """A convolution of a step.

    Attributes:
        x: [V * N, C, H, W].
        views: V.
        weight: [K, C, T, T].
        stride: step of the filter.
        padding: rows and columns of zeros on each side.
        follows: whether it is the second of a block, which reads what the first's batch norm has not yet normalized.
        network: the network whose forward it is in; of these only the online one's has a gradient.
    """

    x: tuple[int, ...]
    views: int
    weight: tuple[int, ...]
    stride: int
    padding: int
    follows: bool
    network: Literal["online", "momentum", "stop-gradient"]

    @property
    def has_gradient(self) -> bool:
        """Returns whether its forward has a gradient."""
        return self.network == "online"


def convolutions_of(method: Method, views: Tensor) -> list[Convolution]:
    """Returns the different convolutions of the encoders in a step, found by a forward of a copy on the meta device."""
    twin = copy.deepcopy(method).to("meta")
    twin.backends = Backends.all("triton")
    twin.fuse("torch")
    found: dict[Convolution, None] = {}
    followed = set(getattr(twin, "momentum", nn.Module()).modules())
    count = [1]  # views in the batch of the encoder that runs
    seconds = {id(block.conv2) for block in twin.modules() if isinstance(block, Block)}

    def enter(encoder: Encoder, arguments: tuple[Any, ...]) -> None:
        given = arguments[1] if len(arguments) > 1 else 1
        count[0] = given if isinstance(given, int) else len(given.after)

    def network_of(layer: nn.Conv2d) -> Literal["online", "momentum", "stop-gradient"]:
        return "momentum" if layer in followed else "online" if torch.is_grad_enabled() else "stop-gradient"

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        place = layer.stride[0], int(layer.padding[0]), id(layer) in seconds, network_of(layer)
        found[Convolution(tuple(inputs[0].shape), count[0], tuple(layer.weight.shape), *place)] = None

    for encoder in twin.encoders():
        encoder.register_forward_pre_hook(enter)
        for layer in encoder.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_pre_hook(note)
    images = len(views) // twin.views
    labels = torch.empty(images, dtype=torch.int64, device="meta") if twin.needs_labels else None
    twin(views.detach().to("meta", torch.float32), labels)
    return [*found]


def prove_plans(
    method: Method,
    views: Tensor,
    *,
    without_gradient: bool,
    online: HalfSums,
    say: Callable[[str], object],
    problem_of: Callable[..., str | None] | None = None,
) -> None:
    """Compares each of cuDNN's plans in fp16 with PyTorch; where one fails, PyTorch computes the convolution.

    Args:
        method: the method on its device.
        views: views of a batch.
        without_gradient: whether forwards without gradient run by cuDNN.
        online: what sums in fp16 in the online network.
        say: receives the plans that are left out, with the reason.
        problem_of: computes and compares a convolution, as mnclglf_kernels._cudnn.proof.plan_problem.
    """
    if problem_of is None:
        from mnclglf_kernels._cudnn.proof import plan_problem as problem_of
    for seen in convolutions_of(method, views):
        cases: dict[str, dict[str, bool]] = {}
        if not seen.has_gradient and without_gradient:
            cases["without gradient"] = dict(prologue=seen.follows)
        if seen.has_gradient and online in ("forward", "both"):
            cases["online"] = {}
        if seen.has_gradient and online in ("input-gradient", "both"):
            cases["gradient of its input"] = dict(gradient=True)
        images = seen.x[0] // (1 if seen.has_gradient else seen.views)  # with statistics a plan is for one view
        for name, how in cases.items():
            problem = problem_of(
                (images, *seen.x[1:]),
                seen.weight,
                torch.float16,
                views.device,
                stride=seen.stride,
                padding=seen.padding,
                half_sums=True,
                **how,
            )
            if problem is not None:
                size = " x ".join(map(str, (images, *seen.x[1:])))
                say(f"cuDNN's plan for {size} to {seen.weight[0]} ({name}) is left out, PyTorch computes it: {problem}")
