"""Tests of batch_norm over ranks: real processes against one process that holds the whole batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from batch_norms import per_channel, scales_of
from rank_processes import run_on_ranks
from ranks_of_batch_norm import (
    SLOW,
    Call,
    Found,
    Results,
    calls_on,
    drawn_for,
    joined,
    layer_results,
    results_of,
)
from tolerance import ULPS_FP32, assert_as_accurate_as_plain, working_epsilon

from mnclglf_kernels import batch_norm

FP64: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)  # sums in another order


def assert_equal_on_all(parts: Sequence[Results]) -> None:
    """Asserts that the running statistics of all ranks have the same bits."""
    for name in (name for name in parts[0] if "running" in name):
        for part in parts:
            assert torch.equal(part[name], parts[0][name]), name


def check_rounded(call: Call, parts: Sequence[Results]) -> None:
    """Compares the errors against fp64 with those of one process that computes in the same dtype."""
    drawn, upstream = drawn_for(call)
    plain = results_of(call._replace(backend="torch", compiler=None))
    truth = results_of(call._replace(backend="torch", compiler=None), dtype=torch.float64)
    scales = scales_of(drawn, upstream * (1.5 if call.fork else 1), call.views)
    zero = torch.zeros_like(scales.bias)
    scale_of = dict(zip(truth, [*scales, *[zero] * (len(truth) - len(scales))], strict=True))
    scale_of |= {"running mean": 1 + zero, "running variance": 1 + zero}
    sizes = joined([{name: x.abs() for name, x in part.items()} for part in parts], call.views)
    for name, actual in joined(parts, call.views).items():
        own, other, true, size = (per_channel(x) for x in (actual, plain[name], truth[name], sizes[name]))
        # Once more than one process rounds: the gradient of x is stored between two passes, those of weight and bias by
        # each rank.
        kind = torch.finfo(parts[0][name].dtype)
        stored = kind.eps * size.double() + kind.tiny
        allowed = 2 * ULPS_FP32 * working_epsilon(call.dtype) * scale_of[name]
        floor = allowed + (stored.amax(1) if stored.dim() > 1 else stored)
        assert_as_accurate_as_plain(own, other, true, floor, what=name)


def check(calls: Sequence[Call], results: Sequence[Sequence[Results]]) -> None:
    """Compares the results of these calls on every rank with those of one process."""
    for call, *parts in zip(calls, *results, strict=True):
        try:
            assert_equal_on_all(parts)
            if call.dtype == torch.float64:
                expected = results_of(call._replace(backend="torch", compiler=None))
                torch.testing.assert_close(joined(parts, call.views), expected, **FP64)
            else:
                check_rounded(call, parts)
        except AssertionError as error:
            error.add_note(f"in {call} on {len(parts)} ranks")
            raise


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_are_one_process(ranks: int) -> None:
    """Checks all that needs processes in one test, as they take seconds to start."""
    found: list[Found] = run_on_ranks("ranks_of_batch_norm:everything", ranks)
    check(calls_on(ranks), [rank.calls for rank in found])
    layers = [rank.layer for rank in found]
    assert_equal_on_all(layers)
    torch.testing.assert_close(joined(layers, 3), layer_results(), **FP64)
    messages = {"gather", "gather_rows", "sum_rows", "sum_over_ranks"}
    checked = messages | {"batch_norm", "batch_norm_backward"} if ranks == 2 else set()
    assert all(set(rank.operators) == checked for rank in found)


@pytest.mark.slow
def test_ranks_compiled_by_inductor() -> None:
    check(SLOW, run_on_ranks("ranks_of_batch_norm:results_of_all", 2, SLOW, seconds=600))


@pytest.mark.parametrize("ranks", [0, -1, 2])
def test_ranks_that_are_not_there(ranks: int, backend: Any) -> None:
    with pytest.raises(ValueError, match=rf"ranks {ranks} .*default group, 1"):
        batch_norm(torch.zeros(4, 3), torch.zeros(3), torch.zeros(3), ranks=ranks, backend=backend)
