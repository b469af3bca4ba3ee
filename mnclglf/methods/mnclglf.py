"""MNCLGLF: multi-network contrastive learning based on global and local features (Li, Long, Li; Algorithm 1).

    p1, p2, p3 = f_o(x1), f_o(x2), f_o(x3)            back-propagation network: encoder, projector, predictor
    z1, z2 = f_m(x1), f_m(x2)                         momentum network: encoder, projector
    n1, n2 = NN(Q, z1), NN(Q, z2)                     top-1 by cosine similarity
    v1, v3 = combine(f_s(divide(x1))), combine(f_s(divide(x3)))
    c1, c3 = g_s(v1), g_s(v3)                         stop-gradient network: encoder, projector
    loss_s = (L(c1, p3) + L(c3, p1)) / 2
    loss_m = (L(n1, p2) + L(n2, p1)) / 2
    loss = loss_s + lambda loss_m                     equation 7
    theta_m <- m theta_m + (1 - m) theta_o            after the optimizer step
    z1 is enqueued                                    as it was before the lookup

Letters: N images, F feature width, D embedding width, S = C(4, k) subsets.
docs/reference/algorithm.md says how the points that the paper leaves open are decided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import Network, batch_statistics_only
from mnclglf.models.feature_queue import FeatureQueue
from mnclglf.models.heads import predictor, projector
from mnclglf.models.momentum import momentum_copy
from mnclglf_kernels import combine, divide


class MNCLGLF(Method):
    """The three networks and the queue. See the module for the algorithm."""

    views = 3
    operators = ("divide", "combine", "contrastive_losses", "nearest_neighbor", "enqueue")
    without_gradient = half_sums_cleared = True
    divided_views = (1, 3)
    batch_candidates = True

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)
        self.predictor = predictor(model.projector_width, model.predictor_width)
        self.momentum = momentum_copy(Network(self.encoder, self.projector))
        self.queue = FeatureQueue(self.objective.queue_size, model.projector_width, queue_dtype)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        x1, _, x3 = views.chunk(3)
        # The online forward comes first: autocast caches a weight's cast at its first use, which must carry gradients.
        f = self.encoder(views, 3)  # [3N, F]; one batch, with batch statistics per view
        p1, p2, p3 = self.whole_batch(*self.predictor(self.projector(f, 3), 3).chunk(3))  # [N, D]

        with torch.no_grad():
            keys = self.momentum(views[: 2 * len(x1)], 2)  # [2N, D]: z1, which the queue takes in, and z2
            neighbors, sources = self.queue.nearest(keys, self.backends.nearest_neighbor)
            n1, n2 = neighbors.chunk(2)
            c1, c3 = self.stop_gradient_network(x1, x3)  # [S * N, D]

        c1_p3, c3_p1, n1_p2, n2_p1 = self.contrastive_losses((c1, p3), (c3, p1), (n1, p2), (n2, p1))
        loss_s = (c1_p3 + c3_p1) / 2
        loss_m = (n1_p2 + n2_p1) / 2
        return Losses(
            total=loss_s + self.objective.lambda_ * loss_m,
            terms={"loss_s": loss_s, "loss_m": loss_m},
            features=f[: len(x1)].detach(),
            keys=keys,
            neighbors=sources[: len(x1)],
        )

    def stop_gradient_network(self, x1: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
        """Returns c1, c3: online weights (equations 5, 6) on combined patches; no online running statistic changes."""
        with batch_statistics_only(self.encoder, self.projector):
            y = torch.cat([divide(x, backend=self.backends.divide) for x in (x1, x3)])  # [8N, C, H/2, W/2]
            f1, f3 = self.encoder(y, 2).chunk(2)  # [4N, F]
            v = torch.cat([combine(f, self.objective.k, backend=self.backends.combine) for f in (f1, f3)])
            c1, c3 = self.projector(v, 2).chunk(2)  # of v, [2 * S * N, F]
        if self.objective.one_embedding:  # Table 5: one of the S combinations, drawn once per step
            subsets = len(c1) // len(x1)
            drawn = torch.randint(subsets, (1,), device=c1.device)
            c1, c3 = (c.unflatten(0, (subsets, -1)).index_select(0, drawn).flatten(0, 1) for c in (c1, c3))
        return c1, c3
