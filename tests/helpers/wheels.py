"""Wheels of this checkout, and fresh virtual environments to install them in."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
NO_CACHES = shutil.ignore_patterns("__pycache__", "build", "dist", "*.egg-info")


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of mnclglf from a copy of this checkout, with a made-up template in reports/."""
    copy = folder / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("mnclglf", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=NO_CACHES)
    (copy / "mnclglf" / "reports" / "made-up.html.jinja").touch()
    return built(copy, folder)


def build_kernels_wheel(folder: Path) -> Path:
    """Builds the wheel of mnclglf-kernels from a copy of kernels/."""
    return built(shutil.copytree(ROOT / "kernels", folder / "copy", ignore=NO_CACHES), folder)


def built(tree: Path, folder: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


class Environment:
    """A fresh virtual environment that holds a wheel and what the wheel requires, and nothing else.

    pip installs the wheel. Its requirements are linked, file by file, from the environment that runs the tests: a copy
    would take 7 GB.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.bin = folder / "bin"
        self.site = next(folder.glob("lib/python*/site-packages"))
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
        (metadata,) = self.site.glob("mnclglf*.dist-info")
        requires = importlib.metadata.Distribution.at(metadata).requires or []
        for name in closure(map(Requirement, requires)):
            self.link(importlib.metadata.distribution(name))

    def link(self, distribution: importlib.metadata.Distribution) -> None:
        for file in distribution.files or []:
            place = self.site / str(file)
            if ".." not in file.parts and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(str(distribution.locate_file(file)))

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs a command of this environment as its user would, on the CPU."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET", "VIRTUAL_ENV")}
        # A home without caches of others, and a terminal wide enough for whole lines.
        kept |= {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(cwd / "cache"), "COLUMNS": "200"}
        program = [str(self.bin / command[0]), *command[1:]]
        return subprocess.run(program, cwd=cwd, env=kept, capture_output=True, text=True, check=False)


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """Returns the names of the distributions that pip would install for these requirements."""
    found: set[tuple[str, str]] = set()
    waiting = [(requirement, "") for requirement in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), wanted
            if key not in found:
                found.add(key)
                requires = importlib.metadata.distribution(requirement.name).requires or []
                waiting += [(Requirement(line), wanted) for line in requires]
    return {name for name, _ in found}
