"""Weights that an encoder starts from: those of another run, of a file, or torchvision's pretrained ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mnclglf.config import TORCHVISION, ModelConfig, require
from mnclglf.methods import Method
from mnclglf.models.encoder import Encoder
from mnclglf.runs.checkpoint import find_checkpoint, load_state
from mnclglf.runs.files import open_file
from mnclglf.runs.torch_file import NotPlainError, check_archive, load_plain

COUNTER = "num_batches_tracked"  # of batch norms, which ours do not count
CLASSIFIERS = ("fc", "classifier", "head", "head_dist")  # modules of torchvision's and timm's networks, after pooling
MOST_NAMED = 5


def load_initial_weights(method: Method, model: ModelConfig) -> dict[str, Any] | None:
    """Loads the weights that `model.init` names into every encoder of a method; all or nothing is changed.

    A momentum network starts from them too.

    Returns:
        Their source, the names that were taken and those that were left out (a classifier and counts of batches), for
        the run's record; None without `init`.

    Raises:
        UsageError: there is no such run or file, or a name is missing or unexpected, or a shape differs; the message
            names them.
    """
    if model.init is None:
        return None
    source, weights = read_weights(model.init, model)
    taken, left_out = fitting(method.encoder, weights, source)
    with torch.no_grad():
        for encoder in method.encoders():
            for name, value in published_state(encoder).items():
                value.copy_(weights[name])
    return {"source": source, "taken": taken, "left_out": left_out}


def describe_initial_weights(record: Mapping[str, Any]) -> str:
    """Returns a line about the weights that were loaded."""
    left_out = ", ".join(name for name in record["left_out"] if not name.endswith(COUNTER))
    text = f"initial weights: {len(record['taken'])} tensors of {record['source']}"
    return f"{text}; left out: {left_out}" if left_out else text


def published_state(encoder: Encoder) -> dict[str, Tensor]:
    """Returns parameters and running statistics of an encoder by the names of the library that it comes from."""
    return {name: x for name, x in encoder.published.state_dict().items() if not name.endswith(COUNTER)}


def read_weights(init: str, model: ModelConfig) -> tuple[str, dict[str, Tensor]]:
    """Returns where weights come from, in words, and the weights by torchvision's or timm's names."""
    if init == TORCHVISION:
        return torchvision_weights(model.encoder)
    path = Path(init).expanduser()
    require(path.exists(), f"init {path}: there is no such run or file; give a run directory, a file or torchvision")
    if path.is_dir():
        checkpoint, weights = run_weights(path, model)
        return str(Path(init) / checkpoint.relative_to(path)), weights
    kinds = {".safetensors": read_safetensors, ".pt": read_pickle, ".pth": read_pickle}
    require(path.suffix in kinds, f"init {path} is no .safetensors and no .pt file; save the state_dict as one of them")
    return init, kinds[path.suffix](path)


def run_weights(run: Path, model: ModelConfig) -> tuple[Path, dict[str, Tensor]]:
    """Returns the newest checkpoint of a run, and its online encoder's weights."""
    checkpoint = find_checkpoint(run, "auto")  # once: a run that still trains writes newer ones
    config, state = load_state(run, checkpoint)
    assert checkpoint is not None, "load_state has read it"
    asked, found = model.encoder, config.model.encoder
    require(asked == found, f"init {run} has the encoder {found}, and this run {asked}; give --encoder {found}")
    weights = {
        name.removeprefix("encoder.").removeprefix("network."): x
        for name, x in state["method"].items()
        if name.startswith("encoder.")
    }
    return checkpoint, weights


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"init {path} needs the package safetensors; pip install safetensors") from error
    try:
        open_file(path).close()  # refuses a pipe, for whose writer load_file would wait
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"init {path} cannot be read ({error}); give another file") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Reads a state_dict that torch.save wrote; runs no code from the file."""
    try:
        with open_file(path) as file:
            check_archive(file, checksums=True)
            found: object = load_plain(file)
    except NotPlainError as error:
        raise ValueError(
            f"init {path} holds more than tensors ({error}); save a state_dict alone, by torch.save"
        ) from error
    except Exception as error:  # a damaged file raises anything: OSError, zlib.error, KeyError, ...
        raise ValueError(f"init {path} cannot be read ({error}); give another file") from error
    require(isinstance(found, dict), f"init {path} holds a {type(found).__name__}; save a state_dict, by torch.save")
    entries = cast("dict[object, object]", found)
    others = [str(name) for name, x in entries.items() if not isinstance(x, Tensor)]
    require(not others, f"init {path} holds {shown(others)}, which are no tensors; save the state_dict alone")
    return {str(name): x for name, x in entries.items() if isinstance(x, Tensor)}


def torchvision_weights(name: str) -> tuple[str, dict[str, Tensor]]:
    """Returns torchvision's newest pretrained weights, from torch.hub's cache or the network.

    Raises:
        RuntimeError: they cannot be downloaded.
    """
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name)["DEFAULT"]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; another hash is a RuntimeError
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise RuntimeError(
            f"init torchvision: {weights.url} cannot be downloaded ({error}); put that file into {folder}, or give a "
            "file as --init"
        ) from error
    return f"torchvision, {weights}", dict(state)


def fitting(encoder: Encoder, weights: Mapping[str, Tensor], source: str) -> tuple[list[str], list[str]]:
    """Returns the names that an encoder takes, and those that it leaves out.

    Raises:
        UsageError: a name is missing or unexpected, a shape differs, or a value is not finite.
    """
    own = published_state(encoder)
    left_out = [x for x in weights if x not in own and (x.endswith(COUNTER) or x.split(".")[0] in CLASSIFIERS)]
    shapes = {
        name: f"{name} {tuple(weights[name].shape)} for {tuple(x.shape)}"
        for name, x in own.items()
        if name in weights and weights[name].shape != x.shape
    }
    problems = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own and name not in left_out],
        "of another shape": [*shapes.values()],
        "not finite": [name for name in own if name in weights and not weights[name].isfinite().all()],
    }
    found = "; ".join(f"{what}: {shown(names)}" for what, names in problems.items() if names)
    require(not found, f"init {source} does not fit the encoder ({found}); check --encoder, --stem and --width")
    return [*own], sorted(left_out)


def shown(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
