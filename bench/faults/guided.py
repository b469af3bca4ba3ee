"""Reads inputs that atheris makes: it changes a valid file, and keeps what reaches new lines of mnclglf.

    pip install atheris
    python -m bench.faults.guided [KIND ...] [--seconds S] [--seed N]

A kind is one of `subjects`; all without any. Each input must be read, or refused in words, within 20 s and
1 GiB; what is not ends its kind with a traceback, and is kept in the working directory as crash-*, timeout-* or oom-*.
Atheris is no dependency: it is there for Linux and for some Pythons only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image

LIMITS = ["-timeout=20", "-rss_limit_mb=1024", "-max_len=4096"]


def fuzz(kind: str, folder: Path, seconds: int, seed: int) -> None:
    """Reads inputs of a kind until the time is up; ends the process, with another status than 0 if one was lost."""
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=["mnclglf"]):
        whole, name, read = subjects()[kind]
    Image.MAX_IMAGE_PIXELS = 2**20
    torch.set_num_threads(1)
    inputs, path = folder / "inputs", folder / "inside" / name
    inputs.mkdir()
    path.parent.mkdir(parents=True)
    (inputs / "whole").write_bytes(whole)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    limits = [*LIMITS, f"-max_total_time={seconds}", f"-seed={seed}"]
    atheris.Setup([kind, str(inputs), *limits], one_input(path, read))
    atheris.Fuzz()


def subjects() -> dict[str, tuple[bytes, str, Callable[[Path], object]]]:
    """Returns, by kind, valid contents, the name of the file, and its reader. Atheris has to see what it imports."""
    from bench.faults.bombs import read_metrics
    from bench.faults.corpus import READERS
    from mnclglf.config import to_dict
    from mnclglf.recipes import RECIPES
    from mnclglf.runs.checkpoint import load_checkpoint, save_checkpoint
    from mnclglf.runs.results import VERSION, load_results
    from mnclglf.settings import run_config
    from mnclglf.training.initial_weights import read_pickle

    results = json.dumps({"version": VERSION, "results": []}).encode()
    settings = json.dumps(to_dict(RECIPES["quick"]("mnclglf", "digits"))).encode()
    with tempfile.TemporaryDirectory() as folder:
        state = {"config": settings.decode(), "method": {"weight": torch.zeros(4)}, "side": 16}
        checkpoint = save_checkpoint(Path(folder), 4, state).read_bytes()
        torch.save(state["method"], weights := Path(folder) / "weights.pt")
        saved = weights.read_bytes()
    return {
        **READERS,
        "settings, YAML": (b"method: byol\noptim: {epochs: 4, lr: 0.1}\n", "run.yaml", lambda p: run_config({}, p)),
        "settings, JSON": (settings, "run.json", lambda p: run_config({}, p)),
        "metrics": (b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n', "metrics.jsonl", read_metrics),
        "results": (results, "evaluation.json", load_results),
        "checkpoint": (checkpoint, "step-00000004.pt", load_checkpoint),
        "initial weights": (saved, "weights.pt", read_pickle),
    }


def one_input(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], None]:
    """Returns what reads one input; it raises what no reader may raise."""
    from mnclglf.commands.ranks import exit_code_of

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except Exception as error:
            if exit_code_of(error) is None or isinstance(error, RecursionError | UnicodeError | MemoryError):
                raise

    return one


def main() -> int:
    """Prints a table of the kinds; returns 1 if an input was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--seconds", type=int, default=60, help="for each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        (kind,) = arguments.kinds
        fuzz(kind, arguments.folder, arguments.seconds, arguments.seed)
    kinds = arguments.kinds or [*subjects()]
    print("| input | tried | kept as new | lost |\n|---|--:|--:|---|")
    lost = 0
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--folder", folder, "--seconds", str(arguments.seconds), "--seed", str(arguments.seed)]
            command = [sys.executable, "-m", "bench.faults.guided", kind, *options]
            ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
            tried = re.findall(r"^#(\d+)\s.*?corp: (\d+)", ended.stderr, re.MULTILINE)
            count, kept = tried[-1] if tried else ("0", "0")
            lost += ended.returncode != 0
            told = "nothing" if ended.returncode == 0 else f"status {ended.returncode}"
            print(f"| {kind} | {int(count):,} | {kept} | {told} |", flush=True)
            if ended.returncode:
                print(ended.stdout[-3000:], ended.stderr[-3000:])
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
