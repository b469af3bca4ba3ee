"""The roofline of a training step: the least time that a machine needs for it, part by part.

The step runs on the meta device, so nothing is computed. Each convolution and matrix product counts its floating-point
operations; each operation counts the bytes that it has to move. A part takes the longer of its compute time and its
memory time at the machine's peaks. The step takes the sum of its parts. Passes over activations that the usual fusions
save are not counted: for batch norm and what follows it, only batch norm's own passes are.

So this is a yardstick, not a forecast. An implementation could go below it, with batch statistics made in a
convolution's epilogue or with parts that overlap.
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
from mnclglf.methods import Method, method_of
from mnclglf.training.start import sizes_of
from mnclglf_kernels import Backends
from mnclglf_kernels.backend import CPU_MULTIPLIES_BF16
from mnclglf_kernels.backend import TRITON_DTYPES as DTYPES
from mnclglf_kernels.operators import OPERATORS, Example

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.convolution.default: "convolutions, forward",
    aten.convolution_backward.default: "convolutions, backward",
}
# Passes over the activation. Batch norm reads its input twice (statistics, then normalization) and writes once: 3, and
# 1 for a residual. Its backward reads input and gradient twice and writes once: 5. With a residual the first launch
# also reads the result, for the ReLU's mask, and writes the residual's gradient: 7. Two gradients of one tensor are
# added: 1, as a kernel can read both where it reads one. A layer norm holds its row on the chip: 2, backward 3.
ACTIVATION_PASSES = {
    "mnclglf::batch_norm": 3,
    "mnclglf::batch_norm_backward": 5,
    "aten::native_layer_norm": 2,
    "aten::native_layer_norm_backward": 3,
    "aten::add.Tensor": 1,
}
# Passes more, by the place of an argument: the residual; the second gradient and the result.
MORE_PASSES = {"mnclglf::batch_norm": {5: 1}, "mnclglf::batch_norm_backward": {1: 1, 3: 2}}
# End of torch's name of each GPU whose peaks aot.py has, and its architecture.
GPU_NAMES = {"RTX 3090": 86, "RTX 4090": 89, "A100-SXM4-80GB": 80, "H100 80GB HBM3": 90}


class Peaks(NamedTuple):
    """Peak rates of a machine in one dtype."""

    name: str
    flops: float  # floating-point operations per second in matrix products
    memory_bytes: float  # bytes per second
    pads: bool  # True if its convolutions also multiply the zeros around an image


@dataclass
class Part:
    """Operations and memory traffic of a part of the step."""

    flops: int = 0
    unique_bytes: int = 0

    def seconds(self, peaks: Peaks) -> tuple[float, str]:
        """Returns (least time in seconds, "compute" or "memory", whichever bounds it)."""
        computing, moving = self.flops / peaks.flops, self.unique_bytes / peaks.memory_bytes
        return max((computing, "compute"), (moving, "memory"))


class Counter(TorchDispatchMode):
    """Counts the operations inside its `with` block by part, and records the arguments of contrastive_losses.

    Args:
        pads: count a convolution's products with the zeros around its image, as PyTorch's own counter does.
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
        elif func.overloadpacket in flop_registry:  # convolutions, matrix products, attention
            part = self.parts[CONVOLUTIONS.get(func, "matrix products")]
            flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            if func in CONVOLUTIONS and not self.pads:
                flops = round(flops * inside_share(func, args))
            part.flops += flops
            part.unique_bytes += unique_bytes((args, result))
        elif func.name() in ACTIVATION_PASSES:
            more = MORE_PASSES.get(func.name(), {})
            passes = ACTIVATION_PASSES[func.name()] + sum(more[i] for i in more if args[i] is not None)
            self.parts["batch norm and element-wise"].unique_bytes += passes * unique_bytes(args[0])
        return result


def inside_share(func: Any, args: Any) -> float:
    """Returns the fraction of a convolution's products whose pixel lies inside the image, not in its zero padding."""
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
    """Returns the bytes of all tensors in a nested structure, each tensor counted once."""
    return sum({id(x): x.numel() * x.itemsize for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


def on_meta(config: RunConfig, dtype: torch.dtype) -> Method:
    """Returns the run's method on the meta device, its weights in `dtype`, as autocast casts them."""
    with torch.device("meta"):
        method = method_of(config.method)(config.model, config.objective, queue_dtype=dtype)
    method.backends = Backends.all("triton")
    return method.to(dtype).train()


def inputs_on_meta(method: Method, images: int, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Returns the views and labels of a batch on the meta device."""
    views = torch.empty(method.views * images, 3, side, side, dtype=dtype, device="meta")
    return views, torch.empty(images, dtype=torch.int64, device="meta") if method.needs_labels else None


def step_parts(config: RunConfig, side: int, dtype: str, arch: int = 86, *, pads: bool = True) -> dict[str, Part]:
    """Returns the operations and the traffic of one training step, by part.

    Args:
        config: the run; its method, model, objective and batch size are used.
        side: side of a view in pixels.
        dtype: "bf16", "fp16" or "fp32".
        arch: architecture whose launch configurations our operators use.
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
            # Patches, targets and keys need no gradient in a step of MNCLGLF or MoCo v2: those launches do not happen.
            if not any(x.arguments.get(name) for name in ("BACKWARD", "OF_TARGETS", "OF_KEYS")):
                moved = x.traffic
                part.flops, part.unique_bytes = part.flops + moved.flops, part.unique_bytes + moved.unique_bytes
    trained = sum(p.numel() for p in method.trained_parameters())
    followed = sum(p.numel() for p in method.parameters()) - trained
    casts = 0 if dtype == "fp32" else (4 + 2) * (trained + followed)  # reads 4 bytes, writes 2
    parts["weight casts"] = Part(0, casts)
    parts["optimizer"] = Part(0, 4 * 5 * trained)  # reads weight, gradient, momentum; writes weight, momentum
    parts["moving average"] = Part(0, 4 * 3 * followed)  # reads both networks, writes one
    return parts


def nominal_peaks(arch: int, dtype: str, *, tf32: bool = False) -> Peaks:
    """Returns the nominal peaks of an architecture's GPU in aot.py; TF32 has half of fp16's rate on all of them."""
    from mnclglf_kernels.aot import GPUS

    gpu = GPUS[arch]
    flops = gpu.half_flops if dtype != "fp32" else gpu.half_flops / 2 if tf32 else gpu.fp32_flops
    return Peaks(gpu.name, flops, gpu.dram_bytes, pads=True)


@cache
def measured_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Returns the best rates of a few large matrix products and memory passes on this machine; takes about a second."""
    flops, moved = _best_rates(device, dtype)
    if device.type != "cuda":
        return Peaks("this CPU", flops, moved, pads=False)
    torch.cuda.empty_cache()  # this process may only wait for others, which need the memory to train
    return Peaks(torch.cuda.get_device_name(device), flops, moved, pads=True)


def _best_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Returns floating-point operations and bytes per second."""
    side, count = (8192, 2**28) if device.type == "cuda" else (2048, 2**25)
    multiplied = (torch.float32, torch.bfloat16) if CPU_MULTIPLIES_BF16 else (torch.float32,)
    if device.type == "cpu" and dtype not in multiplied:
        side = 256  # emulated: five products of side 2048 take minutes on one thread, fp16 also beside AVX-512 BF16
    square = torch.randn(side, side, device=device).to(dtype)
    numbers = torch.ones(count, device=device)
    product = torch.empty_like(square)
    flops = 2 * side**3 / best_seconds(lambda: torch.mm(square, square, out=product), device)
    # In place, as a CPU would otherwise read each cache line before writing it: the bytes moved are 2 * nbytes.
    moved = 2 * numbers.nbytes / best_seconds(lambda: numbers.neg_(), device)
    return flops, moved


def best_seconds(call: Callable[[], object], device: torch.device, rounds: int = 4) -> float:
    """Returns the least time of one call, including the device's work; the first call is a warm-up."""
    seconds: list[float] = []
    for _ in range(rounds + 1):
        since = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a call returns before the device has done its work
        seconds.append(time.perf_counter() - since)
    return min(seconds[1:])


def peaks_of(device: torch.device, dtype: torch.dtype, *, tf32: bool) -> Peaks:
    """Returns the nominal peaks of a known GPU, and measured peaks of any other device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, arch in GPU_NAMES.items():
            if name.endswith(known):
                return nominal_peaks(arch, short_name(dtype), tf32=tf32)
    return measured_peaks(device, dtype)


def short_name(dtype: torch.dtype) -> str:
    """Returns "bf16", "fp16" or "fp32"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def least_seconds(config: RunConfig, side: int, dtype: torch.dtype, peaks: Peaks) -> float:
    """Returns the roofline time of a step in seconds."""
    return sum(least_seconds_of_parts(config, side, dtype, peaks).values())


def least_seconds_of_parts(config: RunConfig, side: int, dtype: torch.dtype, peaks: Peaks) -> dict[str, float]:
    """Returns the roofline time of each part of a step in seconds, by its name."""
    parts = step_parts(config, side, short_name(dtype), pads=peaks.pads)
    return {name: part.seconds(peaks)[0] for name, part in parts.items()}
