"""Attacks real runs and prints one table: attack, tried, survived, lost.

    python -m bench.faults [PART ...] [--count N] [--seed S] [--out FILE]

kills: SIGKILL before every operation on a file and at random times; the same command again ends as the undisturbed one.
disk: operations on files fail, files cannot be read, the disk is full, the run directory vanishes.
pairs: two commands at once in one run directory.
signals: SIGINT, SIGTERM, SIGHUP and SIGUSR1 at random times, a second one, a closed stdout.
ranks: SIGKILL of a random rank of two.
checkpoints: flipped bits, lost ends, forged archives.
inputs: damaged files, settings, run directories and command lines, and bombs. Each must be read, or refused in words.

Parts run beside each other, one per core. Linux only: /proc and fork are used.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from bench.faults.outcome import Row, table_of
from bench.faults.parts import PARTS, run


def main() -> int:
    """Prints the table; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="all without any")
    parser.add_argument("--count", type=int, help="attacks of each kind, in place of the part's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the table, as Markdown")
    arguments = parser.parse_args()
    parts = arguments.parts or [*PARTS]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"{unknown[0]} is none of {', '.join(PARTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    began, found = time.monotonic(), dict[str, list[Row]]()
    # Started anew, not forked: each becomes a parent of forks.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(run, part, arguments.count, arguments.seed): part for part in parts}
        for done in as_completed(running):
            found[running[done]] = done.result()
            print(f"{running[done]}: {time.monotonic() - began:.0f} s", flush=True)
    rows = [row for part in parts for row in found[part]]
    table = table_of(rows)
    print(f"\n{table}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(table)
    return 1 if any(row.lost for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
