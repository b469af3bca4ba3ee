"""Oracle of the paper, transcribed literally: loops over rows, and no code shared with the project.

N images, S = C(4, k) subsets, M = S*N or any number of rows, F feature width, D embedding width, K queue rows.
Everything computes in the dtype of its input; tests feed fp64 for the reference values.
"""

import itertools

import torch
import torchvision
from torch import Tensor, nn

from bench.reference import Algorithm1AsPrinted

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


def contrastive_loss_of_part(h: Tensor, p: Tensor, tau: float, rank: int, ranks: int) -> Tensor:
    """The mean of the terms of `contrastive_loss` of one rank's images: h [S*n, D], p [ranks*n, D] -> scalar."""
    images = len(p) // ranks
    candidates = torch.stack([normalize_row(row) for row in p])
    total = torch.zeros((), dtype=h.dtype)
    for split in h.split(images):
        for image, row in enumerate(split):
            logits = candidates @ normalize_row(row) / tau
            total = total + torch.logsumexp(logits, dim=0) - logits[rank * images + image]
    return total / len(h)


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


class Algorithm1(Algorithm1AsPrinted):
    """Algorithm 1 with the loops above in place of matrix products."""

    divide, combine, enqueue = staticmethod(divide), staticmethod(combine), staticmethod(enqueue)
    contrastive_loss, nearest_neighbor = staticmethod(contrastive_loss), staticmethod(nearest_neighbor)


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
        network.set_submodule("maxpool", nn.Identity())
    network.set_submodule("fc", nn.Identity())
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
