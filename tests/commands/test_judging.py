"""Tests of the commands that judge a run: their options, and what they refuse."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mnclglf.cli import main, parse
from mnclglf.commands.evaluation import Finetune, Knn
from mnclglf.commands.quality import Quality
from mnclglf.config import FinetuneConfig, KnnConfig, QualityConfig


def test_commands_know_their_settings() -> None:
    knn = parse(shlex.split("knn runs/x --dataset 'folder:my photos' --skip-corrupt"))
    assert knn == Knn(runs=(Path("runs/x"),), config=KnnConfig(dataset="folder:my photos", skip_corrupt=True))
    tuned = parse(shlex.split("finetune a b --label-share 0.01 --steps 9 --lr 0.4 --batch-size 32 --untrained"))
    settings = FinetuneConfig(label_share=0.01, steps=9, lr=0.4, batch_size=32, untrained=True)
    assert tuned == Finetune(runs=(Path("a"), Path("b")), config=settings)
    judged = parse(shlex.split("quality runs/x --dataset mnist5k --images 50 --queries 3 --neighbors 2"))
    assert judged == Quality(
        run=Path("runs/x"), config=QualityConfig(dataset="mnist5k", images=50, queries=3, neighbors=2)
    )


@pytest.mark.parametrize("command", ["knn", "linear", "logistic", "finetune", "quality"])
def test_an_unknown_data_set_is_refused_with_the_known_ones(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([command, "runs/x", "--dataset", "cifar"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert "dataset 'cifar' is none of mnist5k" in message
    assert "folder:PATH" in message


@pytest.mark.parametrize("command", ["finetune", "quality"])
def test_a_run_that_is_not_there_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "nowhere")]) == 1
    assert "nowhere/config.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("finetune", "no run directory is named"),
        ("finetune x --batch-size 1", "batch_size 1 must be at least 2"),
        ("finetune x --epochs 2 --steps 3", "leave out --epochs or --steps"),
        ("knn x --dataset digits --split validation", "leave out --split or --dataset"),
        ("train --dataset digits --knn-every 0", "knn_every 0 must be at least 1"),
    ],
)
def test_wrong_usage_is_named(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(shlex.split(arguments))
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert named in capsys.readouterr().err
