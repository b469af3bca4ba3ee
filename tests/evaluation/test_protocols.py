"""Protocols over representations, and the file that keeps what they found."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mnclglf.evaluation.knn import weighted_knn
from mnclglf.evaluation.logistic import choose_c, few_labels, fit_linear
from mnclglf.evaluation.protocols import evaluate
from mnclglf.evaluation.results import Protocol, Result, load_results, save_results

TRAIN_LABELS, TEST_LABELS = torch.arange(120) % 4, torch.arange(40) % 4
PROTOCOLS: tuple[Protocol, ...] = ("knn", "linear", "linear_10_labels")


def representation(width: int, spread: float) -> tuple[Tensor, Tensor]:
    centres = torch.randn(4, width)
    train = centres[TRAIN_LABELS] + spread * torch.randn(120, width)
    return train, centres[TEST_LABELS] + spread * torch.randn(40, width)


def result(protocol: Protocol = "knn", representation: str = "pretrained", top1: float = 0.5, **more: object) -> Result:
    return Result(protocol=protocol, representation=representation, split="test", top1=top1, top5=1.0, **more)


def test_each_protocol_measures_each_representation():
    sets = {"pretrained": representation(8, 1.0), "raw pixels": representation(20, 3.0)}
    results = evaluate(sets, TRAIN_LABELS, TEST_LABELS, 4, PROTOCOLS, split="validation", k=5, settings={"step": 7})
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
        assert found[1].top1 == fit_linear(*arguments, classes=4, c=chosen).top1
        assert found[2].top1 == pytest.approx(statistics.fmean(top1))
        assert found[2].deviation == pytest.approx(statistics.stdev(top1))
        assert found[0].deviation is None
        assert found[1].deviation is None
    assert results[0].settings | {"k": 5, "train_images": 120, "test_images": 40, "classes": 4} == results[0].settings


def test_the_penalty_may_be_given():
    sets = {"pretrained": representation(8, 1.0)}
    (found,) = evaluate(sets, TRAIN_LABELS, TEST_LABELS, 4, ["linear"], c=0.003)
    assert found.settings["C"] == 0.003
    assert (
        found.top1
        == fit_linear(sets["pretrained"][0], TRAIN_LABELS, sets["pretrained"][1], TEST_LABELS, classes=4, c=0.003).top1
    )


def test_a_note_reaches_the_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mnclglf.evaluation.logistic.MAX_ITERATIONS", 2)
    sets = {"pretrained": representation(8, 1.0)}
    (found,) = evaluate(sets, TRAIN_LABELS, TEST_LABELS, 4, ["linear_10_labels"])
    assert found.settings["note"] == "not converged after 2 iterations"


def test_errors_name_protocol_and_representation():
    sets = {"pretrained": representation(8, 1.0)}
    with pytest.raises(ValueError, match=r"knn of pretrained: k 500 must lie in 1\.\.120"):
        evaluate(sets, TRAIN_LABELS, TEST_LABELS, 4, ["knn"], k=500)
    with pytest.raises(ValueError, match="protocol 'nearest' is not one of knn, linear, linear_10_labels"):
        evaluate(sets, TRAIN_LABELS, TEST_LABELS, 4, ["nearest"])


def test_results_come_back_as_they_were_saved(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    assert load_results(path) == []
    results = [result(settings={"k": 20}), result("linear_10_labels", deviation=0.01)]
    assert save_results(path, results) == results
    assert load_results(path) == results
    assert json.loads(path.read_text()) == [dataclasses.asdict(r) for r in results]
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_saving_merges_by_protocol_representation_and_split(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    old = [result(top1=0.1), result("linear"), result(representation="untrained")]
    save_results(path, old)
    new, held_out = result(top1=0.9), dataclasses.replace(result(top1=0.7), split="validation")
    assert save_results(path, [held_out, new]) == [new, *old[1:], held_out]
    assert load_results(path) == [new, *old[1:], held_out]


def test_shares_of_labels_and_milestones_do_not_replace_one_another(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    found = [result("linear_lars", **own) for own in ({}, {"label_share": 0.1}, {"epoch": 50.0}, {"epoch": 100.0})]
    save_results(path, found[:2])
    assert save_results(path, found[2:]) == found
    better = dataclasses.replace(found[2], top1=0.9)
    assert save_results(path, [better]) == [*found[:2], better, found[3]]


def test_results_of_an_earlier_version_are_of_all_labels_and_the_newest_checkpoint(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    old = {"protocol": "knn", "representation": "pretrained", "split": "test", "top1": 0.5, "top5": 1.0}
    path.write_text(json.dumps([{**old, "deviation": None, "settings": {"step": 7}}]))
    (found,) = load_results(path)
    assert (found.label_share, found.epoch) == (1.0, None)
    assert save_results(path, [result(top1=0.7)]) == [result(top1=0.7)]


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    save_results(path, [result()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_results(path, [result("linear", settings={"C": float("nan")})])
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_results(path, [result("linear", settings={"path": path})])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize("text", ["", "[{", "7", '{"a": 1}', "[1]", '[{"protocol": "knn"}]', '["a"]', "\udcff"])
def test_a_damaged_file_is_named_and_not_overwritten(tmp_path: Path, text: str):
    path = tmp_path / "evaluation.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"evaluation\.json does not hold evaluation results"):
        save_results(path, [result()])
    assert path.read_bytes() == text.encode(errors="surrogateescape")


@pytest.mark.parametrize(("top1", "top5"), [(1.2, 1.3), (0.5, 0.4), (-0.1, 0.5), (float("nan"), 0.5)])
def test_what_is_no_accuracy_is_refused(top1: float, top5: float):
    with pytest.raises(ValueError, match="are not rising fractions"):
        Result(protocol="knn", representation="pretrained", split="test", top1=top1, top5=top5)
