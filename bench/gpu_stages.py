"""The stages of the GPU report: each measures or checks something that only a GPU can tell, and returns figures."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import PAPER

Figures = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda")
SIZES = PAPER
STEPS = 50
REPEATS = 100
BATCHES = 4  # batches of noise in turn: a CUDA graph that reads an old one computes wrong losses
WRONG = "wrong"  # figure that makes a stage fail if it is not empty


@dataclass(frozen=True)
class Stage:
    """Stage of the GPU report.

    Attributes:
        title: title in the report.
        work: returns figures, or raises.
        limit: seconds after which the stage is stopped.
        needs_gpu: True if the stage is skipped without a GPU.
    """

    title: str
    work: Callable[[], Figures]
    limit: float
    needs_gpu: bool = True


def environment() -> Figures:
    """Names versions, driver, compiler and the GPU."""
    import triton

    figures: Figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "compiler": shutil.which("g++") or "none: torch.compile on the CPU needs g++",
        "gpu": "none",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "SMs": properties.multi_processor_count,
        }
    if shutil.which("nvidia-smi"):
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        figures["driver, power limit, clocks, temperature"] = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60
        ).stdout.strip()
    return figures


def compiled_ahead() -> Figures:
    """Compiles every kernel for the nearest known architecture (sm_86 without a GPU); finds spills, shared memory."""
    from mnclglf_kernels.aot import DTYPES, variants

    arch = table_architecture()
    found = list(variants(tuple(OPERATORS), tuple(DTYPES), [arch]))
    bad = [v for v in found if v.stack_bytes or v.shared_bytes > v.shared_limit_bytes]
    return {"architecture": f"sm_{arch}", "variants": len(found), WRONG: [f"{v.kernel}: {v}" for v in bad]}


def kernels() -> Figures:
    """Runs the self-check of every kernel at the paper's sizes, and launches that must agree bit for bit."""
    from mnclglf_kernels import self_check

    wrong: list[str] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = self_check.failures(SIZES, dtype, dtype, DEVICE)
        wrong += [f"{dtype}, {name}: {problem}" for name, problem in found.items()]
    for row in OPERATORS.values():
        inputs = row.inputs(Example(sizes=SIZES, dtype=torch.bfloat16, device=DEVICE))
        first = results(row.function, inputs)
        for _ in range(REPEATS - 1):
            if not all(torch.equal(x, y) for x, y in zip(first, results(row.function, inputs), strict=True)):
                wrong.append(f"{row.name}: launches differ")
                break
    return {"dtypes": 3, "launches that agree bit for bit": REPEATS, WRONG: wrong}


def results(function: Callable[..., Any], inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns an operator's outputs on its Triton kernels, and the gradients of the inputs that need one."""
    from bench.operator_cases import outputs_of  # late: it imports the loaders, and every stage starts a process

    leaves = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    # Copies, because an operator may write into its inputs, and the next call is to see the same ones.
    given = tree_map_only(torch.Tensor, lambda x: x if x.requires_grad else x.clone(), inputs)
    outputs = outputs_of(function(**given, backend="triton"), given)
    if not leaves:
        return [*outputs]
    loss = torch.stack([output.float().square().sum() for output in outputs]).sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)]


def compiled_operators() -> Figures:
    """Compares each operator under torch.compile(fullgraph=True) with itself run eagerly, forward and backward."""
    figures: Figures = {}
    wrong: list[str] = []
    for row in OPERATORS.values():
        inputs = row.inputs(Example(sizes=SIZES, dtype=torch.bfloat16, device=DEVICE))
        expected = results(row.function, inputs)
        since = time.perf_counter()
        actual = results(torch.compile(row.function, fullgraph=True), inputs)
        figures[f"{row.name}: seconds to compile"] = round(time.perf_counter() - since, 1)
        for x, y in zip(actual, expected, strict=True):
            limit = 2**-6 * y.abs().max().item() if y.is_floating_point() else 0  # two units in bf16's last place
            if not ((x - y).abs() <= limit).all():
                wrong.append(f"{row.name}: compiled and eager differ")
                break
    return figures | {WRONG: wrong}


def cuda_graphs() -> Figures:
    """Captures the lookup and the loss in a CUDA graph and replays it on other values."""
    from mnclglf_kernels import contrastive_losses, nearest_neighbor

    queries, queue = torch.randn(64, 512, device="cuda"), torch.randn(4096, 512, device="cuda")
    queue = torch.nn.functional.normalize(queue)

    def call() -> list[torch.Tensor]:
        found = nearest_neighbor(queries, queue, backend="triton")
        return [found, *contrastive_losses([(queue[found], queries)], 0.5, backend="triton")]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(3):
        queries.copy_(torch.randn_like(queries))
        graph.replay()
        for captured, eager in zip(results, call(), strict=True):
            assert torch.equal(captured, eager)
    return {"replays": 3}


def loaders() -> Figures:
    """Measures the images per second of each loader alone, three views of 32 x 32."""
    from mnclglf.config import LoaderName, ViewConfig
    from mnclglf.data.datasets import load_dataset
    from mnclglf.data.loaders import make_loader

    images, _ = load_dataset("mnist5k", None, download=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes: dict[str, Any] = dict(
        views=3, side=32, batch_size=SIZES.images, seed=0, dtype=torch.bfloat16, device=device, threads=2
    )
    steps: dict[LoaderName, int] = {"resident": 12, "dali": 12, "reference": 1}
    figures: Figures = {}
    for backend, count in steps.items():
        batches = make_loader(images, ViewConfig(), backend=backend, **sizes).batches(0, count + 1)
        next(batches)
        since = time.perf_counter()
        for batch in batches:
            assert all(view.isfinite().all() for view in batch.views)  # waits for the device
        figures[f"{backend}: images/s"] = round(SIZES.images * count / (time.perf_counter() - since), 1)
    return figures


def faiss_gpu() -> Figures:
    """Compares FAISS's search on the GPU with PyTorch's."""
    from mnclglf_kernels import nearest_neighbor, resolve

    queue = torch.nn.functional.normalize(torch.randn(16384, 2048, device="cuda"))
    queries = torch.randn(512, 2048, device="cuda")
    resolve("faiss", queries, kind="lookup")
    found, expected = (nearest_neighbor(queries, queue, backend=backend) for backend in ("faiss", "torch"))
    agreement = (found == expected).float().mean().item()
    assert agreement > 0.99, f"agrees on {agreement:.1%} of the queries only"
    return {"agreement with PyTorch": agreement}


def training(**engine: Any) -> Figures:
    """Trains STEPS steps of the paper recipe on noise: speed without the first fifth, peak memory, a finite loss.

    With CUDA graphs, a graph that PyTorch would skip is an error.
    """
    from rich.console import Console
    from torch._inductor import config as inductor

    from mnclglf.config import EngineConfig
    from mnclglf.data.loader import Batch
    from mnclglf.recipes import paper
    from mnclglf.training.roofline import least_seconds, peaks_of
    from mnclglf.training.speedups import use_fast_math
    from mnclglf.training.start import (
        Machine,
        autocast_dtype,
        build_method,
        choose_backends,
        choose_compile,
        describe_backends,
    )
    from mnclglf.training.step import TrainStep

    config = replace(paper("mnclglf", "cifar10"), engine=EngineConfig(**engine))
    dtype = autocast_dtype(config.engine, DEVICE)
    method = build_method(config, dtype).to(DEVICE).train()
    method.backends = choose_backends(config, SIZES.source, SIZES.side, Machine(DEVICE, dtype), Console(stderr=True))
    use_fast_math(config.engine, dtype)
    chosen = choose_compile(config.engine, DEVICE, print)
    assert (chosen != "off") == (config.engine.compile == "on"), "there is no compiler; see the lines above"
    inductor.triton.cudagraph_or_error = chosen == "graphs"
    inductor.graph_partition = False  # else what cannot be in a graph splits it silently
    train = TrainStep(method, config.optim, config.engine, dtype, compile=chosen)
    shape = (SIZES.images, 3, SIZES.side, SIZES.side)
    noise = torch.randn(BATCHES, 3, *shape, device=DEVICE).to(dtype)
    views = [[view.contiguous(memory_format=torch.channels_last) for view in batch] for batch in noise]
    indices = torch.arange(SIZES.images, device=DEVICE)
    seconds: list[float] = []
    loss = math.nan
    for step in range(STEPS):
        if step == STEPS // 5:
            torch.cuda.reset_peak_memory_stats()
        batch = Batch(tuple(views[step % BATCHES]), indices)
        since = time.perf_counter()
        losses, _ = train(step, batch, lr=0.1, momentum=0.99)
        loss = losses.total.item()  # waits for the device
        seconds.append(time.perf_counter() - since)
    train.guard.raise_if_failed()
    steady = statistics.median(seconds[STEPS // 5 :])
    roofline_seconds = least_seconds(config, SIZES.side, dtype, peaks_of(DEVICE, dtype, tf32=config.engine.tf32))
    return {
        "kernels": describe_backends(method.backends),
        "first step, seconds": round(seconds[0], 1),
        "median step, ms": round(1000 * steady, 2),
        "images/s": round(SIZES.images / steady, 1),
        "roofline fraction": round(roofline_seconds / steady, 3),
        "peak memory, GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss at the end": round(loss, 4),
    }


def roofline() -> Figures:
    """Measures each kernel with a cold L2, beside the least time that its operations and bytes allow on this GPU."""
    from triton.testing import do_bench

    from mnclglf_kernels._triton.launch import run
    from mnclglf_kernels.aot import GPUS, least_time

    def milliseconds(call: Callable[[], object]) -> float:
        return do_bench(call, return_mode="median")  # pyright: ignore[reportReturnType]  # one number

    arch = table_architecture()
    square = torch.randn(4096, 4096, device=DEVICE).bfloat16()
    seconds = 1e-3 * milliseconds(lambda: square @ square)
    moved = torch.empty(2**29, dtype=torch.uint8, device=DEVICE) if DEVICE.type == "cuda" else square
    copy_seconds = 1e-3 * milliseconds(moved.clone)
    gpu, flops, copied = GPUS[arch], 2 * 4096**3 / seconds, 2 * moved.nbytes / copy_seconds
    figures: Figures = {
        "bounds are those of": gpu.name,
        "bf16 matmul of side 4096": f"{flops / 1e12:.1f} TFLOP/s, nominal {gpu.half_flops / 1e12:.0f}",
        "copy": f"{copied / 1e9:.0f} GB/s, nominal {gpu.dram_bytes / 1e9:.0f}",
    }
    for row in OPERATORS.values():
        launches = row.launches(Example(sizes=SIZES, dtype=torch.bfloat16, device=DEVICE), arch=arch)
        for i, x in enumerate(launches, start=1):
            for tensor in tree_leaves(list(x.arguments.values())):
                if isinstance(tensor, torch.Tensor):
                    fill(tensor)
            bound = 1e6 * least_time(x.traffic, "bf16", gpu)[0]
            measured = 1e3 * milliseconds(partial(run, [x], DEVICE))
            figures[f"{row.name} {i}, {x.kernel.__name__} {x.grid}"] = (
                f"{measured:.1f} us, at least {bound:.1f} us: {bound / measured:.0%}"
            )
    return figures


def fill(tensor: torch.Tensor) -> None:
    """Fills the memory that a launch reads: noise (zeros take less power, so run faster), true, row 0."""
    if tensor.is_floating_point():
        tensor.normal_()
    else:
        tensor.fill_(tensor.dtype == torch.bool)


def table_architecture() -> int:
    """Returns the architecture whose table entries this GPU uses; 86 without a GPU."""
    from mnclglf_kernels._triton.launch import architecture
    from mnclglf_kernels._triton.tiles import nearest_architecture

    return nearest_architecture(architecture(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")))


def pytest(*arguments: str) -> Callable[[], Figures]:
    """Makes a stage that is a pytest run. It fails where nothing passed; its figure is pytest's last line."""

    def work() -> Figures:
        last = ""
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "pytest", "-q", *arguments],
            cwd=ROOT,
            env={**os.environ, "MNCLGLF_TEST_GPU": "1"},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)  # at once, so that a time-out keeps it
                last = line.strip() if re.search(r"\d+ (passed|failed|skipped|error)", line) else last
        wrong = [] if process.returncode == 0 and " passed" in last else [f"exit code {process.returncode}: {last}"]
        return {"result": last, WRONG: wrong}

    return work


STAGES = {
    "environment": Stage("Driver, versions and compiler", environment, 120, needs_gpu=False),
    "compiled_ahead": Stage("Kernels compiled ahead of time", compiled_ahead, 600, needs_gpu=False),
    "kernels": Stage("Kernels against PyTorch, repeated", kernels, 900),
    "tests": Stage("The tests marked gpu", pytest("-m", "gpu"), 1800),
    "compiled_operators": Stage("Operators under torch.compile", compiled_operators, 900),
    "cuda_graphs": Stage("Operators in a CUDA graph", cuda_graphs, 300),
    "loaders": Stage("Loaders", loaders, 600, needs_gpu=False),
    "faiss_gpu": Stage("FAISS on the GPU", faiss_gpu, 300),
    "eager": Stage("50 steps, PyTorch operators", partial(training, kernels="off", compile="off"), 900),
    "triton": Stage("50 steps, Triton kernels", partial(training, kernels="require", compile="off"), 900),
    "compile": Stage("50 steps, compiled", partial(training, kernels="require", compile="on", graphs="off"), 1800),
    "graphs": Stage(
        "50 steps, compiled, CUDA graphs", partial(training, kernels="require", compile="on", graphs="on"), 1800
    ),
    "roofline": Stage("Each kernel beside its roofline time", roofline, 600),
    "benches": Stage("Operators beside the reference", pytest("bench/bench_operators.py"), 1800),
}
