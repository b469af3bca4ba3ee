"""Training steps of other methods as the documentation of lightly trains them, on our backbone.

The heads, losses, memory banks and settings are those of lightly's plain PyTorch examples
(https://docs.lightly.ai/self-supervised-learning/examples/models.html); the backbone is ours rather than torchvision's,
whose stem is made for larger images. lightly is no dependency: only a call that makes a peer imports it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mnclglf.config import MethodName
from mnclglf.models.encoder import ResNet

LEARNING_RATE = 0.06
MOMENTUM = 0.996  # EMA momentum of the first epoch; the examples raise it to 1, epoch by epoch
BANK = (4096, 128)  # a memory bank's rows and width

Loss = Callable[[Tensor, Tensor], Tensor]
Follower = tuple[nn.Module, nn.Module]  # an online network and its momentum network


class Peer(nn.Module):
    """A method: its loss of two views, and the momentum updates before each step.

    Args:
        loss: maps two views, [N, 3, H, W] each, to a scalar.
        networks: all modules that `loss` uses, so that they move and train with the peer.
        followers: the pairs of online and momentum network among them.
    """

    def __init__(self, loss: Loss, *networks: nn.Module, followers: Sequence[Follower] = ()) -> None:
        super().__init__()
        self.loss, self.networks, self.followers = loss, nn.ModuleList(networks), followers

    def before_step(self) -> None:
        """Updates the momentum networks; does nothing where the method has none."""
        from lightly.models.utils import update_momentum

        for network, follower in self.followers:
            update_momentum(network, follower, m=MOMENTUM)

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Returns the loss of two views, [N, 3, H, W] each: a scalar."""
        return self.loss(x0, x1)


def nnclr(backbone: ResNet) -> Peer:
    """NNCLR: each view's nearest neighbor in a memory bank against the other view's prediction."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNCLRPredictionHead, NNCLRProjectionHead, NNMemoryBankModule

    encoder = nn.Sequential(backbone, NNCLRProjectionHead(backbone.features, 512, 128))
    predictor = NNCLRPredictionHead(128, 512, 128)
    bank, criterion = NNMemoryBankModule(size=BANK), NTXentLoss()

    def loss(x0: Tensor, x1: Tensor) -> Tensor:
        z0 = encoder(x0)
        p0 = predictor(z0)
        z1 = encoder(x1)
        p1 = predictor(z1)
        neighbors0 = bank(z0.detach(), update=False)
        neighbors1 = bank(z1.detach(), update=True)
        return 0.5 * (criterion(neighbors0, p1) + criterion(neighbors1, p0))

    return Peer(loss, encoder, predictor, bank, criterion)


def mocov2(backbone: ResNet) -> Peer:
    """MoCo v2: a query against its momentum key, with a memory bank of former keys as negatives."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead

    encoder = nn.Sequential(backbone, MoCoProjectionHead(backbone.features, 512, 128))
    momentum = frozen_copy(encoder)
    criterion = NTXentLoss(memory_bank_size=BANK)

    def loss(x0: Tensor, x1: Tensor) -> Tensor:
        return criterion(encoder(x0), momentum(x1).detach())

    return Peer(loss, encoder, momentum, criterion, followers=[*zip(encoder, momentum, strict=True)])


def simclr(backbone: ResNet) -> Peer:
    """SimCLR: two views against each other, with the rest of the batch as negatives."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    encoder = nn.Sequential(backbone, SimCLRProjectionHead(backbone.features, 512, 128))
    criterion = NTXentLoss()
    return Peer(lambda x0, x1: criterion(encoder(x0), encoder(x1)), encoder, criterion)


def byol(backbone: ResNet) -> Peer:
    """BYOL: each view's prediction against the momentum projection of the other; no negatives."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

    encoder = nn.Sequential(backbone, BYOLProjectionHead(backbone.features, 1024, 256))
    predictor = BYOLPredictionHead(256, 1024, 256)
    momentum = frozen_copy(encoder)
    criterion = NegativeCosineSimilarity()

    def loss(x0: Tensor, x1: Tensor) -> Tensor:
        p0 = predictor(encoder(x0))
        z0 = momentum(x0).detach()
        p1 = predictor(encoder(x1))
        z1 = momentum(x1).detach()
        return 0.5 * (criterion(p0, z1) + criterion(p1, z0))

    return Peer(loss, encoder, predictor, momentum, criterion, followers=[*zip(encoder, momentum, strict=True)])


PEERS: dict[MethodName, Callable[[ResNet], Peer]] = {"nnclr": nnclr, "mocov2": mocov2, "simclr": simclr, "byol": byol}


def frozen_copy(encoder: nn.Sequential) -> nn.Sequential:
    """Returns a momentum network that starts as `encoder`; no gradient reaches it."""
    return copy.deepcopy(encoder).requires_grad_(False)


def peer_step(
    name: MethodName, views: Sequence[Tensor], *, dtype: torch.dtype | None, channels_last: bool, width: int = 64
) -> Callable[[], Tensor]:
    """Makes a step that trains `name` on the same two views and returns the loss, still on the device.

    It leaves out the loading, the copy to the device and the epoch's mean loss of the examples' loop.

    Args:
        name: a key of PEERS.
        views: two, [N, 3, H, W] in fp32, on the device to train on.
        dtype: bfloat16 for autocast; None for fp32 as documented.
        channels_last: weights and views in that memory format, rather than NCHW as documented.
        width: channels of the backbone's first stage.
    """
    device = views[0].device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x0, x1 = (view.contiguous(memory_format=memory_format) for view in views)
    peer = PEERS[name](ResNet(width=width)).to(device).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(peer.parameters(), lr=LEARNING_RATE)

    def step() -> Tensor:
        peer.before_step()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = peer(x0, x1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
