"""Fast-MoCo against a transcription of its equation on real copies of its networks."""

import copy
from typing import Any

import method_oracles
import pytest
import torch
from method_steps import (
    Stepper,
    break_momentum_embedding,
    compare,
    gradients_of_views,
    make_batch,
    make_method,
    make_oracle,
)
from torch import Tensor

from mnclglf.methods import FastMoCo
from mnclglf.training.guard import NonFiniteError


def test_five_steps_equal_the_equation_in_fp64() -> None:
    method = make_method(FastMoCo)
    compare(method, make_oracle(method_oracles.FastMoCo, method))


@pytest.mark.parametrize(
    "setting",
    [{"k": 1}, {"k": 3}, {"k": 4}, {"temperature": 1.0}, {"temperature": 0.05}, {"ema_momentum": 0.0}],
    ids=str,
)
def test_settings_equal_the_equation(setting: dict[str, Any]) -> None:
    method = make_method(FastMoCo, **setting)
    compare(method, make_oracle(method_oracles.FastMoCo, method), steps=2)


def test_a_gradient_reaches_every_patch_of_the_online_view_and_nothing_else() -> None:
    method, batch = make_method(FastMoCo), make_batch()
    losses = method(batch.views.requires_grad_())
    for place, term in enumerate(("loss_c1_z2", "loss_c2_z1")):
        gradients = gradients_of_views(losses.terms[term], batch)
        of_patches = gradients[place].unflatten(2, (2, -1)).unflatten(4, (2, -1)).abs().amax(dim=(1, 3, 5))
        assert (of_patches > 0).all(), term  # [N, 2, 2]
        assert not gradients[1 - place].any(), term


def test_the_kernels_give_the_gradients_that_pytorch_gives() -> None:
    """Of combine, and of the rows of the loss that MNCLGLF never trains."""
    method, batch, found = make_method(FastMoCo, torch.float32), make_batch(torch.float32), []
    for backend in ("torch", "triton"):
        one = copy.deepcopy(method)
        one.backends = one.backends._replace(divide=backend, combine=backend, contrastive_losses=backend)
        losses = one(batch.views)
        losses.total.backward()
        found.append([losses.total, *(parameter.grad for parameter in one.trained_parameters())])
    largest = max(value.abs().max().item() for value in found[0])
    for ours, expected in zip(*found, strict=True):
        # fp32 sums in another order, through batch norms of a few rows: relative to the largest gradient.
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize(("view", "term"), [(0, "loss_c2_z1"), (1, "loss_c1_z2")])
def test_a_momentum_embedding_that_is_not_finite_shows_in_its_term(view: int, term: str) -> None:
    stepper = Stepper(make_method(FastMoCo))
    break_momentum_embedding(stepper.method, view)
    stepper(make_batch())
    with pytest.raises(NonFiniteError, match=f"step 0: {term}, gradient not finite"):
        stepper.guard.raise_if_failed()


def test_there_is_no_queue() -> None:
    method = make_method(FastMoCo)
    losses = method(make_batch().views)
    assert (losses.keys, losses.neighbors, method.queue_fill()) == (None, None, None)


def test_every_operator_gets_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    for module in ("divide", "combine", "contrastive_losses"):

        def record(backend: str, *tensors: Tensor, module: str = module, kind: str = "") -> str:
            asked.append((module, backend))
            return backend

        monkeypatch.setattr(f"mnclglf_kernels.ops.{module}.resolve", record)
    Stepper(make_method(FastMoCo, backend="torch"))(make_batch())
    assert sorted(asked) == [
        *[("combine", "torch")] * 2,
        ("contrastive_losses", "torch"),
        *[("divide", "torch")] * 2,
    ]
