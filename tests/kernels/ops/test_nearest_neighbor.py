"""Tests of nearest_neighbor on each backend against fp64 scores and the double loop of oracles.nearest_neighbor."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out
from tolerance import assert_nearest, working_epsilon
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import Backend, nearest_neighbor
from mnclglf_kernels._triton.tiles import Tile

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOOKUP_BACKENDS = ["torch", "triton", "faiss"]


@pytest.fixture(scope="session", params=LOOKUP_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Returns each backend in turn, with FAISS, which has only this operator."""
    return request.param


def unit_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Returns a queue [K, D] as it is stored: normalized, then rounded to its dtype."""
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1).to(dtype)


def check(queries: Tensor, queue: Tensor, backend: Backend) -> None:
    """Checks that the row at the index is as similar as any. The index may differ where rounding makes a tie."""
    if backend == "triton" and torch.float64 in (queries.dtype, queue.dtype):
        with pytest.raises(TypeError, match="float64"):
            nearest_neighbor(queries, queue, backend=backend)
        return
    epsilon = working_epsilon(torch.float32) if backend == "faiss" else None  # FAISS searches in fp32 on the CPU
    assert_nearest(nearest_neighbor(queries, queue, backend=backend), queries, queue, epsilon)


@pytest.mark.parametrize("queries", [1, 63, 65])
@pytest.mark.parametrize("rows", [1, 63, 65, 257])
@pytest.mark.parametrize("width", [1, 7, 65])
def test_nearest(queries, rows, width, backend):
    check(torch.randn(queries, width) * 5, unit_rows(rows, width, torch.float32), backend)


@pytest.mark.parametrize("size", [(123, 255, 96), (255, 123, 123), (3, 129, 2048), (65, 130, 160)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sizes_off_the_tile(size, dtype, backend):
    queries, rows, width = size
    check(torch.randn(queries, width).to(dtype), unit_rows(rows, width, dtype), backend)


def test_across_tiles_and_chunks(backend):
    # Triton makes 130 tiles of 64 rows and merges 128 at a time. PyTorch takes three chunks of 4096.
    queue = unit_rows(8300, 8, torch.float32)
    queue[8299] = queue[64]
    queue[[0, 4095, 8256]] = math.nan
    rows = torch.tensor([1, 64, 127, 128, 4096, 8191, 8192, 8298, 8299])
    found = nearest_neighbor(queue[rows], queue, backend=backend)
    assert found.tolist() == [1, 64, 127, 128, 4096, 8191, 8192, 8298, 64]


@pytest.mark.parametrize("tile", [(16, 32, 16), (32, 16, 32), (64, 16, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_triton_s_tiles_need_not_be_square(tile, dtype, monkeypatch):
    monkeypatch.setattr("mnclglf_kernels._triton.nearest_neighbor.tile", lambda *_: Tile(*tile, warps=4, stages=1))
    monkeypatch.setattr("mnclglf_kernels._triton.nearest_neighbor.MERGED_TILES", 2)
    check(torch.randn(37, 70).to(dtype), unit_rows(83, 70, dtype), "triton")
    queue = unit_rows(83, 70, dtype)
    assert nearest_neighbor(queue, queue, backend="triton").tolist() == list(range(83))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, backend):
    check(torch.randn(33, 31).to(dtype), unit_rows(129, 31, dtype), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_queries_of_another_dtype(dtype, backend):
    check(torch.randn(33, 31), unit_rows(129, 31, dtype), backend)


@given(
    queries=st.integers(1, 80),
    rows=st.integers(1, 200),
    width=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(queries, rows, width, dtype, seed, backend):
    torch.manual_seed(seed)
    check(torch.randn(queries, width).to(dtype), unit_rows(rows, width, dtype), backend)


@given(
    queries=st.integers(1, 70),
    rows=st.integers(1, 300),
    corners=st.integers(1, 8),
    nan_rows=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES[1:]),
    seed=st.integers(0, 2**16),
)
def test_any_ties(queries, rows, corners, nan_rows, dtype, seed, backend):
    torch.manual_seed(seed)
    # Each row has four entries of 1/2, so norms and scores are exact in every dtype and any order of summation.
    corner = torch.tensor([[x, y, z, 0.5] for x in (0.5, -0.5) for y in (0.5, -0.5) for z in (0.5, -0.5)], dtype=dtype)
    queue = corner[torch.randint(corners, (rows,))]
    queue[torch.randint(rows, (nan_rows,)), 1] = math.nan
    asked = corner[torch.randint(8, (queries,))]
    expected = (asked.double() @ queue.double().t()).nan_to_num(-math.inf).max(dim=1).indices
    with pytest.MonkeyPatch.context() as patch:  # small tiles and chunks, so that these sizes need merges
        patch.setattr("mnclglf_kernels._triton.nearest_neighbor.MERGED_TILES", 2)
        patch.setattr("mnclglf_kernels.ops.nearest_neighbor.CHUNK", 64)
        assert torch.equal(nearest_neighbor(asked, queue, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_row_of_the_queue_finds_itself(dtype, backend):
    queue = unit_rows(129, 65, dtype)
    index = nearest_neighbor(queue, queue, backend=backend)
    assert torch.equal(queue[index], queue)


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**12])
def test_a_scaled_row_of_the_queue_finds_itself(scale, backend):
    queue = unit_rows(129, 65, torch.float32)
    assert torch.equal(queue[nearest_neighbor(queue * scale, queue, backend=backend)], queue)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_are_not_rounded_to_the_input_dtype(dtype, backend):
    width = 16384
    queue = torch.full((2, width), 2.0**-7, dtype=dtype)  # norm exactly 1
    queue[0, 7] *= -1  # cosine to row 1: 1 - 2/16384, which rounds to 1.0 and would win the tie
    assert nearest_neighbor(queue, queue, backend=backend).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_lowest_index_wins_a_tie(dtype, backend):
    # Each row has four entries of 1/2, so norms and scores are exact in every dtype and any order of summation.
    corner = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5], [-0.5, -0.5, 0.5, 0.5]], dtype=dtype)
    queue = corner[[2, 1, 0, 1, 0, 2]].repeat(50, 1)
    assert nearest_neighbor(corner, queue, backend=backend).tolist() == [2, 1, 0]
    assert nearest_neighbor(corner, corner[:1].repeat(65, 1), backend=backend).tolist() == [0, 0, 0]


def test_a_zero_query_ties_with_every_row(backend):
    queries = torch.randn(3, 8)
    queries[1] = 0
    assert nearest_neighbor(queries, unit_rows(65, 8, torch.float32), backend=backend)[1] == 0


def test_a_zero_row_of_the_queue_is_orthogonal_to_everything(backend):
    queue = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [-0.6, -0.8]])
    assert nearest_neighbor(torch.tensor([[1.0, 0.5], [-1.0, 0.0]]), queue, backend=backend).tolist() == [1, 0]


@pytest.mark.parametrize("row", [0, 1, 64])
@pytest.mark.parametrize("columns", [slice(None), slice(0, 1)], ids=["whole row", "one element"])
def test_a_nan_row_never_wins(row, columns, backend):
    queue = unit_rows(65, 7, torch.float32)
    queue[row, columns] = math.nan
    queries = torch.randn(9, 7)
    index = nearest_neighbor(queries, queue, backend=backend)
    assert torch.equal(index, oracles.nearest_neighbor(queries.double(), queue.double()))
    assert (index != row).all()


def test_a_nan_row_does_not_win_against_negative_scores(backend):
    queue = torch.tensor([[math.nan, 0.0], [-1.0, 0.0], [-0.6, -0.8], [0.0, math.nan]])
    assert nearest_neighbor(torch.tensor([[1.0, 0.1]]), queue, backend=backend).tolist() == [2]


def test_a_query_without_a_score_returns_row_zero(backend):
    queue = unit_rows(65, 7, torch.float32)
    queries = queue[[5, 6, 7]].clone()
    queries[1, 3] = math.nan
    assert nearest_neighbor(queries, queue, backend=backend).tolist() == [5, 0, 7]
    assert nearest_neighbor(queries, torch.full_like(queue, math.nan), backend=backend).tolist() == [0, 0, 0]


def test_a_query_that_is_not_finite_leaves_the_others_alone(backend):
    queue, queries = unit_rows(65, 7, torch.float32), torch.randn(9, 7)
    expected = nearest_neighbor(queries, queue, backend=backend)
    queries[4, 2] = math.inf  # has no direction, so any row is right
    index = nearest_neighbor(queries, queue, backend=backend)
    others = torch.arange(9) != 4
    assert torch.equal(index[others], expected[others])
    assert 0 <= index[4] < 65


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_tiny_and_huge_queries(scale, backend):
    queue = unit_rows(65, 7, torch.float32)
    queries = torch.randn(9, 7)
    queries[4] *= scale
    index = nearest_neighbor(queries, queue, backend=backend)
    expected = oracles.nearest_neighbor(queries.double(), queue.double())
    others = torch.arange(9) != 4
    assert torch.equal(index[others], expected[others])
    # F.normalize in fp32 turns a row of 1e20 into zeros, which tie with every row: only row 0 or the neighbor is right.
    assert index[4] in (0, expected[4])


@pytest.mark.parametrize("query_layout", LAYOUTS)
@pytest.mark.parametrize("queue_layout", LAYOUTS)
def test_layouts(query_layout, queue_layout, backend):
    queries, queue = torch.randn(9, 70), unit_rows(65, 70, torch.float32)  # Triton takes 32 columns at a time
    index = nearest_neighbor(lay_out(queries, query_layout), lay_out(queue, queue_layout), backend=backend)
    assert torch.equal(index, oracles.nearest_neighbor(queries.double(), queue.double()))


def test_expanded_rows(backend):
    queries, queue = torch.randn(1, 19), unit_rows(65, 19, torch.float32)
    expected = oracles.nearest_neighbor(queries.double(), queue.double()).expand(9)
    assert torch.equal(nearest_neighbor(queries.expand(9, -1), queue, backend=backend), expected)
    # Whole numbers, so that equal rows have equal scores in whatever order a BLAS sums: the lowest index wins the tie.
    whole = (10 * queue[3:4]).round()
    assert nearest_neighbor((10 * queries).round(), whole.expand(65, -1), backend=backend).tolist() == [0]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_no_queries(dtype, backend):
    index = nearest_neighbor(torch.empty(0, 7, dtype=dtype), unit_rows(5, 7, dtype), backend=backend)
    assert index.dtype == torch.int64
    assert index.shape == (0,)


def test_inputs_are_left_alone_and_nothing_is_differentiated(backend):
    queries, queue = torch.randn(9, 19, requires_grad=True), unit_rows(65, 19, torch.float32)
    before = queries.detach().clone(), queue.clone()
    assert not nearest_neighbor(queries, queue, backend=backend).requires_grad
    assert torch.equal(queries, before[0])
    assert torch.equal(queue, before[1])


def test_autocast_does_not_round_the_scores(backend):
    queue = torch.full((2, 16384), 2.0**-7)
    queue[0, 7] *= -1
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest_neighbor(queue, queue, backend=backend).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("queries", "queue", "named"),
    [((3, 5), (7, 4), "5"), ((5,), (7, 5), r"1|\(5,\)"), ((3, 5, 1), (7, 5), r"3|\(3, 5, 1\)"), ((3, 5), (0, 5), "0")],
    ids=["widths", "one dimension", "three dimensions", "empty queue"],
)
def test_wrong_shapes_are_named(queries, queue, named, backend):
    with pytest.raises(ValueError, match=named):
        nearest_neighbor(torch.randn(queries), torch.randn(queue), backend=backend)


def test_wrong_dtype_is_named(backend):
    with pytest.raises((TypeError, ValueError), match="int64"):
        nearest_neighbor(torch.ones(3, 5, dtype=torch.int64), torch.randn(7, 5), backend=backend)


def test_faiss_scores_fp64_in_fp32_on_the_cpu():
    queue = torch.full((2, 4), 0.5, dtype=torch.float64)
    queue[0, 3] -= 2**-30  # 0.5 in fp32, where the two rows tie
    assert nearest_neighbor(queue[1:], queue, backend="torch").tolist() == [1]
    assert nearest_neighbor(queue[1:], queue, backend="faiss").tolist() == [0]
