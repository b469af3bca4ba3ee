"""Locks between processes, by flock: the system releases a lock when its process ends, even if it is killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import stat
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mnclglf.runs.files import open_file

LOCK_TRIES = 5  # attempts, a tenth of a second apart
# What flock says on a file system without locks, and NFS of a lock on a folder. EWOULDBLOCK is not among them.
CANNOT_LOCK = {errno.EBADF, errno.EINVAL, errno.EIO, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

NO_LOCK = "it is no file but a link, a pipe or a device; remove it"

logger = logging.getLogger(__name__)

_HELD: set[int] = set()  # descriptors of lock files that this process holds


def _let_go() -> None:
    """Gives up the locks in a process that was forked, such as a worker of a loader: it would hold them with us.

    The descriptors stay open, for the file objects that close them.
    """
    for descriptor in _HELD:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, descriptor)
        os.close(nothing)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


class TakenError(RuntimeError):
    """Another process trains in the run directory; the message names it and the remedy."""


@contextmanager
def held(lock: Path, *, wait: bool = False) -> Generator[bool, None, None]:
    """Holds a lock file. Where the file system has no locks, a warning says so and the result is True.

    Args:
        lock: the file; made if missing, and never deleted, as that would be a race.
        wait: wait for the holder of the lock; else the result is False if somebody holds it.

    Raises:
        OSError: the file cannot be opened, or is a link, a pipe or a device: it would be written to.
    """
    with _open_lock(lock) as file:
        mine = _lock(file.fileno(), lock, wait=wait)
        if mine:  # for the message of a process that finds it held
            with suppress(OSError):  # of a full disk
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
            _HELD.add(file.fileno())
        try:
            yield mine
        finally:
            _HELD.discard(file.fileno())


def _open_lock(lock: Path) -> BinaryIO:
    """Opens a lock file, which may have come with a folder of others."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, NO_LOCK, str(lock)) from error
        raise
    file = os.fdopen(descriptor, "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, NO_LOCK, str(lock))
    return file


@contextmanager
def one_at_a_time(lock: Path, say: Callable[[], object]) -> Generator[None, None, None]:
    """Holds a lock file; calls `say` before it waits for another process that holds it."""
    with held(lock) as mine:
        if mine:
            yield
            return
    say()
    with held(lock, wait=True):
        yield


@contextmanager
def training_in(run: Path) -> Generator[None, None, None]:
    """Holds the lock for training in a run directory, which is made if missing.

    Raises:
        TakenError: another process holds it.
    """
    lock = run / "checkpoints" / ".training.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with held(lock) as mine:
        if not mine:
            holder = lock.read_text(errors="replace")[:200] or "another process"
            raise TakenError(f"{run} is being trained by {holder}; wait for it or stop it, or choose another --out")
        yield


def is_training(run: Path) -> bool:
    """Returns whether another process trains in a run directory; changes nothing there."""
    try:
        with open_file(run / "checkpoints" / ".training.lock") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or none that can be asked
        return False
    return False


@contextmanager
def writing_in(folder: Path) -> Generator[None, None, None]:
    """Holds the lock for reading, changing and writing a folder's evaluation.json or report.html; waits for its holder.

    It is a lock on the folder itself, so that it leaves no file behind. It does not wait for a training.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no directory; give the run directory that mnclglf train --out made")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder, wait=True)
        yield
    finally:
        os.close(descriptor)


def is_abandoned(folder: Path) -> bool:
    """Returns whether nobody holds the lock of `writing_in` on a folder; False where the file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # of another user, or gone meanwhile
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    """Returns whether the lock was acquired. It tries several times, as a process that only asks holds it briefly."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            logger.warning("%s cannot be locked on its file system (%s): let only one process use it", path, error)
            return True
        else:
            return True
    return False
