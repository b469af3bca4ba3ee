"""The stages of a day on a GPU: each checks or measures something that only a GPU can tell.

A stage is one function and one row of STAGES. The function takes a Setting and yields figures as soon as it has them,
so that a stage which is stopped leaves those before it. It runs in a process of its own (gpu_day.py starts it).

Nothing here imports torch before a stage runs: the process that starts them is to begin at once.
"""

from __future__ import annotations

import copy
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.digest import ROOT, digest

if TYPE_CHECKING:
    import torch

    from mnclglf.config import MethodName, RunConfig
    from mnclglf.data.loader import Batch
    from mnclglf.training.choices import Choice
    from mnclglf.training.step import TrainStep
    from mnclglf_kernels.sizes import Sizes

Figures = dict[str, Any]
WRONG = "wrong"  # figure that makes a stage fail if it is not empty; several are joined
LEFT_OUT = "left out"  # figure that says what could not run here, and why
OPTIONAL = (
    "pytest",
    "xdist",
    "hypothesis",
    "nvidia.dali",
    "faiss",
    "cudnn",
    "lightly",
)  # packages that a stage can do without
NOISE_BATCHES = 4  # in turn: a CUDA graph that reads an old batch computes wrong losses
PARITY_IMAGES = 48
# Greatest mean difference from torchvision's views, in levels of 1 / 255, and share of more than 3 levels: those of
# tests/data/test_parity.py, for DALI with room for another order of the sums.
PARITY = {"resident": (0.1, 0.002), "dali": (0.5, 0.02)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a stage runs at: the paper's sizes on a GPU, or a rehearsal's tiny ones on a CPU.

    Attributes:
        device: device of all stages.
        dtype: autocast dtype of training steps.
        sizes: sizes of the operators.
        config: training run of the steps, at batch and widths of `sizes`.
        milliseconds: returns the median time of a call; on a GPU by CUDA events with a cold L2.
        steps: steps of a training stage.
        repeats: launches of each operator that must agree bit for bit.
        rounds: interleaved rounds that compare two steps.
        matmul: side of the matrices whose product measures the peak rate.
        copied: bytes of the copy that measures the memory's rate.
        batches: batches of a loader that are timed.
        run: settings of the real run that differ from the paper recipe's.
        tests: arguments of the pytest run.
        shallow: true for encoders of one residual block in training stages, which compile in seconds.
        start: seconds that a real run takes before its second step: it checks, compiles and proves.
        compiled: method that the compiled steps train instead; None for the run's.
        seconds: time that the stage may use.
        folder: folder for files that outlive the stage.
        packs: unpacked packs, which may hold data sets too.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    config: RunConfig
    milliseconds: Callable[[Callable[[], object]], float]
    steps: int = 50
    repeats: int = 100
    rounds: int = 3
    matmul: int = 4096
    copied: int = 2**29
    batches: int = 100
    run: Mapping[str, Any] = field(
        default_factory=lambda: {"image_size": 32, "loader": "resident"}
    )  # as `choices` was made
    tests: tuple[str, ...] = ("-m", "gpu")
    shallow: bool = False
    start: float = 35.0
    compiled: MethodName | None = None
    seconds: float = math.inf
    folder: Path = Path()
    packs: tuple[Path, ...] = ()


Work = Callable[[Setting], Iterator[Figures]]


@dataclass(frozen=True)
class Stage:
    """A row of STAGES.

    Attributes:
        title: title in the report.
        work: yields figures, or raises.
        seconds: the stage's budget.
        needs_gpu: true if the stage does not run without a GPU, except in a rehearsal.
    """

    title: str
    work: Work
    seconds: float
    needs_gpu: bool = True


def on_a_gpu(**given: Any) -> Setting:
    """Returns the setting of the day itself."""
    import torch
    from triton.testing import do_bench

    from mnclglf.config import EngineConfig
    from mnclglf.recipes import paper
    from mnclglf.training.start import autocast_dtype
    from mnclglf_kernels.sizes import PAPER

    def milliseconds(call: Callable[[], object]) -> float:
        return do_bench(call, return_mode="median")  # pyright: ignore[reportReturnType]  # one number

    device = torch.device("cuda")
    return Setting(
        device=device,
        dtype=autocast_dtype(EngineConfig(), device),
        sizes=PAPER,
        config=paper("mnclglf", "cifar10"),
        milliseconds=milliseconds,
        **given,
    )


def on_a_cpu(*, seconds: float = math.inf, **given: Any) -> Setting:
    """Returns the setting of a rehearsal: every stage at tiny sizes, with interpreted kernels and a CPU's clock.

    Stages that go on until their time is over end after 40 seconds.
    """
    import torch

    from mnclglf.config import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
    from mnclglf_kernels.sizes import Sizes
    from tests.helpers.interpreter import index_one_element, round_to_nearest_bf16

    index_one_element()
    round_to_nearest_bf16()

    def milliseconds(call: Callable[[], object]) -> float:
        since = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - since)

    tiny = dict(width=2, projector_width=16, predictor_width=8, queue_size=80)
    return Setting(
        device=torch.device("cpu"),
        dtype=torch.float32,
        sizes=Sizes(images=6, side=16, features=12, k=2, width=20, queue=40, source=20),
        config=RunConfig(
            model=ModelConfig(width=4, projector_width=24, predictor_width=12),
            objective=ObjectiveConfig(queue_size=20),
            optim=OptimConfig(batch_size=6),
        ),
        milliseconds=milliseconds,
        steps=5,
        repeats=2,
        rounds=2,
        matmul=256,
        copied=2**20,
        batches=2,
        run=dict(image_size=8, train_images=256, batch_size=64, precision="fp32", **tiny),
        tests=(
            "-m",
            "gpu",
            "tests/kernels/test_gpu.py",
            "-k",
            "test_divide or (self_check_passes and small and float32)",
        ),
        shallow=True,
        start=5,
        compiled="nnclr",  # two forwards where MNCLGLF has seven: a third of the code to compile
        seconds=min(seconds, 40.0),
        **given,
    )


def environment(setting: Setting | None = None) -> Iterator[Figures]:
    """Names versions, driver, compiler, the GPU, and the digest of the sources; it needs no setting."""
    import torch
    import triton

    figures: Figures = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "compiler": shutil.which("gcc") or shutil.which("clang") or "none: torch.compile needs a C compiler",
        "tree": digest(parts=("mnclglf", "kernels", "bench", "tests"))[:16],
        "gpu": "none",
        "not installed": ", ".join(name for name in OPTIONAL if not installed(name)) or "-",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "gpu": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "SMs": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
    if shutil.which("nvidia-smi"):
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        figures["driver, power limit, clocks, temperature"] = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=10
        ).stdout.strip()
    yield figures


def installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # there is no `nvidia` to look for `dali` in
        return False


def kernels(setting: Setting) -> Iterator[Figures]:
    """Runs the self-check of every kernel in three dtypes, and launches that must agree bit for bit."""
    import torch

    from mnclglf_kernels import self_check
    from mnclglf_kernels.operators import OPERATORS, Example

    sizes, device = setting.sizes, setting.device
    for dtype in (setting.dtype, *({torch.bfloat16, torch.float16, torch.float32} - {setting.dtype})):
        found = self_check.failures(sizes, dtype, dtype, device)
        wrong = [f"{dtype}, {name}: {problem}" for name, problem in found.items()]
        yield {f"kernels checked in {short(dtype)}": len(OPERATORS), WRONG: wrong}
    for row in OPERATORS.values():
        inputs = row.inputs(Example(sizes=sizes, dtype=setting.dtype, device=device))
        first = results(row.function, inputs)
        wrong = []
        for _ in range(setting.repeats - 1):
            if not all(torch.equal(x, y) for x, y in zip(first, results(row.function, inputs), strict=True)):
                wrong = [f"{row.name}: launches differ"]
                break
        yield {"launches compared bit for bit": f"{setting.repeats} of each, up to {row.name}", WRONG: wrong}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def results(function: Callable[..., Any], inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns an operator's outputs on its Triton kernels, and the gradients of the inputs that need one."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    from bench.operator_cases import outputs_of

    leaves = [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    # Copies, because an operator may write into its inputs, and the next call is to see the same ones.
    given = tree_map_only(torch.Tensor, lambda x: x if x.requires_grad else x.clone(), inputs)
    outputs = outputs_of(function(**given, backend="triton"), given)
    if not leaves:
        return [*outputs]
    loss = torch.stack([output.float().square().sum() for output in outputs]).sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)]


def tests(setting: Setting) -> Iterator[Figures]:
    """Runs the tests marked gpu, in several processes where pytest-xdist is installed. It fails where none passed."""
    several = ["-n", "6", "--dist", "worksteal"] if setting.device.type == "cuda" and installed("xdist") else []
    command = [sys.executable, "-u", "-m", "pytest", "-q", *several, *setting.tests]
    how = "1" if setting.device.type == "cuda" else "rehearse"
    environment = {**os.environ, "MNCLGLF_TEST_GPU": how}
    last = ""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)  # at once, so that a time-out keeps it
            last = line.strip() if re.search(r"\d+ (passed|failed|skipped|error)", line) else last
    right = process.returncode == 0 and " passed" in last
    yield {"result": last, WRONG: [] if right else [f"exit code {process.returncode}: {last}"]}


def training(
    setting: Setting, *, kernels: str = "require", compile: str = "off", options: Mapping[str, Any] | None = None
) -> Iterator[Figures]:
    """Trains on noise: time to the first step, speed without the first fifth, peak memory, and the first losses.

    The noise and the weights are the same in every such stage, so their first losses can be compared.

    Args:
        setting: sizes and device.
        kernels: "require" for the Triton kernels, "off" for PyTorch's operators.
        compile: "off", "on", or "graphs", where a graph that PyTorch would skip is an error.
        options: options of torch._inductor.config to compile with.
    """
    import torch
    from torch._inductor import config as inductor

    from mnclglf.training.roofline import least_seconds, peaks_of
    from mnclglf.training.start import describe_backends
    from mnclglf.training.timing import forget_peak_memory, peak_memory_bytes

    device, dtype, sizes = setting.device, setting.dtype, setting.sizes
    for name, value in (options or {}).items():
        if not hasattr(inductor, name):
            yield {LEFT_OUT: f"torch {torch.__version__} has no option {name} of Inductor"}
            return
        setattr(inductor, name, value)
    config, train, batches = step_on_noise(setting, kernels=kernels, compile=compile)
    if device.type == "cuda":
        inductor.triton.cudagraph_or_error = compile == "graphs"
        if hasattr(inductor, "graph_partition"):
            inductor.graph_partition = False  # else what cannot be in a graph splits it silently
    seconds: list[float] = []
    losses: list[float] = []
    for step in range(setting.steps):
        if step == setting.steps // 5:
            forget_peak_memory(device)
        since = time.perf_counter()
        found, _ = train(step, batches[step % NOISE_BATCHES], lr=0.1, momentum=0.99)
        losses.append(found.total.item())  # waits for the device
        seconds.append(time.perf_counter() - since)
        if step == 0:
            yield {"kernels": describe_backends(train.method.backends), "first step, seconds": round(seconds[0], 1)}
    train.guard.raise_if_failed()
    steady = statistics.median(seconds[setting.steps // 5 :])
    least = least_seconds(config, sizes.side, dtype, peaks_of(device, dtype, tf32=config.engine.tf32))
    yield {
        "median step, ms": round(1000 * steady, 2),
        "images/s": round(config.optim.batch_size / steady, 1),
        "roofline fraction": round(least / steady, 3),
        "peak memory, GiB": round(peak_memory_bytes(device) / 2**30, 2),
        "first losses": ", ".join(f"{loss:.6f}" for loss in losses[:4]),
        "loss at the end": round(losses[-1], 4),
    }


def step_on_noise(setting: Setting, *, kernels: str, compile: str) -> tuple[RunConfig, TrainStep, list[Batch]]:
    """Makes the step of a training stage, and the batches that it sees in turn; `training` has the arguments."""
    import torch
    from rich.console import Console

    from mnclglf.config import EngineConfig
    from mnclglf.data.loader import Batch
    from mnclglf.training.speedups import use_fast_math
    from mnclglf.training.start import Machine, build_method, choose_backends, compiler_problem
    from mnclglf.training.step import TrainStep

    device, dtype, sizes = setting.device, setting.dtype, setting.sizes
    if compile != "off":
        problem = compiler_problem(device)
        assert problem is None, problem
    engine: Any = dict(kernels=kernels, precision={torch.float32: "fp32"}.get(dtype, "auto"))
    config = replace(setting.config, engine=EngineConfig(**engine))
    if compile != "off" and setting.compiled is not None:
        config = replace(config, method=setting.compiled)
    method = build_method(config, dtype)
    if setting.shallow:
        leave_out_stages(method)
    method = method.to(device).train()
    console = Console(stderr=True)
    method.backends = choose_backends(config, sizes.source, sizes.side, Machine(device, dtype), console)
    if device.type == "cuda":
        use_fast_math(config.engine, dtype)
    train = TrainStep(method, config.optim, config.engine, dtype, compile=compile)
    noise = torch.randn(
        NOISE_BATCHES,
        method.views,
        config.optim.batch_size,
        3,
        sizes.side,
        sizes.side,
        generator=torch.Generator().manual_seed(0),
    ).to(device, dtype)
    batches = [
        Batch(
            views.flatten(0, 1).contiguous(memory_format=torch.channels_last),
            torch.arange(config.optim.batch_size, device=device),
        )
        for views in noise
    ]
    return config, train, batches


def choices(setting: Setting) -> Iterator[Figures]:
    """Makes the choice of a run's start, then times `all` without each of its parts; later runs take the choice.

    The loader is resident, so that the choice holds the whole step in one CUDA graph, too. Each setting's losses and
    gradients have an error beside a step in fp64, at most twice that of `safe` if it is to be taken.
    """
    import torch

    from mnclglf.training import choices as made
    from mnclglf.training.graphs import restore_state, saved_state
    from mnclglf.training.plans import prove_plans
    from mnclglf.training.timing import StepClock

    began = time.monotonic()
    kernels = "auto" if setting.device.type == "cuda" else "require"  # "auto" interprets nothing
    config, step, _ = step_on_noise(setting, kernels=kernels, compile="on")
    config = replace(config, engine=replace(config.engine, kernels="auto"))
    batch = batch_of_bytes(setting, config, step)
    here = made.Here.of(step, config.engine)
    if any(parts["convolution"] == "cudnn" for parts in made.settings_of(here).values()):
        left_out: list[str] = []
        prove_plans(step.method, batch.views, without_gradient=True, online="off", say=left_out.append)
        yield {"plans of cuDNN that are left out": "; ".join(left_out) or "none"}
    rates = {"lr": 0.1, "momentum": 0.99}
    rounds, steps = setting.rounds, max(1, setting.steps // 5)
    start = saved_state(step)
    truth = made.exact_outcome(step, batch)
    restore_state(step, start)
    yield {"step in fp64": truth if isinstance(truth, str) else f"done after {time.monotonic() - began:.0f} s"}
    choice = made.choose(step, batch, here, rates, say=print, rounds=rounds, steps=steps, truth=truth)
    made.remember(made.key_of(config, here, setting.sizes.side, setting.dtype), choice)
    rows = [
        {"setting": name, **choice.settings[name]} | measured(choice.errors[name], choice.milliseconds[name], choice)
        for name in choice.settings
    ]
    error, allowed = choice.errors[made.ALL], choice.errors[made.SAFE]
    right = error is not None and allowed is not None and error <= made.MOST_ERROR * allowed
    taken = {"taken": f"{choice.taken}: {choice.why}", "decided after, seconds": round(time.monotonic() - began)}
    yield {"settings": [*rows], **taken, WRONG: [] if right or isinstance(truth, str) else [choice.why]}
    if isinstance(truth, str):
        return
    longest = 0.0
    best = choice.settings[made.ALL]
    for part in reversed(made.PARTS):  # graphs first: without them little is compiled anew
        value = made.settings_of(here)[made.SAFE][part.name]
        if value == best[part.name]:
            continue
        since = time.monotonic()
        if since - began + longest > setting.seconds:
            yield {f"{LEFT_OUT}: all without {part.title}": "the stage's time is over"}
            continue
        torch.compiler.reset()  # gives the memory of graphs back
        alone = made.Candidate(name=f"all without {part.title}", parts={**best, part.name: value})
        made.try_out(alone, step, batch, here, rates, truth)
        restore_state(step, start)
        alone.problem = alone.problem or made.time_in_turns((alone,), step, batch, rates, StepClock, rounds, steps)
        restore_state(step, start)
        rows.append({"setting": alone.name, **alone.parts} | measured(alone.error, alone.milliseconds, choice))
        longest = max(longest, time.monotonic() - since)
        yield {"settings": [*rows], WRONG: [] if alone.problem is None else [f"{alone.name}: {alone.problem}"]}


def batch_of_bytes(setting: Setting, config: RunConfig, step: TrainStep) -> Batch:
    """Returns a batch of random images by the loader resident, and lets the step make such views by itself."""
    import numpy as np

    from mnclglf.data.images import ImageArray
    from mnclglf.data.loaders.resident import ResidentLoader

    count, side = config.optim.batch_size, setting.sizes.side
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    images = ImageArray(name="noise", split="train", images=pixels, labels=np.zeros(count, np.int64), classes=("any",))
    how: dict[str, Any] = dict(views=step.method.views, side=side, batch_size=count, seed=0, threads=1)
    how |= dict(dtype=setting.dtype, device=setting.device, backend=step.method.backends.augment)
    loader = ResidentLoader(images, config.view, **how)
    step.augment = loader.views_of
    (batch,) = loader.batches(0, 1)
    return batch


def measured(error: float | None, milliseconds: float | None, choice: Choice) -> Figures:
    """Returns the cells of a setting: error, also in those of the safe setting, and time."""
    safe = choice.errors["safe"]
    return {
        "error": "-" if error is None else f"{error:.2e}",
        "of safe's": "-" if error is None or not safe else f"{error / safe:.2f}",
        "ms": "-" if milliseconds is None else f"{milliseconds:.2f}",
    }


def leave_out_stages(method: Any) -> None:
    """Leaves the first three stages out of a method's encoders, and one block of the last."""
    from torch import nn

    from mnclglf.models.batch_norm import BatchNorm, Stack, without_batch_counters
    from mnclglf.models.encoder import Block, ResNet

    networks = [module for module in method.modules() if isinstance(module, ResNet)]
    width = networks[0].conv1.out_channels
    shortcut = Stack(nn.Conv2d(width, 8 * width, 1, 2, bias=False), BatchNorm(8 * width))
    block = Block(width, 8 * width, 2, shortcut, norm_layer=BatchNorm)
    without_batch_counters(block)
    for network in networks:
        network.layer1 = network.layer2 = network.layer3 = nn.Sequential()
        network.layer4 = nn.Sequential(copy.deepcopy(block))
        network.layer4.requires_grad_(network.conv1.weight.requires_grad)  # false in a momentum network


def peers(setting: Setting) -> Iterator[Figures]:
    """Compares our eager steps with lightly's like for like, in interleaved rounds.

    One process for all: like for like they share precision, memory format and cuDNN's search.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from bench.peers import PEERS
    from bench.rounds import timed
    from bench.steps import Size, Step, our_variant, peer

    size = Size(setting.config.optim.batch_size, setting.sizes.side, setting.config.model.width)
    has_lightly = installed("lightly")
    if not has_lightly:
        yield {LEFT_OUT: "lightly is not installed, so our steps stand alone; a pack can hold it"}
    rows: list[Figures] = []
    for name in ("mnclglf", *PEERS):
        steps: dict[str, Step] = {"ours": our_variant(size, setting.device, method=name)}
        if name in PEERS and has_lightly:
            steps["lightly"] = peer(size, setting.device, name=name, documented=False)
        tflop: dict[str, float] = {}
        for whose, step in steps.items():
            with FlopCounterMode(display=False) as counter:
                step()
            tflop[whose] = counter.get_total_flops() / 1e12
        seconds: dict[str, list[float]] = {whose: [] for whose in steps}
        for _ in range(setting.rounds):
            for whose, step in steps.items():
                seconds[whose].append(timed(step, setting.device, keeps=True))
        median = {whose: statistics.median(values) for whose, values in seconds.items()}
        row: Figures = {"method": name}
        for whose in ("ours", "lightly"):
            row[f"{whose}, ms"] = f"{1e3 * median[whose]:.2f}" if whose in median else "-"
            row[f"{whose}, TFLOP"] = f"{tflop[whose]:.3g}" if whose in tflop else "-"
        if "lightly" in median:
            rates = [tflop[whose] / median[whose] for whose in ("ours", "lightly")]
            row["ours over it, in operations per second"] = f"{rates[0] / rates[1]:.2f}"
        else:
            row["ours over it, in operations per second"] = "-"
        rows.append(row)
        yield {"steps, eager": [*rows]}
        del steps
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def roofline(setting: Setting) -> Iterator[Figures]:
    """Measures the parts of the eager step, then each launch with a cold L2, beside the least time of each."""
    import torch
    from torch.utils._pytree import tree_leaves

    from bench.roofline import measured_parts, small_share, table
    from mnclglf.training.roofline import peaks_of, short_name, step_parts
    from mnclglf_kernels._triton.launch import run
    from mnclglf_kernels.aot import GPUS, least_time
    from mnclglf_kernels.operators import OPERATORS, Example

    config, sizes, device, dtype = setting.config, setting.sizes, setting.device, setting.dtype
    measured = measured_parts(config, sizes.side, device)
    peaks = peaks_of(device, dtype, tf32=True)
    parts = step_parts(config, sizes.side, short_name(dtype), pads=peaks.pads)
    yield {
        "roofline times are those of": peaks.name,
        "parts of the eager step": rows_of(table(parts, peaks, config.optim.batch_size, measured)),
        "operators and moving average": f"{small_share(measured):.1%} of the measured time",
    }
    arch = table_architecture(device)
    square = torch.randn(setting.matmul, setting.matmul, device=device).to(dtype)
    flops = 2e3 * setting.matmul**3 / setting.milliseconds(lambda: square @ square)
    moved = torch.empty(setting.copied, dtype=torch.uint8, device=device)
    copied, gpu = 2e3 * moved.nbytes / setting.milliseconds(moved.clone), GPUS[arch]
    yield {
        "bounds of the launches are those of": gpu.name,
        f"{short_name(dtype)} product of side {setting.matmul}": (
            f"{flops / 1e12:.4g} TFLOP/s, nominal {gpu.half_flops / 1e12:.0f}"
        ),
        "copy": f"{copied / 1e9:.4g} GB/s, nominal {gpu.dram_bytes / 1e9:.0f}",
    }
    rows: list[Figures] = []
    for row in OPERATORS.values():
        launches = row.launches(Example(sizes=sizes, dtype=dtype, device=device), arch=arch)
        for i, x in enumerate(launches, start=1):
            for tensor in tree_leaves(list(x.arguments.values())):
                if isinstance(tensor, torch.Tensor):
                    fill(tensor)
            bound = 1e6 * least_time(x.traffic, short_name(dtype), gpu)[0]
            taken = 1e3 * setting.milliseconds(partial(run, [x], device))
            rows.append(
                {
                    "operator": f"{row.name} {i}",
                    "kernel": x.kernel.__name__,
                    "programs": " x ".join(map(str, x.grid)),
                    "us": f"{taken:.1f}",
                    "least us": f"{bound:.1f}",
                    "fraction": f"{bound / taken:.0%}",
                }
            )
        yield {"launches": [*rows]}


def rows_of(table: str) -> list[Figures]:
    """Reads the rows of a Markdown table."""
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def fill(tensor: torch.Tensor) -> None:
    """Fills the memory that a launch reads: noise (zeros take less power, so run faster), true, row 0."""
    import torch

    if tensor.is_floating_point():
        tensor.normal_()
    else:
        tensor.fill_(tensor.dtype == torch.bool)


def table_architecture(device: torch.device) -> int:
    """Returns the architecture whose table entries this GPU uses; 86 without a GPU."""
    import torch

    from mnclglf_kernels._triton.launch import architecture
    from mnclglf_kernels._triton.tiles import nearest_architecture

    return nearest_architecture(architecture(torch.empty(0, device=device)))


def loaders(setting: Setting) -> Iterator[Figures]:
    """Compares each loader's views with torchvision's, and measures the images per second of each loader alone."""
    import numpy as np
    import torch

    from mnclglf.config import LoaderName
    from mnclglf.data.images import ImageArray
    from mnclglf.data.loaders import make_loader
    from mnclglf.recipes import VIEWS

    n, side, device = setting.config.optim.batch_size, setting.sizes.side, setting.device
    count = max(4 * n, PARITY_IMAGES)
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))  # smooth images, as photographs are
    pixels = torch.nn.functional.interpolate(coarse, size=setting.sizes.source, mode="bilinear")
    images = ImageArray(
        name="noise",
        split="train",
        images=(255 * pixels).permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy(),
        labels=np.zeros(count, np.int64),
        classes=("any",),
    )
    settings: dict[str, Any] = dict(views=3, side=side, batch_size=n, seed=0, device=device, threads=4)
    some = np.arange(PARITY_IMAGES)

    def levels(name: LoaderName) -> torch.Tensor:
        loader = make_loader(images, VIEWS["paper"], backend=name, dtype=torch.float32, **settings)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (loader.mean, loader.std))
        return 255 * torch.cat([view.cpu() * std + mean for view in loader.render(some, epoch=1)])

    truth = levels("reference")
    names: tuple[LoaderName, ...] = ("resident", "dali", "reference")
    rows: list[Figures] = []
    for name in names:
        row: Figures = {"loader": "torchvision (reference)" if name == "reference" else name}
        wrong: list[str] = []
        try:
            if name != "reference":
                difference = (levels(name) - truth).abs()
                mean, share = difference.mean().item(), (difference > 3).float().mean().item()
                row |= {"levels from torchvision's, mean": f"{mean:.4f}", "share above 3": f"{share:.3%}"}
                if not (mean < PARITY[name][0] and share < PARITY[name][1]):  # NaN is wrong too
                    wrong = [f"{name}: {mean:.3g} levels from torchvision's views, {share:.2%} above 3"]
            else:
                row |= {"levels from torchvision's, mean": "-", "share above 3": "-"}
            batches = 1 if name == "reference" else setting.batches
            loader = make_loader(images, VIEWS["paper"], backend=name, dtype=setting.dtype, **settings)
            row["images/s"] = f"{n * batches / seconds_of_batches(loader, batches):,.0f}"
            rows.append(row)
            yield {"loaders": [*rows], WRONG: wrong}
        except ImportError as error:
            yield {f"{LEFT_OUT}: {name}": first_line_of(error)}
        except RuntimeError as error:  # installed, and it cannot run here: the driver is too old
            yield {WRONG: [f"{name} cannot run here: {first_line_of(error)}"]}


def seconds_of_batches(loader: Any, count: int) -> float:
    """Returns the seconds of `count` batches after the first, each waited for."""
    batches = loader.batches(0, count + 1)
    next(batches)
    since = time.perf_counter()
    for batch in batches:
        assert batch.views.isfinite().all()  # waits for the device
    return time.perf_counter() - since


def first_line_of(error: Exception) -> str:
    from mnclglf_kernels.backend import first_line

    return first_line(error)


def faiss(setting: Setting) -> Iterator[Figures]:
    """Compares FAISS's search with PyTorch's and with ours, in results and in time."""
    import torch

    from mnclglf_kernels import nearest_neighbor, resolve

    sizes, device, dtype = setting.sizes, setting.device, setting.dtype
    generator = torch.Generator().manual_seed(0)
    queue = torch.randn(sizes.queue, sizes.width, generator=generator)
    queue = torch.nn.functional.normalize(queue).to(device, dtype)
    queries = torch.randn(2 * sizes.images, sizes.width, generator=generator).to(device, dtype)
    expected = nearest_neighbor(queries, queue, backend="torch")
    rows: list[Figures] = []
    for backend in ("torch", "triton", "faiss"):
        try:
            resolve(backend, queries, kind="lookup")
            call = partial(nearest_neighbor, queries, queue, backend=backend)
            agreement = (call() == expected).float().mean().item()
        except (RuntimeError, ImportError, OSError) as error:  # OSError: a library of FAISS is missing
            yield {f"{LEFT_OUT}: {backend}": first_line_of(error)}
            continue
        wrong = [f"{backend} agrees on {agreement:.1%} of the queries only"] * (agreement <= 0.98)
        rows.append(
            {"lookup": backend, "same row as PyTorch": f"{agreement:.2%}", "ms": f"{setting.milliseconds(call):.3f}"}
        )
        yield {"lookups": [*rows], WRONG: wrong}


def tune(setting: Setting) -> Iterator[Figures]:
    """Measures launch configurations into a file of this day; nothing else reads that file."""
    import torch

    from mnclglf_kernels import tune
    from mnclglf_kernels.operators import Example

    cuda = setting.device.type == "cuda"
    shared = torch.cuda.get_device_properties(0).shared_memory_per_block_optin if cuda else 99 << 10
    path, rows = setting.folder / "tuning.json", list[Figures]()
    os.environ["MNCLGLF_TUNING"] = str(path)  # in this process: the table is what an earlier call of this day found
    example = Example(sizes=setting.sizes, dtype=setting.dtype, device=setting.device)
    left = setting.seconds / 2  # the process began some seconds ago, and the last configurations take some more
    for family, fastest, least, _, before in tune.tune(example, path, shared, setting.milliseconds, left):
        rows.append({"family": family, "ms": f"{least:.4f}", "with": str(fastest), "table's ms": f"{before:.4f}"})
        rows[-1]["times as fast"] = f"{before / least:.2f}"
        yield {"configurations": [*rows], "tuning file": str(path)}


def run(setting: Setting) -> Iterator[Figures]:
    """Trains on real images for as many epochs as the time allows, then evaluates by k-NN.

    The number of epochs follows from the step's time in an earlier stage. If that was too short, training stops when
    the time is up, as by Ctrl-C, and the encoder of then is evaluated. Its checkpoints are too large to keep.
    """
    from mnclglf import evaluate
    from mnclglf.runs.metrics import read_records

    began = time.monotonic()
    evaluation = min(15.0, setting.seconds / 3)  # seconds kept for k-NN
    dataset, data_dir, images = real_images(setting.packs)
    batch = setting.run.get("batch_size", setting.config.optim.batch_size)
    epoch = max(1, setting.run.get("train_images", images) // batch) * seconds_of_a_step(setting.folder)
    left = setting.seconds - evaluation - (time.monotonic() - began)
    epochs = max(1, int((left - setting.start) / epoch))
    yield {"data set": dataset, "epochs asked for": epochs}
    settings: Figures = dict(dataset=dataset, data_dir=data_dir, recipe="paper", log_every=5, **setting.run)
    kept = Path(tempfile.mkdtemp(prefix="run-", dir=setting.folder))  # of this attempt
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train_until(out, left, epochs=epochs, **settings)
        records, _ = read_records(out / "metrics.jsonl")
        if not records:
            yield {WRONG: [f"the run had recorded nothing after {left:.0f} s: its start took longer"]}
            return
        speeds = [record["step_seconds"] for record in records if record.get("step_seconds")]
        yield {
            "epochs": round(records[-1]["epoch"], 2),
            "loss at the end": records[-1]["loss"],
            "images/s": round(batch / statistics.median(speeds), 1) if speeds else "-",
            "roofline fraction": records[-1].get("roofline_fraction"),
            "wait for data, seconds of the last record": records[-1].get("data_wait_seconds"),
        }
        found = evaluate(out, "knn")
        yield {f"k-NN, {result.representation}": f"{result.top1:.2%}" for result in found}
        shutil.copytree(out, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints"))


def seconds_of_a_step(folder: Path) -> float:
    """Returns the seconds of a training step that an earlier stage of this day has measured; 0.03 if none has."""
    for name in (BASELINE, "triton"):
        log = folder / f"{name}.log"
        found = re.findall(r'"median step, ms": ([0-9.]+)', log.read_text(errors="replace") if log.exists() else "")
        if found:
            return float(found[-1]) / 1e3
    return 0.03


def real_images(packs: Sequence[Path]) -> tuple[str, Path | None, int]:
    """Returns name, folder and number of training images: Fashion-MNIST's if this machine or a pack has them."""
    from mnclglf.data.datasets import load_dataset

    places = [path.parent for pack in packs for path in pack.rglob("train-images-idx3-ubyte*")]
    for place in (*places, None):
        try:
            return "fashion_mnist", place, len(load_dataset("fashion_mnist", place, download=False)[0])
        except (OSError, ValueError) as error:
            print(f"fashion_mnist: {error}")
    return "mnist5k", None, len(load_dataset("mnist5k", None, download=False)[0])


def train_until(out: Path, seconds: float, **settings: Any) -> None:
    """Trains, and stops as Ctrl-C does when the time is up: the run is saved and can be evaluated."""
    import signal
    import threading

    from mnclglf import train

    timer = threading.Timer(max(1.0, seconds), os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        train(out=out, **settings)
    except KeyboardInterrupt as stopped:
        print(f"the time is up: {stopped}")
    finally:
        timer.cancel()


STAGES: dict[str, Stage] = {
    "environment": Stage("Driver, versions and compiler", environment, 15, needs_gpu=False),
    "tests": Stage("The tests marked gpu", tests, 55),
    "kernels": Stage("Kernels against PyTorch, repeated", kernels, 35),
    "eager": Stage("Steps, PyTorch operators", partial(training, kernels="off"), 20),
    "triton": Stage("Steps, Triton kernels", training, 15),
    "peers": Stage("Steps beside lightly's, like for like", peers, 30),
    "roofline": Stage("Parts and launches beside their roofline times", roofline, 25),
    "loaders": Stage("Loaders beside torchvision", loaders, 25),
    "faiss": Stage("FAISS beside our lookup", faiss, 10),
    # What compiles for long comes last.
    "choices": Stage("The choice at start-up, and each part alone", choices, 140),
    "graphs": Stage("Steps, compiled, CUDA graphs", partial(training, compile="graphs"), 35),
    "tune": Stage("Launch configurations", tune, 15),
    "coordinate_descent": Stage(
        "Steps, CUDA graphs, coordinate descent",
        partial(training, compile="graphs", options={"coordinate_descent_tuning": True}),
        20,
    ),
    "max_autotune": Stage(
        "Steps, CUDA graphs, max-autotune", partial(training, compile="graphs", options={"max_autotune": True}), 25
    ),
    "run": Stage("A real run", run, 60),
}
"""The stages in order of worth. The last one uses all the time that is left."""
BASELINE = "graphs"  # the stage whose step the others are compared with
