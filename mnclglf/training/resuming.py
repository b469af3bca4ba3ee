"""What a run starts from: its settings, and the checkpoint in its directory, which rank 0 reads for all ranks."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mnclglf.config import RunConfig, from_dict, split_name, to_dict
from mnclglf.data.images import Statistics
from mnclglf.runs.checkpoint import find_checkpoint, load_checkpoint, newest_whole
from mnclglf.runs.files import check_writable, list_checkpoints
from mnclglf.runs.locks import training_in
from mnclglf.runs.loggers import check_loggers
from mnclglf.training.extension import with_extension
from mnclglf.training.ranks import Ranks
from mnclglf.training.start import saved_statistics


class Found(NamedTuple):
    """What a run directory holds at the start of a training in it."""

    config: RunConfig
    """The settings asked for, with the epochs that the run was extended from."""
    newest: list[tuple[int, Path]]
    """Step and path of the newest checkpoint in the directory; empty without one."""
    checkpoint: Path | None
    """Checkpoint to resume from."""
    state: dict[str, Any] | None
    """What is in it."""
    statistics: Statistics | None
    """Mean and deviation of the images as the run had them before."""
    damaged: Mapping[Path, str] = {}  # read only
    """Checkpoints later than `checkpoint` that are damaged, and how."""


def find_run(out: Path, config: RunConfig, resume: str, *, extend: bool, ranks: Ranks) -> Found:
    """Looks into a run directory before any work is done; rank 0 does, and sends the others what it found.

    So only the first machine needs to see the directory. The place of the images may differ.

    Raises:
        UsageError: ranks were started with other settings.
        RankError: rank 0 could not read the directory.
        CheckpointError, TakenError, ValueError: as `mnclglf train` says.
    """
    if ranks.count == 1:
        return look_into(out, config, resume, extend=extend)
    ranks.require_equal("set of settings", json.dumps(_shared(config)), "start every rank with the same options")
    found: list[Found] = []

    def pack() -> bytes:
        found.append(look_into(out, config, resume, extend=extend))
        mean_and_deviation = [] if found[0].statistics is None else [*map(torch.from_numpy, found[0].statistics)]
        buffer = io.BytesIO()
        sent = {"config": json.dumps(to_dict(found[0].config)), "checkpoint": str(found[0].checkpoint or "")}
        torch.save({**sent, "state": found[0].state, "statistics": mean_and_deviation}, buffer)
        return buffer.getvalue()

    sent = ranks.from_first(pack)
    return found[0] if found else _unpacked(sent, config)


def look_into(out: Path, config: RunConfig, resume: str, *, extend: bool) -> Found:
    """Does what `find_run` says, for a run of one process."""
    checkpoints = out / "checkpoints"
    check_loggers(config.engine.loggers)
    check_writable(checkpoints, "give another --out")
    if checkpoints.is_dir():
        with training_in(out):  # raises now if another process holds it; Trainer.train takes it for the whole training
            pass
    newest = list_checkpoints(checkpoints)[-1:]
    # Read first, so that a damaged checkpoint is reported before a minute of work.
    damaged: dict[Path, str] = {}
    if resume == "auto":
        checkpoint, state, damaged = newest_whole(out)
    else:
        checkpoint = find_checkpoint(out, resume)
        state = None if checkpoint is None else load_checkpoint(checkpoint)
    config = with_extension(config, state, out, extend=extend)
    statistics = None
    if checkpoint is not None and state is not None:
        statistics = saved_statistics(checkpoint.resolve().parents[1], state)
    return Found(config, newest, checkpoint, state, statistics, damaged)


def _unpacked(sent: bytes, own: RunConfig) -> Found:
    """Returns what rank 0 found, with this rank's own place of the images."""
    packed = torch.load(io.BytesIO(sent), map_location="cpu", weights_only=True)
    config = from_dict(json.loads(packed["config"]))
    config = replace(config, dataset=own.dataset, data=replace(config.data, data_dir=own.data.data_dir))
    checkpoint = Path(packed["checkpoint"]) if packed["checkpoint"] else None
    statistics = tuple(x.numpy() for x in packed["statistics"])
    return Found(config, [], checkpoint, packed["state"], statistics or None)  # pyright: ignore[reportArgumentType]


def _shared(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that all ranks must have alike: all but the place of the images."""
    settings = to_dict(config)
    del settings["data"]["data_dir"]
    prefix, _ = split_name(config.dataset)
    settings["dataset"] = prefix or config.dataset
    return settings
