"""Tests of the choice of a backend, of tensors on two devices, and of the modules that an import loads."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from table import arguments_of, outcomes, tensors_in
from torch import Tensor
from torch.utils._pytree import tree_map_only

import mnclglf_kernels
from mnclglf_kernels import backend, enqueue, nearest_neighbor
from mnclglf_kernels.operators import OPERATORS

WITHOUT_FAISS = [name for name, row in OPERATORS.items() if row.kind != "lookup"]
WITHOUT_CUDNN = [name for name, row in OPERATORS.items() if row.kind != "convolution"]


def call(name: str, backend: str) -> None:
    OPERATORS[name].function(**arguments_of(name), backend=backend)


@pytest.mark.parametrize("name", OPERATORS)
def test_auto_is_the_default(name):
    arguments = arguments_of(name)
    default = outcomes(OPERATORS[name].function, arguments)
    auto = outcomes(OPERATORS[name].function, arguments, backend="auto")
    for given, expected in zip(tensors_in(default), tensors_in(auto), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_triton_on_the_cpu_says_why_not(name, monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"(?i)triton.*(cpu|cuda)"):
        call(name, "triton")


@pytest.mark.parametrize("name", OPERATORS)
def test_a_backend_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="nonsense"):
        call(name, "nonsense")


@pytest.mark.parametrize("function", [f for row in OPERATORS.values() for f in (row.function, *row.exports)])
def test_backend_is_a_keyword(function):
    assert inspect.signature(function).parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", WITHOUT_FAISS)
def test_faiss_does_nothing_but_look_up(name):
    with pytest.raises(ValueError, match=r"'faiss'.*'auto'"):
        call(name, "faiss")


@pytest.mark.parametrize("name", WITHOUT_CUDNN)
def test_cudnn_does_nothing_but_convolve(name):
    with pytest.raises(ValueError, match=r"'cudnn'.*'auto'"):
        call(name, "cudnn")


def test_cudnn_s_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(backend, "HAS_CUDNN", False)
    with pytest.raises(RuntimeError, match=r"nvidia-cudnn-frontend.*mnclglf\[cudnn\]"):
        call("convolution", "cudnn")
    call("convolution", "auto")


def test_cudnn_names_a_device_and_a_dtype_that_it_has_no_convolution_for(monkeypatch):
    monkeypatch.setattr(backend, "HAS_CUDNN", True)
    with pytest.raises(RuntimeError, match=r"cudnn.*cpu.*'auto'"):
        call("convolution", "cudnn")
    cuda = torch.device("cuda")
    for dtype in (torch.float32, torch.float64):
        assert re.search(rf"{dtype}.*'torch'", str(backend.cudnn_problem(cuda, dtype)))
    for dtype in (torch.float16, torch.bfloat16):
        assert backend.cudnn_problem(cuda, dtype) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA" in str(backend.cudnn_problem(cuda, torch.float16))


def test_every_operator_gets_a_backend_that_it_has():
    cases: list[tuple[backend.Backend, str]] = [("faiss", "lookup"), ("cudnn", "convolution")]
    for name, kind in cases:
        chosen = mnclglf_kernels.Backends.all(name)._asdict()
        assert chosen == {op: name if row.kind == kind else "auto" for op, row in OPERATORS.items()}
    assert set(mnclglf_kernels.Backends.all("triton")) == {"triton"}


def test_faiss_that_does_not_load_is_named_with_what_it_lacks(monkeypatch):
    def gpus() -> int:
        raise ImportError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setattr(backend, "HAS_FAISS", True)
    monkeypatch.setattr(backend, "faiss_gpus", gpus)
    problem = backend.faiss_problem(torch.device("cuda"))
    assert re.search(r"libcublas\.so\.12.*nvidia-cublas-cu12", str(problem))


def test_faiss_that_is_not_installed_is_named_with_its_extras(monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.HAS_FAISS", False)
    with pytest.raises(RuntimeError, match=r"mnclglf\[faiss-gpu\].*mnclglf\[faiss-cpu\]"):
        call("nearest_neighbor", "faiss")
    call("nearest_neighbor", "auto")


@pytest.mark.parametrize("name", OPERATORS)
def test_triton_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setattr("mnclglf_kernels.backend.HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="package triton"):
        call(name, "triton")
    call(name, "auto")


def rows(count: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(count, 4, device=device)


@pytest.mark.parametrize("name", [name for name in OPERATORS if len(tensors_in(arguments_of(name))) > 1])
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_two_devices_are_named(name, backend):
    """Moves one tensor of a call at a time."""
    arguments = arguments_of(name)
    for moved in tensors_in(arguments):
        elsewhere = tree_map_only(Tensor, lambda x, moved=moved: x.to("meta") if x is moved else x, arguments)
        with pytest.raises(ValueError, match=r"cpu and on meta|meta and on cpu"):
            OPERATORS[name].function(**elsewhere, backend=backend)


def test_two_devices_are_named_without_queries_or_gate():
    with pytest.raises(ValueError, match=r"cpu and on meta|meta and on cpu"):
        nearest_neighbor(rows(0), rows(5, "meta"))
    with pytest.raises(ValueError, match=r"cpu and on meta|meta and on cpu"):
        enqueue(rows(5), torch.tensor(0), rows(3, "meta"))


@pytest.mark.parametrize("place", [0, 1])
def test_two_devices_are_named_by_faiss_too(place):
    devices = ["cpu", "cpu"]
    devices[place] = "meta"
    with pytest.raises(ValueError, match=r"cpu and on meta|meta and on cpu"):
        nearest_neighbor(rows(3, devices[0]), rows(5, devices[1]), backend="faiss")


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
