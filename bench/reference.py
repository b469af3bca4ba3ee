"""Plain PyTorch forms of the operators and the step: the baselines that bench/ measures against.

Algorithm 1 has the matrix products of its pseudo-code; the losses of SimCLR and MoCo those of their authors' code.
Nothing here comes from mnclglf or mnclglf_kernels. tests/helpers/oracles.py has the same as loops over rows.

N images, S = C(4, k) subsets, F feature width, D embedding width, K queue rows.
"""

import itertools
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Algorithm1AsPrinted:
    """Algorithm 1 with the matrix products that its pseudo-code prints, and three networks.

    Each network has parameters and BN buffers of its own: f_o is [encoder, projector, predictor], f_s and f_m are
    [encoder, projector]. `queue` [K, D] and `pointer` are the state of the additional memory structure. Settings are
    Table 2's; lambda_ is from eq. 7 and k from eq. 4.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        predictor: nn.Module,
        queue: Tensor,
        *,
        temperature: float,
        ema_momentum: float,
        lambda_: float,
        k: int,
        lr: float,
        sgd_momentum: float,
        weight_decay: float,
    ) -> None:
        self.f_o = nn.ModuleDict({"encoder": encoder, "projector": projector, "predictor": predictor})
        self.f_o = deepcopy(self.f_o).train().requires_grad_(True)
        self.f_s = nn.ModuleDict({name: deepcopy(self.f_o[name]) for name in ("encoder", "projector")})
        self.f_m = nn.ModuleDict({name: deepcopy(self.f_o[name]) for name in ("encoder", "projector")})
        self.f_s.requires_grad_(False)
        self.f_m.requires_grad_(False)
        self.queue = queue.detach().clone()
        self.pointer = 0
        self.temperature = temperature
        self.ema_momentum = ema_momentum
        self.lambda_ = lambda_
        self.k = k
        self.lr = lr
        self.sgd_momentum = sgd_momentum
        self.weight_decay = weight_decay
        self.velocity: dict[str, Tensor] = {}

    def step(
        self, x1: Tensor, x2: Tensor, x3: Tensor, *, subset: int | None = None, lr: float | None = None
    ) -> dict[str, Any]:
        """Algorithm 1, the body of `for x in loader`, for three views [N, C, H, W].

        `subset` contrasts one combined embedding only (Table 5, "one embedding"). Returns loss, loss_s, loss_m,
        neighbors (n1, n2: indices [N]) and gradients, by the parameter's name in f_o.
        """
        p1, p2, p3 = self.predict(x1), self.predict(x2), self.predict(x3)
        z1, z2 = self.momentum_project(x1), self.momentum_project(x2)
        n1, n2 = self.nearest_neighbor(z1, self.queue), self.nearest_neighbor(z2, self.queue)
        c1, c3 = self.stop_gradient_project(x1, x3)
        if subset is not None:
            c1, c3 = c1.split(len(x1))[subset], c3.split(len(x3))[subset]

        tau = self.temperature
        loss_s = (self.contrastive_loss(c1, p3, tau) + self.contrastive_loss(c3, p1, tau)) / 2
        loss_m = (self.contrastive_loss(self.queue[n1], p2, tau) + self.contrastive_loss(self.queue[n2], p1, tau)) / 2
        loss_total = loss_s + self.lambda_ * loss_m  # eq. 7

        self.f_o.zero_grad(set_to_none=True)
        loss_total.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in self.f_o.named_parameters()}  # pyright: ignore
        self.update(self.lr if lr is None else lr)
        self.update_momentum_network()
        self.update_stop_gradient_network()
        # z1 from before the lookup: taken literally, Algorithm 1 would refill the queue with its own rows.
        self.queue, self.pointer = self.enqueue(self.queue, self.pointer, z1)
        return {
            "loss": loss_total.item(),
            "loss_s": loss_s.item(),
            "loss_m": loss_m.item(),
            "neighbors": (n1, n2),
            "gradients": gradients,
        }

    def predict(self, x: Tensor) -> Tensor:
        """Algorithm 1, `p = f_o(x)`: [N, C, H, W] -> [N, D]."""
        return self.f_o["predictor"](self.f_o["projector"](self.f_o["encoder"](x)))

    @torch.no_grad()
    def momentum_project(self, x: Tensor) -> Tensor:
        """Algorithm 1, `z = f_m(x)`: [N, C, H, W] -> [N, D]."""
        return self.f_m["projector"](self.f_m["encoder"](x))

    @torch.no_grad()
    def stop_gradient_project(self, x1: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 1, from `y_1, y_3 = self.divide(x1), self.divide(x3)` to `c_1, c_3`: 2 x [S*N, D]."""
        y1, y3 = self.divide(x1), self.divide(x3)
        vd1, vd3 = self.f_s["encoder"](y1), self.f_s["encoder"](y3)
        v1, v3 = self.combine(vd1, self.k), self.combine(vd3, self.k)
        return self.f_s["projector"](v1), self.f_s["projector"](v3)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Algorithm 1, `update(f_q.params)`: SGD as torch.optim.SGD defines it, without dampening or Nesterov."""
        for name, parameter in self.f_o.named_parameters():
            assert parameter.grad is not None, name
            gradient = parameter.grad + self.weight_decay * parameter
            if name in self.velocity:
                gradient = self.sgd_momentum * self.velocity[name] + gradient
            self.velocity[name] = gradient
            parameter.copy_(parameter - lr * gradient)

    @torch.no_grad()
    def update_momentum_network(self) -> None:
        """Eq. 2 and 3: theta_m = m theta_m + (1 - m) theta_o, over parameters; BN buffers stay f_m's own."""
        m = self.ema_momentum
        online = dict(self.f_o.named_parameters())
        for name, parameter in self.f_m.named_parameters():
            parameter.copy_(m * parameter + (1 - m) * online[name])

    @torch.no_grad()
    def update_stop_gradient_network(self) -> None:
        """Eq. 5 and 6: theta_s = theta_o, over parameters; BN buffers stay f_s's own."""
        online = dict(self.f_o.named_parameters())
        for name, parameter in self.f_s.named_parameters():
            parameter.copy_(online[name])

    @staticmethod
    def divide(x: Tensor) -> Tensor:
        """`divide`: [N, C, H, W] -> [4N, C, H/2, W/2]."""
        return torch.cat([column for row in x.chunk(2, dim=2) for column in row.chunk(2, dim=3)])

    @staticmethod
    def combine(v: Tensor, k: int) -> Tensor:
        """`combine`: [4N, F] -> [S*N, F]."""
        return torch.cat([torch.stack(subset).mean(dim=0) for subset in itertools.combinations(v.chunk(4), k)])

    @staticmethod
    def nearest_neighbor(queries: Tensor, queue: Tensor) -> Tensor:
        """`def NN(Q, z)`: both normalized, `mm(z, Q.t())`, `argmax(dim=1)`."""
        return torch.mm(functional.normalize(queries), functional.normalize(queue).t()).argmax(dim=1)

    @staticmethod
    def contrastive_loss(h: Tensor, p: Tensor, tau: float) -> Tensor:
        """`def L(h, p)`: both normalized, one `mm` and one CrossEntropyLoss per split."""
        h, p = functional.normalize(h), functional.normalize(p)
        splits, labels = h.split(len(p)), torch.arange(len(p), device=p.device)
        losses = (functional.cross_entropy(torch.mm(split, p.t()) / tau, labels) for split in splits)
        return sum(losses) / len(splits)  # pyright: ignore[reportReturnType]  # there is at least one split

    @staticmethod
    def enqueue(queue: Tensor, pointer: int, rows: Tensor) -> tuple[Tensor, int]:
        """`update_queue(Q, z1)`."""
        where = (pointer + torch.arange(len(rows), device=queue.device)) % len(queue)
        queue[where] = functional.normalize(rows).to(queue.dtype)  # under autocast CUDA normalizes in fp32
        return queue, (pointer + len(rows)) % len(queue)


def nt_xent_as_published(first: Tensor, second: Tensor, tau: float) -> Tensor:
    """SimCLR's loss in the matrix products of its authors' code: within views (own rows masked) and across them."""
    a, b = functional.normalize(first), functional.normalize(second)
    own = torch.eye(len(a), dtype=a.dtype, device=a.device) * 1e9
    labels = torch.arange(len(a), device=a.device)
    of_a = torch.cat([a @ b.t() / tau, a @ a.t() / tau - own], dim=1)
    of_b = torch.cat([b @ a.t() / tau, b @ b.t() / tau - own], dim=1)
    return (functional.cross_entropy(of_a, labels) + functional.cross_entropy(of_b, labels)) / 2


def queue_loss_as_published(queries: Tensor, keys: Tensor, queue: Tensor, tau: float) -> Tensor:
    """MoCo's loss by its Algorithm 1: the positive logit beside the negative ones, the label 0."""
    q, k = functional.normalize(queries), functional.normalize(keys)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.t()], dim=1)
    return functional.cross_entropy(logits / tau, torch.zeros(len(q), dtype=torch.int64, device=q.device))
