"""`python -m mnclglf_kernels.aot`: compiles the kernels for a GPU that is not here, and prints their resources.

It compiles the same `Launch` objects that the operators run, with tensors on the meta device in place of data.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mnclglf_kernels._triton.launch import Launch, Traffic
from mnclglf_kernels.backend import INTERPRETED
from mnclglf_kernels.backend import TRITON_DTYPES as DTYPES
from mnclglf_kernels.operators import OPERATORS, Example, OperatorName
from mnclglf_kernels.sizes import PAPER, Sizes

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Gpu(NamedTuple):
    """Limits and peak rates of the GPU that represents an architecture."""

    name: str
    processors: int  # SMs
    shared_block: int  # bytes per block, at most
    shared_processor: int  # bytes per SM; a block takes 1 KiB more than it asks for
    warps: int  # per SM, at most
    blocks: int  # per SM, at most
    half_flops: float  # per second, dense fp16 or bf16 on tensor cores with fp32 sums
    fp32_flops: float  # per second, without tensor cores
    dram_bytes: float  # per second
    l2_bytes: float  # per second, at most
    registers: int = 65536  # per SM


# Limits: CUDA C++ Programming Guide, technical specifications per compute capability. Peaks at boost clock: NVIDIA's
# white papers of GA102, GA100 (5,120 bytes per clock from L2), AD102 and GH100. If the paper has no rate for L2, it is
# the 64 bytes per clock that an SM can take (Jia et al. 2018, arXiv:1804.06826). That rate is too high, so the bounds
# remain lower bounds.
GPUS = {
    80: Gpu("A100 SXM 80 GB", 108, 163 << 10, 164 << 10, 64, 32, 312e12, 19.5e12, 2039e9, 5120 * 1.41e9),
    86: Gpu("RTX 3090", 82, 99 << 10, 100 << 10, 48, 16, 71e12, 35.6e12, 936e9, 64 * 82 * 1.695e9),
    89: Gpu("RTX 4090", 128, 99 << 10, 100 << 10, 48, 24, 165.2e12, 82.6e12, 1008e9, 64 * 128 * 2.52e9),
    90: Gpu("H100 SXM", 132, 227 << 10, 228 << 10, 64, 32, 989.4e12, 66.9e12, 3352e9, 64 * 132 * 1.83e9),
}


Bound = Literal["compute", "L2", "DRAM"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A compiled kernel: the resources of an SM that it takes, and its instructions."""

    op: str
    kernel: str
    dtype: str
    arch: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    stack_bytes: int  # above 0: the kernel spills registers
    shared_bytes: int
    shared_limit_bytes: int
    blocks_per_sm: int
    warps_per_sm: int
    mma: int  # tensor-core instructions
    mma_fp32: bool  # true if all of them sum in fp32
    async_copies: int  # copies of 16 bytes from global to shared memory
    wide_loads: int  # global loads of 16 bytes per thread
    flops: int  # operations of the matrix products only
    unique_bytes: int  # each element counted once
    issued_bytes: int  # requested by the programs; L2 serves the repeats
    intensity: float  # flops per unique byte
    bound: Bound
    bound_microseconds: float  # lower bound of the launch's time on this GPU


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compiles a launch for sm_`arch`, with pointers aligned to 16 bytes, and returns the kernel."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, so Triton compiles nothing in this process; unset it")
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append((i,))
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            signature[name] = tuple(POINTERS[x.dtype] for x in value)
            aligned += [(i, j) for j in range(len(value))]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr"
            constants[i,] = value
    # Without these Triton makes no 128-bit loads and no pipeline: it would not be the kernel that a launch compiles.
    attributes = {place: [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str) -> str:
    """Returns the path of one of the CUDA tools that come with triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(cubin: bytes) -> tuple[int, int]:
    """Returns (registers per thread, bytes of stack per thread)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"{command[0]} printed no registers and stack: {text!r}")
    return int(registers[1]), int(stack[1])


def least_time(moved: Traffic, dtype: str, gpu: Gpu) -> tuple[float, Bound]:
    """Returns (seconds, bound): the longest of the times for compute, L2 and DRAM at their peak rates."""
    rate = gpu.fp32_flops if dtype == "fp32" else gpu.half_flops
    times: dict[Bound, float] = {
        "compute": moved.flops / rate,
        "L2": moved.issued_bytes / gpu.l2_bytes,
        "DRAM": moved.unique_bytes / gpu.dram_bytes,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def variant(op: str, launch: Launch, dtype: str, arch: int) -> Variant:
    """Compiles a launch; returns its resources and instructions."""
    moved = launch.traffic
    seconds, bound = least_time(moved, dtype, GPUS[arch])
    compiled, gpu = compile_launch(launch, arch), GPUS[arch]
    registers, stack = resources(compiled.asm["cubin"])
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    mma = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\S*", ptx)
    blocks = min(
        gpu.registers // (32 * launch.warps * (-(-registers // 8) * 8)),  # allocated in units of 8 per thread
        gpu.shared_processor // (shared + 1024),
        gpu.warps // launch.warps,
        gpu.blocks,
    )
    return Variant(
        op=op,
        kernel=launch.kernel.fn.__name__,
        dtype=dtype,
        arch=f"sm_{arch}",
        grid=launch.grid,
        warps=launch.warps,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        shared_limit_bytes=gpu.shared_block,
        blocks_per_sm=blocks,
        warps_per_sm=blocks * launch.warps,
        mma=len(mma),
        mma_fp32=all(".f32." in instruction for instruction in mma),
        async_copies=len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)),
        wide_loads=len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64|v8\.b16)", ptx)),
        **moved._asdict(),
        intensity=moved.flops / moved.unique_bytes,
        bound=bound,
        bound_microseconds=1e6 * seconds,
    )


def variants(
    ops: Sequence[OperatorName], dtypes: Sequence[str], archs: Sequence[int], sizes: Sizes = PAPER, ranks: int = 1
) -> Iterator[Variant]:
    """Yields every kernel of these operators in these dtypes for these architectures, of the last of `ranks` ranks."""
    for arch in archs:
        for op in ops:
            for dtype in dtypes:
                example = Example(sizes=sizes, dtype=DTYPES[dtype], rank=ranks - 1, ranks=ranks)
                for launch in OPERATORS[op].launches(example, arch):
                    yield variant(op, launch, dtype, arch)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mnclglf_kernels.aot", description=__doc__)
    parser.add_argument("--arch", choices=[f"sm_{arch}" for arch in GPUS], default="sm_86")
    parser.add_argument("--op", choices=OPERATORS, nargs="+", default=tuple(OPERATORS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=tuple(DTYPES))
    parser.add_argument("--width", type=int, default=PAPER.width, help="D of the embeddings")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table that docs/explain/kernels.md has")
    options = parser.parse_args(arguments)
    sizes = PAPER._replace(width=options.width)
    found = list(variants(options.op, options.dtype, [int(options.arch.removeprefix("sm_"))], sizes, options.ranks))
    if options.json:
        print(json.dumps({"sizes": sizes._asdict(), "variants": [asdict(v) for v in found]}, indent=1))
    elif options.markdown:
        print(markdown(found))
    else:
        gpu = GPUS[int(options.arch.removeprefix("sm_"))]
        print(f"{options.arch}, bounds of an {gpu.name}; {' '.join(f'{k} {v}' for k, v in sizes._asdict().items())}")
        print(table(found))
    return 0


COLUMNS = {
    "op": "operator",
    "kernel": "kernel",
    "dtype": "dtype",
    "grid": "grid",
    "warps": "warps",
    "registers": "registers",
    "stack_bytes": "spilled",
    "shared_bytes": "shared",
    "blocks_per_sm": "blocks (warps)/SM",
    "mma": "mma",
    "async_copies": "cp.async",
    "wide_loads": "128-bit",
    "flops": "GFLOP",
    "unique_bytes": "unique MB",
    "issued_bytes": "issued MB",
    "intensity": "FLOP/B",
    "bound": "bound",
    "bound_microseconds": "least us",
}


def table(found: Sequence[Variant]) -> str:
    """Returns the variants as aligned columns."""
    rows = [tuple(COLUMNS.values())]
    for v in found:
        values = asdict(v) | {
            "grid": " x ".join(map(str, v.grid)),
            "shared_bytes": f"{v.shared_bytes / 1024:.0f}/{v.shared_limit_bytes // 1024} K",
            "blocks_per_sm": f"{v.blocks_per_sm} ({v.warps_per_sm})",
            "flops": f"{v.flops / 1e9:.2f}",
            "unique_bytes": f"{v.unique_bytes / 1e6:.2f}",
            "issued_bytes": f"{v.issued_bytes / 1e6:.2f}",
            "intensity": f"{v.intensity:.0f}",
            "bound_microseconds": f"{v.bound_microseconds:.1f}",
        }
        rows.append(tuple(str(values[name]) for name in COLUMNS))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def markdown(found: Sequence[Variant]) -> str:
    """Returns the main columns of the variants as a Markdown table, with equal launches on one line."""
    lines = [
        "| operator | kernel | programs | registers | shared | blocks (warps) per SM | mma | cp.async "
        "| GFLOP | unique MB | issued MB | bound | least us |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for v, count in Counter(found).items():
        kernel = v.kernel if count == 1 else f"{count} x {v.kernel}"
        cells = [v.op, kernel, prod(v.grid), v.registers, f"{v.shared_bytes / 1024:.0f} K"]
        cells += [f"{v.blocks_per_sm} ({v.warps_per_sm})", v.mma or "", v.async_copies or "", f"{v.flops / 1e9:.2f}"]
        cells += [f"{v.unique_bytes / 1e6:.2f}", f"{v.issued_bytes / 1e6:.2f}", v.bound, f"{v.bound_microseconds:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
