"""Measures training steps of two ranks of one thread beside those of one rank of two threads, in turns.

Both take the same global batches, loaded and made into views as in a run. Processes that are not measured wait.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import torch

from bench.ranks import join
from mnclglf.config import RunConfig
from mnclglf.data.loaders import make_loader
from mnclglf.training.speedups import keep_freed_memory
from mnclglf.training.start import build_method, choose_machine, load_run_data
from mnclglf.training.step import TrainStep

WARM_UP, MANY = 2, 10**6  # steps
CONTENDERS = ((1, 2), (2, 1), (1, 1))
"""Ranks, and threads of each. The last one tells the work: threads that wait for each other take processor time."""


class Seconds(NamedTuple):
    """Seconds of one step, the mean of some.

    Attributes:
        wall: by the clock.
        processor: of all ranks together.
        parts: processor seconds of rank 0, by the part of the step.
    """

    wall: float
    processor: float
    parts: dict[str, float]


class Contender:
    """W processes that train together, one rank each, and take steps when they are asked to.

    Args:
        config: the run.
        ranks: W.
        threads: of each rank.
    """

    def __init__(self, config: RunConfig, ranks: int, threads: int) -> None:
        self.folder = TemporaryDirectory()
        spawning = multiprocessing.get_context("spawn")
        self.ends: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            own, other = spawning.Pipe()
            arguments = other, Path(self.folder.name), config, rank, ranks, threads
            process = spawning.Process(target=_answer, args=arguments, daemon=True)
            process.start()
            other.close()
            self.ends.append(cast(Connection, own))
            self.processes.append(process)
        self.seconds(WARM_UP)

    def seconds(self, count: int) -> Seconds:
        """Takes so many steps and returns their mean.

        Raises:
            EOFError: a process ended.
        """
        since = time.perf_counter()
        for end in self.ends:
            end.send(count)
        answers: list[tuple[float, dict[str, float]]] = [end.recv() for end in self.ends]
        wall, processor = time.perf_counter() - since, sum(own for own, _ in answers)
        parts = {name: own / count for name, own in answers[0][1].items()}
        return Seconds(wall / count, processor / count, parts)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _answer(connection: Connection, folder: Path, config: RunConfig, rank: int, ranks: int, threads: int) -> None:
    join(folder, rank, ranks, threads)
    step, parts = training(config, rank, ranks, threads)
    while True:
        try:
            count = connection.recv()
        except EOFError:
            return
        parts.clear()
        since = time.process_time()
        for _ in range(count):
            step()
        connection.send((time.process_time() - since, parts))


def training(config: RunConfig, rank: int, ranks: int, threads: int) -> tuple[Callable[[], object], dict[str, float]]:
    """Returns a function that trains on the next batch, and the seconds that its parts have taken so far."""
    machine = choose_machine(config.engine)
    keep_freed_memory()
    data = load_run_data(config)
    method = build_method(config, machine.dtype).train()
    if ranks > 1:
        method.distribute(rank, ranks, sync_batch_norm=config.model.sync_batch_norm == "on")
    labels = torch.from_numpy(data.train.labels)
    step = TrainStep(method, config.optim, config.engine, machine.dtype, labels=labels)
    loader = make_loader(
        data.train, config.view, backend=config.data.loader, views=method.views, side=data.side,
        batch_size=config.optim.batch_size, seed=0, dtype=machine.dtype, device=machine.device, threads=threads,
        rank=rank, ranks=ranks,
    )  # fmt: skip
    batches, parts, last, number = loader.batches(0, MANY), dict[str, float](), 0.0, 0

    def mark(part: str) -> None:
        nonlocal last
        now = time.process_time()
        parts[part] = parts.get(part, 0) + now - last
        last = now

    def train() -> None:
        nonlocal last, number
        last = time.process_time()
        batch = next(batches)
        mark("load")
        step(number, batch, lr=config.optim.lr, momentum=config.objective.ema_momentum)
        mark("update")
        number += 1

    step.mark = mark
    return train, parts


def measure(config: RunConfig, rounds: int, steps: int) -> Iterator[tuple[Seconds, ...]]:
    """Yields for each round the seconds of a step of each of CONTENDERS, which take turns."""
    with ExitStack() as stack:
        started: list[Contender] = []
        for ranks, threads in CONTENDERS:
            started.append(Contender(config, ranks, threads))
            stack.callback(started[-1].stop)
        for _ in range(rounds):
            yield tuple(contender.seconds(steps) for contender in started)
