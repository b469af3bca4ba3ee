"""Runs a function in W processes at once, the ranks of torch.distributed's default group (gloo, on this machine)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120  # after which all processes are killed
SHOWN = 4000  # characters of each process's output, from its end
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def run_on_ranks(function: str, ranks: int, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """Runs a function on every rank, with the same arguments; returns its results in the order of ranks.

    A start takes seconds, so one call should run many cases. Arguments and results are what torch.save takes.

    Args:
        function: name and module of the function, "module:name". The processes import what this one can import.
        ranks: W, the number of processes.
        arguments: what the function is called with.
        seconds: time limit.

    Raises:
        RuntimeError: a rank failed or the time is up. All are killed, and the message has the output of each.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(arguments, folder / "arguments")
        command = [sys.executable, __file__, function, str(ranks), str(folder)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": LOOPBACK,
        }
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank in range(ranks):
                with (folder / f"output-{rank}").open("wb") as output:
                    started = subprocess.Popen(
                        [*command, str(rank)],
                        env=environment,
                        text=True,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                    processes.append(started)
            problem = wait_for(processes, seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if problem is not None:
            raise RuntimeError("\n".join([f"{function} on {ranks} ranks: {problem}", *outputs(folder, ranks)]))
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(ranks)]


def wait_for(processes: Sequence[subprocess.Popen[str]], seconds: float) -> str | None:
    """Waits until all processes have ended well and returns None, or returns what went wrong first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return f"rank {failed[0]} ended with {codes[failed[0]]}"
        if None not in codes:
            return None
        time.sleep(0.02)
    return f"not done after {seconds} seconds"


def outputs(folder: Path, ranks: int) -> list[str]:
    """Returns the end of the output of each rank."""
    texts = [(folder / f"output-{rank}").read_text(errors="replace") for rank in range(ranks)]
    return [f"--- output of rank {rank}:\n{text[-SHOWN:]}" for rank, text in enumerate(texts)]


def main(function: str, ranks: str, folder: str, rank: str) -> None:
    """Joins the group, runs the function and saves its result."""
    torch.set_num_threads(1)
    module, name = function.split(":")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=int(ranks), rank=int(rank))
    arguments = torch.load(Path(folder) / "arguments", weights_only=False)
    result = getattr(import_module(module), name)(*arguments)
    torch.save(result, Path(folder) / f"result-{rank}")
    dist.barrier()  # the first to leave would close connections that others still use
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
