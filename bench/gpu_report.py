"""`make gpu-report`: everything that only a GPU can tell, in stages, into one Markdown and one JSON file to attach.

Each stage is a process of its own with a time limit (`python -m bench.gpu_report --stage NAME`), so that one which
fails, hangs or takes the process down leaves the others. What was not run is named with its reason; the files are
written anew after every stage, whole. Where those of PROOF pass, that is remembered: CUDA graphs are on from then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves

from mnclglf.runs.files import write_atomically
from mnclglf.training.start import remember_proof
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import PAPER, VIEWS_PER_IMAGE

Figures = dict[str, Any]
Outcome = Literal["passed", "failed", "timed out", "not run"]
ROOT = Path(__file__).resolve().parents[1]
DEVICE, SIZES, STEPS, REPEATS = torch.device("cuda"), PAPER, 50, 100
BATCHES = 4  # of noise, in turn: a graph that sees an old one goes wrong
MARK = "figures: "  # begins the line of a stage's output that holds its figures
WRONG = "wrong"  # the figure that makes a stage fail where it is not empty


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        title: for the reader.
        work: what to run: it returns figures or raises.
        limit: seconds.
        needs_gpu: whether it is left out without one.
    """

    title: str
    work: Callable[[], Figures]
    limit: float
    needs_gpu: bool = True


@dataclass
class Result:
    """What became of a stage."""

    stage: str
    title: str
    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    output: str = ""  # its last lines, where it did not pass


def environment() -> Figures:
    """Versions, driver, compiler and the GPU."""
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
    """Every kernel compiled for the nearest architecture of the table (sm_86 without a GPU): spills, shared memory."""
    from mnclglf_kernels.aot import DTYPES, variants

    arch = table_architecture()
    found = list(variants(tuple(OPERATORS), tuple(DTYPES), [arch]))
    bad = [v for v in found if v.stack_bytes or v.shared_bytes > v.shared_limit_bytes]
    return {"architecture": f"sm_{arch}", "variants": len(found), WRONG: [f"{v.kernel}: {v}" for v in bad]}


def kernels() -> Figures:
    """Every kernel against PyTorch in fp64 at the paper's sizes, and launches that must agree bit for bit."""
    from mnclglf_kernels import self_check

    wrong: list[str] = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = self_check.failures(SIZES, dtype, dtype, DEVICE)
        wrong += [f"{dtype}, {name}: {problem}" for name, problem in found.items()]
    for name, call in operator_calls(torch.bfloat16).items():
        first = call()
        for _ in range(REPEATS - 1):
            if not all(torch.equal(x, y) for x, y in zip(first, call(), strict=True)):
                wrong.append(f"{name}: launches differ")
                break
    return {"dtypes": 3, "launches that agree bit for bit": REPEATS, WRONG: wrong}


def operators(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor], list[torch.Tensor]]]:
    """Each operator at SIZES on DEVICE: (forward, its tensors, those of them that need a gradient)."""
    from mnclglf_kernels import (
        augment,
        combine,
        contrastive_losses,
        divide,
        nearest_neighbor,
        nt_xent,
        queue_contrastive_loss,
    )
    from mnclglf_kernels.ops.augment import ViewFormat

    n, side, features, k, width, size, source = SIZES

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    def losses(*rows: torch.Tensor) -> torch.Tensor:
        pairs = list(zip(rows[::2], rows[1::2], strict=True))
        return torch.stack(contrastive_losses(pairs, 0.5, backend="triton"))

    images = random(n, 3, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    patches = random(4 * n, features).requires_grad_()
    rows = [x for s in (6, 6, 1, 1) for x in (random(s * n, width), random(n, width).requires_grad_())]
    queue, views = torch.nn.functional.normalize(random(size, width)), rows[1:4:2]
    stored = torch.randint(256, (n, 3, source, source), dtype=torch.uint8, device=DEVICE)
    numbers = torch.tensor([0.0, 1, 2, source - 3, source - 2, 1, 1.2, 0.8, 1.1, 0.1, 0, 1, 1], device=DEVICE)
    view = [stored, torch.arange(n, device=DEVICE), numbers.repeat(VIEWS_PER_IMAGE * n, 1), numbers[6:9], numbers[6:9]]
    return {
        "augment": (partial(augment, view_format=ViewFormat(side), dtype=dtype, backend="triton"), view, []),
        "divide": (partial(divide, backend="triton"), [images], [images]),
        "combine": (partial(combine, k=k, backend="triton"), [patches], [patches]),
        "contrastive_losses": (losses, rows, rows[1::2]),
        "nearest_neighbor": (partial(nearest_neighbor, backend="triton"), [random(2 * n, width), queue], []),
        "nt_xent": (partial(nt_xent, temperature=0.5, backend="triton"), views, views),
        "queue_contrastive_loss": (
            partial(queue_contrastive_loss, temperature=0.5, backend="triton"),
            [*views, queue],
            views,
        ),
    }


def with_gradients(
    forward: Callable[..., Any], tensors: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The result of a forward and the gradients of its leaves."""
    result = forward(*tensors)
    if not leaves:
        return [result]
    return [result.detach(), *torch.autograd.grad(result.float().square().sum(), leaves)]


def operator_calls(dtype: torch.dtype) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Each operator, forward and backward: calls that give all results."""
    return {name: partial(with_gradients, *parts) for name, parts in operators(dtype).items()}


def compiled_operators() -> Figures:
    """Each operator under torch.compile(fullgraph=True), forward and backward, against itself run eagerly."""
    figures: Figures = {}
    wrong: list[str] = []
    for name, (forward, tensors, leaves) in operators(torch.bfloat16).items():
        expected, since = with_gradients(forward, tensors, leaves), time.perf_counter()
        actual = with_gradients(torch.compile(forward, fullgraph=True), tensors, leaves)
        figures[f"{name}: seconds to compile"] = round(time.perf_counter() - since, 1)
        for x, y in zip(actual, expected, strict=True):
            limit = 2**-6 * y.abs().max().item() if y.is_floating_point() else 0  # two units in bf16's last place
            if not ((x - y).abs() <= limit).all():
                wrong.append(f"{name}: compiled and eager differ")
                break
    return figures | {WRONG: wrong}


def cuda_graphs() -> Figures:
    """The lookup and the loss captured in a CUDA graph and replayed on other values."""
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
    """Images per second of each loader by itself, three views of 32 x 32."""
    from mnclglf.config import LoaderName, ViewConfig
    from mnclglf.data.datasets import load_dataset
    from mnclglf.data.loaders import make_loader

    images, _ = load_dataset("mnist5k", None, download=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(views=3, side=32, batch_size=SIZES.images, seed=0, dtype=torch.bfloat16, device=device, threads=2)
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
    """FAISS's search on the GPU against PyTorch's."""
    from mnclglf_kernels import nearest_neighbor, resolve

    queue = torch.nn.functional.normalize(torch.randn(16384, 2048, device="cuda"))
    queries = torch.randn(512, 2048, device="cuda")
    resolve("faiss", queries, kind="lookup")
    found, expected = (nearest_neighbor(queries, queue, backend=backend) for backend in ("faiss", "torch"))
    agreement = (found == expected).float().mean().item()
    assert agreement > 0.99, f"agrees on {agreement:.1%} of the queries only"
    return {"agreement with PyTorch": agreement}


def training(**engine: Any) -> Figures:
    """STEPS steps of the paper recipe on noise: speed without the first fifth, peak memory, and a finite loss.

    With CUDA graphs a graph that is skipped is an error.
    """
    from rich.console import Console
    from torch._inductor import config as inductor

    from mnclglf.config import EngineConfig
    from mnclglf.data.loader import Batch
    from mnclglf.recipes import paper
    from mnclglf.training.roofline import least_seconds, peaks_of
    from mnclglf.training.start import autocast_dtype, build_method, choose_backends, choose_compile, describe_backends
    from mnclglf.training.step import TrainStep, use_fast_math

    config = replace(paper("mnclglf", "cifar10"), engine=EngineConfig(**engine))
    dtype = autocast_dtype(config.engine, DEVICE)
    method = build_method(config, dtype).to(DEVICE).train()
    method.backends = choose_backends(config, SIZES.source, SIZES.side, dtype, DEVICE, Console(stderr=True))
    use_fast_math(config.engine, dtype)
    chosen = choose_compile(config.engine, DEVICE, print)
    assert (chosen != "off") == (config.engine.compile == "on"), "there is nothing to compile with; see above"
    inductor.triton.cudagraph_or_error = chosen == "graphs"
    inductor.graph_partition = False  # else what cannot be in a graph splits it silently
    train = TrainStep(method, config.optim, config.engine, dtype, compile=chosen)
    shape = (SIZES.images, 3, SIZES.side, SIZES.side)
    noise = torch.randn(BATCHES, 3, *shape, device=DEVICE).to(dtype)
    views = [[view.contiguous(memory_format=torch.channels_last) for view in batch] for batch in noise]
    indices, seconds = torch.arange(SIZES.images, device=DEVICE), []
    for step in range(STEPS):
        if step == STEPS // 5:
            torch.cuda.reset_peak_memory_stats()
        batch = Batch(tuple(views[step % BATCHES]), indices)
        since = time.perf_counter()
        losses, _ = train(step, batch, lr=0.1, momentum=0.99)
        losses.total.item()  # waits for the device
        seconds.append(time.perf_counter() - since)
    train.guard.raise_if_failed()
    steady = statistics.median(seconds[STEPS // 5 :])
    least = least_seconds(config, SIZES.side, dtype, peaks_of(DEVICE, dtype, tf32=config.engine.tf32))
    return {
        "kernels": describe_backends(method.backends),
        "first step, seconds": round(seconds[0], 1),
        "median step, ms": round(1000 * steady, 2),
        "images/s": round(SIZES.images / steady, 1),
        "share of the limit": round(least / steady, 3),
        "peak memory, GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss at the end": round(losses.total.item(), 4),
    }


def roofline() -> Figures:
    """Each kernel's time with a cold L2 beside the least that its computing and its bytes allow on this GPU."""
    from triton.testing import do_bench

    from mnclglf_kernels._triton.launch import run
    from mnclglf_kernels.aot import GPUS, least_time

    arch = table_architecture()
    square = torch.randn(4096, 4096, device=DEVICE).bfloat16()
    seconds = 1e-3 * float(do_bench(lambda: square @ square, return_mode="median"))
    moved = torch.empty(2**29, dtype=torch.uint8, device=DEVICE) if DEVICE.type == "cuda" else square
    copy_seconds = 1e-3 * float(do_bench(lambda: moved.clone(), return_mode="median"))
    gpu, flops, copied = GPUS[arch], 2 * 4096**3 / seconds, 2 * moved.nbytes / copy_seconds
    figures: Figures = {
        "bounds are those of": gpu.name,
        "bf16 matmul of side 4096": f"{flops / 1e12:.1f} TFLOP/s, nominal {gpu.half_flops / 1e12:.0f}",
        "copy": f"{copied / 1e9:.0f} GB/s, nominal {gpu.dram_bytes / 1e9:.0f}",
    }
    example = Example(sizes=SIZES, device=DEVICE)
    for op, row in OPERATORS.items():
        for i, x in enumerate(row.launches(example, arch), start=1):
            for tensor in tree_leaves(list(x.arguments.values())):
                if isinstance(tensor, torch.Tensor):
                    fill(tensor)
            least = 1e6 * least_time(x.traffic, "bf16", GPUS[arch])[0]
            measured = 1e3 * float(do_bench(partial(run, [x], DEVICE), return_mode="median"))
            figures[f"{op} {i}, {x.kernel.__name__} {x.grid}"] = (
                f"{measured:.1f} us, at least {least:.1f} us: {least / measured:.0%}"
            )
    return figures


def fill(tensor: torch.Tensor) -> None:
    """Values for memory that a launch takes as it is: noise (zeros cost less power), an open gate, row 0."""
    if tensor.is_floating_point():
        tensor.normal_()
    else:
        tensor.fill_(tensor.dtype == torch.bool)


def table_architecture() -> int:
    """This GPU's entry in the tables; sm_86 without a GPU."""
    from mnclglf_kernels._triton.launch import architecture
    from mnclglf_kernels._triton.tiles import nearest_architecture

    return nearest_architecture(architecture(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")))


def pytest(*arguments: str) -> Callable[[], Figures]:
    """A stage that is a pytest run, in which something passed; its last line is its figure."""

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
                print(line, end="", flush=True)  # what was said before a time-out is kept
                last = line.strip() if re.search(r"\d+ (passed|failed|skipped|error)", line) else last
        wrong = [] if process.returncode == 0 and " passed" in last else [f"exit code {process.returncode}: {last}"]
        return {"result": last, WRONG: wrong}

    return work


OPERATOR_BENCHES = ("divide", "combine", "contrastive", "neighbor", "enqueue", "nt_xent", "queue_contrastive")
BENCHES = [f"bench/bench_{name}.py" for name in OPERATOR_BENCHES]
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
    "roofline": Stage("Each kernel beside its bound", roofline, 600),
    "benches": Stage("Operators beside the reference", pytest(*BENCHES), 1800),
}


PROOF = {"kernels", "tests", "compiled_operators", "cuda_graphs", "triton", "compile", "graphs"}
"""The stages that must pass before CUDA graphs are replayed by default."""


def run_stage(name: str, stage: Stage, program: Sequence[str]) -> Result:
    """A stage in a process of its own, `program` with the stage's name behind it."""
    result = Result(name, stage.title, "not run")
    if stage.needs_gpu and not torch.cuda.is_available():
        result.reason = "torch sees no CUDA device"
        return result
    since = time.perf_counter()
    with subprocess.Popen(
        [*program, name],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=stage.limit)
            result.outcome = "passed" if process.returncode == 0 else "failed"
            result.reason = "" if process.returncode == 0 else f"exit code {process.returncode}"
        except BaseException as error:  # a time-out, or somebody's Ctrl-C: the GPU is left to nobody
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            text, _ = process.communicate()
            result.outcome, result.reason = "timed out", f"ran longer than {stage.limit:g} s"
    result.seconds = round(time.perf_counter() - since, 1)
    figures = [line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)]
    try:
        result.figures = json.loads(figures[-1])
    except (IndexError, ValueError):
        if result.outcome == "passed":
            result.outcome, result.reason = "failed", "ended without its figures"
    if result.outcome != "passed":
        result.output = "\n".join(text.splitlines()[-40:])
    return result


def markdown(results: Sequence[Result]) -> str:
    """The report for a reader."""
    counts = Counter(result.outcome for result in results)
    lines = ["# GPU report", "", ", ".join(f"{count} {outcome}" for outcome, count in counts.items()), ""]
    lines += ["| stage | outcome | seconds |", "|---|---|--:|"]
    for result in results:
        reason = f": {result.reason}" if result.reason else ""
        lines.append(f"| {result.title} | {result.outcome}{reason} | {result.seconds:.1f} |")
    for result in results:
        if result.figures or result.output:
            lines += ["", f"## {result.title}", ""]
            lines += [f"- {name}: {value}" for name, value in result.figures.items()]
            lines += ["", "~~~", result.output.replace("~~~", "---"), "~~~"] if result.output else []
    return "\n".join(lines) + "\n"


def report(stages: Mapping[str, Stage], out: Path, program: Sequence[str]) -> list[Result]:
    """Runs the stages in order; writes OUT.md and OUT.json after each."""
    results: list[Result] = []
    for name, stage in stages.items():
        print(f"{stage.title} ...", end=" ", flush=True)
        result = run_stage(name, stage, program)
        print(f"{result.outcome}{f': {result.reason}' if result.reason else ''} ({result.seconds:.1f} s)", flush=True)
        results.append(result)
        as_json = json.dumps([asdict(result) for result in results], indent=1) + "\n"
        for path, text in ((out.with_suffix(".md"), markdown(results)), (out.with_suffix(".json"), as_json)):
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu-report", help="without suffix")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, in this process")
    options = parser.parse_args(arguments)
    if options.stage:
        figures = STAGES[options.stage].work()
        print(MARK + json.dumps(figures))
        return int(bool(figures.get(WRONG)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = report(STAGES, options.out, [sys.executable, "-m", "bench.gpu_report", "--stage"])
    print(f"wrote {options.out.with_suffix('.md')} and {options.out.with_suffix('.json')}; attach them to an issue")
    if {result.stage for result in results if result.outcome == "passed"} >= PROOF:
        remember_proof(DEVICE)
        print("from now on `mnclglf train` replays CUDA graphs on this machine; --graphs off does not")
    return int(any(result.outcome in ("failed", "timed out") for result in results))


if __name__ == "__main__":
    sys.exit(main())
