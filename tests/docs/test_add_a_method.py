"""docs/howto/add-a-method.md followed word for word in a copy of the tree: one file and one row are a method."""

import json

import pytest
from tree_copy import TREE, TreeCopy, commands_of, copy_tree, edits_of

PAGE = "docs/howto/add-a-method.md"
TEXT = (TREE / PAGE).read_text()
SHORT = "--image-size 8 --train-images 320 --width 2 --projector-width 16 --epochs 2 --batch-size 64 --device cpu"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> TreeCopy:
    copy = copy_tree(tmp_path_factory.mktemp("method") / "tree")
    assert copy.follow(PAGE) == ["mnclglf/methods/barlow_twins.py", "mnclglf/methods/__init__.py"]
    return copy


def commands(program: str) -> list[str]:
    return [line for line in commands_of(TEXT) if line.startswith(program)]


def test_the_row_is_two_lines(copy: TreeCopy) -> None:
    lines = [(root / "mnclglf" / "methods" / "__init__.py").read_text().splitlines() for root in (TREE, copy.root)]
    assert [line for line in lines[1] if line not in lines[0]] == [
        "from mnclglf.methods.barlow_twins import BarlowTwins",
        '    "barlow_twins": BarlowTwins,',
    ]
    assert len(lines[1]) == len(lines[0]) + 2


def test_help_lists_it_without_torch(copy: TreeCopy) -> None:
    run = "import sys; from mnclglf.cli import main\n"
    run += "try: main(['train', '--help'])\nfinally: print('torch' in sys.modules)"
    printed = copy.python("-c", run).stdout
    assert "barlow_twins" in printed
    assert printed.endswith("False\n")


@pytest.mark.slow
def test_it_trains_evaluates_and_reports(copy: TreeCopy) -> None:
    train, *rest = commands("mnclglf")
    copy.command(f"{train} {SHORT}")
    for line in rest:
        copy.command(line)
    run = copy.root / "runs" / "barlow-twins"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss_invariance" in record]
    assert trained
    for record in trained:
        expected = record["loss_invariance"] + 0.005 * record["loss_redundancy"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)  # a sum of two fp32 terms
    assert "knn" in (run / "evaluation.json").read_text()
    page = (run / "report.html").read_text()
    assert "barlow_twins" in page
    assert "self-supervised pre-training" in page


@pytest.mark.slow
def test_the_tests_of_every_method_and_the_types_pass(copy: TreeCopy) -> None:
    tests, *_ = commands("pytest")
    passed = copy.command(tests).stdout
    assert " passed" in passed
    (types,) = commands("basedpyright")
    copy.types(*types.split()[1:])


EQUATIONS = """
import numpy as np, torch
from mnclglf.config import ModelConfig, ObjectiveConfig
from mnclglf.methods import METHODS

torch.manual_seed(0)
width = 6
method = METHODS["barlow_twins"](ModelConfig(width=2, projector_width=width), ObjectiveConfig()).double().train()
views = torch.randn(10, 3, 8, 8, dtype=torch.float64)
losses = method(views)
z1, z2 = (method.projector(method.encoder(view)).detach().numpy() for view in views.chunk(2))
correlation = np.corrcoef(z1, z2, rowvar=False)[:width, width:]
invariance = sum((1 - correlation[i, i]) ** 2 for i in range(width))
redundancy = sum(correlation[i, j] ** 2 for i in range(width) for j in range(width) if i != j)
for ours, equation in [
    (losses.terms["loss_invariance"], invariance),
    (losses.terms["loss_redundancy"], redundancy),
    (losses.total, invariance + 0.005 * redundancy),
]:
    # The loss is summed in fp32: 36 terms below 4, of 2^-24 each.
    assert abs(ours.item() - equation) <= 1e-5 * equation, (ours.item(), equation)
"""


def test_its_loss_is_the_equations(copy: TreeCopy) -> None:
    copy.python("-c", EQUATIONS)


def test_its_recipe_is_one_of_the_table_s(copy: TreeCopy) -> None:
    row = TEXT.rpartition("```py\n")[2].partition("```")[0]
    assert row not in [edit.code for edit in edits_of(TEXT)]  # following the page does not need it
    config = copy.python(
        "-c",
        "import json, sys; from mnclglf import recipes; from mnclglf.config import to_dict\n"
        f"recipes.TUNED |= eval({'{' + row + '}'!r}, vars(recipes))\n"
        "print(json.dumps(to_dict(recipes.tuned('barlow_twins', 'cifar100'))))",
    )
    made = json.loads(config.stdout)
    assert (made["method"], made["dataset"], made["recipe"]) == ("barlow_twins", "cifar100", "tuned")
    assert (made["optim"]["batch_size"], made["optim"]["lr"]) == (512, 0.24)
