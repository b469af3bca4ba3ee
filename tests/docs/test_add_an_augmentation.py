"""docs/howto/add-an-augmentation.md, followed word for word in a copy of the tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from tree_copy import TreeCopy, commands_of, copy_tree

PAGE = "docs/howto/add-an-augmentation.md"
COMMANDS = commands_of((Path(__file__).resolve().parents[2] / PAGE).read_text())
FILES = {
    "mnclglf/config.py",
    "mnclglf/data/views.py",
    "mnclglf/data/loaders/reference.py",
    "mnclglf/data/loaders/dali.py",
    "kernels/mnclglf_kernels/ops/augment.py",
    "kernels/mnclglf_kernels/_triton/augment.py",
}
TESTS = {"tests/data/test_parity.py", "tests/kernels/ops/test_augment.py"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> TreeCopy:
    pytest.importorskip("nvidia.dali", reason="the extra dali-cuda13 is not installed")
    copy = copy_tree(tmp_path_factory.mktemp("augmentation") / "tree")
    assert set(copy.follow(PAGE)) == FILES | TESTS
    return copy


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_runs(line: str, followed: TreeCopy) -> None:
    result = followed.command(line)
    if "--print-config" in line:
        assert '"invert_probability": 0.3' in result.stdout


def test_the_new_operation_is_compared_in_every_loader_and_form(followed: TreeCopy) -> None:
    """A wrong operation in any one place must fail a test of the page."""
    path = followed.root / "kernels/mnclglf_kernels/_triton/augment.py"
    right = path.read_text()
    path.write_text(right.replace("    if invert > 0:", "    if invert < 0:"))
    with pytest.raises(AssertionError, match="test_what_follows_the_resize"):
        followed.pytest("tests/kernels/ops/test_augment.py", "-k", "invert")
    path.write_text(right)
