"""`python -m mnclglf_kernels.tune`: measures launch configurations on this GPU; its file overrides the table.

A candidate counts only if its results agree with those of the table's configuration.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from mnclglf_kernels._triton import launch, tiles
from mnclglf_kernels._triton.launch import architecture
from mnclglf_kernels._triton.tiles import Tile, Tuning
from mnclglf_kernels.backend import INTERPRETED, first_line
from mnclglf_kernels.backend import TRITON_DTYPES as DTYPES
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import PAPER

Milliseconds = Callable[[Callable[[], None]], float]
"""Times a call."""


def candidates(dtype: torch.dtype, shared_bytes: int) -> list[Tile]:
    """Returns the configurations to try: a small grid, without those that exceed a block's shared memory."""
    sides, depths = ((32, 64), (16, 32)) if dtype == torch.float32 else ((64, 128, 256), (32, 64))
    grid = [Tile(*values) for values in product(sides, sides, depths, (4, 8), (2, 3, 4))]
    return [t for t in grid if (t.stages - 1) * (t.rows + t.columns) * t.depth * dtype.itemsize <= shared_bytes]


def same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Returns True if two configurations agree, up to ties of neighbors and last digits: their sums differ in order."""
    for result, reference in zip(results, expected, strict=True):
        if reference.dtype == torch.int64:
            if (result != reference).float().mean() > 0.01:
                return False
        else:
            limit = 2**-6 * reference.abs().max().item()  # two units in the last place of bf16
            if not torch.allclose(result.float(), reference.float(), rtol=0, atol=limit):
                return False
    return True


def best(
    tuning: Tuning,
    table: Tile,
    tried: Sequence[Tile],
    device: torch.device,
    milliseconds: Milliseconds,
    until: float | None = None,
) -> tuple[Tile, float, float]:
    """Returns (fastest configuration, its milliseconds, the table's milliseconds).

    `milliseconds` times a call. No configuration is begun after the time `until`, of time.monotonic.
    """
    launch.run(tuning.launches(table), device)
    expected = [result.clone() for result in tuning.results]
    fastest, least = table, milliseconds(lambda: launch.run(tuning.launches(table), device))
    table_time = least
    for number, t in enumerate(tried):
        if until is not None and time.monotonic() > until:
            print(f"    the time is up after {number} of {len(tried)} configurations")
            break
        for result in tuning.results:  # so that elements a candidate does not write are wrong
            result.fill_(-1 if result.dtype == torch.int64 else torch.nan)
        try:
            launch.run(tuning.launches(t), device)
        except Exception as error:  # too much shared memory or too many registers: Triton raises various types
            print(f"    {t}: {first_line(error)}")
            continue
        if not same(tuning.results, expected):
            print(f"    {t}: wrong results, not considered")
            continue
        taken = milliseconds(lambda t=t: launch.run(tuning.launches(t), device))
        if taken < least:
            fastest, least = t, taken
    if fastest != table:  # the minimum of many noisy times is biased low: time both again, interleaved
        times = [
            [milliseconds(lambda t=t: launch.run(tuning.launches(t), device)) for t in (table, fastest)]
            for _ in range(3)
        ]
        table_time, least = (sorted(column)[1] for column in zip(*times, strict=True))
        if least >= table_time:
            return table, table_time, table_time
    return fastest, least, table_time


def tune(
    example: Example, path: Path, shared_bytes: int, milliseconds: Milliseconds, seconds: float | None = None
) -> Iterator[tuple[str, Tile, float, Tile, float]]:
    """Measures every kernel family, and adds its fastest configuration to the file `path` as soon as it is known.

    Args:
        example: sizes, dtype and device.
        path: tuning file.
        shared_bytes: most shared memory of a block.
        milliseconds: times a call.
        seconds: time for all families, shared out evenly; None for as long as it takes.

    Yields:
        (family, fastest configuration, its milliseconds, the table's configuration, its milliseconds).
    """
    dtype = example.dtype
    arch = architecture(torch.empty(0, device=example.device))
    found = dict(tiles.read_tuning(path))
    tiles.write_tuning(path, found)  # fails now, not after the measurements, if the folder is read-only
    tunings = [tuning for row in OPERATORS.values() for tuning in row.tunings(example)]
    ends = None if seconds is None else time.monotonic() + seconds
    for left, tuning in zip(range(len(tunings), 0, -1), tunings, strict=True):
        width = tuning.width or example.sizes.width
        table = tiles.tile(tuning.family, dtype, width, arch)
        now = time.monotonic()
        until = None if ends is None else now + (ends - now) / left
        tried = candidates(dtype, shared_bytes)
        fastest, least, table_time = best(tuning, table, tried, example.device, milliseconds, until)
        found[tiles.key(tuning.family, dtype, width, arch)] = fastest
        tiles.write_tuning(path, found)
        yield tuning.family, fastest, least, table, table_time


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mnclglf_kernels.tune", description=__doc__)
    parser.add_argument("--width", type=int, default=PAPER.width, help="D of the embeddings")
    parser.add_argument("--images", type=int, default=PAPER.images, help="N of a batch")
    parser.add_argument("--queue", type=int, default=PAPER.queue, help="K rows of the feature queue")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, help="end after about this time; default: try all configurations")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tune: torch sees no CUDA device, the only kind that is tuned for; nothing was written", file=sys.stderr)
        return 1
    if INTERPRETED:
        print("tune: TRITON_INTERPRET is set, and the interpreter's times mean nothing; unset it", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    def milliseconds(call: Callable[[], None]) -> float:
        return float(do_bench(call, return_mode="median"))  # pyright: ignore[reportArgumentType]  # one number

    device, path = torch.device("cuda", torch.cuda.current_device()), tiles.tuning_path()
    properties = torch.cuda.get_device_properties(device)
    print(f"tuning for {properties.name}, D {options.width}, N {options.images}, K {options.queue}, {options.dtype}")
    sizes = PAPER._replace(width=options.width, images=options.images, queue=options.queue)
    example = Example(sizes=sizes, dtype=DTYPES[options.dtype], device=device)
    shared_bytes = properties.shared_memory_per_block_optin
    for family, fastest, least, table, table_time in tune(example, path, shared_bytes, milliseconds, options.seconds):
        print(f"  {family}: {least:.4f} ms with {fastest}; until now {table_time:.4f} ms with {table}")
    print(f"wrote {path}; delete it to go back to the table")
    return 0


if __name__ == "__main__":
    sys.exit(main())
