"""Self-supervised pre-training: train, evaluate, and take the encoder along.

    run = mnclglf.train(method="simsiam", dataset="digits", recipe="quick")
    results = mnclglf.evaluate(run, "logistic")
    encoder = mnclglf.load_encoder(run)

Importing this costs no torch until one of the functions is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnclglf.api import Run, evaluate, load_encoder, train
    from mnclglf.config import (
        DataConfig,
        EngineConfig,
        KnnConfig,
        LinearConfig,
        LogisticConfig,
        ModelConfig,
        ObjectiveConfig,
        OptimConfig,
        RunConfig,
        ViewConfig,
    )
    from mnclglf.runs.results import Result

__all__ = [
    "DataConfig",
    "EngineConfig",
    "KnnConfig",
    "LinearConfig",
    "LogisticConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Result",
    "Run",
    "RunConfig",
    "ViewConfig",
    "evaluate",
    "load_encoder",
    "train",
]

_MODULES = {"train": "api", "evaluate": "api", "load_encoder": "api", "Run": "api", "Result": "runs.results"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used."""
    if name not in __all__:
        raise AttributeError(f"module 'mnclglf' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"mnclglf.{_MODULES.get(name, 'config')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
