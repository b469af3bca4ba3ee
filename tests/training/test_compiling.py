"""Tests of compiling: one unbroken graph, decided and reported once, with a fallback to eager."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from methods.test_fake_cuda import make as make_on_cuda
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from training.test_step import (
    FP64,
    assert_same_training,
    make_batch,
    make_method,
    trained,
)

from mnclglf.config import EngineConfig, OptimConfig
from mnclglf.training import start as compiling
from mnclglf.training.speedups import compiled, or_eager, share_casts
from mnclglf.training.start import (
    choose_compile,
    compiler_problem,
)
from mnclglf.training.step import TrainStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Records torch.compile's arguments; Dynamo and autograd's tracing run, code generation does not."""
    found: dict[str, object] = {}
    compiler = torch.compile

    def record(method: Callable[..., object], **how: object) -> object:
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
    ours, expected = (trained(EngineConfig(), dtype=torch.float64, compile=compile) for compile in ("on", "off"))
    assert_same_training(ours, expected, **FP64)


@pytest.mark.slow
def test_a_compiled_step_in_bf16_trains_to_the_bit_as_the_eager_one(asked: dict[str, object]) -> None:
    ours, expected = (trained(EngineConfig(), dtype=torch.bfloat16, compile=compile) for compile in ("on", "off"))
    assert_same_training(ours, expected, rtol=0, atol=0)


class FullPrecision(nn.Linear):
    """A forward whose product is in fp32 even under autocast, as the products of the losses are."""

    def forward(self, views: list[Tensor], labels: None = None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(views[0], self.weight).square().sum()


def test_a_compiled_backward_multiplies_in_the_dtypes_of_an_eager_one(asked: dict[str, object]) -> None:
    """Checks a fix: autograd's tracing would put the backward under the forward's autocast, with errors of 2^-9."""
    method: Any = FullPrecision(64, 32)  # all that `compiled` asks of a method is its forward
    views, gradients = [torch.randn(48, 64)], []
    forwards: list[Any] = [method, compiled(method, graphs=False)]
    for forward in forwards:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = forward(views)
        gradients += torch.autograd.grad(total, [method.weight])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[0].abs().max().item())  # fp32


class TwoNetworks(nn.Module):
    """One trained network and one that is not, each with a convolution and a linear layer, on two views."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.followed = (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8))
            for _ in range(2)
        )
        self.followed.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, views: Tensor, labels: None = None) -> Tensor:
        first, second = views.chunk(2)
        ahead = self.trained(first).float() - self.followed(second).float()
        back = self.trained(second).float() - self.followed(first).float()
        return ahead.square().mean() + back.square().mean()


def test_a_compiled_forward_casts_weights_by_one_copy_per_network_and_gradients_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend, compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep), torch.compile
    monkeypatch.setattr("torch.compile", lambda method, **how: compiler(method, fullgraph=True, backend=backend))
    torch._dynamo.reset()
    method: Any = TwoNetworks()
    eager, forward = share_casts(method, torch.bfloat16), compiled(share_casts(method, torch.bfloat16), graphs=False)
    results: list[list[Tensor]] = []
    views = torch.cat([torch.ones(2, 3, 8, 8, dtype=torch.bfloat16).cumsum(axis) for axis in (2, 3)])
    for call in (eager, forward):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: Any = call(views)
        results.append([loss, *torch.autograd.grad(loss, [*method.trained.parameters()])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert results[1][1].is_contiguous(memory_format=torch.channels_last)
    operations = [Counter(node.target for node in graph.graph.nodes) for graph in graphs]
    assert [counted[torch.ops.aten._foreach_copy.default] for counted in operations] == [2, 1]
    casts = [node for node in graphs[0].graph.nodes if node.target == torch.ops.aten._to_copy.default]
    assert not [node for node in casts if node.args[0].op == "placeholder"]


def test_a_compiled_step_has_the_casts_of_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_of: list[object] = []
    monkeypatch.setattr("mnclglf.training.step.share_casts", lambda method, dtype: dtype)
    monkeypatch.setattr("mnclglf.training.step.compiled", lambda forward, **how: compiled_of.append(forward))
    TrainStep(make_method(), OptimConfig(), EngineConfig(), torch.bfloat16, compile="on")
    assert compiled_of == [torch.bfloat16]


def test_combo_kernels_are_asked_for_on_a_gpu_only(asked: dict[str, object]) -> None:
    """The C++ code that Inductor writes for a CPU has none."""
    engine = EngineConfig(combo_kernels="on")
    TrainStep(make_method(), OptimConfig(), engine, torch.float32, compile="on")
    assert asked == {"fullgraph": True, "dynamic": False, "mode": None}
    for compile, graphs in (("on", False), ("graphs", True)):
        asked.clear()
        with FakeTensorMode(allow_non_fake_inputs=False):
            TrainStep(make_on_cuda("mnclglf", "torch"), OptimConfig(), engine, torch.float32, compile=compile)
        options = {"triton.cudagraphs": graphs, "combo_kernels": True}
        assert asked == {"fullgraph": True, "dynamic": False, "options": options}


@pytest.mark.slow
def test_a_compiled_forward_takes_a_fixed_input_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs copy an input that is not static, as the parameters are, into memory of their own."""
    static: list[set[torch.Size]] = []

    def note(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        metadata = TracingContext.get().fw_metadata
        assert metadata is not None
        static.append({inputs[place].shape for place in metadata.static_input_indices})
        return make_boxed_func(graph.forward)

    compiler = torch.compile
    backend = aot_autograd(fw_compiler=note)
    monkeypatch.setattr("torch.compile", lambda method, **_: compiler(method, fullgraph=True, backend=backend))
    shape = torch.Size((48, 3, 16, 16))
    for fixed in (False, True):
        torch._dynamo.reset()
        static.clear()
        step = TrainStep(make_method(), OptimConfig(), EngineConfig(), torch.float32, compile="graphs")
        if fixed:
            step.fix_input(shape)
        step.backward(make_batch())
        assert (shape in static[0]) == fixed
        assert torch.Size((4, 3, 3, 3)) in static[0]  # a weight


def test_graphs_are_asked_for_and_begin_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(
        "torch.compile", lambda method, **how: calls.append(how) or (lambda *inputs: calls.append(inputs))
    )
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: calls.append("begin"))
    forward: Any = compiled(make_method(), graphs=True)  # called with words for tensors
    forward(["views"], "labels")
    assert calls == [{"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}, "begin", (["views"], "labels")]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Returns choose_compile with a pretended compiler and GPU."""

    def choose(device: torch.device, *, problem: str | None = None, **engine: Any) -> str:
        monkeypatch.setattr(compiling, "compiler_problem", lambda device: problem)
        said: list[str] = []
        return choose_compile(EngineConfig(**engine), device, said.append) + "".join(f"; {text}" for text in said)

    return choose


def test_auto_compiles_on_a_gpu_and_would_replay_graphs(machine: Callable[..., str]) -> None:
    assert machine(CPU) == "off"
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
    assert "needs a C++ compiler (apt install g++)" in (compiler_problem(CPU) or "")
    assert "needs a C compiler (apt install gcc)" in (compiler_problem(CUDA) or "")
    for name in ("g++", "gcc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(headers))
    assert "there is no Python.h" in (compiler_problem(CPU) or "")
    (headers / "Python.h").write_text("")
    assert compiler_problem(CPU) is None
    monkeypatch.setattr(compiling, "HAS_TRITON", False)
    assert "triton is not installed" in (compiler_problem(CUDA) or "")


def failing(views: Sequence[int]) -> NoReturn:
    raise BackendCompilerFailed(compiling, ValueError("no such instruction"), None)


def total(views: Sequence[int]) -> Any:
    """Takes the place of a forward, with a number for its losses."""
    return sum(views)


def faulty(views: Sequence[int]) -> Any:
    return 1 / 0


def test_what_cannot_be_compiled_runs_eagerly_and_says_so() -> None:
    said: list[str] = []
    forward = or_eager(failing, total, said.append)
    assert [forward([1, 2]), forward([3, 4])] == [3, 7]
    assert len(said) == 1
    assert said[0].startswith("torch.compile failed: ")
    assert "no such instruction" in said[0]


def test_graphs_and_checkpointing_exclude_each_other() -> None:
    switches: list[dict[str, Any]] = [{"compile": "on"}, {"graphs": "on"}]
    for switch in switches:
        with pytest.raises(ValueError, match="leave --compile on and --graphs on out"):
            EngineConfig(activation_checkpointing=True, **switch)


def test_an_error_of_the_eager_forward_is_not_hidden() -> None:
    with pytest.raises(BackendCompilerFailed):
        or_eager(failing, failing, print)([1])
    with pytest.raises(ZeroDivisionError):
        or_eager(faulty, total, print)([1])


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["on", "graphs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compiled_step_trains_as_the_eager_one_on_the_gpu(how: str, dtype: torch.dtype) -> None:
    """Runs each step on its own batch; a skipped or split graph is an error.

    In fp64, where PyTorch replaces our kernels, the whole state is compared; in bf16, with them, the losses.
    """
    torch._dynamo.reset()
    with (
        inductor.patch({"triton.cudagraph_or_error": True, "graph_partition": False}),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        ours = trained(EngineConfig(), dtype=dtype, compile=how, steps=5, device=CUDA)
    expected = trained(EngineConfig(), dtype=dtype, steps=5, device=CUDA)
    if dtype == torch.float64:
        assert_same_training(ours, expected, **FP64)
    else:
        assert ours[0][::2] == pytest.approx(expected[0][::2], rel=0.05)  # 2^-8 per rounding, 20 layers, five steps
