"""Whether a run's forward is compiled, and replayed as CUDA graphs: decided once, and said."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Literal, ParamSpec, cast

import torch

from mnclglf.config import EngineConfig
from mnclglf.methods import Losses
from mnclglf.runs.files import cache_folder, write_atomically
from mnclglf_kernels.backend import HAS_TRITON

Compile = Literal["off", "on", "graphs"]
P = ParamSpec("P")


def choose_compile(engine: EngineConfig, device: torch.device, say: Callable[[str], object]) -> Compile:
    """What becomes of a run's forward: eager, compiled, or compiled and replayed as CUDA graphs.

    Args:
        engine: `compile` and `graphs` are what is asked for.
        device: of the run.
        say: told why nothing is compiled though it was to be.
    """
    if engine.compile == "off" or (engine.compile == "auto" and not compiles_by_itself(engine, device)):
        return "off"
    problem = compiler_problem(device)
    if problem is not None:
        say(f"not compiling, the step stays eager: {problem}")
        return "off"
    if engine.graphs == "on":
        return "graphs"
    replays = engine.graphs == "auto" and engine.lookup == "auto" and device.type == "cuda" and graphs_proven(device)
    return "graphs" if replays else "on"


def compiles_by_itself(engine: EngineConfig, device: torch.device) -> bool:
    """Whether "auto" compiles: on a GPU. On a CPU minutes buy nothing: convolutions are 87% of a step."""
    return device.type == "cuda" and not engine.activation_checkpointing


def compiler_problem(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, or None: a C compiler for Triton on a GPU, a C++ one on a CPU."""
    if device.type == "cuda" and not HAS_TRITON:
        return "the package triton is not installed"
    names = (os.environ.get("CC"), "gcc", "clang") if device.type == "cuda" else (os.environ.get("CXX", "g++"),)
    if not any(shutil.which(name) for name in names if name):
        wanted = "a C compiler (apt install gcc)" if device.type == "cuda" else "a C++ compiler (apt install g++)"
        return f"torch.compile needs {wanted}, and there is none on the PATH"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "torch.compile needs Python's headers (apt install python3-dev), and there is no Python.h"
    return None


def or_eager(
    forward: Callable[P, Losses], eager: Callable[P, Losses], say: Callable[[str], object]
) -> Callable[P, Losses]:
    """A compiled forward that gives way to the eager one, and says so, where its first call cannot be compiled."""
    chosen = forward

    def run(*args: P.args, **kwargs: P.kwargs) -> Losses:
        nonlocal chosen
        from torch._dynamo.exc import TorchDynamoException  # a second, which an eager run need not wait for

        try:
            return chosen(*args, **kwargs)
        except TorchDynamoException as error:
            if chosen is eager:
                raise
            say(f"torch.compile failed, the step stays eager: {' '.join(str(error).split()[:40])}")
            chosen = eager
            return chosen(*args, **kwargs)

    return run


def graphs_proven(device: torch.device) -> bool:
    """Whether `make gpu-report` has passed on this GPU with these versions."""
    return machine(device) in _proven()


def remember_proof(device: torch.device) -> None:
    """Keeps that `make gpu-report` has passed on this machine."""
    path = proof_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sorted({*_proven(), machine(device)}), indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def proof_path() -> Path:
    """Where it is kept."""
    return cache_folder() / "gpu-report.json"


def machine(device: torch.device) -> str:
    """What a proof holds for: this GPU with these versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def _proven() -> set[str]:
    try:
        found = json.loads(proof_path().read_text())
    except (OSError, ValueError):  # not there, or not whole: nothing is proven, and the next report writes it anew
        return set()
    return set(cast("list[str]", found)) if isinstance(found, list) else set()
