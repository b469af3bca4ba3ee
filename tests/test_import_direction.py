"""Imports go one way: cli -> commands -> reproduce -> evaluation -> training -> methods -> models -> kernels.

data lies below training and evaluation, runs below them all, reports above runs; plugins and the kernels import
nothing of ours, and config only plugins.
"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part of the program may import of ours, besides itself.
MODELS = {"config", "plugins", "mnclglf_kernels"}
METHODS = MODELS | {"models"}
DATA = {"config", "plugins", "runs", "mnclglf_kernels"}
TRAINING = METHODS | DATA | {"methods", "data"}
EVALUATION = TRAINING | {"training", "recipes"}
MAY_IMPORT = {
    "mnclglf_kernels": set(),
    "driver": set(),
    "plugins": set(),
    "version": set(),
    "config": {"plugins"},
    "runs": {"config"},
    "data": DATA,
    "recipes": {"config", "data"},  # data.sources says which data sets are digits
    "settings": {"config", "recipes"},
    "models": MODELS,
    "methods": METHODS,
    "training": TRAINING,
    "evaluation": EVALUATION,
    "reports": {"config", "runs", "data", "recipes"},  # data and recipes for looks at images alone
    "exporting": METHODS | {"methods", "runs", "reports"},
    "api": EVALUATION | {"evaluation", "reports", "exporting", "settings"},
    "reproduce": EVALUATION | {"evaluation", "reports"},
    "doctor": EVALUATION | {"driver", "version"},
    "commands": EVALUATION | {"evaluation", "reports", "reproduce", "api", "doctor", "exporting"},
    "cli": {"config", "data", "settings", "runs", "commands", "version"},
    "__main__": {"cli"},
    "__init__": {"api", "config", "runs", "version"},
}
OURS = {"mnclglf", "mnclglf_kernels", "tests", "oracles"}


def part_of(module: str) -> str:
    """mnclglf.data.views -> data; mnclglf_kernels.ops.divide -> mnclglf_kernels; mnclglf -> __init__."""
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


@pytest.mark.parametrize(("part", "of"), [("data", {"sources", "neighbors"}), ("recipes", {"sources", "overview"})])
def test_of_reports_only_the_looks_at_images_and_the_table_of_runs_need_more(part, of):
    files = {
        module: path.read_text() for module, path in source_files().items() if module.startswith("mnclglf.reports")
    }
    importing = {
        m for m, source in files.items() if f"mnclglf.{part}" in str(imported_modules(source, "mnclglf.reports"))
    }
    assert importing == {f"mnclglf.reports.{name}" for name in of}


def test_no_module_has_the_name_of_a_standard_library_module():
    """Python started in the module's folder would import ours in its place."""
    assert [module for module in source_files() if module.rpartition(".")[2] in sys.stdlib_module_names] == []


def import_graph(sources):
    """Modules of ours that each of `sources` (text and whether a package, by name) imports when it is imported."""
    graph = {}
    for module, (source, is_package) in sources.items():
        package = module if is_package else module.rpartition(".")[0]
        tree = ast.parse(source)
        # Imports within a function or under TYPE_CHECKING wait, or are never made.
        tree.body = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If))]
        named = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        graph[module] = ((named | imported_modules(ast.unparse(tree), package)) & sources.keys()) - {module}
    return graph


def test_there_is_no_import_cycle():
    sources = {module: (path.read_text(), path.name == "__init__.py") for module, path in source_files().items()}
    graph = import_graph(sources)
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_a_cycle_would_be_found():
    cycle = {"mnclglf.a": ("from mnclglf import b", False), "mnclglf.b": ("import mnclglf.a", False)}
    assert import_graph(cycle) == {"mnclglf.a": {"mnclglf.b"}, "mnclglf.b": {"mnclglf.a"}}
    late = {"mnclglf.a": ("from mnclglf import b", False), "mnclglf.b": ("def f():\n    import mnclglf.a", False)}
    assert import_graph(late) == {"mnclglf.a": {"mnclglf.b"}, "mnclglf.b": set()}


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
        ("mnclglf.evaluation.run", "from mnclglf.reproduce import plan", ["mnclglf.reproduce"]),
        ("mnclglf.data.loader", "from mnclglf.training import step", ["mnclglf.training"]),
        ("mnclglf.runs.files", "from mnclglf.data import images", ["mnclglf.data"]),
        ("mnclglf.recipes", "from mnclglf.training import train", ["mnclglf.training"]),
        ("mnclglf.reproduce.run", "from mnclglf.cli import main", ["mnclglf.cli"]),
        ("mnclglf.reports.tables", "from mnclglf.reproduce import paper", ["mnclglf.reproduce"]),
        ("mnclglf_kernels.ops.enqueue", "import mnclglf.config", ["mnclglf.config"]),
        ("mnclglf_kernels._triton.enqueue", "import oracles", ["oracles"]),
        ("mnclglf.methods.mnclglf", "from tests.oracles import loss", ["tests.oracles"]),
        ("mnclglf.methods.mnclglf", "from mnclglf_kernels import divide\nfrom mnclglf.models import heads\n", []),
        ("mnclglf.models.encoder", "from .heads import Head\nfrom . import heads\nimport torch, mnclglf_kernels", []),
        ("mnclglf.commands.train", "from mnclglf import recipes\nfrom mnclglf.training.loop import train", []),
    ],
)
def test_the_checker_itself(module, source, forbidden):
    assert forbidden_imports(source, module) == forbidden


def test_a_dot_in_a_package_is_the_package_itself():
    assert forbidden_imports("from . import resnet", "mnclglf.models", is_package=True) == []
    assert forbidden_imports("from .. import training", "mnclglf.models", is_package=True) == ["mnclglf.training"]
