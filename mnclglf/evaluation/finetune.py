"""Fine-tuning: the whole network, encoder and a linear classifier, trained on images with labels.

The usual test of a pretrained encoder with few labels (Chen et al. 2020, section 4.2 and appendix B.5): SGD with
Nesterov momentum 0.9, a learning rate of 0.05 for 256 images, no weight decay. Here it falls to 0 as a cosine.
"""

# n training images, F feature width

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnclglf.config import FinetuneConfig
from mnclglf.data.loader import Loader
from mnclglf.evaluation.features import autocast
from mnclglf.evaluation.linear import cosine, line_due, total_steps
from mnclglf.models.encoder import Encoder

SGD: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.0, "nesterov": True}


def finetune(
    encoder: Encoder,
    loader: Loader,
    labels: Tensor,
    config: FinetuneConfig,
    *,
    classes: int,
    steps_per_epoch: int,
    dtype: torch.dtype,
    seed: int,
    say: Callable[[str], object],
) -> nn.Linear:
    """Trains the encoder, in place, and a classifier on it; returns the classifier. Both are as after the last step.

    Args:
        encoder: encoder on the device; its batch norms take their statistics from each batch.
        loader: loader of batches with one augmented view per image, two images or more.
        labels: labels of the loader's images, int64 [n], on the device.
        config: settings; the learning rate falls to 0 as a cosine over all steps.
        classes: number of classes.
        steps_per_epoch: number of steps that count as an epoch; with `config.steps` the last one may be cut short.
        dtype: dtype of the encoder's autocast; float16 scales the loss. The classifier is fp32.
        seed: seed of the classifier's initial weights, which are PyTorch's default ones.
        say: receives lines of progress.

    Raises:
        ValueError: the loss is not finite.
    """
    torch.manual_seed(seed)
    classifier = nn.Linear(encoder.features, classes).to(labels.device)
    optimizer = torch.optim.SGD([*encoder.parameters(), *classifier.parameters()], config.lr, **SGD)
    scaler = torch.amp.GradScaler(labels.device.type, enabled=dtype == torch.float16)
    total, began = total_steps(config, steps_per_epoch), time.perf_counter()
    epochs = math.ceil(total / steps_per_epoch)
    encoder.train()
    for step, batch in enumerate(loader.batches(0, total)):
        with autocast(labels.device, dtype):
            features = encoder(batch.views)
        loss = F.cross_entropy(classifier(features.to(classifier.weight.dtype)), labels[batch.indices])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        optimizer.param_groups[0]["lr"] = cosine(config.lr, step / total)
        scaler.step(optimizer)
        scaler.update()
        done = step + 1
        epoch = math.ceil(done / steps_per_epoch)
        if (done % steps_per_epoch == 0 or done == total) and line_due(epoch, epochs):
            value = loss.item()  # waits for the device, only when a line is due
            if not math.isfinite(value):
                raise ValueError(f"the loss was {value} after epoch {epoch}: lr {config.lr} is too high; lower --lr")
            left = (time.perf_counter() - began) / done * (total - done)
            say(f"epoch {epoch}/{epochs}  loss {value:.3f}  {timedelta(seconds=round(left))} left")
    return classifier
