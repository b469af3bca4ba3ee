"""Named runs: a recipe is a function from method and data set to a RunConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mnclglf.config import (
    FOLDER,
    DataConfig,
    MethodName,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RecipeName,
    RunConfig,
    ViewConfig,
)

DIGITS = {"mnist5k", "digits"}  # a flipped digit is another sign


def paper(method: MethodName, dataset: str) -> RunConfig:
    """Table 2 of the paper, which the defaults of config.py hold, at the data set's own size.

    A folder of images has none, and ImageNet's is taken: side 224, a 7 x 7 stem.
    """
    view = ViewConfig(flip_probability=0.0 if dataset in DIGITS else 0.5)
    config = RunConfig(method=method, dataset=dataset, recipe="paper", view=view)
    if not dataset.startswith(FOLDER):
        return config
    return replace(config, data=DataConfig(image_size=224), model=ModelConfig(stem="imagenet"))


def quick(method: MethodName, dataset: str) -> RunConfig:
    """Some minutes on two cores, to see the method learn. Not the paper's recipe: small in every way.

    Temperature, learning rate and jitter were chosen on 800 held-out training images of mnist5k (docs/results.md).
    """
    view = ViewConfig(crop_scale=(0.5, 1.0), interpolation="bilinear", hue=0.0, blur_probability=0.0)
    data, epochs = DataConfig(image_size=16, train_images=10_000), 16
    if dataset in DIGITS:
        view = replace(view, flip_probability=0.0, rotation_degrees=15.0, gray_probability=0.0, saturation=0.0)
        data, epochs = DataConfig(image_size=16), 40
    if dataset == "tinyimagenet" or dataset.startswith(FOLDER):
        data = replace(data, image_size=32, train_images=10_000 if dataset == "tinyimagenet" else None)
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


RECIPES: dict[RecipeName, Callable[[MethodName, str], RunConfig]] = {"paper": paper, "quick": quick}
