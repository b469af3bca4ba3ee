"""docs/howto/add-an-operator.md followed word for word in a copy of the tree: three files and a row are an operator."""

from __future__ import annotations

import shlex

import pytest
from tree_copy import TREE, TreeCopy, commands_of, copy_tree

PAGE = "docs/howto/add-an-operator.md"
COMMANDS = commands_of((TREE / PAGE).read_text())
KERNEL = "kernels/mnclglf_kernels/_triton/double.py"
FILES = [
    "kernels/mnclglf_kernels/ops/double.py",
    KERNEL,
    "kernels/mnclglf_kernels/operators.py",
    "tests/kernels/ops/test_double.py",
]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> TreeCopy:
    copy = copy_tree(tmp_path_factory.mktemp("operator") / "tree")
    assert copy.follow(PAGE) == FILES
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_runs(line: str, followed: TreeCopy) -> None:
    program, *arguments = shlex.split(line)
    if program == "python":
        assert "double_kernel" in followed.python(*arguments).stdout
    elif program == "basedpyright":
        assert "0 errors" in followed.types(*arguments).stdout
    else:
        assert " passed" in followed.command(line).stdout


# What the table's consumers make of the row: exports, Backends, traffic, self-check, torch.compile.
USES = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import mnclglf_kernels
from mnclglf_kernels import Backends, double, self_check
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import Sizes
small = Sizes(images=6, side=8, features=12, k=2, width=20, queue=40, source=9)
assert Backends.all("torch").double == "torch" and "double" in mnclglf_kernels.__all__
forward, backward = [x.traffic for x in OPERATORS["double"].launches(Example(sizes=small))]
assert forward.unique_bytes == backward.unique_bytes == 2 * 6 * 20 * 2  # read and written, in bf16
for dtype in (torch.float32, torch.bfloat16):
    print(self_check.failures(small, dtype, dtype, torch.device("cpu"), operators=("double", "divide")))
x = torch.randn(3)
print(torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x, backend="triton"), 2 * x))
"""


@pytest.mark.parametrize(("factor", "found"), [("2", "{}"), ("3", "{'double': 'the result is off by")])
def test_the_row_is_all_that_its_consumers_need(factor: str, found: str, followed: TreeCopy) -> None:
    """A wrong kernel must be found by the self-check."""
    path = followed.root / KERNEL
    right = path.read_text()
    path.write_text(right.replace("value * 2", f"value * {factor}"))
    *problems, compiled = followed.python("-c", USES).stdout.splitlines()
    path.write_text(right)
    assert len(problems) == 2
    assert all(problem.startswith(found) for problem in problems)
    assert compiled == str(factor == "2")
