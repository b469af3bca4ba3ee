"""Weights & Biases: RUN/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` sends it later."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # sends nothing anywhere unless it is asked to

import wandb

from mnclglf.runs.loggers import Opening


class Wandb:
    """Writes one W&B run, under the same id after a resume.

    W&B only appends, so steps that a killed process has written are left out. The training step is a figure of its own,
    as W&B counts calls.
    """

    def __init__(self, opening: Opening) -> None:
        self.written = opening.written
        identity = opening.known_id("wandb") or secrets.token_hex(4)
        wandb.setup()
        logging.getLogger("wandb").setLevel(logging.WARNING)  # its debug.log names paths of this machine
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mnclglf"),
            id=identity,
            name=opening.folder.name,
            resume="allow",
            config=dict(opening.settings),
            dir=str(opening.folder),
            settings=wandb.Settings(
                mode=cast(Any, os.environ.get("WANDB_MODE", "offline")),
                silent=True,
                console="off",  # the terminal is the run's
                disable_git=True,
                x_disable_stats=True,
                x_disable_meta=True,  # command, user, host and paths
                x_disable_machine_info=True,
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        opening.keep_id("wandb", identity)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        results = {name: value for name, value in values.items() if name.startswith("top1/")}
        if results:
            self.run.summary.update(results)
        if results or step > self.written:
            self.run.log({**values, "step": step})

    def images(self, step: int, name: str, images: NDArray[np.uint8]) -> None:
        if step > self.written or step == 0:
            self.run.log({name: [wandb.Image(image) for image in images], "step": step})

    def close(self) -> None:
        self.run.finish()
