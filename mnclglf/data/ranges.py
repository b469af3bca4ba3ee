"""Files of which parts are read, here or far away: by pread, or by requests for ranges (http, https, s3).

Any number of threads may read at once. Files that are open, and parts that were fetched, are kept up to a limit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import cache, cached_property
from typing import Any, Generic, TypeVar

from mnclglf.config import is_remote, shown, shown_in
from mnclglf.data.errors import DataError, UnreachableError
from mnclglf.data.stamp import Stamp

MOST_OPEN = 128  # files; a process may usually have 1,024
FETCHED = 4 * 2**20  # bytes that are fetched at once where neighbors are wanted too
MOST_FETCHED = 256 * 2**20  # bytes that are kept of what was fetched
VERSIONS = ("ETag", "etag", "LastModified", "Last-Modified", "Content-MD5", "Digest", "mtime", "created")
"""What tells versions of a file apart, in the answers of different file systems."""
_ATTEMPTS, _PAUSE_SECONDS = 4, 0.5  # of a request; each pause is twice the one before
REMOTE = "for files behind http, https or s3 install the extra remote: pip install 'mnclglf[remote]'"

Kept = TypeVar("Kept")
logger = logging.getLogger(__name__)


def short_hash(text: str) -> str:
    """Returns 32 hex digits of the SHA-256 of a text, for the name of a file in the cache."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]


class RangeFile(ABC):
    """A file of which parts are read, as it is when its stamp is first asked for.

    Args:
        name: path or address.
    """

    most_threads = 0
    """Threads that should read at once where waiting is most of the time; 0 where it is not."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def stamp(self) -> Stamp:
        """Returns what is known of the file.

        Raises:
            DataError: it cannot be accessed.
        """
        return self._stamp_now()

    @property
    def key(self) -> str:
        """Returns what names the file in the cache, from whatever folder a command is given."""
        return short_hash(shown(self.name) if is_remote(self.name) else os.path.realpath(self.name))

    @abstractmethod
    def _stamp_now(self) -> Stamp: ...

    @abstractmethod
    def read(self, offset: int, size: int, *, near: bool = True) -> bytes:
        """Returns the bytes from an offset on, so many, or fewer at the end of the file.

        Args:
            offset: place of the first byte.
            size: number of bytes.
            near: True if the bytes around will be wanted soon.

        Raises:
            UnreachableError: the file cannot be read, or is another by now.
        """


def range_file(name: str) -> RangeFile:
    """Returns the file of a path or an address."""
    return RemoteFile(name) if is_remote(name) else LocalFile(name)


class _Kept(Generic[Kept]):
    """The last things that were made by their keys: each is made once, also where threads ask at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._made: OrderedDict[Hashable, Future[Kept]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        with self._lock:
            made = self._made.get(key)
            mine = made is None
            if made is None:
                made = self._made[key] = Future[Kept]()
                while len(self._made) > self.most:
                    self._made.popitem(last=False)  # who uses it still holds it
            else:
                self._made.move_to_end(key)
        if mine:
            try:
                made.set_result(make())
            except BaseException as error:
                with self._lock:
                    if self._made.get(key) is made:
                        del self._made[key]
                made.set_exception(error)
        return made.result()


class _Opened:
    """An open file, which is closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LocalFile(RangeFile):
    """A file here, read by pread."""

    _open: _Kept[_Opened] = _Kept(MOST_OPEN)

    def _stamp_now(self) -> Stamp:
        try:
            status = os.stat(self.name)
        except OSError as error:
            raise _unreadable(self.name, error) from error
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for a writer
            raise DataError(f"{self.name} is no file but a folder, a pipe or a device; give files")
        return Stamp.of(status)

    def read(self, offset: int, size: int, *, near: bool = True) -> bytes:
        try:
            opened = self._open.get((self.name, self.stamp), self._opened)
            data = os.pread(opened.descriptor, size, offset)
            self._check(opened)
            return data
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def _opened(self) -> _Opened:
        opened = _Opened(self.name)
        self._check(opened)
        return opened

    def _check(self, opened: _Opened) -> None:
        now = Stamp.of(os.fstat(opened.descriptor))
        if (now.size, now.modified) != (self.stamp.size, self.stamp.modified):
            raise UnreachableError(
                f"{self.name} has changed since it was first read; put the old file back, or start anew"
            )


class RemoteFile(RangeFile):
    """A file behind an address, read by requests for ranges."""

    most_threads = 16

    _fetched: _Kept[bytes] = _Kept(MOST_FETCHED // FETCHED)

    @classmethod
    def keep(cls, size: int) -> None:
        """Keeps at least so many bytes of what is fetched."""
        cls._fetched.most = max(cls._fetched.most, -(-size // FETCHED))

    @cached_property
    def _system(self) -> Any:
        return file_system(self.name)

    def _stamp_now(self) -> Stamp:
        about = self._asked(lambda: self._system.info(self.name))
        size = about.get("size")
        if not isinstance(size, int):
            raise DataError(f"{shown(self.name)}: the server does not say how large it is; copy the file here")
        version = [str(about[key]) for key in VERSIONS if key in about]
        if not version:
            _warn_once(
                f"{shown(self.name)}: the server tells no version of the file; when one is replaced by another of the "
                "same size, remove what was kept of it (shards, parquet and datasets in mnclglf's cache)"
            )
        return Stamp(size, int.from_bytes(hashlib.sha256("\0".join(version).encode()).digest()[:7]))

    def read(self, offset: int, size: int, *, near: bool = True) -> bytes:
        stop = min(offset + size, self.stamp.size)
        if not near:
            return self._fetch(offset, stop)
        first = offset // FETCHED
        parts = [self._part(number) for number in range(first, max(first, -(-stop // FETCHED)))]
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        return whole[offset - first * FETCHED : stop - first * FETCHED]

    def _part(self, number: int) -> bytes:
        start = number * FETCHED
        stop = min(start + FETCHED, self.stamp.size)
        return self._fetched.get((self.name, self.stamp, number), lambda: self._fetch(start, stop))

    def _fetch(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        data = self._asked(lambda: self._system.cat_file(self.name, start=start, end=stop))
        if len(data) != stop - start:
            raise UnreachableError(
                f"{shown(self.name)}: the server sent {len(data):,} bytes where {stop - start:,} were asked for, as "
                "one does that knows no range requests; copy the file here"
            )
        return data

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """Returns the answer of a server, which may fail for a moment."""
        for attempt in range(_ATTEMPTS):
            try:
                return ask()
            except (FileNotFoundError, PermissionError) as error:
                raise _unreadable(shown(self.name), error) from error
            except Exception as error:  # of any library that speaks with the server
                if attempt + 1 == _ATTEMPTS:
                    what = f"{type(error).__name__}: {shown_in(str(error))}" if str(error) else type(error).__name__
                    text = f"{shown(self.name)}: the server does not answer ({what}); try again"
                    raise UnreachableError(text) from error
                time.sleep(_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("unreachable")


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def file_system(address: str) -> Any:
    """Returns fsspec's file system of an address.

    Raises:
        DataError: a package is missing.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(address)[0]
    except ImportError as error:
        raise DataError(f"{shown(address)} cannot be opened ({error}); {REMOTE}") from error
    except ValueError as error:  # there is no such scheme
        what = shown_in(str(error))
        raise DataError(f"{shown(address)} cannot be opened ({what}); give http, https or s3") from error


def _unreadable(name: str, error: OSError) -> UnreachableError:
    if isinstance(error, FileNotFoundError):
        return UnreachableError(f"{name}: there is no such file; give the place of the files")
    remedy = "make it readable for this user" if isinstance(error, PermissionError) else "check the disk, or copy it"
    return UnreachableError(f"{name} cannot be read ({type(error).__name__}: {error}); {remedy}")
