"""Files and lines at the start of a run: its settings, its machine, some views and the roofline step time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mnclglf.config import RunConfig, to_dict
from mnclglf.data.images import Pixels
from mnclglf.data.views import whole_views
from mnclglf.runs.arrays import open_arrays
from mnclglf.runs.environment import describe_environment
from mnclglf.runs.files import write_atomically, write_json
from mnclglf.training.start import Machine, Start, describe_backends, name_of
from mnclglf_kernels.backend import HAS_TRITON

PICTURED_IMAGES = 6  # in the report


def write_run_files(start: Start, out: Path, before: Mapping[str, Any]) -> None:
    """Writes config.json, environment.json and the report's views into the run directory, making it if missing.

    Args:
        start: the run.
        out: run directory.
        before: what was decided about the compiled step before the run was resumed; kept until it is decided anew.
    """
    out.mkdir(parents=True, exist_ok=True)
    loader = start.loader
    chosen = {
        "precision": name_of(start.machine.dtype),
        "loader": loader.name,
        "kernels": describe_backends(start.method.backends),
        "cuda_graphs": None,
        "deterministic": start.config.engine.deterministic,
        "image_side": start.data.side,
        "mean": loader.mean.tolist(),
        "std": loader.std.tolist(),
        "encoder": start.config.model.encoder,
        "initial_weights": start.initial_weights,
        "method": start.method.facts(),
        **before,
    }
    write_json(out / "config.json", to_dict(start.config))
    write_json(out / "environment.json", describe_environment(start.machine.device, chosen))
    images = start.data.train
    # Spread over the set: many data sets are sorted by class.
    pictured = np.linspace(0, len(images) - 1, PICTURED_IMAGES, dtype=np.int64)
    views = np.stack([view.cpu().numpy() for view in loader.render(pictured, epoch=0)])
    pixels = originals(images.read(pictured), start.data.side)
    write_atomically(
        out / "views.npz",
        lambda file: np.savez(file, images=pixels, views=views, mean=loader.mean, std=loader.std),
    )


def views_of(run: Path) -> NDArray[np.uint8]:
    """Returns the views of each image in a run's views.npz beside each other, [n, S, V S, 3]."""
    with open_arrays(run / "views.npz") as file:
        views = file["views"] * file["std"][:, None, None] + file["mean"][:, None, None]  # [V, n, 3, S, S]
    side = views.shape[-1]
    beside = (views.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 3, 0, 4, 2)
    return beside.reshape(len(beside), side, -1, 3)


def describe_limits(
    config: RunConfig, side: int, machine: Machine, say: Callable[[str], object]
) -> dict[str, float] | None:
    """Prints the roofline step time, the estimated memory and, on a GPU, the largest batch.

    Returns:
        The roofline time in seconds of each part of a step; None without triton, as the counts are of its kernels.
    """
    if not HAS_TRITON:
        return None
    from mnclglf.training.memory import largest_batch, step_memory
    from mnclglf.training.roofline import least_seconds_of_parts, peaks_of

    peaks = peaks_of(machine.device, machine.dtype, tf32=config.engine.tf32)
    least = least_seconds_of_parts(config, side, machine.dtype, peaks)
    say(
        f"roofline: {sum(least.values()):.3g} s per step ({peaks.name}, {peaks.flops / 1e12:.3g} TFLOP/s, "
        f"{peaks.memory_bytes / 1e9:.3g} GB/s)"
    )
    needed = step_memory(config, config.optim.batch_size, side, machine.dtype)
    text = (
        f"estimated memory per step: {needed.total / 2**30:.2g} GiB of tensors ({needed.activations / 2**30:.2g} GiB "
        "of activations)"
    )
    if machine.device.type == "cuda":  # a CPU's memory is shared, and a larger batch makes it no faster
        available = torch.cuda.get_device_properties(machine.device).total_memory
        fits = largest_batch(config, side, machine.dtype, available)
        text += f"; largest batch for {available / 2**30:.0f} GiB: about {fits:,}"
    say(text)
    return least


def originals(images: Pixels, side: int) -> NDArray[np.uint8]:
    """Returns images for the report, [n, H, W, 3]: unchanged if all have one size, else center crops of `side`."""
    if isinstance(images, np.ndarray):
        return images
    pixels = whole_views(images, side, np.zeros(3, np.float32), np.ones(3, np.float32), torch.float32)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
