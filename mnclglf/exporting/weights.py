"""Weights in safetensors, by torchvision's names, and the model of torchvision and timm that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models import get_model

from mnclglf.exporting.networks import Exported, ExportError, check_same, sample

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


def find_twin(exported: Exported) -> Twin | None:
    """Returns the model that gives the same features with the encoder's weights; None if there is none."""
    state, images = weights_of(exported.encoder), sample(exported, 2)
    with torch.inference_mode():
        expected = exported.encoder(images)
    for twin in (Twin(name, small) for name in RESNETS for small in (False, True)):
        network = twin.build()
        if shapes(network.state_dict()) != shapes(state):
            continue
        network.load_state_dict(state, assign=True)
        with torch.inference_mode():
            try:
                check_same("", network(images), expected)
            except ExportError:  # the same parameters, put together in another way
                continue
        return twin
    return None


def loads_in(encoder: nn.Module, settings: Mapping[str, object], twin: Twin | None) -> str:
    """Returns the words that say where the weights load, or why they load nowhere.

    Args:
        encoder: the encoder.
        settings: its settings, such as stem and width.
        twin: result of `find_twin`.
    """
    if twin is not None and not twin.small_stem:
        return f"loads strictly in torchvision's and timm's {twin.name}"
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    if twin is not None:
        return (
            f"loads strictly in torchvision's and timm's {twin.name} after two lines, which README.md has: the stem "
            f"({chosen}) has no twin there"
        )
    theirs = shapes(Twin(RESNETS[0], False).build().state_dict())
    ours = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    # From the last layer, as it is the width that rules a twin out, not the stem.
    name = next((name for name in reversed(ours) if name in theirs and ours[name] != theirs[name]), None)
    what = "the parts differ" if name is None else f"{name} is {[*ours[name]]}, and {[*theirs[name]]} in {RESNETS[0]}"
    return f"has no twin in torchvision and timm ({chosen}): {what}"


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
    write_weights(exported.encoder, folder / "encoder.safetensors", header)
    if exported.heads:
        write_weights(nn.ModuleDict(exported.heads), folder / "heads.safetensors", header)
