"""The networks that an export holds, and what is said of them in every file."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mnclglf.config import TIMM, RunConfig, require, short_name, to_dict
from mnclglf.exporting.formats import NETWORKS, NetworkName
from mnclglf.methods import METHODS, Method
from mnclglf.models.batch_norm import batch_norms
from mnclglf.models.encoder import Encoder

KIND = "mnclglf export"
VERSION = 1
HEADS = ("projector", "predictor", "classifier")
"""Attributes of a method that hold its heads, in the order in which features go through them."""
NOT_OF_ENCODERS = ("projector_width", "predictor_width", "classes", "sync_batch_norm")
"""Settings of the model that are of its heads, or of its training alone."""
OF_RESNETS = ("stem", "width")
"""Settings of the model that a model of timm has no use for."""
PLACES = ("data_dir", "download", "loader", "loader_threads")
"""Settings that say where the images lay and who read them, which means nothing elsewhere."""
TOLERANCE = 1e-5
"""Largest difference between the module and what was exported, of features of up to 1, else relative to the largest:
batch norms folded into convolutions and another order of sums give 1e-7 to 4e-6."""


class ExportError(RuntimeError):
    """An export cannot be made; the message says why and, where there is one, the remedy."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Networks to export, on the CPU in fp32 and evaluation mode. F feature width."""

    encoder: nn.Module
    """Maps [n, 3, side, side] to features [n, F]."""
    published: nn.Module
    """The encoder's network, whose parameters have the names of the library that it comes from."""
    heads: dict[str, nn.Module]
    """Projector, predictor or classifier: each takes the result of the one before, the first one features [n, F]."""
    features: int
    """F."""
    side: int
    """Side in pixels of the images that the encoder was trained on."""


class Heads(nn.Module):
    """The heads one after the other, as one module from features [n, F] to the result of each."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(dict(heads))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for head in self.heads.values():
            features = head(features)
            results.append(features)
        return tuple(results)


def networks_of(method: Method, network: NetworkName, side: int, *, head: bool) -> Exported:
    """Returns the networks of a trained method that are to be exported; the method is used up.

    Args:
        method: a method with trained weights, on the CPU.
        network: "online" is the one that is evaluated, "momentum" its moving average.
        side: side of the images in pixels.
        head: whether to export the heads: projector and predictor, or the classifier of a supervised method.

    Raises:
        UsageError: the method has no momentum network.
        ExportError: a weight is not finite.
    """
    require(network in NETWORKS, f"network {network!r} is none of {', '.join(NETWORKS)}")
    if network == "momentum":
        name = next(name for name, kind in METHODS.items() if type(method) is kind)
        require(hasattr(method, "momentum"), f"network momentum: {name} has none; take the online network")
        encoder, projector = cast("tuple[Encoder, nn.Module]", tuple(method.momentum.children()))
        heads = {"projector": projector}  # the predictor is the online network's alone
    else:
        encoder = method.encoder
        heads = {name: getattr(method, name) for name in HEADS if hasattr(method, name)}
    for module in (encoder, *heads.values()):
        plain(module)
    return Exported(
        encoder=encoder,
        published=encoder.published,
        heads=heads if head else {},
        features=encoder.features,
        side=side,
    )


def plain(module: nn.Module) -> None:
    """Puts a module into evaluation mode, with contiguous weights and the state of PyTorch's own batch norms.

    Raises:
        ExportError: a weight or a statistic is not finite.
    """
    module.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]  # torch's stub lacks it
    for layer in batch_norms(module):  # training counts no batches here, and PyTorch's state has the count
        layer.num_batches_tracked = torch.tensor(0)
    for name, value in module.state_dict().items():
        if not value.isfinite().all():
            raise ExportError(f"{name} is not finite, so its features would not be; export an earlier --checkpoint")


def facts_of(exported: Exported, config: RunConfig, state: Mapping[str, Any], network: NetworkName) -> dict[str, Any]:
    """Returns what an export says of itself, as plain JSON types.

    Args:
        exported: the networks.
        config: settings of the run.
        state: content of the checkpoint, with mean and std.
        network: network of the method.
    """
    settings = to_dict(config)
    del settings["engine"]  # changes no result
    settings["dataset"] = short_name(config.dataset)  # the path of a folder is nobody's business
    settings["data"] = {name: value for name, value in settings["data"].items() if name not in PLACES}
    left_out = (*NOT_OF_ENCODERS, *(OF_RESNETS if config.model.encoder.startswith(TIMM) else ()))
    model = {name: value for name, value in settings["model"].items() if name not in left_out}
    steps = state.get("steps_per_epoch")
    return {
        "kind": KIND,
        "version": VERSION,
        "made_by": {"mnclglf": installed_version(), "torch": torch.__version__},
        "encoder": {
            "class": type(exported.published).__name__,
            **model,
            "features": exported.features,
            "parameters": sum(parameter.numel() for parameter in exported.encoder.parameters()),
        },
        "heads": list(exported.heads),
        "trained": {
            **{name: settings[name] for name in ("method", "dataset", "recipe", "seed")},
            "network": network,
            "step": state["step"],
            "epoch": state["step"] / steps if steps else None,
        },
        "preprocessing": preprocessing(exported.side, state["mean"], state["std"]),
        "settings": settings,
    }


def preprocessing(side: int, mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Returns how a picture becomes the encoder's input, as the evaluations do it: numbers, and each step in words.

    Args:
        side: side of the input in pixels.
        mean: [3], of images in [0, 1].
        std: [3], likewise.
    """
    return {
        "side": side,
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
        "input": f"float32 [n, 3, {side}, {side}], RGB",
        "steps": [
            "decode to uint8 RGB, upright by its EXIF orientation, without alpha",
            f"resize the shorter side to {side} pixels: bicubic, antialiased, on uint8",
            f"crop the center square of {side} x {side} pixels",
            "divide by 255",
            "subtract mean and divide by std, per channel",
        ],
    }


def header(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the header of a file carries: JSON text by name."""
    shown = {name: facts["preprocessing"][name] for name in ("mean", "std", "side")}
    shown |= {name: facts[name] for name in ("preprocessing", "encoder", "heads", "trained", "made_by")}
    return {name: json.dumps(value) for name, value in shown.items()}


def installed_version() -> str | None:
    """Returns the version of mnclglf; None where it is not installed."""
    try:
        return importlib.metadata.version("mnclglf")
    except importlib.metadata.PackageNotFoundError:
        return None


def sample(exported: Exported, count: int) -> Tensor:
    """Returns `count` normalized images of noise, [count, 3, side, side], the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, exported.side, exported.side, generator=generator)


def check_same(what: str, found: Tensor, expected: Tensor) -> None:
    """Raises ExportError unless two results are the same to TOLERANCE."""
    if found.shape == expected.shape:
        error = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        if error <= TOLERANCE:  # false also for NaN
            return
        what = f"{what} differs from the module's by {error:.2g}, more than {TOLERANCE:g}"
    else:
        what = f"{what} has the shape {tuple(found.shape)} and the module's {tuple(expected.shape)}"
    raise ExportError(f"{what}; nothing was written. Export without this format, and report this with your versions")
