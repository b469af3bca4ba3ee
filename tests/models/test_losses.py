"""The losses against their equations in loops, values and gradients."""

import math
from collections.abc import Callable

import method_oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf.models.losses import negative_cosine, nt_xent, queue_contrastive_loss

N, D, K = 5, 7, 11
Loss = Callable[..., Tensor]

QUEUE = F.normalize(torch.randn(K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def pairs_of(temperature: float) -> dict[str, tuple[Loss, Loss]]:
    """Ours and the equation, by name, as functions of two sides."""
    return {
        "nt_xent": (lambda a, b: nt_xent(a, b, temperature), lambda a, b: method_oracles.nt_xent(a, b, temperature)),
        "queue": (
            lambda a, b: queue_contrastive_loss(a, b, QUEUE, temperature),
            lambda a, b: method_oracles.queue_contrastive_loss(a, b, QUEUE.to(a.dtype), temperature),
        ),
        "cosine": (negative_cosine, lambda a, b: method_oracles.squared_distance(a, b) / 2 - 1),
    }


NAMES = pytest.mark.parametrize("name", pairs_of(1.0))


def value_and_gradients(loss: Loss, first: Tensor, second: Tensor) -> list[Tensor]:
    first, second = (side.detach().clone().requires_grad_() for side in (first, second))
    value = loss(first, second)
    return [value.detach(), *torch.autograd.grad(value, (first, second))]


def sides(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows of lengths from a tenth to ten."""
    lengths = torch.logspace(-1, 1, N)[:, None]
    return (torch.randn(N, D) * lengths).to(dtype), (torch.randn(N, D) * lengths.flip(0)).to(dtype)


@NAMES
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.05])
def test_values_and_gradients_of_both_sides_equal_the_equation(name: str, temperature: float) -> None:
    ours, equation = pairs_of(temperature)[name]
    first, second = sides()
    results, expected = value_and_gradients(ours, first, second), value_and_gradients(equation, first, second)
    for result, truth in zip(results, expected, strict=True):
        assert truth.abs().max() > 0
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-12)  # fp64 sums in another order


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_rows_lose_nothing_but_their_own_rounding(name: str, dtype: torch.dtype) -> None:
    ours, equation = pairs_of(0.1)[name]
    first, second = sides(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ours(first, second)
    assert result.dtype == torch.float32
    truth = equation(first.double(), second.double())
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)  # fp32 logits of up to 10


def test_a_narrow_queue_loses_nothing_but_its_own_rounding() -> None:
    narrow, (queries, keys) = QUEUE.bfloat16(), sides(torch.float32)
    truth = method_oracles.queue_contrastive_loss(queries.double(), keys.double(), narrow.double(), 0.1)
    result = queue_contrastive_loss(queries, keys, narrow, 0.1)
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)  # fp32 logits of up to 10


def test_a_row_is_no_candidate_of_itself() -> None:
    same = torch.ones(1, D, dtype=torch.float64)
    assert nt_xent(same, -same, 0.1).item() == 0  # the only candidate is the positive, far as it is
    both = F.normalize(torch.eye(2, D, dtype=torch.float64))
    # Each row meets its positive, at 1, and two rows at right angles.
    assert nt_xent(both, both, 1.0).item() == pytest.approx(math.log(math.e + 2) - 1, rel=1e-12)


def test_a_uniform_queue_by_hand() -> None:
    q = torch.eye(1, D, dtype=torch.float64)
    right_angles = torch.eye(D, dtype=torch.float64)[1:]
    expected = math.log1p((D - 1) / math.exp(2))
    assert queue_contrastive_loss(q, 3 * q, right_angles, 0.5).item() == pytest.approx(expected, rel=1e-12)


def test_parallel_rows_have_cosine_1_whatever_their_length() -> None:
    rows = torch.randn(N, D, dtype=torch.float64)
    assert negative_cosine(rows, 7 * rows).item() == pytest.approx(-1, rel=1e-12)
    assert negative_cosine(rows, -rows).item() == pytest.approx(1, rel=1e-12)


@NAMES
def test_a_row_of_zeros_is_finite(name: str) -> None:
    first, second = sides()
    first[1] = 0
    assert all(value.isfinite().all() for value in value_and_gradients(pairs_of(0.5)[name][0], first, second))
