"""The least time of a training step on a machine, part by part: what a measured step is held against.

The step runs on the meta device, so nothing is computed: each convolution and matrix product counts its floating-point
operations, each operation the bytes that it has to move, and a part takes at least the longer of the two at the
machine's peaks. What the usual fusions save is counted as saved: of batch norm and what follows it, only its own passes
over the activations. Parts follow each other. So this is a yardstick, not a forecast; statistics made in a
convolution's epilogue, or parts that overlap, could go below it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mnclglf.config import RunConfig
from mnclglf.methods import METHODS, Method
from mnclglf.training.start import sizes_of
from mnclglf_kernels import Backends
from mnclglf_kernels.backend import TRITON_DTYPES as DTYPES
from mnclglf_kernels.operators import OPERATORS, Example

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.convolution.default: "convolutions, forward",
    aten.convolution_backward.default: "convolutions, backward",
}
PRODUCTS = {aten.mm.default, aten.addmm.default}
# Reads and writes of its activation that the usual fusions leave: batch norm needs its input whole before it writes,
# and backward both input and gradient whole; a residual is read where it is added; ReLU comes with what is written
# anyway, and its backward with the gradient, for the sign of what was written.
ACTIVATION_PASSES = {
    aten.native_batch_norm.default: 3,
    aten._native_batch_norm_legit.default: 3,
    aten._native_batch_norm_legit.no_stats: 3,
    aten.native_batch_norm_backward.default: 5,
    aten.add_.Tensor: 1,
    aten.add.Tensor: 1,
    aten.threshold_backward.default: 1,
}
# How torch names the GPUs whose peaks aot.py has.
GPU_NAMES = {"RTX 3090": 86, "RTX 4090": 89, "A100-SXM4-80GB": 80, "H100 80GB HBM3": 90}


class Peaks(NamedTuple):
    """What a machine can do at most in one dtype."""

    name: str
    flops: float  # a second, of matrix products
    memory_bytes: float  # a second
    pads: bool  # whether its convolutions multiply the zeros around an image too


@dataclass
class Part:
    """What a part of the step computes and moves."""

    flops: int = 0
    unique_bytes: int = 0

    def seconds(self, peaks: Peaks) -> tuple[float, str]:
        """(least time, what sets it)."""
        computing, moving = self.flops / peaks.flops, self.unique_bytes / peaks.memory_bytes
        return max((computing, "compute"), (moving, "memory"))


class Counter(TorchDispatchMode):
    """Counts the operations within it by part, and notes what contrastive_losses is called with.

    Args:
        pads: as PyTorch's own counter, count a convolution's products with the zeros around its image.
    """

    def __init__(self, *, pads: bool) -> None:
        super().__init__()
        self.pads = pads
        self.parts: dict[str, Part] = defaultdict(Part)
        self.splits: list[int] = []  # S of each pair that contrastive_losses gets

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == "mnclglf::contrastive_losses":
            targets, predictions, _ = args
            self.splits += [len(h) // len(p) for h, p in zip(targets, predictions, strict=True)]
        elif func in CONVOLUTIONS or func in PRODUCTS:
            part = self.parts[CONVOLUTIONS.get(func, "heads")]
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            if func in CONVOLUTIONS and not self.pads:
                flops = round(flops * inside_share(func, args))
            part.flops += flops
            part.unique_bytes += unique_bytes((args, result))
        elif func in ACTIVATION_PASSES:
            activation = args[0]
            self.parts["batch norm and element-wise"].unique_bytes += ACTIVATION_PASSES[func] * unique_bytes(activation)
        return result


def inside_share(func: Any, args: Any) -> float:
    """Share of a convolution's products whose pixel lies in the image: the others are with the zeros around it."""
    if func is aten.convolution.default:
        image, weight, _, strides, paddings, *_ = args
    else:
        _, image, weight, _, strides, paddings, *_ = args
    share = 1.0
    for side, taps, stride, padding in zip(image.shape[2:], weight.shape[2:], strides, paddings, strict=True):
        outputs = (side + 2 * padding - taps) // stride + 1
        inside = sum(0 <= o * stride - padding + tap < side for o in range(outputs) for tap in range(taps))
        share *= inside / (outputs * taps)
    return share


def unique_bytes(tree: Any) -> int:
    """Of all tensors in a nest, each once."""
    return sum({id(x): x.numel() * x.itemsize for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


def on_meta(config: RunConfig, dtype: torch.dtype) -> Method:
    """The method without values, its weights in `dtype` as autocast casts them."""
    with torch.device("meta"):
        method = METHODS[config.method](config.model, config.objective, queue_dtype=dtype)
    method.backends = Backends.all("triton")
    return method.to(dtype).train()


def inputs_on_meta(method: Method, images: int, side: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """Views and labels."""
    shape = (images, 3, side, side)
    views = [torch.empty(shape, dtype=dtype, device="meta") for _ in range(method.views)]
    return views, torch.empty(images, dtype=torch.int64, device="meta") if method.labelled else None


def step_parts(config: RunConfig, side: int, dtype: str, arch: int = 86, *, pads: bool = True) -> dict[str, Part]:
    """What one training step computes and moves, by part.

    Args:
        config: method, model, objective and batch size count.
        side: of a view in pixels.
        dtype: "bf16", "fp16" or "fp32".
        arch: the GPU whose launch configurations our operators have.
        pads: see Counter.
    """
    method = on_meta(config, DTYPES[dtype])
    with Counter(pads=pads) as counter:
        method(*inputs_on_meta(method, config.optim.batch_size, side, DTYPES[dtype])).total.backward()
    parts = dict(counter.parts)
    for op in (*method.operators, "augment"):
        part = parts["input" if op == "augment" else op] = Part()
        example = Example(sizes=sizes_of(config, side, side), dtype=DTYPES[dtype], splits=counter.splits)
        for x in OPERATORS[op].launches(example, arch):
            # As in a step of MNCLGLF or MoCo v2, where patches, targets and keys need no gradient.
            if not any(x.arguments.get(name) for name in ("BACKWARD", "OF_TARGETS", "OF_KEYS")):
                moved = x.traffic
                part.flops, part.unique_bytes = part.flops + moved.flops, part.unique_bytes + moved.unique_bytes
    trained = sum(p.numel() for p in method.trained_parameters())
    followed = sum(p.numel() for p in method.parameters()) - trained
    casts = 0 if dtype == "fp32" else (4 + 2) * (trained + followed)
    parts["weight casts"] = Part(0, casts)
    parts["optimizer"] = Part(0, 4 * 5 * trained)  # reads weight, gradient, momentum; writes weight, momentum
    parts["moving average"] = Part(0, 4 * 3 * followed)
    return parts


def nominal_peaks(arch: int, dtype: str, *, tf32: bool = False) -> Peaks:
    """Those that aot.py has for an architecture's GPU; TF32 has half of fp16's rate on all of them."""
    from mnclglf_kernels.aot import GPUS

    gpu = GPUS[arch]
    flops = gpu.half_flops if dtype != "fp32" else gpu.half_flops / 2 if tf32 else gpu.fp32_flops
    return Peaks(gpu.name, flops, gpu.dram_bytes, pads=True)


@cache
def measured_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The best of a few large matrix products and passes over memory on this machine; takes about a second."""
    flops, moved = _best_rates(device, dtype)
    if device.type != "cuda":
        return Peaks("this CPU", flops, moved, pads=False)
    torch.cuda.empty_cache()  # this process may go on to wait for others, which train
    return Peaks(torch.cuda.get_device_name(device), flops, moved, pads=True)


def _best_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations and bytes a second."""
    side, count = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    square = torch.randn(side, side, device=device).to(dtype)
    numbers = torch.ones(count, device=device)
    product = torch.empty_like(square)
    flops = 2 * side**3 / best_seconds(lambda: torch.mm(square, square, out=product), device)
    moved = 2 * numbers.nbytes / best_seconds(lambda: numbers.neg_(), device)  # in place: no line is read for a write
    return flops, moved


def best_seconds(call: Callable[[], object], device: torch.device, rounds: int = 4) -> float:
    """Of one call, the device's work included; the first one warms up."""
    seconds: list[float] = []
    for _ in range(rounds + 1):
        since = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - since)
    return min(seconds[1:])


def peaks_of(device: torch.device, dtype: torch.dtype, *, tf32: bool) -> Peaks:
    """Of a known GPU the nominal ones, of any other device what is measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, arch in GPU_NAMES.items():
            if name.endswith(known):
                return nominal_peaks(arch, name_of(dtype), tf32=tf32)
    return measured_peaks(device, dtype)


def name_of(dtype: torch.dtype) -> str:
    """ "bf16", "fp16" or "fp32"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def least_seconds(config: RunConfig, side: int, dtype: torch.dtype, peaks: Peaks) -> float:
    """The least time of a step."""
    parts = step_parts(config, side, name_of(dtype), pads=peaks.pads)
    return sum(part.seconds(peaks)[0] for part in parts.values())
