"""`python -m bench.half_sums`: what convolutions that sum in fp16 do to a momentum network's embeddings, on a CPU.

It trains on digits for a minute, or takes a run, and sends test images through the momentum network in train mode: in
fp32, in bf16 and in fp16 with fp32 sums, and in fp16 with the convolutions' sums rounded to fp16 after every 16
products, the filter's taps outermost. That is the worst of the orders in which a tensor core could sum. An untrained
ResNet-18 of width 64, with sums of up to 4,608 products, stands beside it. The linear layers of the head sum in fp32.

Printed are 1 - cosine to the fp32 embedding, how often the nearest neighbor among training images is that of fp32, the
results that overflowed, and the largest magnitude of a sum in each layer.

With --study it trains methods on digits with such sums emulated, and without: in bf16 runs in the networks without
gradient; in fp16 runs (--precision fp16) also in the online forward and in the gradient of the input. Printed are k-NN
and linear accuracy, as mean over the seeds with the lowest and the highest. A study that was stopped goes on where it
was. The methods' settings differ (STUDY, OF_METHOD), so methods cannot be compared by its table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
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
from torch.nn.grad import conv2d_input, conv2d_weight

from mnclglf.api import normalization, run_config
from mnclglf.config import KnnConfig, LogisticConfig, RunConfig
from mnclglf.evaluation.features import views_of
from mnclglf.evaluation.run import evaluate_run
from mnclglf.methods.base import Method
from mnclglf.models.batch_norm import BatchNorm, batch_statistics_only
from mnclglf.runs.checkpoint import load_state
from mnclglf.runs.files import read_config, read_object, write_json
from mnclglf.runs.metrics import read_records
from mnclglf.training.loop import Trainer
from mnclglf.training.start import build_method, load_run_data

FOLLOWING = ("mnclglf", "mnclglf_official", "mocov2", "byol", "fast_moco")  # methods with a network without gradient
# Settings of the study's runs: a minute or less on a core, with steps enough to beat the untrained encoder.
STUDY: dict[str, Any] = dict(
    dataset="digits", recipe="quick", device="cpu", image_size=8, batch_size=128, lr=0.06, epochs=12, log_every=1
)
OF_METHOD: dict[str, dict[str, Any]] = {  # in place of these
    "mnclglf": dict(batch_size=64, lr=0.03, epochs=16),
    "mnclglf_official": dict(batch_size=64, lr=0.03, epochs=16),
    "mocov2": dict(epochs=30, lr=0.1),
    "fast_moco": dict(batch_size=64, lr=0.03, epochs=10, image_size=16, width=8),
    "byol": dict(batch_size=64, lr=0.4, epochs=16, projector_width=128, ema_momentum=0.9),
}
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
    taps = weight.half().float().permute(2, 3, 1, 0).contiguous()  # [T, T, C, K]
    rows, columns = ((size - len(taps)) // stride + 1 for size in images.shape[1:3])
    sums = torch.zeros(len(images) * rows * columns, len(weight), device=images.device)  # rounded to fp16 all along
    rounded = torch.empty_like(sums, dtype=torch.float16)
    for row, column in itertools.product(range(len(taps)), repeat=2):
        below, right = row + stride * (rows - 1) + 1, column + stride * (columns - 1) + 1
        pixels = images[:, row:below:stride, column:right:stride].flatten(0, 2)
        for first in range(0, pixels.shape[1], BLOCK):
            block = slice(first, first + BLOCK)
            sums.addmm_(pixels[:, block], taps[row, column, block])
            if watch is not None:
                watch(sums)
            sums.copy_(rounded.copy_(sums))
    return rounded.view(len(images), rows, columns, -1).permute(0, 3, 1, 2)


def rounded_conv2d(images: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, *, dtype: torch.dtype) -> Tensor:
    """Returns a convolution of operands in `dtype` that sums in fp32 and is rounded once."""
    return F.conv2d(images.to(dtype).float(), weight.to(dtype).float(), None, stride, padding).to(dtype)


def input_gradient_half_sums(
    upstream: Tensor, weight: Tensor, size: tuple[int, int], stride: int, padding: int
) -> Tensor:
    """Returns the gradient of a convolution's input [N, C, H, W], with sums in fp16 as of `half_sum_conv2d`.

    It is a convolution of the upstream gradient, with zeros where the stride left pixels out, and the turned filter.
    Products with these zeros leave a rounded sum as it is.

    Args:
        upstream: [N, K, H', W'], rounded to fp16.
        weight: [K, C, T, T], rounded to fp16.
        size: H and W.
        stride: of the forward convolution.
        padding: of the forward convolution.
    """
    count, outputs, rows, columns = upstream.shape
    border = weight.shape[2] - 1 - padding
    height, width = (side + padding - border for side in size)  # side + 2 padding - T + 1, the rows of a stride of 1
    apart = upstream.new_zeros(count, outputs, height, width)
    apart[:, :, ::stride, ::stride][:, :, :rows, :columns] = upstream
    return half_sum_conv2d(F.pad(apart, [border] * 4), weight.flip(2, 3).transpose(0, 1))


def rounded_input_gradient(
    upstream: Tensor, weight: Tensor, size: tuple[int, int], stride: int, padding: int, *, dtype: torch.dtype
) -> Tensor:
    """Returns the gradient of a convolution's input, of operands in `dtype`, that sums in fp32 and is rounded once."""
    shape = len(upstream), weight.shape[1], *size
    return conv2d_input(shape, weight.to(dtype).float(), upstream.to(dtype).float(), stride, padding).to(dtype)


class Kind(NamedTuple):
    """A way to compute: the dtype of operands and results, the convolution, and the gradient of its input."""

    dtype: torch.dtype
    convolve: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]


def _sums_in_fp32(dtype: torch.dtype) -> Kind:
    return Kind(dtype, partial(rounded_conv2d, dtype=dtype), partial(rounded_input_gradient, dtype=dtype))


HALF_SUMS = "fp16, fp16 sums"
KINDS = {
    "bf16": _sums_in_fp32(torch.bfloat16),
    "fp16": _sums_in_fp32(torch.float16),
    HALF_SUMS: Kind(torch.float16, half_sum_conv2d, input_gradient_half_sums),
}


class _Convolution(torch.autograd.Function):
    """A convolution in a way of KINDS whose input gradient is in another; the weight gradient sums in fp32."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, stride: int, padding: int, forward: Kind, backward: Kind
    ) -> Tensor:
        ctx.save_for_backward(input.to(forward.dtype), weight)
        ctx.settings = stride, padding, backward
        return forward.convolve(input, weight, stride, padding)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        stride, padding, kind = ctx.settings
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = kind.input_gradient(upstream[0], weight, input.shape[2:], stride, padding).float()
        above = upstream[0].to(kind.dtype).float()
        of_weight = conv2d_weight(input.float(), weight.shape, above, stride, padding)
        return gradient, of_weight.to(kind.dtype).float(), None, None, None, None


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
def emulated(
    network: nn.Module,
    kind: str,
    seen: Seen | None = None,
    *,
    online: str | None = None,
    input_gradient: str | None = None,
) -> Generator[None]:
    """Context in which the parts of a network's work that are named are computed in a way of KINDS.

    Forwards without gradient are those of a method's momentum and stop-gradient networks. It reads the fp32 weights,
    also where a training step casts them once for all its forwards. What a layer gives is rounded to the dtype and kept
    in fp32, as autocast to bf16 does not take fp16 beside it, and as fp16 is slow on a CPU. Gradients are rounded at
    the same places. The gradient of the weights always sums in fp32.

    Args:
        network: a network, or a whole method.
        kind: key of KINDS, for forwards without gradient.
        seen: takes in what the convolutions of forwards without gradient come to.
        online: key of KINDS, for forwards with gradient; None leaves them and their gradients what they are.
        input_gradient: key of KINDS, for the gradient of a convolution's input; given with `online`.

    Raises:
        ValueError: `online` and `input_gradient` are not of one dtype, or only one is given.
    """
    if (online is None) != (input_gradient is None):
        raise ValueError(
            f"online {online!r} and input_gradient {input_gradient!r} are of one graph; give both, or neither"
        )
    without = KINDS[kind]
    forward, backward = (None if name is None else KINDS[name] for name in (online, input_gradient))
    if forward and backward and forward.dtype != backward.dtype:
        raise ValueError(f"online {online!r} and input_gradient {input_gradient!r} differ in dtype; give one dtype")

    def convolution(
        name: str, layer: nn.Conv2d, weight: Tensor, plain: Callable[[Tensor], Tensor], input: Tensor
    ) -> Tensor:
        stride, padding = layer.stride[0], int(layer.padding[0])
        with torch.autocast(input.device.type, enabled=False):
            if not torch.is_grad_enabled():
                watching = {"watch": partial(seen.sums, name)} if seen and kind == HALF_SUMS else {}
                result = without.convolve(input, weight, stride, padding, **watching)
                if seen:
                    seen.result(name, result)
                return result.float()
            if forward:
                return _Convolution.apply(input, weight, stride, padding, forward, backward).float()
        return plain(input)

    def product(layer: nn.Linear, weight: Tensor, plain: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        way = forward if torch.is_grad_enabled() else without
        if way is None:
            return plain(input)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.float()
            return F.linear(input.to(way.dtype).float(), weight.to(way.dtype).float(), bias).to(way.dtype).float()

    def rounded(plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        way, result = forward if torch.is_grad_enabled() else without, plain(*args, **kwargs)
        return result if way is None else result.to(way.dtype).float()

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


def train(config: RunConfig, out: Path, **parts: Any) -> None:
    """Trains a run, with the parts that are given computed in a way of KINDS; they are named as in `emulated`."""
    trainer = Trainer(config, out, console=Console(quiet=True))
    with emulated(trainer.method, **parts) if parts else nullcontext():
        if signal := trainer.train():  # it has caught it
            raise KeyboardInterrupt(f"stopped by signal {signal}; the same command goes on")


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


class Way(NamedTuple):
    """A way to train: the run's precision, and the parts of its work that are emulated, as `emulated` names them."""

    precision: str
    parts: dict[str, str]


_FP16 = {"online": "fp16", "input_gradient": "fp16"}  # emulated too, as PyTorch takes ten times as long on a CPU
WAYS: dict[str, dict[str, Way]] = {
    "bf16": {
        "fp32": Way("fp32", {}),
        "bf16": Way("bf16", {}),
        "bf16; fp16 sums without gradient": Way("bf16", {"kind": HALF_SUMS}),
    },
    "fp16": {
        "fp16": Way("fp16", {"kind": "fp16", **_FP16}),
        "fp16 sums without gradient": Way("fp16", {"kind": HALF_SUMS, **_FP16}),
        "and in the online forward": Way("fp16", {"kind": HALF_SUMS, **_FP16, "online": HALF_SUMS}),
        "and in the gradient of the input": Way(
            "fp16", {"kind": HALF_SUMS, "online": HALF_SUMS, "input_gradient": HALF_SUMS}
        ),
    },
}


def accuracies(run: Path) -> dict[str, float]:
    """Returns top-1 in percent of a run's encoder, and of the untrained one, by k-NN and by logistic regression.

    The encoders compute in fp32, however they were trained.
    """
    config, quiet = read_config(run), Console(quiet=True)
    exact = replace(config, engine=replace(config.engine, precision="fp32"))
    found = [
        result
        for evaluation in (KnnConfig(device="cpu"), LogisticConfig(device="cpu"))
        for result in evaluate_run(run, evaluation, quiet, config=exact, representations=("pretrained", "untrained"))
    ]
    return {f"{result.protocol}, {result.representation}": 100 * result.top1 for result in found}


def skipped_steps(run: Path) -> int:
    """Returns the number of steps with an overflow in a run that logs each step."""
    records, _ = read_records(run / "metrics.jsonl")
    return sum(record["gradient_norm"] is None for record in records)


def study(
    methods: Sequence[str],
    ways: Mapping[str, Way],
    seeds: Sequence[int],
    out: Path,
    settings: Mapping[str, Mapping[str, Any]],
) -> str:
    """Trains each method in each way from each seed, writes what is known after each run, and returns a table.

    Args:
        methods: names of methods.
        ways: ways to train, by name.
        seeds: seeds of the runs.
        out: folder of the runs and of study.json; runs that are there are not repeated.
        settings: settings of the runs, by method.

    Raises:
        ValueError: the folder has a run of other settings.
    """
    file = out / "study.json"
    runs: dict[str, dict[str, Any]] = read_object(file) or {}
    todo = [(seed, method, way) for seed in seeds for method in methods for way in ways]
    for seed, method, way in todo:
        done = runs.get(run_name(method, way, seed))
        if done and done["settings"] != settings[method]:
            raise ValueError(f"{file} has {method} with {done['settings']}, not {settings[method]}; give another --out")
    for seed, method, way in todo:
        name = run_name(method, way, seed)
        if name in runs:
            continue
        precision, parts = ways[way]
        folder, start = out / name.replace(", ", "-").replace(" ", "_"), time.process_time()
        config = run_config({"method": method, "precision": precision, "seed": seed, **settings[method]})
        train(config, folder, **parts)
        seconds = time.process_time() - start
        runs[name] = {"skipped": skipped_steps(folder), "seconds": seconds, **accuracies(folder)}
        print(f"{name}: {json.dumps(runs[name])}", flush=True)
        runs[name]["settings"] = settings[method]
        write_json(file, runs)
    return study_table(runs, methods, ways, seeds)


def run_name(method: str, way: str, seed: int) -> str:
    """Returns the name of a run of the study."""
    return f"{method}, {way}, seed {seed}"


def study_table(
    runs: Mapping[str, Mapping[str, Any]], methods: Sequence[str], ways: Iterable[str], seeds: Sequence[int]
) -> str:
    """Formats a study's runs as Markdown: means over the seeds that are there, lowest and highest, overflowed steps."""
    lines = ["| method | computed in | seeds | k-NN | linear | steps skipped |", "|---|---|--:|--:|--:|--:|"]

    def row(method: str, way: str, found: Sequence[Mapping[str, Any]], encoder: str) -> str:
        cells: list[str] = []
        for protocol in ("knn", "logistic"):
            values = [run[f"{protocol}, {encoder}"] for run in found]
            cells.append(f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        skipped = sum(run["skipped"] for run in found) if encoder == "pretrained" else ""
        return f"| {method} | {way} | {len(found)} | {' | '.join(cells)} | {skipped} |"

    for method in methods:
        by_way = {way: [runs[name] for seed in seeds if (name := run_name(method, way, seed)) in runs] for way in ways}
        done = {way: found for way, found in by_way.items() if found}
        lines += [row(method, way, found, "pretrained") for way, found in done.items()]
        if done:  # a seed's untrained encoder is that of every way
            lines.append(row(method, "untrained", max(done.values(), key=len), "untrained"))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.half_sums", description=__doc__)
    parser.add_argument("--run", type=Path, help="a run with a momentum network; none trains one")
    parser.add_argument("--epochs", type=int, default=20, help="of the run that is trained")
    parser.add_argument("--width", type=int, default=64, help="channels of the untrained encoder's first stage")
    parser.add_argument("--side", type=int, default=28, help="side of the untrained encoder's images")
    parser.add_argument("--images", type=int, default=1024, help="most images of each kind: looked up, in the queue")
    parser.add_argument("--study", nargs="+", choices=FOLLOWING, help="train these methods with fp16 sums instead")
    parser.add_argument("--precision", choices=WAYS, default="bf16", help="of the study's runs with fp16 sums")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the study's runs")
    parser.add_argument("--out", type=Path, default=Path("runs/half-sums"), help="the study's folder, which it resumes")
    parser.add_argument("--image-size", type=int, default=16, help="side of the trained run's images")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = dict(
        dataset="digits", recipe="quick", epochs=options.epochs, image_size=options.image_size, device="cpu"
    )
    if options.study:
        torch.set_num_threads(1)  # tensors are small, and a second study takes the other core
        chosen = options.study, WAYS[options.precision], options.seeds, options.out / options.precision
        print(study(*chosen, {method: {**STUDY, **OF_METHOD.get(method, {})} for method in options.study}))
        return
    with tempfile.TemporaryDirectory() as folder:
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
