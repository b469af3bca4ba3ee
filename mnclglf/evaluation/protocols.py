"""Runs the protocols that need only stored features, on several representations of the same images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mnclglf.evaluation.accuracy import Accuracy
from mnclglf.evaluation.knn import weighted_knn
from mnclglf.evaluation.logistic import FEW_LABELS_C, choose_c, few_labels, fit_logistic
from mnclglf.runs.results import Protocol, Result

SUBSET = "philox"  # generator that draws the labels; results without this setting used other subsets
FEW_LABELS: dict[str, int] = {"per_class": 10, "draws": 5, "seed": 0}


def evaluate_features(
    representations: Mapping[str, tuple[Tensor, Tensor]],
    train_labels: Tensor,
    test_labels: Tensor,
    classes: int,
    protocols: Sequence[Protocol],
    *,
    split: str = "test",
    neighbors: int = 20,
    temperature: float = 0.07,
    c: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Returns one result per protocol and representation, protocol by protocol.

    Args:
        representations: (train [n, F], test [m, F]) features by name; F may differ between them.
        train_labels: train labels, int64 [n].
        test_labels: test labels, int64 [m].
        classes: number of classes.
        protocols: protocols to run.
        split: name of the images behind the test features.
        neighbors: number of neighbors that vote, for knn.
        temperature: temperature of the votes, for knn.
        c: inverse strength of the penalty, for logistic; None chooses one per representation.
        settings: further settings to save with every result, e.g. {"step": 480}; plain JSON types.

    Raises:
        ValueError: a protocol raised it; the message names the representation.
    """
    common = {"train_images": len(train_labels), "test_images": len(test_labels), "classes": classes}
    results: list[Result] = []
    for protocol in protocols:
        for name, (train, test) in representations.items():
            try:
                draws, own = _run(
                    protocol, (train, train_labels, test, test_labels), classes, neighbors, temperature, c
                )
            except ValueError as error:
                raise ValueError(f"{protocol} of {name}: {error}") from error
            results.append(_result(protocol, name, split, draws, {**own, **common, **(settings or {})}))
    return results


def _run(
    protocol: Protocol,
    sets: tuple[Tensor, Tensor, Tensor, Tensor],
    classes: int,
    neighbors: int,
    temperature: float,
    c: float | None,
) -> tuple[list[Accuracy], dict[str, Any]]:
    """Returns the accuracy per draw, and the settings used."""
    if protocol == "knn":
        settings = {"k": neighbors, "temperature": temperature}
        return [weighted_knn(*sets, classes=classes, k=neighbors, temperature=temperature)], settings
    if protocol == "logistic":
        c = choose_c(*sets[:2], classes=classes) if c is None else c
        return [fit_logistic(*sets, classes=classes, c=c)], {"solver": "logistic regression", "C": c}
    if protocol == "logistic_10_labels":
        return few_labels(*sets, classes=classes, **FEW_LABELS), {
            "solver": "logistic regression", "C": FEW_LABELS_C, **FEW_LABELS, "subset": SUBSET
        }  # fmt: skip
    raise ValueError(f"protocol {protocol!r} is not one of knn, logistic, logistic_10_labels")


def _result(protocol: Protocol, name: str, split: str, draws: list[Accuracy], settings: dict[str, Any]) -> Result:
    notes = sorted({draw.note for draw in draws if draw.note})
    top1 = [draw.top1 for draw in draws]
    return Result(
        protocol=protocol,
        representation=name,
        split=split,
        top1=statistics.fmean(top1),
        top5=statistics.fmean(draw.top5 for draw in draws),
        deviation=statistics.stdev(top1) if len(top1) > 1 else None,
        settings={**settings, "note": "; ".join(notes)} if notes else settings,
    )
