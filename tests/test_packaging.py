"""Tests of the contents of `pip install .`, and of the agreement of the project's files."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheels import build_kernels_wheel, build_wheel

from mnclglf.cli import parse
from mnclglf.methods import METHODS
from tools.setup_environment import SOURCES, TESTED_PYTHONS, Machine, decide

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["setup", "train", "report", "test", "test-slow", "test-gpu", "bench", "bench-compare", "faults"]
TARGETS += ["gpu-day", "check-aot", "check", "lock", "docs", "clean"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def kernels_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_kernels_wheel(tmp_path_factory.mktemp("kernels-wheel")))


def metadata_of(wheel: zipfile.ZipFile) -> Message:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return metadata_of(wheel)


@pytest.fixture(scope="module")
def kernels_metadata(kernels_wheel: zipfile.ZipFile) -> Message:
    return metadata_of(kernels_wheel)


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
    assert "mnclglf = mnclglf.__main__:main" in wheel.read(name).decode()


def test_every_dependency_is_pinned_to_a_version_it_allows(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    needed = {}
    for line in metadata.get_all("Requires-Dist"):
        requirement = Requirement(line)
        needed[canonicalize_name(requirement.name)] = requirement.specifier
    assert set(pinned) == set(needed)
    assert all(needed[name].contains(version) for name, version in pinned.items())


def read_lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """Returns the version and the hashes of each package in a lock file; the versions for all Pythons, by markers."""
    text = re.sub(r" *#.*", "", (ROOT / "locks" / f"{name}.txt").read_text())
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in filter(None, map(str.strip, text.replace("\\\n", " ").splitlines())):
        head, *hashes = entry.split(" --hash=")
        package, version = head.split(";")[0].strip().split("==")
        found[canonicalize_name(package)] = (version, [text.strip() for text in hashes])
    return found


def test_locks_hold_what_setup_installs_at_the_tested_versions(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines) if v}
    for faiss in ("faiss-cpu", "faiss-gpu"):
        locked = read_lock("base") | read_lock(faiss)
        extras = {"", "dev", "docs", "mnist5k", "dali-cuda13", faiss}
        for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra, "sys_platform": "linux"}) for extra in extras):
                name = canonicalize_name(requirement.name)
                assert name in locked, f"{name} is not in locks/: `make lock` writes it"
                assert locked[name][0] == pinned[name], f"{name}: `make lock` takes the version of constraints.txt"


def test_locks_have_a_hash_for_every_package_and_agree():
    base = read_lock("base")
    assert len(base) > 200
    for name in ("build", "base", "faiss-cpu", "faiss-gpu"):
        locked = read_lock(name)
        for package, (version, hashes) in locked.items():
            assert hashes, package
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), package
            assert base.get(package, (version, hashes)) == (version, hashes), package
    assert SOURCES in base
    assert "setuptools" in read_lock("build")
    assert decide(Machine("Linux", "x86_64"), None).locks == (
        "locks/build.txt",
        "locks/base.txt",
        "locks/faiss-cpu.txt",
    )


def test_bounds_are_the_oldest_that_ran(metadata):
    # A torch and a triton that no run has seen are not promised; those of docs/lab/performance.md's H200 are.
    oldest = {"torch": "2.11.0", "triton": "3.6.0"}
    specifiers = {r.name: r.specifier for r in map(Requirement, metadata.get_all("Requires-Dist"))}
    lab = (ROOT / "docs" / "lab" / "performance.md").read_text()
    assert all(f"{name} {version}" in lab.lower() for name, version in oldest.items())
    assert all(specifiers[name].contains(version) for name, version in oldest.items())
    assert not specifiers["torch"].contains("2.10.0")
    assert not specifiers["triton"].contains("3.5.1")


def test_classifiers_are_the_pythons_that_setup_knows_as_tested(metadata, kernels_metadata):
    for found in (metadata, kernels_metadata):
        language = "Programming Language :: Python :: "
        named = [line.removeprefix(language) for line in found.get_all("Classifier") if line.startswith(language)]
        assert named == [f"{major}.{minor}" for major, minor in TESTED_PYTHONS]


def test_an_index_would_show_the_readme_and_who_wrote_it(metadata, kernels_metadata):
    authors = re.search(r"^authors:\n  - name: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert authors
    for found, readme in ((metadata, ROOT / "README.md"), (kernels_metadata, ROOT / "kernels" / "README.md")):
        assert found.get_payload().strip() == readme.read_text().strip()
        assert found["Description-Content-Type"] == "text/markdown"
        assert found["Author"] == authors[1]
        assert found["License-Expression"] == "Apache-2.0"
        assert {"contrastive learning", "PyTorch"} <= set(found["Keywords"].split(","))
        assert "Typing :: Typed" in found.get_all("Classifier")


def test_kernels_wheel_holds_the_operators_alone(kernels_wheel):
    expected = {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    names = set(kernels_wheel.namelist())
    assert {name for name in names if name.endswith(".py")} == expected
    assert "mnclglf_kernels/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert (ROOT / "kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def requirements_of(found: Message) -> dict[str, tuple[str, str]]:
    """Returns the version and the marker that each requirement has, by its name and extra."""
    lines = [Requirement(line) for line in found.get_all("Requires-Dist", [])]
    return {r.name: (str(r.specifier), str(r.marker)) for r in lines}


def test_both_wheels_agree(metadata, kernels_metadata):
    # They hold the same files, so each requirement of the operators is one of the whole, at the same bound.
    ours = requirements_of(kernels_metadata)
    assert ours.items() <= requirements_of(metadata).items()
    base = {name for name, (_, marker) in ours.items() if "extra" not in marker}
    assert base == {"torch", "triton"}
    for field in ("Version", "Requires-Python", "Author"):
        assert kernels_metadata[field] == metadata[field]


def test_neither_wheel_requires_the_other(metadata, kernels_metadata):
    # mnclglf ships mnclglf_kernels: if it required mnclglf-kernels as well, two distributions would own the files.
    assert "mnclglf-kernels" not in requirements_of(metadata)
    assert "mnclglf" not in requirements_of(kernels_metadata)


def test_what_only_some_need_is_an_extra(metadata):
    base = {name for name, (_, marker) in requirements_of(metadata).items() if "extra" not in marker}
    assert not base & {"mlxtend", "pandas", "lightly", "faiss-cpu", "faiss-gpu", "pytest", "sphinx"}


def test_make_train_s_digits_are_installed_by_setup():
    makefile, setup = ((ROOT / name).read_text() for name in ("Makefile", "tools/setup_environment.py"))
    assert "DATASET ?= mnist5k" in makefile
    assert '"mnist5k"' in setup


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


def commands(*arguments: str) -> list[list[str]]:
    """Returns the words of each `mnclglf` command that make would run."""
    lines = make("--dry-run", *arguments).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/mnclglf ")]


def test_make_train_hands_its_choices_on():
    run = "runs/cifar10-paper-seed3"
    train, logistic, knn = commands("train", "DATASET=cifar10", "RECIPE=paper", "SEED=3", "ARGS=--epochs 7")
    assert train == shlex.split(
        f"train --method mnclglf --dataset cifar10 --recipe paper --seed 3 --out {run} --epochs 7"
    )
    assert (knn, logistic) == (["knn", run], ["logistic", run])
    assert commands("report", "RUN=elsewhere") == [["report", "elsewhere"]]


@pytest.mark.parametrize(
    ("given", "run"),
    [
        ([], "runs/mnist5k-quick-seed0"),
        (["METHOD=mnclglf"], "runs/mnist5k-quick-seed0"),
        (["METHOD=supervised"], "runs/supervised-mnist5k-quick-seed0"),
        (["METHOD=simsiam", "DATASET=cifar10", "SEED=2"], "runs/simsiam-cifar10-quick-seed2"),
        (["DATASET=folder:photos"], "runs/folder-photos-quick-seed0"),
        (["DATASET=folder:/a b/my photos/"], "runs/folder-my-photos-quick-seed0"),
        (["METHOD=byol", "DATASET=folder:/a/it's $5, so"], "runs/byol-folder-it-s--5,-so-quick-seed0"),
        (["DATASET=folder:."], "runs/folder-images-quick-seed0"),
        (["DATASET=folder:../x/.."], "runs/folder-x-quick-seed0"),
        (["DATASET=folder:/a b", "OUT=my runs/$one"], "my runs/$one"),
    ],
)
def test_make_train_names_the_run(given, run):
    train, logistic, knn = commands("train", *given)
    assert train[train.index("--out") + 1] == run
    assert (knn, logistic) == (["knn", run], ["logistic", run])
    assert commands("report", *given) == [["report", run]]


@pytest.mark.parametrize(
    "value", ["a b", "it's", 'a"b', "a$b", "$(shell touch made)", "$(open", "a,b", "a#b", "a\\b", "`b`;c &", "*"]
)
def test_make_takes_a_value_as_it_was_typed(value):
    train, _, knn = commands("train", f"DATASET=folder:/x/{value}/z", f"DATA_DIR=/d/{value}", f"OUT=o/{value}")
    assert train[train.index("--dataset") + 1] == f"folder:/x/{value}/z"
    assert train[train.index("--data-dir") + 1] == f"/d/{value}"
    assert train[train.index("--out") + 1] == f"o/{value}"
    assert knn == ["knn", f"o/{value}"]
    assert commands("report", f"RUN={value}") == [["report", value]]


def test_make_hands_args_to_the_shell():
    assert "--lr \"$HOME\" --out 'a b'\n" in make("--dry-run", "train", "ARGS=--lr \"$HOME\" --out 'a b'")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_make_train_takes_every_method(method):
    train, _, _ = commands("train", f"METHOD={method}")
    assert parse(train) is not None


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
