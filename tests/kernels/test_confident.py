"""Rows that know their positive: what is left of softmax - 1 must not be the rounding of the logits."""

import oracles
import pytest
import torch
from torch.nn import functional as F

from mnclglf_kernels import contrastive_loss


def confident(images: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    predictions = torch.randn(images, width)
    return (predictions + 0.1 * torch.randn(images, width)).to(dtype), predictions.to(dtype)


def errors(targets, predictions, temperature, upstream, backend) -> tuple[float, float]:
    """Relative errors of the loss and of the predictions' gradient, against fp64."""
    losses, gradients = [], []
    for function, rows in (
        (lambda h, p: contrastive_loss(h, p, temperature, backend=backend), predictions),
        (lambda h, p: oracles.contrastive_loss(h.double(), p, temperature), predictions.double()),
    ):
        leaf = rows.clone().requires_grad_()
        loss = function(targets, leaf)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))[0].double())
    return abs(losses[0] / losses[1] - 1), ((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()).item()


@pytest.mark.parametrize("temperature", [0.1, 0.06, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_is_as_accurate_as_pytorch(temperature, dtype):
    targets, predictions = confident(64, 128, dtype)
    ours, plain = (errors(targets, predictions, temperature, 2.0**14, backend) for backend in ("triton", "torch"))
    cosines = F.normalize(targets.double()) @ F.normalize(predictions.double()).T
    doubt = (1 - (cosines / temperature).softmax(dim=1).diagonal()).max().item()  # what is left of a coefficient
    # Twice what PyTorch makes in fp32, and a rounding (half of one, of the many in a gradient) at 1.0 of the softmax
    # that 1 is taken from; fp16 rounds once more at the store.
    rounding = torch.finfo(torch.float32).eps / doubt
    assert ours[0] <= 2 * plain[0] + rounding
    assert ours[1] <= 2 * plain[1] + rounding / 2 + (torch.finfo(dtype).eps if dtype == torch.float16 else 0.0)
