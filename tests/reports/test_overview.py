"""Tests of the table of runs."""

import dataclasses
import fcntl
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mnclglf.cli import main
from mnclglf.config import RunConfig, to_dict
from mnclglf.recipes import paper, quick
from mnclglf.reports.overview import differing, find_runs, print_overview, read_runs, to_json
from mnclglf.runs.quality import FeatureQuality, save_qualities
from mnclglf.runs.results import Result, save_results

ROOT = Path(__file__).resolve().parents[2]
STEPS_PER_EPOCH = 15


def make_run(folder: Path, config: RunConfig, *, logged: int = 0, saved: int = 0, age: float = 0.0) -> Path:
    """Writes the files of a run that logged and saved after so many steps, `age` seconds ago."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    if logged:
        lines = [{"step": step, "epoch": step / STEPS_PER_EPOCH} for step in range(1, logged + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved:
        (folder / "checkpoints" / f"step-{saved:08d}.pt").touch()
    for path in (*folder.iterdir(), folder / "checkpoints"):
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def of(lr: float = 0.1, epochs: int = 40, **settings: Any) -> RunConfig:
    start = quick("byol", "digits")
    return dataclasses.replace(start, optim=dataclasses.replace(start.optim, lr=lr, epochs=epochs), **settings)


def shown(folder: Path, width: int | None = None) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=width is not None, width=width, color_system=None)
    print_overview(read_runs(folder), folder, console)
    return file.getvalue()


def test_each_state_is_named_newest_first(tmp_path: Path) -> None:
    make_run(tmp_path / "done", of(), logged=600, saved=600, age=50)
    make_run(tmp_path / "stopped", of(seed=1), logged=70, saved=60, age=40)
    make_run(tmp_path / "deep" / "in" / "failed", of(seed=2), logged=70, saved=60, age=30)
    (tmp_path / "deep" / "in" / "failed" / "nonfinite.json").write_text('{"step": 71}')
    make_run(tmp_path / "mended", of(seed=3), logged=600, saved=600, age=20)
    (tmp_path / "mended" / "nonfinite.json").write_text('{"step": 71}')
    make_run(tmp_path / "new", of(seed=4), age=10)
    running = make_run(tmp_path / "running", of(seed=5), logged=80, saved=75)
    with (running / "checkpoints" / ".training.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read_runs(tmp_path)
    assert [(run.folder.name, run.state) for run in found] == [
        ("running", "running, step 80 of 600"),
        ("new", "stopped at step 0"),
        ("mended", "finished, 600 steps"),
        ("failed", "failed at step 71: not finite"),
        ("stopped", "stopped at step 70 of 600"),
        ("done", "finished, 600 steps"),
    ]
    assert read_runs(tmp_path)[0].state == "stopped at step 80 of 600"  # the lock is free again


def test_figures_without_labels_are_shown_of_held_out_images(tmp_path: Path) -> None:
    make_run(tmp_path / "judged", of())
    make_run(tmp_path / "new", of(), age=1)
    for split, images, rank, more in (
        ("train", 9000, 1.0, {}),
        ("test", 2000, 31.25, {}),
        ("test", 50, 2.0, {}),
        ("test", 2000, 3.0, {"representation": "untrained"}),
        ("test", 2000, 4.0, {"epoch": 3.0}),
        ("test", 2000, 5.0, {"dataset": "digits"}),
    ):
        figures: dict[str, Any] = dict(alignment=0.5, uniformity=-3.0, effective_rank=rank, features=512, step=9)
        named = {"representation": "pretrained", "split": split, "images": images, **figures, **more}
        save_qualities(tmp_path / "judged" / "quality.json", [FeatureQuality(**named)])
    lines = shown(tmp_path).splitlines()
    assert lines[0] == "| run | state | alignment | uniformity | effective rank |"
    assert lines[2:] == [
        "| judged | stopped at step 0 | 0.500 | -3.000 | 31.2 of 512 |",
        "| new | stopped at step 0 |  |  |  |",
    ]
    assert [(made["quality"] or {}).get("effective_rank") for made in map(to_json, read_runs(tmp_path))] == [
        31.25,
        None,
    ]
    (tmp_path / "new" / "quality.json").write_text("{")
    assert "quality.json is damaged" in shown(tmp_path)


def test_settings_that_differ_are_shown_and_those_of_the_recipe_are_not(tmp_path: Path) -> None:
    make_run(tmp_path / "a", of(lr=0.3, seed=1))
    make_run(tmp_path / "b", of(), age=1)
    make_run(tmp_path / "c", paper("byol", "digits"), age=2)
    assert differing(read_runs(tmp_path)) == [
        ["recipe quick", "seed 1", "lr 0.3"],
        ["recipe quick", "seed 0", "lr 0.1"],
        ["recipe paper", "seed 0", "lr 0.1"],
    ]


def test_a_run_on_images_that_are_not_here_is_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "a", of(seed=1))
    for name, dataset in {"b": "object:Mine", "c": "no_such_module:Mine"}.items():
        run = make_run(tmp_path / name, of(), age=1)
        config = json.loads((run / "config.json").read_text()) | {"dataset": dataset}
        (run / "config.json").write_text(json.dumps(config))
    table = shown(tmp_path)
    assert "object:Mine" in table
    assert "no_such_module:Mine" in table


def test_accuracies_are_those_of_the_defaults(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", of())
    common: dict[str, Any] = dict(representation="pretrained", top5=1.0)
    save_results(
        run / "evaluation.json",
        [
            Result(protocol="knn", top1=0.926, settings={"k": 20, "temperature": 0.07}, **common),
            Result(protocol="knn", top1=0.5, settings={"k": 5}, **common),
            Result(protocol="linear", top1=0.25, epoch=3.0, **common),
            Result(protocol="logistic", top1=0.75, label_share=0.1, **common),
            Result(protocol="logistic", top1=0.967, **common),
            Result(protocol="logistic", top1=0.1, representation="untrained", top5=1.0),
        ],
    )
    assert read_runs(tmp_path)[0].top1 == {"knn": 0.926, "logistic": 0.967}
    assert shown(tmp_path).splitlines() == [
        "| run | state | k-NN | logistic |",
        "| --- | --- | --- | --- |",
        "| a | stopped at step 0 | 92.6 | 96.7 |",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"method": "byol"}'),
        ("config.json", "\udcff"),
        ("metrics.jsonl", "no record\n\x00"),
        ("metrics.jsonl", '{"step": 3, "epoch": 1e-320}\n'),
        ("metrics.jsonl", '{"step": 3, "epoch": "x"}\n'),
        ("evaluation.json", '{"version": 9, "results": []}'),
        ("evaluation.json", "[" * 100_000),
        ("nonfinite.json", "["),
    ],
)
def test_a_broken_run_stops_no_table(name: str, text: str, tmp_path: Path) -> None:
    make_run(tmp_path / "whole", of(seed=1), logged=600, saved=600, age=9)
    broken = make_run(tmp_path / "broken [b]", of(), saved=5)
    (broken / name).write_bytes(text.encode(errors="surrogateescape"))
    found = {run.folder.name: run for run in read_runs(tmp_path)}
    assert found["whole"].state == "finished, 600 steps"
    assert found["broken [b]"].state == ("unreadable" if name == "config.json" else "stopped at step 5")
    if name in ("config.json", "evaluation.json"):
        assert name in found["broken [b]"].problems[0]
        assert name in shown(tmp_path, 80)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_narrow_terminal_shows_every_run(width: int, tmp_path: Path) -> None:
    for number in range(12):
        make_run(tmp_path / f"r{number}", of(seed=number, lr=0.1 + number / 100))
    lines = shown(tmp_path, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(line.strip().startswith(f"r{number}") for line in lines) for number in range(12))


def test_odd_names_links_and_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a|b", "[red]x", ":smile:", "é", os.fsdecode(b"caf\xe9"), " "]
    for name in names:
        make_run(tmp_path / name, of())
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a|b" / "wandb" / "files").mkdir(parents=True)
    (tmp_path / "a|b" / "wandb" / "files" / "config.json").touch()
    assert sorted(run.name for run in find_runs(tmp_path)) == sorted(names)
    text = shown(tmp_path)
    assert "a\\|b" in text
    assert all(part in text for part in ("[red]x", ":smile:", "caf\\udce9"))
    assert main(["runs", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {Path(run["run"]).name for run in printed} == set(names)
    assert printed[0]["config"]["optim"]["lr"] == 0.1


def test_no_runs_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run below" in capsys.readouterr().out
    for path in (tmp_path / "missing", Path(__file__)):
        assert main(["runs", str(path)]) == 2
        assert f"no folder {path}" in capsys.readouterr().err.replace("\n", "")


def test_it_needs_no_torch(tmp_path: Path) -> None:
    make_run(tmp_path / "a", of())
    code = "import sys; from mnclglf.cli import main; main(['runs', sys.argv[1]]); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, capture_output=True)
