"""The paper's linear evaluation (section 4.1): one linear layer, trained by LARS on a frozen encoder's features."""

# n training images, F feature width

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnclglf.config import FinetuneConfig, LinearConfig
from mnclglf.data.loader import Loader
from mnclglf.evaluation.features import autocast, eval_mode
from mnclglf.models.encoder import Encoder
from mnclglf.training.lars import LARS
from mnclglf.training.ranks import ALONE, Ranks
from mnclglf_kernels.ranks import gather_together

OPTIMIZER = {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001}
PROGRESS_LINES = 10  # lines of progress per training


def train_linear(
    encoder: Encoder,
    loader: Loader,
    labels: Tensor,
    config: LinearConfig,
    *,
    classes: int,
    steps_per_epoch: int,
    dtype: torch.dtype,
    seed: int,
    say: Callable[[str], object],
    ranks: Ranks = ALONE,
) -> nn.Linear:
    """Trains the classifier and returns its state after the last epoch.

    Each rank makes the features of its part of every batch; all take the same step on those of the whole batch.

    Args:
        encoder: frozen encoder on the device; runs in evaluation mode without gradient and is not changed.
        loader: loader of batches with one augmented view per image.
        labels: labels of the loader's images, int64 [n], on the device.
        config: settings; the learning rate falls to 0 as a cosine over all steps.
        classes: number of classes.
        steps_per_epoch: number of steps that count as an epoch; with `config.steps` the last one may be cut short.
        dtype: dtype of the encoder's autocast; the classifier is fp32.
        seed: seed of the initial weights, which are PyTorch's default ones.
        say: receives lines of progress.
        ranks: the processes that share the work; the loader makes the part of this one.

    Raises:
        ValueError: the loss is not finite.
    """
    torch.manual_seed(seed)
    classifier = nn.Linear(encoder.features, classes).to(labels.device)
    optimizer = LARS(classifier.parameters(), config.lr, **OPTIMIZER)
    total, began = total_steps(config, steps_per_epoch), time.perf_counter()
    epochs = math.ceil(total / steps_per_epoch)
    with eval_mode(encoder):
        for step, batch in enumerate(loader.batches(0, total)):
            with torch.no_grad(), autocast(labels.device, dtype):
                features, indices = encoder(batch.views), batch.indices
            if ranks.count > 1:
                features, indices = gather_together(features, indices)
            loss = F.cross_entropy(classifier(features.float()), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = cosine(config.lr, step / total)
            optimizer.step()
            done = step + 1
            epoch = math.ceil(done / steps_per_epoch)
            if (done % steps_per_epoch == 0 or done == total) and line_due(epoch, epochs):
                value = loss.item()  # waits for the device, only when a line is due
                check_loss(value, epoch, config.lr)
                left = (time.perf_counter() - began) / done * (total - done)
                say(f"epoch {epoch}/{epochs}  loss {value:.3f}  {timedelta(seconds=round(left))} left")
    return classifier


def total_steps(config: LinearConfig | FinetuneConfig, steps_per_epoch: int) -> int:
    """Returns the steps of a whole training."""
    return config.epochs * steps_per_epoch if config.steps is None else config.steps


def cosine(peak: float, done: float) -> float:
    """Returns a rate that falls from `peak` to 0 while `done`, the fraction of the steps done, goes from 0 to 1."""
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def line_due(epoch: int, epochs: int) -> bool:
    """Returns True after the first epoch (its time predicts the total), the last, and some between."""
    return epoch in (1, epochs) or epoch % max(1, epochs // PROGRESS_LINES) == 0


def check_loss(loss: float, epoch: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the linear classifier's loss was {loss} after epoch {epoch}: the encoder's features are not finite, or "
            f"lr {lr} is too high; look at the run's report, or lower --lr"
        )
