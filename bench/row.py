"""One row of the results: an implementation of a case, as it was measured. draw.py reads rows without loading torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

REFERENCE = "reference"
HEADINGS = ("median ms", "x reference fp32", "x reference bf16", "peak MiB")
STEP_HEADINGS = ("s a step", "images/s", "TFLOP/s", "ratio", "peak GiB")


class Ratio(NamedTuple):
    """How many times as fast as a reference: median, least and greatest of the rounds."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.greatest:.2f})"


def ratio(reference: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Of the rounds' seconds; each round is compared with itself."""
    rounds = [theirs / own for theirs, own in zip(reference, seconds, strict=True)]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds))


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one implementation of a case.

    Attributes:
        operator, shape, direction: the case.
        backend: of mnclglf_kernels, or REFERENCE: Algorithm 1 as printed.
        dtype: "fp32", or "bf16" under autocast.
        seconds: of a call, in each round.
        ratio: to the reference in fp32; None for itself.
        like_with_like: where dtype is not fp32, to the reference in the same; None for itself.
        peak_bytes: of tensors during a call, beyond those there before; None where it cannot be seen.
    """

    operator: str
    shape: str
    direction: str
    backend: str
    dtype: str
    seconds: list[float]
    ratio: Ratio | None
    like_with_like: Ratio | None
    peak_bytes: int | None

    @property
    def case(self) -> str:
        return f"{self.operator}: {self.shape}, {self.direction}"

    @property
    def implementation(self) -> str:
        return f"{self.backend} {self.dtype}"

    def cells(self) -> tuple[str, str, str, str]:
        """Under HEADINGS; a dash where there is nothing to compare with or nothing was measured."""
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.1f}"
        median = 1e3 * statistics.median(self.seconds)
        return f"{median:.3f}", str(self.ratio or "-"), str(self.like_with_like or "-"), peak

    def extra_info(self) -> dict[str, Any]:
        """All but the seconds, which pytest-benchmark has."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}

    @classmethod
    def from_json(cls, benchmark: dict[str, Any]) -> Row:
        """From an entry of the JSON that pytest-benchmark writes."""
        known = dict(benchmark["extra_info"], seconds=benchmark["stats"]["data"])
        for name in ("ratio", "like_with_like"):
            known[name] = None if known[name] is None else Ratio(*known[name])
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """What was measured of one training step.

    Attributes:
        kind: "ladder", where each rung has one optimisation more, or "peers".
        name: of the rung or peer.
        size: what was trained on, in words.
        images: of a batch.
        seconds: of a step, in each round.
        tflop: floating-point operations of a step (10^12) by PyTorch's counter; None where compiling hides them.
        ratio: in the ladder times as fast as its first rung; of a peer, how many times as fast ours is, each by its own
            operations; None for what the others are compared with.
        peak_bytes: most memory alive: tensors on a GPU, the whole process on a CPU.
    """

    kind: str
    name: str
    size: str
    images: int
    seconds: list[float]
    tflop: float | None
    ratio: Ratio | None
    peak_bytes: int

    @property
    def case(self) -> str:
        return f"{self.kind}: {self.size}"

    @property
    def implementation(self) -> str:
        return self.name

    @property
    def images_per_second(self) -> float:
        return self.images / statistics.median(self.seconds)

    @property
    def tflop_per_second(self) -> float:
        """0 where the operations are not known."""
        return (self.tflop or 0.0) / statistics.median(self.seconds)

    def cells(self) -> tuple[str, str, str, str, str]:
        """Under STEP_HEADINGS; a dash where there is no figure."""
        median = statistics.median(self.seconds)
        rate = "-" if self.tflop is None else f"{self.tflop_per_second:.3f}"
        return (
            f"{median:.3f}",
            f"{self.images_per_second:,.1f}",
            rate,
            str(self.ratio or "-"),
            f"{self.peak_bytes / 2**30:.2f}",
        )

    def extra_info(self) -> dict[str, Any]:
        """All but the seconds, which pytest-benchmark has."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}

    @classmethod
    def from_json(cls, benchmark: dict[str, Any]) -> StepRow:
        """From an entry of the JSON that pytest-benchmark writes."""
        known = dict(benchmark["extra_info"], seconds=benchmark["stats"]["data"])
        known["ratio"] = None if known["ratio"] is None else Ratio(*known["ratio"])
        return cls(**known)
