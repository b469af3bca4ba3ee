"""Checkpoints: written whole or not at all, checked before they are read, and only the newest and milestones kept."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from mnclglf.config import FOLDER, RunConfig, from_dict
from mnclglf.runs.files import differences, read_config, read_object, write_atomically, write_json

FORMAT = 1
MILESTONES = "milestones.json"  # beside the checkpoints: the steps whose checkpoints are never deleted


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file and the remedy."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, path) of every checkpoint in `folder`, oldest first."""
    found = ((re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in folder.glob("step-*.pt"))
    return sorted((int(match[1]), path) for match, path in found if match)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` as the checkpoint after `step` steps.

    Raises:
        CheckpointError: the file cannot be written, e.g. on a full disk; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, "step": step, **state}, file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Free space or choose another --out") from error
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint after checking every byte against its checksums; runs no code from the file.

    Raises:
        CheckpointError: the file is missing, damaged, or in another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file")
    remedy = "delete it to resume from an earlier one"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values; {remedy}") from error
    except Exception as error:  # a damaged file raises anything: OSError, zlib.error, KeyError, ...
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {found}, this version reads {FORMAT}")
    return state


def changed_settings(checkpoint: Path, state: dict[str, Any], asked: RunConfig) -> list[str]:
    """Returns the `differences` between a checkpoint's settings and those asked for.

    Two folders of images count as one here: images are compared by what they are, not by their place.

    Raises:
        CheckpointError: the checkpoint holds settings that this version does not know.
    """
    try:
        saved = from_dict(json.loads(state["config"]))
        if saved.dataset.startswith(FOLDER) and asked.dataset.startswith(FOLDER):
            saved = replace(saved, dataset=asked.dataset)
        return differences(saved, asked)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} holds settings that this version does not know: {error}") from error


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """Returns the checkpoint to resume from: the newest in `run` for "auto", None for "never", else the given path.

    Raises:
        CheckpointError: `run` holds a run and "never" was given, or there is no file at the path.
    """
    own = list_checkpoints(run / "checkpoints")
    if resume == "auto":
        return own[-1][1] if own else None
    if resume == "never":
        if own:
            raise CheckpointError(
                f"{run} holds a run of {own[-1][0]} steps; resume it with --resume auto, or choose another --out"
            )
        return None
    path = Path(resume)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is no file; --resume takes auto, never or a checkpoint, RUN/checkpoints/step-N.pt"
        )
    return path


def load_state(run: Path, checkpoint: Path | None = None) -> tuple[RunConfig, dict[str, Any]]:
    """Returns a run's configuration and the state in its newest (or given) checkpoint.

    Raises:
        CheckpointError: the run has no checkpoint, it is damaged, or the given one is missing or from another run.
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
    return config, state


def list_milestones(folder: Path, milestone_steps: int | None = None) -> list[Path]:
    """Returns the milestones in `folder`, oldest first.

    Args:
        folder: folder of the checkpoints.
        milestone_steps: steps between two milestones, for a run of an earlier version, which did not record them.

    Raises:
        ValueError: milestones.json is damaged.
    """
    recorded = read_milestones(folder)
    return [
        path
        for step, path in list_checkpoints(folder)
        if (bool(milestone_steps) and step % milestone_steps == 0 if recorded is None else step in recorded)
    ]


def read_milestones(folder: Path) -> set[int] | None:
    """Returns the steps that were promised to be kept; None if the run has no record of them.

    Raises:
        ValueError: milestones.json is damaged; the message names the remedy.
    """
    path = folder / MILESTONES
    remedy = 'write the steps to keep into it, as {"steps": [400, 800]}, or remove it and give --keep-every'
    try:
        content = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if content is None:
        return None
    steps = content.get("steps")
    if not isinstance(steps, list) or not all(type(step) is int for step in cast("list[object]", steps)):
        raise ValueError(f"{path} is damaged: steps {steps!r} are no list of whole numbers; {remedy}")
    return set(cast("list[int]", steps))


def record_milestones(folder: Path, steps: Iterable[int]) -> None:
    """Adds steps to those whose checkpoints are never deleted, whatever --keep-every is given later."""
    recorded = read_milestones(folder)
    both = {*(recorded or ()), *steps}
    if both != recorded:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MILESTONES, {"steps": sorted(both)})


def delete_old_checkpoints(folder: Path, *, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` and the recorded milestones."""
    recorded = read_milestones(folder) or set()
    for step, path in list_checkpoints(folder)[:-keep_last]:
        if step not in recorded:
            path.unlink()
