"""How long the missing runs of a table will train on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from mnclglf.config import RunConfig
from mnclglf.data.images import ImageSet, view_side
from mnclglf.reproduce.plan import Run
from mnclglf.reproduce.results import limit_shares, steps_done
from mnclglf.training.device import autocast_dtype, choose_device
from mnclglf.training.schedule import Schedule
from mnclglf_kernels.backend import HAS_TRITON

ASSUMED_SHARE = 0.6  # of the machine's limit, until a run of the folder is finished


def expected_share(runs: Path) -> tuple[float, str]:
    """Share of the machine's limit that steps are taken to reach, and where that is from."""
    shares = limit_shares(runs)
    if shares:
        return statistics.median(shares), f"as the {len(shares)} finished runs in the folder did"
    return ASSUMED_SHARE, "an assumption until a run is finished"


def training_hours(run: Run, runs: Path, images: Mapping[str, ImageSet], share: float) -> float | None:
    """Hours of the steps that the run has before it, evaluation not counted; None where the limit is not known.

    Args:
        run: which.
        runs: folder of the run directories.
        images: what each data set pre-trains on.
        share: of the machine's limit.
    """
    if not HAS_TRITON:  # the counts are those of its kernels
        return None
    config, trained_on = run.config, images[run.config.dataset]
    schedule = Schedule.of(config, len(trained_on) // config.optim.batch_size)
    steps = schedule.total_steps - steps_done(runs / run.name)
    return steps * _least_seconds(replace(config, seed=0), view_side(trained_on, config.data.image_size)) / share / 3600


@cache
def _least_seconds(config: RunConfig, side: int) -> float:
    """Of a step on this machine."""
    from mnclglf.training.roofline import least_seconds, peaks_of  # with triton, which not every system has

    device = choose_device(config.engine)
    dtype = autocast_dtype(config.engine, device)
    return least_seconds(config, side, dtype, peaks_of(device, dtype, tf32=config.engine.tf32))
