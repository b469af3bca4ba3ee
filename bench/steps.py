"""Training steps to compare: the ablation from Algorithm 1 as printed to our step, and the steps of the peers.

Each variant of the ablation has one optimization more than the one before it. A maker takes a Size and a device and
returns a step on noise, which is the same in every call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.peers import PEERS, peer_step
from bench.reference import Algorithm1AsPrinted
from mnclglf.config import EngineConfig, MethodName, RunConfig
from mnclglf.data.loader import Batch
from mnclglf.models.batch_norm import batch_statistics_only
from mnclglf.recipes import paper
from mnclglf.training.speedups import keep_freed_memory, use_fast_math
from mnclglf.training.start import Compile, autocast_dtype, build_method
from mnclglf.training.step import TrainStep
from mnclglf_kernels import Backends

Step = Callable[[], object]
REFERENCE = "reference"
EAGER = "+ kernels"  # our own step
KEPT = "+ kept memory"
COMPILED = "+ compile"
GRAPHS = "+ graphs"


class Size(NamedTuple):
    """The size of a training step."""

    images: int = 256  # per batch
    side: int = 32  # pixels per side of a view
    width: int = 64  # channels of the encoder's first stage; 64 is ResNet-18

    def __str__(self) -> str:
        network = "ResNet-18" if self.width == 64 else f"ResNet-18 of width {self.width}"
        return f"batch {self.images}, {network}, {self.side} x {self.side}"


@dataclass(frozen=True, kw_only=True)
class Printed:
    """Options of Algorithm 1 as printed: the optimizations that need no code of ours.

    Attributes:
        channels_last: weights and views in that memory format.
        autocast: forward in bf16 where the device multiplies it; on a GPU with cuDNN's fastest algorithms.
        shared: the stop-gradient network is the online one under no_grad rather than a copy.
        unit_norm: rows are normalized when they enter the queue rather than at each lookup.
    """

    channels_last: bool = False
    autocast: bool = False
    shared: bool = False
    unit_norm: bool = False


def config_of(size: Size, method: MethodName = "mnclglf") -> RunConfig:
    """Returns the paper recipe at this size."""
    config = paper(method, "cifar10")
    return replace(
        config, optim=replace(config.optim, batch_size=size.images), model=replace(config.model, width=size.width)
    )


def noise(size: Size, device: torch.device, count: int) -> list[Tensor]:
    """Returns views of noise, the same in every process."""
    torch.manual_seed(0)
    return [torch.randn(size.images, 3, size.side, size.side, device=device) for _ in range(count)]


class _Shared(Algorithm1AsPrinted):
    def stop_gradient_project(self, x1: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
        with batch_statistics_only(self.f_o):
            f_s, self.f_s = self.f_s, self.f_o
            projected = super().stop_gradient_project(x1, x3)
            self.f_s = f_s
        return projected

    def update_stop_gradient_network(self) -> None:
        pass


class _SharedUnitNorm(_Shared):
    @staticmethod
    def nearest_neighbor(queries: Tensor, queue: Tensor) -> Tensor:
        return torch.mm(functional.normalize(queries), queue.t()).argmax(dim=1)


def printed_step(size: Size, device: torch.device, how: Printed) -> Step:
    """Makes a step of Algorithm 1 as printed."""
    config, views = config_of(size), noise(size, device, 3)
    memory_format = torch.channels_last if how.channels_last else torch.contiguous_format
    dtype = autocast_dtype(config.engine, device) if how.autocast else torch.float32
    if how.autocast and device.type == "cuda":
        use_fast_math(config.engine, dtype)
    method: Any = build_method(config, torch.float32)  # its networks are MNCLGLF's
    method.backends = Backends.all("torch")
    algorithm = (_SharedUnitNorm if how.unit_norm else _Shared) if how.shared else Algorithm1AsPrinted
    network = algorithm(
        method.encoder.to(device, memory_format=memory_format),
        method.projector.to(device),
        method.predictor.to(device),
        method.queue.rows.to(device, dtype),
        temperature=config.objective.temperature,
        ema_momentum=config.objective.ema_momentum,
        lambda_=config.objective.lambda_,
        k=config.objective.k,
        lr=config.optim.lr,
        sgd_momentum=config.optim.sgd_momentum,
        weight_decay=config.optim.weight_decay,
    )
    views = [view.to(memory_format=memory_format) for view in views]

    def step() -> object:
        with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype):
            return network.step(*views)

    return step


def our_step(
    config: RunConfig, side: int, device: torch.device, *, compile: Compile = "off", backends: Backends | None = None
) -> Step:
    """Makes the step that `mnclglf train` runs."""
    dtype = autocast_dtype(config.engine, device)
    method = build_method(config, dtype).to(device).train()
    method.backends = backends or method.backends
    if device.type == "cuda":
        use_fast_math(config.engine, dtype)
    labels = torch.zeros(config.optim.batch_size, dtype=torch.int64, device=device)
    train = TrainStep(method, config.optim, config.engine, dtype, compile=compile, labels=labels)
    views = torch.cat(noise(Size(config.optim.batch_size, side), device, method.views))
    batch = Batch(
        views.to(dtype, memory_format=train.memory_format), torch.arange(config.optim.batch_size, device=device)
    )
    return lambda: train(0, batch, lr=config.optim.lr, momentum=config.objective.ema_momentum)


def our_variant(
    size: Size,
    device: torch.device,
    *,
    method: MethodName = "mnclglf",
    compile: Compile = "off",
    keep_memory: bool = False,
) -> Step:
    """Makes our step of the paper recipe; `keep_memory` applies to a CPU only."""
    if keep_memory and device.type == "cpu":
        keep_freed_memory()
    return our_step(config_of(size, method), size.side, device, compile=compile)


def peer(size: Size, device: torch.device, *, name: MethodName, documented: bool) -> Step:
    """Makes a peer's step as documented, or like for like: with our precision, memory format and fast settings."""
    dtype = autocast_dtype(EngineConfig(), device)
    if not documented:
        keep_freed_memory() if device.type == "cpu" else use_fast_math(EngineConfig(), dtype)
    return peer_step(
        name,
        noise(size, device, 2),
        dtype=None if documented or dtype == torch.float32 else dtype,
        channels_last=not documented,
        width=size.width,
    )


ABLATION: dict[str, Callable[[Size, torch.device], Step]] = {
    REFERENCE: partial(printed_step, how=Printed()),
    "+ channels_last": partial(printed_step, how=Printed(channels_last=True)),
    "+ autocast": partial(printed_step, how=Printed(channels_last=True, autocast=True)),
    "+ shared network": partial(printed_step, how=Printed(channels_last=True, autocast=True, shared=True)),
    "+ unit-norm queue": partial(
        printed_step, how=Printed(channels_last=True, autocast=True, shared=True, unit_norm=True)
    ),
    EAGER: our_variant,
    KEPT: partial(our_variant, keep_memory=True),
    COMPILED: partial(our_variant, keep_memory=True, compile="on"),
    GRAPHS: partial(our_variant, keep_memory=True, compile="graphs"),
}
"""Each variant has all optimizations before it. From "+ kernels" on it is our own step."""

# Our MNCLGLF, then for each method of the peers: ours, theirs like for like, theirs as documented.
PEER_STEPS: dict[str, Callable[[Size, torch.device], Step]] = {"mnclglf, ours": partial(our_variant, keep_memory=True)}
for _name in PEERS:
    PEER_STEPS |= {
        f"{_name}, ours": partial(our_variant, method=_name, keep_memory=True),
        f"{_name}, like for like": partial(peer, name=_name, documented=False),
        f"{_name}, as documented": partial(peer, name=_name, documented=True),
    }
MAKERS = ABLATION | PEER_STEPS
KEEPING = {KEPT, COMPILED, GRAPHS, *(name for name in PEER_STEPS if not name.endswith("documented"))}
"""The steps whose process keeps freed memory on a CPU."""


def variants(device: torch.device) -> list[str]:
    """Returns the variants of this device: kept memory is for a CPU, CUDA graphs are for a GPU."""
    return [name for name in ABLATION if name != (GRAPHS if device.type == "cpu" else KEPT)]
