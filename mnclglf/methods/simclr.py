"""SimCLR: a simple framework for contrastive learning (Chen, Kornblith, Norouzi, Hinton 2020; Algorithm 1).

    z1, z2 = g(f(x1)), g(f(x2))                                      encoder, projector; both with gradient
    l(i, j) = -log exp(s_ij / tau) / sum over k != i of exp(s_ik / tau)     equation 1, NT-Xent
        over the 2N rows of z1 and z2, where s is the cosine similarity
    loss = mean over the 2N rows i of l(i, j), where row j is of the same image in the other view

Letters: N images, F feature width, D embedding width.
The projector is the paper's, as in every method here. Batch statistics are per view, as in MNCLGLF.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.heads import projector


class SimCLR(Method):
    """One network. See the module for the algorithm."""

    views = 2
    operators = ("nt_xent",)

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        f = self.encoder(views, 2)  # [2N, F]
        z1, z2 = self.whole_batch(*self.projector(f, 2).chunk(2))  # [N, D]
        loss = self.nt_xent(z1, z2)
        return Losses(total=loss, terms={"nt_xent": loss}, features=f[: len(f) // 2].detach())
