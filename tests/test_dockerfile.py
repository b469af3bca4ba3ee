"""Tests of the Dockerfile, as far as they go without a daemon."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from wheels import built

from mnclglf.cli import parse
from mnclglf.driver import CPU_INDEX
from tools.setup_environment import TESTED_PYTHONS

ROOT = Path(__file__).resolve().parents[1]
TORCH = re.findall(r"^torch(?:vision)?==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def instructions() -> list[tuple[str, str]]:
    """Returns the Dockerfile's instructions and their arguments, in order."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def of(wanted: str) -> list[str]:
    return [rest for word, rest in instructions() if word == wanted]


def is_sent(path: str) -> bool:
    """Returns whether .dockerignore leaves this path in the context; the last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        parents = ["/".join(path.split("/")[: depth + 1]) for depth in range(path.count("/") + 1)]
        fits = any(fnmatch(p, pattern) or fnmatch(f"/{p}", pattern.replace("**", "*")) for p in parents)
        if line and line[0] != "#" and fits:
            sent = line[0] == "!"
    return sent


def test_instructions_are_known_ones_in_a_possible_order():
    words = [word for word, _ in instructions()]
    assert set(words) <= {"ARG", "FROM", "RUN", "WORKDIR", "ENV", "COPY", "ENTRYPOINT", "CMD"}
    assert words[words.index("FROM") - 1] == "ARG"
    assert words[-2:] == ["ENTRYPOINT", "CMD"]


def test_the_python_is_one_that_was_tested():
    (image,) = of("FROM")
    default = dict(argument.split("=") for argument in of("ARG"))["PYTHON"]
    assert image == "python:${PYTHON}-slim"
    assert tuple(int(part) for part in default.split(".")) in TESTED_PYTHONS


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("setup.py", True),
        ("mnclglf/training/loop.py", True),
        ("kernels/mnclglf_kernels/py.typed", True),
        ("mnclglf/__pycache__/cli.pyc", False),
        ("kernels/build/lib/x.py", False),
        (".venv/bin/python", False),
        ("runs/x/config.json", False),
        (".git/HEAD", False),
        ("tests/conftest.py", False),
    ],
)
def test_only_the_sources_of_the_image_are_sent(path, sent):
    assert is_sent(path) is sent


def test_what_is_copied_builds_the_whole_wheel(tmp_path):
    context = tmp_path / "context"
    for line in of("COPY"):
        *sources, target = line.split()
        for source in sources:
            assert is_sent(source)
            place = context / target / source if target == "./" else context / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    names = zipfile.ZipFile(built(context, tmp_path)).namelist()
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "mnclglf").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("", ["install", *TORCH]),
        (CPU_INDEX, ["install", "--index-url", CPU_INDEX, *TORCH]),
    ],
)
def test_torch_is_that_of_the_constraints(index, expected, tmp_path):
    """Runs the shell line with a pip that only prints what it was given."""
    assert len(TORCH) == 2
    (tmp_path / "pip").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "pip").chmod(0o755)
    (line,) = [line for line in of("RUN") if "TORCH_INDEX" in line]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": index}
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_every_other_version_comes_from_the_constraints():
    installs = [line for line in of("RUN") if line.startswith("pip")]
    assert all("constraints.txt" in line for line in installs)
    assert not re.search(r"==\s*\d", (ROOT / "Dockerfile").read_text())


def test_the_extras_are_there():
    default = dict(argument.split("=") for argument in of("ARG"))["EXTRAS"]
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in default.split(","))
    assert '".[$EXTRAS]"' in " ".join(of("RUN"))


@pytest.mark.parametrize("line", of("RUN"))
def test_a_shell_takes_each_line(line):
    assert subprocess.run(["sh", "-n", "-c", line], capture_output=True).returncode == 0


def test_the_commands_are_ours():
    (entry,), (command,) = (json.loads(of(word)[0]) for word in ("ENTRYPOINT", "CMD"))
    scripts = importlib.metadata.entry_points(group="console_scripts")
    assert scripts[entry].value == "mnclglf.__main__:main"
    parse(shlex.split(command))
