"""A run directory: what config.json and environment.json hold, which checkpoint to take, the method behind it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mnclglf.config import RunConfig, from_dict, require, to_dict
from mnclglf.data.images import ImageSet
from mnclglf.methods import METHODS, Method
from mnclglf.runs.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from mnclglf.runs.files import write_atomically

FREE_TO_CHANGE = {"engine", "data.data_dir", "data.download", "data.loader", "data.loader_threads"}


def build_method(config: RunConfig, dtype: torch.dtype) -> Method:
    """The method of a run with fresh weights of its seed, on the CPU, in the memory format that `engine` asks for."""
    torch.manual_seed(config.seed)
    queue_dtype = torch.float32 if config.objective.queue_dtype == "float32" else dtype
    method = METHODS[config.method](config.model, config.objective, queue_dtype=queue_dtype)
    memory_format = torch.channels_last if config.engine.channels_last else torch.contiguous_format
    return method.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]  # torch's stub lacks it


def check_queue(config: RunConfig) -> None:
    """Raises ValueError where a batch does not fit into the queue of a method that has one."""
    batch, size = config.optim.batch_size, config.objective.queue_size
    require(
        batch <= size or "enqueue" not in METHODS[config.method].operators,
        f"batch_size {batch} is more than queue_size {size}: a step would overwrite its own rows; raise --queue-size "
        "or lower --batch-size",
    )


def with_classes(config: RunConfig, images: ImageSet) -> RunConfig:
    """The run with the number of classes that a labelled method tells apart, the data set's where none is given.

    Raises:
        ValueError: the images have no labels, or more classes than are given.
    """
    if not METHODS[config.method].labelled:
        return config
    require(
        images.labeled,
        f"{config.method} trains on labels, and {images.name} has none; give each class a subfolder of its own, or "
        "take another --method",
    )
    count, given = len(images.classes), config.model.classes
    require(given is None or given >= count, f"classes {given} are fewer than the {count} of {images.name}")
    return replace(config, model=replace(config.model, classes=given or count))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as readable JSON, whole or not at all."""
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_config(run: Path) -> RunConfig:
    """The configuration of a run directory.

    Raises:
        FileNotFoundError, ValueError: there is no config.json, or it does not hold a configuration.
    """
    path = run / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; mnclglf train --out {run} makes a run there")
    try:
        return from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """Settings that differ and change what is computed, as `name: saved -> asked`."""

    def flatten(config: RunConfig) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in to_dict(config).items():
            if name not in FREE_TO_CHANGE:
                flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        return {name: value for name, value in flat.items() if name not in FREE_TO_CHANGE}

    before, now = flatten(saved), flatten(asked)
    return [f"{name}: {before[name]} -> {now[name]}" for name in before if before[name] != now[name]]


def changed_settings(checkpoint: Path, state: dict[str, Any], asked: RunConfig) -> list[str]:
    """The `differences` from what a checkpoint was trained with.

    Raises:
        CheckpointError: it holds settings that this version does not know.
    """
    try:
        return differences(from_dict(json.loads(state["config"])), asked)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} holds settings that this version does not know: {error}") from error


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: the newest of `run` for "auto", none for "never", else the path given.

    Raises:
        CheckpointError: "never" in a directory that holds a run, or a path where no file is.
    """
    own = list_checkpoints(run / "checkpoints")
    if resume == "auto":
        return own[-1][1] if own else None
    if resume == "never":
        if own:
            raise CheckpointError(
                f"{run} holds a run of {own[-1][0]} steps; go on with --resume auto, or choose another --out"
            )
        return None
    path = Path(resume)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is no file; --resume takes auto, never or a checkpoint, RUN/checkpoints/step-N.pt"
        )
    return path


def load_trained(run: Path, checkpoint: Path | None = None) -> tuple[RunConfig, Method, int]:
    """Configuration, method and step of a run's newest (or given) checkpoint.

    Raises:
        CheckpointError: the run has no checkpoint, it is damaged, or the one given is not there or another run's.
    """
    config, own = read_config(run), f"give one of {run / 'checkpoints'}"
    path = checkpoint or find_checkpoint(run, "auto")
    if path is None:
        raise CheckpointError(f"{run} has no checkpoint yet; train it with mnclglf train --out {run}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; {own}")
    state = load_checkpoint(path)
    changed = changed_settings(path, state, config)
    if changed:
        raise CheckpointError(f"{path} is not of {run}, which has other settings ({'; '.join(changed)}); {own}")
    method = build_method(config, torch.float32)
    method.load_state_dict(state["method"])
    return config, method, state["step"]


def describe_environment(device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Versions, machine and commit of this process, and `settings` as chosen for the run."""
    packages = ["torch", "torchvision", "triton", "numpy", "scikit-learn", "nvidia-dali-cuda130", "nvidia-dali-cuda120"]
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in packages}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "packages": dict(sorted(installed.items())),
        "system": platform.platform(),
        "device": gpu or f"CPU, {os.cpu_count()} cores, {torch.cpu.get_capabilities().get('cpu_name', 'unknown')}",
        "torch_threads": torch.get_num_threads(),
        "commit": _commit(),
        **settings,
    }


def _commit() -> str | None:
    """The commit of the checkout this code runs from; None where it is installed from a package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
