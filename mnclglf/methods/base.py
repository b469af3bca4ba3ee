"""The contract between a pre-training method and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mnclglf.config import ModelConfig, ObjectiveConfig
from mnclglf.models.batch_norm import Network, batch_norms
from mnclglf.models.encoder import Encoder, make_encoder
from mnclglf.models.feature_queue import FeatureQueue
from mnclglf.models.fused import set_half
from mnclglf.models.momentum import update_momentum
from mnclglf_kernels import Backend, Backends, contrastive_losses, nt_xent
from mnclglf_kernels.operators import OperatorName
from mnclglf_kernels.ranks import gather_rows, gather_together


class Losses(NamedTuple):
    """Result of a forward: the loss, its named terms, and the tensors that `after_step` and the health figures need.

    N images, F feature width, D embedding width.
    """

    total: Tensor  # scalar, with gradient
    terms: dict[str, Tensor]  # named scalars
    features: Tensor  # [N, F] of the first view, detached
    keys: Tensor | None = None  # [M, D] embeddings, detached: checked to be finite; the queue takes in the first N
    neighbors: Tensor | None = None  # [N] training image behind each nearest neighbor, -1 where random


class Method(nn.Module, ABC):
    """A pre-training method: networks, a forward to losses, and an update after the optimizer step.

    Attributes:
        views: number of views per image that `forward` takes.
        needs_labels: whether `forward` needs the images' labels.
        operators: names of the operators of mnclglf_kernels that a step calls.
        without_gradient: whether a step has forwards of an encoder without gradient.
        half_sums_cleared: whether these lost no accuracy with sums in fp16 in the study of docs/lab/half-precision.md;
            only then does a start on a GPU take such sums by itself.
        divided_views: numbers, from 1, of the views that `forward` cuts into patches; for the report's picture.
        batch_candidates: whether each term of the loss picks one of N candidates, the images of the batch: it is ln N
            while all look alike, which the report draws as a dashed line.
        encoder: f_o, the online encoder, which is evaluated and exported after pre-training.
        projector: g_o, where `build` makes one.
        momentum: f_m and g_m, the momentum network (BYOL's target network), where `build` makes one.
        queue: Q, the feature queue, where `build` makes one.
        rank: number of this process among those of the run; see `distribute`.
        ranks: number of processes.
    """

    views: int
    needs_labels: bool = False
    operators: tuple[OperatorName, ...] = ()
    without_gradient: bool = False
    half_sums_cleared: bool = False
    divided_views: tuple[int, ...] = ()
    batch_candidates: bool = False
    projector: nn.Module
    momentum: nn.Module
    queue: FeatureQueue
    rank: int = 0
    ranks: int = 1

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        *,
        queue_dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
    ) -> None:
        """Makes the encoder, then the networks of the method's `build`.

        Args:
            model: encoder and heads.
            objective: settings of the loss.
            queue_dtype: storage of the queue's rows, where there is a queue.
            backend: backend of all operators, see mnclglf_kernels.resolve.
        """
        super().__init__()
        self.objective = objective
        self.encoder = make_encoder(model)
        self.build(model, queue_dtype)
        self.backends = Backends.all(backend)

    @abstractmethod
    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        """Makes the networks beside the encoder, and the queue; arguments as of the constructor."""

    @abstractmethod
    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        """Returns the losses of one batch.

        Args:
            views: [V * N, 3, H, W], one view after the other; row n of each is of the same image.
            labels: [N] int64, of a method that needs them.
        """

    def after_step(self, losses: Losses, indices: Tensor, *, momentum: float | Tensor, should_update: Tensor) -> None:
        """Updates momentum network and queue, where there are any, after the optimizer step.

        The momentum network follows encoder and projector; the queue takes in the first N of `losses.keys`. A method
        with other networks overrides this.

        Args:
            losses: result of `forward`.
            indices: [N] rows of the run's training images.
            momentum: m at this step; in a training step fp64, 0-D, on the device, so that a step can be recorded.
            should_update: bool, 0-D; where false nothing may change.
        """
        # hasattr, as `build` assigns modules: a class attribute of None would hide them from nn.Module.
        if hasattr(self, "momentum"):
            update_momentum(self.momentum, Network(self.encoder, self.projector), momentum, should_update)
        if hasattr(self, "queue"):
            assert losses.keys is not None, "a method with a queue gives the keys that it takes in"
            keys = losses.keys[: len(indices)]
            if self.ranks > 1:  # every rank's queue takes in the whole batch
                keys, indices = gather_together(keys, indices)
            self.queue.push(keys, indices, should_update, self.backends.enqueue)

    def whole_batch(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Returns tensors [n, D] of this rank's n images with the rows of all ranks, [N, D] each, by one message.

        The gradient of a rank's rows is the sum of what the losses of all ranks give them. One process has all rows.
        """
        if self.ranks == 1:
            return parts
        return gather_rows(torch.stack(parts, dim=1)).unbind(dim=1)

    def contrastive_losses(self, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Returns L of Algorithm 1 of each pair (h, p), in as few launches as their shapes allow.

        Args:
            pairs: h of this rank's images, [S * n, D], and p of the whole batch, [N, D].
        """
        backend = self.backends.contrastive_losses
        return contrastive_losses(pairs, self.objective.temperature, rank=self.rank, ranks=self.ranks, backend=backend)

    def nt_xent(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns SimCLR's loss of this rank's images; both views are of the whole batch, [N, D]."""
        temperature, backend = self.objective.temperature, self.backends.nt_xent
        return nt_xent(first, second, temperature, rank=self.rank, ranks=self.ranks, backend=backend)

    def distribute(self, rank: int, ranks: int, *, sync_batch_norm: bool = True) -> None:
        """Makes this process train on part `rank` of `ranks` of every batch; each rank does so with equal weights.

        A rank's losses are means over its own images, and the gradients of the weights are to be averaged over ranks.

        Args:
            rank: number of this process.
            ranks: number of processes.
            sync_batch_norm: whether batch norms take the statistics of the whole batch, not of this part.
        """
        self.rank, self.ranks = rank, ranks
        for layer in batch_norms(self):
            layer.ranks = ranks if sync_batch_norm else 1  # pyright: ignore[reportArgumentType]  # a BatchNorm

    @property
    def backends(self) -> Backends:
        """Returns the backend of each operator; may be set before the first step."""
        return self._backends

    @backends.setter
    def backends(self, backends: Backends) -> None:
        self._backends = backends
        for layer in batch_norms(self):
            layer.backend = backends.batch_norm  # pyright: ignore[reportAttributeAccessIssue]  # a BatchNorm

    def encoders(self) -> list[Encoder]:
        """Returns the online encoder, and the momentum network's where there is one."""
        return [module for module in self.modules() if isinstance(module, Encoder)]

    def fuse(self, convolution: Backend, *, half_sums: bool = False) -> None:
        """Chooses the convolutions of training forwards without gradient: models/fused.py has what they fuse.

        Args:
            convolution: "triton" or "cudnn" for those of the operator `convolution`; "torch" for PyTorch's own, which
                are not fused.
            half_sums: whether they compute in fp16, and sum in fp16 where cuDNN can.
        """
        for encoder in self.encoders():
            encoder.convolution = convolution
            set_half(encoder, half_sums)
        for layer in batch_norms(self):
            layer.after_half = half_sums  # pyright: ignore[reportArgumentType]  # a BatchNorm

    @classmethod
    def facts(cls) -> dict[str, Any]:
        """Returns what the words and panels of a report follow from, as plain JSON types."""
        return {
            "needs_labels": cls.needs_labels,
            "divided_views": list(cls.divided_views),
            "batch_candidates": cls.batch_candidates,
        }

    def trained_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the optimizer updates."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def queue_fill(self) -> float | None:
        """Returns the fraction of the queue's rows that hold an embedding; None without a queue. Syncs the host."""
        return self.queue.fill().item() if hasattr(self, "queue") else None
