"""Run directories without a training: random weights and statistics, with the files that an export reads."""

import json
from pathlib import Path
from typing import Any

import torch

from mnclglf.api import run_config
from mnclglf.config import to_dict
from mnclglf.methods import Method
from mnclglf.models.batch_norm import batch_norms
from mnclglf.runs.checkpoint import save_checkpoint
from mnclglf.runs.files import write_json
from mnclglf.training.start import build_method

MEAN, STD = torch.tensor([0.1, 0.25, 0.4]), torch.tensor([0.2, 0.3, 0.45])


def make_run(folder: Path, *, step: int = 4, seed: int = 0, **settings: Any) -> tuple[Path, Method]:
    """Makes the run directory of a tiny network; returns it and the method in its checkpoint.

    Args:
        folder: the run directory; may hold a run of the same settings, which gets another checkpoint.
        step: step of the checkpoint; an epoch has four.
        seed: seed of the weights in the checkpoint, not of the run.
        settings: settings as of mnclglf.train.
    """
    tiny: dict[str, Any] = dict(
        method="mnclglf", dataset="digits", recipe="quick", image_size=8, width=2, projector_width=16,
        predictor_width=8, queue_size=64, batch_size=64, classes=3,
    )  # fmt: skip
    config = run_config(tiny | settings)
    method = build_method(config, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():  # momentum and online networks differ then, as after a training
        change = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data += change if parameter.ndim == 1 else parameter.data * change  # features stay near 1
    for layer in batch_norms(method):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean += 0.1 * torch.randn(layer.num_features, generator=generator)
        layer.running_var *= 0.5 + torch.rand(layer.num_features, generator=generator)
    write = folder / "checkpoints"
    write.mkdir(parents=True, exist_ok=True)
    values = to_dict(config)
    write_json(folder / "config.json", values)
    side = config.data.image_size
    state = {"config": json.dumps(values), "method": method.state_dict(), "mean": MEAN, "std": STD, "side": side}
    save_checkpoint(write, step, {**state, "steps_per_epoch": 4})
    return folder, method
