"""Named runs: a recipe is a function from method and data set to a RunConfig. Named views: how images become views."""

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
    require,
)

DIGITS = {"mnist5k", "digits"}  # a flipped digit is another sign


_CROPPED = ViewConfig(
    crop_scale=(0.08, 1.0),
    interpolation="bilinear",
    jitter_probability=0.0,
    gray_probability=0.0,
    blur_probability=0.0,
)

VIEWS: dict[str, ViewConfig] = {
    # The kinds of the paper's section 4.1; it gives no strengths: those of MoCo v2, cubic as in the authors' code.
    "paper": ViewConfig(),
    # Chen et al. 2020, appendix B.9 (CIFAR-10): Inception crops, flip, jitter of half strength, gray, no blur.
    "simclr": ViewConfig(crop_scale=(0.08, 1.0), blur_probability=0.0, interpolation="bilinear"),
    # He et al. 2020 and Chen et al. 2020 ("Improved baselines"), as in their code's aug_plus.
    "mocov2": ViewConfig(interpolation="bilinear"),
    # Grill et al. 2020, table 6, with one distribution for all views: theirs blur the first always, the second one time
    # in ten, and solarise it one time in five, which is not done here.
    "byol": ViewConfig(crop_scale=(0.08, 1.0), saturation=0.2, blur_probability=0.55),
    # The paper's linear evaluation: random resized crop, with torchvision's scales, and flip.
    "linear_train": _CROPPED,
    # The whole image; of one that is not square the middle.
    "eval": replace(_CROPPED, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0),
    # A learnable task for small images and short runs (docs/results.md).
    "quick": ViewConfig(crop_scale=(0.5, 1.0), interpolation="bilinear", hue=0.0, blur_probability=0.0),
}


def view_of(name: str, dataset: str) -> ViewConfig:
    """The views of this name for a data set: digits are never flipped, and have no colours.

    Raises:
        ValueError: there is no such name.
    """
    require(name in VIEWS, f"recipe {name!r} is none of {', '.join(VIEWS)}")
    view = VIEWS[name]
    if dataset not in DIGITS:
        return view
    view = replace(view, flip_probability=0.0)
    return replace(view, rotation_degrees=15.0, gray_probability=0.0, saturation=0.0) if name == "quick" else view


def paper(method: MethodName, dataset: str) -> RunConfig:
    """Table 2 of the paper, which the defaults of config.py hold, at the data set's own size.

    A folder of images has none, and ImageNet's is taken: side 224, a 7 x 7 stem.
    """
    view = view_of("paper", dataset)
    config = RunConfig(method=method, dataset=dataset, recipe="paper", view=view)
    if not dataset.startswith(FOLDER):
        return config
    return replace(config, data=DataConfig(image_size=224), model=ModelConfig(stem="imagenet"))


def quick(method: MethodName, dataset: str) -> RunConfig:
    """Some minutes on two cores, to see the method learn. Not the paper's recipe: small in every way.

    Temperature, learning rate and jitter were chosen on 800 held-out training images of mnist5k (docs/results.md).
    """
    view = view_of("quick", dataset)
    data, epochs = DataConfig(image_size=16, train_images=10_000), 16
    if dataset in DIGITS:
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
