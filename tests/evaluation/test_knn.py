"""Tests of weighted k-NN classification against loops, and of its rules for ties, labels and chunks."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mnclglf.evaluation import knn
from mnclglf.evaluation.accuracy import Accuracy, accuracy_of_scores
from mnclglf.evaluation.knn import nearest_columns, weighted_knn


def naive_knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int, temperature: float):
    """Returns (top-1, top-5) by loops over Python floats."""
    right = [0, 0]
    for row, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        similar = [(_cosine(row, other), -index) for index, other in enumerate(train.tolist())]
        votes: dict[int, float] = {}
        for similarity, index in sorted(similar, reverse=True)[:k]:
            voted = int(train_labels[-index])
            votes[voted] = votes.get(voted, 0.0) + math.exp(similarity / temperature)
        ranked = sorted(votes, key=lambda name: (-votes[name], name))
        right[0] += label in ranked[:1]
        right[1] += label in ranked[:5]
    return right[0] / len(test), right[1] / len(test)


def _cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms


def drawn(n: int, m: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    train_labels = torch.randint(classes, (n,), generator=generator)
    test_labels = torch.randint(classes, (m,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    train = centres[train_labels] + torch.randn(n, width, generator=generator)
    test = centres[test_labels] + torch.randn(m, width, generator=generator)
    return train, train_labels, test, test_labels


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 12),
    width=st.integers(2, 9),
    classes=st.integers(1, 12),
    share=st.floats(0, 1),
    temperature=st.sampled_from([0.07, 0.5, 5.0]),
    seed=st.integers(0, 99),
)
def test_agrees_with_loops(n: int, m: int, width: int, classes: int, share: float, temperature: float, seed: int):
    sets = drawn(n, m, width, classes, seed)
    k = 1 + round(share * (n - 1))
    accuracy = weighted_knn(*sets, classes=classes, k=k, temperature=temperature)
    assert (accuracy.top1, accuracy.top5) == pytest.approx(naive_knn(*sets, k, temperature), abs=1e-12)


def test_weights_decide_and_not_the_count_of_votes():
    train = torch.tensor([[1.0, 0.0], [0.5, 0.9], [0.5, -0.9]])
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    sharp = weighted_knn(train, labels, test, torch.tensor([0]), classes=2, k=3, temperature=0.07)
    flat = weighted_knn(train, labels, test, torch.tensor([0]), classes=2, k=3, temperature=100.0)
    assert (sharp.top1, flat.top1) == (1.0, 0.0)


def test_length_of_a_feature_does_not_matter():
    train, train_labels, test, test_labels = drawn(30, 20, 5, 4, seed=1)
    stretched = train * torch.rand(30, 1).add(0.1) * 100
    assert weighted_knn(train, train_labels, test, test_labels, classes=4, k=5) == weighted_knn(
        stretched, train_labels, test * 7, test_labels, classes=4, k=5
    )


@given(seed=st.integers(0, 999), permutation=st.permutations(range(7)))
def test_names_of_classes_do_not_matter(seed: int, permutation: list[int]):
    train, train_labels, test, test_labels = drawn(60, 30, 6, 7, seed)
    renamed = torch.tensor(permutation)
    assert weighted_knn(train, train_labels, test, test_labels, classes=7, k=9) == weighted_knn(
        train, renamed[train_labels], test, renamed[test_labels], classes=7, k=9
    )


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    sets = drawn(50, 33, 8, 5, seed=2)
    whole = weighted_knn(*sets, classes=5, k=7)
    for size in (1, 50, 200):
        monkeypatch.setattr(knn, "CHUNK_SIMILARITIES", size)
        assert weighted_knn(*sets, classes=5, k=7) == whole


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_of_equal_similarities_the_first_are_taken(rows: list[list[int]], k: int):
    similarities = torch.tensor(rows, dtype=torch.float32)
    expected = similarities.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(nearest_columns(similarities, k).sort(dim=1).values, expected.sort(dim=1).values)


def test_collapsed_features_vote_by_the_first_rows():
    train, test = torch.ones(9, 4), torch.ones(3, 4)
    labels = torch.tensor([2, 2, 1, 0, 0, 0, 0, 0, 0])
    accuracy = weighted_knn(train, labels, test, torch.tensor([2, 1, 0]), classes=3, k=3)
    assert accuracy == Accuracy(top1=1 / 3, top5=2 / 3)


def test_a_class_without_votes_is_no_top5_hit():
    train, labels = torch.eye(3), torch.tensor([0, 1, 2])
    assert weighted_knn(train, labels, torch.eye(3)[:1], torch.tensor([1]), classes=3, k=1) == Accuracy(0.0, 0.0)


@pytest.mark.parametrize("votes", [1, 60, 10**9])
def test_chunks_of_votes_do_not_change_them(votes: int, monkeypatch: pytest.MonkeyPatch):
    sets = drawn(30, 41, 5, 4, seed=1)
    whole = weighted_knn(*sets, classes=4, k=7)
    sizes: list[int] = []
    real = knn.F.one_hot

    def one_hot(labels: torch.Tensor, classes: int) -> torch.Tensor:
        sizes.append(labels.numel() * classes)
        return real(labels, classes)

    monkeypatch.setattr(knn, "CHUNK_VOTES", votes)
    monkeypatch.setattr(knn.F, "one_hot", one_hot)
    assert weighted_knn(*sets, classes=4, k=7) == whole
    assert max(sizes) <= max(votes, 7 * 4)  # one row at least


def test_a_vote_does_not_overflow_at_a_tiny_temperature():
    sets = drawn(20, 10, 4, 3, seed=3)
    nearest = weighted_knn(*sets, classes=3, k=1)
    assert weighted_knn(*sets, classes=3, k=5, temperature=1e-4).top1 == nearest.top1


def test_scores_count_ties_for_the_lower_class_and_minus_infinity_never():
    scores = torch.tensor([[1.0, 1.0, 0.0], [-math.inf, -math.inf, 0.0], [math.nan, 0.0, 0.0]])
    assert accuracy_of_scores(scores, torch.tensor([1, 0, 0])) == Accuracy(top1=0.0, top5=1 / 3)
    assert accuracy_of_scores(scores[:1], torch.tensor([0])).top1 == 1.0


def test_five_places_count_for_top5():
    scores = torch.arange(8.0).flip(0).expand(8, 8)  # class 0 first, class 7 last
    accuracy = accuracy_of_scores(scores, torch.arange(8))
    assert (accuracy.top1, accuracy.top5) == (1 / 8, 5 / 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 31}, "k 31 must lie in 1..30"),
        ({"k": 0}, "k 0 must lie in 1..30"),
        ({"temperature": 0.0}, "temperature 0.0 must be positive"),
        ({"test_features": torch.ones(20, 4)}, "train features are 5 wide and test features 4"),
        ({"train_features": torch.ones(0, 5), "train_labels": torch.ones(0, dtype=torch.long)}, "train features of"),
        ({"test_features": torch.ones(0, 5), "test_labels": torch.ones(0, dtype=torch.long)}, "test features of"),
        ({"test_labels": torch.zeros(19, dtype=torch.long)}, r"\(19,\) test labels do not fit 20 rows"),
        ({"train_features": torch.full((30, 5), math.nan)}, "train features hold NaN"),
        ({"classes": 2}, "labels run from 0 to 3, outside 0 to 1"),
    ],
)
def test_errors_name_what_is_wrong(change: dict, message: str):
    train, train_labels, test, test_labels = drawn(30, 20, 5, 4, seed=1)
    arguments = {
        "train_features": train, "train_labels": train_labels, "test_features": test, "test_labels": test_labels,
        "classes": 4, "k": 5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        weighted_knn(**arguments | change)
