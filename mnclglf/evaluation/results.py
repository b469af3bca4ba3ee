"""What an evaluation found, and RUN/evaluation.json that keeps it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from mnclglf.runs.files import write_atomically

Protocol = Literal["knn", "linear", "linear_10_labels", "linear_lars"]
"""linear and linear_10_labels are logistic regressions, the fast protocol; linear_lars is the paper's."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Accuracy of one representation under one protocol on one split; fractions, 0 to 1."""

    protocol: Protocol
    representation: str
    """"pretrained", "untrained", "raw pixels" or another."""
    split: str
    """The images that were classified: "test" or "validation"."""
    label_share: float = 1.0
    """Share of the training images whose labels were used."""
    epoch: float | None = None
    """Epochs of training behind a checkpoint that was chosen, as a milestone; None for the run's newest."""
    top1: float
    top5: float
    deviation: float | None = None
    """Standard deviation of top-1 over draws of labels (n - 1 in the denominator); None where there is one draw."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the number depends on, as plain JSON types; "note" holds a warning to print beside it."""

    def __post_init__(self) -> None:
        if not (0 <= self.top1 <= self.top5 <= 1):
            raise ValueError(f"top1 {self.top1} and top5 {self.top5} are not rising fractions of the images")

    @property
    def key(self) -> tuple[str, str, str, float, float | None]:
        """Results with the same key replace one another."""
        return self.protocol, self.representation, self.split, self.label_share, self.epoch


def load_results(path: Path) -> list[Result]:
    """The results in an evaluation.json; none where there is no file.

    Raises:
        ValueError: the file does not hold results; the message names it.
    """
    if not path.exists():
        return []
    try:
        values = cast("list[dict[str, Any]]", json.loads(path.read_text()))
        return [Result(**value) for value in values]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold evaluation results ({error}); remove it and evaluate again") from error


def save_results(path: Path, results: Iterable[Result]) -> list[Result]:
    """Merges `results` into an evaluation.json and gives all it then holds.

    A result replaces the one with the same key, in its place; new ones come last. The file is whole at any time, but of
    two processes that merge at the same moment one loses its results.

    Raises:
        ValueError: the file that is there does not hold results.
    """
    merged = {result.key: result for result in load_results(path)}
    merged.update({result.key: result for result in results})
    text = json.dumps([dataclasses.asdict(result) for result in merged.values()], indent=2, allow_nan=False)
    write_atomically(path, lambda file: file.write((text + "\n").encode()))
    return list(merged.values())
