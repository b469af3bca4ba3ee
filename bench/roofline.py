"""`python -m bench.roofline`: prints the roofline time of a training step, part by part, and what bounds each part.

It takes any method, batch and size, and the nominal peaks of a known GPU (--gpu), or this machine's own peaks (--gpu
this). On this machine it also runs the step and prints each part's measured time beside its roofline time.
mnclglf.training.roofline says how the roofline is counted.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.steps import our_step
from mnclglf.config import EngineConfig, RunConfig
from mnclglf.methods import METHODS
from mnclglf.models.momentum import update_momentum
from mnclglf.recipes import paper
from mnclglf.training.roofline import Part, Peaks, nominal_peaks, peaks_of, short_name, step_parts
from mnclglf.training.speedups import keep_freed_memory
from mnclglf.training.start import choose_machine
from mnclglf_kernels.backend import TRITON_DTYPES as DTYPES
from mnclglf_kernels.operators import OPERATORS

GPU_OPTIONS = {"3090": 86, "4090": 89, "a100": 80, "h100": 90}
OTHER = "everything else"
MOVING_AVERAGE = "moving average"
# The part of an operation outside of our operators, by a piece of its name; the first that fits.
PARTS = {
    "convolution_backward": "convolutions, backward",
    "convolution": "convolutions, forward",
    "batch_norm": "batch norm and element-wise",
    "threshold_backward": "batch norm and element-wise",
    "clamp_min_": "batch norm and element-wise",
    "aten::addmm": "matrix products",
    "aten::add": "batch norm and element-wise",
    "aten::mm": "matrix products",
    "_fused_sgd_": "optimizer",
    "_foreach_copy_": "weight casts",
}


@contextmanager
def labeled() -> Generator[None]:
    """Names, for the profiler, the work of each operator and of the moving average.

    A hook on Python's calls opens a `record_function` where one of these functions is called, and closes it where the
    function returns. So neither the functions nor the modules that import them are touched.
    """
    calls = {row.function: name for name, row in OPERATORS.items()} | {update_momentum: MOVING_AVERAGE}
    names = {inspect.unwrap(call).__code__: name for call, name in calls.items()}
    opened: list[record_function] = []

    def on_call(frame: FrameType, event: str, _: Any) -> None:
        name = names.get(frame.f_code)
        if name is not None and event == "call":
            opened.append(record_function(f"part: {name}"))
            opened[-1].__enter__()
        elif name is not None and event == "return":
            opened.pop().__exit__(None, None, None)

    sys.setprofile(on_call)
    try:
        yield
    finally:
        sys.setprofile(None)


def measured_parts(config: RunConfig, side: int, device: torch.device) -> dict[str, float]:
    """Measures the seconds that one step spends in each part, with the profiler: device time on a GPU.

    A backward operation belongs to the part of the forward operation of the same sequence number.
    """
    cuda = device.type == "cuda"
    if not cuda:
        keep_freed_memory()
    step = our_step(config, side, device)
    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler, labeled():
        step()
        if cuda:
            torch.cuda.synchronize()  # else the profiler stops before the device has finished the step
    events = [event for event in profiler.events() or [] if event.device_type.name == "CPU"]
    of_sequence: dict[int, str] = {}
    for event in events:
        label = label_of(event)
        if label and event.sequence_nr >= 0:
            of_sequence.setdefault(event.sequence_nr, label)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        name = label_of(event) or of_sequence.get(backward_sequence(event), "") or part_of(event)
        seconds[name] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    return dict(seconds)


def label_of(event: Any) -> str:
    """Returns the part that `labeled` named around an event, or an empty string."""
    while event is not None:
        if event.name.startswith("part: "):
            return event.name.removeprefix("part: ")
        event = event.cpu_parent
    return ""


def backward_sequence(event: Any) -> int:
    """Returns the sequence number of the autograd node that an event runs for; -1 outside of backward."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event.sequence_nr
        event = event.cpu_parent
    return -1


def part_of(event: Any) -> str:
    """Returns the part of an unlabeled event, from its own name or the names around it."""
    while event is not None:
        for known, part in PARTS.items():
            if known in event.name:
                return part
        event = event.cpu_parent
    return OTHER


def table(parts: Mapping[str, Part], peaks: Peaks, images: int, measured: Mapping[str, float] | None = None) -> str:
    """Formats the parts as Markdown, the longest first, with `measured` seconds beside their roofline time."""
    rows = sorted(((*part.seconds(peaks), name, part) for name, part in parts.items()), key=lambda row: -row[0])
    head = ["part", "TFLOP", "GB", "roofline ms", "bound by"] + (["measured ms", "fraction"] if measured else [])
    lines = [f"| {' | '.join(head)} |", "|---" + 3 * "|--:" + "|---" + ("|--:|--:" if measured else "") + "|"]

    def line(name: str, flops: int, moved: int, least: float, bound: str, taken: float | None) -> None:
        cells = [name, f"{flops / 1e12:.3f}", f"{moved / 1e9:.3f}", f"{1e3 * least:.2f}", bound]
        if measured:
            cells += ["-", "-"] if not taken else [f"{1e3 * taken:.2f}", f"{least / taken:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")

    for least, bound, name, part in rows:
        line(name, part.flops, part.unique_bytes, least, bound, (measured or {}).get(name))
    for name in (measured or {}).keys() - parts.keys():
        assert measured
        line(name, 0, 0, 0.0, "", measured[name])
    least = sum(row[0] for row in rows)
    flops, moved = (sum(getattr(part, name) for part in parts.values()) for name in ("flops", "unique_bytes"))
    taken = sum(measured.values()) if measured else None
    line("together", flops, moved, least, f"{images / least:.0f} images/s", taken)
    return "\n".join(lines)


def small_share(measured: Mapping[str, float]) -> float:
    """Returns the fraction of the measured time that the operators and the moving average take."""
    names = {*OPERATORS, MOVING_AVERAGE}
    return sum(seconds for name, seconds in measured.items() if name in names) / sum(measured.values())


def config_of(method: str, images: int) -> RunConfig:
    """Returns the paper recipe with another batch size."""
    config = paper(next(name for name in METHODS if name == method), "cifar10")
    classes = replace(config.model, classes=10)  # for the method that needs them
    return replace(config, optim=replace(config.optim, batch_size=images), model=classes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument(
        "--gpu", choices=[*GPU_OPTIONS, "this"], default="3090", help="this: the machine that it runs on"
    )
    parser.add_argument("--method", choices=METHODS, default="mnclglf")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="ignored with --gpu this, which takes the autocast dtype"
    )
    options = parser.parse_args(arguments)
    config, dtype, measured = config_of(options.method, options.batch_size), options.dtype, None
    if options.gpu == "this":
        machine = choose_machine(EngineConfig())
        dtype, peaks = short_name(machine.dtype), peaks_of(machine.device, machine.dtype, tf32=True)
        measured = measured_parts(config, options.side, machine.device)
    else:
        peaks = nominal_peaks(GPU_OPTIONS[options.gpu], dtype)
    arch = GPU_OPTIONS.get(options.gpu, 86)
    parts = step_parts(config, options.side, dtype, arch, pads=peaks.pads)
    print(
        f"{options.method}, batch {options.batch_size}, {options.side} x {options.side}, {dtype}, on {peaks.name}: "
        f"{peaks.flops / 1e12:.4g} TFLOP/s, {peaks.memory_bytes / 1e9:.4g} GB/s\n"
    )
    print(table(parts, peaks, options.batch_size, measured))
    if measured:
        print(f"\nOperators and moving average: {small_share(measured):.1%} of the measured time")


if __name__ == "__main__":
    main()
