"""Comparison of a method's steps with its oracle's."""

from typing import TypeVar

import pytest
import torch
from method_oracles import Transcription
from methods.test_mnclglf import CLASSES, FP64, MODEL, OPTIM, SIDE, K, N, Stepper
from torch import Tensor

from mnclglf.config import ObjectiveConfig, OptimConfig
from mnclglf.data.loader import Batch
from mnclglf.methods import Method
from mnclglf.methods.base import Losses
from mnclglf_kernels import Backend

M = TypeVar("M", bound=Method)


def make_method(kind: type[M], dtype: torch.dtype = torch.float64, backend: Backend = "auto", **objective: object) -> M:
    settings = ObjectiveConfig(**{"queue_size": K, "temperature": 0.5, "ema_momentum": 0.9, **objective})
    return kind(MODEL, settings, queue_dtype=dtype, backend=backend).to(dtype).train()


def make_batch(dtype: torch.dtype = torch.float64, first: int = 0, views: int = 2) -> Batch:
    return Batch(torch.randn(views * N, 3, SIDE, SIDE, dtype=dtype), torch.arange(first, first + N))


def inputs_of(method: Method, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Returns the forward's arguments from a batch: its views, and the labels, which are those of Stepper."""
    return batch.views, batch.indices % CLASSES if method.needs_labels else None


def assert_one_view_trains(method: Method, trained: dict[str, int]) -> Losses:
    """Asserts that each term's gradient reaches only the one of two views that `trained` gives with it."""
    batch = make_batch()
    losses = method(batch.views.requires_grad_())
    for term, place in trained.items():
        gradients = gradients_of_views(losses.terms[term], batch)
        assert gradients[place].abs().max() > 0, term
        assert not gradients[1 - place].any(), term
    return losses


def gradients_of_views(loss: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Returns the gradient of each view; zeros where a view has none."""
    (gradient,) = torch.autograd.grad(loss, batch.views, retain_graph=True)
    return gradient.split(len(batch.indices))


def break_momentum_embedding(method: Method, view: int, value: float = torch.nan) -> None:
    """Makes an element of the momentum network's embedding of one image of a view not finite."""
    forward = method.momentum.forward

    def broken(x: Tensor, views: int) -> Tensor:
        embeddings = forward(x, views).clone()
        embeddings[view * N + 2, 3] = value
        return embeddings

    method.momentum.forward = broken


def make_oracle(kind: type[Transcription], method: Method, optim: OptimConfig = OPTIM) -> Transcription:
    """Makes the oracle with a copy of the method's heads and, if it has them, its momentum network and queue."""
    names = [name for name in ("encoder", "projector", "predictor") if hasattr(method, name)]
    return kind(
        {name: getattr(method, name) for name in names},
        method.queue.rows if hasattr(method, "queue") else None,
        followed=2 if hasattr(method, "momentum") else 0,
        temperature=method.objective.temperature,
        ema_momentum=method.objective.ema_momentum,
        k=method.objective.k,
        lambda_=method.objective.lambda_,
        clip_norm=optim.clip_norm,
        lr=optim.lr,
        sgd_momentum=optim.sgd_momentum,
        weight_decay=optim.weight_decay,
    )


def oracle_state(oracle: Transcription) -> dict[str, Tensor]:
    """Returns weights and running statistics of f_o and f_m, and the queue, under our names."""
    state = dict(oracle.f_o.state_dict())
    for place, (name, network) in enumerate(oracle.f_m.items()):
        assert name == ("encoder", "projector")[place]
        state |= {f"momentum.{place}.{rest}": value for rest, value in network.state_dict().items()}
    if oracle.queue is not None:
        state |= {"queue.rows": oracle.queue, "queue.pointer": torch.tensor(oracle.pointer)}
    return state


def assert_same_state(method: Method, oracle: Transcription) -> None:
    expected = oracle_state(oracle)
    ours = {name: value for name, value in method.state_dict().items() if name != "queue.sources"}
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], **FP64, msg=lambda text, name=name: f"{name}: {text}")


def compare(method: Method, oracle: Transcription, steps: int = 5, optim: OptimConfig = OPTIM) -> None:
    """Compares losses and state after each step: updates show the gradient, and the queue wraps in the fourth step."""
    ours = Stepper(method, optim=optim)
    for step in range(steps):
        batch = make_batch(first=step * N, views=method.views)
        losses, expected = ours(batch), oracle.step(*batch.each())
        assert losses.keys() == expected.keys()
        for name, value in losses.items():
            assert value.item() == pytest.approx(expected[name], rel=FP64["rtol"]), f"{name} of step {step}"
        assert_same_state(method, oracle)
    ours.guard.raise_if_failed()
