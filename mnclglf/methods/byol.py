"""BYOL: bootstrap your own latent (Grill et al. 2020).

    p1, p2 = q(g_o(f_o(x1))), q(g_o(f_o(x2)))        online network: encoder, projector, predictor
    z1, z2 = g_m(f_m(x1)), g_m(f_m(x2))              momentum (target) network: encoder, projector; no gradient
    D(p, z) = mean over images of -cos(p, z)         their equation 2 is |p / |p| - z / |z||^2 = 2 + 2 D
    loss = (D(p1, z2) + D(p2, z1)) / 2
    theta_m <- m theta_m + (1 - m) theta_o           equation 1, after the optimizer step

Letters: N images, F feature width, D embedding width.
Their loss, the sum of both directions of equation 2, is 4 + 4 loss: its gradient is four times ours. Heads are the
paper's, as in every method here; m rises to 1 as theirs does with ema_schedule "cosine", and is else constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import Network
from mnclglf.models.heads import predictor, projector
from mnclglf.models.losses import negative_cosine
from mnclglf.models.momentum import momentum_copy


class BYOL(Method):
    """Two networks. See the module for the algorithm."""

    views = 2
    without_gradient = True

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)
        self.predictor = predictor(model.projector_width, model.predictor_width)
        self.momentum = momentum_copy(Network(self.encoder, self.projector))

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        f = self.encoder(views, 2)  # [2N, F]; one batch, with batch statistics per view
        p1, p2 = self.predictor(self.projector(f, 2), 2).chunk(2)  # [N, D]
        with torch.no_grad():
            z1, z2 = self.momentum(views, 2).chunk(2)  # [N, D]; what is not finite in them shows in the loss
        p1_z2, p2_z1 = negative_cosine(p1, z2), negative_cosine(p2, z1)
        return Losses(
            total=(p1_z2 + p2_z1) / 2,
            terms={"loss_p1_z2": p1_z2, "loss_p2_z1": p2_z1},
            features=f[: len(p1)].detach(),
        )
