"""Tests of evaluation.json: its schema, and files of earlier versions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mnclglf.runs.results import Protocol, Result, load_results, save_results


def result(protocol: Protocol = "knn", representation: str = "pretrained", top1: float = 0.5, **more: Any) -> Result:
    return Result(protocol=protocol, representation=representation, split="test", top1=top1, top5=1.0, **more)


def test_results_come_back_as_they_were_saved(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    assert load_results(path) == []
    results = [result(settings={"k": 20}), result("logistic_10_labels", deviation=0.01)]
    assert save_results(path, results) == results
    assert load_results(path) == results
    assert json.loads(path.read_text()) == {"version": 2, "results": [dataclasses.asdict(r) for r in results]}
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_saving_merges_by_protocol_representation_and_split(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    old = [result(top1=0.1), result("logistic"), result(representation="untrained")]
    save_results(path, old)
    new, held_out = result(top1=0.9), dataclasses.replace(result(top1=0.7), split="validation")
    assert save_results(path, [held_out, new]) == [new, *old[1:], held_out]
    assert load_results(path) == [new, *old[1:], held_out]


def test_shares_of_labels_and_milestones_do_not_replace_one_another(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    own: list[dict[str, Any]] = [{}, {"label_share": 0.1}, {"epoch": 50.0}, {"epoch": 100.0}]
    found = [result("linear", **more) for more in own]
    save_results(path, found[:2])
    assert save_results(path, found[2:]) == found
    better = dataclasses.replace(found[2], top1=0.9)
    assert save_results(path, [better]) == [*found[:2], better, found[3]]


@pytest.mark.parametrize(
    ("protocol", "usual", "other"),
    [
        ("knn", {"k": 20, "temperature": 0.07}, {"k": 5}),
        ("knn", {"k": 20, "temperature": 0.07}, {"temperature": 0.1}),
        ("linear", {"epochs": 90, "batch_size": 256, "lr": 0.8}, {"epochs": 6}),
        ("linear", {"epochs": 90, "batch_size": 256, "lr": 0.8}, {"lr": 0.4}),
        ("linear", {"batch_size": 256, "lr": 0.8}, {"steps": 5000}),
        ("linear", {"epochs": 90, "batch_size": 256, "lr": 0.8, "train_images": 320}, {"batch_size": 64}),
        ("linear", {"epochs": 90, "batch_size": 32, "lr": 0.8, "train_images": 32}, {"asked_batch_size": 64}),
    ],
)
def test_other_settings_do_not_replace_one_another(
    tmp_path: Path, protocol: Protocol, usual: dict[str, Any], other: dict[str, Any]
):
    path = tmp_path / "evaluation.json"
    first, second = result(protocol, settings=usual), result(protocol, settings={**usual, **other})
    save_results(path, [first])
    assert save_results(path, [second]) == [first, second]
    again = result(protocol, top1=0.9, settings={**usual, "step": 9, "C": 0.1, "precision": "bfloat16"})
    assert save_results(path, [again]) == [again, second]  # where and when it was computed is no setting
    former = result(protocol, top1=0.8)  # before the settings were saved they were the defaults
    assert save_results(path, [former])[0] == former


def test_a_chosen_penalty_is_a_finding_and_no_setting(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    first, second = (result("logistic", settings={"C": c, "solver": "logistic regression"}) for c in (0.1, 1.0))
    save_results(path, [first])
    assert save_results(path, [second]) == [second]


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
        save_results(path, [result("logistic", settings={"C": float("nan")})])
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_results(path, [result("logistic", settings={"path": path})])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[{",
        "7",
        '{"version": 2}',
        '{"version": 2, "results": 3}',
        '{"version": 2, "results": [{"protocol": 3}]}',
        '{"version": 2, "results": [{"protocol": "knn", "representation": "r", "top1": 0, "top5": 1,'
        ' "settings": {"k": [5]}}]}',
        '{"a": 1}',
        "[1]",
        '[{"protocol": "knn"}]',
        '["a"]',
        "\udcff",
    ],
)
def test_a_damaged_file_is_named_and_not_overwritten(tmp_path: Path, text: str):
    path = tmp_path / "evaluation.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged.*remove it"):
        save_results(path, [result()])
    assert path.read_bytes() == text.encode(errors="surrogateescape")


@pytest.mark.parametrize(("top1", "top5"), [(1.2, 1.3), (0.5, 0.4), (-0.1, 0.5), (float("nan"), 0.5)])
def test_what_is_no_accuracy_is_refused(top1: float, top5: float):
    with pytest.raises(ValueError, match=r"not rising fractions|not finite"):
        Result(protocol="knn", representation="pretrained", split="test", top1=top1, top5=top5)


def former(protocol: str, **more: object) -> dict:
    """Returns an entry of a file without a version."""
    shared = {"representation": "pretrained", "split": "test", "top1": 0.5, "top5": 1.0, "settings": {"step": 7}}
    return {"protocol": protocol, **shared, **more}


def test_a_file_of_before_is_read_under_todays_names_and_upgraded(tmp_path: Path):
    path = tmp_path / "evaluation-epoch50.json"
    old = ["knn", "linear", "linear_10_labels", "linear_lars"]
    path.write_text(json.dumps([former(name, top1=0.1 * i) for i, name in enumerate(old)]))
    found = load_results(path)
    assert [r.protocol for r in found] == ["knn", "logistic", "logistic_10_labels", "linear"]
    assert [r.top1 for r in found] == [0.1 * i for i in range(4)]
    new = result("linear", top1=0.9)
    assert save_results(path, [new]) == [*found[:3], new]  # the paper's is replaced, not logistic regression
    assert json.loads(path.read_text())["version"] == 2
    assert load_results(path) == [*found[:3], new]


def test_todays_names_are_not_renamed(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"version": 2, "results": [former("linear")]}))
    assert load_results(path)[0].protocol == "linear"


def test_a_later_version_is_refused(tmp_path: Path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"version": 3, "results": []}))
    with pytest.raises(ValueError, match=r"evaluation\.json has version 3.*install"):
        load_results(path)
