"""Supervised training, the baseline of the paper's Table 3.

    logits = W f(x) + b                               encoder, linear classifier; one view
    loss = mean over images i of -log exp(logits_i,y) / sum over c of exp(logits_i,c), y the label of image i

Letters: N images, F feature width, C classes.
There is no projector: the classifier reads the features that are evaluated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnclglf.config import ModelConfig
from mnclglf.methods.base import Losses, Method


class Supervised(Method):
    """One network. See the module for the loss.

    Raises:
        ValueError: `model.classes` is None.
    """

    views = 1
    needs_labels = True

    def build(self, model: ModelConfig, queue_dtype: torch.dtype) -> None:
        if model.classes is None:
            raise ValueError("classes None: a classifier needs their number, as in ModelConfig(classes=10)")
        self.classifier = nn.Linear(self.encoder.features, model.classes)

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Losses:
        assert labels is not None
        f = self.encoder(views)  # [N, F]
        loss = F.cross_entropy(self.classifier(f), labels)  # in fp32 also under autocast
        return Losses(total=loss, terms={"cross_entropy": loss}, features=f.detach())
