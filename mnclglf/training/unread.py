"""Settings that a run does not read, for a word to the user who gave them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from mnclglf.config import PLACED, TIMM, ModelConfig, ObjectiveConfig, RunConfig, ViewConfig, require
from mnclglf.methods import Method, method_of

PROBED = {"lambda_", "k", "one_embedding", "temperature", "queue_size", "projector_width", "predictor_width", "classes"}
"""Settings of model and objective that a method reads itself, or does not."""


class _Reads:
    """Settings that note the names of the fields that are read."""

    def __init__(self, settings: ModelConfig | ObjectiveConfig, read: set[str]) -> None:
        self._settings, self._read = settings, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._settings, name)


def unread_settings(config: RunConfig, given: set[str]) -> dict[str, str]:
    """Returns those of the given settings that have no effect on a run, each with the setting that rules it out.

    Raises:
        UsageError: stem or width is given, and the encoder is timm's.
    """
    refused = [name for name in ("stem", "width") if name in given and config.model.encoder.startswith(TIMM)]
    require(
        not refused, f"{' and '.join(refused)} is of our ResNets, and encoder is {config.model.encoder}; leave it out"
    )
    unread = _unread_views(config.view) | _unread_elsewhere(config)
    if given & (PROBED | {"ema_momentum", "ema_schedule", "queue_dtype", "lookup"}):
        unread |= _unread_by_method(config)
    return {name: why for name, why in unread.items() if name in given}


def _unread_by_method(config: RunConfig) -> dict[str, str]:
    reads, method = _method_reads(config)
    here = f"method {config.method}"
    unread = dict.fromkeys(sorted(PROBED - reads), here)
    if not hasattr(method, "momentum") and type(method).after_step is Method.after_step:
        unread |= dict.fromkeys(("ema_momentum", "ema_schedule"), here)
    if "enqueue" not in method.operators:
        unread["queue_dtype"] = here
    if "nearest_neighbor" not in method.operators:
        unread["lookup"] = here
    return unread


def _method_reads(config: RunConfig) -> tuple[set[str], Method]:
    """Returns the settings that a small form of the method reads as it is made and in a forward, and the method."""
    read: set[str] = set()
    side, images = 16, 2
    model = replace(
        config.model,
        encoder="resnet18",
        init=None,
        width=1,
        projector_width=8,
        predictor_width=8,
        classes=config.model.classes or 2,
    )
    objective = replace(config.objective, queue_size=8)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # the run's own random numbers stay as they are
        method = method_of(config.method)(
            cast(ModelConfig, _Reads(model, read)), cast(ObjectiveConfig, _Reads(objective, read)), backend="torch"
        ).train()
        views = torch.rand(method.views * images, 3, side, side)
        method(views, torch.zeros(images, dtype=torch.int64) if method.needs_labels else None)
    return read, method


def _unread_views(view: ViewConfig) -> dict[str, str]:
    unread: dict[str, str] = {}
    if view.jitter_probability == 0:
        unread |= dict.fromkeys(("brightness", "contrast", "saturation", "hue"), "jitter_probability 0")
    if view.blur_probability == 0:
        unread |= dict.fromkeys(("blur_sigma", "blur_kernel"), "blur_probability 0")
    return unread


def _unread_elsewhere(config: RunConfig) -> dict[str, str]:
    unread: dict[str, str] = {}
    if config.engine.precision in ("bf16", "fp16"):
        unread["tf32"] = f"precision {config.engine.precision}"
    if config.engine.device == "cpu":
        unread |= dict.fromkeys(("tf32", "cudnn_benchmark", "combo_kernels", "choices"), "device cpu")
    elif config.engine.compile == "off":
        unread["choices"] = "compile off"
    if config.engine.device == "cuda":
        unread["keep_memory"] = "device cuda"
    if not config.dataset.startswith(PLACED):
        unread["skip_corrupt"] = f"dataset {config.dataset}"
    return unread
