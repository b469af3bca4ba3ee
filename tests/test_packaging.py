"""Tests of the contents of `pip install .`, and of the agreement of the project's files."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["setup", "train", "report", "test", "test-slow", "test-gpu", "bench", "bench-compare", "gpu-day"]
TARGETS += ["check-aot", "check", "docs", "clean"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Builds the wheel of this checkout in a copy, with a template in reports/."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("mnclglf", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "mnclglf" / "reports" / "made-up.html.jinja").touch()
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=copy, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_every_module_of_both_roots_and_nothing_else(wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "mnclglf").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_wheel_holds_the_templates_the_type_markers_and_the_licence(wheel):
    names = set(wheel.namelist())
    assert {"mnclglf/reports/made-up.html.jinja", "mnclglf/py.typed", "mnclglf_kernels/py.typed"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_installs_the_command(wheel):
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "mnclglf = mnclglf.cli:main" in wheel.read(name).decode()


def test_every_dependency_is_pinned_to_a_version_it_allows(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    needed = {}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        needed[canonicalize_name(requirement.name)] = requirement.specifier
    assert set(pinned) == set(needed)
    assert all(needed[name].contains(version) for name, version in pinned.items())


def test_dali_is_asked_for_on_linux_only(metadata):
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    dali = [requirement for requirement in requirements if requirement.name.startswith("nvidia-dali")]
    assert {requirement.name for requirement in dali} == {"nvidia-dali-cuda120", "nvidia-dali-cuda130"}
    for requirement in dali:
        extra = "dali-cuda13" if requirement.name.endswith("130") else "dali-cuda12"
        assert requirement.marker is not None
        assert requirement.marker.evaluate({"sys_platform": "linux", "extra": extra})
        assert not requirement.marker.evaluate({"sys_platform": "darwin", "extra": extra})


def test_one_version_everywhere(metadata):
    version = metadata["Version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    try:
        installed = importlib.metadata.version("mnclglf")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mnclglf is not installed here; `make setup` installs it")
    assert installed == version


def test_kernels_is_a_source_root_and_no_package():
    # A top-level package `kernels` would shadow the one on PyPI.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "tests" / "helpers").rglob("__init__.py")) == []


def make(*arguments: str) -> str:
    # Without the variables of a `make test ARGS=...` that runs this.
    environment = {"PATH": os.environ["PATH"]}
    answer = subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return answer.stdout + answer.stderr


def test_make_alone_lists_every_target():
    listed = re.findall(r"^  ([a-z-]+) +\S", make(), re.MULTILINE)
    assert sorted(listed) == sorted([*TARGETS, "help"])


@pytest.mark.parametrize("target", [target for target in TARGETS if target not in ("setup", "clean")])
def test_target_sets_up_the_environment_before_it_runs_it(target):
    printed = make("--dry-run", target)
    assert 0 <= printed.index("tools/setup_environment.py") < printed.index(".venv/bin/")


def test_make_train_hands_its_choices_on():
    printed = make("--dry-run", "train", "DATASET=cifar10", "RECIPE=paper", "SEED=3", "ARGS=--epochs 7")
    run = "runs/cifar10-paper-seed3"
    assert f'train --method mnclglf --dataset cifar10 --recipe paper --seed 3 --out "{run}"  --epochs 7\n' in printed
    assert f'.venv/bin/mnclglf knn "{run}"\n.venv/bin/mnclglf logistic "{run}"\n' in printed
    assert '--data-dir "/data sets"' in make("--dry-run", "train", "DATA_DIR=/data sets")
    assert 'report "elsewhere"' in make("--dry-run", "report", "RUN=elsewhere")


def test_make_setup_names_a_python_that_is_not_there():
    assert "no python-that-is-not-there" in make("setup", "PYTHON=python-that-is-not-there")


def test_ci_runs_the_checks_then_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    for path in (script, ROOT / ".github" / "workflows" / "ci.yml", ROOT / ".pre-commit-config.yaml"):
        text = path.read_text()
        assert 0 <= text.index("make check") < text.index("make test"), path


def test_everything_imports_without_triton_and_dali() -> None:
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for root, package in ((ROOT, "mnclglf"), (ROOT / "kernels", "mnclglf_kernels"))
        for path in sorted((root / package).rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py") and path != ROOT / "mnclglf" / "data" / "loaders" / "dali.py"
        if "_triton" not in path.parts and path.name not in ("tune.py", "aot.py")
    ]
    assert "mnclglf.training.loop" in modules
    lines = ["import sys", "sys.modules |= {name: None for name in ('triton', 'nvidia.dali')}"]
    code = "\n".join(lines + [f"import {module}" for module in modules])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
