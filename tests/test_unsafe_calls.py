"""No shell, no code from text, no pickle, no unverified download in the code that people run.

The syntax tree is read, not the text, and names are followed through the imports of a file: after
`from os import system as s` s is searched for. Reference: the documentation of each function named, and of bandit,
whose checks have the same aim.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mnclglf", "kernels", "bench", "tools", "docs", ".ci")

# Modules that run code from a file, and functions that run a shell, run text, or skip a check, however they are called.
MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pty"}
NAMES = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "tempfile.mktemp",
    "shutil.unpack_archive",
    "ssl._create_unverified_context",
    "pandas.read_pickle",
    "torch.hub.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
}
# Keywords that are unsafe unless they have this value, in any call.
KEYWORDS = {"shell": False, "verify": True, "allow_pickle": False, "weights_only": True, "trust_remote_code": False}
# Keywords that a call has to have, with the value; None for any. A name that begins with a dot is a method's.
REQUIRED = {
    "torch.load": ("weights_only", "True"),
    "yaml.load": ("Loader", "yaml.SafeLoader"),
    "ruamel.yaml.YAML": ("typ", "'safe'"),
    "jinja2.Environment": ("autoescape", "True"),
    "hashlib.md5": ("usedforsecurity", "False"),
    "hashlib.sha1": ("usedforsecurity", "False"),
    "hashlib.new": ("usedforsecurity", "False"),
    ".extract": ("filter", "'data'"),
    ".extractall": ("filter", "'data'"),
}

ALLOWED = {
    ("mnclglf/data/archives.py", "pickle"): "CIFAR is published so; this unpickler admits only numeric numpy arrays",
    ("mnclglf/data/archives.py", ".extractall without filter='data'"): "a zip: its members are checked one by one",
    ("mnclglf/data/sources/tinyimagenet.py", "http://"): "its only address; the file is checked against a digest",
    ("mnclglf/exporting/card.py", "jinja2.Environment without autoescape=True"): "it writes Markdown, not HTML",
    ("bench/ranks.py", "weights_only=False"): "a process that it has started itself wrote the file, into a new folder",
    ("bench/ranks.py", "torch.load without weights_only=True"): "the same call",
    ("bench/faults/checkpoints.py", "pickle"): "it writes the files that must be refused, and reads none",
    ("bench/faults/corpus.py", "pickle"): "it writes the files that must be refused, and reads none",
}


def source_files() -> list[Path]:
    """Returns the Python files that people run; not the tests, which plant what is searched for here."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts]
    return sorted([*found, ROOT / "setup.py"])


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Returns what each imported name stands for, e.g. np: numpy, s: os.system."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """Returns the dotted name that an expression stands for; of a method of some value, a dot and its name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = full_name(node.value, names)
        return f"{base}.{node.attr}" if base and not base.startswith(".") else f".{node.attr}"
    return ""


def is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unsafe(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the kind of each finding in a Python source."""
    tree = ast.parse(source)
    names = imported_names(tree)
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from ((node.lineno, name) for each in modules if (name := each.partition(".")[0]) in MODULES)
        elif isinstance(node, ast.Name | ast.Attribute) and (name := full_name(node, names)) in NAMES:
            yield node.lineno, name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            if node.value.strip().startswith("http://") and len(node.value) > len("http://"):
                yield node.lineno, "http://"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, kind) for kind in unsafe_arguments(node, names))


def unsafe_arguments(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    name = full_name(call.func, names)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for keyword, safe in KEYWORDS.items():
        if keyword in given and not is_constant(given[keyword], safe):
            yield f"{keyword}={ast.unparse(given[keyword])}"
    method = f".{call.func.attr}" if isinstance(call.func, ast.Attribute) else ""
    for wanted in (name, method):
        if wanted in REQUIRED:
            keyword, value = REQUIRED[wanted]
            if keyword not in given or dotted(given[keyword], names) != value:
                yield f"{wanted} without {keyword}={value}"


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    return full_name(node, names) or ast.unparse(node)


def test_no_unsafe_calls() -> None:
    files = source_files()
    assert len(files) > 200
    found = {
        (path.relative_to(ROOT).as_posix(), kind): f"{path.relative_to(ROOT)}:{line}: {kind}"
        for path in files
        for line, kind in unsafe(path.read_text(encoding="utf-8"))
    }
    assert [text for key, text in found.items() if key not in ALLOWED] == []
    assert [key for key in ALLOWED if key not in found] == [], "these exceptions are no longer needed"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True"),
        ("import subprocess\nsubprocess.Popen('ls', shell=flag)", "shell=flag"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import popen as p\np('ls')", "os.popen"),
        ("import os as o\nrun = o.system", "os.system"),
        ("from subprocess import getoutput\ngetoutput('ls')", "subprocess.getoutput"),
        ("eval('1')", "eval"),
        ("import builtins\nexec(text)", "exec"),
        ("__import__('os')", "__import__"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("import joblib", "joblib"),
        ("import marshal", "marshal"),
        ("import yaml\nyaml.load(text)", "yaml.load without Loader=yaml.SafeLoader"),
        ("import yaml\nyaml.load(text, Loader=yaml.Loader)", "yaml.load without Loader=yaml.SafeLoader"),
        ("from ruamel.yaml import YAML\nYAML()", "ruamel.yaml.YAML without typ='safe'"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("import torch\ntorch.load(path)", "torch.load without weights_only=True"),
        ("from torch import load\nload(path, weights_only=False)", "torch.load without weights_only=True"),
        ("archive.extractall(folder)", ".extractall without filter='data'"),
        ("tarfile.open(path).extractall(folder, filter='tar')", ".extractall without filter='data'"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
        ("import hashlib\nhashlib.md5(data)", "hashlib.md5 without usedforsecurity=False"),
        ("from hashlib import sha1\nsha1(data)", "hashlib.sha1 without usedforsecurity=False"),
        ("requests.get(url, verify=False)", "verify=False"),
        ("URL = 'http://example.org/file'", "http://"),
        ("URL = f'http://example.org/{name}'", "http://"),
        ("import jinja2\njinja2.Environment()", "jinja2.Environment without autoescape=True"),
    ],
)
def test_finds_planted_calls(source: str, kind: str) -> None:
    assert kind in [found for _, found in unsafe(source)]


@pytest.mark.parametrize(
    "source",
    [
        '"""Reads http://example.org and never calls eval()."""',
        "import re\nre.compile('a')",
        "model.eval()",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import hashlib\nhashlib.md5(data, usedforsecurity=False)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "archive.extractall(folder, filter='data')",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
    ],
)
def test_leaves_safe_calls(source: str) -> None:
    assert list(unsafe(source)) == []
