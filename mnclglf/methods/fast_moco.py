"""Fast-MoCo: momentum contrast with combinatorial patches (Ci, Lin, Bai, Ouyang 2022).

    v1, v2 = combine(f_o(divide(x1))), combine(f_o(divide(x2)))    online network: the encoder on patches, with gradient
    c1, c2 = q(g_o(v1)), q(g_o(v2))                  projector and predictor on the S combinations of every image
    z1, z2 = g_m(f_m(x1)), g_m(f_m(x2))              momentum network: encoder, projector on whole views; no gradient
    loss = (L(c1, z2) + L(c2, z1)) / 2
    theta_m <- m theta_m + (1 - m) theta_o           after the optimizer step

    L(c, z) = mean over subsets s and images i of
        -log exp(c_si . z_i / tau) / sum over k of exp(c_si . z_k / tau), rows of unit norm

Letters: N images, F feature width, D embedding width, S = C(4, k) subsets.
Divide and combine are MNCLGLF's, which took them from here. Heads are the paper's, as in every method here, and m is
constant. The online encoder sees patches only, and so do the running statistics that it is evaluated with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import Network
from mnclglf.models.heads import predictor, projector
from mnclglf.models.momentum import momentum_copy
from mnclglf_kernels import combine, divide


class FastMoCo(Method):
    """Two networks. See the module for the algorithm."""

    views = 2
    operators = ("divide", "combine", "contrastive_losses")
    without_gradient = True
    divided_views = (1, 2)
    batch_candidates = True

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)
        self.predictor = predictor(model.projector_width, model.predictor_width)
        self.momentum = momentum_copy(Network(self.encoder, self.projector))

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        y = torch.cat([divide(x, backend=self.backends.divide) for x in views.chunk(2)])  # [8N, 3, H/2, W/2]
        f1, f2 = self.encoder(y, 2).chunk(2)  # [4N, F]; batch statistics are those of a view's patches
        v = torch.cat([combine(f, self.objective.k, backend=self.backends.combine) for f in (f1, f2)])
        c1, c2 = self.predictor(self.projector(v, 2), 2).chunk(2)  # [S * N, D], of v, [2 * S * N, F]
        with torch.no_grad():
            # [N, D]; what is not finite in them shows in the loss
            z1, z2 = self.whole_batch(*self.momentum(views, 2).chunk(2))
        c1_z2, c2_z1 = self.contrastive_losses((c1, z2), (c2, z1))
        return Losses(
            total=(c1_z2 + c2_z1) / 2,
            terms={"loss_c1_z2": c1_z2, "loss_c2_z1": c2_z1},
            features=f1.detach().unflatten(0, (4, -1)).mean(dim=0),  # of an image's patches
        )
