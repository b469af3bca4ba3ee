"""train --extend: a finished run that goes on to more epochs.

The learning rate is a closed form of the step and of all epochs of the run, so the further steps take that of the
longer run. It falls to 0 at the first end, rises once, and falls to 0 again. config.json keeps the earlier ends as
`extended_from`, so that the run resumes like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mnclglf.config import OptimConfig, RunConfig, from_dict, require
from mnclglf.runs.checkpoint import CheckpointError
from mnclglf.training.schedule import Schedule


def with_extension(config: RunConfig, state: Mapping[str, Any] | None, out: Path, *, extend: bool) -> RunConfig:
    """Returns the run with the earlier ends of the checkpoint that it goes on from.

    Args:
        config: the run as asked for.
        state: a checkpoint; None for a run that starts anew.
        out: run directory, for messages.
        extend: whether more epochs than the checkpoint's were allowed.

    Raises:
        UsageError: `extend` without a run, or with epochs that are not more than those of the run.
    """
    require(not extend or state is not None, f"extend needs a finished run, and {out} holds none; leave out --extend")
    before = None if state is None else _optim_of(state)
    if before is None:
        return config
    ends, epochs = (*before.extended_from, before.epochs), config.optim.epochs
    require(
        not extend or epochs > before.epochs or (epochs == before.epochs and bool(before.extended_from)),
        f"epochs {epochs} are not more than the {before.epochs} of {out}; raise --epochs, or leave out --extend",
    )
    if epochs == before.epochs:
        ends = before.extended_from
    elif not extend:
        return config  # which `changed_settings` refuses
    return replace(config, optim=replace(config.optim, extended_from=ends))


def check_finished(config: RunConfig, checkpoint: Path, state: Mapping[str, Any], steps_per_epoch: int) -> None:
    """Raises CheckpointError if a run is extended from a checkpoint before its end."""
    before = _optim_of(state)
    assert before is not None, "its settings were read before"
    end = before.epochs * steps_per_epoch
    if before.epochs != config.optim.epochs and state["step"] != end:
        raise CheckpointError(
            f"{checkpoint} is of step {state['step']} of {end}: only a finished run can be extended; give --epochs "
            f"{before.epochs} without --extend to finish it"
        )


def describe_extension(config: RunConfig, schedule: Schedule) -> str:
    """Returns a line about the schedule of a run that was extended."""
    optim = config.optim
    ends = ", ".join(map(str, optim.extended_from))
    step = optim.extended_from[-1] * schedule.steps_per_epoch
    return (
        f"extended: the run was finished at {ends} epochs; after step {step} its learning rate is that of a run of "
        f"{optim.epochs} epochs, {schedule.lr(step):.3g} there"
        + (f", and so is m, {schedule.ema_momentum(step):.4g}" if schedule.momentum_rises else "")
    )


def _optim_of(state: Mapping[str, Any]) -> OptimConfig | None:
    """Returns the optimizer's settings in a checkpoint; None if this version cannot read them, which is named later."""
    try:
        return from_dict(json.loads(state["config"])).optim
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
