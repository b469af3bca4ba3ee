"""Tests of the closed-form schedule against torch's own schedulers, stepped."""

import pytest
import torch

from mnclglf.config import ObjectiveConfig, OptimConfig, RunConfig
from mnclglf.training.schedule import Schedule


def schedule(epochs: int = 5, warmup_epochs: float = 0.0, steps_per_epoch: int = 7) -> Schedule:
    config = RunConfig(
        optim=OptimConfig(epochs=epochs, warmup_epochs=warmup_epochs, lr=0.1),
        objective=ObjectiveConfig(ema_momentum=0.97),
    )
    return Schedule.of(config, steps_per_epoch)


def test_cosine_equals_torch() -> None:
    ours = schedule()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=35)
    for step in range(35):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-15), step
        optimizer.step()
        theirs.step()
    assert ours.lr(35) == pytest.approx(0, abs=1e-15)


def test_warmup_rises_to_the_peak_and_the_cosine_takes_over() -> None:
    ours = schedule(warmup_epochs=2)
    rates = [ours.lr(step) for step in range(36)]
    assert rates[:14] == pytest.approx([0.1 * (step + 1) / 14 for step in range(14)])
    assert rates[14] == 0.1
    assert rates[14:] == sorted(rates[14:], reverse=True)
    assert rates[35] == pytest.approx(0, abs=1e-15)


def test_momentum_and_length_come_from_the_configuration() -> None:
    assert [schedule().ema_momentum(step) for step in (0, 17, 34)] == [0.97, 0.97, 0.97]
    assert schedule().total_steps == 35


def test_a_rising_momentum_follows_byol_s_equation() -> None:
    objective = ObjectiveConfig(ema_momentum=0.96, ema_schedule="cosine")
    ours = Schedule.of(RunConfig(optim=OptimConfig(epochs=2, warmup_epochs=1), objective=objective), 2)
    # 1 - 0.04 (cos(pi k / 4) + 1) / 2 for k = 0 to 4, by hand: the cosines are 1, sqrt(1/2), 0, -sqrt(1/2), -1.
    expected = [0.96, 1 - 0.02 * (1 + 0.5**0.5), 0.98, 1 - 0.02 * (1 - 0.5**0.5), 1.0]
    assert [ours.ema_momentum(step) for step in range(5)] == pytest.approx(expected, rel=1e-15)
