"""Encoders from timm, whose batch norms are replaced by ones that take statistics per view."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]  # the base of all of them

from mnclglf.config import TIMM, require
from mnclglf.models.batch_norm import BatchNorm, Views, without_batch_counters
from mnclglf.models.encoder import Encoder


class InBatch:
    """The views in the batch of a forward, as the batch norms of a network read them.

    timm's modules pass on nothing but images.
    """

    views: Views | int = 1


class PerViewBatchNorm(BatchNorm):
    """A batch norm in a network of timm, with the activation that timm's BatchNormAct2d applies."""

    def __init__(self, layer: _BatchNorm, batch: InBatch) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum)
        self.weight, self.bias = layer.weight, layer.bias  # a model may start with weights of 0
        self.act: Any = getattr(layer, "act", nn.Identity())
        self.batch = batch

    def forward(self, input: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if input.dim() == 3:  # [V * N, C, L] of a BatchNorm1d
            return self.forward(input.unsqueeze(-1)).squeeze(-1)
        return self.act(super().forward(input, self.batch.views))


class TimmEncoder(Encoder):
    """A model of timm without its classifier, from images to its pooled features, with random weights.

    `network` has timm's names. It is made without dropout and drop path. Position embeddings are interpolated, where
    the model can do that, to the images of each forward; the patches of a view are smaller than the view.

    Args:
        name: timm's name of the model, without a tag.

    Attributes:
        name: `timm:` and timm's name of the model.
        network: timm's model.
        options: what timm's `create_model` was given besides `num_classes=0`.

    Raises:
        UsageError: timm has no such model, or the model draws random numbers, or has a norm that cannot take its
            statistics per view.
        ImportError: timm is not installed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = f"{TIMM}{name}"
        self.network, self.options = _create(name)
        self.features: int = getattr(self.network, "head_hidden_size", None) or self.network.num_features  # pyright: ignore
        self.interpolates = any("pos_embed" in path for path, _ in self.network.named_parameters())
        self.batch = InBatch()
        check_norms(self.name, self.network)
        check_random(self.name, self.network)
        for path, layer in [*self.network.named_modules()]:
            if isinstance(layer, _BatchNorm):
                self.network.set_submodule(path, PerViewBatchNorm(layer, self.batch))
        without_batch_counters(self)

    def forward(self, images: Tensor, views: Views | int = 1) -> Tensor:
        """Returns the features, [V * N, F], of V views that share a batch, one after the other."""
        self.batch.views = views
        return self.network(images)

    @property
    def published(self) -> nn.Module:
        return self.network


def _create(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns timm's model, and the options that it was made with."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"encoder {TIMM}{name} needs the package timm; pip install 'mnclglf[timm]'") from error
    known = timm.list_models()
    near = difflib.get_close_matches(name, known, n=3)
    require(
        name in known,
        f"encoder {TIMM}{name}: timm {timm.__version__} has no model {name!r}; "
        + (f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them, as convnext_tiny"),
    )
    options: dict[str, Any] = {"dynamic_img_size": True}
    try:
        return timm.create_model(name, num_classes=0, **options), options
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        return timm.create_model(name, num_classes=0), {}


def check_norms(name: str, network: nn.Module) -> None:
    """Raises UsageError for a layer of running statistics that PerViewBatchNorm cannot replace; names it."""
    from timm.layers.norm_act import BatchNormAct2d

    for path, layer in network.named_modules():
        kind = type(layer)
        replaced = kind in (nn.BatchNorm1d, nn.BatchNorm2d) or (
            kind is BatchNormAct2d and isinstance(layer.drop, nn.Identity)
        )
        if replaced:
            assert isinstance(layer, _BatchNorm)
            replaced = layer.affine and layer.momentum is not None
        has_statistics = isinstance(layer, _BatchNorm) or any("running_" in key for key, _ in layer._buffers.items())  # pyright: ignore
        require(
            replaced or not has_statistics,
            f"encoder {name}: its layer {path}, a {kind.__name__}, cannot take statistics per view; take a model with "
            "nn.BatchNorm2d, BatchNormAct2d or layer norms",
        )


def check_random(name: str, network: nn.Module) -> None:
    """Raises UsageError, which names the layer, for one that draws random numbers in train mode."""
    for path, layer in network.named_modules():
        for attribute in ("p", "drop_prob", "prob"):
            value = getattr(layer, attribute, None)
            random = "drop" in type(layer).__name__.lower() and isinstance(value, float) and value > 0
            require(
                not random,
                f"encoder {name}: its layer {path}, a {type(layer).__name__} of {attribute} {value}, draws random "
                "numbers, so that a step could not be repeated; take another model",
            )
