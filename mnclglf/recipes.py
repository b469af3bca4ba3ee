"""Recipes, each a function from method and data set to a RunConfig, and named views, each the settings of a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mnclglf.config import (
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
from mnclglf.data.sources import SOURCES, source_of

_CROPPED = ViewConfig(
    crop_scale=(0.08, 1.0),
    interpolation="bilinear",
    jitter_probability=0.0,
    gray_probability=0.0,
    blur_probability=0.0,
)

# No recipe uses mocov2 and byol, as the CIFAR-10 settings of both take SimCLR's; they are for `mnclglf data views`.
VIEWS: dict[str, ViewConfig] = {
    # The operations of the paper's section 4.1, which gives no strengths: MoCo v2's, bicubic as in the authors' code.
    "paper": ViewConfig(),
    # Chen et al. 2020, appendix B.9 (CIFAR-10): Inception crops, flip, jitter at half strength, gray, no blur.
    "simclr": ViewConfig(crop_scale=(0.08, 1.0), blur_probability=0.0, interpolation="bilinear"),
    # He et al. 2020 and Chen et al. 2020 ("Improved baselines"), as in their code's aug_plus.
    "mocov2": ViewConfig(interpolation="bilinear"),
    # Grill et al. 2020, table 6, but with one distribution for both views. Theirs blur the first view always and the
    # second with probability 0.1, and solarize only the second, with probability 0.2.
    "byol": ViewConfig(crop_scale=(0.08, 1.0), saturation=0.2, blur_probability=0.55, solarize_probability=0.1),
    # Chen & He 2021, appendix D (CIFAR-10): like MoCo v2, without blur.
    "simsiam": ViewConfig(interpolation="bilinear", blur_probability=0.0),
    # Khosla et al. 2020, the cross-entropy baseline of their code for CIFAR (main_ce.py): crop and flip.
    "supervised": replace(_CROPPED, crop_scale=(0.2, 1.0)),
    # The paper's linear evaluation: random resized crop, with torchvision's scales, and flip.
    "linear_train": _CROPPED,
    # The whole image, or the center square of an oblong one.
    "eval": replace(_CROPPED, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0),
    # A learnable task for small images and short runs (docs/lab/results.md).
    "quick": ViewConfig(crop_scale=(0.5, 1.0), interpolation="bilinear", hue=0.0, blur_probability=0.0),
}


def view_of(name: str, dataset: str) -> ViewConfig:
    """Returns the named view for a data set, without flips if the data set's source rules them out.

    Raises:
        ValueError: there is no view of this name.
    """
    require(name in VIEWS, f"view {name!r} is none of {', '.join(VIEWS)}")
    view = VIEWS[name]
    source = source_of(dataset)
    if not source.flips:
        view = replace(view, flip_probability=0.0)
    return replace(view, **source.quick_view) if name == "quick" else view


def paper(method: MethodName, dataset: str) -> RunConfig:
    """Returns Table 2 of the paper, the defaults of config.py, at the data set's own image size.

    Images without a common size, as those of a folder, get ImageNet's: a side of 224 and the 7 x 7 stem.
    """
    view = view_of("paper", dataset)
    config = RunConfig(method=method, dataset=dataset, recipe="paper", view=view)
    if source_of(dataset).sized:
        return config
    return replace(config, data=DataConfig(image_size=224), model=ModelConfig(stem="imagenet"))


# lightly's CIFAR-10 benchmark in batches of 512: lr 0.06 per 128 images.
_LIGHTLY = OptimConfig(batch_size=512, lr=0.24, weight_decay=5e-4)

# Differences from Table 2; docs/reference/algorithm.md names the source of each value. Methods without published CIFAR
# settings are left out.
TUNED: dict[MethodName, RunConfig] = {
    # kuangliu/pytorch-cifar; its crops of padded images are replaced by SupContrast's views for cross-entropy.
    "supervised": RunConfig(
        view=VIEWS["supervised"],
        optim=OptimConfig(batch_size=128, lr=0.1, weight_decay=5e-4),
    ),
    # lightly.
    "simclr": RunConfig(
        view=VIEWS["simclr"],
        objective=ObjectiveConfig(temperature=0.5),
        optim=_LIGHTLY,
    ),
    # The CIFAR-10 notebook of the authors.
    "mocov2": RunConfig(
        view=VIEWS["simclr"],
        objective=ObjectiveConfig(temperature=0.1, queue_size=4096),
        optim=OptimConfig(batch_size=512, lr=0.06, weight_decay=5e-4),
    ),
    # Appendix D of the authors: lr 0.03 per 256 images.
    "simsiam": RunConfig(
        view=VIEWS["simsiam"],
        optim=OptimConfig(epochs=800, batch_size=512, lr=0.06, weight_decay=5e-4, constant_predictor_lr=True),
    ),
    # lightly; m rises by the authors' schedule from 0.99, solo-learn's start for CIFAR.
    "byol": RunConfig(
        view=VIEWS["simclr"],
        objective=ObjectiveConfig(ema_momentum=0.99, ema_schedule="cosine"),
        optim=_LIGHTLY,
    ),
    # lightly, with its 8192 queue rows for batches of 512.
    "nnclr": RunConfig(
        view=VIEWS["simclr"],
        objective=ObjectiveConfig(temperature=0.5, queue_size=8192),
        optim=_LIGHTLY,
    ),
    # The authors' ImageNet configuration, the only one they publish.
    "fast_moco": RunConfig(
        optim=OptimConfig(batch_size=512, warmup_epochs=1.0, constant_predictor_lr=True, clip_norm=1.0)
    ),
    # Table 2 holds the authors' own settings.
    "mnclglf": RunConfig(),
    # The released code: its input, clip_norm, and the predictor's "Constant LR for group2" (lambda_scheduler.py).
    "mnclglf_official": RunConfig(
        data=DataConfig(image_size=224),
        model=ModelConfig(stem="imagenet"),
        optim=OptimConfig(constant_predictor_lr=True, clip_norm=1.0),
    ),
}


def tuned(method: MethodName, dataset: str) -> RunConfig:
    """Returns the CIFAR-10 settings of a method's authors, or of a library that reproduces it, with Table 2's heads.

    CIFAR-100 and TinyImageNet use the same settings, as solo-learn does for CIFAR-100.

    Raises:
        ValueError: there are no published settings for the data set or the method.
    """
    names = ", ".join(name for name, source in SOURCES.items() if source.tuned)
    require(source_of(dataset).tuned, f"recipe tuned is for {names}, not {dataset!r}; take --recipe quick or paper")
    require(method in TUNED, f"recipe tuned has no settings of {method!r}; take --recipe paper, or add a row to TUNED")
    return replace(TUNED[method], method=method, dataset=dataset, recipe="tuned")


def quick(method: MethodName, dataset: str) -> RunConfig:
    """Returns a small configuration that shows within minutes, on two CPU cores, that a method learns.

    Temperature, learning rate and jitter were chosen on 800 held-out training images of mnist5k (docs/lab/results.md).
    """
    view = view_of("quick", dataset)
    source = source_of(dataset)
    return RunConfig(
        method=method,
        dataset=dataset,
        recipe="quick",
        data=source.quick_data,
        view=view,
        model=ModelConfig(width=16, projector_width=512, predictor_width=128),
        objective=ObjectiveConfig(temperature=0.2, ema_momentum=0.95, queue_size=1024),
        optim=OptimConfig(epochs=source.quick_epochs, lr=0.1, warmup_epochs=0.5),
    )


RECIPES: dict[RecipeName, Callable[[MethodName, str], RunConfig]] = {"paper": paper, "tuned": tuned, "quick": quick}
