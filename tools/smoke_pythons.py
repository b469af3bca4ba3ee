"""Runs a short training with each other Python of this machine, and says which versions were not run.

`.ci/run` runs it with .venv's Python, whose version has the whole suite. Each of the others gets a clone of the last
commit with its own .venv: setup, import, training, k-NN, the interpreted tests of one kernel, and every command from
the built wheel. That takes minutes and 7 GB in TMPDIR each, deleted after it. The Pythons are those that
tools/find_python.sh finds on PATH, and before them those that the variable MNCLGLF_PYTHONS names, separated by colons.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")  # those of tools/find_python.sh
NAMES = "MNCLGLF_PYTHONS"
ASK_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"

STEPS = (
    (".venv/bin/python", "-c", "import mnclglf, mnclglf_kernels"),
    (".venv/bin/mnclglf", "train", "--dataset", "digits", "--recipe", "quick", "--epochs", "1", "--out", "runs/smoke"),
    (".venv/bin/mnclglf", "knn", "runs/smoke"),
    (".venv/bin/python", "-m", "pytest", "-q", "tests/kernels/ops/test_combine.py"),
    # Each command from the built wheel, in a fresh environment; and the wheel of the operators alone.
    (".venv/bin/python", "-m", "pytest", "-q", "-m", "slow", "tests/test_wheel.py"),
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def find_pythons(named: str, run: Run = subprocess.run) -> dict[str, str]:
    """Returns the path of the first Python of each version: those of `named`, then those on PATH."""
    found = run(["/bin/sh", "tools/find_python.sh", "--all"], cwd=ROOT, capture_output=True, text=True, check=True)
    pythons: dict[str, str] = {}
    for path in [*filter(None, named.split(os.pathsep)), *found.stdout.splitlines()]:
        version = run([path, "-c", ASK_VERSION], capture_output=True, text=True, check=True).stdout.strip()
        pythons.setdefault(version, path)
    return pythons


def smoke(python: str, folder: Path, run: Run = subprocess.run) -> str | None:
    """Returns the first step that fails with this Python, or None; works in a clone in `folder`."""
    clone = folder / "clone"
    # The variables of a `make` that runs this would be those of the inner one too.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    steps = [
        (["git", "clone", "--quiet", str(ROOT), str(clone)], folder),
        (["make", "setup", f"PYTHON={python}"], clone),
        *((list(step), clone) for step in STEPS),
    ]
    for command, place in steps:
        print("$", *command, flush=True)
        if run(command, cwd=place, env=environment, check=False).returncode != 0:
            return " ".join(command)
    return None


def main(run: Run = subprocess.run, own: str = "{}.{}".format(*sys.version_info[:2])) -> int:
    try:
        pythons = find_pythons(os.environ.get(NAMES, ""), run)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"smoke: a Python does not run ({error}); correct {NAMES}", file=sys.stderr)
        return 1
    results = {own: "the whole suite"}
    for version in sorted(set(pythons) - {own}, key=lambda text: [int(part) for part in text.split(".")]):
        print(f"\nPython {version}: {pythons[version]}", flush=True)
        with tempfile.TemporaryDirectory(prefix="mnclglf-smoke-") as folder:
            failed = smoke(pythons[version], Path(folder), run)
        results[version] = f"FAILED: {failed}" if failed else "smoke run passed"
    print()
    for version in sorted({*VERSIONS, *results}, key=lambda text: [int(part) for part in text.split(".")]):
        print(f"Python {version}: {results.get(version, f'not run; there is none here ({NAMES} may name one)')}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
