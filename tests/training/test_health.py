"""Tests of the health figures on batches with a known answer."""

import pytest
import torch

from mnclglf.training.health import effective_rank, feature_std, neighbor_agreement


def test_feature_std_is_one_for_even_directions_and_zero_for_one() -> None:
    assert feature_std(torch.randn(20_000, 64)) == pytest.approx(1.0, abs=0.01)  # 1/sqrt(20,000) = 0.7%
    assert feature_std(torch.ones(10, 64)) == pytest.approx(0.0, abs=1e-6)


def test_feature_std_ignores_the_norm() -> None:
    features = torch.randn(50, 8)
    assert feature_std(features * 1000) == pytest.approx(feature_std(features), rel=1e-5)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.eye(12)) == pytest.approx(12, rel=1e-5)
    assert effective_rank(torch.ones(12, 5)) == pytest.approx(1, rel=1e-3)
    assert effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))) == pytest.approx(2, rel=1e-5)


def test_effective_rank_of_unequal_values_by_hand() -> None:
    # shares 3/4 and 1/4: exp(-(0.75 ln 0.75 + 0.25 ln 0.25)) = 1.7548
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(1.7548, abs=1e-4)


def test_neighbor_agreement_leaves_random_rows_out() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    neighbors, indices = torch.tensor([1, 2, -1, 3]), torch.tensor([0, 1, 2, 2])
    assert neighbor_agreement(neighbors, indices, labels) == pytest.approx(2 / 3)
    assert neighbor_agreement(torch.full((4,), -1), indices, labels) is None
