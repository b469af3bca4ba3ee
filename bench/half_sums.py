"""`python -m bench.half_sums`: what convolutions that sum in fp16 do to a momentum network's embeddings, on a CPU.

It trains on digits for a minute, or takes a run, and sends test images through the momentum network in train mode: in
fp32, in bf16 and in fp16 with fp32 sums, and in fp16 with the convolutions' sums rounded to fp16 after every 16
products, the filter's taps outermost. That is the worst of the orders in which a tensor core could sum. An untrained
ResNet-18 of width 64, with sums of up to 4,608 products, stands beside it. The linear layers of the head sum in fp32.

Printed are 1 - cosine to the fp32 embedding, how often the nearest neighbor among training images is that of fp32, the
results that overflowed, and the largest magnitude of a sum in each layer.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from mnclglf.api import evaluate, normalization, run_config
from mnclglf.config import RunConfig
from mnclglf.evaluation.features import views_of
from mnclglf.methods import METHODS
from mnclglf.methods.base import Method
from mnclglf.models.batch_norm import BatchNorm, batch_statistics_only
from mnclglf.runs.checkpoint import load_state
from mnclglf.training.loop import Trainer
from mnclglf.training.start import build_method, load_run_data

BLOCK = 16  # products of one tensor-core instruction (HMMA.16816), after which it rounds its fp16 sums
Watch = Callable[[Tensor], object]  # is given the sums in fp32 before they are rounded


def half_sum_conv2d(
    images: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, watch: Watch | None = None
) -> Tensor:
    """Returns a convolution in fp16 whose sum is rounded to fp16 after every 16 products.

    The order is that of the taps, and in each tap that of the channels.

    Args:
        images: [N, C, H, W], rounded to fp16.
        weight: [K, C, T, T], rounded to fp16.
        stride: of both axes.
        padding: of both axes.
        watch: called with the sums after every 16 products, in fp32.

    Returns:
        fp16 [N, K, H', W'], channels_last.
    """
    images = F.pad(images.half().float(), [padding] * 4).permute(0, 2, 3, 1)  # [N, H, W, C]
    weight = weight.half().float()
    outputs, channels, taps, _ = weight.shape
    rows, columns = ((size - taps) // stride + 1 for size in images.shape[1:3])
    sums = torch.zeros(len(images) * rows * columns, outputs, dtype=torch.float16, device=images.device)
    for row in range(taps):
        for column in range(taps):
            below, right = row + stride * (rows - 1) + 1, column + stride * (columns - 1) + 1
            tap = images[:, row:below:stride, column:right:stride].reshape(-1, channels)
            for first in range(0, channels, BLOCK):
                block = slice(first, first + BLOCK)
                new = torch.addmm(sums.float(), tap[:, block], weight[:, block, row, column].t())
                if watch is not None:
                    watch(new)
                sums.copy_(new)
    return sums.view(len(images), rows, columns, outputs).permute(0, 3, 1, 2)


def rounded_conv2d(images: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, *, dtype: torch.dtype) -> Tensor:
    """Returns a convolution of operands in `dtype` that sums in fp32 and is rounded once."""
    return F.conv2d(images.to(dtype).float(), weight.to(dtype).float(), None, stride, padding).to(dtype)


class Kind(NamedTuple):
    """A way to compute: the dtype of operands and results, and the convolution."""

    dtype: torch.dtype
    convolve: Callable[..., Tensor]


HALF_SUMS = "fp16, fp16 sums"
KINDS = {
    "bf16": Kind(torch.bfloat16, partial(rounded_conv2d, dtype=torch.bfloat16)),
    "fp16": Kind(torch.float16, partial(rounded_conv2d, dtype=torch.float16)),
    HALF_SUMS: Kind(torch.float16, half_sum_conv2d),
}


@dataclass
class Seen:
    """What convolutions came to, by the layer's name.

    Attributes:
        largest: largest magnitude of an fp16 sum before it was rounded, at any point of the sum; inf after an overflow.
        overflows: number of results that are not finite, in any way of KINDS. An overflow spoils what follows it.
    """

    largest: dict[str, float] = field(default_factory=dict)
    overflows: Counter[str] = field(default_factory=Counter)

    def sums(self, layer: str, sums: Tensor) -> None:
        magnitude = sums.abs().nan_to_num(nan=math.inf, posinf=math.inf).amax().item()
        self.largest[layer] = max(self.largest.get(layer, 0.0), magnitude)

    def result(self, layer: str, result: Tensor) -> None:
        self.overflows[layer] += int((~result.isfinite()).sum())


@contextmanager
def emulated(network: nn.Module, kind: str, seen: Seen | None = None) -> Generator[None]:
    """Context in which the forwards without gradient of a network are computed in a way of KINDS.

    Of a method that are its momentum and stop-gradient networks; forwards with gradient stay what they are. It reads
    the fp32 weights, also where a training step casts them once for all its forwards. What a layer gives is rounded to
    the dtype and kept in fp32, as autocast to bf16 does not take fp16 beside it.

    Args:
        network: a network, or a whole method.
        kind: key of KINDS.
        seen: takes in what the convolutions come to.
    """
    dtype, convolve = KINDS[kind]

    def convolution(
        name: str, layer: nn.Conv2d, weight: Tensor, plain: Callable[[Tensor], Tensor], input: Tensor
    ) -> Tensor:
        if torch.is_grad_enabled():
            return plain(input)
        stride = getattr(layer, "step", layer.stride[0])  # of a NarrowShortcut
        watching = {"watch": partial(seen.sums, name)} if seen and convolve is half_sum_conv2d else {}
        with torch.autocast(input.device.type, enabled=False):
            result = convolve(input, weight, stride, layer.padding[0], **watching)
        if seen:
            seen.result(name, result)
        return result.float()

    def product(layer: nn.Linear, weight: Tensor, plain: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return plain(input)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.float()
            return F.linear(input.to(dtype).float(), weight.to(dtype).float(), bias).to(dtype).float()

    def rounded(plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        result = plain(*args, **kwargs)
        return result if torch.is_grad_enabled() else result.to(dtype).float()

    changed = [
        (name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear | BatchNorm)
    ]
    for name, layer in changed:
        if isinstance(layer, nn.Conv2d):
            layer.forward = partial(convolution, name, layer, layer.weight, layer.forward)
        elif isinstance(layer, BatchNorm):
            layer.forward = partial(rounded, layer.forward)
        else:
            layer.forward = partial(product, layer, layer.weight, layer.forward)
    try:
        yield
    finally:
        for _, layer in changed:
            del layer.forward


class Closeness(NamedTuple):
    """How near embeddings are to those of fp32."""

    mean: float  # of 1 - cosine
    worst: float
    same_neighbor: float  # fraction

    def __str__(self) -> str:
        return f"{self.mean:.1e} ({self.worst:.1e}) | {self.same_neighbor:.1%}"


def closeness(embeddings: Tensor, exact: Tensor, queue: Tensor) -> Closeness:
    """Compares [N, D] embeddings with those of fp32, also by their nearest rows in a [K, D] queue of unit norm."""
    embeddings, exact, queue = embeddings.double(), exact.double(), queue.double()
    apart = 1 - F.cosine_similarity(embeddings, exact)
    same = (embeddings @ queue.t()).argmax(dim=1) == (exact @ queue.t()).argmax(dim=1)
    return Closeness(apart.mean().item(), apart.max().item(), same.double().mean().item())


def embed(network: nn.Module, views: Tensor, batch: int = 256) -> Tensor:
    """Returns the network's embeddings, in train mode and in batches; its running statistics do not change."""
    network.train()
    with torch.no_grad(), batch_statistics_only(network):
        return torch.cat([network(chunk).float() for chunk in views.split(batch)])


def compare(network: nn.Module, queries: Tensor, others: Tensor) -> dict[str, tuple[Closeness, Seen]]:
    """Compares each way of KINDS with fp32.

    Args:
        network: momentum network: encoder and projector.
        queries: views [N, 3, H, W] of images to look up.
        others: views of the images in the queue.
    """
    queue, exact = F.normalize(embed(network, others)), embed(network, queries)
    found: dict[str, tuple[Closeness, Seen]] = {}
    for kind in KINDS:
        seen = Seen()
        with emulated(network, kind, seen):
            found[kind] = closeness(embed(network, queries), exact, queue), seen
    return found


def views_of_run(config: RunConfig, mean: Tensor, std: Tensor, side: int, most: int) -> tuple[Tensor, Tensor]:
    """Returns whole views of a run's test images and of as many train images as `most`, drawn by one seed.

    Raises:
        ValueError: the data set has no test images.
    """
    data = load_run_data(config)
    if data.test is None:
        raise ValueError(f"{config.dataset} has no test images; take a run of another data set")
    random = np.random.default_rng(0)
    rows = [random.permutation(len(images))[:most] for images in (data.test, data.train)]
    queries, others = (
        views_of(images, chosen, side, mean.numpy(), std.numpy(), torch.float32)
        for images, chosen in zip((data.test, data.train), rows, strict=True)
    )
    return queries, others


def momentum_network(method: Method) -> nn.Module:
    """Returns a method's momentum network; raises ValueError if it has none."""
    if not hasattr(method, "momentum"):
        raise ValueError(f"{type(method).__name__} has no momentum network; take a run of mnclglf or byol, for example")
    return method.momentum


def train(config: RunConfig, out: Path, kind: str | None = None) -> None:
    """Trains a run, with its networks without gradient in a way of KINDS if one is given."""
    trainer = Trainer(config, out, console=Console(quiet=True))
    with emulated(trainer.method, kind) if kind else nullcontext():
        if signal := trainer.train():  # it has caught it
            raise KeyboardInterrupt(f"stopped by signal {signal}")


def table(found: Mapping[str, Mapping[str, tuple[Closeness, Seen]]]) -> str:
    """Formats comparisons as Markdown, by network, and then the largest sums by layer."""
    lines = [
        "| network | computed in | 1 - cosine, mean (worst) | same neighbor | overflows |",
        "|---|---|--:|--:|--:|",
    ]
    for network, rows in found.items():
        for kind, (close, seen) in rows.items():
            lines.append(f"| {network} | {kind} | {close} | {seen.overflows.total()} |")
    columns = [rows[HALF_SUMS][1].largest for rows in found.values()]
    lines += ["", f"| largest sum | {' | '.join(found)} |", "|---" + "|--:" * len(found) + "|"]
    lines += [f"| {layer} | {' | '.join(f'{column[layer]:,.1f}' for column in columns)} |" for layer in columns[0]]
    return "\n".join(lines)


def study(methods: Sequence[str], folder: Path, **settings: Any) -> str:
    """Trains methods in fp32, in bf16, and in bf16 with fp16 sums emulated; returns a table of k-NN accuracies."""
    ways = {"fp32": ("fp32", None), "bf16": ("bf16", None), f"bf16; {HALF_SUMS}": ("bf16", HALF_SUMS)}
    lines = ["| method | " + " | ".join(ways) + " |", "|---" + "|--:" * len(ways) + "|"]
    for method in methods:
        cells = []
        for name, (precision, kind) in ways.items():
            out = folder / f"{method}-{name}"
            train(run_config({"method": method, "precision": precision, **settings}), out, kind)
            results = evaluate(out, "knn", device="cpu")
            accuracy = next(result.top1 for result in results if result.representation == "pretrained")
            cells.append(f"{100 * accuracy:.1f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.half_sums", description=__doc__)
    parser.add_argument("--run", type=Path, help="a run with a momentum network; none trains one")
    parser.add_argument("--epochs", type=int, default=20, help="of the run that is trained")
    parser.add_argument("--width", type=int, default=64, help="channels of the untrained encoder's first stage")
    parser.add_argument("--side", type=int, default=28, help="side of the untrained encoder's images")
    parser.add_argument("--images", type=int, default=1024, help="most images of each kind: looked up, in the queue")
    parser.add_argument("--study", nargs="+", choices=METHODS, help="train these methods with fp16 sums instead")
    parser.add_argument("--image-size", type=int, default=16, help="side of the trained run's images")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = dict(
        dataset="digits", recipe="quick", epochs=options.epochs, image_size=options.image_size, device="cpu"
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.study:
            print(study(options.study, Path(folder), **settings))
            return
        run = options.run or Path(folder)
        if options.run is None:
            train(run_config({"method": "mnclglf", "precision": "fp32", **settings}), run)
        config, state = load_state(run)
        mean, std, side = normalization(run, state)
        trained = build_method(config, torch.float32)
        trained.load_state_dict(state["method"])
    large = replace(config, model=replace(config.model, width=options.width))
    untrained = build_method(large, torch.float32)
    networks = {"trained": (trained, config, side), "untrained": (untrained, large, options.side)}
    found = {
        f"{name}, width {config.model.width}, {size} x {size}": compare(
            momentum_network(method), *views_of_run(config, mean, std, size, options.images)
        )
        for name, (method, config, size) in networks.items()
    }
    print(table(found))


if __name__ == "__main__":
    main()
