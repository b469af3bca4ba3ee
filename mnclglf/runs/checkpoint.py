"""Checkpoints: written whole or not at all, checked before they are read, and only the newest and milestones kept."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mnclglf.config import FOLDER, RunConfig, from_dict
from mnclglf.runs.files import differences, read_config, write_atomically

FORMAT = 1


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


def list_milestones(folder: Path, milestone_steps: int) -> list[Path]:
    """Returns the checkpoints after a multiple of `milestone_steps` steps, oldest first."""
    return [path for step, path in list_checkpoints(folder) if step % milestone_steps == 0]


def delete_old_checkpoints(folder: Path, *, keep_last: int, milestone_steps: int | None) -> None:
    """Deletes all but the newest `keep_last` and the milestones (steps that are multiples of `milestone_steps`)."""
    for step, path in list_checkpoints(folder)[:-keep_last]:
        if milestone_steps is None or step % milestone_steps:
            path.unlink()
