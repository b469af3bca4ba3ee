"""Tests of the choice of a backend, of tensors on two devices, and of the modules that an import loads."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mnclglf_kernels
from mnclglf_kernels import (
    augment,
    combine,
    contrastive_loss,
    contrastive_losses,
    divide,
    enqueue,
    nearest_neighbor,
    nt_xent,
    queue_contrastive_loss,
)
from mnclglf_kernels.operators import OPERATORS
from mnclglf_kernels.ops.augment import ViewFormat, view_parameters

VIEW = view_parameters(4, 4)
IMAGE = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
STORED = (IMAGE, torch.tensor([0]), VIEW, torch.zeros(3), torch.ones(3), ViewFormat(4))
CALLS: dict[str, Callable[..., Any]] = {
    "augment": lambda **how: augment(*STORED, **how),
    "divide": lambda **how: divide(torch.randn(1, 1, 2, 2), **how),
    "combine": lambda **how: combine(torch.randn(4, 3), 2, **how),
    "contrastive_loss": lambda **how: contrastive_loss(torch.randn(3, 4), torch.randn(3, 4), 1.0, **how),
    "contrastive_losses": lambda **how: contrastive_losses([(torch.randn(3, 4), torch.randn(3, 4))], 1.0, **how)[0],
    "nearest_neighbor": lambda **how: nearest_neighbor(torch.randn(3, 4), torch.randn(5, 4), **how),
    "enqueue": lambda **how: enqueue(torch.randn(5, 4), torch.tensor(0), torch.randn(3, 4), **how),
    "nt_xent": lambda **how: nt_xent(torch.randn(3, 4), torch.randn(3, 4), 1.0, **how),
    "queue_contrastive_loss": lambda **how: queue_contrastive_loss(
        torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4), 1.0, **how
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_auto_is_the_default(name, seed):
    default = CALLS[name]()
    torch.manual_seed(seed)
    auto = CALLS[name](backend="auto")
    if default is None:  # as enqueue returns
        assert auto is None
    else:
        assert torch.equal(default, auto)


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
        "augment": (*STORED, torch.float32, "torch"),
        "divide": (torch.randn(1, 1, 2, 2), "torch"),
        "combine": (torch.randn(4, 3), 2, "torch"),
        "contrastive_loss": (torch.randn(3, 4), torch.randn(3, 4), 1.0, "torch"),
        "contrastive_losses": ([(torch.randn(3, 4), torch.randn(3, 4))], 1.0, "torch"),
        "nearest_neighbor": (torch.randn(3, 4), torch.randn(5, 4), "torch"),
        "enqueue": (torch.randn(5, 4), torch.tensor(0), torch.randn(3, 4), None, "torch"),
        "nt_xent": (torch.randn(3, 4), torch.randn(3, 4), 1.0, "torch"),
        "queue_contrastive_loss": (torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4), 1.0, "torch"),
    }
    with pytest.raises(TypeError, match="positional"):
        getattr(mnclglf_kernels, name)(*arguments[name])


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"nearest_neighbor"}))
def test_faiss_does_nothing_but_look_up(name):
    with pytest.raises(ValueError, match=r"'faiss'.*'auto'"):
        CALLS[name](backend="faiss")


def test_faiss_that_is_not_installed_is_named_with_its_extras(monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.HAS_FAISS", False)
    with pytest.raises(RuntimeError, match=r"mnclglf\[faiss-gpu\].*mnclglf\[faiss-cpu\]"):
        CALLS["nearest_neighbor"](backend="faiss")
    CALLS["nearest_neighbor"](backend="auto")


@pytest.mark.parametrize("name", CALLS)
def test_triton_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="package triton"):
        CALLS[name](backend="triton")
    CALLS[name](backend="auto")


def rows(count: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(count, 4, device=device)


ACROSS_DEVICES = {
    "targets": lambda **how: contrastive_loss(rows(3, "meta"), rows(3), 1.0, **how),
    "predictions": lambda **how: contrastive_loss(rows(3), rows(3, "meta"), 1.0, **how),
    "second pair": lambda **how: contrastive_losses(
        [(rows(3), rows(3)), (rows(3, "meta"), rows(3, "meta"))], 1.0, **how
    ),
    "first view": lambda **how: nt_xent(rows(3, "meta"), rows(3), 1.0, **how),
    "second view": lambda **how: nt_xent(rows(3), rows(3, "meta"), 1.0, **how),
    "positives": lambda **how: queue_contrastive_loss(rows(3), rows(3, "meta"), rows(5), 1.0, **how),
    "negatives": lambda **how: queue_contrastive_loss(rows(3), rows(3), rows(5, "meta"), 1.0, **how),
    "queries": lambda **how: nearest_neighbor(rows(3, "meta"), rows(5), **how),
    "keys": lambda **how: nearest_neighbor(rows(3), rows(5, "meta"), **how),
    "no queries": lambda **how: nearest_neighbor(rows(0), rows(5, "meta"), **how),
    "queue": lambda **how: enqueue(rows(5, "meta"), torch.tensor(0), rows(3), **how),
    "pointer": lambda **how: enqueue(rows(5), torch.tensor(0, device="meta"), rows(3), **how),
    "rows": lambda **how: enqueue(rows(5), torch.tensor(0), rows(3, "meta"), **how),
    "should_update": lambda **how: enqueue(
        rows(5), torch.tensor(0), rows(3), should_update=torch.tensor(True, device="meta"), **how
    ),
}


@pytest.mark.parametrize("name", ACROSS_DEVICES)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_two_devices_are_named(name, backend):
    with pytest.raises(ValueError, match=r"cpu and on meta|meta and on cpu"):
        ACROSS_DEVICES[name](backend=backend)


@pytest.mark.parametrize("name", ["queries", "keys"])
def test_two_devices_are_named_by_faiss_too(name):
    with pytest.raises(ValueError, match=r"cpu and on meta|meta and on cpu"):
        ACROSS_DEVICES[name](backend="faiss")


def test_faiss_names_a_device_it_has_no_search_on():
    with pytest.raises(RuntimeError, match="meta"):
        nearest_neighbor(rows(3, "meta"), rows(5, "meta"), backend="faiss")


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


def test_the_operators_are_public():
    assert set(CALLS) <= set(mnclglf_kernels.__all__)
    assert set(OPERATORS) <= set(CALLS)
