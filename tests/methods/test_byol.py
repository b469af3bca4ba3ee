"""BYOL against a literal transcription of its equations 1 and 2."""

import method_oracles
import pytest
import torch
from method_steps import (
    Stepper,
    assert_one_view_trains,
    break_momentum_embedding,
    compare,
    make_batch,
    make_method,
    make_oracle,
)

from mnclglf.methods import BYOL
from mnclglf.training.guard import NonFiniteError


def test_five_steps_equal_the_equations_in_fp64() -> None:
    method = make_method(BYOL)
    compare(method, make_oracle(method_oracles.BYOL, method))


@pytest.mark.parametrize("ema_momentum", [0.0, 1.0])
def test_momenta_equal_the_equations(ema_momentum: float) -> None:
    method = make_method(BYOL, ema_momentum=ema_momentum)
    compare(method, make_oracle(method_oracles.BYOL, method), steps=2)


def test_a_gradient_reaches_the_predictions_only() -> None:
    assert_one_view_trains(make_method(BYOL), {"loss_p1_z2": 0, "loss_p2_z1": 1})


@pytest.mark.parametrize(("view", "term"), [(0, "loss_p2_z1"), (1, "loss_p1_z2")])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_momentum_embedding_that_is_not_finite_shows_in_its_term(view: int, term: str, broken: float) -> None:
    stepper = Stepper(make_method(BYOL))
    break_momentum_embedding(stepper.method, view, broken)
    stepper(make_batch())
    with pytest.raises(NonFiniteError, match=f"step 0: {term}, gradient not finite"):
        stepper.guard.raise_if_failed()


def test_there_is_no_queue() -> None:
    method = make_method(BYOL)
    losses = method(make_batch().views)
    assert (losses.keys, losses.neighbors, method.queue_fill()) == (None, None, None)
