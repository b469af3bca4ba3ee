"""Oracles of the methods of Table 3 except MNCLGLF, transcribed literally from their papers.

One more oracle, MNCLGLFOfficial, computes what the code released by MNCLGLF's authors does and their paper does not
print. The oracles are loops over rows and share no code with the project; L and NN come from MNCLGLF's oracle.
Functions "as published" use the matrix products of the papers' pseudo-code and code: bench/ measures against them.
N images, D embedding width, K queue rows. Everything computes in the dtype of its input; tests feed fp64.
"""

from collections.abc import Sequence
from copy import deepcopy

import oracles
import torch
from oracles import normalize_row
from torch import Tensor, nn

from bench.reference import nt_xent_as_published as nt_xent_as_published
from bench.reference import queue_loss_as_published as queue_loss_as_published


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Returns sim(u, v) = u . v / (|u| |v|) of two rows [D]."""
    return torch.dot(normalize_row(a), normalize_row(b))


def nt_xent(first: Tensor, second: Tensor, tau: float) -> Tensor:
    """SimCLR, equation 1 and Algorithm 1: rows are interleaved as there, so that 2k - 1 and 2k are from one image."""
    z = [row for pair in zip(first, second, strict=True) for row in pair]

    def ell(i: int, j: int) -> Tensor:
        denominator = torch.zeros((), dtype=first.dtype)
        for k in range(len(z)):
            if k != i:
                denominator = denominator + torch.exp(cosine(z[i], z[k]) / tau)
        return -torch.log(torch.exp(cosine(z[i], z[j]) / tau) / denominator)

    total = torch.zeros((), dtype=first.dtype)
    for k in range(len(first)):
        total = total + ell(2 * k, 2 * k + 1) + ell(2 * k + 1, 2 * k)
    return total / len(z)


def nt_xent_of_part(first: Tensor, second: Tensor, tau: float, rank: int, ranks: int) -> Tensor:
    """The mean of the terms of `nt_xent` of one rank's images, from image rank * n on, n = N / ranks."""
    images = len(first) // ranks
    views = [torch.stack([normalize_row(row) for row in view]) for view in (first, second)]
    terms = []
    for image in range(rank * images, (rank + 1) * images):
        for own, other in (views, views[::-1]):
            to_own, to_other = own @ own[image] / tau, other @ own[image] / tau
            logits = torch.cat([to_other, to_own[:image], to_own[image + 1 :]])
            terms.append(torch.logsumexp(logits, dim=0) - to_other[image])
    return torch.stack(terms).mean()


def queue_contrastive_loss(queries: Tensor, keys: Tensor, queue: Tensor, tau: float) -> Tensor:
    """MoCo, equation 1 for each query: its own key against all rows of the queue, which are normalized when stored."""
    total = torch.zeros((), dtype=queries.dtype)
    for query, key in zip(queries, keys, strict=True):
        positive = torch.exp(cosine(query, key) / tau)
        denominator = positive
        for row in queue:
            denominator = denominator + torch.exp(torch.dot(normalize_row(query), row) / tau)
        total = total - torch.log(positive / denominator)
    return total / len(queries)


def squared_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """BYOL, equation 2: mean over images of the squared distance of the normalized rows."""
    total = torch.zeros((), dtype=predictions.dtype)
    for prediction, target in zip(predictions, targets, strict=True):
        difference = normalize_row(prediction) - normalize_row(target)
        total = total + torch.dot(difference, difference)
    return total / len(predictions)


class Transcription:
    """Steps of a method, with real networks that each have their own parameters and BN buffers.

    `networks` are the parts of f_o, in order; f_m copies the first `followed` of them. `queue` [K, D] and `pointer` are
    the queue's, for a method with one. Settings have the project's names.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        queue: Tensor | None = None,
        *,
        followed: int = 0,
        temperature: float,
        ema_momentum: float,
        k: int,
        lambda_: float,
        clip_norm: float | None,
        lr: float,
        sgd_momentum: float,
        weight_decay: float,
    ) -> None:
        self.f_o = deepcopy(nn.ModuleDict(networks)).train().requires_grad_(True)
        self.f_m = deepcopy(nn.ModuleDict(dict(list(networks.items())[:followed]))).train().requires_grad_(False)
        self.queue = None if queue is None else queue.detach().clone()
        self.pointer = 0
        self.temperature = temperature
        self.ema_momentum = ema_momentum
        self.k = k
        self.lambda_ = lambda_
        self.clip_norm = clip_norm
        self.lr = lr
        self.sgd_momentum = sgd_momentum
        self.weight_decay = weight_decay
        self.velocity: dict[str, Tensor] = {}

    def losses(self, *views: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Returns the loss, as "loss", with its terms, and the rows to enqueue, [N, D]."""
        raise NotImplementedError

    def step(self, *views: Tensor) -> dict[str, float]:
        """Runs forward, backward, SGD, momentum network and queue; returns the loss and its terms."""
        losses, enqueued = self.losses(*views)
        self.f_o.zero_grad(set_to_none=True)
        losses["loss"].backward()
        with torch.no_grad():
            self.clip()
            self.update()
            self.update_momentum_network()
        if self.queue is not None and enqueued is not None:
            self.queue, self.pointer = oracles.enqueue(self.queue, self.pointer, enqueued.detach())
        return {name: value.item() for name, value in losses.items()}

    def apply(self, networks: nn.ModuleDict, names: Sequence[str], x: Tensor) -> Tensor:
        for name in names:
            x = networks[name](x)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Returns z = g(f(x)): [N, C, H, W] -> [N, D]."""
        return self.apply(self.f_o, ("encoder", "projector"), x)

    @torch.no_grad()
    def momentum_project(self, x: Tensor) -> Tensor:
        """Returns z = g_m(f_m(x)): [N, C, H, W] -> [N, D]."""
        return self.apply(self.f_m, ("encoder", "projector"), x)

    def predict(self, x: Tensor) -> Tensor:
        """Returns p = q(g(f(x))): [N, C, H, W] -> [N, D]."""
        return self.f_o["predictor"](self.project(x))

    def clip(self) -> None:
        """torch.nn.utils.clip_grad_norm_ as it is documented."""
        gradients = [parameter.grad for parameter in self.f_o.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        if self.clip_norm is not None and norm > self.clip_norm:
            for gradient in gradients:
                gradient.mul_(self.clip_norm / (norm + 1e-6))

    def update(self) -> None:
        """SGD as torch.optim.SGD defines it, without dampening or Nesterov."""
        for name, parameter in self.f_o.named_parameters():
            assert parameter.grad is not None, name
            step = parameter.grad + self.weight_decay * parameter
            if name in self.velocity:
                step = self.sgd_momentum * self.velocity[name] + step
            self.velocity[name] = step
            parameter.copy_(parameter - self.lr * step)

    def update_momentum_network(self) -> None:
        """MoCo, equation 2; BYOL, equation 1: over parameters; BN buffers stay f_m's own."""
        online = dict(self.f_o.named_parameters())
        for name, parameter in self.f_m.named_parameters():
            parameter.copy_(self.ema_momentum * parameter + (1 - self.ema_momentum) * online[name])


class SimCLR(Transcription):
    """SimCLR, Algorithm 1."""

    def losses(self, x1: Tensor, x2: Tensor) -> tuple[dict[str, Tensor], None]:
        loss = nt_xent(self.project(x1), self.project(x2), self.temperature)
        return {"loss": loss, "nt_xent": loss}, None


class MoCoV2(Transcription):
    """MoCo, Algorithm 1; the momentum update at its end instead of before the next forward."""

    def losses(self, x1: Tensor, x2: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        q, k = self.project(x1), self.momentum_project(x2)
        assert self.queue is not None
        loss = queue_contrastive_loss(q, k, self.queue, self.temperature)
        return {"loss": loss, "info_nce": loss}, k


class BYOL(Transcription):
    """BYOL, Algorithm 1, its symmetric loss as the mean of two negative cosines: (2 + 2 a + 2 + 2 b) / 4 - 1."""

    def losses(self, x1: Tensor, x2: Tensor) -> tuple[dict[str, Tensor], None]:
        p1, p2 = self.predict(x1), self.predict(x2)
        z1, z2 = self.momentum_project(x1), self.momentum_project(x2)
        forth, back = squared_distance(p1, z2), squared_distance(p2, z1)
        return {"loss": (forth + back) / 4 - 1, "loss_p1_z2": forth / 2 - 1, "loss_p2_z1": back / 2 - 1}, None


class NNCLR(Transcription):
    """NNCLR, equation 3 with predictions, both ways; z1 is enqueued."""

    def losses(self, x1: Tensor, x2: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        z1, z2 = self.project(x1), self.project(x2)
        p1, p2 = self.f_o["predictor"](z1), self.f_o["predictor"](z2)
        assert self.queue is not None
        n1, n2 = (self.queue[oracles.nearest_neighbor(z.detach(), self.queue)] for z in (z1, z2))
        forth = oracles.contrastive_loss(n1, p2, self.temperature)
        back = oracles.contrastive_loss(n2, p1, self.temperature)
        return {"loss": (forth + back) / 2, "loss_n1_p2": forth, "loss_n2_p1": back}, z1


class SimSiam(Transcription):
    """SimSiam, Algorithm 1; its D(p, z) is half of BYOL's squared distance, less 1."""

    def losses(self, x1: Tensor, x2: Tensor) -> tuple[dict[str, Tensor], None]:
        z1, z2 = self.project(x1), self.project(x2)
        p1, p2 = self.f_o["predictor"](z1), self.f_o["predictor"](z2)
        forth, back = self.distance(p1, z2), self.distance(p2, z1)
        return {"loss": forth / 2 + back / 2, "loss_p1_z2": forth, "loss_p2_z1": back}, None

    def distance(self, p: Tensor, z: Tensor) -> Tensor:
        """Algorithm 1, `def D(p, z)`: `z.detach()`, both normalized, `-(p*z).sum(dim=1).mean()`."""
        rows = zip(p, z.detach().clone(), strict=True)
        return -torch.stack([cosine(prediction, target) for prediction, target in rows]).mean()


class FastMoCo(Transcription):
    """Fast-MoCo: online embeddings of combined patches against the whole other view, both ways."""

    def losses(self, x1: Tensor, x2: Tensor) -> tuple[dict[str, Tensor], None]:
        c1, c2 = self.predict_combinations(x1), self.predict_combinations(x2)
        z1, z2 = self.momentum_project(x1), self.momentum_project(x2)
        forth = oracles.contrastive_loss(c1, z2, self.temperature)
        back = oracles.contrastive_loss(c2, z1, self.temperature)
        return {"loss": (forth + back) / 2, "loss_c1_z2": forth, "loss_c2_z1": back}, None

    def predict_combinations(self, x: Tensor) -> Tensor:
        """c: [N, C, H, W] -> [S*N, D]."""
        v = oracles.combine(self.f_o["encoder"](oracles.divide(x)), self.k)
        return self.apply(self.f_o, ("projector", "predictor"), v)


class MNCLGLFOfficial(Transcription):
    """MNCLGLF's released code: candidates of loss_s are combinations, those of loss_m are both sides."""

    def losses(self, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        p1, p2, p3 = self.predict(x1), self.predict(x2), self.predict(x3)
        with torch.no_grad():  # by the online network, which updates its running statistics
            c1, c2 = self.project_combinations(x1), self.project_combinations(x2)
        pairs = [(p.detach(), split) for p, c in ((p2, c1), (p1, c2)) for split in c.split(len(x1))]
        loss_s = torch.stack([oracles.contrastive_loss(p, split, self.temperature) for p, split in pairs]).mean()

        z1, z3 = self.momentum_project(x1), self.momentum_project(x3)
        assert self.queue is not None
        n1, n3 = (self.queue[oracles.nearest_neighbor(z, self.queue)] for z in (z1, z3))
        loss_m = nt_xent(n3, p1, self.temperature) / 2 + nt_xent(n1, p3, self.temperature) / 2
        return {"loss": loss_s + self.lambda_ * loss_m, "loss_s": loss_s, "loss_m": loss_m}, z3

    def project_combinations(self, x: Tensor) -> Tensor:
        """c: [N, C, H, W] -> [S*N, D]."""
        return self.f_o["projector"](oracles.combine(self.f_o["encoder"](oracles.divide(x)), self.k))
