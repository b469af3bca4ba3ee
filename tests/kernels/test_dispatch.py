"""The choice of a backend, torch.compile, and what importing the operators brings along."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnclglf_kernels
from mnclglf_kernels import combine, contrastive_loss, divide, enqueue, nearest_neighbor

CALLS = {
    "divide": lambda **how: divide(torch.randn(1, 1, 2, 2), **how),
    "combine": lambda **how: combine(torch.randn(4, 3), 2, **how),
    "contrastive_loss": lambda **how: contrastive_loss(torch.randn(3, 4), torch.randn(3, 4), 1.0, **how),
    "nearest_neighbor": lambda **how: nearest_neighbor(torch.randn(3, 4), torch.randn(5, 4), **how),
    "enqueue": lambda **how: enqueue(torch.randn(5, 4), torch.tensor(0), torch.randn(3, 4), **how),
}


@pytest.mark.parametrize("name", CALLS)
def test_auto_is_the_default(name, seed):
    default = CALLS[name]()
    torch.manual_seed(seed)
    auto = CALLS[name](backend="auto")
    assert (default is None and auto is None) or torch.equal(default, auto)


@pytest.mark.parametrize("name", CALLS)
def test_triton_on_the_cpu_says_why_not(name, monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"(?i)triton.*(cpu|cuda)"):
        CALLS[name](backend="triton")


@pytest.mark.parametrize("name", CALLS)
def test_a_backend_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="nonsense"):
        CALLS[name](backend="nonsense")


@pytest.mark.parametrize("name", CALLS)
def test_backend_is_a_keyword(name):
    arguments = {
        "divide": (torch.randn(1, 1, 2, 2), "torch"),
        "combine": (torch.randn(4, 3), 2, "torch"),
        "contrastive_loss": (torch.randn(3, 4), torch.randn(3, 4), 1.0, "torch"),
        "nearest_neighbor": (torch.randn(3, 4), torch.randn(5, 4), "torch"),
        "enqueue": (torch.randn(5, 4), torch.tensor(0), torch.randn(3, 4), None, "torch"),
    }
    with pytest.raises(TypeError, match="positional"):
        getattr(mnclglf_kernels, name)(*arguments[name])


def forward(images, weight, queue, backend):
    """A step in miniature: every operator that belongs inside a compiled forward. Returns (loss, index)."""
    features = divide(images, backend=backend).flatten(1) @ weight
    targets = combine(features, 2, backend=backend)
    predictions = images.flatten(1)[:, : weight.shape[1]] * weight.sum()
    index = nearest_neighbor(predictions.detach(), queue, backend=backend)
    loss = contrastive_loss(targets, predictions, 0.5, backend=backend)
    return loss + contrastive_loss(queue[index], predictions, 0.5, backend=backend), index


def check_compiled(compiler: str, backend: str) -> None:
    """Loss, neighbors, gradient and queue of a compiled step against the same step run eagerly."""
    images, weight, queue = (
        torch.randn(5, 2, 4, 4),
        torch.randn(8, 6),
        torch.nn.functional.normalize(torch.randn(17, 6)),
    )
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        run = torch.compile(forward, fullgraph=True, backend=compiler) if compiled else forward
        write = torch.compile(enqueue, fullgraph=True, backend=compiler) if compiled else enqueue
        leaf, ring, pointer = weight.clone().requires_grad_(), queue.clone(), torch.tensor(15)
        loss, index = run(images, leaf, ring, backend)
        loss.backward()
        write(ring, pointer, images.flatten(1)[:, :6], backend=backend)
        write(ring, pointer, images.flatten(1)[:, 6:12], keep=torch.tensor(False), backend=backend)
        results.append((loss.detach(), index, leaf.grad, ring, pointer))
    for eager, compiled in zip(*results, strict=True):
        # A compiler may fuse and reorder fp32 sums of up to 60 terms.
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_the_operators_compile_into_one_graph(backend):
    check_compiled("aot_eager", backend)


@pytest.mark.slow
def test_the_operators_compile_with_inductor(backend):
    check_compiled("inductor", backend)


def test_the_operators_import_nothing_of_the_project(tmp_path):
    source_root = Path(mnclglf_kernels.__file__).parents[1]
    program = "import sys, mnclglf_kernels; print(*(m for m in sys.modules if m.partition('.')[0] == 'mnclglf'))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{source_root}:{source_root.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


def test_the_five_operators_are_public():
    assert set(CALLS) <= set(mnclglf_kernels.__all__)
