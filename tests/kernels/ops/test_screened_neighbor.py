"""Tests of the PyTorch lookup on a CPU, with and without bf16 products: candidates, chunks, rounding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_nearest
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels.ops import nearest_neighbor as neighbor
from mnclglf_kernels.ops.nearest_neighbor import nearest_neighbor, screened_nearest_neighbor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEARCHES = ["screened", "in fp32"]


@pytest.fixture(params=SEARCHES)
def search(request, monkeypatch):
    """Returns the lookup of a CPU with or without bf16 products, on any CPU, with chunks of 16 rows."""
    small_chunks(monkeypatch, request.param)
    return lambda queries, queue: nearest_neighbor(queries, queue, backend="torch")


@pytest.fixture
def dense_chunks(monkeypatch) -> list[int]:
    """Returns a list that records the rows of each chunk that is multiplied in fp32 as a whole."""
    sizes: list[int] = []
    best_of = neighbor.best_of

    def record(scores: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(scores.shape[1])
        return best_of(scores)

    monkeypatch.setattr(neighbor, "best_of", record)
    return sizes


def small_chunks(patch: pytest.MonkeyPatch, search: str) -> None:
    patch.setattr(neighbor, "CPU_MULTIPLIES_BF16", search == "screened")
    patch.setattr(neighbor, "CHUNK", 16)
    patch.setattr(neighbor, "CANDIDATES", 2)


def near_duplicates(rows: int, width: int, distance: float) -> Tensor:
    """Returns [K, D] unit rows around one direction."""
    return F.normalize(F.normalize(torch.randn(1, width)) + distance * torch.randn(rows, width) / width**0.5)


def parted_by_rounding(query_dtype: torch.dtype, queue_dtype: torch.dtype, tilt: float) -> tuple[Tensor, Tensor]:
    """Returns a query [1, 64] and a queue [2, 64]: row 1 is nearer by `tilt`, but row 0 is far nearer in bf16.

    Every product of row 0 is rounded up, and every product of row 1 down. The elements are next to the midpoint of two
    bf16 numbers at 1.0, where the spacing is 2^-7, so each operand is off by 2^-8. Apart from the tilt, the rows are
    orthogonal to the query.
    """
    up, down = 1 + 2**-8 + 2**-18, 1 + 2**-8 - 2**-18
    values = torch.tensor([up] * 31 + [down] * 31, dtype=torch.float64)
    signs = torch.tensor([1.0] * 31 + [-1.0] * 31, dtype=torch.float64)
    query = torch.cat([values, torch.tensor([1.0, 0.0], dtype=torch.float64)])
    queue = torch.zeros(2, 64, dtype=torch.float64)
    for row, sign in enumerate((1, -1)):
        queue[row, :62] = sign * signs * values / 8
        queue[row, 62] = -sign * tilt
        queue[row, 63] = (1 - queue[row].square().sum()).sqrt()  # completes the unit norm; the query is 0 here
    return query[None].to(query_dtype), queue.to(queue_dtype)


@pytest.mark.parametrize("tilt", [0.001, 0.02])
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
def test_rounding_of_both_operands_hides_no_row(query_dtype, queue_dtype, tilt, search):
    queries, queue = parted_by_rounding(query_dtype, queue_dtype, tilt)
    assert_nearest(search(queries, queue), queries, queue)


def test_rounding_of_the_scores_hides_no_row(search):
    # Unit: the last place of bf16 at 4. The rough scores are 133.52 and 132.49, which round to 134 and 132. The margin
    # for the rows' rounding is 1.45. The exact scores are 133.0005 and 133.0073.
    up, down = (1 + 2**-8 + 2**-18) / 8, (1 + 2**-8 - 2**-18) / 8
    query, queue = torch.zeros(1, 36), torch.zeros(2, 36)
    query[0, :33], queue[0, :33], queue[1, :33] = 1, up, down
    query[0, 33], queue[:, 33] = 31 / 256, 1 / 8
    query[0, 34], queue[1, 34] = 1 / 16, 2**-8
    queue[:, 35] = (1 - queue.square().sum(dim=1)).sqrt()  # completes the unit norm; the query is 0 here
    assert search(query, queue).tolist() == [1]


@pytest.mark.parametrize("power", [-110, -70, 70, 110])
def test_the_length_of_a_query_hides_no_row(power, search):
    queries, queue = parted_by_rounding(torch.float32, torch.float32, 0.001)
    queue[:, :62] = (queue[:, :62] * 8).round() / 8  # exact in bf16: only the query's rounding separates the rows
    assert search(queries * 2.0**power, queue).tolist() == [1]  # squares of the elements underflow or overflow


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_duplicates(distance, dtype, search):
    queue = near_duplicates(100, 65, distance).to(dtype)
    assert_nearest(search(queue, queue), queue, queue)
    queries = torch.randn(9, 65).to(dtype)
    assert_nearest(search(queries, queue), queries, queue)
    assert_nearest(search(-queue, queue), -queue, queue)  # all scores near -1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_scores_only(dtype, search):
    queue = F.normalize(torch.rand(100, 33)).to(dtype)
    queries = -torch.rand(9, 33).to(dtype)
    assert (queries.double() @ queue.double().t() < 0).all()
    assert_nearest(search(queries, queue), queries, queue)


def test_identical_rows_are_compared_in_fp32_as_a_whole(dense_chunks, monkeypatch):
    small_chunks(monkeypatch, "screened")
    queue = F.normalize(torch.randn(1, 33)).repeat(40, 1)
    assert screened_nearest_neighbor(queue[:3], queue).tolist() == [0, 0, 0]
    assert dense_chunks == [16, 16, 8]


def test_few_candidates_are_compared_one_by_one(dense_chunks, monkeypatch):
    monkeypatch.setattr(neighbor, "CHUNK", 16)
    queue = F.normalize(torch.randn(40, 512))
    assert screened_nearest_neighbor(queue, queue).tolist() == list(range(40))
    queue[[9, 20]] = queue[[5, 5]]  # ties within a chunk and between two chunks
    assert screened_nearest_neighbor(queue[[5, 9, 20, 21]], queue).tolist() == [5, 5, 5, 21]
    assert dense_chunks == []


def test_a_tie_across_chunks_goes_to_the_lowest_row(search):
    corner = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]])
    queue = corner[[1] * 15 + [0] * 5 + [1] * 40]
    assert search(corner, queue).tolist() == [15, 0]


@pytest.mark.parametrize("rows", [slice(0, 16), slice(16, 32), slice(5, 40)], ids=str)
def test_nan_rows_never_win_and_hide_no_other(rows, search):
    queue = F.normalize(torch.randn(50, 7))
    queue[rows, 3] = math.nan
    queries = torch.cat([torch.randn(9, 7), queue[45:]])
    index = search(queries, queue)
    assert_nearest(index, queries, queue)
    assert not queue[index].isnan().any()


def test_a_query_without_a_score_returns_row_zero(search):
    queue, queries = F.normalize(torch.randn(50, 7)), torch.randn(3, 7)
    queries[1, 3] = math.nan
    assert search(queries, queue)[1] == 0
    assert search(queries, torch.full_like(queue, math.nan)).tolist() == [0, 0, 0]
    queries[1] = 0
    assert search(queries, queue)[1] == 0


@given(
    queries=st.integers(1, 40),
    rows=st.integers(1, 80),
    width=st.integers(1, 70),
    distance=st.sampled_from([0.0, 1e-5, 1e-3, 1e-2, 1.0, 100.0]),
    length=st.sampled_from([1e-25, 1e-6, 1.0, 1e4]),
    query_dtype=st.sampled_from(DTYPES),
    queue_dtype=st.sampled_from(DTYPES),
    search=st.sampled_from(SEARCHES),
    seed=st.integers(0, 2**16),
)
def test_any_queue(queries, rows, width, distance, length, query_dtype, queue_dtype, search, seed):
    torch.manual_seed(seed)
    queue = near_duplicates(rows, width, distance).to(queue_dtype)
    asked = queue.float()[torch.randint(rows, (queries,))] + min(distance, 1) * torch.randn(queries, width)
    asked = (length * asked).to(query_dtype)
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, search)
        assert_nearest(nearest_neighbor(asked, queue, backend="torch"), asked, queue)
