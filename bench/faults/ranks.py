"""Kills a random rank of a run over two ranks at a random time, and compares the end with the undisturbed run.

python -m bench.faults.ranks --kills 20 --seed 0
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bench.faults.contents import content_of
from bench.faults.outcome import Row
from bench.faults.processes import LOG_EVERY, STEPS, log_of, newest_step, ranks_of, start_training
from mnclglf.runs.checkpoint import checkpoint_path

HEADINGS = ("kill", "rank", "after s", "checkpoint", "starts", "commands", "s to the end", "lost")
RANKS = 2
SECONDS = 300.0  # after which a command counts as hung
QUEUE = "queue.npz"  # of a method with a queue
COMMANDS = 3  # times that a command is given, at most


class Kill(NamedTuple):
    """A kill, and what became of the run."""

    rank: int
    after: float
    """Seconds from the first process of a rank to the kill."""
    step: int
    """Step of the newest checkpoint at that time; 0 before the first."""
    starts: int
    """How often torchrun has started the ranks, all commands together."""
    commands: int
    """How often the command was given."""
    seconds: float
    """From the kill to the end."""
    lost: list[str]
    """What differs from the undisturbed run."""


def kills(count: int, seed: int) -> Iterator[Kill]:
    """Yields each of `count` kills, drawn by the seed over the time of a run, its start included."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        process = start_training(undisturbed, gpus=RANKS)
        began = wait_for_ranks(process)
        if process.wait(SECONDS) != 0:
            raise RuntimeError(f"the undisturbed run failed:\n{log_of(undisturbed)}")
        whole = time.monotonic() - began
        for number in range(count):
            kill = None
            while kill is None:
                rank, after = draw.randrange(RANKS), draw.uniform(0, whole)
                kill = kill_a_rank(Path(folder) / f"run-{number}", rank, after, undisturbed)
            yield kill


def wait_for_ranks(process: subprocess.Popen[str]) -> float:
    """Waits until a command has started all its ranks; returns the time then."""
    deadline = time.monotonic() + SECONDS
    while len(ranks_of(process)) < RANKS and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return time.monotonic()


def kill_a_rank(out: Path, rank: int, after: float, undisturbed: Path) -> Kill | None:
    """Starts the run, kills a rank, and gives the command again until the run is at its end.

    Returns:
        What became of it; None, and removes the run, if the rank had ended before.
    """
    process = start_training(out, gpus=RANKS)
    time.sleep(max(0.0, wait_for_ranks(process) + after - time.monotonic()))
    step, found = newest_step(out), ranks_of(process)
    if rank not in found:
        process.wait(SECONDS)
        shutil.rmtree(out)
        return None
    os.kill(found[rank], signal.SIGKILL)
    killed, commands = time.monotonic(), 1
    seen = {*found.values()}
    while (code := ended(process, seen)) != 0 and commands < COMMANDS:
        process, commands = start_training(out, gpus=RANKS), commands + 1
    lost = differences(out, undisturbed) if code == 0 else [f"ended with {code}"]
    return Kill(rank, after, step, len(seen) // RANKS, commands, time.monotonic() - killed, lost)


def ended(process: subprocess.Popen[str], seen: set[int]) -> int:
    """Waits for a command; returns its exit code, and adds the process numbers of its ranks to those seen."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None:
        seen |= {*ranks_of(process).values()}
        if time.monotonic() > deadline:
            process.kill()
        time.sleep(0.02)
    return process.returncode


def differences(out: Path, undisturbed: Path) -> list[str]:
    """Returns what of a finished run is not as in the undisturbed one: networks, optimizer, queue, records, files."""
    if newest_step(out) != STEPS:
        return [f"ends at step {newest_step(out)} of {STEPS}"]
    state, true = (content_of(checkpoint_path(run / "checkpoints", STEPS)) for run in (out, undisturbed))
    lost = [f"{name} differs" for name in true["method"] if state["method"][name] != true["method"][name]]
    lost += ["the optimizer differs"] if state["optimizer"] != true["optimizer"] else []
    if (out / QUEUE).exists() and (undisturbed / QUEUE).exists():
        try:
            lost += [f"{QUEUE} differs"] if content_of(out / QUEUE) != content_of(undisturbed / QUEUE) else []
        except Exception:  # a torn file raises anything
            lost.append(f"{QUEUE} cannot be read")
    try:
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        if steps != [*range(LOG_EVERY, STEPS + 1, LOG_EVERY)]:
            lost.append(f"records of steps {steps}")
    except (ValueError, FileNotFoundError):
        lost.append("a torn record, or none")
    found, expected = files_of(out), files_of(undisturbed)
    lost += [f"{name} is left over" for name in sorted(found - expected)]
    return lost + [f"{name} is missing" for name in sorted(expected - found)]


def files_of(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def attack(count: int, seed: int, folder: Path) -> Iterator[Row]:
    """Kills a rank `count` times, and says what was lost."""
    row = Row("train over two ranks: SIGKILL of a rank at a random time")
    for kill in kills(count, seed):
        row.add(f"rank {kill.rank} after {kill.after:.1f} s", kill.lost)
    yield row


def main() -> int:
    """Prints a table of the kills; returns 1 if one of them lost something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{'--:|' * 7}---|")
    survived = 0
    for number, kill in enumerate(kills(arguments.kills, arguments.seed), start=1):
        survived += not kill.lost
        cells = [number, kill.rank, f"{kill.after:.1f}", kill.step, kill.starts, kill.commands, f"{kill.seconds:.0f}"]
        print(f"| {' | '.join(map(str, cells))} | {'; '.join(kill.lost) or 'nothing'} |", flush=True)
    print(f"\n{survived} of {arguments.kills} runs ended as the undisturbed one")
    return 0 if survived == arguments.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
