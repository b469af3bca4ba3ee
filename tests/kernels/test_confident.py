"""Tests of confident rows: the small number softmax - 1 must not be dominated by the rounding of the logits."""

from collections.abc import Callable

import method_oracles
import oracles
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import contrastive_loss, nt_xent, queue_contrastive_loss

NEGATIVES = F.normalize(torch.randn(64, 128, generator=torch.Generator().manual_seed(2)))
# (our operator, oracle) as functions of two sides and a temperature.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "contrastive_loss": (contrastive_loss, oracles.contrastive_loss),
    "nt_xent": (nt_xent, method_oracles.nt_xent),
    "queue_contrastive_loss": (
        lambda a, b, temperature, **how: queue_contrastive_loss(a, b, NEGATIVES, temperature, **how),
        lambda a, b, temperature: method_oracles.queue_contrastive_loss(a, b, NEGATIVES.double(), temperature),
    ),
}


def confident(images: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    predictions = torch.randn(images, width)
    return (predictions + 0.1 * torch.randn(images, width)).to(dtype), predictions.to(dtype)


def left_of_softmax(name: str, targets: Tensor, predictions: Tensor, temperature: float) -> float:
    """Returns the greatest 1 - softmax of a positive."""
    h, p = F.normalize(targets.double()), F.normalize(predictions.double())
    positives = (h * p).sum(dim=1, keepdim=True)
    others = torch.ones(len(h), len(h)).fill_diagonal_(0).bool()
    negatives = {
        "contrastive_loss": [(h @ p.T)[others].view(len(h), -1)],
        "nt_xent": [(h @ x.T)[others].view(len(h), -1) for x in (h, p)],
        "queue_contrastive_loss": [h @ NEGATIVES.double().T],
    }[name]
    return (1 - (torch.cat([positives, *negatives], dim=1) / temperature).softmax(dim=1)[:, 0]).max().item()


def errors(name, targets, predictions, temperature, upstream, backend) -> tuple[float, float]:
    """Returns the relative errors of the loss and of the predictions' gradient, against fp64."""
    losses, gradients = [], []
    ours, equation = LOSSES[name]
    for function, rows in (
        (lambda h, p: ours(h, p, temperature, backend=backend), predictions),
        (lambda h, p: equation(h.double(), p, temperature), predictions.double()),
    ):
        leaf = rows.clone().requires_grad_()
        loss = function(targets, leaf)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))[0].double())
    return abs(losses[0] / losses[1] - 1), ((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()).item()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.1, 0.06, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_is_as_accurate_as_pytorch(name, temperature, dtype):
    targets, predictions = confident(64 if name == "contrastive_loss" else 32, 128, dtype)
    ours, plain = (errors(name, targets, predictions, temperature, 2.0**14, how) for how in ("triton", "torch"))
    doubt = left_of_softmax(name, targets, predictions, temperature)  # size of a positive's coefficient
    # Tolerance: twice PyTorch's error in fp32, plus one rounding of the softmax at 1.0 before 1 is subtracted (half of
    # one in a gradient, where many add up). fp16 rounds once more at the store.
    rounding = torch.finfo(torch.float32).eps / doubt
    assert ours[0] <= 2 * plain[0] + rounding
    assert ours[1] <= 2 * plain[1] + rounding / 2 + (torch.finfo(dtype).eps if dtype == torch.float16 else 0.0)
