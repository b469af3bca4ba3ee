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

from collections.abc import Sequence

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

    def forward(self, views: Sequence[Tensor], labels: Tensor | None = None) -> Losses:
        f1, f2 = (self.encoder(x) for x in views)  # [N, F]; batch statistics are per view
        z1, z2 = self.projector(f1), self.projector(f2)  # [N, D]
        p1, p2 = self.predictor(z1), self.predictor(z2)  # [N, D]
        p1_z2, p2_z1 = negative_cosine(p1, z2.detach()), negative_cosine(p2, z1.detach())
        return Losses(
            total=(p1_z2 + p2_z1) / 2,
            terms={"loss_p1_z2": p1_z2, "loss_p2_z1": p2_z1},
            features=f1.detach(),
        )
