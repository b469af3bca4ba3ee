"""Checkpoints: written whole or not at all, checked before they are read, and only the newest and milestones kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from mnclglf.config import RunConfig, from_dict, split_name
from mnclglf.runs.files import (
    differences,
    list_checkpoints,
    naming,
    read_config,
    read_object,
    step_of,
    with_remedy,
    write_atomically,
    write_json,
)
from mnclglf.runs.torch_file import NotPlainError, check_archive, load_plain, read_comment

FORMATS = (1, 2)  # which are read; 1, of earlier versions, has no checksum, and the last is written
COMMENT = re.compile(rb"mnclglf checkpoint, format (\d+), sha256 ([0-9a-f]{64})")
MILESTONES = "milestones.json"  # beside the checkpoints: the steps whose checkpoints are never deleted


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file and the remedy."""


class DamagedError(CheckpointError):
    """A checkpoint is not the file that was written; an earlier one may serve."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Returns the path of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}.pt"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` as the checkpoint after `step` steps, with its checksum.

    Raises:
        CheckpointError: the file cannot be written, e.g. on a full disk; earlier checkpoints are untouched.
    """
    path = checkpoint_path(folder, step)
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run directory that vanished would be begun without its rest
        write_atomically(path, lambda file: _write(file, {"step": step, **state, "format": FORMATS[-1]}))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {with_remedy(error)}; or choose another --out") from error
    return path


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time: training goes on as soon as the state is copied to the host.

    As a context manager it waits for the last one at the end.
    """

    def __init__(self) -> None:
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(CheckpointError) if kind is not None else nullcontext():  # the first error is the one to show
            self.wait()

    def write(self, folder: Path, step: int, state: dict[str, Any], *, keep_last: int) -> None:
        """Begins to write a checkpoint, and then to delete the old ones; first waits for the one before.

        `state` may change as soon as this returns.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        executor = ThreadPoolExecutor(1, "checkpoint")
        self._writing = executor.submit(_save_and_delete, folder, step, _copied(state), keep_last)
        executor.shutdown(wait=False)  # its thread ends with the checkpoint

    def check(self) -> None:
        """Raises CheckpointError if a checkpoint could not be written; waits for none."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until no checkpoint is being written.

        Raises:
            CheckpointError: it could not be written, or an old one could not be deleted.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _save_and_delete(folder: Path, step: int, state: dict[str, Any], keep_last: int) -> None:
    save_checkpoint(folder, step, state)
    delete_old_checkpoints(folder, keep_last=keep_last)


def _copied(value: Any) -> Any:
    """Returns a copy of nested dicts, lists and tensors, with the tensors in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy(cast("dict[Any, Any]", value))  # keeps the _metadata of a state_dict
        copied.update({key: _copied(kept) for key, kept in copied.items()})
        return copied
    return [_copied(kept) for kept in cast("list[Any]", value)] if isinstance(value, list) else value


class _Hashing:
    """A file to write to that computes the SHA-256 of what is written, so that nothing is read again for it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Writes and hashes; both let other threads run."""
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Flushes the file."""
        self.file.flush()


def _write(file: BinaryIO, state: dict[str, Any]) -> None:
    """Writes what torch.save does; the comment of that zip archive holds format and checksum.

    The hash covers the bytes as torch.save wrote them, then the comment up to the checksum.
    """
    hashing = _Hashing(file)
    torch.save(state, cast(BinaryIO, hashing))
    comment = f"mnclglf checkpoint, format {FORMATS[-1]}, sha256 ".encode()
    hashing.hash.update(comment)
    comment += hashing.hash.hexdigest().encode()
    file.seek(-2, 1)  # the archive ends with the length of its comment, which is 0
    file.write(len(comment).to_bytes(2, "little") + comment)


def _checked_format(file: BinaryIO) -> int | None:
    """Returns the format of a checkpoint after comparing every byte with its checksum.

    A file without one, of an earlier version or written by torch.save, is compared with the checksums of the zip
    archive, which leave out its directory and padding.

    Returns:
        The format; None without a checksum.

    Raises:
        ValueError, zipfile.BadZipFile: they differ, or the file is no checkpoint.
    """
    comment = read_comment(file)
    if not comment:
        check_archive(file, checksums=True)
        return None
    match = COMMENT.fullmatch(comment)
    if match is None:
        raise ValueError("its end is not that of a checkpoint")
    checksum = hashlib.sha256()
    left = file.seek(-2 - len(comment), 2)
    file.seek(0)
    while left:
        part = file.read(min(left, 2**20))
        if not part:
            raise ValueError("it became shorter")
        checksum.update(part)
        left -= len(part)
    checksum.update(bytes(2) + comment[: match.start(2)])
    if checksum.hexdigest().encode() != match[2]:
        raise ValueError("its checksum differs")
    check_archive(file, checksums=False)
    return int(match[1])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint after checking every byte against its checksum; runs no code from the file.

    Raises:
        DamagedError: the file is not what was written.
        CheckpointError: the file is missing, cannot be read, holds something else, or is in another format.
    """
    ours = step_of(path) is not None  # else it is any file that was named for one, and not to be deleted
    another = "give a checkpoint, RUN/checkpoints/step-N.pt"
    if not path.is_file():
        remedy = "move it away to resume from an earlier one" if ours and path.exists() else another
        raise CheckpointError(f"{path} is no file; {remedy}")
    remedy = "delete it to resume from an earlier one" if ours else another
    found = None
    try:
        with naming(path), path.open("rb") as file:
            found = _checked_format(file)
            _require_known(path, found)
            state = load_plain(file)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {with_remedy(error)}") from error
    except NotPlainError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values ({error}); {remedy}") from error
    except Exception as error:  # a damaged file raises anything: zlib.error, KeyError, RuntimeError, ...
        kind = DamagedError if found is None else CheckpointError
        raise kind(f"{path} is damaged ({error}); {remedy}") from error
    _check_content(path, state)
    return state


def _require_known(path: Path, found: object) -> None:
    if found is not None and found not in FORMATS:
        raise CheckpointError(f"{path} has format {found}, this version reads {' and '.join(map(str, FORMATS))}")


# What of a checkpoint is used as it is; a checkpoint of an earlier version lacks some of it.
KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "config": str,
    "method": dict,
    "optimizer": dict,
    "scaler": dict,
    "images": str,
    "other_images": dict,
    "loader": str,
    "mean": Tensor,
    "std": Tensor,
    "side": int,
    "steps_per_epoch": int,
    "rng": Tensor,
    "cuda_rng": (Tensor, type(None)),
}


def _check_content(path: Path, state: object) -> None:
    """Raises CheckpointError if a checkpoint lacks its step, or holds a value of another kind than is used."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is no checkpoint of mnclglf: it holds a {type(state).__name__}")
    entries = cast("dict[str, Any]", state)
    _require_known(path, entries.get("format", "none"))
    wrong = [
        f"{name} is a {type(entries[name]).__name__}"
        for name, kind in KINDS.items()
        if name in entries and (not isinstance(entries[name], kind) or isinstance(entries[name], bool))
    ]
    if "step" not in entries:
        wrong.append("there is no step")
    least = {"step": 0, "side": 1, "steps_per_epoch": 1}
    wrong += [
        f"{name} is {entries[name]}"
        for name in least
        if not wrong and name in entries and not least[name] <= entries[name] < 2**53
    ]
    wrong += [
        f"{name} is not of 3 channels"
        for name in ("mean", "std")
        if not wrong and name in entries and entries[name].shape != (3,)
    ]
    if wrong:
        raise CheckpointError(f"{path} is no checkpoint of mnclglf: {'; '.join(wrong)}")


def load_method(method: nn.Module, state: dict[str, Any], source: Path) -> None:
    """Loads the networks of a checkpoint; nothing is changed unless all of it fits.

    Raises:
        CheckpointError: names, shapes or dtypes differ from those that the settings describe, or a queue's pointer is
            outside the queue.
    """
    parameters = {name for name, _ in method.named_parameters()}

    def described(name: str, x: object) -> object:
        if not isinstance(x, Tensor):
            return type(x)
        # The dtype of a queue is that of the features: another one under another --precision.
        return tuple(x.shape), x.dtype if name in parameters or not x.is_floating_point() else "floats"

    saved, own = state.get("method", {}), method.state_dict()
    found = {str(name): described(str(name), x) for name, x in saved.items()}
    asked = {name: described(name, x) for name, x in own.items()}
    wrong = [
        f"{name} {found.get(name, 'missing')} for {asked.get(name, 'none')}"
        for name in {**asked, **found}
        if found.get(name) != asked.get(name)
    ]
    if wrong:
        raise CheckpointError(f"{source} holds other networks than its settings describe: {'; '.join(wrong[:3])}")
    for name, pointer in saved.items():
        rows = own.get(f"{name.removesuffix('pointer')}rows")
        # A kernel writes where the pointer says, and does not check it.
        if name.endswith(".pointer") and rows is not None and not 0 <= int(pointer) < len(rows):
            raise CheckpointError(
                f"{source} holds {name} {int(pointer)}, outside 0..{len(rows) - 1}; give another checkpoint"
            )
    method.load_state_dict(saved)


def changed_settings(checkpoint: Path, state: dict[str, Any], asked: RunConfig) -> list[str]:
    """Returns the `differences` between a checkpoint's settings and those asked for.

    Two places of images, as two folders, count as one here: images are compared by what they are.

    Raises:
        CheckpointError: the checkpoint holds settings that this version does not know.
    """
    try:
        saved = from_dict(json.loads(state["config"]))
        saved = as_extended(saved, asked)
        before, now = split_name(saved.dataset)[0], split_name(asked.dataset)[0]
        if before and before == now:
            saved = replace(saved, dataset=asked.dataset)
        return differences(saved, asked)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{checkpoint} holds settings that this version does not know: {error}") from error


def as_extended(saved: RunConfig, asked: RunConfig) -> RunConfig:
    """Returns a checkpoint's settings with the epochs of a run that it was extended to; others as they are."""
    before, now = saved.optim, asked.optim
    if (*before.extended_from, before.epochs) != now.extended_from[: len(before.extended_from) + 1]:
        return saved
    return replace(saved, optim=replace(before, epochs=now.epochs, extended_from=now.extended_from))


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


def newest_whole(run: Path) -> tuple[Path | None, dict[str, Any] | None, dict[Path, str]]:
    """Returns the newest checkpoint in `run` that is whole, what is in it, and the later ones with their damage.

    Raises:
        CheckpointError: there are checkpoints and none is whole, or the newest whole one cannot be read or used.
    """
    damaged: dict[Path, str] = {}
    for _, path in reversed(list_checkpoints(run / "checkpoints")):
        try:
            return path, load_checkpoint(path), damaged
        except DamagedError as error:
            damaged[path] = str(error.__cause__)
    if damaged:
        found = "; ".join(f"{path.name}: {problem}" for path, problem in damaged.items())
        raise CheckpointError(
            f"{run / 'checkpoints'} holds damaged checkpoints only ({found}); put a copy of one back, or choose "
            "another --out"
        )
    return None, None, damaged


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
        folder.mkdir(exist_ok=True)
        write_json(folder / MILESTONES, {"steps": sorted(both)})


def delete_old_checkpoints(folder: Path, *, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` and the recorded milestones.

    Raises:
        CheckpointError: one cannot be deleted.
        ValueError: milestones.json is damaged.
    """
    recorded = read_milestones(folder) or set()
    for step, path in list_checkpoints(folder)[:-keep_last]:
        if step not in recorded:
            try:
                path.unlink(missing_ok=True)  # somebody else may have deleted it meanwhile
            except OSError as error:
                raise CheckpointError(f"{path} cannot be deleted: {error}; remove it by hand") from error
