"""Tests that imports go one way: cli -> {training, evaluation, reports} -> methods -> models -> kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Parts of the program that each part may import, besides itself.
LEAVES = {"config", "runs"}
MODELS = {"config", "mnclglf_kernels"}
METHODS = MODELS | {"models"}
TRAINING = METHODS | LEAVES | {"methods", "data"}
MAY_IMPORT = {
    "mnclglf_kernels": set(),
    "config": set(),
    "recipes": {"config", "data"},
    "runs": {"config"},
    "data": LEAVES | {"mnclglf_kernels"},
    "models": MODELS,
    "methods": METHODS,
    "training": TRAINING,
    "evaluation": TRAINING | {"training", "recipes"},
    "reports": LEAVES | {"data", "recipes"},
    "api": TRAINING | {"training", "evaluation", "reports", "recipes"},
    "reproduce": TRAINING | {"training", "evaluation", "reports", "recipes"},
    "cli": TRAINING | {"training", "evaluation", "reports", "recipes", "reproduce"},
    "__main__": {"cli"},
    "__init__": {"api", "config", "runs"},
}
OURS = {"mnclglf", "mnclglf_kernels", "tests", "oracles"}


def part_of(module: str) -> str:
    """Returns a module's part: mnclglf.data.views -> data; mnclglf_kernels.queue -> mnclglf_kernels."""
    top, _, rest = module.partition(".")
    return (rest.partition(".")[0] or "__init__") if top == "mnclglf" else top


def imported_modules(source: str, package: str) -> set[str]:
    """Returns every module that the source imports, anywhere in it; a leading dot stands for `package`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], node.module or ""]).strip(".")
            module = base if node.level else node.module
            # `from mnclglf import data` imports a part; in `from mnclglf.data import x`, x changes nothing.
            found |= {f"mnclglf.{alias.name}" for alias in node.names} if module == "mnclglf" else {module}
    return found


def forbidden_imports(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Returns the imports of `source`, the text of `module`, that go against the direction."""
    part = part_of(module)
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    package = module if is_package else module.rpartition(".")[0]
    ours = {name for name in imported_modules(source, package) if name.partition(".")[0] in OURS}
    return sorted(name for name in ours if part_of(name) not in MAY_IMPORT[part] | {part})


def source_files() -> dict[str, Path]:
    """Returns the path of every module of ours, by its dotted name."""
    files = {}
    for base in (ROOT, ROOT / "kernels"):
        for path in sorted(base.glob("mnclglf*/**/*.py")):
            files[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    return files


@pytest.mark.parametrize("module", source_files())
def test_imports_go_one_way(module):
    path = source_files()[module]
    assert forbidden_imports(path.read_text(), module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("mnclglf.config", "from mnclglf.data import views", ["mnclglf.data"]),
        ("mnclglf.models.encoder", "from mnclglf.methods.mnclglf import MNCLGLF", ["mnclglf.methods.mnclglf"]),
        ("mnclglf.models.encoder", "from ..methods import mnclglf", ["mnclglf.methods"]),
        ("mnclglf.models.encoder", "from .. import methods", ["mnclglf.methods"]),
        ("mnclglf.reports.page", "def f():\n    import mnclglf.evaluation.knn", ["mnclglf.evaluation.knn"]),
        ("mnclglf.training.step", "from mnclglf import cli, config", ["mnclglf.cli"]),
        ("mnclglf.training.loop", "from mnclglf.evaluation import knn", ["mnclglf.evaluation"]),
        ("mnclglf.recipes", "from mnclglf.training import train", ["mnclglf.training"]),
        ("mnclglf.reproduce.run", "from mnclglf.cli import main", ["mnclglf.cli"]),
        ("mnclglf.reports.tables", "from mnclglf.reproduce import paper", ["mnclglf.reproduce"]),
        ("mnclglf_kernels.queue", "import mnclglf.config", ["mnclglf.config"]),
        ("mnclglf_kernels._triton.queue", "import oracles", ["oracles"]),
        ("mnclglf.methods.mnclglf", "from tests.oracles import loss", ["tests.oracles"]),
        ("mnclglf.methods.mnclglf", "from mnclglf_kernels import divide\nfrom mnclglf.models import heads\n", []),
        ("mnclglf.models.encoder", "from .heads import Head\nfrom . import heads\nimport torch, mnclglf_kernels", []),
        ("mnclglf.cli", "from mnclglf import recipes\nfrom mnclglf.training.loop import train", []),
    ],
)
def test_the_checker_itself(module, source, forbidden):
    assert forbidden_imports(source, module) == forbidden


def test_a_dot_in_a_package_is_the_package_itself():
    assert forbidden_imports("from . import resnet", "mnclglf.models", is_package=True) == []
    assert forbidden_imports("from .. import training", "mnclglf.models", is_package=True) == ["mnclglf.training"]
