"""Tests of the protocols on several representations."""

import statistics

import pytest
import torch
from torch import Tensor

from mnclglf.evaluation.knn import weighted_knn
from mnclglf.evaluation.logistic import choose_c, few_labels, fit_logistic
from mnclglf.evaluation.protocols import SUBSET, evaluate_features
from mnclglf.runs.results import Protocol

TRAIN_LABELS, TEST_LABELS = torch.arange(120) % 4, torch.arange(40) % 4
PROTOCOLS: tuple[Protocol, ...] = ("knn", "logistic", "logistic_10_labels")


def representation(width: int, spread: float) -> tuple[Tensor, Tensor]:
    centres = torch.randn(4, width)
    train = centres[TRAIN_LABELS] + spread * torch.randn(120, width)
    return train, centres[TEST_LABELS] + spread * torch.randn(40, width)


def test_each_protocol_measures_each_representation():
    sets = {"pretrained": representation(8, 1.0), "raw pixels": representation(20, 3.0)}
    results = evaluate_features(
        sets, TRAIN_LABELS, TEST_LABELS, 4, PROTOCOLS, split="validation", neighbors=5, settings={"step": 7}
    )
    assert [(r.protocol, r.representation) for r in results] == [(p, name) for p in PROTOCOLS for name in sets]
    assert {r.split for r in results} == {"validation"}
    assert {r.settings["step"] for r in results} == {7}
    for name, found in zip(sets, zip(results[:2], results[2:4], results[4:], strict=True), strict=True):
        train, test = sets[name]
        arguments = (train, TRAIN_LABELS, test, TEST_LABELS)
        draws = few_labels(*arguments, classes=4)
        top1 = [draw.top1 for draw in draws]
        assert found[0].top1 == weighted_knn(*arguments, classes=4, k=5).top1
        chosen = choose_c(train, TRAIN_LABELS, classes=4)
        assert found[1].settings["C"] == chosen
        assert found[1].top1 == fit_logistic(*arguments, classes=4, c=chosen).top1
        assert found[2].top1 == pytest.approx(statistics.fmean(top1))
        assert found[2].deviation == pytest.approx(statistics.stdev(top1))
        assert found[2].settings["subset"] == SUBSET
        assert found[0].deviation is None
        assert found[1].deviation is None
    assert results[0].settings | {"k": 5, "train_images": 120, "test_images": 40, "classes": 4} == results[0].settings


def test_the_penalty_may_be_given():
    sets = {"pretrained": representation(8, 1.0)}
    (found,) = evaluate_features(sets, TRAIN_LABELS, TEST_LABELS, 4, ["logistic"], c=0.003)
    assert found.settings["C"] == 0.003
    assert (
        found.top1
        == fit_logistic(
            sets["pretrained"][0], TRAIN_LABELS, sets["pretrained"][1], TEST_LABELS, classes=4, c=0.003
        ).top1
    )


def test_a_note_reaches_the_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mnclglf.evaluation.logistic.MAX_ITERATIONS", 2)
    sets = {"pretrained": representation(8, 1.0)}
    (found,) = evaluate_features(sets, TRAIN_LABELS, TEST_LABELS, 4, ["logistic_10_labels"])
    assert found.settings["note"] == "not converged after 2 iterations"


def test_errors_name_protocol_and_representation():
    sets = {"pretrained": representation(8, 1.0)}
    with pytest.raises(ValueError, match=r"knn of pretrained: k 500 must lie in 1\.\.120"):
        evaluate_features(sets, TRAIN_LABELS, TEST_LABELS, 4, ["knn"], neighbors=500)
    with pytest.raises(ValueError, match=r"'nearest'.*knn, logistic, logistic_10_labels"):
        evaluate_features(sets, TRAIN_LABELS, TEST_LABELS, 4, ["nearest"])  # pyright: ignore[reportArgumentType]  # a wrong name
