"""Learning rate and momentum in closed form from the global step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mnclglf.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine from `peak_lr` to 0 (Table 2). m is constant or rises to 1 as a cosine."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    start_momentum: float
    momentum_rises: bool

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> Schedule:
        return cls(
            steps_per_epoch=steps_per_epoch,
            total_steps=config.optim.epochs * steps_per_epoch,
            warmup_steps=round(config.optim.warmup_epochs * steps_per_epoch),
            peak_lr=config.optim.lr,
            start_momentum=config.objective.ema_momentum,
            momentum_rises=config.objective.ema_schedule == "cosine",
        )

    def lr(self, step: int) -> float:
        """Returns the learning rate of global step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * done))

    def ema_momentum(self, step: int) -> float:
        """Returns m of the momentum network at global step `step`, counted from 0 (Grill et al. 2020, section 3.2)."""
        if not self.momentum_rises:
            return self.start_momentum
        return 1 - (1 - self.start_momentum) * (math.cos(math.pi * step / self.total_steps) + 1) / 2
