"""--deterministic: what it sets, what it records and what it prints. Its GPU part has not run on a GPU."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

import mnclglf
from mnclglf.config import EngineConfig
from mnclglf.runs.files import read_config, read_object
from mnclglf.training import deterministic, start
from mnclglf.training.deterministic import cost_of, use_deterministic
from mnclglf.training.speedups import use_fast_math


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes back what use_deterministic sets for the process."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    benchmark = torch.backends.cudnn.benchmark
    yield
    use_deterministic(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.usefixtures("as_before")
def test_a_gpu_gets_deterministic_algorithms_only_if_asked(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    gpu = start.Machine(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(start, "choose_machine", lambda engine: gpu)
    start.start_machine(EngineConfig(deterministic=on))
    assert torch.are_deterministic_algorithms_enabled() is on
    assert torch.backends.cudnn.benchmark is not on
    assert inductor.deterministic is on
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if on else None)


@pytest.mark.usefixtures("as_before")
def test_the_user_s_workspace_of_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.usefixtures("as_before")
def test_what_has_no_deterministic_form_names_itself() -> None:
    use_deterministic()
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64), [2, 2])


def test_a_run_says_and_records_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    tiny: dict[str, Any] = dict(image_size=8, width=2, projector_width=16, predictor_width=8, batch_size=512)
    settings: dict[str, Any] = dict(method="simsiam", dataset="digits", recipe="quick", epochs=1, device="cpu")
    mnclglf.train(out=folder, deterministic=True, loggers=(), **settings, **tiny)
    assert "deterministic: no cost" in capsys.readouterr().out
    environment = read_object(folder / "environment.json")
    assert environment is not None
    assert environment["deterministic"] is True
    engine = read_config(folder).engine
    assert (engine.deterministic, engine.choices) == (True, "safe")


class Step:
    """A step on a device that says it is a GPU; counts its calls in each state of the switch."""

    def __init__(self) -> None:
        self.device, self.forward, self.calls = SimpleNamespace(type="cuda"), "compiled", list[tuple[bool, str]]()

    def forward_of(self, compile: str) -> str:
        return "eager" if compile == "off" else compile

    def __call__(self, *_: object, **__: object) -> None:
        self.calls.append((torch.are_deterministic_algorithms_enabled(), self.forward))


@pytest.mark.usefixtures("as_before")
def test_cost_is_timed_eagerly_both_ways_and_leaves_the_step_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    step, restored = Step(), list[object]()

    class Clock(deterministic.StepClock):
        def __init__(self, device: object, warm_up: int) -> None:
            super().__init__(torch.device("cpu"), warm_up)

        def take(self) -> tuple[float, list[float]]:
            return 0.0, [0.003 if torch.are_deterministic_algorithms_enabled() else 0.002]

    monkeypatch.setattr(deterministic, "StepClock", Clock)
    monkeypatch.setattr(deterministic, "saved_state", lambda step: "state")
    monkeypatch.setattr(deterministic, "restore_state", lambda step, state: restored.append(state))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    line = cost_of(step, None, {"lr": 0.1, "momentum": 0.9}, EngineConfig(deterministic=True))  # type: ignore[arg-type]
    assert "3.0 ms instead of 2.0 ms" in line
    assert step.calls == [(False, "eager")] * 13 + [(True, "eager")] * 13
    assert (step.forward, restored) == ("compiled", ["state"])
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


@pytest.mark.usefixtures("as_before")
def test_cudnn_times_nothing_under_it() -> None:
    use_fast_math(replace(EngineConfig(), deterministic=True), torch.float32)
    assert not torch.backends.cudnn.benchmark
