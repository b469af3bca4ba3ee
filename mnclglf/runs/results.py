"""Results of evaluations, and their file evaluation.json: {"version": 2, "results": [...]}.

A file without a version, a bare list, is from an earlier version: it names logistic regression "linear" and the paper's
protocol "linear_lars". It is read under the present names and saved as version 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from mnclglf.config import FinetuneConfig, KnnConfig, LinearConfig
from mnclglf.runs.files import read_json, write_json
from mnclglf.runs.locks import writing_in

Protocol = Literal["knn", "linear", "logistic", "logistic_10_labels", "finetune"]
"""linear is the paper's linear evaluation, trained by LARS; logistic is logistic regression on stored features;
finetune trains the encoder too."""

VERSION = 2
FORMER_PROTOCOLS = {"linear": "logistic", "linear_10_labels": "logistic_10_labels", "linear_lars": "linear"}
"""Protocol names in a file without a version, and their present names."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "knn": {"k": KnnConfig.neighbors, "temperature": KnnConfig.vote_temperature},
    "linear": {
        "epochs": LinearConfig.epochs,
        "steps": LinearConfig.steps,
        "batch_size": LinearConfig.batch_size,
        "asked_batch_size": None,
        "lr": LinearConfig.lr,
    },
    "finetune": {
        "epochs": FinetuneConfig.epochs,
        "steps": FinetuneConfig.steps,
        "batch_size": FinetuneConfig.batch_size,
        "asked_batch_size": None,
        "lr": FinetuneConfig.lr,
    },
}
"""Default of each setting of a protocol that a user chooses, by its name in `Result.settings`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Accuracy of one representation under one protocol on one split; fractions, 0 to 1."""

    protocol: Protocol
    representation: str
    """Name of the representation: "pretrained", "untrained", "raw pixels" or another."""
    dataset: str | None = None
    """Data set that was evaluated on; None for the run's own."""
    split: str = "test"
    """Images that were classified: "test" or "validation"."""
    label_share: float = 1.0
    """Fraction of the training images whose labels were used."""
    epoch: float | None = None
    """Epochs of training of the checkpoint; None for the run's newest."""
    top1: float
    top5: float
    deviation: float | None = None
    """Standard deviation of top-1 over draws of labels (n - 1 in the denominator); None for a single draw."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings behind the number, as plain JSON types; "note" holds a warning to print beside it."""

    def __post_init__(self) -> None:
        numbers: list[object] = [self.top1, self.top5, self.label_share]
        numbers += [value for value in (self.epoch, self.deviation) if value is not None]
        if not all(_is_finite(number) for number in numbers):
            raise ValueError(f"{numbers} are not finite numbers")
        if not (0 <= self.top1 <= self.top5 <= 1):
            raise ValueError(f"top1 {self.top1} and top5 {self.top5} are not rising fractions of the images")

    @property
    def key(self) -> tuple[str, str, str | None, str, float, float | None, tuple[tuple[str, Any], ...]]:
        """Returns the key of a result; a new result replaces the saved one with the same key."""
        changed = tuple(changed_settings(self.protocol, self.settings).items())
        return self.protocol, self.representation, self.dataset, self.split, self.label_share, self.epoch, changed


def changed_settings(protocol: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that differ from the protocol's defaults; a setting that is missing has its default.

    Only what a user chooses counts: neither what was found out (C, the step) nor where it was computed (precision).
    """
    usual = dict(DEFAULTS.get(protocol, {}))
    images = settings.get("train_images")
    if "batch_size" in usual and isinstance(images, int):
        usual["batch_size"] = min(usual["batch_size"], images)  # the default batch is lowered to the labeled images
    return {name: settings[name] for name, value in usual.items() if settings.get(name, value) != value}


def load_results(path: Path) -> list[Result]:
    """Reads the results in an evaluation.json of this or an earlier version; none if there is no file.

    Raises:
        ValueError: the file does not hold results, or is from a later version; the message names it and the remedy.
    """
    try:
        content = read_json(path)
        if content is None:
            return []
        former = isinstance(content, list)
        file = cast("dict[str, Any]", {"version": VERSION, "results": content} if former else content)
        version, entries = file["version"], cast("list[dict[str, Any]]", file["results"])
        results = [_result(entry, former) for entry in entries] if version == VERSION else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: it does not hold evaluation results ({error}); remove it and evaluate again"
        ) from error
    if results is None:
        raise ValueError(
            f"{path} has version {version}, and this mnclglf reads {VERSION}; install the one that wrote it"
        )
    return results


def save_results(path: Path, results: Iterable[Result]) -> list[Result]:
    """Merges `results` into an evaluation.json and returns all its results.

    A result replaces the one with the same key, in its place; new ones are appended. The file is whole at any time;
    processes that merge at the same moment do so one after the other.

    Raises:
        ValueError: the existing file does not hold results.
    """
    with writing_in(path.parent):
        merged = {result.key: result for result in load_results(path)}
        merged.update({result.key: result for result in results})
        write_json(path, {"version": VERSION, "results": [dataclasses.asdict(result) for result in merged.values()]})
    return list(merged.values())


def _result(entry: dict[str, Any], former: bool) -> Result:
    """Makes a result from a JSON object; raises TypeError or ValueError if it is none."""
    protocol, settings = entry["protocol"], entry.get("settings") or {}
    if not isinstance(protocol, str) or not isinstance(settings, dict):
        raise TypeError(f"protocol {protocol!r} and settings {settings!r} are not a name and an object")
    if former:
        protocol = FORMER_PROTOCOLS.get(protocol, protocol)
    values: dict[str, Any] = {**entry, "protocol": protocol, "settings": settings}
    result = Result(**values)
    hash(result.key)  # raises TypeError for a list where a setting belongs
    return result


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
