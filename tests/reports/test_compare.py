"""Tests of the page that compares runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mnclglf.cli import main
from mnclglf.reports.compare import differing_settings, results_side_by_side, short_names, write_comparison
from mnclglf.runs.quality import FeatureQuality, save_qualities


@pytest.fixture
def pair(make_named_run: Callable[..., Path]) -> list[Path]:
    """Writes two runs that differ in epochs and in their k-NN result."""
    folders = [make_named_run("a/run"), make_named_run("b/run", recipe="paper")]
    config = json.loads((folders[1] / "config.json").read_text())
    config["optim"]["lr"] = 0.5
    (folders[1] / "config.json").write_text(json.dumps(config))
    found = json.loads((folders[1] / "evaluation.json").read_text())
    found["results"][0]["top1"] = 0.5
    (folders[1] / "evaluation.json").write_text(json.dumps(found))
    return folders


def test_settings_that_differ_are_listed(pair: list[Path]) -> None:
    configs = [json.loads((folder / "config.json").read_text()) for folder in pair]
    assert differing_settings(configs) == [("recipe", ["quick", "paper"]), ("optim.lr", ["0.05", "0.5"])]
    assert differing_settings([{"a": 1}, {"b": None}]) == [("a", ["1", "not set"])]


def test_the_highest_result_of_a_row_is_marked(pair: list[Path]) -> None:
    results = [json.loads((folder / "evaluation.json").read_text())["results"] for folder in pair]
    rows = {title: cells for title, _, cells in results_side_by_side(results)}
    assert rows["k nearest neighbors"] == [("92.3", True), ("50.0", False)]
    assert rows["Logistic regression, all labels"] == [("98.3", True), ("98.3", True)]
    assert results_side_by_side([results[0], []])[0][2] == [("74.3", True), ("not run", False)]
    assert results_side_by_side([[], []]) == []


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert short_names([Path("/x/a"), Path("/y/b")]) == ["a", "b"]
    assert short_names([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]


def test_a_page_of_two_runs(pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "both [1].html"
    assert main(["report", *map(str, pair), "--out", str(page)]) == 0
    assert str(page) in capsys.readouterr().out.replace("\n", "")
    text = page.read_text()
    for words in ("a/run", "b/run", "optim.lr", "92.3", "loss m over the steps", "Finished: 468 of 468 steps"):
        assert words in text
    assert all((folder / "report.html").exists() for folder in pair)


def test_figures_without_labels_stand_side_by_side(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("x", "y", "z")]
    for run, rank in zip(runs, (31.25, 80.0, None), strict=True):
        run.mkdir()
        for name, of in (("pretrained", rank), ("untrained", 7.0)):
            if of is not None:
                found = FeatureQuality(
                    representation=name, split="test", images=2000, step=9, alignment=0.5, uniformity=-3.0,
                    effective_rank=of, features=512,
                )  # fmt: skip
                save_qualities(run / "quality.json", [found])
    text = write_comparison(runs, tmp_path / "all.html").read_text()
    row = '<tr><th scope="row">{}<small>2,000 test images</small></th><td>{}</td><td>{}</td><td>not run</td></tr>'
    assert row.format("Effective rank", "31.2 of 512", "80.0 of 512") in text
    assert row.format("Alignment", "0.500", "0.500") in text
    assert "7.0 of 512" not in text  # of the untrained encoder
    assert "None of them is evaluated yet" not in text


def test_what_cannot_be_compared_is_refused(pair: list[Path], tmp_path: Path, make_run: Callable[..., Path]) -> None:
    for folders, out, words in (
        (pair[:1], tmp_path / "x.html", "1 runs"),
        ([pair[0], pair[0]], tmp_path / "x.html", "twice"),
        (pair, tmp_path, "is a folder"),
    ):
        with pytest.raises(ValueError, match=words):
            write_comparison(folders, out)
    with pytest.raises(NotADirectoryError, match="missing"):
        write_comparison([pair[0], tmp_path / "missing"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(make_run()), "--out", "x.html"])
