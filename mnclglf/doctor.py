"""What this machine has and lacks for a run: packages, GPU, kernels, loaders, disk; each with its remedy.

Nothing here may fail because of what it examines: packages are imported in a process of their own first.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal, get_args

from packaging.requirements import Requirement

from mnclglf.driver import CUDA12_INDEX, CUDA13_INDEX, MINIMUM_DRIVER, look_for_gpu
from mnclglf.version import version

Status = Literal["ok", "note", "missing", "broken"]

OURS = ("mnclglf_kernels", "mnclglf.training.loop", "mnclglf.evaluation.run", "mnclglf.reports.page")
NOT_FOR_RUNS = ("dev", "docs")  # extras of those who change the project
OPTIONAL = ("triton",)  # base packages that a run can do without
# Extras of which one is enough. The first is proposed where none is installed, unless the machine says otherwise.
ALTERNATIVES = (("dali-cuda13", "dali-cuda12"), ("faiss-cpu", "faiss-gpu"))
PURPOSES = {
    "mnist5k": "the data set mnist5k",
    "dali-cuda13": "the loader dali",
    "dali-cuda12": "the loader dali",
    "faiss-cpu": "--lookup faiss",
    "faiss-gpu": "--lookup faiss",
    "parquet": "parquet:PATTERN, and embed --out FILE.parquet",
    "cudnn": "fused convolutions on a GPU",
}
SECONDS = 0.5  # that a loader is timed for
IMAGES, SIDE, BATCH = 256, 32, 64  # of the timed batches, and the side in pixels
LOW_DISK_BYTES = 2 * 2**30  # a checkpoint of the recipe paper has 0.3 GB; two are kept, and a third is being written

# Imports each module and prints its name and the problem. The mark tells this from what a module itself prints.
MARK = "doctor:"
PROBE = f"""
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        problem = ""
    except BaseException as error:
        problem = type(error).__name__ + ": " + (str(error).strip().splitlines() or ["no text"])[0]
    print(); print("{MARK}" + name + "=" + problem, flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the answer."""

    name: str
    text: str
    status: Status = "ok"
    remedy: str | None = None
    stops: bool = False
    """True if no run can be made before this is fixed."""


@dataclass(frozen=True)
class Package:
    """A distribution that mnclglf requires, for every run or as an extra."""

    requirement: Requirement
    extra: str | None

    @property
    def installed(self) -> str | None:
        """Returns the installed version, or None."""
        try:
            return distribution(self.requirement.name).version
        except PackageNotFoundError:
            return None

    @property
    def command(self) -> str:
        """Returns the command that installs it."""
        wanted = f"mnclglf[{self.extra}]" if self.extra else f"{self.requirement.name}{self.requirement.specifier}"
        return f"pip install '{wanted}'"


def examine() -> Iterator[Finding]:
    """Yields what is found, as it is found."""
    yield Finding(name="python", text=f"{platform.python_version()}, {sys.executable}")
    packages = required_packages()
    modules = {p: module_of(p.requirement.name) for p in packages if p.installed}
    problems = import_problems([*modules.values(), *OURS])
    yield from ourselves(problems)
    base = [p for p in packages if p.extra is None]
    for package in base:
        yield base_package(package, problems.get(modules.get(package, "")))
    torch_works = problems.get("torch", "missing") is None
    yield gpu(torch_works)
    for package in shown_extras([p for p in packages if p.extra is not None], torch_works):
        yield extra_package(package, problems.get(modules.get(package, "")))
    if all(problems[name] is None for name in OURS):
        yield from guarded("kernels", kernels)
        yield from guarded("loaders", loaders)
    yield from guarded("disk", disk)


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yields what a check finds, and an error of its own as a finding."""
    try:
        yield from check()
    except Exception as error:  # drivers and compilers raise anything
        yield Finding(name=name, text=one_line(error), status="broken", remedy="report it, with this output")


def one_line(error: BaseException) -> str:
    """Returns an exception's type and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}"


def required_packages() -> list[Package]:
    """Returns the packages of the installed distribution's metadata that fit this platform, but for its own tests."""
    try:
        lines = importlib.metadata.requires("mnclglf") or []
    except PackageNotFoundError:
        return []
    found: list[Package] = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found.append(Package(requirement, None))
            continue
        extras = importlib.metadata.metadata("mnclglf").get_all("Provides-Extra") or []
        found += [
            Package(requirement, extra)
            for extra in extras
            if extra not in NOT_FOR_RUNS and marker.evaluate({"extra": extra})
        ]
    return found


def module_of(name: str) -> str:
    """Returns the module that a distribution is imported by: that of its own name, else the outermost of its files."""
    files = [Path(str(file)) for file in distribution(name).files or []]
    packages = {".".join(file.parent.parts) for file in files if file.name == "__init__.py"}
    own = name.lower().replace("-", "_")
    return own if own in packages or not packages else min(packages, key=lambda module: (module.count("."), module))


def import_problems(modules: Sequence[str]) -> dict[str, str | None]:
    """Imports modules in another process; returns the problem of each, or None. One may end the whole process."""
    found: dict[str, str | None] = {}
    while left := [name for name in dict.fromkeys(modules) if name not in found]:
        # -P: not from the current folder, as the installed command. Warnings and logs of the modules are not shown.
        command = [sys.executable, "-P", "-c", PROBE, *left]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600, check=False)
            printed, end = answer.stdout, f"its import ends Python (exit code {answer.returncode})"
        except subprocess.TimeoutExpired as error:
            printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            end = "its import takes over ten minutes"
        for line in printed.splitlines():
            if line.startswith(MARK):
                name, _, problem = line.removeprefix(MARK).partition("=")
                found[name] = problem or None
        if culprit := next((name for name in left if name not in found), None):
            found[culprit] = end
    return found


def ourselves(problems: dict[str, str | None]) -> Iterator[Finding]:
    """Yields how mnclglf itself is installed."""
    place = Path(__file__).resolve().parent
    yield Finding(name="mnclglf", text=f"{version()}, {place}")
    try:
        distribution("mnclglf")
    except PackageNotFoundError:
        yield Finding(
            name="mnclglf",
            text="not installed, so its packages are not known here",
            status="note",
            remedy="make setup, or pip install . in the checkout",
        )
    try:
        second = distribution("mnclglf-kernels").version
        yield Finding(
            name="mnclglf",
            text=f"mnclglf-kernels {second} is installed beside it; both own the files of mnclglf_kernels",
            status="broken",
            remedy="pip uninstall -y mnclglf-kernels, then install mnclglf again with --force-reinstall --no-deps",
        )
    except PackageNotFoundError:
        pass
    for name in OURS:
        if problem := problems[name]:
            yield Finding(
                name=name,
                text=problem,
                status="broken",
                stops=True,
                remedy="fix the packages below; if all are well, report it, with this output",
            )


def base_package(package: Package, problem: str | None) -> Finding:
    """Returns the state of a package that every run needs."""
    requirement, installed = package.requirement, package.installed
    needed = requirement.name not in OPTIONAL
    if installed is None:
        text, status = "not installed" if needed else "not installed; PyTorch runs every operator", "missing"
    elif problem is not None:
        text, status = f"{installed} does not load: {problem}", "broken"
    elif not requirement.specifier.contains(installed, prereleases=True):
        text, status, needed = f"{installed} is not {requirement.specifier}, which was tested", "note", False
    else:
        return Finding(name=requirement.name, text=installed)
    again = "" if problem is None else " --force-reinstall"
    return Finding(name=requirement.name, text=text, status=status, stops=needed, remedy=package.command + again)


def shown_extras(packages: Sequence[Package], torch_works: bool) -> list[Package]:
    """Returns the extras to show: of alternatives those that are installed, else the one for this machine."""
    wants_gpu, cuda = False, None
    if torch_works:
        import torch

        wants_gpu, cuda = torch.cuda.is_available(), torch.version.cuda
    kept = list(packages)
    for group in ALTERNATIVES:
        of_group = [p for p in kept if p.extra in group]
        installed = [p for p in of_group if p.installed]
        second = cuda is not None and cuda.startswith("12") if group[0].startswith("dali") else wants_gpu
        chosen = installed or [p for p in of_group if p.extra == group[second]]
        kept = [p for p in kept if p not in of_group or p in chosen]
    return kept


def extra_package(package: Package, problem: str | None) -> Finding:
    """Returns the state of a package that only some runs need."""
    installed, purpose = package.installed, PURPOSES.get(package.extra or "", f"the extra {package.extra}")
    name = package.requirement.name
    if installed is None:
        return Finding(name=name, text=f"not installed; for {purpose}", status="missing", remedy=package.command)
    if problem is not None:
        return Finding(
            name=name,
            text=f"{installed} does not load, so {purpose} cannot be used: {problem}",
            status="broken",
            remedy=f"{package.command} --force-reinstall, or pip uninstall {name}",
        )
    return Finding(name=name, text=f"{installed}, for {purpose}")


def gpu(torch_works: bool) -> Finding:
    """Returns what torch can do with the GPU, of which a run on the CPU needs nothing."""
    found, problem = look_for_gpu()
    cores = f"runs take the CPU, {os.cpu_count()} cores"
    if not torch_works:
        return Finding(name="gpu", text="not examined, as torch does not load", status="note")
    import torch

    if found is None and problem is None and not torch.cuda.is_available():
        return Finding(name="gpu", text=f"none; {cores}")
    named = f"{found.name}, driver {found.driver}" if found else problem or "nvidia-smi is not on the PATH"
    cuda = torch.version.cuda
    take = f"pip uninstall -y torch torchvision, then pip install torch torchvision --index-url {CUDA13_INDEX}"
    if cuda is None:
        return Finding(
            name="gpu", text=f"{named}; torch {torch.__version__} is built without CUDA, so {cores}", status="note",
            remedy=take,
        )  # fmt: skip
    try:
        assert (torch.ones(8, device="cuda") * 2).sum().item() == 16
    except Exception as error:
        least = MINIMUM_DRIVER.get(int(cuda.split(".")[0]))
        remedy = f"upgrade the driver; torch for CUDA {cuda} needs {least or 'a newer one'}"
        older = take.replace(CUDA13_INDEX, CUDA12_INDEX)
        return Finding(
            name="gpu", text=f"{named}; torch cannot use it ({one_line(error)}), so {cores}", status="broken",
            remedy=f"{remedy}, or for an older driver: {older}",
        )  # fmt: skip
    properties = torch.cuda.get_device_properties(0)
    gigabytes = properties.total_memory / 2**30
    capability = f"{properties.major}.{properties.minor}"
    return Finding(name="gpu", text=f"{named}, {gigabytes:.0f} GiB, compute capability {capability}, CUDA {cuda}")


def kernels() -> Iterator[Finding]:
    """Yields what the self-check of the Triton kernels finds on a GPU, at small sizes; each run checks them at its own.

    Also yields what torch.compile lacks there.
    """
    import torch

    from mnclglf.training.start import compiler_problem
    from mnclglf_kernels import self_check
    from mnclglf_kernels.backend import triton_problem
    from mnclglf_kernels.operators import OPERATORS
    from mnclglf_kernels.sizes import Sizes

    if not torch.cuda.is_available():
        yield Finding(name="kernels", text="not checked, as there is no GPU to run them; PyTorch runs every operator")
        return
    device = torch.device("cuda")
    if problem := compiler_problem(device):
        yield Finding(name="compiler", text=problem, status="missing", remedy="apt install gcc python3-dev")
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if (refused := triton_problem((torch.empty(0, dtype=dtype, device=device),), "matmul")) is not None:
        yield Finding(name="kernels", text=f"{refused}; PyTorch runs every operator", status="note")
        return
    sizes = Sizes(images=64, side=32, features=64, k=2, width=128, queue=1024)
    failed = self_check.failures(sizes, dtype, dtype, device)
    for name, why in failed.items():
        yield Finding(
            name=f"kernel {name}",
            text=f"{why}; PyTorch runs this operator",
            status="broken",
            remedy="report it; runs go on without this kernel",
        )
    if not failed:
        yield Finding(name="kernels", text=f"{len(OPERATORS)} operators pass their self-check")


def loaders() -> Iterator[Finding]:
    """Yields the speed of each loader on random images, or why it cannot run; no run can be made if none does."""
    import numpy as np
    import torch

    from mnclglf.config import LoaderName
    from mnclglf.data.images import ImageArray
    from mnclglf.data.loaders import make_loader
    from mnclglf.recipes import VIEWS

    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.zeros(IMAGES, dtype=np.int64)
    images = ImageArray(name="random", split="train", images=pixels, labels=labels, classes=("one",))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = dict(views=3, side=SIDE, batch_size=BATCH, seed=0, threads=2, dtype=torch.float32)
    works = False
    for name in (name for name in get_args(LoaderName) if name != "auto"):
        try:
            loader = make_loader(images, VIEWS["paper"], backend=name, device=device, **settings)
            rate = images_per_second(loader.batches(0, 10**6), device)
        except ImportError:
            continue  # among the packages
        except Exception as error:
            yield Finding(name=f"loader {name}", text=one_line(error), status="broken", remedy="take another --loader")
            continue
        works = True
        text = f"{rate:,.0f} images per second ({SIDE} x {SIDE}, three views each, on {device.type})"
        yield Finding(name=f"loader {name}", text=text)
    if not works:
        yield Finding(name="loaders", text="none can run here", status="broken", stops=True, remedy="see above")


def images_per_second(batches: Iterator[Any], device: Any) -> float:
    """Returns the rate of a loader's batches over SECONDS, without the first two."""
    import torch

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for _ in range(2):
        next(batches)
    start, count = wait(), 0
    while wait() - start < SECONDS or count == 0:
        next(batches)
        count += 1
    return count * BATCH / (wait() - start)


def disk() -> Iterator[Finding]:
    """Yields the free space where runs are written, and whether they can be."""
    from mnclglf.runs.files import cache_folder, check_writable, nearest_folder

    runs = Path("runs").absolute()
    for name, folder, stops in (("runs", runs, True), ("cache", cache_folder(), False)):
        remedy = "change to another folder, or give --out" if stops else "set XDG_CACHE_HOME to another folder"
        try:
            check_writable(folder, remedy)
        except OSError as error:
            text = f"{error.filename}: {error.strerror}"
            yield Finding(name=name, text=text, status="broken", stops=stops)
            continue
        free = shutil.disk_usage(nearest_folder(folder)).free
        text = f"{free / 1e9:,.1f} GB free in {folder}"
        low = free < LOW_DISK_BYTES
        remedy = "free some, or take a folder on another disk: give --out, or set XDG_CACHE_HOME" if low else None
        yield Finding(name=name, text=text, status="note" if low else "ok", remedy=remedy)
