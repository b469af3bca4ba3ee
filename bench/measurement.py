"""Saved measurements of operators and training steps. It needs no torch, so that draw.py starts quickly."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Self

REFERENCE = "reference"
HEADINGS = ("median ms", "x reference fp32", "x reference bf16", "peak MiB")
STEP_HEADINGS = ("s per step", "images/s", "TFLOP/s", "ratio", "peak GiB")


class Ratio(NamedTuple):
    """Speed relative to a reference: median, least and greatest of the rounds."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.greatest:.2f})"


def ratio(reference: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """Compares the seconds of each round with the reference's seconds of the same round."""
    rounds = [theirs / own for theirs, own in zip(reference, seconds, strict=True)]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds))


class JsonEntry:
    """Conversion to and from the JSON of pytest-benchmark, shared by the measurements."""

    RATIOS: ClassVar[tuple[str, ...]] = ("ratio",)

    def extra_info(self) -> dict[str, Any]:
        """Returns all fields but the seconds, which pytest-benchmark saves itself."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}  # pyright: ignore

    @classmethod
    def from_json(cls, benchmark: dict[str, Any]) -> Self:
        """Reads one entry of the JSON."""
        known = dict(benchmark["extra_info"], seconds=benchmark["stats"]["data"])
        for name in cls.RATIOS:
            known[name] = None if known[name] is None else Ratio(*known[name])
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class OperatorMeasurement(JsonEntry):
    """One implementation of an operator in one case.

    Attributes:
        operator, shape, direction: the case.
        backend: a backend of mnclglf_kernels, or REFERENCE.
        dtype: "fp32", or "bf16" under autocast.
        seconds: time per call in each round.
        ratio: speed relative to the reference in fp32; None for that reference itself.
        like_with_like: for a dtype other than fp32, speed relative to the reference in that dtype; None for the
            reference.
        peak_bytes: peak tensor memory of a call beyond its start; None if it cannot be measured.
    """

    RATIOS: ClassVar[tuple[str, ...]] = ("ratio", "like_with_like")

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
        """Returns the table cells under HEADINGS; a dash for no figure."""
        peak = "-" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.1f}"
        median = 1e3 * statistics.median(self.seconds)
        return f"{median:.3f}", str(self.ratio or "-"), str(self.like_with_like or "-"), peak


@dataclass(frozen=True, kw_only=True)
class StepMeasurement(JsonEntry):
    """One training step of a comparison.

    Attributes:
        kind: "ablation", where each variant has one optimization more, or "peers".
        name: name of the variant or peer.
        size: size of the step, in words.
        images: images per batch.
        seconds: time per step in each round.
        tflop: floating-point operations per step (10^12) by PyTorch's counter; None if compiling hides them.
        ratio: in the ablation, speed relative to the first variant. For a peer, speed of ours relative to it, each with
            its own operations. None for the step that the others are compared with.
        peak_bytes: peak memory: of tensors on a GPU, of the whole process on a CPU.
    """

    kind: str
    name: str
    size: str
    images: int
    seconds: list[float]
    tflop: float | None
    ratio: Ratio | None
    peak_bytes: int

    @classmethod
    def from_json(cls, benchmark: dict[str, Any]) -> Self:
        found = benchmark["extra_info"]
        kind = "ablation" if found["kind"] == "ladder" else found["kind"]  # its name in older files
        return super().from_json({**benchmark, "extra_info": {**found, "kind": kind}})

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
        """Returns 10^12 floating-point operations per second; 0 if the operations are not known."""
        return (self.tflop or 0.0) / statistics.median(self.seconds)

    def cells(self) -> tuple[str, str, str, str, str]:
        """Returns the table cells under STEP_HEADINGS; a dash for no figure."""
        median = statistics.median(self.seconds)
        rate = "-" if self.tflop is None else f"{self.tflop_per_second:.3f}"
        return (
            f"{median:.3f}",
            f"{self.images_per_second:,.1f}",
            rate,
            str(self.ratio or "-"),
            f"{self.peak_bytes / 2**30:.2f}",
        )
