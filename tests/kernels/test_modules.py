"""Tests of the nn.Modules: against lightly's, against arithmetic by hand, and their errors."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss as LightlyNTXentLoss
from lightly.models.modules import NNMemoryBankModule
from torch import nn

from mnclglf_kernels import ContrastiveLoss, NearestNeighborQueue, NTXentLoss, QueueContrastiveLoss

FP32: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)  # both sum some ten fp32 numbers near 1, in another order
ROWS: dict[str, Any] = dict(rtol=0, atol=2**-22)  # normalized once or twice: two ulps of a number below 1


def pair(count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (3 * torch.randn(count, width, generator=generator) for _ in range(2))
    return first.requires_grad_(), second.requires_grad_()


def losses_and_gradients(criterion: nn.Module, seed: int, count: int = 6) -> list[torch.Tensor]:
    first, second = pair(count, 8, seed)
    loss = criterion(first, second)
    return [loss.detach(), *torch.autograd.grad(loss, [first, second])]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_lightly_s(temperature, backend):
    ours = NTXentLoss(temperature, backend=backend)
    for found, expected in zip(
        losses_and_gradients(ours, 0), losses_and_gradients(LightlyNTXentLoss(temperature), 0), strict=True
    ):
        torch.testing.assert_close(found, expected, **FP32)


def test_defaults_are_lightly_s():
    theirs = LightlyNTXentLoss()
    ours = NTXentLoss()
    assert (ours.temperature, ours.memory_bank) == (theirs.temperature, None)
    assert theirs.memory_bank.size == (0,)
    assert NTXentLoss(memory_bank_size=(0,)).memory_bank is None


def test_memory_bank_is_lightly_s_over_several_steps(backend):
    theirs = LightlyNTXentLoss(0.2, memory_bank_size=(12, 8))
    ours = NTXentLoss(0.2, memory_bank_size=(12, 8), backend=backend)
    assert ours.memory_bank is not None
    ours.memory_bank.rows.copy_(theirs.memory_bank.bank)
    for step in range(5):  # more than two rounds of the ring
        found, expected = losses_and_gradients(ours, step), losses_and_gradients(theirs, step)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **FP32)
        torch.testing.assert_close(ours.memory_bank.rows, theirs.memory_bank.bank, **ROWS)
    assert ours.memory_bank.pointer == theirs.memory_bank.bank_ptr


def test_without_gradient_the_memory_bank_stays(backend):
    criterion = QueueContrastiveLoss((12, 8), backend=backend)
    before = copy.deepcopy(criterion.state_dict())
    criterion(*(x.detach() for x in pair(6, 8, 0)))
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)


def test_rows_that_reach_the_end_go_on_at_the_beginning():
    queue = NearestNeighborQueue((5, 2))
    for number in (1, 2):
        queue(torch.full((3, 2), float(number)) * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, number - 1]), True)
    # Six rows in a ring of five: the sixth lies over the first. (2, 1) / sqrt(5) are the second step's.
    second = torch.tensor([2.0, 1.0]) / math.sqrt(5)
    expected = torch.stack([second, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), second, second])
    torch.testing.assert_close(queue.rows, expected, **ROWS)
    assert queue.pointer == 1


def test_nearest_neighbors_are_lightly_s_over_several_steps(backend):
    theirs, ours = NNMemoryBankModule((12, 8)), NearestNeighborQueue((12, 8), backend=backend)
    ours.rows.copy_(theirs.bank)
    for step in range(5):
        first, second = (x.detach() for x in pair(6, 8, step))
        for output, update in ((first, False), (second, True)):
            found, expected = ours(output, update=update), theirs(output, update=update)
            torch.testing.assert_close(found, F.normalize(expected), **ROWS)
            assert not found.requires_grad


def test_the_queue_is_in_the_state_dict():
    queue = NearestNeighborQueue((12, 8))
    queue(torch.randn(5, 8), update=True)
    other = NearestNeighborQueue((12, 8))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.rows, queue.rows)
    assert other.pointer == 5


def test_contrastive_loss_by_hand(backend):
    # Two orthogonal predictions, each target its own prediction: log(e^(1/t) + 1) - 1/t, in every split.
    predictions = torch.eye(2, 4, requires_grad=True)
    targets = torch.cat([2 * predictions, 5 * predictions]).detach()
    loss = ContrastiveLoss(temperature=0.5, backend=backend)(targets, predictions)
    torch.testing.assert_close(loss.item(), math.log(math.exp(2) + 1) - 2, **FP32)


def test_modules_print_what_they_hold():
    assert "temperature=0.3" in repr(ContrastiveLoss(0.3))
    assert "size=(12, 8), temperature=0.07" in repr(NTXentLoss(0.07, (12, 8)))
    assert "size=(12, 8)" in repr(NearestNeighborQueue((12, 8)))


@pytest.mark.parametrize(
    ("make", "value", "remedy"),
    [
        (lambda: NTXentLoss(0.0), "0.0", "positive"),
        (lambda: ContrastiveLoss(float("nan")), "nan", "positive"),
        (lambda: QueueContrastiveLoss((4, 8), -1.0), "-1.0", "positive"),
        (lambda: NTXentLoss(memory_bank_size=4096), "4096", "(rows, width)"),
        (lambda: NTXentLoss(memory_bank_size=-1), "-1", "(rows, width)"),
        (lambda: QueueContrastiveLoss((4096,)), "4096", "(rows, width)"),
        (lambda: NearestNeighborQueue((0, 8)), "(0, 8)", "at least 1"),
        (lambda: NearestNeighborQueue((4, 8, 2)), "(4, 8, 2)", "(rows, width)"),
        (lambda: NTXentLoss(gather_distributed=True), "gather_distributed=True", "leave it out"),
        (lambda: NearestNeighborQueue((4, 8))(torch.randn(5, 8), update=True), "5 rows", "enlarge the queue"),
        (lambda: NearestNeighborQueue((4, 8))(torch.randn(3, 6)), "width 6", "agree"),
    ],
)
def test_errors_name_the_value_and_the_remedy(make, value, remedy):
    with pytest.raises(ValueError) as stopped:  # noqa: PT011  # the values below tell them apart
        make()
    assert value in str(stopped.value)
    assert remedy in str(stopped.value)
