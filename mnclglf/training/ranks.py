"""The processes of one training run: ranks of torch.distributed, one per device, as torchrun starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from mnclglf.config import require
from mnclglf.training.pulse import PULSE
from mnclglf_kernels.ranks import gather

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a rank's environment, all set by torchrun
MEET_SECONDS = 0.05  # between two looks at what other ranks have left in the store


class RankError(RuntimeError):
    """Another rank ended or does not answer; the message names it.

    Attributes:
        told: whether that rank prints the reason itself.
    """

    def __init__(self, message: str, *, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process among those of its run; the default is a run of one process.

    Attributes:
        rank: number of this process, from 0; rank 0 alone writes the run directory.
        count: number of processes, W.
        local_rank: number of this process on its machine, and of its GPU.
        local_count: number of processes on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def writes(self) -> bool:
        """Returns whether this process writes the run directory and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """Returns the images of a global batch that each rank takes.

        Raises:
            UsageError: the batch cannot be divided evenly.
        """
        below, above = (max(1, batch_size // self.count + more) * self.count for more in (0, 1))
        require(
            batch_size % self.count == 0,
            f"batch_size {batch_size} is that of all {self.count} ranks together, which cannot divide it evenly; take "
            f"{below} or {above}, or another number of ranks",
        )
        return batch_size // self.count

    def batches(self, start: int, stop: int, size: int) -> list[range]:
        """Returns the rows of this rank's batches among those of start .. stop - 1: batches r, r + W, ...

        The batches are those of one process. All ranks get as many: in the last round some may be empty.
        """
        firsts = range(start + self.rank * size, stop + self.rank * size, self.count * size)
        return [range(min(first, stop), min(first + size, stop)) for first in firsts]

    def exchange(self, data: bytes) -> list[bytes]:
        """Returns what all ranks gave, in the order of ranks."""
        if self.count == 1:
            return [data]
        sizes = gather(torch.tensor(len(data)))
        padded = torch.zeros(max(1, int(sizes.max())), dtype=torch.uint8)
        padded.numpy()[: len(data)] = np.frombuffer(data, np.uint8)
        return [row[:size].numpy().tobytes() for row, size in zip(gather(padded), sizes.tolist(), strict=True)]

    def from_first(self, make: Callable[[], bytes]) -> bytes:
        """Returns what rank 0 makes, on every rank.

        Raises:
            RankError: rank 0 could not make it; its own error says why.
        """
        if self.count == 1:
            return make()
        data, failure = b"", None
        if self.rank == 0:
            try:
                data = make()
            except BaseException as error:
                failure = error
        size = torch.tensor(-1 if failure is not None else len(data))
        dist.broadcast(size, src=0)
        if failure is not None:
            raise failure
        if size < 0:
            raise RankError("rank 0 could not start", told=True)
        sent = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0 and data:
            sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(sent, src=0)
        return sent.numpy().tobytes()

    def wait_for_all(self) -> None:
        """Waits until all ranks are here, however long they read their images; a message would time out.

        Raises:
            RankError: a rank has ended.
        """
        if self.count > 1:
            lost = PULSE.meet(self.rank, self.count)
            if lost is not None:
                raise RankError(lost)

    def require_equal(self, what: str, value: str, remedy: str) -> None:
        """Raises ValueError on every rank if a text is not the same on all of them."""
        found = [text.decode() for text in self.exchange(value.encode())]
        other = next((rank for rank, text in enumerate(found) if text != found[0]), None)
        require(
            other is None,
            f"rank {other} has another {what} than rank 0: {_brief(found[other or 0])}, not {_brief(found[0])}; "
            f"{remedy}",
        )


ALONE = Ranks()


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def ranks_of_environment() -> Ranks:
    """Returns the place of this process by the variables that torchrun sets; without them a run of one process.

    Raises:
        UsageError: a variable is missing or no number, or a rank is not below the number of ranks.
    """
    given = [name for name in VARIABLES if name in os.environ]
    if "RANK" not in given or "WORLD_SIZE" not in given:
        return ALONE
    require(
        len(given) == len(VARIABLES),
        f"{', '.join(given)} are set, as by torchrun, and {', '.join(set(VARIABLES) - {*given})} are not; start with "
        "torchrun, or unset them",
    )
    numbers: dict[str, int] = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        require(text.isdecimal(), f"the environment's {name} is {text!r}, no whole number; start with torchrun")
        numbers[name] = int(text)
    for own, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        # Without a rank 0 nothing would be saved. LOCAL_WORLD_SIZE may be missing where LOCAL_RANK was set by hand.
        require(
            count not in os.environ or numbers[own] < numbers[count],
            f"the environment's {own} {numbers[own]} must be below {count} {numbers[count]}; start with torchrun, or "
            "unset both",
        )
    return Ranks(
        rank=numbers["RANK"],
        count=numbers["WORLD_SIZE"],
        local_rank=numbers["LOCAL_RANK"],
        local_count=numbers["LOCAL_WORLD_SIZE"],
    )


def require_one_process(command: str, remedy: str) -> None:
    """Raises UsageError if torchrun has started several processes."""
    count = ranks_of_environment().count
    require(count == 1, f"{command} runs in one process, and torchrun has started {count}; {remedy}")


def join(ranks: Ranks, device: torch.device, timeout_seconds: float) -> None:
    """Meets the other ranks of the run: NCCL between GPUs, gloo between CPUs; does nothing in a run of one process.

    Args:
        ranks: the place of this process.
        device: "cuda", whose GPU of the number `local_rank` this process takes, or "cpu".
        timeout_seconds: seconds that a message waits for the others before the run ends.

    Raises:
        UsageError: the machine has fewer GPUs than ranks.
        RankError: another rank did not come in time.
    """
    if ranks.count == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device.type == "cuda":
        require(
            ranks.local_rank < torch.cuda.device_count(),
            f"rank {ranks.rank} needs GPU {ranks.local_rank}, and this machine has {torch.cuda.device_count()}; start "
            "one process per GPU (--nproc-per-node)",
        )
        torch.cuda.set_device(ranks.local_rank)
        backend = "cpu:gloo,cuda:nccl"  # texts and checkpoints travel between the hosts
    timeout = timedelta(seconds=timeout_seconds)
    store, *_ = next(rendezvous("env://", timeout=timeout))
    name = _name_start(store, ranks, timeout_seconds)
    dist.init_process_group(
        backend, store=PrefixStore(name, store), rank=ranks.rank, world_size=ranks.count, timeout=timeout
    )
    PULSE.start(ranks.rank, name)


def _name_start(store: Store, ranks: Ranks, timeout_seconds: float) -> str:
    """Returns a name that all ranks of this start of the run have, and no earlier start had.

    torchrun keeps its store when it starts the ranks again, and with it the addresses of ranks that have ended: gloo
    would connect to one of those ("Connection refused"), as torch puts nothing of the start into their keys. The number
    of restarts that torchrun tells is no name: machines differ in it. So each rank leaves a token, rank 0 answers
    each token with the name, also one that an earlier start has left, and waits until all ranks have read it.

    Raises:
        RankError: a rank has not come in time.
    """
    own, deadline = uuid4().hex, time.monotonic() + timeout_seconds
    missing = {*range(1, ranks.count)} if ranks.rank == 0 else {0}
    if ranks.rank > 0:
        store.set(f"mnclglf/token/{ranks.rank}", own)
    while True:
        if ranks.rank == 0:
            for other in missing:
                if store.check([f"mnclglf/token/{other}"]):
                    store.set(f"mnclglf/name/{store.get(f'mnclglf/token/{other}').decode()}", own)
            missing -= {other for other in missing if store.check([f"mnclglf/read/{own}/{other}"])}
            if not missing:
                return own
        elif store.check([f"mnclglf/name/{own}"]):
            name = store.get(f"mnclglf/name/{own}").decode()
            store.set(f"mnclglf/read/{name}/{ranks.rank}", "1")
            return name
        if time.monotonic() > deadline:
            raise RankError(
                f"rank {', '.join(map(str, sorted(missing)))} of {ranks.count} did not come within "
                f"{timeout_seconds:g} seconds; see whether torchrun runs on every machine, or raise --rank-timeout"
            )
        time.sleep(MEET_SECONDS)


def leave() -> None:
    """Ends what `join` began."""
    PULSE.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
