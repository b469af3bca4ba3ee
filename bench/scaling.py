"""`python -m bench.scaling`: counts the messages of a training step over ranks for each method, and what they cost.

They are counted in two processes with the networks of the paper recipe and few images. Most messages do not depend on
the images; those that do are scaled, which is exact. What they cost on GPUs is computed, not measured.

With --measure it measures two ranks of one thread beside one rank of two threads, on this machine's CPU. With
--readiness it measures when gradients are ready, and computes what messages during backward could gain.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from bench.rank_messages import LINKS, NORM_BACKWARD, NORM_FORWARD, WEIGHTS, Found, Link, Messages, count_all, of_size
from bench.rank_steps import CONTENDERS, Seconds, measure
from bench.ranks import on_ranks
from bench.readiness import AUTOCAST, COMPILED, SHARED, STAGED, Ready, exposed, readiness
from bench.steps import Size, config_of
from mnclglf.config import METHOD_NAMES, MethodName, ReduceDtype, RunConfig
from mnclglf.recipes import paper, quick

COUNTED_RANKS, COUNTED_IMAGES, COUNTED_SIDE = 2, 2, 16  # what is counted; the images are those of a rank
RANKS, IMAGES = 8, 256  # what is printed; the images are those of all ranks
CLASSES = 10  # of the supervised method
STEPS = {"RTX 3090": 0.0701, "NVIDIA H200": 0.0162}
"""Seconds of an MNCLGLF step of 256 images on one GPU (docs/explain/performance.md); that of the 3090 is computed."""
PLACES = (  # GPU, link, ranks, images of each
    *(("RTX 3090", "PCIe 4", RANKS, images) for images in (IMAGES // RANKS, IMAGES)),
    *(("NVIDIA H200", "NVLink", RANKS, images) for images in (IMAGES // RANKS, IMAGES)),
    *(("NVIDIA H200", "network", ranks, IMAGES) for ranks in (64, 512)),
)


def runs(
    methods: Sequence[MethodName], sync_batch_norm: bool = True, reduce_dtype: ReduceDtype = "fp32"
) -> list[RunConfig]:
    """Returns the runs whose messages are counted."""
    size = Size(images=COUNTED_IMAGES * COUNTED_RANKS)
    return [
        replace(
            config := config_of(size, method),
            model=replace(config.model, classes=CLASSES, sync_batch_norm="on" if sync_batch_norm else "off"),
            engine=replace(config.engine, reduce_dtype=reduce_dtype),
        )
        for method in methods
    ]


def printed(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table in Markdown."""
    table = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)


def print_messages(found: Sequence[Found]) -> None:
    """Prints the messages of each method, and what they cost."""
    printed(
        f"Messages of a step, {IMAGES} images on {RANKS} ranks; bytes are those of one rank",
        ("method", "for", "kind", "number", "given", "sent"),
        (
            (method, purpose, own.kind, str(own.number), f"{own.given:,}", f"{own.sent(RANKS):,.0f}")
            for method, messages in zip(METHOD_NAMES, found, strict=True)
            for purpose, own in messages.items()
        ),
    )


def print_costs(ways: Mapping[str, Sequence[Found]]) -> None:
    """Prints what all messages of a step cost by count on each link, for each way to send them."""
    for name, link in LINKS.items():

        def cell(found: Found, link: Link = link) -> str:
            seconds = sum(own.seconds(link, RANKS) for own in found.values())
            return f"{seconds * 1e3:.2f} ({sum(own.number for own in found.values())})"

        printed(
            f"ms per step by count, {name}: {link.latency * 1e6:.0f} us per message, {link.bandwidth / 1e9:.0f} GB/s",
            ("method", *(f"{way} (messages)" for way in ways)),
            ((method, *(cell(found[row]) for found in ways.values())) for row, method in enumerate(METHOD_NAMES)),
        )


def print_steps(ways: Mapping[str, Sequence[Found]]) -> None:
    """Prints the messages of MNCLGLF beside its step."""
    row, rows = METHOD_NAMES.index("mnclglf"), list[Sequence[str]]()
    for gpu, link, ranks, images in PLACES:
        step = STEPS[gpu] * images / IMAGES
        for way, found in ways.items():
            messages = of_size(found[row], (IMAGES // RANKS, RANKS), (images, ranks))
            cost = {purpose: own.seconds(LINKS[link], ranks) for purpose, own in messages.items()}
            norms, whole = cost.get(NORM_FORWARD, 0.0) + cost.get(NORM_BACKWARD, 0.0), sum(cost.values())
            times = (step, norms, cost[WEIGHTS], whole - norms - cost[WEIGHTS], step + whole)
            rows.append((f"{ranks} {gpu}, {link}", str(images), way, *(f"{x * 1e3:.1f}" for x in times)))
            rows[-1] = (*rows[-1], f"{step / times[-1]:.0%}")
    printed(
        "MNCLGLF: ms by count. The step is that of 256 images, divided in proportion",
        ("GPUs", "images each", "messages", "step", "batch norm", "gradients", "others", "together", "efficiency"),
        rows,
    )


def print_measured(title: str, rounds: Iterable[tuple[Seconds, ...]]) -> None:
    """Prints each round as it is measured, then the medians."""
    print(f"{title}; seconds of a step by the clock, processor seconds in brackets")
    found = list[tuple[Seconds, ...]]()
    for every in rounds:
        found.append(every)
        shown = ", ".join(
            f"{ranks} x {threads} {own.wall:.3f} ({own.processor:.3f})"
            for (ranks, threads), own in zip(CONTENDERS, every, strict=True)
        )
        print(f"ranks x threads: {shown}; load {os.getloadavg()[0]:.1f}", flush=True)
    ratios = sorted(one.wall / two.wall for one, two, _ in found)
    work = sorted(alone.processor / two.processor for _, two, alone in found)
    print(
        f"two ranks of one thread are {statistics.median(ratios):.2f} times as fast as one rank of two "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f});\ntheir processor time is that of one rank of one thread divided by "
        f"{statistics.median(work):.2f} ({work[0]:.2f} to {work[-1]:.2f})\n"
    )
    parts = [[own.parts for own in column] for column in zip(*found, strict=True)]
    printed(
        "Parts of a step, median processor seconds of rank 0",
        ("part", *(f"{ranks} x {threads}" for ranks, threads in CONTENDERS)),
        (
            (part, *(f"{statistics.median(own.get(part, 0.0) for own in column):.3f}" for column in parts))
            for part in found[0][1].parts
        ),
    )


def measured_runs() -> dict[str, RunConfig]:
    """Returns the runs that are measured, each at its own batch size."""
    return {
        "mnist5k, recipe quick, batch 256": quick("mnclglf", "mnist5k"),
        "mnist5k, recipe paper, ResNet-18, batch 256": paper("mnclglf", "mnist5k"),
    }


def print_readiness(found: dict[str, Ready], size: Size) -> None:
    """Prints when gradients are ready, and what is left of their message after backward."""
    by = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
    printed(
        f"Bytes of gradients that are ready by a part of backward, {size}",
        ("weights", "backward, of the step", *(f"by {part:.0%}" for part in by)),
        ((how, f"{own.backward:.0%}", *(f"{own.share(part):.0%}" for part in by)) for how, own in found.items()),
    )
    rows = list[Sequence[str]]()
    for gpu, link, ranks, images in PLACES:
        step = STEPS[gpu] * images / IMAGES
        for how, own in found.items():
            flat = Messages("all_reduce", 1, sum(given for _, given in own.at)).seconds(LINKS[link], ranks)
            left = exposed(own, own.backward * step, LINKS[link], ranks)
            times = (f"{x * 1e3:.1f}" for x in (step, flat, left))
            rows.append((f"{ranks} {gpu}, {link}", str(images), how, *times, f"{(flat - left) / (step + flat):.0%}"))
    printed(
        "MNCLGLF: ms by count of the gradients' message, after backward and in buckets during it",
        ("GPUs", "images each", "weights", "step", "one message", "left of buckets", "gain"),
        rows,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure two ranks beside one, on this CPU")
    parser.add_argument("--readiness", action="store_true", help="measure when gradients are ready in backward")
    parser.add_argument("--rounds", type=int, default=7, help="of --measure; each takes some steps of both, in turns")
    options = parser.parse_args(arguments)
    if options.measure:
        for (title, config), steps in zip(measured_runs().items(), (4, 1), strict=True):
            print_measured(title, measure(config, options.rounds, steps))
        return
    if options.readiness:
        size = Size(images=32)
        print_readiness({how: readiness(how, size) for how in (SHARED, COMPILED, AUTOCAST, STAGED)}, size)
        return
    counted = {
        "gradients in fp32": runs(METHOD_NAMES),
        "in bf16": runs(METHOD_NAMES, reduce_dtype="bf16"),
        "--sync-batch-norm off": runs(METHOD_NAMES, sync_batch_norm=False),
        "off, in bf16": runs(METHOD_NAMES, sync_batch_norm=False, reduce_dtype="bf16"),
    }
    every = on_ranks(count_all, COUNTED_RANKS, [run for way in counted.values() for run in way], COUNTED_SIDE)
    sizes = (COUNTED_IMAGES, COUNTED_RANKS), (IMAGES // RANKS, RANKS)
    scaled = iter([of_size(found, *sizes) for found in every])
    ways = {way: [next(scaled) for _ in rows] for way, rows in counted.items()}
    print_messages(ways["gradients in fp32"])
    print_costs(ways)
    print_steps(ways)


if __name__ == "__main__":
    main()
