"""docs/howto/add-a-data-set.md, followed word for word in a copy of the tree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tree_copy import TreeCopy, commands_of, copy_tree

PAGE = "docs/howto/add-a-data-set.md"
COMMANDS = commands_of((Path(__file__).resolve().parents[2] / PAGE).read_text())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> TreeCopy:
    copy = copy_tree(tmp_path_factory.mktemp("data_set") / "tree")
    written = copy.follow(PAGE)
    assert written == ["mnclglf/data/sources/shapes.py", "mnclglf/data/sources/__init__.py"]  # a file and a row
    arrays = {}
    rng = np.random.default_rng(0)
    for split, count in (("train", 96), ("test", 30)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    (copy.root / "files").mkdir()
    np.savez(copy.root / "files" / "shapes.npz", **arrays)
    return copy


def test_every_command_of_the_page_runs(followed: TreeCopy) -> None:
    assert len(COMMANDS) == 5
    for line in COMMANDS:
        followed.command(line)
    assert (followed.root / "run" / "report.html").is_file()


def test_help_and_errors_know_the_new_name(followed: TreeCopy) -> None:
    assert "shapes" in followed.mnclglf("train", "--help").stdout
    wrong = followed.python("-m", "mnclglf", "train", "--dataset", "shape", "--print-config", check=False)
    assert wrong.returncode == 2
    assert "dataset 'shape' is none of" in wrong.stderr
    missing = followed.python("-m", "mnclglf", "train", "--dataset", "shapes", "--data-dir", "nowhere", check=False)
    assert "shapes's files are missing" in missing.stderr
