"""The losses and the queue as nn.Modules, which take the place of lightly's in a training loop.

    criterion = NTXentLoss(temperature=0.5)                             # SimCLR
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))  # MoCo
    neighbors = NearestNeighborQueue(size=(4096, 128))                  # NNCLR

Shapes: N images, D embedding width, K queue rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnclglf_kernels.backend import Backend
from mnclglf_kernels.checks import check_temperature
from mnclglf_kernels.ops.contrastive_losses import contrastive_loss
from mnclglf_kernels.ops.enqueue import enqueue
from mnclglf_kernels.ops.nearest_neighbor import nearest_neighbor
from mnclglf_kernels.ops.nt_xent import nt_xent
from mnclglf_kernels.ops.queue_contrastive_loss import queue_contrastive_loss

__all__ = ["ContrastiveLoss", "NTXentLoss", "NearestNeighborQueue", "QueueContrastiveLoss"]


class ContrastiveLoss(nn.Module):
    """L(h, p) of MNCLGLF's Algorithm 1; see `contrastive_loss`.

    Args:
        temperature: tau > 0. The paper's is 1.
        backend: see `resolve`.

    Raises:
        ValueError: the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0, *, backend: Backend = "auto") -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.backend: Backend = backend

    def forward(self, targets: Tensor, predictions: Tensor) -> Tensor:
        """Returns the scalar loss of targets [S * N, D] and predictions [N, D]."""
        return contrastive_loss(targets, predictions, self.temperature, backend=self.backend)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class _Queue(nn.Module):
    """Ring buffer of K unit-norm rows of width D, random at the start; `rows` and `pointer` are in the state dict."""

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: Sequence[int], dtype: torch.dtype, backend: Backend) -> None:
        super().__init__()
        rows, width = checked_size(size)
        self.register_buffer("rows", F.normalize(torch.randn(rows, width)).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # on the device: no step waits for it
        self.backend: Backend = backend

    def extra_repr(self) -> str:
        return f"size={tuple(self.rows.shape)}"


class QueueContrastiveLoss(_Queue):
    """MoCo's loss with its queue of negatives; see `queue_contrastive_loss`.

    Each forward whose queries require a gradient puts its keys into the queue, after the loss. In evaluation nothing
    does, so the queue stays.

    Args:
        size: (K, D), rows of the queue and embedding width. A batch may have K rows at most.
        temperature: tau > 0. MoCo's is 0.07, MoCo v2's 0.2.
        dtype: dtype of the queue's rows.
        backend: see `resolve`.

    Raises:
        ValueError: the size is no pair of positive numbers, or the temperature is not positive.
    """

    def __init__(
        self,
        size: Sequence[int],
        temperature: float = 0.07,
        *,
        dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(size, dtype, backend)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns the scalar loss of queries [N, D] and keys [N, D], the positive of each query."""
        if not queries.requires_grad:
            return queue_contrastive_loss(queries, keys, self.rows, self.temperature, backend=self.backend)
        # A copy: the backward of the Triton kernel reads the negatives again, after the enqueueing has replaced some.
        negatives = self.rows.clone()
        loss = queue_contrastive_loss(queries, keys, negatives, self.temperature, backend=self.backend)
        enqueue(self.rows, self.pointer, keys.detach(), backend=self.backend)
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature}"


class NTXentLoss(nn.Module):
    """The loss of SimCLR (see `nt_xent`) or, with a memory bank, that of MoCo (see `QueueContrastiveLoss`).

    The arguments are those of lightly's NTXentLoss, and so are the values, up to rounding. One thing differs with a
    memory bank: K need not be a multiple of the batch. Here rows that reach the queue's end go on at its beginning,
    while lightly drops them.

    Args:
        temperature: tau > 0.
        memory_bank_size: (K, D), rows of the bank and embedding width; 0 for no bank.
        gather_distributed: only False: the negatives are those of this process.
        backend: see `resolve`.

    Raises:
        ValueError: the temperature is not positive, the size is no pair of positive numbers, or gather_distributed.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if gather_distributed:
            raise ValueError(
                "gather_distributed=True is not available: negatives are those of one process; leave it out, or gather "
                "the embeddings before this loss"
            )
        check_temperature(temperature)
        self.temperature = temperature
        self.backend: Backend = backend
        without = memory_bank_size == 0 or (not isinstance(memory_bank_size, int) and tuple(memory_bank_size) == (0,))
        self.memory_bank = (
            None if without else QueueContrastiveLoss(checked_size(memory_bank_size), temperature, backend=backend)
        )

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Returns the scalar loss of two views [N, D]; with a memory bank out0 are the queries, out1 the keys."""
        if self.memory_bank is not None:
            return self.memory_bank(out0, out1)
        return nt_xent(out0, out1, self.temperature, backend=self.backend)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class NearestNeighborQueue(_Queue):
    """The queue of NNCLR and MNCLGLF: replaces each embedding by its nearest neighbor among the last K.

    It takes the place of lightly's NNMemoryBankModule. Its rows have unit norm, where lightly's keep the norm that they
    came with; a loss that normalizes, as all of these do, is the same. Rows that reach the queue's end go on at its
    beginning, where lightly drops them.

    Args:
        size: (K, D), rows of the queue and embedding width. A batch may have K rows at most.
        dtype: dtype of the queue's rows.
        backend: see `resolve`; "faiss" is exact search by FAISS.

    Raises:
        ValueError: the size is no pair of positive numbers.
    """

    def __init__(self, size: Sequence[int], *, dtype: torch.dtype = torch.float32, backend: Backend = "auto") -> None:
        super().__init__(size, dtype, backend)

    @torch.no_grad()
    def forward(self, output: Tensor, update: bool = False) -> Tensor:
        """Returns the nearest row to each of [N, D] embeddings, [N, D] without gradient.

        Args:
            output: [N, D].
            update: puts `output` into the queue, after the lookup.
        """
        nearest = self.rows[nearest_neighbor(output, self.rows, backend=self.backend)]
        if update:
            enqueue(self.rows, self.pointer, output, backend="auto" if self.backend == "faiss" else self.backend)
        return nearest


def checked_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (K, D); raises ValueError unless the size is a pair of positive numbers."""
    pair = (size,) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"size {size} must be (rows, width), both at least 1, as (4096, 128)")
    return pair
