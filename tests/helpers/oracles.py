"""The paper, transcribed as slowly and literally as it can be: loops over rows, no code shared with the project.

N images, S = C(4, k) subsets, M = S*N or any number of rows, F feature width, D embedding width, K queue rows.
Everything computes in the dtype of its input; tests feed fp64 where they want the truth.
"""

import itertools
from copy import deepcopy

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

NORM_FLOOR = 1e-12  # torch.nn.functional.normalize's default eps


def normalize_row(row: Tensor) -> Tensor:
    """Algorithm 1, `normalize(., dim=1)`, for one row [D]: divide by max(norm, 1e-12)."""
    return row / torch.linalg.vector_norm(row).clamp(min=NORM_FLOOR)


def divide(x: Tensor) -> Tensor:
    """Algorithm 1, `y = divide(x)`: [N, C, H, W] -> [4N, C, H/2, W/2]; row p*N + n is patch p of image n."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    patches = []
    for grid_row in range(2):
        for grid_column in range(2):
            top, left = grid_row * height, grid_column * width
            for image in x:
                patches.append(image[:, top : top + height, left : left + width])  # noqa: PERF401
    return torch.stack(patches)


def combine(v: Tensor, k: int) -> Tensor:
    """Section 3.2 and eq. 4, `v = combine(vd)`: [4N, F] -> [S*N, F], the mean of every k of the four patch features."""
    images = v.shape[0] // 4
    combined = []
    for subset in itertools.combinations(range(4), k):
        for image in range(images):
            total = torch.zeros_like(v[0])
            for patch in subset:
                total = total + v[patch * images + image]
            combined.append(total / k)
    return torch.stack(combined)


def contrastive_loss(h: Tensor, p: Tensor, tau: float) -> Tensor:
    """Algorithm 1, `def L(h, p)`: h [S*N, D], p [N, D] -> scalar; the term of one row is eq. 1 with N candidates."""
    candidates = torch.stack([normalize_row(row) for row in p])
    splits = h.split(len(p))
    loss = torch.zeros((), dtype=h.dtype)
    for split in splits:
        cross_entropy = torch.zeros((), dtype=h.dtype)
        for label, row in enumerate(split):
            logits = candidates @ normalize_row(row) / tau
            cross_entropy = cross_entropy + torch.logsumexp(logits, dim=0) - logits[label]
        loss = loss + cross_entropy / len(p)
    return loss / len(splits)


def nearest_neighbor(queries: Tensor, queue: Tensor) -> Tensor:
    """Algorithm 1, `def NN(Q, z)`: for each query [M, D] the index of the queue row [K, D] of highest cosine: [M].

    The lowest index wins a tie; a NaN score never wins; a query whose scores are all NaN returns 0.
    """
    keys = [normalize_row(row) for row in queue]
    indices = []
    for query in queries:
        unit_query = normalize_row(query)
        best_index, best_score = 0, float("-inf")
        for index, key in enumerate(keys):
            score = torch.dot(unit_query, key).item()
            if score > best_score:
                best_index, best_score = index, score
        indices.append(best_index)
    return torch.tensor(indices, dtype=torch.int64)


def enqueue(queue: Tensor, pointer: int, rows: Tensor) -> tuple[Tensor, int]:
    """Algorithm 1, `update_queue(Q, z1)`: the oldest rows of the ring [K, D] give way to rows [M, D], unit-norm."""
    queue = queue.clone()
    for row in rows:
        queue[pointer] = normalize_row(row).to(queue.dtype)
        pointer = (pointer + 1) % len(queue)
    return queue, pointer


class Algorithm1:
    """Algorithm 1 with three real networks, each with parameters and BN buffers of its own.

    f_o is [encoder, projector, predictor], f_s and f_m are [encoder, projector]. `queue` [K, D] and `pointer` are the
    state of the additional memory structure. Settings are Table 2's; lambda_ is that of eq. 7 and k that of eq. 4.
    """

    divide, combine, enqueue = staticmethod(divide), staticmethod(combine), staticmethod(enqueue)
    contrastive_loss, nearest_neighbor = staticmethod(contrastive_loss), staticmethod(nearest_neighbor)

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

    def step(self, x1: Tensor, x2: Tensor, x3: Tensor, *, subset: int | None = None, lr: float | None = None) -> dict:
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
        gradients = {name: parameter.grad.clone() for name, parameter in self.f_o.named_parameters()}
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


class Algorithm1AsPrinted(Algorithm1):
    """Algorithm 1 with the matrix products that its pseudo-code prints: what bench/ measures against."""

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
        """`def NN(Q, z)`: both normalised, `mm(z, Q.t())`, `argmax(dim=1)`."""
        return torch.mm(functional.normalize(queries), functional.normalize(queue).t()).argmax(dim=1)

    @staticmethod
    def contrastive_loss(h: Tensor, p: Tensor, tau: float) -> Tensor:
        """`def L(h, p)`: both normalised, one `mm` and one CrossEntropyLoss a split."""
        h, p = functional.normalize(h), functional.normalize(p)
        splits, labels = h.split(len(p)), torch.arange(len(p), device=p.device)
        return sum(functional.cross_entropy(torch.mm(split, p.t()) / tau, labels) for split in splits) / len(splits)

    @staticmethod
    def enqueue(queue: Tensor, pointer: int, rows: Tensor) -> tuple[Tensor, int]:
        """`update_queue(Q, z1)`."""
        where = (pointer + torch.arange(len(rows), device=queue.device)) % len(queue)
        queue[where] = functional.normalize(rows).to(queue.dtype)  # under autocast CUDA normalises in fp32
        return queue, (pointer + len(rows)) % len(queue)


def reference_resnet18(width: int = 64, stem: str = "cifar") -> nn.Module:
    """Section 4.1, Architecture: torchvision's ResNet-18 in fp32 without its classifier, [N, 3, H, W] -> [N, 512].

    `stem` "cifar" has a 3 x 3 stride-1 convolution and no max-pool; "imagenet" is torchvision's own.
    """
    if width != 64:
        raise ValueError(f"width {width}: torchvision's ResNet-18 has width 64 only")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem {stem!r} is neither 'cifar' nor 'imagenet'")
    network = torchvision.models.resnet18(weights=None)
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network


def reference_projector(feature_width: int, width: int) -> nn.Sequential:
    """Section 4.1, Architecture: three linear layers [F, D], [D, D], [D, D], BN after each, ReLU after two."""
    return nn.Sequential(
        nn.Linear(feature_width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
    )


def reference_predictor(width: int, hidden: int) -> nn.Sequential:
    """Section 4.1, Architecture: two linear layers [D, hidden], [hidden, D], BN and ReLU between them."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, width),
    )
