"""The method behind a run directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mnclglf.config import RunConfig, require
from mnclglf.data.images import ImageSet
from mnclglf.methods import METHODS, Method
from mnclglf.runs.checkpoint import load_state


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


def load_trained(run: Path, checkpoint: Path | None = None) -> tuple[RunConfig, Method, int]:
    """Returns configuration, method and step of a run's newest (or given) checkpoint.

    Raises:
        CheckpointError: as `load_state`.
    """
    config, state = load_state(run, checkpoint)
    method = build_method(config, torch.float32)
    method.load_state_dict(state["method"])
    return config, method, state["step"]
