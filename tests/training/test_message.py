"""What ranks tell each other with a step, without processes: the sum over ranks is made here."""

import signal
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mnclglf.methods.base import Losses
from mnclglf.training import message
from mnclglf.training.message import StepMessage
from mnclglf.training.stop import SIGNALS


class Network(nn.Module):
    """As much of a distributed method as the message asks for."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.weight = nn.Parameter(torch.ones(3))

    def encoders(self) -> list[Any]:
        return []


def given(ranks: int, caught: int | None) -> StepMessage:
    """Returns the message of a step, sent and received, of a rank that caught a signal."""
    network = Network(ranks)
    sent = StepMessage(cast(Any, network), torch.device("cpu"))
    sent.ask(caught)
    network.weight.grad = torch.ones(3)
    sent.average(Losses(torch.tensor(1.0), {}, torch.ones(1, 1)), [network.weight])
    return sent


def agreed(caught: list[int | None], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Returns the signal on which ranks agree that each caught one, or none."""
    sums: list[Tensor] = []
    monkeypatch.setattr(message, "sum_in_place", lambda x: sums.append(x.clone()) or x)
    for own in caught:
        given(len(caught), own)
    monkeypatch.setattr(message, "sum_in_place", lambda x: torch.stack(sums).sum(0))
    (found,) = {given(len(caught), own).signal() for own in caught}
    return found


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_the_signal_that_a_rank_caught_is_that_of_all(number: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agreed([None] * (ranks - 1) + [number], monkeypatch) == number
    assert agreed([number] * ranks, monkeypatch) == number


def test_without_a_signal_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agreed([None, None], monkeypatch) is None


@pytest.mark.parametrize("first", range(len(SIGNALS) - 1))
def test_of_different_signals_the_first_in_the_table_counts(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    later = SIGNALS[first + 1 :]
    assert agreed([None, *later * 300, SIGNALS[first]], monkeypatch) == SIGNALS[first]


def test_a_signal_beside_that_of_torchrun_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agreed([signal.SIGINT, signal.SIGTERM], monkeypatch) == signal.SIGINT  # their mean is SIGFPE
