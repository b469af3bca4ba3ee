"""Images that lie together in large files, each read by its place there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mnclglf.config import shown
from mnclglf.data.errors import DataError
from mnclglf.data.images import EncodedImages
from mnclglf.data.ranges import RangeFile, RemoteFile

_AHEAD = 2  # batches that are read while one is used


class Store(ABC):
    """Contents of image files in larger files, by number."""

    @property
    def most_threads(self) -> int:
        """Returns how many threads should read at once where waiting is most of the time; 0 where it is not."""
        return 0

    @abstractmethod
    def read(self, number: int, *, near: bool) -> bytes:
        """Returns the contents of an image file.

        Args:
            number: its number.
            near: True if its neighbors will be wanted soon.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def place(self, number: int) -> str:
        """Returns where an image is, for messages."""

    def keep(self, size: int) -> None:  # noqa: B027  # for stores that keep something
        """Keeps at least so many bytes of what is read."""


@dataclass(frozen=True, kw_only=True)
class PackedImages(EncodedImages):
    """Images in a store."""

    store: Store = field(repr=False, compare=False)
    members: NDArray[np.int64]
    """Number in the store of each image [n]."""
    near: bool = True
    """Whether images are read in order, or nearly so."""

    def contents(self, row: int) -> bytes:
        return self.store.read(int(self.members[row]), near=self.near)

    def place(self, row: int) -> str:
        return self.store.place(int(self.members[row]))

    def _picked(self, rows: NDArray[np.int64]) -> Self:
        return replace(super()._picked(rows), members=self.members[rows])

    def to_shuffle(self, window: int | None) -> Self:
        if window is not None:  # one window is used while the next one is begun
            self.store.keep(round(2 * min(window, len(self)) * float(self.file_sizes.mean())))
        return replace(self, near=window is not None)

    def contents_ahead(self, plan: Iterable[NDArray[np.int64]], threads: int) -> Iterator[list[bytes]]:
        """Yields the contents of each batch of rows, in order; some batches are read ahead.

        Raises:
            DataError: an image cannot be read.
        """
        workers = max(threads, self.store.most_threads)

        def read(rows: NDArray[np.int64]) -> list[bytes]:
            return [self.contents(row) for row in rows]

        pool, ahead = ThreadPoolExecutor(workers), deque[list[Future[list[bytes]]]]()
        try:
            for rows in plan:
                ahead.append([pool.submit(read, part) for part in np.array_split(rows, workers) if len(part)])
                if len(ahead) > _AHEAD:
                    yield _together(ahead.popleft())
            while ahead:
                yield _together(ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _together(parts: Sequence[Future[list[bytes]]]) -> list[bytes]:
    return [contents for part in parts for contents in part.result()]


@dataclass(frozen=True, kw_only=True)
class ShardStore(Store):
    """Contents that lie in larger files as they are, such as the members of tar files."""

    files: tuple[RangeFile, ...]
    file_of: NDArray[np.int32]
    """Number of the file of each member [m]."""
    offsets: NDArray[np.int64]
    """Place [m] in the file, in bytes from its start."""
    sizes: NDArray[np.int64]
    """Bytes [m]."""
    names: Sequence[str]
    """Names [m] in the files."""

    @property
    def most_threads(self) -> int:
        return max((file.most_threads for file in self.files), default=0)

    def read(self, number: int, *, near: bool) -> bytes:
        size = int(self.sizes[number])
        data = self.files[self.file_of[number]].read(int(self.offsets[number]), size, near=near)
        if len(data) != size:
            raise DataError(f"{self.place(number)} cannot be read as an image (the file ends within it)")
        return data

    def place(self, number: int) -> str:
        return f"{shown(self.files[self.file_of[number]].name)}/{self.names[number]}"

    def keep(self, size: int) -> None:
        if any(isinstance(file, RemoteFile) for file in self.files):
            RemoteFile.keep(size)
