"""NNCLR against a literal transcription of its equation 3, both ways, with a predictor."""

import copy
from typing import Any

import method_oracles
import pytest
import torch
import torch.nn.functional as F
from method_steps import (
    FP64,
    MODEL,
    K,
    N,
    Stepper,
    assert_one_view_trains,
    compare,
    make_batch,
    make_method,
    make_oracle,
)
from torch import Tensor

from mnclglf.config import ObjectiveConfig
from mnclglf.methods import NNCLR
from mnclglf.models.batch_norm import batch_norms
from mnclglf.training.guard import NonFiniteError


def test_five_steps_equal_equation_3_in_fp64() -> None:
    method = make_method(NNCLR)
    compare(method, make_oracle(method_oracles.NNCLR, method))


@pytest.mark.parametrize("setting", [{"temperature": 1.0}, {"temperature": 0.05}, {"queue_size": N}], ids=str)
def test_settings_equal_equation_3(setting: dict[str, Any]) -> None:
    method = make_method(NNCLR, **setting)
    compare(method, make_oracle(method_oracles.NNCLR, method), steps=2)


def test_the_queue_takes_in_the_projection_of_view_1_from_before_the_lookup() -> None:
    method, batch = make_method(NNCLR), make_batch(first=40)
    before = copy.deepcopy(method)
    Stepper(method)(batch)
    with torch.no_grad():
        z1 = before.projector(before.encoder(batch.each()[0]))
    torch.testing.assert_close(method.queue.rows[:N], F.normalize(z1), **FP64)
    torch.testing.assert_close(method.queue.rows[N:], before.queue.rows[N:], rtol=0, atol=0)
    assert method.queue.sources.tolist() == [*range(40, 40 + N), *[-1] * (K - N)]
    assert method.queue_fill() == pytest.approx(N / K)


def test_neighbors_are_those_of_view_1_as_images() -> None:
    method = make_method(NNCLR, queue_size=N)
    Stepper(method)(make_batch(first=100))
    batch = make_batch()  # images that the queue does not hold
    with torch.no_grad():
        losses = method(batch.views)
        z1 = method.projector(method.encoder(batch.each()[0]))
    nearest = (F.normalize(z1) @ method.queue.rows.T).argmax(dim=1)
    assert losses.neighbors is not None
    assert losses.neighbors.tolist() == (100 + nearest).tolist()


def test_a_gradient_reaches_the_predictions_only() -> None:
    losses = assert_one_view_trains(make_method(NNCLR), {"loss_n2_p1": 0, "loss_n1_p2": 1})
    assert losses.keys is not None
    assert not losses.keys.requires_grad


@pytest.mark.parametrize("view", [0, 1])
def test_a_projection_that_is_not_finite_is_kept_out_of_the_queue(view: int) -> None:
    stepper, batch = Stepper(make_method(NNCLR)), make_batch()
    before, forward = stepper.method.queue.rows.clone(), stepper.method.projector.forward
    broken = torch.ones(2, 1)
    broken[view] = torch.nan
    stepper.method.projector.forward = lambda rows, views=1: forward(rows, views) * broken.repeat_interleave(N, 0)
    stepper(batch)
    assert torch.equal(stepper.method.queue.rows, before)
    with pytest.raises(NonFiniteError, match="gradient, keys not finite"):
        stepper.guard.raise_if_failed()


def test_keys_that_are_not_finite_are_found_though_the_losses_are() -> None:
    method = make_method(NNCLR)
    stepper, last = Stepper(method), batch_norms(method.projector)[-1]
    last.bias.data[3] = torch.nan  # every score is NaN, so every neighbor is row 0
    before, predict = method.queue.rows.clone(), method.predictor.forward
    method.predictor.forward = lambda input, views=1: predict(input.nan_to_num(), views)
    losses = stepper(make_batch())
    assert all(value.isfinite() for value in losses.values())
    assert torch.equal(method.queue.rows, before)
    with pytest.raises(NonFiniteError, match="step 0: keys not finite"):
        stepper.guard.raise_if_failed()


def test_every_operator_gets_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    for module in ("contrastive_losses", "nearest_neighbor", "enqueue"):

        def record(backend: str, *tensors: Tensor, module: str = module, kind: str = "") -> str:
            asked.append((module, backend))
            return backend

        monkeypatch.setattr(f"mnclglf_kernels.ops.{module}.resolve", record)
    method = NNCLR(MODEL, ObjectiveConfig(queue_size=K), queue_dtype=torch.float64, backend="torch").double()
    Stepper(method)(make_batch())
    assert sorted(asked) == [("contrastive_losses", "torch"), ("enqueue", "torch"), ("nearest_neighbor", "torch")]
