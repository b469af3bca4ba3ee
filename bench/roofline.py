"""`python -m bench.roofline`: the least time of a training step on a GPU, and what sets it, part by part.

The step runs on the meta device, so nothing is computed: each convolution and matrix product counts its floating-point
operations, each operation the bytes that it has to move, and a part takes at least the longer of the two at the GPU's
peaks. What the usual fusions save is counted as saved: of batch norm and what follows it, only its own passes over the
activations. Parts follow each other. So this is a yardstick to hold a measured step against, not a forecast; statistics
made in a convolution's epilogue, or parts that overlap, could go below it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mnclglf.config import MethodName, RunConfig
from mnclglf.methods import METHODS, Method
from mnclglf.recipes import paper
from mnclglf_kernels import Backends
from mnclglf_kernels._triton.traffic import traffic
from mnclglf_kernels.inspect import DTYPES, GPUS, Gpu, launches
from mnclglf_kernels.sizes import OPERATORS, Sizes

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


@dataclass
class Part:
    """What a part of the step computes and moves."""

    flops: int = 0
    unique_bytes: int = 0

    def seconds(self, gpu: Gpu, dtype: str) -> tuple[float, str]:
        """(least time, what sets it)."""
        computing = self.flops / (gpu.fp32_flops if dtype == "fp32" else gpu.half_flops)
        moving = self.unique_bytes / gpu.dram_bytes
        return max((computing, "compute"), (moving, "DRAM"))


class Counter(TorchDispatchMode):
    """Counts the operations within it by part."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Part] = defaultdict(Part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS or func in PRODUCTS:
            part = self.parts[CONVOLUTIONS.get(func, "heads")]
            part.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            part.unique_bytes += unique_bytes((args, result))
        elif func in ACTIVATION_PASSES:
            activation = args[0]
            self.parts["batch norm and element-wise"].unique_bytes += ACTIVATION_PASSES[func] * unique_bytes(activation)
        return result


def unique_bytes(tree: Any) -> int:
    """Of all tensors in a nest, each once."""
    return sum({id(x): x.numel() * x.itemsize for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


def sizes_of(config: RunConfig, side: int) -> Sizes:
    """The operators' sizes of a run."""
    objective, model = config.objective, config.model
    return Sizes(
        config.optim.batch_size, side, 8 * model.width, objective.k, model.projector_width, objective.queue_size
    )


def on_meta(config: RunConfig, dtype: torch.dtype) -> Method:
    """The method without values, its weights in `dtype` as autocast casts them."""
    with torch.device("meta"):
        method = METHODS[config.method](config.model, config.objective, queue_dtype=dtype)
    method.backends = Backends.all("triton")
    return method.to(dtype).train()


def step_parts(config: RunConfig, side: int, dtype: str, arch: int = 86) -> dict[str, Part]:
    """What one training step computes and moves, by part."""
    sizes = sizes_of(config, side)
    method = on_meta(config, DTYPES[dtype])
    shape = (sizes.images, 3, side, side)
    views = [torch.empty(shape, dtype=DTYPES[dtype], device="meta") for _ in range(method.views)]
    with Counter() as counter:
        method(views).total.backward()
    parts = dict(counter.parts)
    for op in OPERATORS:
        part = parts[op] = Part()
        for x in launches(op, DTYPES[dtype], arch, sizes):
            # In a step the patches and the targets need no gradient.
            if not x.arguments.get("BACKWARD") and not x.arguments.get("OF_TARGETS"):
                moved = traffic(x)
                part.flops, part.unique_bytes = part.flops + moved.flops, part.unique_bytes + moved.unique_bytes
    trained = sum(p.numel() for p in method.trained_parameters())
    followed = sum(p.numel() for p in method.parameters()) - trained
    casts = 0 if dtype == "fp32" else (4 + 2) * (trained + followed)
    parts["weight casts"] = Part(0, casts)
    parts["optimizer"] = Part(0, 4 * 5 * trained)  # reads weight, gradient, momentum; writes weight, momentum
    parts["moving average"] = Part(0, 4 * 3 * followed)
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--arch", choices=[f"sm_{arch}" for arch in GPUS], default="sm_86")
    parser.add_argument("--method", choices=METHODS, default="mnclglf")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args(arguments)
    arch, method = int(options.arch.removeprefix("sm_")), options.method
    print(table(method, options.batch_size, options.side, options.dtype, arch))


def table(method: MethodName, batch_size: int, side: int, dtype: str, arch: int) -> str:
    """The parts of a step of the paper recipe as Markdown, the longest first."""
    config, gpu = paper(method, "cifar10"), GPUS[arch]
    config = replace(config, optim=replace(config.optim, batch_size=batch_size))
    parts = step_parts(config, side, dtype, arch)
    rows = sorted(((*part.seconds(gpu, dtype), name, part) for name, part in parts.items()), key=lambda row: -row[0])
    lines = [
        f"{method}, batch {batch_size}, {side} x {side}, {dtype}, on an {gpu.name}",
        "",
        "| part | TFLOP | GB | least ms | set by |",
        "|---|--:|--:|--:|---|",
    ]
    for seconds, bound, name, part in rows:
        lines.append(
            f"| {name} | {part.flops / 1e12:.3f} | {part.unique_bytes / 1e9:.3f} | {1e3 * seconds:.2f} | {bound} |"
        )
    total = sum(row[0] for row in rows)
    lines.append(
        f"| together | {sum(row[3].flops for row in rows) / 1e12:.3f} | "
        f"{sum(row[3].unique_bytes for row in rows) / 1e9:.3f} | {1e3 * total:.2f} | "
        f"{batch_size / total:.0f} images/s |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
