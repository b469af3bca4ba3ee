"""Tests of each table's plan against the paper and against the other tables."""

import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mnclglf.cli import main, parse
from mnclglf.recipes import paper
from mnclglf.reproduce.plan import PaperResult, Reproduce, Row, ScaleName, Table, TableName, make_table, run_name
from mnclglf.reproduce.run import PROGRAM

# Typed from the paper a second time, line by line: CIFAR10, CIFAR100, TinyImageNet, top-1 and top-5 each.
TABLE3 = """
supervised 92.89 99.84 71.93 92.21 54.03 77.02
mocov2     84.03 99.53 50.49 80.28 26.01 51.92
simsiam    84.16 99.45 48.19 78.41 25.28 50.63
simclr     87.11 99.64 59.20 86.41 31.39 59.08
byol       85.58 99.58 57.12 84.83 32.76 59.55
nnclr      87.66 99.63 60.91 87.50 40.46 67.05
fast_moco  85.93 99.57 61.39 87.31 39.91 66.26
mnclglf    90.18 99.78 65.20 89.72 41.70 68.36
"""
TABLE4 = "2 89.33 4 89.50 6 90.18 8 89.26 10 89.27"
TABLE5 = """
nnclr         72.48 82.54 86.86 87.66
one_embedding 80.75 87.47 89.36 89.84
mnclglf       80.55 87.77 90.17 90.18
"""
TABLE6 = "1 89.54 99.73 2 90.18 99.78 3 89.79 99.73 4 89.61 99.72"
TABLES: tuple[TableName, ...] = ("table3", "table4", "table5", "table6")


def table(name: TableName, **options: Any) -> Table:
    return make_table(Reproduce(table=name, **options))


def paper_of(row: Row) -> PaperResult:
    """Returns the paper's result of a row that has one."""
    assert row.paper is not None
    return row.paper


def columns(text: str, width: int) -> list[list[str]]:
    """Returns the words of a text, `width` per line."""
    words = text.split()
    return [words[start : start + width] for start in range(0, len(words), width)]


def test_table3_has_the_papers_numbers_and_runs() -> None:
    rows = table("table3").rows
    expected = [
        (method, dataset, float(numbers[2 * place]), float(numbers[2 * place + 1]))
        for place, dataset in enumerate(("cifar10", "cifar100", "tinyimagenet"))
        for method, *numbers in columns(TABLE3, 7)
    ]
    assert [(row.configs[0].method, row.dataset, paper_of(row).top1, paper_of(row).top5) for row in rows] == expected
    assert all(row.epoch == 200 and row.paper_dataset == row.dataset for row in rows)


def test_table4_has_the_papers_numbers_and_runs() -> None:
    rows = table("table4").rows
    expected = [(float(value), float(top1), None) for value, top1 in columns(TABLE4, 2)]
    assert [(row.configs[0].objective.lambda_, paper_of(row).top1, paper_of(row).top5) for row in rows] == expected


def test_table5_has_the_papers_numbers_and_runs() -> None:
    rows = table("table5").rows
    expected = [
        ("nnclr" if name == "nnclr" else "mnclglf", name == "one_embedding", epoch, float(top1))
        for name, *numbers in columns(TABLE5, 5)
        for epoch, top1 in zip((50, 100, 150, 200), numbers, strict=True)
    ]
    assert [
        (row.configs[0].method, row.configs[0].objective.one_embedding, row.epoch, paper_of(row).top1) for row in rows
    ] == expected
    assert {tuple(run.asked) for run in table("table5").runs()} == {(50, 100, 150, 200)}


def test_table6_has_the_papers_numbers_and_runs() -> None:
    rows = table("table6").rows
    expected = [(int(k), float(top1), float(top5)) for k, top1, top5 in columns(TABLE6, 3)]
    assert [(row.configs[0].objective.k, paper_of(row).top1, paper_of(row).top5) for row in rows] == expected


def test_equal_runs_are_one_across_the_tables() -> None:
    for scale in ("paper", "small"):
        runs = [run for name in TABLES for run in table(name, scale=scale, seeds=2).runs()]
        pairs = {(run.name, repr(run.config)) for run in runs}
        assert len(pairs) == len({name for name, _ in pairs}) == len({config for _, config in pairs})
        shared = "mnclglf-cifar10-seed1" if scale == "paper" else "mnclglf-fashion_mnist-seed1"
        assert sum(run.name == shared for run in runs) == len(TABLES)


def test_names_say_what_a_run_is() -> None:
    assert [run.name for run in table("table6", seeds=2).runs()] == [
        f"mnclglf-cifar10-{variant}seed{seed}" for seed in (0, 1) for variant in ("k1-", "", "k3-", "k4-")
    ]
    assert [run.name for run in table("table4").runs()] == [
        f"mnclglf-cifar10-{variant}seed0" for variant in ("lambda2-", "lambda4-", "", "lambda8-", "lambda10-")
    ]
    assert [run.name for run in table("table5").runs()] == [
        "nnclr-cifar10-seed0", "mnclglf-cifar10-one-embedding-seed0", "mnclglf-cifar10-seed0"
    ]  # fmt: skip


def test_the_paper_scale_is_the_paper_recipe_with_milestones() -> None:
    for run in table("table3").runs():
        expected = paper(run.config.method, run.config.dataset)
        assert run.config.engine.keep_every == 50
        model = replace(run.config.model, classes=None)
        assert (run.config.optim, run.config.view, model) == (expected.optim, expected.view, expected.model)
        assert run.config.objective == expected.objective


def test_supervised_runs_know_their_classes_before_the_images_are_loaded() -> None:
    """Checks that the plan has the values that Trainer fills in: then a run directory's settings equal the plan's."""
    classes = {"cifar10": 10, "cifar100": 100, "tinyimagenet": 200, "fashion_mnist": 10}
    for scale in ("paper", "small"):
        for run in table("table3", scale=scale).runs():
            expected = classes[run.config.dataset] if run.config.method == "supervised" else None
            assert run.config.model.classes == expected


@pytest.mark.parametrize(("scale", "name"), [*product(("paper", "small"), TABLES)])
def test_every_epoch_that_is_asked_for_is_a_milestone(scale: ScaleName, name: TableName) -> None:
    for run in table(name, scale=scale).runs():
        keep_every = run.config.engine.keep_every
        assert keep_every is not None
        assert all(epoch > 0 and epoch % keep_every == 0 for epoch in run.asked)
        assert run.config.optim.epochs % keep_every == 0


def test_the_small_scale_shares_every_setting_among_the_methods() -> None:
    runs = table("table3", scale="small", seeds=2).runs()
    assert len(runs) == 16
    configs = [replace(run.config, model=replace(run.config.model, classes=None)) for run in runs]
    settings = {repr((c.data, c.view, c.model, c.objective, c.optim, c.engine)) for c in configs}
    assert len(settings) == 1
    config = runs[0].config
    assert (config.dataset, config.data.train_images, config.data.image_size) == ("fashion_mnist", 10_000, 16)


def test_the_untrained_encoder_is_evaluated_once_a_seed() -> None:
    for name in TABLES:
        asked = [run for run in table(name, scale="small", seeds=2).runs() if "untrained" in str(run.asked)]
        assert [run.name for run in asked] == ["mnclglf-fashion_mnist-seed0", "mnclglf-fashion_mnist-seed1"]
        assert "untrained" not in str([run.asked for run in table(name).runs()])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"table": "table4", "dataset": ("cifar100",)}, "dataset cifar100 was given, but table4 is of cifar10"),
        (
            {"table": "table5", "dataset": ("cifar10", "cifar100")},
            "dataset cifar100 was given, but table5 is of cifar10",
        ),
        ({"table": "table3", "scale": "small", "dataset": ("cifar10",)}, "scale small is of fashion_mnist"),
        ({"table": "table6", "seeds": 0}, "seeds 0 must be at least 1"),
        ({"table": "table6", "seeds": 10**6}, "seeds 1000000 must be .*at most 1000"),
    ],
)
def test_what_a_table_does_not_have_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_table(Reproduce(**options))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_takes_its_own_data_set_by_name_and_once(name: TableName) -> None:
    expected = [row for row in table(name).rows if row.dataset == "cifar10"]
    assert [*table(name, dataset=("cifar10",)).rows] == expected
    assert [*table(name, dataset=("cifar10", "cifar10")).rows] == expected


def test_an_unknown_run_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"'x'.*table6.*mnclglf-cifar10-k1-seed0, "):
        table("table6").run("x")


def test_the_lines_of_a_plan_make_each_run_by_itself(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = "reproduce table3 --dataset cifar100 cifar10 --seeds 2 --out a\\ b --data-dir images --download"
    assert main([*shlex.split(asked), "--plan"]) == 0
    whole = parse(shlex.split(asked))
    assert isinstance(whole, Reproduce)
    lines = capsys.readouterr().out.splitlines()
    names = []
    for line in lines:
        words = shlex.split(line)
        assert tuple(words[: len(PROGRAM)]) == PROGRAM
        request = parse(words[len(PROGRAM) :])
        assert isinstance(request, Reproduce)
        assert request.folder == tmp_path / "a b"
        assert (request.data_dir, request.download) == (tmp_path / "images", True)
        assert request.only is not None
        names.append(request.only)
        # Whatever folder the line runs in, it makes the run that the whole command would.
        monkeypatch.chdir("/")
        config = make_table(request).run(request.only).config
        monkeypatch.chdir(tmp_path)
        (twin,) = [run.config for run in make_table(whole).runs() if run.name == request.only]
        assert (config.method, config.dataset, config.seed, config.optim) == (
            twin.method, twin.dataset, twin.seed, twin.optim
        )  # fmt: skip
    assert names == [run.name for run in make_table(whole).runs()]
    assert len(set(names)) == 8 * 2 * 2
    assert not list(tmp_path.iterdir())  # a plan makes nothing


def test_a_data_dir_changes_no_name() -> None:
    (plain,) = {run_name(row.configs[0]) for row in table("table6").rows if row.label == "k = 2"}
    (moved,) = {run_name(row.configs[0]) for row in table("table6", data_dir=Path("/x")).rows if row.label == "k = 2"}
    assert plain == moved


def test_a_run_keeps_the_whole_path_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/of/somebody")
    for given, whole in (("images", tmp_path / "images"), ("~/images", Path("/home/of/somebody/images")), (None, None)):
        (config,) = {row.configs[0] for row in table("table6", data_dir=given and Path(given)).rows[:1]}
        assert config.data.data_dir == whole
