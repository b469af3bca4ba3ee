"""The feature queue Q: the last K momentum embeddings, and the image that each came from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnclglf_kernels import Backend, enqueue, nearest_neighbor


class FeatureQueue(nn.Module):
    """Ring buffer of K unit-norm rows of width D, random at the start.

    Attributes:
        rows: [K, D].
        sources: [K] int64, index of the training image that each row came from; -1 while the row is random.
        pointer: int64, 0-D, index of the oldest row; on the device, so that a step never syncs the host.
    """

    rows: Tensor
    sources: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, width)).to(dtype))
        self.register_buffer("sources", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def nearest(self, queries: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
        """Returns the nearest row to each of [M, D] queries, [M, D], and the image it came from, [M]."""
        where = nearest_neighbor(queries, self.rows, backend=backend)
        return self.rows[where], self.sources[where]

    @torch.no_grad()
    def push(self, rows: Tensor, sources: Tensor, should_update: Tensor, backend: Backend = "auto") -> None:
        """Overwrites the oldest rows with [N, D] `rows` of images [N] `sources`, unless `should_update` is false."""
        # The sources come first: enqueue moves the pointer.
        where = (self.pointer + torch.arange(len(sources), device=sources.device)) % len(self.sources)
        self.sources[where] = torch.where(should_update, sources, self.sources[where])
        enqueue(self.rows, self.pointer, rows, should_update=should_update, backend=backend)

    def fill(self) -> Tensor:
        """Returns the fraction of the rows that hold an embedding, 0-D."""
        return (self.sources >= 0).float().mean()
