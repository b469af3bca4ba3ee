"""Atomic writes, and the settings in a run directory. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from mnclglf.config import RunConfig, from_dict, to_dict

if TYPE_CHECKING:
    from _typeshed import SupportsRead

# Settings that may differ when a run is resumed, as they do not change the results.
FREE_TO_CHANGE = {"engine", "data.data_dir", "data.download", "data.loader", "data.loader_threads"}

REMEDIES: dict[int, str] = {
    errno.ENOSPC: "free space or inodes there (df, df -i), and give the same command again",
    errno.EDQUOT: "free space below your quota, and give the same command again",
    errno.EFBIG: "allow larger files (ulimit -f), and give the same command again",
    errno.EROFS: "it can only be read there: choose another place",
    errno.EACCES: "let this user read and write it (ls -l), or choose another place",
    errno.EPERM: "let this user read and write it (ls -l), or choose another place",
    errno.EIO: "the disk or the connection to it fails (dmesg): fix that, or copy the folder elsewhere",
    errno.ESTALE: "the network file system was lost: mount it again, and give the same command again",
    errno.ETIMEDOUT: "the network file system does not answer: mount it again, and give the same command again",
    errno.EBUSY: "another program uses it: end that, and give the same command again",
    errno.EMFILE: "allow more open files (ulimit -n), and give the same command again",
    errno.ENFILE: "end programs that hold many files open, and give the same command again",
    errno.ENOENT: "it was there before, or its folder was: put it back, or give another path",
    errno.ENOTDIR: "a file lies where a folder belongs: move it away, or give another path",
    errno.EISDIR: "a folder lies where a file belongs: move it away, or give another path",
    errno.EINVAL: "it is no plain file, or its file system cannot do that: give another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: give another path",
}
"""What can be done about an error of the system."""
NO_FILE = "it is no file but a pipe, a socket or a device; remove it"
PART_BYTES = 2**20  # read at once
MOST_JSON = 2**28  # bytes of a JSON file; one that a run writes has some kilobytes

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Returns the folder for files that can be made again: <XDG_CACHE_HOME or ~/.cache>/mnclglf.

    If there is no home, or nothing can be made there, as in a container under a user number that it does not know, it
    is mnclglf-<user number> in the temporary folder, and a warning says so.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "mnclglf"
    try:
        usual = Path.home() / ".cache" / "mnclglf"
    except RuntimeError:  # neither HOME nor an entry in passwd
        usual = None
    if usual is not None and (os.path.exists(usual) or os.access(nearest_folder(usual), os.W_OK | os.X_OK)):
        return usual
    folder = _temporary_cache(Path(tempfile.gettempdir()) / f"mnclglf-{os.getuid()}")
    _warn_once(f"there is no home to keep caches in: they are in {folder}; set XDG_CACHE_HOME to choose their place")
    return folder


@cache
def _temporary_cache(folder: Path) -> Path:
    """Returns the folder, or a new one beside it if others can put files there: compiled kernels are among them."""
    with suppress(OSError):
        folder.mkdir(mode=0o700)
    try:
        found = folder.lstat()
    except OSError:  # nothing can be made there: who writes will say so
        return folder
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if ours else Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))


def nearest_folder(path: Path) -> Path:
    """Returns the path, or its nearest parent that exists."""
    # Not Path.exists, which raises PermissionError below a folder that this user may not search.
    return next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))


def check_writable(folder: Path, remedy: str) -> None:
    """Raises OSError, with the remedy, unless files can be written into the folder or, if missing, where it is made."""
    nearest = nearest_folder(folder)
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: nothing can be written there; {remedy}", str(nearest)) from error


@contextmanager
def naming(path: Path | str) -> Generator[None]:
    """Names the file in an OSError that names none, as of a read, a write or an fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def with_remedy(error: Exception) -> str:
    """Returns the message of an error; one of the system, which says what is wrong, gets what can be done."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror != os.strerror(error.errno):
        return str(error)  # one of the system with another text was made here, and has its remedy
    remedy = REMEDIES.get(error.errno)
    return str(error) if remedy is None else f"{error}; {remedy}"


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces `path` by the output of `write`, whole or not at all: temporary file, fsync, rename.

    What a killed process left of an earlier write is removed.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    _clear_once(path)
    file = _temporary_file(path)
    temporary = Path(file.name)
    try:
        with naming(path):
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to show
            temporary.unlink(missing_ok=True)
        raise
    # The rename outlives a power failure once the folder is on disk too. Some file systems cannot do that (EINVAL, EIO
    # and ENOTSUP were seen, on network and FUSE mounts); the file itself is whole there all the same.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary_file(path: Path) -> BinaryIO:
    """Opens a new file beside `path`, locked for as long as it is open; see `clear_left_over`."""
    while True:
        # Containers that share a folder may have the same process number, hence the random part.
        file = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp").open("wb")
        with suppress(OSError):  # a file system without locks, where nothing is cleared either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # else it was cleared before it was locked
            return file
        file.close()


@cache
def _clear_once(path: Path) -> None:
    """Removes what killed processes left of a file; once in this process, as the folder may be large."""
    clear_left_over(path.parent, [path.name])


def clear_left_over(folder: Path, names: Sequence[str] | None = None) -> None:
    """Removes the temporary files that killed processes left in a folder, by `write_atomically`.

    Those that a living process writes stay: it holds their lock, which the system releases as it ends.

    Args:
        folder: the folder; nothing happens if there is none, or if it cannot be changed.
        names: of the files that were to be written; None for any.
    """
    of = ".+" if names is None else "|".join(map(re.escape, names))
    temporary = re.compile(rf"\.(?:{of})\.\d+(?:-[0-9a-f]{{8}})?\.tmp", re.DOTALL)
    with suppress(OSError):
        for name in os.listdir(folder):
            if temporary.fullmatch(name):
                with suppress(OSError), open_file(folder / name) as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)


def open_file(path: Path | str) -> BufferedReader:
    """Opens a file to read. Unlike `open` it waits for no writer of a pipe, and refuses what has no end.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device; the error names it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, NO_FILE, str(path))


def read_bytes(path: Path | str, most: int) -> bytes:
    """Returns the contents of a file.

    Raises:
        OSError: it cannot be read, is no file but a pipe or a device, or has more than `most` bytes.
    """
    with naming(path), open_file(path) as file:
        data = read_at_most(file, most + 1) if os.fstat(file.fileno()).st_size <= most else None
    if data is None or len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes; move it away", str(path))
    return data


def read_at_most(file: SupportsRead[bytes], size: int) -> bytes:
    """Returns `size` bytes, or fewer at the end of the file.

    It reads in parts: a read reserves memory for all the bytes asked for, and a damaged header may ask for gigabytes.
    """
    parts: list[bytes] = []
    while size > 0 and (part := file.read(min(size, PART_BYTES))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as readable JSON, whole or not at all.

    Raises:
        ValueError: a number in it is not finite.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> object:
    """Reads a JSON file; None if there is no file.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    if not path.exists():
        return None
    try:
        return json.loads(read_bytes(path, MOST_JSON).decode())
    except (ValueError, RecursionError) as error:  # malformed JSON or UTF-8, or nested too deep
        raise ValueError(f"{path} is damaged: {error}") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file that holds an object, e.g. environment.json; None if there is no file.

    Raises:
        ValueError: the file is not JSON, or holds no object; the message names it.
    """
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__} where an object belongs")
    return cast("dict[str, Any] | None", value)


def read_config(run: Path) -> RunConfig:
    """Reads the configuration of a run directory.

    Raises:
        FileNotFoundError, ValueError: there is no config.json, or it does not hold a configuration.
    """
    path = run / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; mnclglf train --out {run} makes a run there")
    try:
        return from_dict(json.loads(read_bytes(path, MOST_JSON).decode()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns (step, path) of every checkpoint in `folder`, oldest first."""
    found = ((step_of(path), path) for path in folder.glob("step-*.pt"))
    return sorted((step, path) for step, path in found if step is not None)


def step_of(checkpoint: Path) -> int | None:
    """Returns the step in the name of a checkpoint; None of a file that has no such name."""
    match = re.fullmatch(r"step-(\d+)\.pt", checkpoint.name)
    return None if match is None else int(match[1])


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """Returns the settings that differ and change the results, as `name: saved -> asked`."""

    def flatten(config: RunConfig) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in to_dict(config).items():
            if name not in FREE_TO_CHANGE:
                flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        return {name: value for name, value in flat.items() if name not in FREE_TO_CHANGE}

    before, now = flatten(saved), flatten(asked)
    return [f"{name}: {before[name]} -> {now[name]}" for name in before if before[name] != now[name]]
