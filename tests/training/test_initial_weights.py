"""--init: weights of a file, of another run, of torchvision."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from made_runs import make_run
from safetensors.torch import save_file
from torch import Tensor
from training.test_loop import CONFIG, final_state, own_cache, printed, silent  # noqa: F401

import mnclglf
from mnclglf.config import ModelConfig, RunConfig, UsageError, with_whole_paths
from mnclglf.methods import Method
from mnclglf.runs.checkpoint import CheckpointError, checkpoint_path, list_checkpoints
from mnclglf.training import initial_weights
from mnclglf.training.initial_weights import describe_initial_weights, load_initial_weights
from mnclglf.training.loop import Trainer
from mnclglf.training.start import build_method

HEADS: dict[str, Any] = dict(projector_width=8, predictor_width=4)
IMAGENET = ModelConfig(stem="imagenet", **HEADS)


def method_of(model: ModelConfig, name: str = "byol") -> Method:
    return build_method(RunConfig(method=name, model=model), torch.float32)


def loaded(model: ModelConfig, init: Path | str, name: str = "byol") -> tuple[Method, dict[str, Any]]:
    method = method_of(model, name)
    record = load_initial_weights(method, replace(model, init=str(init)))
    assert record is not None
    return method, record


def state_of(name: str = "resnet18") -> dict[str, Tensor]:
    torch.manual_seed(5)
    return dict(torchvision.models.get_model(name, weights=None).state_dict())


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


@pytest.mark.parametrize(
    ("suffix", "save"), [(".safetensors", save_safetensors), (".pt", torch.save), (".pth", torch.save)]
)
def test_a_file_of_torchvision_s_weights_goes_into_every_encoder(
    suffix: str, save: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    path, state = tmp_path / f"some [weights] é{suffix}", state_of()
    save(state, path)
    method, record = loaded(IMAGENET, path)
    assert len(method.encoders()) == 2
    for encoder in method.encoders():
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, state[name]), name
    assert sorted(record["taken"]) == sorted(method.encoder.state_dict())
    assert {name for name in record["left_out"] if "num_batches" not in name} == {"fc.weight", "fc.bias"}
    json.dumps(record)  # it is kept in environment.json
    line = describe_initial_weights(record)
    assert f"{len(record['taken'])} tensors of {path}" in line
    assert "left out: fc.bias, fc.weight" in line
    assert "num_batches" not in line


def test_an_exported_model_of_timm_goes_into_every_encoder(tmp_path: Path) -> None:
    run, trained = make_run(tmp_path / "run", encoder="timm:test_efficientnet", method="byol")
    expected = {name: x.clone() for name, x in trained.encoder.state_dict().items()}
    file = mnclglf.export(run, formats=["safetensors"]) / "encoder.safetensors"
    method, record = loaded(ModelConfig(encoder="timm:test_efficientnet", **HEADS), file)
    assert len(record["taken"]) == len(expected)
    for encoder in method.encoders():
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    state = {name: x.half() if x.is_floating_point() else x for name, x in state_of().items()}
    torch.save(state, tmp_path / "x.pt")
    method, _ = loaded(IMAGENET, tmp_path / "x.pt")
    weight = method.get_parameter("encoder.conv1.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["conv1.weight"].float())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_a_file_of_timm_s_weights(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = timm.create_model(name)  # with its classifier
    save_file(dict(network.state_dict()), tmp_path / "x.safetensors")
    method, record = loaded(
        ModelConfig(encoder=f"timm:{name}", **HEADS), tmp_path / "x.safetensors", "mnclglf_official"
    )
    images = torch.randn(2, 3, 160, 160)
    expected = cast(Any, network.eval()).forward_head(cast(Any, network).forward_features(images), pre_logits=True)
    for encoder in method.encoders():
        torch.testing.assert_close(encoder.eval()(images), expected)
    assert any(x.split(".")[0] in ("head", "classifier") for x in record["left_out"])


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda x: x.pop("layer1.0.conv1.weight"), r"missing: layer1\.0\.conv1\.weight"),
    "unexpected": (lambda x: x.update(extra=torch.ones(1)), "unexpected: extra"),
    "prefixed": (
        lambda x: [x.update({f"module.{name}": x.pop(name)}) for name in [*x]],
        "missing: conv1.weight.* and .* more; unexpected: module.conv1.weight",
    ),
    "shape": (
        lambda x: x.update({"conv1.weight": torch.ones(64, 3, 3, 3)}),
        r"conv1\.weight \(64, 3, 3, 3\) for \(64, 3, 7, 7\)",
    ),
    "nan": (lambda x: x["bn1.bias"].fill_(torch.nan), r"not finite: bn1\.bias"),
}


@pytest.mark.parametrize(("change", "fault"), FAULTS.values(), ids=FAULTS)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(
    change: Callable[[dict[str, Any]], object], fault: str, tmp_path: Path
) -> None:
    state = state_of()
    change(state)
    torch.save(state, tmp_path / "x.pt")
    method = method_of(IMAGENET)
    before = {name: x.clone() for name, x in method.state_dict().items()}
    with pytest.raises(UsageError, match=f"{fault}.*--encoder"):
        load_initial_weights(method, replace(IMAGENET, init=str(tmp_path / "x.pt")))
    for name, x in method.state_dict().items():
        assert torch.equal(x, before[name])


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harm"),))


def test_files_that_are_no_state_dict_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state_of(), "epoch": 3}, tmp_path / "wrapped.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"x": Harmful()}, tmp_path / "harm.pt")
    for name in ("damaged.pt", "damaged.safetensors", "weights.onnx"):
        (tmp_path / name).write_bytes(b"nothing")
    for name in ("pipe.pt", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)  # reading one would wait for a writer
    for name, fault in {
        "pipe.pt": "cannot be read",
        "pipe.safetensors": "cannot be read",
        "wrapped.pt": "state_dict, epoch.*alone",
        "list.pt": "holds a list",
        "harm.pt": "more than tensors",
        "damaged.pt": "cannot be read",
        "damaged.safetensors": "cannot be read",
        "weights.onnx": "no .safetensors",
        "none.pt": "no such run or file",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*{fault}"):
            loaded(IMAGENET, tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_torchvision_s_weights_come_from_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(state_of(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")  # the name in torchvision's address
    method, record = loaded(IMAGENET, "torchvision")
    assert torch.equal(method.get_parameter("encoder.conv1.weight"), state_of()["conv1.weight"])
    assert record["source"] == "torchvision, ResNet18_Weights.IMAGENET1K_V1"


def test_without_a_network_the_place_of_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(RuntimeError, match=rf"resnet18-f37072fd.pth.*no route.*put that file into {tmp_path}"):
        loaded(IMAGENET, "torchvision")


@pytest.mark.parametrize(
    "settings", [dict(stem="cifar"), dict(stem="imagenet", width=8), dict(stem="imagenet", encoder="timm:test_vit")]
)
def test_torchvision_s_weights_are_refused_where_they_cannot_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"init torchvision .*give"):
        RunConfig(model=ModelConfig(init="torchvision", **settings))


def test_a_run_starts_from_another_and_does_not_load_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    Trainer(CONFIG, first, console=silent()).train()
    monkeypatch.chdir(tmp_path)
    config = with_whole_paths(replace(CONFIG, method="simsiam", model=replace(CONFIG.model, init="first")))
    assert config.model.init == str(first)
    console = silent()
    run = Trainer(config, out, console=console)
    for name, value in final_state(first)["method"].items():
        if name.startswith("encoder."):
            assert torch.equal(run.method.state_dict()[name], value), name
    run.train()
    assert f"initial weights: {len(run.method.encoder.state_dict())} tensors of {first}" in printed(console)
    record = json.loads((out / "environment.json").read_text())["initial_weights"]
    assert record["source"].startswith(str(first / "checkpoints"))
    first.rename(tmp_path / "moved")  # it is not read again
    again = silent()
    Trainer(config, out, console=again).train()
    assert "initial weights" not in printed(again)
    assert json.loads((out / "environment.json").read_text())["initial_weights"] == record
    with pytest.raises(CheckpointError, match=r"model\.init"):
        Trainer(replace(config, model=replace(config.model, init=None)), out, console=silent())


def test_the_checkpoint_that_was_read_is_recorded_though_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(CONFIG, tmp_path / "first", console=silent()).train()
    (*_, (step, newest)) = list_checkpoints(tmp_path / "first/checkpoints")
    load = initial_weights.load_state

    def load_while_the_run_trains(*arguments: Any) -> Any:
        found = load(*arguments)
        shutil.copy(newest, checkpoint_path(newest.parent, step + 1))
        return found

    monkeypatch.setattr(initial_weights, "load_state", load_while_the_run_trains)
    _, record = loaded(CONFIG.model, tmp_path / "first")
    assert record["source"] == str(newest)


def test_a_run_of_another_encoder_is_named(tmp_path: Path) -> None:
    Trainer(CONFIG, tmp_path / "first", console=silent()).train()
    with pytest.raises(UsageError, match="encoder resnet18, and this run resnet34; give --encoder resnet18"):
        loaded(replace(CONFIG.model, encoder="resnet34"), tmp_path / "first")
    with pytest.raises(UsageError, match=r"conv1.weight \(2, 3, 3, 3\) for \(4, 3, 3, 3\).*--width"):
        loaded(replace(CONFIG.model, width=4), tmp_path / "first")
