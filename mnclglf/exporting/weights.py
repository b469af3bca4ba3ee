"""Weights in safetensors, by the names of torchvision or timm, and the model of these libraries that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models import get_model

from mnclglf.config import TIMM
from mnclglf.exporting.networks import Exported, ExportError, check_same, sample
from mnclglf.models.timm_encoder import TimmEncoder

RESNETS = ("resnet18", "resnet34", "resnet50")  # the same names in torchvision and timm


@dataclass(frozen=True)
class Twin:
    """Model of torchvision and of timm with the same parameters.

    Attributes:
        name: its name in both.
        small_stem: whether its stem has to be replaced, for small images: conv1 by a 3 x 3 convolution of stride 1, and
            maxpool by nothing.
    """

    name: str
    small_stem: bool

    def build(self) -> nn.Module:
        """Makes torchvision's model on the meta device, in evaluation mode, without its classifier."""
        with torch.device("meta"):
            network = get_model(self.name, weights=None)
            if self.small_stem:
                channels = len(network.get_parameter("bn1.weight"))
                network.set_submodule("conv1", nn.Conv2d(3, channels, 3, padding=1, bias=False))
                network.set_submodule("maxpool", nn.Identity())
            network.set_submodule("fc", nn.Identity())
        return network.eval()


@dataclass(frozen=True)
class TimmTwin:
    """Model of timm with the same parameters, which torchvision lacks.

    Attributes:
        name: its name in timm.
        options: what `create_model` is given besides `num_classes=0`.
    """

    name: str
    options: dict[str, Any]

    def build(self) -> nn.Module:
        """Makes timm's model on the CPU, in evaluation mode; the caller's random numbers stay as they are."""
        import timm  # an extra, which an encoder of timm has needed before

        with torch.random.fork_rng(devices=[]):  # not on the meta device: timm computes buffers that no file holds
            return timm.create_model(self.name, num_classes=0, **self.options).eval()


def candidates(encoder: nn.Module) -> list[Twin | TimmTwin]:
    """Returns the models that may give an encoder's features with its weights, the simplest to make first."""
    if not isinstance(encoder, TimmEncoder):
        return [Twin(name, small) for name in RESNETS for small in (False, True)]
    name = encoder.name.removeprefix(TIMM)
    # Without options the model takes images of one size only.
    return [TimmTwin(name, {}), *([TimmTwin(name, encoder.options)] if encoder.options else [])]


def find_twin(exported: Exported) -> Twin | TimmTwin | None:
    """Returns the model that gives the same features with the encoder's weights; None if there is none."""
    state, images = weights_of(exported.published), sample(exported, 2)
    with torch.inference_mode():
        expected = exported.encoder(images)
    for twin in candidates(exported.encoder):
        network = twin.build()
        if shapes(network.state_dict()) != shapes(state):
            continue
        network.load_state_dict(state, assign=True)
        with torch.inference_mode():
            try:
                check_same("", network(images), expected)
            except ExportError:  # the same parameters, put together in another way
                continue
            except Exception:  # a model of timm raises any kind of error for a size that it is not made for
                if isinstance(twin, Twin):
                    raise
                continue
        return twin
    return None


def loads_in(encoder: nn.Module, settings: Mapping[str, object], twin: Twin | TimmTwin | None) -> str:
    """Returns the words that say where the weights load, or why they load nowhere.

    Args:
        encoder: the encoder.
        settings: its settings, such as stem and width.
        twin: result of `find_twin`.
    """
    if isinstance(twin, TimmTwin):
        made = "".join(f", {name}={value}" for name, value in twin.options.items())
        return f'loads strictly in timm\'s {twin.name}: timm.create_model("{twin.name}", num_classes=0{made})'
    if twin is not None and not twin.small_stem:
        return f"loads strictly in torchvision's and timm's {twin.name}"
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    if twin is not None:
        return (
            f"loads strictly in torchvision's and timm's {twin.name} after two lines, which README.md has: the stem "
            f"({chosen}) is in no model of theirs"
        )
    nowhere = f"loads in no model of torchvision and timm ({chosen})"
    if isinstance(encoder, TimmEncoder):
        return f"{nowhere}: timm's model gives other features with these weights"
    theirs = shapes(Twin(RESNETS[0], False).build().state_dict())
    ours = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    # From the last layer, as it is the width that rules a model out, not the stem.
    name = next((name for name in reversed(ours) if name in theirs and ours[name] != theirs[name]), None)
    what = "the parts differ" if name is None else f"{name} is {[*ours[name]]}, and {[*theirs[name]]} in {RESNETS[0]}"
    return f"{nowhere}: {what}"


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor by name."""
    return {name: tuple(value.shape) for name, value in state.items()}


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a module's parameters and statistics by name, contiguous."""
    return {name: value.detach().contiguous() for name, value in module.state_dict().items()}


def write_weights(module: nn.Module, path: Path, header: Mapping[str, str]) -> None:
    """Writes a module's weights with a header, and reads them back.

    Raises:
        OSError: the file cannot be written.
        ExportError: what was written is not what is there.
    """
    state = weights_of(module)
    path.write_bytes(save(state, {"format": "pt", **header}))
    written = load_file(path)
    if written.keys() != state.keys() or not all(torch.equal(written[name], state[name]) for name in state):
        raise ExportError(f"{path.name} does not hold the weights that were written; check the disk of {path.parent}")


def write_safetensors(exported: Exported, folder: Path, header: Mapping[str, str]) -> None:
    """Writes encoder.safetensors, and heads.safetensors if there are heads."""
    write_weights(exported.published, folder / "encoder.safetensors", header)
    if exported.heads:
        write_weights(nn.ModuleDict(exported.heads), folder / "heads.safetensors", header)
