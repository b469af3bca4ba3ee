"""SimSiam: simple Siamese representation learning (Chen and He 2021; Algorithm 1).

    z1, z2 = g(f(x1)), g(f(x2))                      encoder, projector: one network
    p1, p2 = q(z1), q(z2)                            predictor
    D(p, z) = mean over images of -cos(p, z)         equation 1; no gradient reaches z (equation 3)
    loss = (D(p1, z2) + D(p2, z1)) / 2               equation 4

Letters: N images, F feature width, D embedding width.
Heads are the paper's, as in every method here. The stop-gradient is all that keeps the network from giving every image
the same embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.heads import predictor, projector
from mnclglf.models.losses import negative_cosine


class SimSiam(Method):
    """One network. See the module for the algorithm."""

    views = 2

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)
        self.predictor = predictor(model.projector_width, model.predictor_width)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        f = self.encoder(views, 2)  # [2N, F]; one batch, with batch statistics per view
        z = self.projector(f, 2)  # [2N, D]
        p1, p2 = self.predictor(z, 2).chunk(2)  # [N, D]
        z1, z2 = z.detach().chunk(2)
        p1_z2, p2_z1 = negative_cosine(p1, z2), negative_cosine(p2, z1)
        return Losses(
            total=(p1_z2 + p2_z1) / 2,
            terms={"loss_p1_z2": p1_z2, "loss_p2_z1": p2_z1},
            features=f[: len(p1)].detach(),
        )
