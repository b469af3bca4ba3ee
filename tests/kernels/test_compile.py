"""Tests of each operator under torch.compile(fullgraph=True), forward and backward, against eager mode."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from table import arguments_of, outcomes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from mnclglf_kernels import Backend, batch_norm, contrastive_loss, enqueue, nearest_neighbor, nt_xent
from mnclglf_kernels._triton import launch
from mnclglf_kernels.operators import OPERATORS

COMPILERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
FP32: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # a compiler may fuse and reorder fp32 sums of up to 60 terms
# One unit in the last place of bf16 at 1.0 and at 0.5: a product may round differently.
BF16: dict[str, Any] = dict(rtol=2**-7, atol=2**-8)
# A sum at a half may become another whole level, up to 3 of 255 away after the jitter; stds are at least 0.5.
LEVELS: dict[str, Any] = dict(rtol=0, atol=2 * 3 / 255)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_filled() -> None:
    """Overrides the fixture of conftest.py: deterministic algorithms would change the code that Inductor generates."""


def every_operator(backend: str, **arguments: Any) -> dict[str, Any]:
    """Returns the result of each operator by name. It is one function because each graph costs Inductor seconds.

    What learns is scaled before, and results after, so that there is something that a compiler could fuse.
    """
    results: dict[str, Any] = {}
    for name, given in arguments.items():
        scaled = tree_map_only(Tensor, lambda x: x * 1.5 if x.requires_grad else x, given)
        result = OPERATORS[name].function(**scaled, backend=backend)
        results[name] = tree_map_only(Tensor, lambda x: x * 2, result)
    return results


@pytest.mark.parametrize(
    ("compiler", "autocast"),
    [
        ("aot_eager", False),
        pytest.param("inductor", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
    ids=["aot_eager", "inductor", "inductor under bf16 autocast"],
)
def test_forward_and_backward(compiler, autocast, backend):
    torch._dynamo.reset()
    arguments = {name: arguments_of(name) for name in OPERATORS}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = outcomes(every_operator, arguments, backend=backend)
        compiled = torch.compile(every_operator, fullgraph=True, backend=compiler)
        actual = outcomes(compiled, arguments, backend=backend)
    for kind, tensors in expected.items():
        for place, (ours, eager) in enumerate(zip(actual[kind], tensors, strict=True)):
            is_view = ours.dim() == 4 and kind == "results" and ours.shape == tensors[-1].shape
            tolerance = LEVELS if is_view else BF16 if autocast else FP32
            torch.testing.assert_close(ours, eager, **tolerance, msg=lambda text, at=(kind, place): f"{at}: {text}")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_loss_of_one_pair(compiler, backend):
    torch._dynamo.reset()
    pair = dict(targets=torch.randn(15, 7).requires_grad_(), predictions=torch.randn(5, 7).requires_grad_())
    how = dict(temperature=0.5, backend=backend)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend=compiler)
    for kind, tensors in outcomes(contrastive_loss, pair, **how).items():
        for ours, eager in zip(outcomes(compiled, pair, **how)[kind], tensors, strict=True):
            torch.testing.assert_close(ours, eager, **FP32)


def losses_of_a_rank(targets: Tensor, first: Tensor, second: Tensor, backend: Backend) -> Tensor:
    part: dict[str, Any] = dict(rank=1, ranks=3, backend=backend)
    return contrastive_loss(targets, 2 * first, 0.5, **part) - 3 * nt_xent(first, second, 0.5, **part)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_losses_of_one_of_several_ranks(compiler, backend):
    torch._dynamo.reset()
    names = ("targets", 10), ("first", 15), ("second", 15)
    given = {name: torch.randn(count, 7).requires_grad_() for name, count in names}
    compiled = torch.compile(losses_of_a_rank, fullgraph=True, backend=compiler)
    for kind, tensors in outcomes(losses_of_a_rank, given, backend=backend).items():
        for ours, eager in zip(outcomes(compiled, given, backend=backend)[kind], tensors, strict=True):
            torch.testing.assert_close(ours, eager, **FP32)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("keep", [None, True, False], ids=str)
def test_enqueue(keep, compiler, backend):
    torch._dynamo.reset()
    gate = None if keep is None else torch.tensor(keep)
    queue, rows = F.normalize(torch.randn(17, 6)), torch.randn(5, 6)
    results = []
    for write in (enqueue, torch.compile(enqueue, fullgraph=True, backend=compiler)):
        ring, pointer = queue.clone(), torch.tensor(15)
        for _ in range(2):
            write(ring, pointer, rows, should_update=gate, backend=backend)
        results.append((ring, pointer))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **FP32)


class Block(nn.Module):
    """A convolution and three batch norms: one used twice, one with a residual, one with neither that nor a ReLU."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        shortcut = None
        for norm, relu in zip(self.norms, (True, True, False), strict=True):
            assert isinstance(norm, nn.BatchNorm2d)
            given = x, norm.weight, norm.bias, norm.running_mean, norm.running_var
            how: dict[str, Any] = dict(views=2, residual=shortcut, relu=relu, backend=self.backend)
            x, shortcut = (
                batch_norm(*given, fork=True, **how) if shortcut is None else (batch_norm(*given, **how), None)
            )
        return x.float().exp().mean()


@pytest.mark.parametrize("compiler", ["eager", *COMPILERS])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_batch_norm_in_a_module(autocast, compiler, backend):
    """Trains three steps: losses, gradients and running statistics are those of eager mode."""
    torch._dynamo.reset()
    tolerance = BF16 if autocast else FP32
    module = Block(backend)
    twin = deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True, backend=compiler)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = module(x), compiled(x)
        torch.testing.assert_close(*losses, **tolerance)
        for loss, side in zip(losses, (module, twin), strict=True):
            side.zero_grad()
            loss.backward()
        for (name, ours), theirs in zip(twin.named_parameters(), module.parameters(), strict=True):
            # In bf16 a sum of some 100 terms, each rounded or, where Inductor fuses, not rounded, from three layers.
            limit: dict[str, Any] = dict(rtol=2**-5, atol=2**-5) if autocast else FP32
            torch.testing.assert_close(ours.grad, theirs.grad, **limit, msg=lambda text, at=name: f"{at}: {text}")
        for ours, theirs in zip(twin.buffers(), module.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, **tolerance)
        with torch.no_grad():
            for ours, theirs in zip(twin.parameters(), module.parameters(), strict=True):
                assert ours.grad is not None
                assert theirs.grad is not None
                ours -= 0.1 * ours.grad
                theirs -= 0.1 * theirs.grad
            torch.testing.assert_close(compiled(x), module(x), **tolerance)


@pytest.mark.slow
def test_inductor_gives_batch_norm_the_buffers_themselves(monkeypatch):
    """Checks their addresses: a copy would be written back after each call."""
    torch._dynamo.reset()
    run, written = launch.run, []

    def note(launches: list[launch.Launch], device: torch.device) -> None:
        found = [x.arguments[name] for x in launches for name in ("running_mean", "running_var") if name in x.arguments]
        written.extend(x.data_ptr() for x in found)
        run(launches, device)

    monkeypatch.setattr(launch, "run", note)
    module = Block("triton")
    torch.compile(module, fullgraph=True)(torch.randn(4, 3, 5, 5)).backward()
    buffers = [x.data_ptr() for name, x in module.named_buffers() if "running" in name]
    assert written == buffers


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("lookup", ["torch", "triton", "faiss"])
def test_lookup_of_every_backend(lookup, compiler, monkeypatch):
    torch._dynamo.reset()
    queue, queries = F.normalize(torch.randn(65, 7)), torch.randn(9, 7)
    compiled = torch.compile(nearest_neighbor, fullgraph=True, backend=compiler)
    expected = nearest_neighbor(queries, queue, backend="torch")
    assert torch.equal(compiled(queries, queue, backend=lookup), expected)
    if lookup == "torch":  # the path of a CPU without bf16 products
        torch._dynamo.reset()
        monkeypatch.setattr("mnclglf_kernels.ops.nearest_neighbor.CPU_MULTIPLIES_BF16", False)
        monkeypatch.setattr("mnclglf_kernels.ops.nearest_neighbor.CHUNK", 16)
        assert torch.equal(compiled(queries, queue, backend=lookup), expected)
