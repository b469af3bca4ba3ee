"""Evaluates a checkpoint of a run by the protocols of a scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import split_train, view_side
from mnclglf.engine.device import autocast_dtype, choose_device
from mnclglf.engine.run import build_method, load_trained
from mnclglf.evaluation.features import extract_features
from mnclglf.evaluation.protocols import evaluate
from mnclglf.evaluation.results import Protocol, Result


def evaluate_checkpoint(
    run: Path, checkpoint: Path, protocols: Sequence[Protocol], representations: Sequence[str]
) -> list[Result]:
    """Accuracy on the test images of the encoder in a checkpoint ("pretrained") or of fresh weights ("untrained").

    Returns:
        One result for each protocol and representation, with the checkpoint's step among its settings.
    """
    config, method, step = load_trained(run, checkpoint)
    device = choose_device(config.engine)
    dtype = autocast_dtype(config.engine, device)
    train, test = load_dataset(config.dataset, config.data.data_dir, download=config.data.download)
    if test is None:
        raise ValueError(f"{train.name} has no test images to evaluate on")
    train, _ = split_train(train, config.data)
    side, (mean, std) = view_side(train, config.data.image_size), train.statistics()
    encoders = {"pretrained": method.encoder, "untrained": build_method(config, dtype).encoder}
    features: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in representations:
        encoder = encoders[name].to(device)
        extract = partial(extract_features, encoder, side=side, mean=mean, std=std, dtype=dtype, device=device)
        features[name] = extract(train), extract(test)
    return evaluate(
        features,
        torch.from_numpy(train.labels),
        torch.from_numpy(test.labels),
        len(train.classes),
        protocols,
        settings={"step": step},
    )
