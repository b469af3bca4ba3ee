"""Tests of the choice of each operator's backend, and of the messages about kernels that are not used."""

import dataclasses
import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from mnclglf.config import DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig, UsageError
from mnclglf.methods import METHODS
from mnclglf.training.ranks import Ranks
from mnclglf.training.start import (
    Machine,
    Start,
    choose_backends,
    choose_compile,
    describe_backends,
    keep_kernels_in_cache,
    start_training,
)
from mnclglf_kernels import Backends
from mnclglf_kernels._triton import launch

CPU = torch.device("cpu")
CONFIG = RunConfig(
    model=ModelConfig(width=4, projector_width=24, predictor_width=12),
    objective=ObjectiveConfig(queue_size=20),
    optim=OptimConfig(batch_size=6),
)


def choose(**engine: Any) -> tuple[Backends, str]:
    """Returns (backends, printed text) with the kernels interpreted on the CPU."""
    config = dataclasses.replace(CONFIG, engine=EngineConfig(**engine))
    said = io.StringIO()
    return choose_backends(config, 16, 16, Machine(CPU, torch.float32), Console(file=said)), said.getvalue()


@pytest.fixture
def wrong_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the lookup kernel: it finds the row after the nearest one."""

    right = launch.run

    def run(launches: list[launch.Launch], device: torch.device) -> None:
        right(launches, device)
        if "nearest" in launches[-1].arguments:
            launches[-1].arguments["nearest"].add_(1).remainder_(20)

    monkeypatch.setattr(launch, "run", run)


def test_the_cpu_runs_pytorch():
    for policy in ("auto", "off"):
        assert choose(kernels=policy) == (Backends.all("torch"), "")


def test_required_kernels_run_where_they_prove_right():
    assert choose(kernels="require") == (Backends.all("triton"), "")


@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_of_a_method_prove_themselves_and_no_others(method, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "mnclglf_kernels.self_check.failures", lambda *args, operators, **settings: asked.extend(operators) or {}
    )
    config = dataclasses.replace(CONFIG, method=method, engine=EngineConfig(kernels="require"))
    choose_backends(config, 16, 16, Machine(CPU, torch.float32), Console(file=io.StringIO()))
    assert asked == [*METHODS[method].operators, "batch_norm", "augment"]


def test_the_kernels_are_checked_on_the_part_of_a_rank(monkeypatch):
    asked = {}

    def failures(sizes, *_, **settings):
        asked.update(settings, images=sizes.images)
        return {}

    monkeypatch.setattr("mnclglf_kernels.self_check.failures", failures)
    config = dataclasses.replace(CONFIG, engine=EngineConfig(kernels="require"))
    machine, console = Machine(CPU, torch.float32), Console(file=io.StringIO())
    choose_backends(config, 16, 16, machine, console, ranks=Ranks(rank=1, count=3))
    assert (asked["images"], asked["rank"], asked["ranks"]) == (2, 1, 3)


def test_a_run_over_ranks_leaves_graphs_out_unless_they_are_asked_for(monkeypatch):
    monkeypatch.setattr("mnclglf.training.start.compiler_problem", lambda device: None)

    def chosen(graphs, ranks):
        return choose_compile(EngineConfig(compile="on", graphs=graphs), torch.device("cuda"), print, ranks)

    assert [chosen("auto", 1), chosen("auto", 2), chosen("on", 2)] == ["graphs", "on", "graphs"]


def test_required_kernels_that_cannot_run_stop_the_run(monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.INTERPRETED", False)
    with pytest.raises(RuntimeError, match="needs CUDA tensors"):
        choose(kernels="require")


def test_a_required_kernel_that_is_wrong_stops_the_run(wrong_lookup):
    with pytest.raises(RuntimeError, match=r"nearest_neighbor: .*--kernels auto"):
        choose(kernels="require")


def test_a_wrong_kernel_is_reported_and_pytorch_does_its_work(wrong_lookup, monkeypatch):
    # As on a GPU, where auto is triton.
    monkeypatch.setattr("mnclglf.training.start.resolve", lambda backend, *tensors, kind: "triton")
    backends, said = choose(kernels="auto")
    assert backends == Backends.all("triton")._replace(nearest_neighbor="torch")
    assert (
        "WARNING: the Triton kernel of nearest_neighbor fails its self-check on this machine (the score is off by"
        in said
    )
    assert describe_backends(backends) == "triton, nearest_neighbor torch"


def test_faiss_looks_up_beside_the_others():
    assert choose(lookup="faiss") == (Backends.all("torch")._replace(nearest_neighbor="faiss"), "")
    assert choose(lookup="faiss", kernels="require")[0] == Backends.all("triton")._replace(nearest_neighbor="faiss")


def test_faiss_that_is_not_there_stops_the_run(monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.HAS_FAISS", False)
    with pytest.raises(RuntimeError, match="faiss"):
        choose(lookup="faiss")


def test_backends_are_described_in_a_word_and_its_exceptions():
    assert describe_backends(Backends.all("torch")) == "torch"
    assert describe_backends(Backends.all("triton")._replace(divide="torch", nearest_neighbor="faiss")) == (
        "triton, divide torch, nearest_neighbor faiss"
    )


@pytest.mark.parametrize(("epochs", "steps", "told"), [(1, 2, "1 epoch of 2 steps"), (2, 1, "2 epochs of 1 step")])
def test_one_epoch_and_one_step_are_not_several(epochs: int, steps: int, told: str) -> None:
    start: Any = SimpleNamespace(
        config=RunConfig(optim=OptimConfig(epochs=epochs)),
        data=SimpleNamespace(train=[0], side=8),
        loader=SimpleNamespace(steps_per_epoch=steps, name="resident"),
        machine=Machine(CPU, torch.float32),
        method=SimpleNamespace(backends=Backends.all("torch")),
        compile="off",
    )
    assert f"{told}, device cpu" in Start.describe(start)


def test_without_a_home_triton_keeps_its_kernels_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_kernels_in_cache()
    assert "TRITON_HOME" not in os.environ
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_001)  # of no entry in passwd
    keep_kernels_in_cache()
    assert os.environ.pop("TRITON_HOME") == str(tmp_path / "cache" / "mnclglf")


@pytest.mark.parametrize(
    ("encoder", "side", "fault"),
    [
        ("vit_tiny_patch16_224", 16, "patches of side 8"),
        ("vit_tiny_patch16_224", 24, "views of side 24"),
        ("convnext_tiny", 32, "patches of side 16"),
    ],
)
def test_sides_that_an_encoder_cannot_take_are_named_before_any_forward(encoder: str, side: int, fault: str) -> None:
    config = RunConfig(
        method="mnclglf",
        dataset="digits",
        data=DataConfig(image_size=side),
        model=ModelConfig(encoder=f"timm:{encoder}"),
        engine=EngineConfig(device="cpu", precision="fp32"),
    )
    seen = rf"views of side {side} and patches of side {side // 2}"
    with pytest.raises(UsageError, match=rf"timm:{encoder} cannot take {fault}.*another --image-size.*{seen}"):
        start_training(config, Console(file=io.StringIO()))
