"""Self-supervised pre-training: train, evaluate, and take the encoder along.

    run = mnclglf.train(method="simsiam", dataset="digits", recipe="quick")
    results = mnclglf.evaluate(run, "logistic")
    encoder = mnclglf.load_encoder(run)
    folder = mnclglf.export(run)

Importing this costs no torch until one of the functions is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnclglf.api import Embeddings, Run, embed, evaluate, export, load_encoder, quality, train
    from mnclglf.config import (
        DataConfig,
        EngineConfig,
        FinetuneConfig,
        KnnConfig,
        LinearConfig,
        LogisticConfig,
        ModelConfig,
        ObjectiveConfig,
        OptimConfig,
        QualityConfig,
        RunConfig,
        ViewConfig,
    )
    from mnclglf.runs.quality import FeatureQuality
    from mnclglf.runs.results import Result

__all__ = [
    "DataConfig",
    "Embeddings",
    "EngineConfig",
    "FeatureQuality",
    "FinetuneConfig",
    "KnnConfig",
    "LinearConfig",
    "LogisticConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "QualityConfig",
    "Result",
    "Run",
    "RunConfig",
    "ViewConfig",
    "embed",
    "evaluate",
    "export",
    "load_encoder",
    "quality",
    "train",
]

_API = ("train", "evaluate", "quality", "load_encoder", "embed", "export", "Run", "Embeddings")
_MODULES = {**dict.fromkeys(_API, "api"), "Result": "runs.results", "FeatureQuality": "runs.quality"}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used."""
    if name == "__version__":
        return importlib.import_module("mnclglf.version").version()
    if name not in __all__:
        raise AttributeError(f"module 'mnclglf' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"mnclglf.{_MODULES.get(name, 'config')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
