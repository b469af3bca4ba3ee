"""Named runs: a recipe is a function from method and data set to a RunConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mnclglf.config import (
    DataConfig,
    DatasetName,
    MethodName,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RecipeName,
    RunConfig,
    ViewConfig,
)

DIGITS: set[DatasetName] = {"mnist5k", "digits"}  # a flipped digit is another sign


def paper(method: MethodName, dataset: DatasetName) -> RunConfig:
    """Table 2 of the paper, which the defaults of config.py hold, at the data set's own size."""
    view = ViewConfig(flip_probability=0.0 if dataset in DIGITS else 0.5)
    return RunConfig(method=method, dataset=dataset, recipe="paper", view=view)


def quick(method: MethodName, dataset: DatasetName) -> RunConfig:
    """Some minutes on two cores, to see the method learn. Not the paper's recipe: small in every way.

    Temperature, learning rate and jitter were chosen on 800 held-out training images of mnist5k (docs/results.md).
    """
    view = ViewConfig(crop_scale=(0.5, 1.0), interpolation="bilinear", hue=0.0, blur_probability=0.0)
    data, epochs = DataConfig(image_size=16, train_images=10_000), 16
    if dataset in DIGITS:
        view = replace(view, flip_probability=0.0, rotation_degrees=15.0, gray_probability=0.0, saturation=0.0)
        data, epochs = DataConfig(image_size=16), 40
    return RunConfig(
        method=method,
        dataset=dataset,
        recipe="quick",
        data=data,
        view=view,
        model=ModelConfig(width=16, projector_width=512, predictor_width=128),
        objective=ObjectiveConfig(temperature=0.2, ema_momentum=0.95, queue_size=1024),
        optim=OptimConfig(epochs=epochs, lr=0.1, warmup_epochs=0.5),
    )


RECIPES: dict[RecipeName, Callable[[MethodName, DatasetName], RunConfig]] = {"paper": paper, "quick": quick}
