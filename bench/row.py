"""One row of the results: an implementation of a case, as it was measured. draw.py reads rows without loading torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

REFERENCE = "reference"
HEADINGS = ("median ms", "x reference fp32", "x reference bf16", "peak MiB")


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
