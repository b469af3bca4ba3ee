"""Tests of the Python API from a user's side."""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

import mnclglf
import mnclglf.api
from mnclglf.data.datasets import load_dataset
from mnclglf.data.splits import split_train
from mnclglf.runs.checkpoint import find_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY: dict[str, Any] = dict(
    method="simsiam", dataset="digits", recipe="quick", epochs=1, batch_size=64, train_images=128, image_size=8,
    width=2, projector_width=16, predictor_width=8, device="cpu", precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> mnclglf.Run:
    return mnclglf.train(out=tmp_path_factory.mktemp("api") / "run", **TINY)


def test_train_evaluate_load(run: mnclglf.Run) -> None:
    config = json.loads((run.path / "config.json").read_text())
    assert (config["method"], config["optim"]["epochs"], config["model"]["width"]) == ("simsiam", 1, 2)
    assert config["view"]["rotation_degrees"] == 15.0  # of the recipe for digits
    found = mnclglf.evaluate(run, "knn", neighbors=5, device="cpu")
    assert {result.settings["k"] for result in found} == {5}
    assert mnclglf.evaluate(str(run.path), device="cpu")[0].settings["k"] == 20
    assert (run.path / "report.html").exists()


def test_the_encoder_is_in_eval_mode_with_the_runs_normalization(run: mnclglf.Run) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    encoder = mnclglf.load_encoder(run)
    assert isinstance(encoder.mean, Tensor)
    assert isinstance(encoder.std, Tensor)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in encoder.modules())
    config = mnclglf.RunConfig(dataset="digits", data=mnclglf.DataConfig(train_images=128))
    mean, std = split_train(load_dataset("digits")[0], config.data)[0].statistics()
    assert encoder.mean.flatten().tolist() == mean.tolist()
    assert encoder.std.flatten().tolist() == std.tolist()
    assert (encoder.side, encoder.features) == (8, 16)
    environment = json.loads((run.path / "environment.json").read_text())
    assert (environment["mean"], environment["std"]) == (mean.tolist(), std.tolist())
    with torch.no_grad():
        features = encoder((torch.rand(3, 3, 8, 8) - encoder.mean) / encoder.std)
    assert features.shape == (3, encoder.features)


def without_normalization(run: mnclglf.Run, folder: Path) -> Path:
    """Copies the run with an earlier version's checkpoint, without mean, std and side."""
    shutil.copytree(run, folder)
    checkpoint = find_checkpoint(folder, "auto")
    assert checkpoint is not None
    state = torch.load(checkpoint, weights_only=True)
    for name in ("mean", "std", "side"):
        del state[name]
    torch.save(state, checkpoint)
    return folder


def test_a_former_run_takes_the_normalization_of_its_views_and_says_so(run: mnclglf.Run, tmp_path: Path) -> None:
    expected, former = mnclglf.load_encoder(run), without_normalization(run, tmp_path / "former")
    with pytest.warns(UserWarning, match=r"views\.npz"):
        encoder = mnclglf.load_encoder(former)
    for name in ("mean", "std"):
        assert torch.equal(encoder.get_buffer(name), expected.get_buffer(name))
    assert encoder.side == expected.side
    (former / "views.npz").unlink()
    with pytest.raises(ValueError, match=r"views\.npz.*missing.*train again"):
        mnclglf.load_encoder(former)


def test_a_former_checkpoint_resumes(run: mnclglf.Run, tmp_path: Path) -> None:
    former = without_normalization(run, tmp_path / "former")
    assert mnclglf.train(out=former, **TINY).path == former


def test_torchvision_takes_the_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = TINY | dict(
        width=64, stem="imagenet", image_size=16, train_images=64, batch_size=32, projector_width=8
    )
    encoder = mnclglf.load_encoder(mnclglf.train(out=tmp_path / "run", **settings))
    network = torchvision.models.resnet18().eval().to(memory_format=torch.channels_last)  # as the encoder lies
    keys = network.load_state_dict(encoder.state_dict(), strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []
    network.set_submodule("fc", torch.nn.Identity())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), encoder(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epoch": 2}, r"'epoch'.*did you mean.*epochs"),
        ({"methd": "byol"}, r"'methd'.*did you mean.*method"),
        ({"method": "byoll"}, r"method 'byoll'.*byol"),
        ({"recipe": "qick"}, r"recipe 'qick'.*quick"),
        ({"dataset": "mnist"}, r"dataset 'mnist'"),
        ({"config": mnclglf.RunConfig(), "epochs": 2}, r"epochs.*both given.*dataclasses\.replace"),
    ],
)
def test_wrong_settings_are_named_with_a_remedy(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mnclglf.train(**settings)


def test_wrong_evaluations_are_named_with_a_remedy(run: mnclglf.Run) -> None:
    with pytest.raises(ValueError, match=r"'lars' is none of knn, linear, logistic"):
        mnclglf.evaluate(run, "lars")  # pyright: ignore[reportArgumentType]  # a wrong name
    with pytest.raises(ValueError, match=r"'neighbours'.*did you mean neighbors"):
        mnclglf.evaluate(run, "knn", neighbours=3)


def test_no_public_function_shares_a_submodules_name() -> None:
    for module in pkgutil.walk_packages(mnclglf.__path__, "mnclglf."):
        if module.name != "mnclglf.__main__":
            importlib.import_module(module.name)
    assert set(mnclglf.__all__).isdisjoint(module.name for module in pkgutil.iter_modules(mnclglf.__path__))
    for name in ("train", "evaluate", "load_encoder", "export"):
        assert callable(getattr(mnclglf, name))
    with pytest.raises(AttributeError, match=r"'fit'.*train"):
        _ = mnclglf.fit


def test_importing_costs_no_torch_until_one_is_used() -> None:
    code = "import sys, mnclglf, mnclglf.cli; mnclglf.RunConfig(); assert 'torch' not in sys.modules; mnclglf.train; "
    code += "assert 'torch' in sys.modules"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_numbers_of_numpy_are_taken_as_those_of_python() -> None:
    config = mnclglf.api.run_config({"dataset": "digits", "epochs": np.int64(3), "lr": np.float32(0.5)})
    assert (type(config.optim.epochs), type(config.optim.lr)) == (int, float)
    assert (config.optim.epochs, config.optim.lr) == (3, 0.5)
    with pytest.raises(ValueError, match=r"epochs 2\.5 .*whole"):
        mnclglf.api.run_config({"dataset": "digits", "epochs": np.float64(2.5)})
