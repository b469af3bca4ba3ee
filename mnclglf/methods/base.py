"""What a pre-training method is to the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnclglf.config import ModelConfig, ObjectiveConfig
from mnclglf.models.encoder import ResNet18
from mnclglf_kernels import Backend, Backends
from mnclglf_kernels.operators import OperatorName


class Losses(NamedTuple):
    """What a forward gives: the loss, its named terms, and what `after_step` and the health figures need.

    N images, F feature width, D embedding width.
    """

    total: Tensor  # scalar, with gradient
    terms: dict[str, Tensor]  # named scalars
    features: Tensor  # [N, F] of the first view, detached
    keys: Tensor | None = None  # [M, D] embeddings, detached: checked to be finite; the queue takes in the first N
    neighbors: Tensor | None = None  # [N] training image behind each nearest neighbor, -1 where random


class Method(nn.Module, ABC):
    """A pre-training method: networks, a forward to losses, and what follows the optimizer step.

    Attributes:
        views: how many views of an image `forward` takes.
        labelled: whether `forward` needs the images' labels.
        operators: of mnclglf_kernels, that its step calls.
        encoder: f_o, what is kept after pre-training.
        backends: implementation of each operator; may be set before the first step.
    """

    views: int
    labelled: bool = False
    operators: tuple[OperatorName, ...] = ()

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        *,
        queue_dtype: torch.dtype = torch.float32,
        backend: Backend = "auto",
    ) -> None:
        """Makes the encoder, and what the method's `build` adds.

        Args:
            model: encoder and heads.
            objective: settings of the loss.
            queue_dtype: storage of the queue's rows, where there is one.
            backend: implementation of the operators, see mnclglf_kernels.resolve.
        """
        super().__init__()
        self.objective = objective
        self.backends = Backends.all(backend)
        self.encoder = ResNet18(model.stem, model.width)
        self.build(model, queue_dtype)

    @abstractmethod
    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        """Makes the networks beside the encoder, and the queue; arguments as of the constructor."""

    @abstractmethod
    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Losses:
        """Losses of one batch.

        Args:
            views: [N, 3, H, W] each, row n of all of the same image.
            labels: [N] int64, of a labelled method.
        """

    def after_step(self, losses: Losses, indices: Tensor, *, momentum: float, keep: Tensor) -> None:
        """Updates momentum network and queue, where there are any, after the optimizer step.

        Args:
            losses: what `forward` gave.
            indices: [N] rows of the run's training images.
            momentum: m at this step.
            keep: bool, 0-D; where false nothing may change.
        """

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def queue_fill(self) -> float | None:
        """Share of the queue's rows that hold an embedding; None without a queue. Waits for the device."""
        return None
