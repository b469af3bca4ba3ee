"""bench/operator_cases.py: every operator of the table has cases, and its implementations compute the same."""

import itertools
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from bench import harness, operator_cases
from bench.harness import BOTH, DEVICE, DIRECTIONS, BenchCase, Implementation
from bench.operator_cases import (
    BENCHES,
    Shape,
    all_cases,
    batch_norm_inputs,
    bench_of,
    cases,
    contrastive_inputs,
    enqueue_inputs,
)
from mnclglf_kernels import Backend, combine
from mnclglf_kernels.operators import OPERATORS, Operator
from mnclglf_kernels.sizes import Sizes

FP32 = torch.float32
SMALL = Sizes(images=4, side=4, features=8, k=2, width=8, queue=16, source=4)


def pairs(*subsets: int, both_sides: bool = False) -> Shape:
    how = partial(contrastive_inputs, subsets=subsets, images=4, width=8, both_sides=both_sides)
    return Shape(f"S {subsets}", directions=DIRECTIONS if subsets == (6,) else [BOTH], inputs=how)


SHAPES = {
    "batch_norm": [
        Shape("images", SMALL, DIRECTIONS),
        Shape("rows", directions=DIRECTIONS, inputs=partial(batch_norm_inputs, rows=12, channels=5)),
    ],
    "contrastive_losses": [pairs(6), pairs(6, 6, 1, 1), pairs(2, both_sides=True)],
    "convolution": [Shape("small", SMALL)],
    "enqueue": [Shape("small", inputs=partial(enqueue_inputs, sizes=SMALL))],
    "nearest_neighbor": [Shape("small", SMALL)],
}
SMALL_CASES = [
    case
    for name, row in OPERATORS.items()
    if name != "augment"  # rounds pixels to levels, see below
    for case in cases(
        row,
        bench_of(row)._replace(shapes=SHAPES.get(name, [Shape("small", SMALL, DIRECTIONS)])),
    )
]


def computed(case: BenchCase, implementation: Implementation) -> torch.Tensor:
    """Returns everything that one call computes, from the same inputs each time."""
    torch.manual_seed(0)
    results = harness.call(case, implementation)()
    assert isinstance(results, Sequence)
    return torch.cat([result.detach().double().flatten() for result in results])


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        (case, name)
        for case in SMALL_CASES
        for name in ("torch", "triton", "faiss")
        if name != "faiss" or case.kind == "lookup"
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.operator}, {value.shape}, {value.direction}",
)
def test_implementations_of_a_case_compute_the_same(case, backend, monkeypatch):
    if backend == "faiss" and (reason := harness.problem(Implementation("faiss", FP32), case.kind)):
        pytest.skip(reason)
    monkeypatch.setattr(operator_cases, "_calls", itertools.count())  # the reference's queue begins anew
    reference = computed(case, Implementation("reference", FP32))
    actual = computed(case, Implementation(backend, FP32))
    # Sums of a dozen terms in another order, divided by a temperature of 0.05 or more: 1e-7 x 12 x 20.
    torch.testing.assert_close(actual, reference, rtol=1e-4, atol=3e-5)


def test_the_reference_renders_the_views_that_augment_computes():
    """Pixels of a resized byte image are whole levels, so a few differ by one level: 1 / (255 x 0.25)."""
    inputs = operator_cases.augment_inputs(FP32, DEVICE, images=2, side=16)
    (reference,) = operator_cases.augment_reference(**inputs)
    actual = OPERATORS["augment"].function(**inputs, backend="torch")
    difference = (actual - reference).abs()
    assert difference.median() < 1e-4
    assert difference.max() < 4 / (255 * 0.25)


def test_a_step_divides_and_combines_without_a_gradient():
    by_direction = {case.direction: case for case in SMALL_CASES if case.operator == "combine"}
    for direction, case in by_direction.items():
        outputs = case.make(Implementation("torch", FP32)).forward()
        assert all(output.requires_grad is (direction != "forward") for output in outputs)


def test_every_operator_of_the_table_is_measured():
    assert set(BENCHES) <= set(OPERATORS)
    labels = {bench_of(row).label for row in OPERATORS.values()}
    assert len(labels) == len(OPERATORS)
    assert {case.operator for case in all_cases()} == {case.operator for case in all_cases(quick=True)} == labels
    assert len(all_cases(quick=True)) == len(OPERATORS)
    names = [(case.operator, case.shape, case.direction) for case in all_cases()]
    assert len(set(names)) == len(names)


def test_an_operator_without_an_entry_is_measured_against_its_pytorch_form(monkeypatch):
    """A new row of the table needs no edit in bench/."""

    def toy(features: torch.Tensor, k: int, *, backend: Backend) -> torch.Tensor:
        return combine(features, k, backend=backend)

    row = Operator(function=toy, kind="elementwise", inputs=OPERATORS["combine"].inputs)
    monkeypatch.setitem(OPERATORS, "toy", row)
    found = [case for case in all_cases() if case.operator == "toy"]
    assert [case.direction for case in found] == list(DIRECTIONS)
    bench = bench_of(row)
    small = bench._replace(shapes=[shape._replace(sizes=SMALL) for shape in bench.shapes])
    for case in cases(row, small):
        reference = computed(case, Implementation("reference", FP32))
        torch.testing.assert_close(computed(case, Implementation("triton", FP32)), reference, rtol=1e-4, atol=3e-5)
