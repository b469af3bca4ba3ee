"""Accuracies in the paper's Tables 3 to 6, in percent."""

from __future__ import annotations

from typing import NamedTuple

from mnclglf.config import MethodName


class PaperResult(NamedTuple):
    """Accuracy of linear evaluation in percent; top5 is None if the paper does not print it."""

    top1: float
    top5: float | None = None


METHOD_TITLES: dict[MethodName, str] = {
    "supervised": "Supervised",
    "mocov2": "MoCo v2",
    "simsiam": "SimSiam",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "nnclr": "NNCLR",
    "fast_moco": "Fast-MoCo",
    "mnclglf": "MNCLGLF",
}

TABLE3: dict[MethodName, dict[str, PaperResult]] = {
    "supervised": {
        "cifar10": PaperResult(92.89, 99.84),
        "cifar100": PaperResult(71.93, 92.21),
        "tinyimagenet": PaperResult(54.03, 77.02),
    },
    "mocov2": {
        "cifar10": PaperResult(84.03, 99.53),
        "cifar100": PaperResult(50.49, 80.28),
        "tinyimagenet": PaperResult(26.01, 51.92),
    },
    "simsiam": {
        "cifar10": PaperResult(84.16, 99.45),
        "cifar100": PaperResult(48.19, 78.41),
        "tinyimagenet": PaperResult(25.28, 50.63),
    },
    "simclr": {
        "cifar10": PaperResult(87.11, 99.64),
        "cifar100": PaperResult(59.20, 86.41),
        "tinyimagenet": PaperResult(31.39, 59.08),
    },
    "byol": {
        "cifar10": PaperResult(85.58, 99.58),
        "cifar100": PaperResult(57.12, 84.83),
        "tinyimagenet": PaperResult(32.76, 59.55),
    },
    "nnclr": {
        "cifar10": PaperResult(87.66, 99.63),
        "cifar100": PaperResult(60.91, 87.50),
        "tinyimagenet": PaperResult(40.46, 67.05),
    },
    "fast_moco": {
        "cifar10": PaperResult(85.93, 99.57),
        "cifar100": PaperResult(61.39, 87.31),
        "tinyimagenet": PaperResult(39.91, 66.26),
    },
    "mnclglf": {
        "cifar10": PaperResult(90.18, 99.78),
        "cifar100": PaperResult(65.20, 89.72),
        "tinyimagenet": PaperResult(41.70, 68.36),
    },
}
"""Results by method and data set."""

TABLE4 = {
    2: PaperResult(89.33),
    4: PaperResult(89.50),
    6: PaperResult(90.18),
    8: PaperResult(89.26),
    10: PaperResult(89.27),
}
"""Results by lambda, on CIFAR10."""

TABLE5 = {
    "nnclr": {50: PaperResult(72.48), 100: PaperResult(82.54), 150: PaperResult(86.86), 200: PaperResult(87.66)},
    "one_embedding": {
        50: PaperResult(80.75),
        100: PaperResult(87.47),
        150: PaperResult(89.36),
        200: PaperResult(89.84),
    },
    "mnclglf": {50: PaperResult(80.55), 100: PaperResult(87.77), 150: PaperResult(90.17), 200: PaperResult(90.18)},
}
"""Results by method and epoch of 200, on CIFAR10; "one_embedding" is MNCLGLF with one combined embedding per step."""

TABLE6 = {
    1: PaperResult(89.54, 99.73),
    2: PaperResult(90.18, 99.78),
    3: PaperResult(89.79, 99.73),
    4: PaperResult(89.61, 99.72),
}
"""Results by k, on CIFAR10."""
