"""`python -m bench.roofline`: the least time of a training step, part by part, and what sets it.

For any method, batch and size: by the nominal peaks of a GPU of aot.py (--gpu), or by this machine's own (--gpu
this), where the step is also run, and what each part took stands beside its least. mnclglf.training.roofline has
how it is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.steps import our_step
from mnclglf.config import EngineConfig, RunConfig
from mnclglf.methods import METHODS
from mnclglf.models import momentum
from mnclglf.recipes import paper
from mnclglf.training.roofline import Part, Peaks, name_of, nominal_peaks, peaks_of, step_parts
from mnclglf.training.start import autocast_dtype, choose_device
from mnclglf.training.step import keep_freed_memory
from mnclglf_kernels import (
    combine,
    contrastive_losses,
    divide,
    enqueue,
    nearest_neighbor,
    nt_xent,
    queue_contrastive_loss,
)
from mnclglf_kernels.backend import TRITON_DTYPES as DTYPES

GPU_OPTIONS = {"3090": 86, "4090": 89, "a100": 80, "h100": 90}
OTHER = "everything else"
OPERATORS = (divide, combine, contrastive_losses, nearest_neighbor, enqueue, nt_xent, queue_contrastive_loss)
# Which part an operation outside of our operators belongs to, by what its name holds; the first that fits.
PARTS = {
    "convolution_backward": "convolutions, backward",
    "convolution": "convolutions, forward",
    "batch_norm": "batch norm and element-wise",
    "threshold_backward": "batch norm and element-wise",
    "clamp_min_": "batch norm and element-wise",
    "aten::addmm": "heads",
    "aten::add": "batch norm and element-wise",
    "aten::mm": "heads",
    "_fused_sgd_": "optimizer",
    "_foreach_copy_": "weight casts",
}


@contextmanager
def labelled() -> Iterator[None]:
    """Within, the profiler sees under their names what our operators and the moving average do."""

    def label(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"part: {name}"):
                return call(*args, **kwargs)

        return run

    calls = {call: call.__name__ for call in OPERATORS} | {momentum.update_momentum: "moving average"}
    with ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("mnclglf.")]:
            for attribute, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in calls:
                    stack.enter_context(mock.patch.object(module, attribute, label(calls[value], value)))
        yield


def measured_parts(config: RunConfig, side: int, device: torch.device) -> dict[str, float]:
    """Seconds that one step spent in each part, from the profiler; of the device where it is a GPU.

    A backward operation belongs where the forward operation of the same sequence number does.
    """
    cuda = device.type == "cuda"
    if not cuda:
        keep_freed_memory()
    with labelled():
        step = our_step(config, side, device)
        for _ in range(2):
            step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
            step()
            if cuda:
                torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
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
    """The part that `labelled` named around an event."""
    while event is not None:
        if event.name.startswith("part: "):
            return event.name.removeprefix("part: ")
        event = event.cpu_parent
    return ""


def backward_sequence(event: Any) -> int:
    """The sequence number of the autograd node that an event runs for; -1 outside of backward."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event.sequence_nr
        event = event.cpu_parent
    return -1


def part_of(event: Any) -> str:
    """The part of an event that nothing labels: of the operation that it is, or is for."""
    while event is not None:
        for known, part in PARTS.items():
            if known in event.name:
                return part
        event = event.cpu_parent
    return OTHER


def table(parts: Mapping[str, Part], peaks: Peaks, images: int, measured: Mapping[str, float] | None = None) -> str:
    """The parts as Markdown, the longest first; with `measured` seconds beside their least."""
    rows = sorted(((*part.seconds(peaks), name, part) for name, part in parts.items()), key=lambda row: -row[0])
    head = ["part", "TFLOP", "GB", "least ms", "set by"] + (["measured ms", "share"] if measured else [])
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
    """Share of a step that everything but networks and optimizer takes: the operators and the moving average."""
    names = {operator.__name__ for operator in OPERATORS} | {"moving average"}
    return sum(seconds for name, seconds in measured.items() if name in names) / sum(measured.values())


def config_of(method: str, images: int) -> RunConfig:
    """The paper recipe with another batch."""
    config = paper(next(name for name in METHODS if name == method), "cifar10")
    classes = replace(config.model, classes=10)  # for the method that needs them
    return replace(config, optim=replace(config.optim, batch_size=images), model=classes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__)
    parser.add_argument("--gpu", choices=[*GPU_OPTIONS, "this"], default="3090", help="this: the machine it runs on")
    parser.add_argument("--method", choices=METHODS, default="mnclglf")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="on this machine its autocast's is taken")
    options = parser.parse_args(arguments)
    config, dtype, measured = config_of(options.method, options.batch_size), options.dtype, None
    if options.gpu == "this":
        device = choose_device(EngineConfig())
        autocast = autocast_dtype(EngineConfig(), device)
        dtype, peaks = name_of(autocast), peaks_of(device, autocast, tf32=True)
        measured = measured_parts(config, options.side, device)
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
        print(f"\nOperators and moving average: {small_share(measured):.1%} of what was measured")


if __name__ == "__main__":
    main()
