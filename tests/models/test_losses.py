"""negative_cosine against its equation in loops, values and gradients."""

import method_oracles
import pytest
import torch
from torch import Tensor

from mnclglf.models.losses import negative_cosine

N, D = 5, 7


def sides(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows of lengths from a tenth to ten."""
    lengths = torch.logspace(-1, 1, N)[:, None]
    return (torch.randn(N, D) * lengths).to(dtype), (torch.randn(N, D) * lengths.flip(0)).to(dtype)


def equation(predictions: Tensor, targets: Tensor) -> Tensor:
    return method_oracles.squared_distance(predictions, targets) / 2 - 1


def test_value_and_gradients_of_both_sides_equal_the_equation() -> None:
    leaves = [side.requires_grad_() for side in sides()]
    results, expected = (
        [loss.detach(), *torch.autograd.grad(loss, leaves)] for loss in (negative_cosine(*leaves), equation(*leaves))
    )
    for result, truth in zip(results, expected, strict=True):
        assert truth.abs().max() > 0
        torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-12)  # fp64 sums in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_rows_lose_nothing_but_their_own_rounding(dtype: torch.dtype) -> None:
    first, second = sides(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = negative_cosine(first, second)
    assert result.dtype == torch.float32
    truth = equation(first.double(), second.double())
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)  # fp32


def test_parallel_rows_have_cosine_1_whatever_their_length() -> None:
    rows = torch.randn(N, D, dtype=torch.float64)
    assert negative_cosine(rows, 7 * rows).item() == pytest.approx(-1, rel=1e-12)
    assert negative_cosine(rows, -rows).item() == pytest.approx(1, rel=1e-12)


def test_a_row_of_zeros_is_finite() -> None:
    leaves = [side.requires_grad_() for side in sides()]
    with torch.no_grad():
        leaves[0][1] = 0
    loss = negative_cosine(*leaves)
    assert all(value.isfinite().all() for value in (loss, *torch.autograd.grad(loss, leaves)))
