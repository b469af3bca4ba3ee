"""Tests each operator of torch.ops.mnclglf with opcheck: schema, fake tensors, autograd, AOT dispatch."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import mnclglf_kernels  # noqa: F401  # registers the operators
from mnclglf_kernels.ops.augment import view_parameters

CHANGES = dict(flip=1, brightness=1.2, contrast=0.8, saturation=1.1, hue=0.1, sigma=1, solarize=1)
CHANNELS_LAST = torch.channels_last


def learner(x: Tensor) -> Tensor:
    return x.requires_grad_()


def pairs(learn: tuple[bool, ...] = (False,) * 4, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], ...]:
    """Returns targets of S = 2 and S = 1 and their predictions; `learn` is the requires_grad of all four, in order."""
    rows = [
        torch.randn(count, 4).to(dtype).requires_grad_(asks) for count, asks in zip((10, 5, 5, 5), learn, strict=True)
    ]
    return rows[:2], rows[2:]


def backward_of(of_targets: bool, of_predictions: bool) -> tuple:
    targets, predictions = pairs()
    _, *saved = torch.ops.mnclglf.contrastive_losses(targets, predictions, 0.5)
    return torch.randn(2), targets, predictions, *saved, 0.5, of_targets, of_predictions


def view_backward_of(name: str, *given: Tensor) -> tuple:
    losses, *saved = getattr(torch.ops.mnclglf, name)(*given, 0.5)
    return torch.randn_like(losses), *given, *saved, 0.5


def ring(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(9, 4).to(dtype), torch.tensor(7), torch.randn(5, 4)


def stored() -> tuple[Tensor, ...]:
    """Returns two images of 9 x 8 pixels, row numbers, parameters of two views per row, mean and std."""
    numbers = view_parameters(6, 7, **CHANGES, angle=10, top=1).repeat(4, 1)
    images = torch.randint(256, (2, 3, 9, 8), dtype=torch.uint8)
    return images, torch.tensor([1, 0]), numbers, torch.full((3,), 0.5), torch.full((3,), 0.2)


INPUTS = {
    "augment": [
        lambda: (*stored(), 16, True, 5, False, torch.float32),
        lambda: (*stored(), 6, False, 1, True, torch.bfloat16),
    ],
    "divide": [
        lambda: (torch.randn(3, 4, 6, 8),),
        lambda: (learner(torch.randn(3, 4, 6, 8)),),
        lambda: (learner(torch.randn(3, 4, 6, 8).contiguous(memory_format=CHANNELS_LAST)),),
        lambda: (learner(torch.randn(3, 4, 6, 8).bfloat16().transpose(2, 3)),),
    ],
    "divide_backward": [
        lambda: (torch.randn(12, 4, 3, 2),),
        lambda: (torch.randn(12, 4, 3, 2).half().contiguous(memory_format=CHANNELS_LAST),),
    ],
    "combine": [
        lambda: (torch.randn(12, 5), 2),
        lambda: (learner(torch.randn(12, 5).bfloat16()), 3),
        lambda: (learner(torch.randn(5, 12, dtype=torch.float64).t()), 1),
    ],
    "combine_backward": [lambda: (torch.randn(18, 5), 2), lambda: (torch.ones(1, 1).expand(12, 5), 3)],
    "enqueue": [
        lambda: (*ring(), None),
        lambda: (*ring(), torch.tensor(True)),
        lambda: (*ring(torch.bfloat16), torch.tensor(False)),
    ],
    "nearest_neighbor": [
        lambda: (torch.randn(5, 4), torch.randn(9, 4)),
        lambda: (torch.randn(4, 5).t(), torch.randn(9, 4).bfloat16()),
    ],
    "screened_nearest_neighbor": [
        lambda: (torch.randn(5, 4), torch.randn(9, 4)),
        lambda: (torch.randn(4, 5).t().half(), torch.randn(9, 4).bfloat16()),
    ],
    "faiss_nearest_neighbor": [
        lambda: (torch.randn(5, 4), torch.randn(9, 4)),
        lambda: (torch.randn(4, 5).t(), torch.randn(9, 4).bfloat16()),
        lambda: (torch.randn(0, 4), torch.randn(9, 4)),
    ],
    "contrastive_losses": [
        lambda: (*pairs(), 0.5),
        lambda: (*pairs((True,) * 4), 0.5),
        lambda: (*pairs((False, False, True, True), torch.bfloat16), 0.5),
        lambda: (*pairs((True, False, False, True)), 0.5),
    ],
    "contrastive_losses_backward": [
        lambda: backward_of(True, True),
        lambda: backward_of(True, False),
        lambda: backward_of(False, True),
    ],
    "nt_xent": [
        lambda: (torch.randn(10, 4), 0.5),
        lambda: (learner(torch.randn(10, 4)), 0.5),
        lambda: (learner(torch.randn(6, 4).bfloat16()), 0.5),
    ],
    "nt_xent_backward": [lambda: view_backward_of("nt_xent", torch.randn(10, 4))],
    "queue_contrastive_loss": [
        lambda: (torch.randn(5, 4), torch.randn(5, 4), torch.randn(9, 4), 0.5),
        lambda: (learner(torch.randn(5, 4)), torch.randn(5, 4), torch.randn(9, 4).bfloat16(), 0.5),
        lambda: (learner(torch.randn(5, 4).half()), learner(torch.randn(5, 4).half()), torch.randn(9, 4), 0.5),
    ],
    "queue_contrastive_loss_backward": [
        lambda of=of: (*view_backward_of("queue_contrastive_loss", *(torch.randn(n, 4) for n in (5, 5, 9))), *of)
        for of in ((True, True), (True, False), (False, True))
    ],
}


# opcheck itself causes this warning.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("name", "make"), [(name, make) for name, makers in INPUTS.items() for make in makers])
def test_opcheck(name, make):
    opcheck(getattr(torch.ops.mnclglf, name), make())


def test_every_operator_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix("mnclglf::") for name in names if name.startswith("mnclglf::")} == INPUTS.keys()
