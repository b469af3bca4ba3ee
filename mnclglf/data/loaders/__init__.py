"""Choice of a run's loader."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from mnclglf.config import LoaderName, ViewConfig
from mnclglf.data.images import ImageArray, ImageSet
from mnclglf.data.loader import Loader
from mnclglf.data.loaders import resident
from mnclglf.data.loaders.reference import ReferenceLoader
from mnclglf.data.loaders.resident import ResidentLoader
from mnclglf_kernels import Backend
from mnclglf_kernels.backend import first_line

logger = logging.getLogger(__name__)

_DALI_REMEDY = 'pip install "mnclglf[dali-cuda13]"'
FASTER_ON_CPU = 32  # largest side in pixels at which resident is faster than dali on a CPU
_WARM_UP_BATCHES, _TIMED_BATCHES = 3, 10


def make_loader(
    images: ImageSet,
    view: ViewConfig,
    *,
    backend: LoaderName,
    device: torch.device,
    side: int,
    augment_backend: Backend = "auto",
    **settings: Any,
) -> Loader:
    """Makes the loader of a run.

    Args:
        images: images to make views of.
        view: settings of a view.
        backend: name of the loader, or auto. auto on a CPU is resident up to 32 x 32, where it is faster (measured:
            docs/lab/performance.md), and dali above; on a GPU the faster of the two in a short trial; without DALI
            resident, or reference for images that resident cannot hold. Images too large for resident fall back to
            dali, with a warning.
        device: device of the batches.
        side: side of a view in pixels.
        augment_backend: backend of resident's operator.
        settings: other arguments of Loader.

    Raises:
        ValueError: there are fewer images than a batch holds.
        ImportError: backend is dali and DALI is not installed.
    """
    settings |= dict(device=device, side=side)
    unfit = resident.problem(images, side)
    if backend == "resident" and unfit is not None:
        logger.warning("loader resident cannot hold %s: %s; taking dali", images.name, unfit)
        backend = "dali"

    def make(name: str) -> Loader:
        if name == "dali":
            from mnclglf.data.loaders.dali import DaliLoader

            return DaliLoader(images, view, **settings)
        if name == "resident" and isinstance(images, ImageArray):
            return ResidentLoader(images, view, backend=augment_backend, **settings)
        return ReferenceLoader(images, view, **settings)

    if backend == "auto" and device.type == "cpu" and resident.problem(images, side, FASTER_ON_CPU) is None:
        return make("resident")
    if backend in ("reference", "resident"):
        return make(backend)
    missing = _dali_problem()
    if missing is not None and backend == "dali":
        raise ImportError(f"loader dali needs DALI ({missing}); install it: {_DALI_REMEDY}") from missing
    if missing is not None:
        instead = "reference" if unfit else "resident"
        logger.warning("DALI is not installed: using the loader %s; install it: %s", instead, _DALI_REMEDY)
        return make(instead)
    if backend == "auto" and device.type == "cuda" and unfit is None:
        return fastest({name: make(name) for name in ("dali", "resident")}, device)
    return make("dali")


def _dali_problem() -> ImportError | None:
    try:
        importlib.import_module("nvidia.dali")
    except ImportError as error:
        return error
    return None


def fastest(loaders: Mapping[str, Loader], device: torch.device) -> Loader:
    """Returns the loader that is fastest in a short trial; logs the rates, and the loaders that cannot run here.

    Raises:
        RuntimeError: no loader can run here.
    """
    rates: dict[str, float] = {}
    for name, loader in loaders.items():
        try:
            rates[name] = batches_per_second(loader, device)
        except RuntimeError as error:  # the driver is too old for DALI, or the memory is full
            logger.warning("loader %s cannot run here: %s", name, first_line(error))
    if not rates:
        raise RuntimeError(f"none of the loaders {', '.join(loaders)} can run on {device}; the reasons are above")
    chosen = max(rates, key=lambda name: rates[name])
    shown = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    logger.warning("loader %s: batches a second: %s", chosen, shown)
    return loaders[chosen]


def batches_per_second(loader: Loader, device: torch.device) -> float:
    """Measures the batches per second of a loader, without the first few."""
    since = 0.0
    for number, _ in enumerate(loader.batches(0, _WARM_UP_BATCHES + _TIMED_BATCHES)):
        if number + 1 == _WARM_UP_BATCHES:
            _wait_for(device)
            since = time.perf_counter()
    _wait_for(device)
    return _TIMED_BATCHES / (time.perf_counter() - since)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
