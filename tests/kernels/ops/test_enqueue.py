"""Tests of enqueue against oracles.enqueue: the ring, the stored rows, and the gate that leaves both unchanged."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, lay_out
from tolerance import ULPS_FP32, assert_as_accurate_as_plain, working_epsilon
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import Backend, enqueue

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(queue: Tensor, start: int, rows: Tensor, backend: Backend) -> None:
    """Compares pointer, written rows and untouched rows with the oracle on fp64 copies."""
    before = queue.clone()
    pointer = torch.tensor(start)
    address = queue.data_ptr(), pointer.data_ptr()
    assert enqueue(queue, pointer, rows, backend=backend) is None
    truth, expected_pointer = oracles.enqueue(before.double(), start, rows.double())
    assert (queue.data_ptr(), pointer.data_ptr()) == address
    assert pointer.dtype == torch.int64
    assert pointer.item() == expected_pointer
    written = (start + torch.arange(len(rows))) % len(queue)
    kept = torch.ones(len(queue), dtype=torch.bool)
    kept[written] = False
    assert torch.equal(queue[kept], before[kept])
    plain = F.normalize(rows.double() if rows.dtype == torch.float64 else rows.float(), dim=1).to(queue.dtype)
    # Tolerance: one rounding at the store, and that of a norm of D terms in fp32.
    floor = torch.finfo(queue.dtype).eps / 2 + ULPS_FP32 * working_epsilon(rows.dtype)
    assert_as_accurate_as_plain(queue[written], plain, truth[written], floor, what="rows enqueued")


@pytest.mark.parametrize("row_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
def test_dtypes(queue_dtype, row_dtype, backend):
    check(torch.randn(17, 9).to(queue_dtype), 14, (torch.randn(6, 9) * 5).to(row_dtype), backend)


@pytest.mark.parametrize(
    ("rows", "start", "capacity"),
    [(1, 0, 1), (1, 4, 5), (5, 0, 5), (5, 3, 5), (4, 1, 5), (4, 2, 5), (63, 60, 65), (65, 64, 65), (123, 200, 255)],
    ids=str,
)
def test_ring(rows, start, capacity, backend):
    check(torch.randn(capacity, 7), start, torch.randn(rows, 7), backend)


@pytest.mark.parametrize("width", [1, 96, 123, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths(width, dtype, backend):
    check(torch.randn(5, width).to(dtype), 3, (torch.randn(3, width) * 5).to(dtype), backend)


@given(data=st.data())
def test_any_ring(data, backend):
    capacity = data.draw(st.integers(1, 70), label="capacity")
    rows = data.draw(st.integers(1, capacity), label="rows")
    start = data.draw(st.integers(0, capacity - 1), label="start")
    width = data.draw(st.integers(1, 40), label="width")
    layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
    check(torch.randn(capacity, width), start, lay_out(torch.randn(rows, width) + 0.1, layout), backend)


def test_many_steps_go_round(backend):
    queue, pointer = torch.zeros(7, 3, dtype=torch.float64), torch.tensor(0)
    expected, expected_pointer = queue.clone(), 0
    for _ in range(9):
        rows = torch.randn(3, 3, dtype=torch.float64)
        enqueue(queue, pointer, rows, backend=backend)
        expected, expected_pointer = oracles.enqueue(expected, expected_pointer, rows)
        assert pointer.item() == expected_pointer
    torch.testing.assert_close(queue, expected, rtol=1e-14, atol=1e-15)  # fp64, norms of three terms


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_zero_tiny_and_huge_rows(scale, backend):
    rows = torch.randn(4, 7)
    rows[2] *= scale
    check(torch.randn(9, 7), 3, rows, backend)


@pytest.mark.parametrize("norm", [0.5e-12, 0.99e-12, 1.01e-12, 2e-12])
def test_rows_beside_the_floor(norm, backend):
    check(torch.randn(9, 7), 3, norm * F.normalize(torch.randn(4, 7)), backend)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_is_not_finite_is_stored_as_f_normalize_has_it(value, dtype, backend):
    queue, rows = torch.randn(9, 7).to(dtype), torch.randn(5, 7)
    rows[2, 3] = value
    expected = F.normalize(rows).to(dtype)
    enqueue(queue, torch.tensor(1), rows, backend=backend)
    assert torch.equal(queue[3].isnan(), expected[2].isnan())
    assert queue[3].isnan().any()
    # Tolerance of the other rows: one unit in the last place of the queue, and a norm of 7 terms in fp32.
    rtol = torch.finfo(dtype).eps + ULPS_FP32 * working_epsilon(dtype)
    torch.testing.assert_close(queue[[1, 2, 4, 5]], expected[[0, 1, 3, 4]], rtol=rtol, atol=0)


def test_duplicated_rows_are_stored_twice(backend):
    queue = torch.randn(9, 7)
    enqueue(queue, torch.tensor(7), torch.randn(1, 7).expand(4, -1), backend=backend)
    assert torch.equal(queue[[8, 0, 1]], queue[7:8].expand(3, -1))


def test_no_rows_change_nothing(backend):
    queue, pointer = torch.randn(9, 7), torch.tensor(6)
    before = queue.clone()
    for should_update in (None, torch.tensor(True)):
        enqueue(queue, pointer, torch.empty(0, 7), should_update=should_update, backend=backend)
    assert torch.equal(queue, before)
    assert pointer.item() == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_layouts(layout, backend):
    check(torch.randn(9, 7), 6, lay_out(torch.randn(5, 7), layout), backend)


def test_expanded_columns(backend):
    check(torch.randn(9, 7), 6, torch.randn(5, 1).expand(-1, 7), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_strided_queue_is_written_in_place_and_its_gaps_are_not(layout, backend):
    queue, pointer, rows = lay_out(torch.randn(9, 7), layout), torch.tensor(6), torch.randn(5, 7)
    storage = torch.tensor([], dtype=queue.dtype).set_(queue.untyped_storage())
    gaps = storage.isnan()
    expected, expected_pointer = oracles.enqueue(queue, 6, rows)
    enqueue(queue, pointer, rows, backend=backend)
    assert pointer.item() == expected_pointer
    torch.testing.assert_close(queue, expected, rtol=ULPS_FP32 * working_epsilon(torch.float32), atol=0)
    assert torch.equal(storage.isnan(), gaps)


def test_rows_of_the_queue_itself(backend):
    queue = F.normalize(torch.randn(9, 7), dim=1)
    expected, _ = oracles.enqueue(queue, 2, queue[:4].clone())
    enqueue(queue, torch.tensor(2), queue[:4].clone(), backend=backend)
    torch.testing.assert_close(queue, expected, rtol=ULPS_FP32 * working_epsilon(torch.float32), atol=0)


def test_kept(backend):
    ungated, gated, rows = torch.zeros(9, 7), torch.zeros(9, 7), torch.randn(5, 7)
    first, second = torch.tensor(6), torch.tensor(6)
    enqueue(ungated, first, rows, backend=backend)
    enqueue(gated, second, rows, should_update=torch.tensor(True), backend=backend)
    assert torch.equal(gated, ungated)
    assert torch.equal(second, first)


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_kept(dtype, value, backend):
    queue, pointer = torch.randn(9, 7).to(dtype), torch.tensor(6)
    before = queue.clone()
    enqueue(queue, pointer, torch.full((5, 7), value), should_update=torch.tensor(False), backend=backend)
    assert torch.equal(queue, before)
    assert pointer.item() == 6


def test_not_kept_leaves_nan_in_the_queue_alone(backend):
    queue, pointer = torch.randn(9, 7), torch.tensor(6)
    queue[7] = math.nan
    before = queue.clone()
    enqueue(queue, pointer, torch.randn(5, 7), should_update=torch.tensor(False), backend=backend)
    assert torch.equal(queue.nan_to_num(77.0), before.nan_to_num(77.0))


def test_rows_are_left_alone_and_the_queue_stays_out_of_the_graph(backend):
    queue, pointer, rows = torch.randn(9, 7), torch.tensor(6), torch.randn(5, 7, requires_grad=True)
    before = rows.detach().clone()
    enqueue(queue, pointer, rows, backend=backend)
    assert torch.equal(rows, before)
    assert not queue.requires_grad
    assert rows.grad_fn is None


@pytest.mark.parametrize(
    ("queue", "rows", "named"),
    [
        ((9, 7), (10, 7), "10"),
        ((9, 7), (5, 6), "6"),
        ((9, 7), (7,), r"1|\(7,\)"),
        ((9, 7, 1), (5, 7), r"3|\(9, 7, 1\)"),
    ],
    ids=["more rows than the queue has", "widths", "one dimension", "three dimensions"],
)
def test_wrong_shapes_are_named(queue, rows, named, backend):
    queue, pointer = torch.randn(queue), torch.tensor(0)
    before = queue.clone()
    with pytest.raises(ValueError, match=named):
        enqueue(queue, pointer, torch.randn(rows), backend=backend)
    assert torch.equal(queue, before)
    assert pointer.item() == 0


@pytest.mark.parametrize(
    ("pointer", "named"),
    [
        (torch.tensor(0, dtype=torch.int32), "int32"),
        (torch.tensor(0.0), "float32"),
        (torch.tensor([0]), "1"),
    ],
    ids=["int32", "float32", "one dimension"],
)
def test_a_wrong_pointer_is_named(pointer, named, backend):
    with pytest.raises((TypeError, ValueError), match=named):
        enqueue(torch.randn(9, 7), pointer, torch.randn(5, 7), backend=backend)


@pytest.mark.parametrize(
    ("should_update", "named"),
    [(torch.tensor(1), "int64"), (torch.tensor([True]), "1")],
    ids=["int64", "one dimension"],
)
def test_a_wrong_gate_is_named(should_update, named, backend):
    with pytest.raises((TypeError, ValueError), match=named):
        enqueue(torch.randn(9, 7), torch.tensor(0), torch.randn(5, 7), should_update=should_update, backend=backend)


@pytest.mark.parametrize("wrong", ["queue", "rows"])
def test_wrong_dtype_is_named(wrong, backend):
    matrices = {"queue": torch.randn(9, 7), "rows": torch.randn(5, 7)}
    matrices[wrong] = matrices[wrong].long()
    with pytest.raises(TypeError, match=f"{wrong}.*int64"):
        enqueue(matrices["queue"], torch.tensor(0), matrices["rows"], backend=backend)
