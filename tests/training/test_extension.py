"""train --extend: a finished run goes on to more epochs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from training.test_loop import (  # noqa: F401
    CONFIG,
    PER_EPOCH,
    assert_identical,
    figures,
    final_state,
    own_cache,
    printed,
    silent,
)

from mnclglf.config import KnnConfig, OptimConfig, RunConfig, UsageError, from_dict, to_dict
from mnclglf.evaluation.run import evaluate_run
from mnclglf.runs.checkpoint import CheckpointError, load_state
from mnclglf.training.loop import Trainer
from mnclglf.training.step import TrainStep


def lasting(epochs: int) -> RunConfig:
    return replace(CONFIG, optim=replace(CONFIG.optim, epochs=epochs), engine=replace(CONFIG.engine, log_every=1))


def train(out: Path, epochs: int, *, extend: bool = False, stop_after: int | None = None) -> str:
    """Trains to the end, or breaks off after so many steps of this process; returns what was printed."""
    console = silent()
    run = Trainer(lasting(epochs), out, extend=extend, console=console)
    if stop_after is None:
        assert run.train() is None
        return printed(console)
    steps, whole = count(), TrainStep.__call__

    def broken(*arguments: Any, **rates: Any) -> Any:
        if next(steps) == stop_after:
            raise KeyboardInterrupt
        return whole(*arguments, **rates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", broken)
        with pytest.raises(KeyboardInterrupt):
            run.train()
    return printed(console)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extended") / "run"
    train(out, 1)
    text = train(out, 3, extend=True)
    assert "finished at 1 epochs; after step 4 its learning rate is that of a run of 3 epochs, 0.0" in text
    return out


def test_the_learning_rate_is_a_cosine_to_each_end(extended: Path) -> None:
    warm_up, peak = round(CONFIG.optim.warmup_epochs * PER_EPOCH), CONFIG.optim.lr

    def cosine(step: int, epochs: int) -> float:
        if step < warm_up:
            return peak * (step + 1) / warm_up
        return peak * (1 + math.cos(math.pi * (step - warm_up) / (epochs * PER_EPOCH - warm_up))) / 2

    expected = [cosine(step, 1 if step < PER_EPOCH else 3) for step in range(3 * PER_EPOCH)]
    assert [record["lr"] for record in figures(extended)] == pytest.approx(expected)
    assert expected[PER_EPOCH] > expected[PER_EPOCH - 1]  # it rises once


def test_the_run_says_what_it_is(extended: Path) -> None:
    config = json.loads((extended / "config.json").read_text())
    assert (config["optim"]["epochs"], config["optim"]["extended_from"]) == (3, [1])
    assert from_dict(config).optim.extended_from == (1,)
    assert load_state(extended)[1]["step"] == 3 * PER_EPOCH


@pytest.mark.parametrize("steps", [1, 5])  # before the first checkpoint of the longer run, and after it
def test_an_extension_that_is_broken_off_ends_bit_for_bit_as_one_that_is_not(
    extended: Path, steps: int, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(out, 1)
    train(out, 3, extend=True, stop_after=steps)
    load_state(out)  # config.json is that of the longer run, the checkpoint may be the shorter one's
    train(out, 3, extend=True)
    state, expected = final_state(out), final_state(extended)
    assert_identical({**state, "config": None}, {**expected, "config": None})
    assert json.loads(state["config"]) == json.loads(expected["config"])
    assert figures(out) == figures(extended)


def test_an_extended_run_resumes_without_the_option_and_is_extended_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, 1)
    train(out, 2, extend=True)
    assert "extended" in train(out, 2)
    train(out, 2, extend=True)  # the same command, at its end: nothing is left to do
    text = train(out, 3, extend=True)
    assert "finished at 1, 2 epochs" in text
    assert load_state(out)[0].optim.extended_from == (1, 2)


def test_milestones_of_the_shorter_run_are_evaluated(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = replace(lasting(1), engine=replace(CONFIG.engine, keep_every=1))
    Trainer(config, out, console=silent()).train()
    longer = replace(lasting(2), engine=replace(CONFIG.engine, keep_every=1))
    Trainer(longer, out, extend=True, console=silent()).train()
    found = evaluate_run(out, KnnConfig(milestones=True, neighbors=3, device="cpu"), silent())
    assert [result.epoch for result in found] == [1, 2]


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_cannot_be_extended_is_named(epochs: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"extend needs a finished run.*leave out --extend"):
        train(out, 2, extend=True)
    train(out, 2)
    with pytest.raises(UsageError, match=f"epochs {epochs} are not more than the 2 .*raise --epochs"):
        train(out, epochs, extend=True)
    with pytest.raises(CheckpointError, match=r"optim.epochs: 2 -> 5.*--extend"):
        train(out, 5)


def test_a_run_that_is_not_finished_is_not_extended(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, 2, stop_after=3)
    with pytest.raises(CheckpointError, match=r"step 2 of 8.*--epochs 2 without --extend"):
        train(out, 3, extend=True)
    train(out, 2)


def test_a_configuration_of_before_reads_as_it_was() -> None:
    values = to_dict(CONFIG)
    del values["optim"]["extended_from"], values["model"]["encoder"], values["model"]["init"]
    assert from_dict(values) == CONFIG
    assert from_dict(values).model.encoder == "resnet18"


@pytest.mark.parametrize("ends", [(3, 2), (0,), (200,), (300,)])
def test_ends_rise_to_the_last(ends: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="extended_from"):
        OptimConfig(epochs=200, extended_from=ends)
