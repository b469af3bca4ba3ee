"""`python -m bench.convolution`: compiles the operator `convolution` for a GPU that is not here, layer by layer.

Its kernel is a 3 x 3 convolution of stride 1 for the networks without gradient. It applies the batch norm and the ReLU
before it as it reads its input, and makes the partial moments for the batch norm after it from its fp32 sums.
docs/lab/convolution.md has its design, its figures and what is unknown.

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
from typing import NamedTuple

import torch

from mnclglf_kernels import aot
from mnclglf_kernels._triton import batch_norm
from mnclglf_kernels._triton.convolution import HALF, convolution_launches, empty_results
from mnclglf_kernels._triton.launch import Launch, total_bytes
from mnclglf_kernels._triton.tiles import Tile


class Layer(NamedTuple):
    """A stage of ResNet-18 of width 64 on 32 x 32 images, over all forwards without gradient."""

    channels: int
    side: int
    convolutions: int  # per forward, of stride 1
    passes: int  # over an activation that the operator saves per forward; docs/lab/convolution.md counts them


LAYERS = (Layer(64, 32, 4, 8), Layer(128, 16, 3, 7), Layer(256, 8, 3, 7), Layer(512, 4, 3, 7))
FORWARDS = 4  # of 13: two views of the momentum network and two of the stop-gradient network
TILE = HALF[86]
TILES = (
    TILE,
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 32, 4, 2),
    Tile(128, 64, 32, 4, 3),
    Tile(64, 64, 64, 4, 2),
    Tile(128, 64, 64, 8, 2),
    Tile(256, 64, 64, 8, 2),
    Tile(128, 128, 32, 4, 2),
    Tile(128, 128, 64, 8, 2),
)
SHARES = (1.0, 0.9, 0.8, 0.7)  # of the peak rate, at which cuDNN's convolution may run


def example(
    layer: Layer, images: int, prologue: bool = True, tile: Tile = TILE, dtype: str = "bf16"
) -> tuple[Launch, Launch]:
    """The launches of one layer for both views of a network without gradient, on meta tensors."""
    c, half = layer.channels, aot.DTYPES[dtype]
    x, weight = (
        torch.empty(shape, dtype=half, device="meta", memory_format=torch.channels_last)
        for shape in [(2 * images, c, layer.side, layer.side), (c, c, 3, 3)]
    )
    scale, shift = (torch.empty((2, c), device="meta") if prologue else None for _ in range(2))
    convolve, combine = convolution_launches(x, weight, scale, shift, *empty_results(x, c, 2), tile)
    return convolve, combine


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
    bytes: int  # that cuDNN's convolution and batch_norm move, and the operator does not


def saving(layer: Layer, images: int) -> Saving:
    """Counts what the operator saves; its moments, and scale and shift made from them, are counted against it."""
    (fused, _), networks = example(layer, images), FORWARDS // 2
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
    """Formats, as Markdown, what is saved and the longest time in which the operator still wins."""
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
        example(layer, images, prologue, tile, dtype)[0]
        for prologue in (False, True)
        for layer in LAYERS
        for tile in (TILES if options.tiles else (TILE,))
        if layer.channels in options.channels and layer.channels % tile.columns == 0
    ]
    print(f"{options.arch}, {dtype}, two views of {images} images; least times of an {aot.GPUS[arch].name}\n")
    print(resources_table(launches, dtype, arch))
    print(f"\nAll {FORWARDS} forwards without gradient\n\n{savings_table(images, aot.GPUS[arch])}")


if __name__ == "__main__":
    main()
