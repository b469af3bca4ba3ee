"""docs/howto/add-an-optimizer.md followed word for word in a copy of the tree: one function and one row."""

import json

import pytest
from tree_copy import TREE, TreeCopy, commands_of, copy_tree

PAGE = "docs/howto/add-an-optimizer.md"
TEXT = (TREE / PAGE).read_text()
SHORT = "--image-size 8 --train-images 320 --width 2 --projector-width 16 --epochs 2 --batch-size 64 --device cpu"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> TreeCopy:
    copy = copy_tree(tmp_path_factory.mktemp("optimizer") / "tree")
    assert copy.follow(PAGE) == ["mnclglf/training/adamw.py", "mnclglf/training/optim.py"]
    return copy


def commands(program: str) -> list[str]:
    return [line for line in commands_of(TEXT) if line.startswith(program)]


def test_the_row_is_two_lines(followed: TreeCopy) -> None:
    before, after = ((root / "mnclglf/training/optim.py").read_text().splitlines() for root in (TREE, followed.root))
    assert [line for line in after if line not in before] == [
        "from mnclglf.training.adamw import adamw",
        '    "adamw": adamw,',
    ]


@pytest.mark.slow
def test_it_trains_and_evaluates(followed: TreeCopy) -> None:
    train, knn = commands("mnclglf")
    followed.command(f"{train} {SHORT}")
    followed.command(knn)
    run = followed.root / "runs" / "adamw"
    assert json.loads((run / "config.json").read_text())["optim"]["optimizer"] == "adamw"
    assert "knn" in (run / "evaluation.json").read_text()


@pytest.mark.slow
def test_the_tests_of_every_optimizer_and_the_types_pass(followed: TreeCopy) -> None:
    (tests,) = commands("pytest")
    passed = followed.command(tests).stdout
    assert " failed" not in passed
    assert "passed" in passed
    (types,) = commands("basedpyright")
    assert "0 errors" in followed.command(types).stdout


@pytest.mark.slow
def test_an_optimizer_that_breaks_a_promise_fails_the_tests_of_the_table(followed: TreeCopy) -> None:
    path = followed.root / "mnclglf" / "training" / "adamw.py"
    right = path.read_text()
    path.write_text(right.replace("fused=True", "foreach=False, capturable=False"))
    with pytest.raises(AssertionError, match="adamw"):
        followed.pytest("tests/training/test_optim.py", "-k", "adamw")
    path.write_text(right)
