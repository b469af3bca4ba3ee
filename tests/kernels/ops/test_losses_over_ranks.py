"""Tests of the losses' keywords `rank` and `ranks` against loops in fp64: each rank's part, and the whole batch.

Letters: N images of the batch, n = N / ranks of a rank, S splits, D width.
"""

import math
from collections.abc import Callable, Sequence

import method_oracles
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate_as_plain, gradient_floor, loss_floor
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import contrastive_loss, contrastive_losses, nt_xent
from mnclglf_kernels._triton.tiles import Tile

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 0.3
UPSTREAM = -3.75
LEARN = [(True, True), (True, False), (False, True)]
CONTRASTIVE_SHAPES = [(2, 1, 1, 1), (2, 6, 1, 5), (3, 2, 5, 33), (8, 1, 3, 96), (2, 2, 37, 63)]  # ranks, S, n, D
NT_XENT_SHAPES = [(2, 1, 1), (3, 5, 33), (8, 2, 96), (2, 35, 63)]  # ranks, n, D


def rows_of(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Returns random rows of different norms, far from 1."""
    return (torch.randn(count, width) * torch.rand(count, 1).add(0.1) * 5).to(dtype)


def part_of(rows: Tensor, rank: int, ranks: int, splits: int = 1) -> Tensor:
    """Returns a rank's rows of every split of N: [S * N, D] -> [S * n, D]."""
    return rows.unflatten(0, (splits, ranks, -1))[:, rank].flatten(0, 1)


def plain_contrastive_loss(targets: Tensor, predictions: Tensor, temperature: float, rank: int, ranks: int) -> Tensor:
    """Computes one rank's part in vectorized PyTorch, entirely in the dtype of its input."""
    logits = F.normalize(targets) @ F.normalize(predictions).T / temperature
    images = len(predictions) // ranks
    return F.cross_entropy(logits, (torch.arange(len(targets)) % images) + rank * images)


def plain_nt_xent(first: Tensor, second: Tensor, temperature: float, rank: int, ranks: int) -> Tensor:
    """Computes the part from the logits of all 2N rows, entirely in the dtype of its input."""
    rows = F.normalize(torch.cat([first, second]))
    logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
    losses = F.cross_entropy(logits, torch.arange(len(rows)).roll(len(first)), reduction="none")
    return part_of(losses, rank, ranks, splits=2).mean()


def with_gradients(function: Callable[..., Tensor], sides: Sequence[Tensor], learn: Sequence[bool]) -> list[Tensor]:
    """Returns the loss and the gradients of the sides that learn, for UPSTREAM as dL/dloss."""
    leaves = [rows.detach().clone().requires_grad_(asks) for rows, asks in zip(sides, learn, strict=True)]
    loss = function(*leaves)
    gradients = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad], torch.full_like(loss, UPSTREAM))
    return [loss.detach(), *gradients]


def check_part(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    equation: Callable[..., Tensor],
    sides: Sequence[Tensor],
    learn: Sequence[bool],
    backend: str,
    rank: int,
    ranks: int,
) -> None:
    """Compares a rank's loss and gradients with the loops in fp64 and with PyTorch in the dtype of the input."""
    dtype, how = sides[0].dtype, dict(rank=rank, ranks=ranks)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(TypeError, match="float64"):
            ours(*sides, TEMPERATURE, **how, backend=backend)
        return
    actual = with_gradients(lambda *x: ours(*x, TEMPERATURE, **how, backend=backend), sides, learn)
    compared = with_gradients(lambda *x: plain(*x, TEMPERATURE, **how), sides, learn)
    doubled = [rows.double() for rows in sides]
    truth = with_gradients(lambda *x: equation(*x, TEMPERATURE, **how), doubled, learn)
    floors: list[float | Tensor] = [loss_floor(TEMPERATURE, 2 * len(sides[1]), dtype)]
    learners = [rows for rows, asks in zip(sides, learn, strict=True) if asks]
    # A row is in n terms at most of a mean over n, S of them for a prediction and its own targets.
    terms = len(sides[1]) // ranks
    floors += [gradient_floor(x, terms, TEMPERATURE, UPSTREAM, y) for x, y in zip(learners, truth[1:], strict=True)]
    for place, results in enumerate(zip(actual, compared, truth, floors, strict=True)):
        assert_as_accurate_as_plain(*results, what=f"rank {rank}, result {place}")
    assert [x.dtype for x in actual[1:]] == [dtype] * len(learners)


# Ours, PyTorch in the dtype of its input, and the equation as loops.
CONTRASTIVE_LOSS = contrastive_loss, plain_contrastive_loss, oracles.contrastive_loss_of_part
NT_XENT = nt_xent, plain_nt_xent, method_oracles.nt_xent_of_part


def check_parts_of_contrastive_loss(
    shape: tuple[int, int, int, int], dtype: torch.dtype, learn: Sequence[bool], backend: str
) -> None:
    ranks, splits, images, width = shape
    targets, predictions = rows_of(splits * ranks * images, width, dtype), rows_of(ranks * images, width, dtype)
    for rank in range(ranks):
        sides = part_of(targets, rank, ranks, splits), predictions
        check_part(*CONTRASTIVE_LOSS, sides, learn, backend, rank, ranks)


def check_parts_of_nt_xent(
    shape: tuple[int, int, int], dtype: torch.dtype, learn: Sequence[bool], backend: str
) -> None:
    ranks, images, width = shape
    sides = [rows_of(ranks * images, width, dtype) for _ in range(2)]
    for rank in range(ranks):
        check_part(*NT_XENT, sides, learn, backend, rank, ranks)


@pytest.mark.parametrize("shape", CONTRASTIVE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_part_of_contrastive_loss(shape, dtype, backend):
    check_parts_of_contrastive_loss(shape, dtype, (True, True), backend)


@pytest.mark.parametrize("shape", NT_XENT_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_part_of_nt_xent(shape, dtype, backend):
    check_parts_of_nt_xent(shape, dtype, (True, True), backend)


@settings(max_examples=10)  # each example interprets up to 20 launches
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 13), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    learn=st.sampled_from(LEARN),
    seed=st.integers(0, 2**16),
)
def test_any_part_of_contrastive_loss(shape, dtype, learn, seed, backend):
    torch.manual_seed(seed)
    check_parts_of_contrastive_loss(shape, dtype, learn, backend)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 13), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    learn=st.sampled_from(LEARN),
    seed=st.integers(0, 2**16),
)
def test_any_part_of_nt_xent(shape, dtype, learn, seed, backend):
    torch.manual_seed(seed)
    check_parts_of_nt_xent(shape, dtype, learn, backend)


def check_mean_over_ranks(
    part: Callable[..., Tensor], whole: Callable[..., Tensor], sides: Sequence[Tensor], ranks: int
) -> None:
    """Compares the mean over ranks of `part(*sides, rank)` and its gradients with the loops of the whole batch in fp64.

    The gradient of that mean is what a training run makes of the ranks' gradients: their sum, divided by their number.
    """

    def mean(*leaves: Tensor) -> Tensor:
        return torch.stack([part(*leaves, rank) for rank in range(ranks)]).mean()

    actual = with_gradients(mean, sides, (True, True))
    truth = with_gradients(lambda *x: whole(*x, TEMPERATURE), [rows.double() for rows in sides], (True, True))
    floors: list[float | Tensor] = [loss_floor(TEMPERATURE, 2 * len(sides[1]), sides[0].dtype)]
    for rows, gradient in zip(sides, truth[1:], strict=True):
        floors.append(gradient_floor(rows, len(sides[1]) // ranks, TEMPERATURE, UPSTREAM, gradient))
    for place, (found, true, floor) in enumerate(zip(actual, truth, floors, strict=True)):
        assert_as_accurate_as_plain(found, true, true, floor, what=f"result {place}")


def widest(backend: str) -> torch.dtype:
    return torch.float64 if backend == "torch" else torch.float32


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(1, 30)),
    seed=st.integers(0, 2**16),
)
def test_the_mean_over_ranks_is_the_contrastive_loss_of_the_batch(shape, seed, backend):
    torch.manual_seed(seed)
    ranks, splits, images, width = shape
    sides = [rows_of(count * ranks * images, width, widest(backend)) for count in (splits, 1)]

    def part(targets: Tensor, predictions: Tensor, rank: int) -> Tensor:
        local = part_of(targets, rank, ranks, splits)
        return contrastive_loss(local, predictions, TEMPERATURE, rank=rank, ranks=ranks, backend=backend)

    check_mean_over_ranks(part, oracles.contrastive_loss, sides, ranks)


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 30)),
    seed=st.integers(0, 2**16),
)
def test_the_mean_over_ranks_is_the_nt_xent_of_the_batch(shape, seed, backend):
    torch.manual_seed(seed)
    ranks, images, width = shape
    sides = [rows_of(ranks * images, width, widest(backend)) for _ in range(2)]

    def part(first: Tensor, second: Tensor, rank: int) -> Tensor:
        return nt_xent(first, second, TEMPERATURE, rank=rank, ranks=ranks, backend=backend)

    check_mean_over_ranks(part, method_oracles.nt_xent, sides, ranks)


@pytest.mark.parametrize(("logits", "gradients"), [((16, 32, 16), (32, 16, 32)), ((32, 16, 64), (16, 32, 16))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_parts_of_several_tiles(logits, gradients, dtype, monkeypatch):
    """Checks parts that begin and end within a tile, and tiles without a row of the part."""
    shapes = {"contrastive": logits, "nt_xent": logits, "gradient": gradients}
    for module in ("contrastive_losses", "nt_xent"):
        monkeypatch.setattr(
            f"mnclglf_kernels._triton.{module}.tile", lambda name, *_: Tile(*shapes[name], warps=4, stages=1)
        )
    monkeypatch.setattr("mnclglf_kernels._triton.contrastive_losses.MERGED", 16)
    targets, predictions, first, second = (rows_of(count, 43, dtype) for count in (42, 63, 63, 63))
    check_part(*CONTRASTIVE_LOSS, (targets, predictions), (True, True), "triton", 1, 3)
    check_part(*NT_XENT, (first, second), (True, True), "triton", 1, 3)


@pytest.mark.parametrize("place", [1, 8], ids=["of another part", "of the part"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("row", ["zero", "huge", "duplicate"])
def test_special_rows(row, side, place, backend):
    """Changes one row. The product of a huge row with itself is infinite."""
    sides = [rows_of(15, 19, torch.float32) for _ in range(2)]
    rows = sides[side]
    rows[place] = {"zero": torch.zeros(19), "huge": 1e20 * rows[place], "duplicate": rows[2]}[row]
    check_part(*CONTRASTIVE_LOSS, sides, (True, True), backend, 1, 3)  # the targets are three splits
    check_part(*NT_XENT, sides, (True, True), backend, 1, 3)


def test_pairs_of_a_part_in_one_call_give_the_bits_of_one_call_each(backend):
    pairs = [
        (rows_of(s * 9, 21, dtype).requires_grad_(), rows_of(27, 21, dtype).requires_grad_())
        for s, dtype in ((6, torch.float32), (1, torch.float32), (2, torch.bfloat16))
    ]
    losses = contrastive_losses(pairs, TEMPERATURE, rank=1, ranks=3, backend=backend)
    gradients = torch.autograd.grad(losses, [rows for pair in pairs for rows in pair])
    for i, pair in enumerate(pairs):
        alone = contrastive_loss(*pair, TEMPERATURE, rank=1, ranks=3, backend=backend)
        assert torch.equal(losses[i], alone)
        for found, expected in zip(gradients[2 * i :], torch.autograd.grad(alone, pair), strict=False):
            assert torch.equal(found, expected)


def test_uniform_embeddings_give_the_logarithm_of_all_ranks_candidates(backend):
    rows = torch.ones(15, 16)
    loss = contrastive_loss(rows[:10], rows, 0.01, rank=2, ranks=3, backend=backend)
    # Every logit is 100. Tolerance: one unit in the last place of 100 and of the sum.
    assert loss.item() == pytest.approx(math.log(15), abs=100 * 2**-22)
    loss = nt_xent(rows, rows, 0.01, rank=2, ranks=3, backend=backend)
    assert loss.item() == pytest.approx(math.log(29), abs=100 * 2**-22)


@pytest.mark.parametrize(
    ("rank", "ranks", "named"),
    [(2, 2, "rank 2.*0 to 1"), (-1, 2, "rank -1.*0 to 1"), (1, 1, "rank 1.*ranks"), (0, 0, "ranks 0.*at least 1")],
)
def test_a_wrong_rank_is_named(rank, ranks, named, backend):
    rows = torch.randn(6, 4)
    for loss in (contrastive_loss, nt_xent):
        with pytest.raises(ValueError, match=named):
            loss(rows, rows, 1.0, rank=rank, ranks=ranks, backend=backend)


def test_rows_that_the_ranks_do_not_divide_are_named(backend):
    rows = torch.randn(8, 4)
    for loss in (contrastive_loss, nt_xent):
        with pytest.raises(ValueError, match=r"8 .*3 ranks.*same number"):
            loss(rows, rows, 1.0, rank=0, ranks=3, backend=backend)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_targets_that_are_no_splits_of_a_part_are_named(count, backend):
    with pytest.raises(ValueError, match=f"{count} target rows.*8 prediction rows.*4 ranks.*2 .*this rank"):
        contrastive_loss(torch.randn(count, 4), torch.randn(8, 4), 1.0, rank=0, ranks=4, backend=backend)
