"""Tests of logistic regression against torch's own solver, and of the choice of few labels."""

import logging
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from mnclglf.data.splits import per_class_draws
from mnclglf.evaluation.logistic import (
    C_GRID,
    DEFAULT_C,
    FEW_LABELS_C,
    choose_c,
    few_labels,
    fit_logistic,
    standardize,
)


def mixture(n: int, width: int, classes: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Returns features around one center per class (the same for every seed), in columns of very different scale."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    features = centres[labels] + spread * torch.randn(n, width, generator=generator)
    return features * torch.logspace(-1, 1, width) + 3, labels


def solved_by_torch(train: Tensor, labels: Tensor, test: Tensor, classes: int, c: float) -> Tensor:
    """Returns the logits that minimize c * summed cross-entropy + |w|^2 / 2, columns as given, by torch in fp64."""
    train, test = train.double(), test.double()
    weight = torch.zeros(classes, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = c * F.cross_entropy(F.linear(train, weight, bias), labels, reduction="sum") + weight.square().sum() / 2
        loss.backward()
        return loss

    solver.step(closure)
    return F.linear(test, weight, bias).detach()


def shares_of_hits(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns top-1 and top-5 accuracy by sorting."""
    hits = logits.argsort(dim=1, descending=True) == labels[:, None]
    return hits[:, :1].any(1).double().mean().item(), hits[:, :5].any(1).double().mean().item()


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_agrees_with_torchs_solver(classes: int):
    train, labels = mixture(400, 12, classes, seed=1)
    test, test_labels = mixture(999, 12, classes, seed=2)
    mean, deviation = train.double().mean(0), train.double().std(0, correction=0)
    # Two classes: scikit-learn fits one weight vector w where softmax has w / 2 and -w / 2, half the penalty.
    c = DEFAULT_C if classes > 2 else 2 * DEFAULT_C
    logits = solved_by_torch((train - mean) / deviation, labels, (test - mean) / deviation, classes, c)
    accuracy = fit_logistic(train, labels, test, test_labels, classes=classes)
    # fp32 and a tolerance of 1e-4 on the gradient may turn a test row that lies on the border: two of 999
    assert (accuracy.top1, accuracy.top5) == pytest.approx(shares_of_hits(logits, test_labels), abs=2.1 / 999)
    assert 1 / classes < accuracy.top1 < 1
    assert not accuracy.note


def test_scale_and_offset_of_a_column_do_not_matter():
    train, labels = mixture(300, 10, 5, seed=1)
    test, test_labels = mixture(300, 10, 5, seed=2)
    factors = torch.logspace(1, -1, 10)
    plain = fit_logistic(train, labels, test, test_labels, classes=5)
    scaled = fit_logistic(train * factors - 4, labels, test * factors - 4, test_labels, classes=5)
    assert scaled.top1 == pytest.approx(plain.top1, abs=2.1 / 300)


@given(st.permutations(range(4)))
@settings(max_examples=8)
def test_names_of_classes_do_not_matter(permutation: list[int]):
    train, labels = mixture(200, 6, 4, seed=3)
    renamed = torch.tensor(permutation)
    plain = fit_logistic(train, labels, train, labels, classes=4)
    other = fit_logistic(train, renamed[labels], train, renamed[labels], classes=4)
    assert other.top1 == pytest.approx(plain.top1, abs=2.1 / 200)


def test_the_same_every_time():
    train, labels = mixture(200, 6, 4, seed=3)
    assert fit_logistic(train, labels, train, labels, classes=4) == fit_logistic(
        train, labels, train, labels, classes=4
    )
    assert few_labels(train, labels, train, labels, classes=4) == few_labels(train, labels, train, labels, classes=4)


def test_a_class_that_was_never_seen_is_never_right():
    train, labels = mixture(100, 6, 4, seed=3)
    seen = labels < 3
    for test_label, low, high in ((3, 0.0, 0.0), (1, 0.5, 1.0)):
        rows = labels == test_label
        accuracy = fit_logistic(train[seen], labels[seen], train[rows], labels[rows], classes=4)
        assert low <= accuracy.top1 <= high
        assert accuracy.top5 == float(test_label < 3)


def test_an_unfinished_fit_says_so(caplog: pytest.LogCaptureFixture):
    train, labels = mixture(200, 6, 4, seed=3)
    with caplog.at_level(logging.WARNING):
        accuracy = fit_logistic(train, labels, train, labels, classes=4, max_iterations=2)
    assert accuracy.note == "not converged after 2 iterations"
    assert "not converged after 2 iterations" in caplog.text


def test_columns_without_variation_are_harmless():
    train, labels = mixture(200, 6, 4, seed=3)
    plain = fit_logistic(train, labels, train, labels, classes=4)
    dead = torch.cat([train, torch.full((200, 2), 5.0)], dim=1)
    assert fit_logistic(dead, labels, dead, labels, classes=4).top1 == pytest.approx(plain.top1, abs=1.1 / 200)
    same = torch.ones(200, 3)
    assert fit_logistic(same, labels, same, labels, classes=4).top1 == pytest.approx(1 / 4)


def test_standardize_uses_the_train_set_alone_and_bounds_rare_specks():
    train = torch.stack([torch.arange(1000.0), torch.zeros(1000)], dim=1)
    train[0, 1] = 1e-6
    test = torch.tensor([[499.5, 1.0]])
    first, second = standardize(train, test)
    assert first[:, 0].mean() == pytest.approx(0, abs=1e-5)
    assert first[:, 0].std() == pytest.approx(1, rel=1e-5)
    assert second[0, 0] == pytest.approx(0, abs=1e-5)
    assert second[0, 1] == pytest.approx(1 / (1e-3 * train[:, 0].std(correction=0).item()), rel=1e-3)


def test_few_labels_are_fits_on_those_subsets():
    train, labels = mixture(400, 12, 5, seed=1)
    test, test_labels = mixture(300, 12, 5, seed=2)
    accuracies = few_labels(train, labels, test, test_labels, classes=5, per_class=4, draws=3, seed=9)
    columns, test_columns = (torch.from_numpy(part) for part in standardize(train, test))
    subsets = per_class_draws(labels.numpy(), classes=5, per_class=4, draws=3, seed=9)
    for rows, accuracy in zip(subsets, accuracies, strict=True):
        logits = solved_by_torch(columns[rows], labels[rows], test_columns, 5, FEW_LABELS_C)
        assert (accuracy.top1, accuracy.top5) == pytest.approx(shares_of_hits(logits, test_labels), abs=2.1 / 300)
    assert len({accuracy.top1 for accuracy in accuracies}) > 1


def test_errors_name_what_is_wrong():
    train, labels = mixture(40, 6, 4, seed=3)
    with pytest.raises(ValueError, match="class 0 has 10 train images, fewer than per_class 11"):
        few_labels(train, labels, train, labels, classes=4, per_class=11)
    with pytest.raises(ValueError, match="per_class 0 and draws 5 must both be at least 1"):
        few_labels(train, labels, train, labels, classes=4, per_class=0)
    with pytest.raises(ValueError, match="all 40 train labels are 0"):
        fit_logistic(train, torch.zeros_like(labels), train, labels, classes=4)
    with pytest.raises(ValueError, match="6 wide and test features 5"):
        fit_logistic(train, labels, train[:, :5], labels, classes=4)
    with pytest.raises(ValueError, match="test features hold NaN or infinity"):
        fit_logistic(train, labels, train * math.inf, labels, classes=4)


def test_c_is_the_one_that_does_best_on_rows_the_fit_does_not_see():
    labels = torch.arange(300) % 3
    signal = F.one_hot(labels, 3).float() + 0.7 * torch.randn(300, 3)
    wide = torch.cat([signal, torch.randn(300, 40)], dim=1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(300))
    held_out, fit = order[:60], order[60:]
    scores = {
        c: fit_logistic(wide[fit], labels[fit], wide[held_out], labels[held_out], classes=3, c=c).top1 for c in C_GRID
    }
    assert len(set(scores.values())) > 1  # otherwise any choice would pass
    assert scores[choose_c(wide, labels, classes=3)] == max(scores.values())


def test_a_narrow_representation_gets_a_weak_penalty():
    labels = torch.arange(600) % 10
    features = torch.linspace(-1, 1, 10)[labels][:, None] + 0.02 * torch.randn(600, 1)  # ten classes in a row
    assert choose_c(features, labels, classes=10) == C_GRID[-1]


@pytest.mark.parametrize("place", range(51))
def test_c_is_chosen_wherever_the_only_image_of_a_class_is(place: int):
    labels = torch.zeros(51, dtype=torch.long)
    labels[place] = 1
    assert choose_c(torch.randn(51, 3), labels, classes=2) in C_GRID


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0, 1]])
def test_the_default_c_is_taken_of_few_images_and_said(labels: list[int], caplog: pytest.LogCaptureFixture):
    features = torch.randn(len(labels), 3)
    found = choose_c(features, torch.tensor(labels), classes=2)
    assert found == DEFAULT_C or len(labels) == 5
    assert (f"on {len(labels)} images" in caplog.text) == ("default 0.1" in caplog.text) == bool(caplog.text)
    assert caplog.text or len(labels) == 5


def test_a_class_that_is_not_among_the_rows_to_choose_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mnclglf.evaluation.logistic.SELECTION_ROWS", 10)
    for place in (0, 50, 99):
        labels = torch.zeros(100, dtype=torch.long)
        labels[place] = 1
        assert choose_c(torch.randn(100, 3), labels, classes=2) in C_GRID
