"""What each rank runs in the tests of training over ranks: some steps of a method on its part of every batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mnclglf.config import EngineConfig, MethodName, ModelConfig, ObjectiveConfig, OptimConfig, ReduceDtype
from mnclglf.data.loader import Batch
from mnclglf.methods import METHODS
from mnclglf.training.step import TrainStep

N, SIDE, QUEUE, CLASSES = 8, 16, 28, 3  # the queue is no multiple of N: the ring wraps in the fourth step
STEPS = 4
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


class Case(NamedTuple):
    """A training, by which all ranks and the one process that they are compared with draw the same numbers."""

    method: MethodName
    precision: str = "fp64"  # of the weights
    autocast: bool = False  # to bf16
    compile: str = "off"
    objective: tuple[tuple[str, Any], ...] = ()
    clip_norm: float | None = None
    sync_batch_norm: bool = True
    reduce_dtype: ReduceDtype = "fp32"
    broken: int | None = None  # image of the third batch whose first view holds a NaN


CASES = [
    *(Case(name) for name in METHODS),
    Case("mnclglf", objective=(("one_embedding", True), ("k", 3)), clip_norm=0.5),
    Case("mnclglf", broken=5),
    Case("byol", broken=0),
]


ROUNDED = [
    *(Case(name, precision="fp32") for name in ("mnclglf", "mocov2")),
    *(Case(name, precision="fp32", autocast=True) for name in ("mnclglf", "mocov2")),
    Case("mnclglf", precision="fp32", reduce_dtype="bf16"),
]
COMPILED = [Case("mnclglf", precision="fp32", compile="on")]


class Trained(NamedTuple):
    """What a training leaves."""

    losses: list[dict[str, Tensor]]  # of each step, with the norm of its gradient
    state: dict[str, Tensor]  # weights, running statistics, queue
    optimizer: list[Tensor]
    failed_step: int


def trained(case: Case, rank: int = 0, ranks: int = 1) -> Trained:
    """Takes STEPS steps; the losses are those that a step returns on every rank."""
    torch.manual_seed(7)
    model = ModelConfig(width=4, projector_width=24, predictor_width=12, classes=CLASSES)
    settings = ObjectiveConfig(**{"queue_size": QUEUE, "temperature": 0.5, "ema_momentum": 0.9, **dict(case.objective)})
    dtype = DTYPES[case.precision]
    method = METHODS[case.method](model, settings, queue_dtype=dtype).to(dtype).train()
    method.distribute(rank, ranks, sync_batch_norm=case.sync_batch_norm)
    optim = OptimConfig(lr=0.1, batch_size=N, clip_norm=case.clip_norm)
    engine = EngineConfig(channels_last=case.precision == "fp32", reduce_dtype=case.reduce_dtype)
    labels = torch.arange(1000) % CLASSES
    autocast = torch.bfloat16 if case.autocast else torch.float32
    if engine.channels_last:
        method = method.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    step = TrainStep(method, optim, engine, autocast, compile=case.compile, labels=labels)
    torch.manual_seed(11)
    losses: list[dict[str, Tensor]] = []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        views = torch.randn(method.views, N, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)
        if number == 2 and case.broken is not None:
            views[0, case.broken] = torch.nan
        own = slice(rank * N // ranks, (rank + 1) * N // ranks)
        batch = Batch(views[:, own].flatten(0, 1), torch.arange(number * N, (number + 1) * N)[own])
        found, norm = step(number, batch, lr=0.1, momentum=0.9)
        losses.append({"total": found.total.detach(), **{k: v.detach() for k, v in found.terms.items()}, "norm": norm})
    moments = [x for kept in step.optimizer.state.values() for x in kept.values() if isinstance(x, Tensor)]
    return Trained(losses, method.state_dict(), moments, int(step.guard.failed_step))


def train_all(cases: list[Case]) -> list[Trained]:
    return [trained(case, dist.get_rank(), dist.get_world_size()) for case in cases]
