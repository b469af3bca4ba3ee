"""Evaluates a checkpoint of a run by the protocols of a scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mnclglf.config import LinearConfig, RunConfig
from mnclglf.evaluation.protocols import evaluate
from mnclglf.evaluation.results import Protocol, Result
from mnclglf.evaluation.run import by_lars, linear_loader, prepare
from mnclglf.training.run_directory import load_trained


def evaluate_checkpoint(
    run: Path,
    config: RunConfig,
    checkpoint: Path,
    protocols: Mapping[Protocol, Mapping[str, Any]],
    representations: Sequence[str],
    console: Console,
) -> list[Result]:
    """Accuracy on the test images of the encoder in a checkpoint ("pretrained") or of fresh weights ("untrained").

    Args:
        run: run directory.
        config: its settings, with where its data set lies now.
        checkpoint: of the run.
        protocols: with the settings that the evaluation is made with.
        representations: "pretrained", "untrained" or both.
        console: where progress goes.

    Returns:
        One result for each protocol and representation, with the checkpoint's step among its settings; of the paper's
        protocol, linear_lars, one for "pretrained" alone.
    """
    lars = LinearConfig(**protocols.get("linear_lars", {}))
    subject = prepare(run, config, lars, console)
    _, method, step = load_trained(run, checkpoint)
    results: list[Result] = []
    if "linear_lars" in protocols:
        results += by_lars(subject, lars, linear_loader(subject, lars), method.encoder, step)
    fast: list[Protocol] = [protocol for protocol in protocols if protocol != "linear_lars"]
    if not fast:
        return results
    encoders = {"pretrained": method.encoder, "untrained": subject.untrained()}
    return results + evaluate(
        {
            name: (subject.features(encoders[name], subject.train), subject.features(encoders[name], subject.test))
            for name in representations
        },
        torch.from_numpy(subject.train.labels),
        torch.from_numpy(subject.test.labels),
        subject.classes,
        fast,
        settings={"step": step},
        **protocols.get("knn", {}),
    )
