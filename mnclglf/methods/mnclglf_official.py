"""MNCLGLF as its authors' released code trains it, where that departs from Algorithm 1 of their paper.

    p1, p2, p3 = q(g_o(f_o(x1))), ...                encoder, projector, predictor; p2 has no gradient
    c1, c2 = g_o(combine(f_o(divide(x1)))), ...      no gradient; running statistics move here too
    z1, z3 = g_m(f_m(x1)), g_m(f_m(x3))              momentum network, from random weights of its own
    n1, n3 = NN(Q, z1), NN(Q, z3)                    top-1 by cosine similarity, the queue as before this step
    loss_s = (L(p2, c1) + L(p1, c2)) / 2             no gradient: p is detached; mean over the S splits of c
    loss_m = (NT-Xent(n3, p1) + NT-Xent(n1, p3)) / 2     SimCLR's equation 1 over 2N - 1 candidates; n has no gradient
    loss = loss_s + lambda loss_m
    theta_m <- m theta_m + (1 - m) theta_o           after the optimizer step
    z3 is enqueued

    L(p, c) = mean over images i of -log exp(p_i . c_i / tau) / sum over k of exp(p_i . c_k / tau), rows of unit norm

Letters: N images, F feature width, D embedding width, S = C(4, k) subsets.
The batch norms of the heads start with weights uniform in (0, 1), the last one of each residual block with 0.

Settings: the code trains on 224 x 224 views by the ImageNet stem and clips the gradient's norm at 1 (--image-size 224
--stem imagenet --clip-norm 1). Left out: the first moving average, which it makes before the first step; the biases of
the projector, which its batch norms subtract; the temperature of loss_m, 1 there whatever that of loss_s is; a queue
that is not a multiple of the batch, where it drops the rows that do not fit; the best test accuracy over all epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method
from mnclglf.models.batch_norm import Network, Views, batch_norms
from mnclglf.models.encoder import make_encoder
from mnclglf.models.feature_queue import FeatureQueue
from mnclglf.models.heads import predictor, projector
from mnclglf_kernels import combine, divide


class MNCLGLFOfficial(Method):
    """Two networks and the queue. See the module for the algorithm."""

    views = 3
    operators = ("divide", "combine", "contrastive_losses", "nt_xent", "nearest_neighbor", "enqueue")
    without_gradient = half_sums_cleared = True
    divided_views = (1, 2)

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        self.projector = projector(self.encoder.features, model.projector_width)
        self.predictor = predictor(model.projector_width, model.predictor_width)
        self.momentum = Network(make_encoder(model), projector(self.encoder.features, model.projector_width))
        self.momentum.requires_grad_(False)
        self.queue = FeatureQueue(self.objective.queue_size, model.projector_width, queue_dtype)
        for head in (self.projector, self.predictor, self.momentum[1]):
            for layer in batch_norms(head):
                nn.init.uniform_(layer.weight)
        for encoder in self.encoders():
            encoder.start_blocks_as_identity()

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        x1, x2, x3 = views.chunk(3)
        x13 = torch.cat([x1, x3])  # one batch, with batch statistics per view; x2 needs no gradient, so another one
        # Running statistics take in x1, x2, x3. Autocast caches a weight's cast at its first use, which must carry
        # gradients.
        of_13, of_2 = Views(after=(2, 0), decays=3), Views(after=(1,), decays=0)
        f = self.encoder(x13, of_13)  # [2N, F]
        p1, p3 = self.predictor(self.projector(f, of_13), of_13).chunk(2)  # [N, D]

        with torch.no_grad():
            p2 = self.predictor(self.projector(self.encoder(x2, of_2), of_2), of_2)
            loss_s = self.local_loss(x1, x2, p1.detach(), p2)
            z1, z3 = self.momentum(x13, 2).chunk(2)  # [N, D]
            keys = torch.cat([z3, z1])  # the queue takes in the first N: z3
            neighbors, sources = self.queue.nearest(keys, self.backends.nearest_neighbor)
            n3, n1 = neighbors.chunk(2)

        n3, p1, n1, p3 = self.whole_batch(n3, p1, n1, p3)
        loss_m = (self.nt_xent(n3, p1) + self.nt_xent(n1, p3)) / 2
        return Losses(
            total=loss_s + self.objective.lambda_ * loss_m,
            terms={"loss_s": loss_s, "loss_m": loss_m},
            features=f[: len(x1)].detach(),
            keys=keys,
            neighbors=sources[: len(z3)],
        )

    def local_loss(self, x1: Tensor, x2: Tensor, p1: Tensor, p2: Tensor) -> Tensor:
        """Returns loss_s: each view's predictions against every combination of the other view's patches."""
        y = torch.cat([divide(x, backend=self.backends.divide) for x in (x1, x2)])  # [8N, 3, H/2, W/2]
        f1, f2 = self.encoder(y, 2).chunk(2)  # [4N, F]
        v = torch.cat([combine(f, self.objective.k, backend=self.backends.combine) for f in (f1, f2)])
        c1, c2 = self.projector(v, 2).chunk(2)  # [S * N, D], of v, [2 * S * N, F]
        splits = self.whole_batch(*c1.split(len(p2)), *c2.split(len(p1)))  # [N, D], S of c1, then S of c2
        pairs = [*zip([p2] * (len(splits) // 2) + [p1] * (len(splits) // 2), splits, strict=True)]
        return torch.stack(self.contrastive_losses(*pairs)).mean()
