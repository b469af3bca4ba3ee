"""Tests of the estimated time: what it counts, what it rests on, and when it measures."""

import io
import json
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_reproduce import HandMade, tiny_table

from mnclglf.cli import main
from mnclglf.config import LinearConfig, RunConfig
from mnclglf.reproduce import estimate
from mnclglf.reproduce import run as execute
from mnclglf.reproduce.estimate import Cost, measure, measured_cost, recorded_cost, remaining
from mnclglf.reproduce.plan import Run
from mnclglf.reproduce.run import describe_work, load_images, make_run

ROOT = Path(__file__).resolve().parents[2]
LINEAR = {"linear": {"epochs": 50, "batch_size": 32, "lr": 0.8}}
pytestmark = pytest.mark.usefixtures("tiny_scale")


def described(missing: list[Run], runs: Path, wanted: int = 4) -> str:
    console = Console(file=io.StringIO(), width=300)
    describe_work(missing, wanted, runs, tiny_table("table6").scale, load_images(missing), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_start_steps_and_evaluations_are_counted() -> None:
    cost = Cost(start=100.0, step=2.0, evaluation=7.0)
    assert cost.seconds(steps=30, evaluations=2) == 100 + 60 + 14
    assert cost.seconds(steps=0, evaluations=3) == 21  # a run that is trained starts no training


def test_what_remains_of_a_run(hand_made: HandMade) -> None:
    table = tiny_table("table5")
    run = table.run("mnclglf-digits-seed0")
    assert remaining(run, hand_made.runs, table.scale, 96) == (12, 5)  # three quarters, the end, and untrained
    hand_made.train(run.config)
    hand_made.evaluate(run.config, 0.5)
    assert remaining(run, hand_made.runs, table.scale, 96) == (0, 4)
    (hand_made.runs / run.name / "checkpoints" / "step-00000012.pt").rename(
        hand_made.runs / run.name / "checkpoints" / "step-00000009.pt"
    )
    assert remaining(run, hand_made.runs, table.scale, 96)[0] == 3


@pytest.mark.parametrize("protocols", [{"logistic": {}, "knn": {"k": 5, "temperature": 0.1}}, LINEAR])
def test_steps_and_each_protocol_are_measured(protocols: dict[Any, Mapping[str, Any]]) -> None:
    config = tiny_table("table6").runs()[0].config
    parts = measure(config, protocols)
    assert all(math.isfinite(value) and value > 0 for value in parts.values())
    assert parts["taken"] > parts["step"]


def test_the_linear_evaluation_counts_all_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def train(_encoder: object, _loader: object, _labels: object, config: LinearConfig, **_: object) -> None:
        assert config.steps is not None
        now[0] += 3 * config.steps  # three seconds per step

    monkeypatch.setattr(estimate, "train_linear", train)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
    parts = measure(tiny_table("table6").runs()[0].config, LINEAR)
    assert parts["evaluation"] == pytest.approx(50 * 3 * 3)  # 50 epochs of 96 // 32 steps


def test_a_measurement_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    table = tiny_table("table6")
    cost = measured_cost(table.runs()[0].config, table.scale.protocols)
    assert isinstance(cost, Cost)
    assert cost.start > cost.step > 0  # the start imports torch


def test_what_a_failed_measurement_printed_last_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tiny_table("table6")
    for code, printed, why in (
        (1, "Traceback\nRuntimeError: too little memory\n", "too little memory"),
        (-9, "", "-9"),
    ):
        failed = subprocess.CompletedProcess([], code, "", printed)
        monkeypatch.setattr(estimate.subprocess, "run", lambda *_, failed=failed, **__: failed)
        assert why in str(measured_cost(table.runs()[0].config, table.scale.protocols))


def test_a_finished_run_records_its_cost(hand_made: HandMade) -> None:
    table = tiny_table("table6")
    run, other = table.runs()[:2]
    assert recorded_cost(hand_made.runs, run.config) is None
    hand_made.runs.mkdir(parents=True)
    assert make_run(run, hand_made.runs, table.scale, Console(file=io.StringIO())) == 0
    found = recorded_cost(hand_made.runs, other.config)  # of the same kind
    assert found is not None
    cost, count = found
    assert count == 1
    assert min(cost.step, cost.evaluation) > 0
    assert recorded_cost(hand_made.runs, replace(run.config, method="simsiam")) is None


def test_only_runs_of_this_machine_count(hand_made: HandMade) -> None:
    first, second, third, _ = tiny_table("table6").runs()
    here = estimate.machine_of(first.config)
    for run, step, machine in (
        (first, 2.0, here),
        (second, 4.0, here),
        (third, 99.0, here | {"torch_threads": 1 + here["torch_threads"]}),
    ):
        cost = asdict(Cost(start=1.0, step=step, evaluation=5.0)) | {"machine": machine}
        (hand_made.train(run.config) / "cost.json").write_text(json.dumps(cost))
    assert recorded_cost(hand_made.runs, third.config) == (Cost(start=1.0, step=3.0, evaluation=5.0), 2)


def test_each_kind_is_measured_once_and_the_sum_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def cost(config: RunConfig, _: object) -> Cost:
        measured.append(config.method)
        return Cost(start=600.0, step=100.0, evaluation=600.0)

    monkeypatch.setattr(execute, "measured_cost", cost)
    missing = tiny_table("table6").runs()
    text = described(missing, tmp_path)
    assert measured == ["mnclglf"]
    # k = 2 also has the untrained row: 600 + 12 * 100 + 600 s are 0.67 h, and 600 s more 0.83 h.
    assert [text.count(f"seed0: {hours} h") for hours in ("0.67", "0.83")] == [3, 1]
    assert "4 runs, 0 done, 4 to make: 2.83 h on this machine" in text
    assert "100 s per step, 0:10:00 of start-up, 0:10:00 per evaluation; 8 steps measured now" in text
    monkeypatch.setattr(execute, "recorded_cost", lambda *_: (Cost(start=0.0, step=1.0, evaluation=0.0), 3))
    assert "as in 3 finished runs of the folder" in described(missing, tmp_path)
    assert measured == ["mnclglf"]


def test_a_measurement_that_fails_leaves_the_time_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "measured_cost", lambda *_: "out of [memory]")
    run = tiny_table("table6").runs()[0]
    text = described([run], tmp_path)
    assert "out of [memory]" in text
    assert f"{run.name}: unknown" in text
    assert "4 runs, 3 done, 1 to make: how long they take is not known" in text


def test_a_plan_measures_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(execute, "describe_work", lambda *_: pytest.fail("a plan is printed at once"))
    assert main(["reproduce", "table6", "--scale", "small", "--out", str(tmp_path), "--plan"]) == 0
    assert capsys.readouterr().out.count("--only") == 4
