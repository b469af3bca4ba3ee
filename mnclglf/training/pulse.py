"""What a run over several ranks does when one of them fails: who prints the error, and who is named in it."""

from __future__ import annotations

import atexit
import os
import platform
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mnclglf_kernels.ranks import messages

BEAT_SECONDS = 1.0  # between two signs of life of a rank
LOST_SECONDS = 30.0  # without one, at the start of a run
SILENT_SECONDS = 4.0  # without a sign of life, after which a rank counts as ended or stopped
OF_MESSAGES = ("gloo", "Gloo", "NCCL", "nccl", "c10d")  # a word of what torch.distributed raises when a message fails
_END, _HERE = "mnclglf/end", "mnclglf/here"  # keys of the store
RESUMES = (
    "The same command goes on from the newest checkpoint, as torchrun --max-restarts starts it again; ranks wait for "
    "each other as --rank-timeout says"
)


def is_of_messages(error: BaseException) -> bool:
    """Returns whether an error is of a message between ranks: another one ended, or did not answer in time."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in str(error) for word in OF_MESSAGES)
    )


def describe_loss(count: int, error: BaseException, remedy: str = RESUMES) -> str:
    """Returns which of `count` ranks were lost, by the error of a message, and what can be done."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end this rank before it has told
    first, *_ = str(error).splitlines() or [""]
    return f"{PULSE.diagnosis(count)}. {remedy} (torch: {first[:100]})"


class Pulse:
    """Tells the other ranks each second that this process lives and how many messages it has taken part in.

    By the key-value store in which the ranks met, as it answers while a message is stuck.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.ending = threading.Event()
        self.started_as: str | None = None

    def start(self, rank: int, name: str) -> None:
        """Begins; `name` is that of this start of the run (ranks.py), which an earlier start's signs do not have."""
        self.started_as = name
        self.ending.clear()
        self.thread = threading.Thread(target=self._beat, args=(rank,), daemon=True)
        self.thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends it; waits, as the interpreter aborts the process if it ends while the thread asks the store."""
        self.ending.set()
        if self.thread is not None:
            self.thread.join()

    def _beat(self, rank: int) -> None:
        store: Store | None = None
        beats = 0
        while not self.ending.is_set():
            beats += 1
            if store is None and _store_answers():
                store = open_store()
            try:
                if store is not None:
                    store.set(_pulse_key(rank), f"{beats} {messages.total()} {os.getpid()} {platform.node()}")
            except RuntimeError:  # the store was busy for SILENT_SECONDS, or has gone with its host
                store = None  # connect again: a rank that gives no sign for LOST_SECONDS counts as lost
            self.ending.wait(BEAT_SECONDS)

    def meet(self, rank: int, count: int) -> str | None:
        """Waits until all ranks have called this; returns which one has ended before, or None."""
        store = open_store()
        if store is None:
            return None
        store.set(f"{_HERE}/{_this_start()}/{rank}", "1")
        missing = [f"{_HERE}/{_this_start()}/{other}" for other in range(count)]
        signs: dict[str, tuple[list[str], float]] = {}
        while missing := [key for key in missing if not store.check([key])]:
            for key in missing:
                other = int(key.rpartition("/")[2])
                sign = _last_sign(store, other)
                if signs.get(key, ([], 0.0))[0] != sign:
                    signs[key] = sign, time.monotonic()
                elif time.monotonic() - signs[key][1] > LOST_SECONDS:
                    return f"no sign of life from {_named(other, sign)}: ended, killed or stopped"
            time.sleep(BEAT_SECONDS / 10)
        return None

    def diagnosis(self, count: int) -> str:
        """Returns which ranks do not answer, by their last signs of life; takes SILENT_SECONDS."""
        with suppress(RuntimeError):
            store = open_store()
            if store is not None:
                before = {rank: _last_sign(store, rank) for rank in range(count)}
                time.sleep(SILENT_SECONDS)
                after = {rank: _last_sign(store, rank) for rank in before}
                silent = [rank for rank in before if before[rank] == after[rank]]
                if silent:
                    which = ", ".join(_named(rank, after[rank]) for rank in silent)
                    return f"no sign of life from {which}: ended, killed or stopped"
                fewest = min(int(sign[1]) for sign in after.values())
                late = [rank for rank, sign in after.items() if int(sign[1]) == fewest]
                if len(late) < count:
                    which = ", ".join(_named(rank, after[rank]) for rank in late)
                    return f"{which} is stuck: it lives, and the others wait for its message number {fewest + 1}"
        return "another rank does not answer"


PULSE = Pulse()


def _last_sign(store: Store, rank: int) -> list[str]:
    key = _pulse_key(rank)
    return store.get(key).decode().split(" ", 3) if store.check([key]) else ["0", "0", "?", "?"]


def _named(rank: int, sign: list[str]) -> str:
    return f"rank {rank} (process {sign[2]} on {sign[3]})"


def _pulse_key(rank: int) -> str:
    return f"mnclglf/pulse/{_this_start()}/{rank}"


def _this_start() -> str:
    """Returns the name of this start of the run by torchrun, which keeps its store when it starts all ranks again."""
    if PULSE.started_as is not None:
        return PULSE.started_as
    return "-".join(os.environ.get(name, "0") for name in ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))


def open_store() -> Store | None:
    """Connects to the key-value store in which the ranks meet; None if there is none."""
    host, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if host is None or port is None:
        return None
    with suppress(RuntimeError):
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=SILENT_SECONDS))
    return None


def _store_answers() -> bool:
    """Returns whether the store can be reached; torch prints a stack trace for each connection that fails."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=SILENT_SECONDS).close()
    except (KeyError, ValueError, OSError):
        return False
    return True


def tell_end(code: int | None) -> bool:
    """Returns whether this rank is the first of its run that ended early, whose message is the one to print.

    Args:
        code: exit code of an end that is no accident: ranks that torchrun starts again end with it at once, see
            `earlier_end`. None where a new start goes on; so it does after SIGTERM, with which torchrun itself stops
            the ranks that it will start again because a machine has joined or left.
    """
    with suppress(RuntimeError):
        store = open_store()
        if store is not None:
            if code not in (None, 128 + signal.SIGTERM):
                store.set(_END, str(code))
            return store.add(f"{_END}/{_this_start()}", 1) == 1
    return True


def earlier_end() -> int | None:
    """Returns the exit code with which the run ended before torchrun started it again, if it was no accident."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store is new at each start
        return None
    with suppress(RuntimeError):
        store = open_store()
        if store is not None and store.check([_END]):
            return int(store.get(_END))
    return None
