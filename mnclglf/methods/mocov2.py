"""MoCo v2: momentum contrast (He et al. 2020), with a projector and stronger views (Chen, Fan, Girshick, He 2020).

    q = g_o(f_o(x1))                                 online network: encoder, projector
    k = g_m(f_m(x2))                                 momentum network: encoder, projector; no gradient
    loss = mean over images of -log exp(q . k / tau) / (exp(q . k / tau) + sum over i of exp(q . k_i / tau))
        MoCo's equation 1: unit-norm rows, and as negatives k_i the K rows of the queue as they stood before this step
    theta_m <- m theta_m + (1 - m) theta_o           MoCo's equation 2
    k is enqueued

Letters: N images, F feature width, D embedding width, K queue rows.
MoCo moves the momentum network before a forward, we after the optimizer step: the same weights meet each batch, since
both networks start alike. The projector is the paper's, as in every method here. MoCo's shuffled batch norm swaps
images among GPUs, and has nothing to swap on one: q and k are normalized by the statistics of their own view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import Network
from mnclglf.models.feature_queue import FeatureQueue
from mnclglf.models.heads import projector
from mnclglf.models.momentum import momentum_copy
from mnclglf_kernels import queue_contrastive_loss


class MoCoV2(Method):
    """Two networks and the queue. See the module for the algorithm."""

    views = 2
    operators = ("queue_contrastive_loss", "enqueue")
    without_gradient = half_sums_cleared = True

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)
        self.momentum = momentum_copy(Network(self.encoder, self.projector))
        self.queue = FeatureQueue(self.objective.queue_size, model.projector_width, queue_dtype)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        x1, x2 = views.chunk(2)
        f1 = self.encoder(x1)  # [N, F]
        q = self.projector(f1)  # [N, D]
        with torch.no_grad():
            k = self.momentum(x2)  # [N, D]
        loss = queue_contrastive_loss(
            q, k, self.queue.rows, self.objective.temperature, backend=self.backends.queue_contrastive_loss
        )
        return Losses(total=loss, terms={"info_nce": loss}, features=f1.detach(), keys=k)
