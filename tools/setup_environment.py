"""Makes .venv: detects the hardware, chooses the builds of torch, DALI and FAISS, installs and tests them.

`make setup` runs it with the Python for .venv, chosen by tools/find_python.sh; it needs only the standard library. The
stamp in .venv is written last and names the installed packages: a .venv without it counts as broken and is built again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this file is run by itself, before anything is installed

from mnclglf.driver import (  # noqa: E402  (it needs only the standard library, too)
    CPU_INDEX,
    CUDA12_INDEX,
    CUDA13_INDEX,
    MINIMUM_DRIVER,
    Gpu,
    look_for_gpu,
)

MARKER = "made-by-make-setup"  # written first, with the choice of TORCH_INDEX: marks a .venv that we may delete
STAMP = "setup.json"  # written last: marks a complete .venv
PYPI = "pypi"
SOURCES = "antlr4-python3-runtime"  # packages of the lock files that have no wheel; lightly requires this one
TESTED_PYTHONS = ((3, 11), (3, 12), (3, 13))  # CONTRIBUTING.md says how far each was tested

TAKE_CUDA12 = f"`make setup TORCH_INDEX={CUDA12_INDEX}` (not for an RTX 50 card: this build knows GPUs up to Hopper)"
TAKE_CPU = f"`make setup TORCH_INDEX={CPU_INDEX}` to run on the CPU on purpose"

# Program that .venv's Python reads from stdin; the last line it prints is JSON. It runs a computation on the GPU, as a
# GPU that torch only lists may still fail.
PROBE = """
import json, sys
import torch, torchvision, faiss, mnclglf, mnclglf_kernels
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None, "gpu_error": None, "dali": None}
if sys.argv[1] == "cuda":
    try:
        assert (torch.ones(8, device="cuda") * 2).sum().item() == 16
        found["gpu"] = torch.cuda.get_device_name()
    except Exception as error:
        found["gpu_error"] = str(error).splitlines()[0]
if sys.argv[2] == "dali":
    import nvidia.dali
    found["dali"] = nvidia.dali.__version__
print(json.dumps(found))
"""


class SetupError(Exception):
    """Error that stops the setup; its text names the finding and the remedy."""


@dataclass(frozen=True)
class Machine:
    system: str  # as platform.system()
    architecture: str  # as platform.machine()
    gpu: Gpu | None = None
    gpu_problem: str | None = None  # why a detected GPU cannot be used
    cores: int = 1
    bf16_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    torch_index: str | None  # None is PyPI
    dali_extra: str | None
    cuda: int | None  # CUDA major version of the torch build; None is a build without CUDA, or not known
    expects_gpu: bool
    notes: tuple[str, ...] = ()

    @property
    def faiss_extra(self) -> str:
        """Returns the FAISS extra, of which only one may be installed; faiss-gpu is for Linux on x86_64, as DALI is."""
        return "faiss-gpu" if self.expects_gpu and self.dali_extra else "faiss-cpu"

    @property
    def locks(self) -> tuple[str, ...]:
        """Returns the lock files, for PyPI's wheels on Linux on x86_64; none elsewhere, where constraints.txt does."""
        fits = self.torch_index is None and self.dali_extra is not None
        return ("locks/build.txt", "locks/base.txt", f"locks/{self.faiss_extra}.txt") if fits else ()


def python_problem(version: tuple[int, ...], has_ensurepip: bool) -> str | None:
    """Returns why this Python cannot make .venv, or None."""
    found = ".".join(str(part) for part in version)
    if version < (3, 11):
        return f"Python {found} is too old; mnclglf needs 3.11 or newer: `make setup PYTHON=/path/to/python3.12`"
    if not has_ensurepip:
        return f"Python {found} cannot make virtual environments; on Debian or Ubuntu: `apt install python{found}-venv`"
    return None


def parse_bf16_flags(cpuinfo: str) -> tuple[str, ...]:
    """Returns the CPU's instructions that multiply bf16, from the text of /proc/cpuinfo."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return tuple(sorted({"avx512_bf16", "amx_bf16"} & set(flags.group(1).split()))) if flags else ()


def look_at_machine() -> Machine:
    gpu, problem = look_for_gpu()
    cpuinfo = Path("/proc/cpuinfo")
    flags = parse_bf16_flags(cpuinfo.read_text(errors="replace")) if cpuinfo.exists() else ()
    return Machine(platform.system(), platform.machine(), gpu, problem, os.cpu_count() or 1, flags)


def cuda_of_index(index: str | None) -> int | None:
    """Returns the CUDA major version of the builds in an index, 12 or 13; None for CPU builds."""
    if index is None:
        return 13  # PyPI
    build = index.rstrip("/").rsplit("/", 1)[-1]
    if build == "cpu":
        return None
    if not re.fullmatch(r"cu1[23]\d", build):
        raise SetupError(
            f"TORCH_INDEX={index} ends in no cu12x, cu13x or cpu; give one such as {CUDA12_INDEX}, or {PYPI} for PyPI"
        )
    return int(build[2:4])


def decide(machine: Machine, torch_index: str | None) -> Plan:
    """Returns the plan of packages for this machine; `torch_index` None is PyPI.

    Raises:
        SetupError: a GPU was detected, and this torch could not use it.
    """
    cuda = cuda_of_index(torch_index)
    notes = []
    dali = "dali-cuda12" if cuda == 12 else "dali-cuda13"
    if machine.system != "Linux" or machine.architecture != "x86_64":
        dali = None
        notes.append(
            f"no DALI: it is for Linux on x86_64, this is {machine.system} on {machine.architecture}; "
            "the slow reference loader does its work"
        )
    if machine.system != "Linux":
        cuda = None if torch_index is None else cuda
    elif torch_index is None and machine.gpu is None and machine.gpu_problem is None:
        notes.append(f"no NVIDIA GPU: runs use the CPU; {CPU_INDEX} as TORCH_INDEX would make a smaller .venv")
    elif torch_index is not None and cuda is None and (machine.gpu or machine.gpu_problem):
        notes.append("the GPU stays unused: TORCH_INDEX names the CPU build")
    if cuda is not None:
        check_driver(machine, cuda)
    return Plan(torch_index, dali, cuda, cuda is not None and machine.gpu is not None, tuple(notes))


def check_driver(machine: Machine, cuda: int) -> None:
    """Raises SetupError if the machine has a GPU that torch for this CUDA version cannot use."""
    needed = MINIMUM_DRIVER[cuda]
    if machine.gpu_problem is not None:
        raise SetupError(
            f"{machine.gpu_problem}\nRemedy: repair or install the NVIDIA driver ({needed} or newer; in a container, "
            f"start it with the GPU), or {TAKE_CPU}."
        )
    if machine.gpu is not None and machine.gpu.driver_major < needed:
        takes_cuda12 = cuda == 13 and machine.gpu.driver_major >= MINIMUM_DRIVER[12]
        raise SetupError(
            f"{machine.gpu.name} has NVIDIA driver {machine.gpu.driver}; torch for CUDA {cuda} needs {needed} or "
            f"newer.\nRemedy: upgrade the driver, or {TAKE_CUDA12 if takes_cuda12 else TAKE_CPU}."
        )


def install_commands(plan: Plan, python: Path, constraints: str) -> list[list[str]]:
    """Returns the pip commands, in order.

    By the lock files every file has a known digest. What builds comes first: pip would fetch it unchecked. Without them
    torch and torchvision come first if they have an index of their own.
    """
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if plan.locks:
        locked = [*pip, "--require-hashes", "--no-build-isolation", "--only-binary", ":all:", "--no-binary", SOURCES]
        build, *rest = plan.locks
        files = [part for name in rest for part in ("-r", name)]
        own = [*pip, "--no-deps", "--no-build-isolation", "-e", "."]
        return [[*locked, "-r", build], [*locked, *files], own]
    extras = ",".join(["dev", "docs", "mnist5k", plan.faiss_extra] + ([plan.dali_extra] if plan.dali_extra else []))
    everything = [*pip, "-c", "constraints.txt", "-e", f".[{extras}]"]
    if plan.torch_index is None:
        return [everything]
    # Only these two pins: the index may lack the other packages.
    pins = re.findall(r"^torch(?:vision)?==\S+", constraints, re.MULTILINE)
    return [[*pip, "--index-url", plan.torch_index, *pins], everything]


def check_installed(plan: Plan, found: dict[str, Any]) -> None:
    """Raises SetupError unless PROBE found the packages of the plan."""
    if plan.expects_gpu and found["cuda"] is None:
        raise SetupError(
            f"torch {found['torch']} was built without CUDA, but there is a GPU.\n"
            f"Remedy: `make setup TORCH_INDEX={CUDA13_INDEX}`, or {TAKE_CPU}."
        )
    if plan.expects_gpu and found["gpu"] is None:
        other = TAKE_CUDA12 if plan.cuda == 13 else f"`make setup TORCH_INDEX={PYPI}`, which needs driver 580 or newer"
        raise SetupError(
            f"torch {found['torch']} cannot use the GPU: {found['gpu_error']}\n"
            f"Remedy: upgrade the NVIDIA driver, or {other}, or {TAKE_CPU}."
        )
    if plan.torch_index is not None:
        major = int(found["cuda"].split(".")[0]) if found["cuda"] else None
        if major != plan.cuda:
            raise SetupError(
                f"torch {found['torch']} is not the build of {plan.torch_index}: another index in pip's own "
                "configuration (`pip config list`) won; take it out"
            )


def foundation(plan: Plan, root: Path) -> list[Any]:
    """Returns the values whose change requires a new .venv, as pip would keep the installed torch or its paths."""
    return [plan.torch_index, plan.dali_extra, plan.faiss_extra, list(sys.version_info[:2]), str(root)]


def stamp_key(plan: Plan, root: Path) -> str:
    """Returns a key that changes with the intended contents of .venv."""
    parts = [repr(foundation(plan, root)), repr(plan.expects_gpu)]
    parts += [(root / name).read_text() for name in ("setup.py", "constraints.txt", *plan.locks)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp(venv: Path) -> dict[str, Any]:
    """Returns the stamp of the last completed setup; empty if there is none."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if (venv / "bin" / "python").exists() else {}


def write_stamp(venv: Path, stamp: dict[str, Any]) -> None:
    temporary = venv / (STAMP + ".part")
    temporary.write_text(json.dumps(stamp, indent=1))
    temporary.replace(venv / STAMP)


def remembered_choice(venv: Path) -> str | None:
    """Returns the TORCH_INDEX of the last setup that began to install, even if it was killed."""
    try:
        return (venv / MARKER).read_text() or None
    except OSError:
        return None


def start_anew(venv: Path, run: Callable[..., Any]) -> None:
    """Makes an empty virtual environment in `venv`, which may be a link to a folder on another disk."""
    if venv.exists() and any(venv.iterdir()) and not (venv / MARKER).exists():
        raise SetupError(f"{venv} was not made by `make setup`; move it away, or `make clean` deletes it")
    venv.mkdir(exist_ok=True)
    (venv / MARKER).touch()
    for child in venv.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != MARKER:
            child.unlink()
    run([sys.executable, "-m", "venv", str(venv)])


def folder_bytes(folder: Path) -> int:
    """Returns the disk space of a folder in bytes, as du counts it."""
    return sum(
        os.lstat(os.path.join(place, name)).st_blocks * 512 for place, _, names in os.walk(folder) for name in names
    )


def run_command(command: Sequence[str], **options: Any) -> Any:
    """Runs subprocess.run; raises SetupError if the command fails."""
    print("$", *command, flush=True)
    try:
        return subprocess.run(command, check=True, **options)
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"{' '.join(command[:4])} ended with exit code {error.returncode}; its own message is above. "
            "Once that is solved, `make setup` starts anew."
        ) from None


def probe(plan: Plan, python: Path, run: Callable[..., Any]) -> dict[str, Any]:
    wants = ["cuda" if plan.expects_gpu else "no-cuda", "dali" if plan.dali_extra else "no-dali"]
    # Not from root, where mnclglf can be imported without being installed.
    answer = run([str(python), "-", *wants], cwd=python.parent, input=PROBE.encode(), stdout=subprocess.PIPE)
    return json.loads(answer.stdout.decode().splitlines()[-1])


def set_up(root: Path, machine: Machine, torch_index: str | None, run: Callable[..., Any] = run_command) -> None:
    """Brings root/.venv to the plan of `decide`. `torch_index` None keeps the last setup's choice, else PyPI."""
    venv = root / ".venv"
    python = venv / "bin" / "python"
    stamp = read_stamp(venv)
    torch_index = torch_index or remembered_choice(venv)
    plan = decide(machine, None if torch_index == PYPI else torch_index)
    key = stamp_key(plan, root)
    if stamp.get("key") == key:
        print(f".venv is up to date (torch {stamp['torch']}, {plan.dali_extra or 'no DALI'})")
        return
    start = time.perf_counter()
    describe(machine, plan)
    (venv / STAMP).unlink(missing_ok=True)
    if stamp.get("foundation") != foundation(plan, root):
        start_anew(venv, run)
    (venv / MARKER).write_text(plan.torch_index or "")
    for command in install_commands(plan, python, (root / "constraints.txt").read_text()):
        run(command, cwd=root)
    found = probe(plan, python, run)
    check_installed(plan, found)
    print(f"torch    {found['torch']}, {'runs on the GPU' if plan.expects_gpu else 'runs on the CPU'}")
    print(f"DALI     {found['dali'] or 'none'}")
    print(f".venv    {folder_bytes(venv) / 1e9:.1f} GB, done in {time.perf_counter() - start:.0f} s")
    write_stamp(venv, {"key": key, "foundation": foundation(plan, root), "torch": found["torch"]})


def describe(machine: Machine, plan: Plan) -> None:
    gpu = f"{machine.gpu.name}, driver {machine.gpu.driver}" if machine.gpu else machine.gpu_problem or "none"
    tested = "" if sys.version_info[:2] in TESTED_PYTHONS else " (not tested: {}.{})".format(*sys.version_info[:2])
    print(f"Python   {platform.python_version()}{tested}")
    print(f"CPU      {machine.cores} cores, bf16 instructions: {', '.join(machine.bf16_flags) or 'none'}")
    print(f"GPU      {gpu}")
    print(
        f"install  torch from {plan.torch_index or 'PyPI'}, extras: {plan.dali_extra or 'no DALI'}, {plan.faiss_extra}"
    )
    if plan.locks:
        print(f"hashes   checked, by {', '.join(plan.locks)}")
    else:
        print("hashes   not checked: locks/ is for torch from PyPI on Linux on x86_64; constraints.txt in its place")
    for note in plan.notes:
        print(f"note     {note}")


def main(arguments: Sequence[str] | None = None) -> int:
    problem = python_problem(sys.version_info[:2], find_spec("ensurepip") is not None)
    if problem is not None:
        print(f"setup: {problem}", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(description="Makes .venv for this machine.")
    parser.add_argument("--torch-index", help=f"index of torch's wheels, ending in cu12x, cu13x or cpu; or {PYPI}")
    options = parser.parse_args(arguments)
    try:
        set_up(ROOT, look_at_machine(), options.torch_index or None)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; `make setup` starts anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
