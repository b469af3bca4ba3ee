"""Tests of the table of operators: a row is all that its consumers need, and every row has its files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mnclglf_kernels
from mnclglf_kernels import Backends, self_check
from mnclglf_kernels.operators import OPERATORS, Example, Operator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "mnclglf_kernels"

FORM = '''
from torch import Tensor
import torch
from mnclglf_kernels.backend import Backend, resolve


def double(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Returns 2 x."""
    return torch.ops.mnclglf.double(x) if resolve(backend, x) == "triton" else x + x
'''
KERNELS = """
import torch
import triton
import triton.language as tl
from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.launch import Launch, Traffic


@triton.jit
def double_kernel(x, y, N: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index, mask=index < N) * FACTOR, mask=index < N)


def double_traffic(grid, a):
    moved = 2 * a["x"].numel() * a["x"].itemsize
    return Traffic(0, moved, moved)


def launches(x, *, arch):
    return write(x, torch.empty_like(x))


def write(x, y):
    arguments = dict(x=x, y=y, N=x.numel(), BLOCK=64)
    return [Launch(double_kernel, double_traffic, (triton.cdiv(x.numel(), 64),), arguments)]


@torch.library.custom_op("mnclglf::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    launch.run(write(x, y), x.device)
    return y


double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, upstream: torch.ops.mnclglf.double(upstream))
"""
ROW = (
    "Operator(function=double, kind='elementwise', "
    "inputs=lambda example: dict(x=example.random(example.sizes.images, 7).requires_grad_())),"
)
USES = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import mnclglf_kernels
from mnclglf_kernels import Backends, double, operators, self_check
from mnclglf_kernels.aot import main
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import Sizes
small = Sizes(images=6, side=8, features=12, k=2, width=20, queue=40, source=9)
assert Backends.all("torch").double == "torch" and "double" in mnclglf_kernels.__all__
(moved,) = [x.traffic for x in OPERATORS["double"].launches(Example(sizes=small))]
print(moved.unique_bytes)
print(self_check.failures(small, torch.float32, torch.float32, torch.device("cpu"), operators=("double", "divide")))
x = torch.randn(3)
print(torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x, backend="triton"), 2 * x))
try:
    main(["--help"])
except SystemExit:
    pass
"""


def with_double(tree: Path, factor: str) -> None:
    """Copies the package and adds the operator `double`: three files; the fourth would be its test."""
    shutil.copytree(PACKAGE, tree / "mnclglf_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    package = tree / "mnclglf_kernels"
    (package / "ops" / "double.py").write_text(FORM)
    (package / "_triton" / "double.py").write_text(KERNELS.replace("FACTOR", factor))
    table = (package / "operators.py").read_text()
    table = table.replace("\n_ROWS = (", f"\n_ROWS = (\n    {ROW}")
    table = table.replace(
        "\nfrom mnclglf_kernels.sizes", "\nfrom mnclglf_kernels.ops.double import double\nfrom mnclglf_kernels.sizes"
    )
    (package / "operators.py").write_text(table)


@pytest.mark.parametrize(("factor", "found"), [("2", "{}"), ("3", "{'double': 'the result is off by")])
def test_an_operator_of_three_files_and_a_test_is_in_every_consumer(factor, found, tmp_path):
    with_double(tmp_path, factor)
    command = [sys.executable, "-c", USES]
    result = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    moved, problems, compiled, *usage = result.stdout.splitlines()
    assert int(moved) == 2 * 6 * 7 * 2
    assert problems.startswith(found)
    assert compiled == str(factor == "2")
    assert "double" in " ".join(usage)  # python -m mnclglf_kernels.aot --op double


def test_a_row_that_is_added_at_run_time_is_checked(monkeypatch):
    def double(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
        return x * (2 if backend == "torch" else 2.01)

    row = Operator(
        function=double, kind="elementwise", inputs=lambda example: dict(x=example.random(5).requires_grad_())
    )
    monkeypatch.setitem(OPERATORS, row.name, row)
    sizes = Example().sizes._replace(images=6, side=8, features=12, width=20, queue=40, source=9)
    found = self_check.failures(sizes, torch.float32, torch.float32, torch.device("cpu"))
    assert found.keys() == {"double"}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_row_has_its_files(name):
    for path in (PACKAGE / "ops", PACKAGE / "_triton"):
        assert (path / f"{name}.py").is_file()
    assert (ROOT / "tests" / "kernels" / "ops" / f"test_{name}.py").is_file()
    assert getattr(mnclglf_kernels, name) is OPERATORS[name].function
    assert name in Backends._fields


def test_every_file_has_its_row():
    files = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - {"__init__"}
    assert files == set(OPERATORS)
    shared = {"__init__", "launch", "products", "tiles"}
    assert {path.stem for path in (PACKAGE / "_triton").glob("*.py")} - shared == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_profiler_s_trace_names_the_operator(name):
    """Checks the kernels' names, except that nt_xent launches those of contrastive_losses."""
    carried = "contrastive_losses" if name == "nt_xent" else name
    for x in OPERATORS[name].launches(Example()):
        assert x.kernel.__name__.startswith(f"{carried}_")
        assert x.traffic.issued_bytes >= x.traffic.unique_bytes > 0


def test_no_module_has_the_name_of_one_in_the_standard_library():
    assert not {path.stem for path in PACKAGE.rglob("*.py")} & set(sys.stdlib_module_names)


def test_without_triton_everything_but_the_kernels_imports(tmp_path):
    program = (
        "import importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a); "
        "import sys, torch; import mnclglf_kernels as m; from mnclglf_kernels import self_check; "
        "assert 'mnclglf_kernels._triton' not in sys.modules; print(m.divide(torch.ones(1, 1, 2, 2)).shape[0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "4", result.stderr
