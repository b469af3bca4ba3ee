"""`python -m bench.convolution`: compiles a prototype of a fused convolution for a GPU that is not here.

The prototype is a 3 x 3 convolution of stride 1 for the networks without gradient. It applies the batch norm and the
ReLU before it as it reads its input, and makes the partial moments for the batch norm after it from its fp32 sums. No
network uses it. docs/lab/convolution.md has its design, its figures and what is unknown.

The first table has the resources and the inner loop of each layer (--tiles: of each tile that was tried), the second
the bytes that it saves beside cuDNN's convolution and the operator `batch_norm`, and the time that it may take.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mnclglf_kernels import aot
from mnclglf_kernels._triton import batch_norm, launch
from mnclglf_kernels._triton.launch import Launch, Traffic, blocks, sum_dtype, total_bytes
from mnclglf_kernels.backend import INTERPRETED


class Tile(NamedTuple):
    """What one program holds, and how it runs."""

    pixels: int  # of one view
    outputs: int  # channels of y
    inputs: int  # channels of x per step of the inner loop
    warps: int = 4
    stages: int = 2


class Layer(NamedTuple):
    """A stage of ResNet-18 of width 64 on 32 x 32 images, over all forwards without gradient."""

    channels: int
    side: int
    convolutions: int  # per forward, of stride 1
    passes: int  # over an activation that the prototype saves per forward; docs/lab/convolution.md counts them


LAYERS = (Layer(64, 32, 4, 8), Layer(128, 16, 3, 7), Layer(256, 8, 3, 7), Layer(512, 4, 3, 7))
FORWARDS = 4  # of 13: two views of the momentum network and two of the stop-gradient network
TILE = Tile(128, 64, 64)
TILES = (
    TILE,
    Tile(128, 64, 64, stages=3),
    Tile(128, 64, 32),
    Tile(128, 64, 32, stages=3),
    Tile(64, 64, 64),
    Tile(128, 64, 64, warps=8),
    Tile(256, 64, 64, warps=8),
    Tile(128, 128, 32),
    Tile(128, 128, 64, warps=8),
)
SHARES = (1.0, 0.9, 0.8, 0.7)  # of the peak rate, at which cuDNN's convolution may run


@triton.jit
def convolution_kernel(
    x,  # [V, R, C]: a channels_last image is H * W rows
    weight,  # [K, 3, 3, C]
    scale,  # None, or [V, C]: x * scale + shift and the ReLU come before the convolution
    shift,
    y,  # [V, R, K]
    moments,  # None, or [V, P, 2, K]: mean and sum of squared deviations of a part, as in batch_norm
    R: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    SUM: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter cannot multiply bf16
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Computes OUTPUTS channels of a part of a view. Programs of the same part run side by side and share x in L2."""
    outputs, part, view = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.program_id(1), tl.program_id(2)
    pixels, inputs = part * PIXELS + tl.arange(0, PIXELS), tl.arange(0, INPUTS)
    inside = pixels < R
    row, column = pixels // W % H, pixels % W
    images = x + view.to(tl.int64) * (R * C) + pixels[:, None] * C + inputs[None, :]
    filters = weight + outputs[None, :] * (9 * C) + inputs[:, None]
    total = tl.zeros([PIXELS, OUTPUTS], SUM)
    # The taps are the inner loop: scale and shift stay in registers, and the nine reads of a pixel are near in time.
    for start in range(0, C, INPUTS):
        if scale is not None:
            slope = tl.load(scale + view * C + start + inputs)[None, :]
            offset = tl.load(shift + view * C + start + inputs)[None, :]
        for tap in range(9):
            down, right = tap // 3 - 1, tap % 3 - 1
            here = inside & (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
            values = tl.load(images + ((down * W + right) * C + start), mask=here[:, None], other=0)
            if scale is not None:
                normal = tl.maximum(values.to(SUM) * slope + offset, 0, propagate_nan=tl.PropagateNan.ALL)
                values = tl.where(here[:, None], normal, 0).to(values.dtype)  # padding comes after the batch norm
            taken = tl.load(filters + (tap * C + start))
            if WIDEN:
                values, taken = values.to(SUM), taken.to(SUM)
            total = tl.dot(values, taken, total, input_precision="ieee", out_dtype=SUM)
    place = y + view.to(tl.int64) * (R * K) + pixels[:, None] * K + outputs[None, :]
    tl.store(place, total, mask=inside[:, None])
    if moments is not None:
        mean = tl.sum(total, 0) / tl.minimum(R - part * PIXELS, PIXELS)
        off = tl.where(inside[:, None], total - mean[None, :], 0)
        place = moments + (view.to(tl.int64) * P + part) * (2 * K) + outputs
        tl.store(place, mean)
        tl.store(place + K, tl.sum(off * off, 0))


def traffic(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tensors = [a[name] for name in ("x", "weight", "scale", "shift", "y", "moments") if a[name] is not None]
    pixel = a["C"] * a["x"].itemsize
    taps = len(a["x"]) * (3 * a["H"] - 2) * (3 * a["W"] - 2)  # reads of pixels; those of the padding are masked
    issued = grid[0] * taps * pixel + a["P"] * grid[2] * total_bytes([a["weight"]])
    issued += total_bytes([x for x in (a["y"], a["moments"]) if x is not None])
    issued += 0 if a["scale"] is None else grid[0] * a["P"] * total_bytes([a["scale"], a["shift"]])
    return Traffic(2 * 9 * a["y"].numel() * a["C"], total_bytes(tensors), issued)


def empty_moments(x: Tensor, outputs: int, views: int, tile: Tile) -> Tensor:
    rows = len(x) // views * x.shape[2] * x.shape[3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((views, blocks(rows, tile.pixels), 2, outputs), dtype=dtype)


def launch_of(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    moments: Tensor | None,
    views: int,
    tile: Tile = TILE,
) -> Launch:
    """The launch from x to y and moments; x, weight and y are channels_last."""
    n, c, h, w = x.shape
    rows, k = n // views * h * w, len(weight)
    if k % tile.outputs or c % tile.inputs or n % views or rows * max(c, k) >= 2**31:
        raise ValueError(
            f"{n} images of {c} channels to {k} in {views} views: the prototype takes a multiple of {views} images, of "
            f"{tile.inputs} channels to one of {tile.outputs}, and fewer than 2**31 elements per view; use F.conv2d"
        )
    sizes: dict[str, Any] = dict(R=rows, H=h, W=w, C=c, K=k, P=blocks(rows, tile.pixels), SUM=sum_dtype(x))
    sizes |= dict(WIDEN=INTERPRETED and x.dtype == torch.bfloat16)
    sizes |= dict(PIXELS=tile.pixels, OUTPUTS=tile.outputs, INPUTS=tile.inputs)
    arguments = dict(x=x, weight=weight, scale=scale, shift=shift, y=y, moments=moments, **sizes)
    grid = k // tile.outputs, sizes["P"], views
    return Launch(convolution_kernel, traffic, grid, arguments, warps=tile.warps, stages=tile.stages)


def convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    views: int = 1,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor]:
    """Returns y and the moments of its parts, [V, P, 2, K]."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    y = x.new_empty((len(x), len(weight), *x.shape[2:])).contiguous(memory_format=torch.channels_last)
    moments = empty_moments(x, len(weight), views, tile)
    launch.run([launch_of(x, weight, scale, shift, y, moments, views, tile)], x.device)
    return y, moments


def example(layer: Layer, images: int, prologue: bool = True, tile: Tile = TILE, dtype: str = "bf16") -> Launch:
    """The launch of one layer for both views of a network without gradient, on meta tensors."""
    c, half = layer.channels, aot.DTYPES[dtype]
    x, y, weight = (
        torch.empty(shape, dtype=half, device="meta", memory_format=torch.channels_last)
        for shape in [(2 * images, c, layer.side, layer.side)] * 2 + [(c, c, 3, 3)]
    )
    scale, shift = (torch.empty((2, c), device="meta") if prologue else None for _ in range(2))
    return launch_of(x, weight, scale, shift, y, empty_moments(x, c, 2, tile), 2, tile)


def inner_loop(cubin: bytes) -> Counter[str]:
    """Counts the machine instructions, by name, of the smallest loop that multiplies on tensor cores.

    It is empty if no loop does: ptxas or Triton unrolled it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [aot.tool("nvdisasm"), "-c", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels: dict[str, int] = {}
    loops: list[Counter[str]] = []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and target[1] in labels:  # backward
            body = "\n".join(lines[labels[target[1]] : i + 1])
            loops.append(Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", body, re.MULTILINE)))
    return min((loop for loop in loops if products(loop)), key=lambda loop: loop.total(), default=Counter())


def products(loop: Counter[str]) -> Counter[str]:
    """Returns the tensor-core instructions of a loop: HMMA, on sm_90 HGMMA."""
    return Counter({name: n for name, n in loop.items() if re.match("HG?MMA", name)})


def resources_table(launches: Sequence[Launch], dtype: str, arch: int) -> str:
    """Formats the resources and the inner loops of these launches as Markdown."""
    lines = [
        "| channels, side | prologue | tile | warps, stages | programs | registers | stack | shared "
        "| blocks (warps) per SM | loop: instructions | mma | cp.async of 16 bytes | instructions per mma | issued MB "
        "| least us |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for x in launches:
        v, a = aot.variant("convolution", x, dtype, arch), x.arguments
        loop = inner_loop(aot.compile_launch(x, arch).asm["cubin"])
        copies = sum(n for name, n in loop.items() if name.startswith("LDGSTS") and name.endswith(".128"))
        mma = products(loop).total()
        cells = [f"{a['C']}, {a['H']}", "no" if a["scale"] is None else "yes"]
        cells += [f"{a['PIXELS']} x {a['OUTPUTS']} x {a['INPUTS']}", f"{x.warps}, {x.stages}", f"{prod(x.grid):,}"]
        cells += [v.registers, v.stack_bytes or "", f"{v.shared_bytes / 1024:.0f} K"]
        cells += [f"{v.blocks_per_sm} ({v.warps_per_sm})"]
        cells += [loop.total(), " ".join([str(mma), *products(loop)]), copies] if mma else ["unrolled", "", ""]
        cells += [f"{loop.total() / mma:.1f}" if mma else "", f"{v.issued_bytes / 1e6:,.0f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, f'{v.bound_microseconds:.0f}']))} |")
    return "\n".join(lines)


class Saving(NamedTuple):
    """All convolutions of a layer's kind, over all forwards without gradient."""

    flops: int
    bytes: int  # that cuDNN's convolution and batch_norm move, and the prototype does not


def saving(layer: Layer, images: int) -> Saving:
    """Counts what the prototype saves; its moments, and scale and shift made from them, are counted against it."""
    fused, networks = example(layer, images), FORWARDS // 2
    one_pass = total_bytes([fused.arguments["x"]])
    moments = batch_norm.launches(fused.arguments["x"], *[torch.empty(layer.channels, device="meta")] * 2, views=2)[0]
    # batch_norm's first launch reads one pass and writes moments of its own, which the second one reads.
    now = layer.passes * one_pass + 2 * layer.convolutions * (moments.traffic.unique_bytes - one_pass)
    vectors = total_bytes([fused.arguments["scale"], fused.arguments["shift"]])
    then = layer.convolutions * (2 * total_bytes([fused.arguments["moments"]]) + 2 * vectors)
    return Saving(networks * layer.convolutions * fused.traffic.flops, networks * (now - then))


def savings_rows(images: int) -> Iterator[tuple[str, Saving]]:
    found = [saving(layer, images) for layer in LAYERS]
    for layer, x in zip(LAYERS, found, strict=True):
        yield f"{FORWARDS * layer.convolutions} of {layer.channels} channels, {layer.side} x {layer.side}", x
    yield "together", Saving(sum(x.flops for x in found), sum(x.bytes for x in found))


def savings_table(images: int, gpu: aot.Gpu) -> str:
    """Formats, as Markdown, what is saved and the longest time in which the prototype still wins."""
    heads = [f"cuDNN at {share:.0%}" for share in SHARES]
    lines = [
        f"| convolutions | TFLOP | ms at the peak | GB saved | ms saved | {' | '.join(heads)} |",
        "|---" + "|--:" * (4 + len(SHARES)) + "|",
    ]
    for name, x in savings_rows(images):
        least, saved = 1e3 * x.flops / gpu.half_flops, 1e3 * x.bytes / gpu.dram_bytes
        limits = [f"{least / share + saved:.2f} ms ({least / (least / share + saved):.0%})" for share in SHARES]
        cells = [name, f"{x.flops / 1e12:.3f}", f"{least:.2f}", f"{x.bytes / 1e9:.3f}", f"{saved:.2f}", *limits]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.convolution", description=__doc__)
    parser.add_argument("--arch", choices=[f"sm_{arch}" for arch in aot.GPUS], default="sm_86")
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--batch-size", type=int, default=256)
    channels = [layer.channels for layer in LAYERS]
    parser.add_argument("--channels", type=int, nargs="+", choices=channels, default=channels, help="layers to compile")
    parser.add_argument("--tiles", action="store_true", help="every tile that was tried, in place of the chosen one")
    options = parser.parse_args(arguments)
    arch, images, dtype = int(options.arch.removeprefix("sm_")), options.batch_size, options.dtype
    launches = [
        example(layer, images, prologue, tile, dtype)
        for prologue in (False, True)
        for layer in LAYERS
        for tile in (TILES if options.tiles else (TILE,))
        if layer.channels in options.channels and layer.channels % tile.outputs == 0
    ]
    print(f"{options.arch}, {dtype}, two views of {images} images; least times of an {aot.GPUS[arch].name}\n")
    print(resources_table(launches, dtype, arch))
    print(f"\nAll {FORWARDS} forwards without gradient\n\n{savings_table(images, aot.GPUS[arch])}")


if __name__ == "__main__":
    main()
