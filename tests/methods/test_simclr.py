"""SimCLR against a literal transcription of its Algorithm 1."""

import method_oracles
import pytest
import torch
from method_steps import N, Stepper, compare, gradients_of_views, make_batch, make_method, make_oracle
from torch import Tensor

from mnclglf.methods import SimCLR


def test_five_steps_equal_algorithm_1_in_fp64() -> None:
    method = make_method(SimCLR)
    compare(method, make_oracle(method_oracles.SimCLR, method))


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_temperatures_equal_algorithm_1(temperature: float) -> None:
    method = make_method(SimCLR, temperature=temperature)
    compare(method, make_oracle(method_oracles.SimCLR, method), steps=2)


def test_both_views_carry_gradients() -> None:
    method, batch = make_method(SimCLR), make_batch()
    for gradient in gradients_of_views(method(batch.views.requires_grad_()).total, batch):
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_the_order_of_the_views_does_not_matter() -> None:
    method, views = make_method(SimCLR), make_batch().views
    torch.testing.assert_close(method(views).total, method(views.roll(N, 0)).total, rtol=1e-12, atol=0)


def test_the_loss_gets_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def record(backend: str, *tensors: Tensor, kind: str) -> str:
        asked.append(backend)
        return backend

    monkeypatch.setattr("mnclglf_kernels.ops.nt_xent.resolve", record)
    Stepper(make_method(SimCLR, backend="torch"))(make_batch())
    assert asked == ["torch"]


def test_nothing_is_kept_from_step_to_step_but_the_network() -> None:
    method = make_method(SimCLR)
    losses = method(make_batch().views)
    assert (losses.keys, losses.neighbors, method.queue_fill()) == (None, None, None)
    assert {name.split(".")[0] for name in method.state_dict()} == {"encoder", "projector"}
