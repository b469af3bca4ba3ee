"""Runs a function in W processes, the ranks of torch.distributed's default group (gloo), for the benchmarks."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def join(folder: Path, rank: int, ranks: int, threads: int) -> None:
    """Joins the group of these ranks, which meet by a file in the folder."""
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may lead nowhere
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", world_size=ranks, rank=rank)


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> Any:
    """Runs a function on every rank with one thread each; returns the result of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_on_rank, (ranks, Path(folder), function, arguments), nprocs=ranks)
        return torch.load(Path(folder) / "result", weights_only=False)


def _on_rank(rank: int, ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    join(folder, rank, ranks, threads=1)
    result = function(*arguments)
    if rank == 0:
        torch.save(result, folder / "result")
    dist.barrier()  # the first to leave would close connections that others still use
    dist.destroy_process_group()
