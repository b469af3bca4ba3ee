"""Compiling: one graph that stays one, decided and said once, with a way back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from engine.test_step import make_batch, make_method, trained
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from mnclglf.config import EngineConfig, OptimConfig
from mnclglf.engine import compiling
from mnclglf.engine.compiling import (
    choose_compile,
    compiler_problem,
    graphs_proven,
    or_eager,
    proof_path,
    remember_proof,
)
from mnclglf.engine.step import TrainStep, compiled

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What torch.compile is asked for; Dynamo and autograd's tracing do their work, code generation is left out."""
    compiler, found = torch.compile, {}

    def record(method: object, **how: object) -> object:
        found.update(how)
        return compiler(method, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr("torch.compile", record)
    torch._dynamo.reset()
    return found


@pytest.mark.slow
def test_steps_compile_once_into_one_graph(asked: dict[str, object]) -> None:
    counters.clear()
    step = TrainStep(make_method(), OptimConfig(), EngineConfig(), torch.float32, compile="on")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(4):
            step(number, make_batch(first=16 * number), lr=0.1 / (number + 1), momentum=0.9 + 0.01 * number)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert asked == {"fullgraph": True, "dynamic": False, "mode": None}


@pytest.mark.slow
def test_a_compiled_step_trains_as_the_eager_one(asked: dict[str, object]) -> None:
    for first, second in zip(trained(EngineConfig(), compile="on"), trained(EngineConfig()), strict=True):
        # The same operations in fp32; two steps of batch norms of 16 images amplify 1e-7.
        torch.testing.assert_close(first, second, rtol=1e-4, atol=2e-5)


class FullPrecision(nn.Linear):
    """A forward whose product is in fp32 also under autocast, as those of the losses are."""

    def forward(self, views: list[Tensor], labels: None = None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(views[0], self.weight).square().sum()


def test_a_compiled_backward_multiplies_in_the_dtypes_of_an_eager_one(asked: dict[str, object]) -> None:
    """Autograd's tracing else puts the backward under the forward's autocast: fp32 products are off by 2^-9."""
    method, views = FullPrecision(64, 32), [torch.randn(48, 64)]
    gradients = []
    for forward in (method, compiled(method, graphs=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = forward(views)
        gradients += torch.autograd.grad(total, [method.weight])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[0].abs().max().item())  # fp32


def test_graphs_are_asked_for_and_begin_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(
        "torch.compile", lambda method, **how: calls.append(how) or (lambda *inputs: calls.append(inputs))
    )
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: calls.append("begin"))
    forward = compiled(make_method(), graphs=True)
    forward(["views"], "labels")
    assert calls == [{"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}, "begin", (["views"], "labels")]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """choose_compile with a compiler and a GPU that are not here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "NVIDIA GeForce RTX 3090")

    def choose(device: torch.device, *, problem: str | None = None, **engine: object) -> str:
        monkeypatch.setattr(compiling, "compiler_problem", lambda device: problem)
        said: list[str] = []
        return choose_compile(EngineConfig(**engine), device, said.append) + "".join(f"; {text}" for text in said)

    return choose


def test_auto_compiles_on_a_gpu_and_replays_graphs_once_they_are_proven(machine: Callable[..., str]) -> None:
    assert machine(CPU) == "off"
    assert machine(CUDA) == "on"
    remember_proof(CUDA)
    assert machine(CUDA) == "graphs"
    assert machine(CUDA, graphs="off") == "on"
    assert machine(CUDA, lookup="faiss") == "on"
    assert machine(CUDA, compile="off") == "off"
    assert machine(CUDA, activation_checkpointing=True) == "off"


def test_what_is_asked_for_is_done(machine: Callable[..., str]) -> None:
    assert machine(CPU, compile="on") == "on"
    assert machine(CUDA, graphs="on") == "graphs"


@pytest.mark.parametrize("engine", [{}, {"compile": "on", "graphs": "on"}], ids=str)
def test_without_a_compiler_the_step_is_eager_and_that_is_said(machine: Callable[..., str], engine: dict) -> None:
    assert machine(CUDA, problem="there is no gcc", **engine) == (
        "off; not compiling, the step stays eager: there is no gcc"
    )


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs a C++ compiler (apt install g++)" in compiler_problem(CPU)
    assert "needs a C compiler (apt install gcc)" in compiler_problem(CUDA)
    for name in ("g++", "gcc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(headers))
    assert "there is no Python.h" in compiler_problem(CPU)
    (headers / "Python.h").write_text("")
    assert compiler_problem(CPU) is None
    monkeypatch.setattr(compiling, "HAS_TRITON", False)
    assert "triton is not installed" in compiler_problem(CUDA)


def test_a_proof_holds_for_its_machine_and_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not graphs_proven(CPU)
    remember_proof(CPU)
    assert graphs_proven(CPU)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "another")
    assert not graphs_proven(CUDA)
    remember_proof(CUDA)
    assert graphs_proven(CPU)
    monkeypatch.setattr("torch.__version__", "99.0")
    assert not graphs_proven(CPU)
    proof_path().write_text("not whole")
    assert not graphs_proven(CPU)
    remember_proof(CPU)
    assert graphs_proven(CPU)


def failing(views: object) -> None:
    raise BackendCompilerFailed(compiling, ValueError("no such instruction"), None)


def test_what_cannot_be_compiled_runs_eagerly_and_says_so() -> None:
    said: list[str] = []
    forward = or_eager(failing, lambda views: sum(views), said.append)
    assert [forward([1, 2]), forward([3, 4])] == [3, 7]
    assert len(said) == 1
    assert said[0].startswith("torch.compile failed, the step stays eager: ")
    assert "no such instruction" in said[0]


def test_an_error_of_the_eager_forward_is_not_hidden() -> None:
    with pytest.raises(BackendCompilerFailed):
        or_eager(failing, failing, print)([1])
    with pytest.raises(ZeroDivisionError):
        or_eager(lambda views: 1 / 0, lambda views: 1, print)([1])


@pytest.mark.gpu
def test_graphs_capture_the_step_without_a_skip() -> None:
    method, batch = make_method(CUDA, dtype=torch.bfloat16), make_batch(CUDA, torch.bfloat16)
    eager = TrainStep(make_method(CUDA, dtype=torch.bfloat16), OptimConfig(), EngineConfig(), torch.bfloat16)
    step = TrainStep(method, OptimConfig(), EngineConfig(), torch.bfloat16, compile="graphs")
    with (
        torch._inductor.config.patch({"triton.cudagraph_or_error": True}),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for number in range(5):
            losses, _ = step(number, batch, lr=0.1, momentum=0.99)
            expected, _ = eager(number, batch, lr=0.1, momentum=0.99)
            # bf16: 2^-8 a rounding, through 20 layers and as many steps as were taken.
            torch.testing.assert_close(losses.total, expected.total, rtol=0.02 * (number + 1), atol=0)
    step.guard.raise_if_failed()
