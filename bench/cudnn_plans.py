"""`python -m bench.cudnn_plans`: asks cuDNN for its plans of the encoder's convolutions, on a GPU that is not here.

A plan is one kernel that computes the convolution in a given way. For each shape it prints how many there are, and the
workspace of the one that cuDNN proposes first: plain; with a prologue, scale, bias and ReLU of the batch norm before
it, applied to what it reads; with an epilogue, the sum and the sum of squares per channel of what it writes, for the
batch norm after it; and with both. Scale and bias are in the images' dtype or, with --fp32-vectors, in fp32. The
epilogue's sums are in fp32.

Nothing runs. cuDNN plans for a GPU that is described, and compiles the kernels that it writes itself. These engines
decline where there is no CUDA driver, which looks like an unsupported fusion. So without one a stand-in is compiled
that answers every call and knows no device. Needs `pip install 'mnclglf[cudnn]'` and g++.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.roofline import config_of
from mnclglf.methods import METHODS
from mnclglf.training.plans import convolutions_of
from mnclglf.training.roofline import inputs_on_meta, on_meta
from mnclglf_kernels._cudnn import graphs
from mnclglf_kernels._cudnn.graphs import Form, Graph
from mnclglf_kernels.aot import GPUS

KINDS = {
    "fp16": Form(torch.float16),
    "fp16, fp16 sums": Form(torch.float16, half_sums=True),
    "bf16": Form(torch.bfloat16),
}
FUSIONS: Mapping[str, Mapping[str, bool]] = {
    "plain": {},
    "prologue": dict(prologue=True),
    "epilogue": dict(epilogue=True),
    "both": dict(prologue=True, epilogue=True),
}
COLUMNS = [(kind, fusion) for kind in KINDS for fusion in FUSIONS]

# Functions of the driver that cuDNN 9.24 looks up before it compiles a kernel.
DRIVER_FUNCTIONS = """
cuCtxGetCurrent cuCtxGetLimit cuCtxPopCurrent cuCtxPushCurrent cuDeviceGet cuDeviceGetCount cuGetErrorName
cuGetErrorString cuKernelGetAttribute cuKernelSetAttribute cuLaunchCooperativeKernel cuLaunchKernel cuLaunchKernelEx
cuLibraryLoadFromFile cuLibraryUnload cuLinkAddData cuLinkComplete cuLinkCreate cuLinkDestroy
cuOccupancyMaxPotentialClusterSize cuStreamGetCtx
"""
STAND_IN = """
int cuInit(unsigned flags) { return 100; }  /* no device */
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuLibraryLoadData(void **library, const void *code) { *library = (void *)1; return 0; }
int cuLibraryGetKernel(void **kernel) { *kernel = (void *)1; return 0; }
"""


class Shape(NamedTuple):
    """A convolution of square images."""

    images: int
    inputs: int  # channels
    side: int
    outputs: int  # channels
    taps: int  # side of the filter
    stride: int

    def of_operator(self) -> graphs.Shape:
        """Returns the same as the operator describes it, with all images in one view."""
        return graphs.Shape(
            self.images, self.inputs, self.side, self.side, self.outputs, self.taps, self.stride, self.taps // 2
        )

    def __str__(self) -> str:
        size = f"{self.images} x {self.inputs} x {self.side} x {self.side}"
        return f"{size} to {self.outputs}, {self.taps} x {self.taps}, stride {self.stride}"


class Plans(NamedTuple):
    """What cuDNN has for a convolution."""

    count: int
    workspace: int  # bytes, of the plan that it proposes first

    def __str__(self) -> str:
        if not self.count:
            return "-"
        return f"{self.count}" + (f" ({self.workspace / 1e3:,.0f} kB)" if self.workspace else "")


Table = Mapping[Shape, Mapping[tuple[str, str], Plans]]


def shapes(method: str, batch: int, side: int) -> dict[str, list[Shape]]:
    """Returns the different convolutions in each network of a step: online, momentum, stop-gradient."""
    network = on_meta(config_of(method, batch), torch.float32)
    views, _ = inputs_on_meta(network, batch, side, torch.float32)
    found: dict[str, dict[Shape, None]] = {}
    for seen in convolutions_of(network, views):
        images, channels, height, _ = seen.x
        outputs, _, taps, _ = seen.weight
        found.setdefault(seen.network, {})[Shape(images, channels, height, outputs, taps, seen.stride)] = None
    return {name: [*convolutions] for name, convolutions in found.items()}


@cache
def frontend() -> Any:
    """Returns the module cudnn, with a driver or its stand-in loaded; ends the command where something is missing."""
    if not torch.backends.cudnn.is_available():
        sys.exit(f"torch {torch.__version__} is built without cuDNN; install a build with CUDA (TORCH_INDEX=pypi)")
    try:
        module = importlib.import_module("cudnn")
    except ImportError as error:
        sys.exit(f"nvidia-cudnn-frontend cannot be imported ({error}); pip install 'mnclglf[cudnn]'")
    load_driver()
    return module


def load_driver() -> str:
    """Loads the CUDA driver, or the stand-in if there is none, and returns which."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        major, minor = (torch.version.cuda or "13.0").split(".")
        lines = [f"int {name}(void) {{ return 0; }}" for name in DRIVER_FUNCTIONS.split()]
        source = "\n".join([*lines, STAND_IN.replace("VERSION", f"{1000 * int(major) + 10 * int(minor)}")])
        with tempfile.TemporaryDirectory() as folder:
            # By this soname the dynamic linker finds it when cuDNN asks for the driver.
            library = Path(folder) / "libcuda.so.1"
            command = ["g++", "-x", "c", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, "-"]
            subprocess.run(command, input=source, text=True, check=True)
            ctypes.CDLL(str(library))
        return "stand-in"
    return "CUDA driver"


def description(arch: int) -> str:
    """Returns a GPU as cuDNN reads it. It plans by the architecture; no other entry changed a count or an order."""
    gpu = GPUS[arch]
    return json.dumps(
        dict(
            deviceName=gpu.name,
            cudaDeviceId=0,
            deviceVer=10 * arch,
            driverVer=13000,
            multiProcessorCount=gpu.processors,
            maxSharedMemoryPerBlock=48 << 10,
            maxSharedMemoryPerBlockOptin=gpu.shared_block,
            reservedSharedMemoryPerBlock=1 << 10,
            totalGlobalMem=24 << 30,
            maxGridSize=[2**31 - 1, 65535, 65535],
            maxBlockSize=[1024, 1024, 64],
            regsPerBlock=gpu.registers,
            maxRegistersPerSM=gpu.registers,
            smClockRateKHz=1_695_000,
            memClockRateKHz=9_751_000,
            l2CacheSize=6 << 20,
            warpSize=32,
            pciDeviceId=0,
            maxCtasPerSM=gpu.blocks,
            maxThreadsPerBlock=1024,
            maxThreadsPerSM=32 * gpu.warps,
            isTccDriver=0,
            supportCoopLaunch=1,
        )
    )


def ask(shape: Shape, kind: str, fusion: str, arch: int, *, fp32_vectors: bool = False) -> Plans:
    """Returns what cuDNN has for a convolution on a GPU of this architecture.

    Args:
        shape: the convolution.
        kind: key of KINDS.
        fusion: key of FUSIONS.
        arch: compute capability of the described GPU.
        fp32_vectors: scale and bias of the prologue are in fp32, not in the images' dtype.
    """
    form = KINDS[kind]._replace(**FUSIONS[fusion], fp32_vectors=fp32_vectors)
    return plans(lambda cudnn, **place: graphs.forward(cudnn, shape.of_operator(), form, **place), arch, str(shape))


def plans(make: Callable[..., Graph], arch: int, what: str) -> Plans:
    """Returns what cuDNN has for a graph, which `make` builds on a GPU of this architecture."""
    cudnn = frontend()
    graph = make(cudnn, device_property=cudnn.create_device_properties(description(arch))).graph
    try:
        graphs.propose(cudnn, graph)
    except cudnn.cudnnGraphNotSupportedError as error:
        if "CUDA driver library" in str(error):
            raise RuntimeError(f"cuDNN could not ask its compiler about {what}: {error}") from error
        return Plans(0, 0)
    graph.build_plan_at_index(0)
    return Plans(graph.get_execution_plan_count(), graph.get_workspace_size_plan_at_index(0))


def ask_all(convolutions: Iterable[Shape], arch: int, *, fp32_vectors: bool = False) -> Table:
    """Returns what cuDNN has for these convolutions, in every dtype and fusion."""
    return {
        shape: {column: ask(shape, *column, arch, fp32_vectors=fp32_vectors) for column in COLUMNS}
        for shape in convolutions
    }


def span(values: Iterable[int]) -> str:
    """Returns "4" or "4 to 9"."""
    least, most = min(values := [*values]), max(values)
    return f"{least}" if least == most else f"{least} to {most}"


def table(networks: Mapping[str, Sequence[Shape]], found: Table) -> str:
    """Formats the plans as Markdown, one row per convolution, then the least and the most over all of them."""
    lines = [
        "| network | convolution | " + " | ".join(f"{kind}: {fusion}" for kind, fusion in COLUMNS) + " |",
        "|---|---" + "|--:" * len(COLUMNS) + "|",
    ]
    for name, convolutions in networks.items():
        for shape in convolutions:
            cells = [name, shape, *(found[shape][column] for column in COLUMNS)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    spans = [span(row[column].count for row in found.values()) for column in COLUMNS]
    lines.append(f"| all | | {' | '.join(spans)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cudnn_plans", description=__doc__)
    parser.add_argument("--arch", type=int, choices=GPUS, default=86)
    parser.add_argument("--method", choices=METHODS, default="mnclglf")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--network", choices=("online", "momentum", "stop-gradient"), help="only this one")
    parser.add_argument("--fp32-vectors", action="store_true", help="scale and bias of the prologue in fp32")
    options = parser.parse_args(arguments)
    networks = shapes(options.method, options.batch, options.side)
    if options.network:
        if options.network not in networks:
            parser.error(f"{options.method} has no {options.network} network; it has {', '.join(networks)}")
        networks = {options.network: networks[options.network]}
    cudnn = frontend()
    print(
        f"{options.method}, batch {options.batch}, {options.side} x {options.side}, sm_{options.arch}, "
        f"cuDNN {cudnn.backend_version_string()}, nvidia-cudnn-frontend {cudnn.__version__}, "
        f"torch {torch.__version__}; plans (workspace of the first)\n"
    )
    different = dict.fromkeys(shape for convolutions in networks.values() for shape in convolutions)
    print(table(networks, ask_all(different, options.arch, fp32_vectors=options.fp32_vectors)))


if __name__ == "__main__":
    main()
