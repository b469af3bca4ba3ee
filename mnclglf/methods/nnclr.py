"""NNCLR: nearest-neighbor contrastive learning (Dwibedi, Aytar, Tompson, Sermanet, Zisserman 2021).

    z1, z2 = g(f(x1)), g(f(x2))                      encoder, projector: one network
    p1, p2 = q(z1), q(z2)                            predictor
    n1, n2 = NN(Q, z1), NN(Q, z2)                    top-1 by cosine similarity, the queue as before this step
    loss = (L(n1, p2) + L(n2, p1)) / 2               L: equation 3, with p for z+; no gradient reaches n
    z1 is enqueued

    L(n, p) = mean over images i of -log exp(n_i . p_i / tau) / sum over k of exp(n_i . p_k / tau), rows of unit norm

Letters: N images, F feature width, D embedding width.
Heads are the paper's, as in every method here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.feature_queue import FeatureQueue
from mnclglf.models.heads import predictor, projector


class NNCLR(Method):
    """One network and the queue. See the module for the algorithm."""

    views = 2
    operators = ("contrastive_losses", "nearest_neighbor", "enqueue")
    batch_candidates = True

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)
        self.predictor = predictor(model.projector_width, model.predictor_width)
        self.queue = FeatureQueue(self.objective.queue_size, model.projector_width, queue_dtype)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        f = self.encoder(views, 2)  # [2N, F]; one batch, with batch statistics per view
        z = self.projector(f, 2)  # [2N, D]
        p1, p2 = self.whole_batch(*self.predictor(z, 2).chunk(2))  # [N, D]
        keys = z.detach()  # the queue takes in the first N: z1
        neighbors, sources = self.queue.nearest(keys, self.backends.nearest_neighbor)
        n1, n2 = neighbors.chunk(2)
        n1_p2, n2_p1 = self.contrastive_losses((n1, p2), (n2, p1))
        return Losses(
            total=(n1_p2 + n2_p1) / 2,
            terms={"loss_n1_p2": n1_p2, "loss_n2_p1": n2_p1},
            features=f[: len(n1)].detach(),
            keys=keys,
            neighbors=sources[: len(n1)],
        )
