"""Tests of the table of operators: every row has its files, and every file its row.

tests/docs/test_add_an_operator.py adds an operator and checks that its row is all that the consumers need.
"""

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
    files = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - {"__init__", "batch_norm_over_ranks"}
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
