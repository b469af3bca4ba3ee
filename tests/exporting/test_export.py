"""Tests of exports with the libraries that load them: torchvision, timm, onnxruntime, torch.export, safetensors."""

import json
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from made_runs import MEAN, STD, make_run
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import mnclglf
from mnclglf.exporting import formats, graphs
from mnclglf.exporting.networks import ExportError, check_same, networks_of
from mnclglf.exporting.weights import find_twin
from mnclglf.methods import METHODS
from mnclglf.runs.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-5)  # what an export promises, of features of about 1
TRAINED: dict[str, Any] = dict(
    method="simsiam", dataset="digits", recipe="quick", epochs=1, batch_size=32, train_images=64, image_size=16,
    width=64, projector_width=8, predictor_width=8, device="cpu", precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module", params=["cifar", "imagenet"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Makes an encoder of the usual width, of one stem by training; returns the stem, the run and its whole export."""
    run = tmp_path_factory.mktemp("trained") / "run"
    if request.param == "cifar":
        mnclglf.train(out=run, **TRAINED)
    else:
        make_run(run, stem="imagenet", width=64, image_size=16, method="simsiam", projector_width=8)
    return request.param, run, mnclglf.export(run, head=True)


def some_images(count: int, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side)


def features_of(run: Path, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return mnclglf.load_encoder(run)(images)


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_libraries_load_the_weights_strictly_and_give_the_same_features(
    trained: tuple[str, Path, Path], library: str
) -> None:
    stem, run, folder = trained
    network: Any = torchvision.models.resnet18() if library == "torchvision" else timm.create_model("resnet18")
    network.fc = nn.Identity()
    if stem == "cifar":
        network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    network.load_state_dict(load_file(folder / "encoder.safetensors"), strict=True)
    images = some_images(3)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), features_of(run, images), **CLOSE)
    said = json.loads((folder / "export.json").read_text())["encoder"]
    assert (said["torchvision"], said["small_stem"]) == ("resnet18", stem == "cifar")
    assert (said["timm"], said["timm_options"]) == ("resnet18", {})
    assert ("stem cifar" in said["loads_in"]) == (stem == "cifar")


def test_timm_reads_the_file_by_itself(trained: tuple[str, Path, Path]) -> None:
    stem, run, folder = trained
    if stem == "imagenet":  # the stem of timm's own resnet18
        path = str(folder / "encoder.safetensors")
        network = timm.create_model("resnet18", num_classes=0, checkpoint_path=path).eval()
        images = some_images(2)
        with torch.inference_mode():
            torch.testing.assert_close(network(images), features_of(run, images), **CLOSE)


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("test_vit", 32, {}),  # takes any side by itself
        ("vit_tiny_patch16_224", 32, {"dynamic_img_size": True}),  # is made for a side of 224
        ("test_efficientnet", 32, {}),
    ],
)
def test_timm_loads_the_weights_of_a_model_of_its_own(
    name: str, side: int, options: dict[str, Any], tmp_path: Path
) -> None:
    run, _ = make_run(tmp_path / "run", encoder=f"timm:{name}", image_size=side, method="byol")
    said = json.loads((mnclglf.export(run, formats=["safetensors"]) / "export.json").read_text())["encoder"]
    assert (said["timm"], said["timm_options"], said["torchvision"]) == (name, options, None)
    assert f"timm's {name}" in said["loads_in"]
    assert "stem" not in said
    network = timm.create_model(name, num_classes=0, **options).eval()
    network.load_state_dict(load_file(run / "export" / "encoder.safetensors"))
    images = some_images(3, side)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), features_of(run, images), **CLOSE)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_onnxruntime_and_torch_export_give_the_same_features_for_any_batch(
    trained: tuple[str, Path, Path], count: int
) -> None:
    _, run, folder = trained
    images = some_images(count)
    expected = features_of(run, images)
    (found,) = session_of(folder / "encoder.onnx").run(["features"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, **CLOSE)
    with torch.inference_mode():
        torch.testing.assert_close(torch.export.load(folder / "encoder.pt2").module()(images), expected, **CLOSE)


def test_every_file_carries_normalization_and_preprocessing(trained: tuple[str, Path, Path]) -> None:
    _, run, folder = trained
    encoder: Any = mnclglf.load_encoder(run)
    expected = {"mean": encoder.mean.flatten().tolist(), "std": encoder.std.flatten().tolist(), "side": 16}
    facts = json.loads((folder / "export.json").read_text())
    assert {name: facts["preprocessing"][name] for name in expected} == expected
    for name in ("encoder", "heads"):
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            weights = file.metadata()
        assert weights["format"] == "pt"  # by which transformers knows whose tensors they are
        model = onnx.load(folder / f"{name}.onnx")
        extra = {graphs.METADATA: ""}
        torch.export.load(folder / f"{name}.pt2", extra_files=extra)
        carried = [
            weights,
            {entry.key: entry.value for entry in model.metadata_props},
            json.loads(extra[graphs.METADATA]),
            session_of(folder / f"{name}.onnx").get_modelmeta().custom_metadata_map,
        ]
        for header in carried:
            assert {key: json.loads(header[key]) for key in expected} == expected
            assert json.loads(header["preprocessing"]) == facts["preprocessing"]


def test_graphs_are_of_standard_operators_without_pickles_and_paths(trained: tuple[str, Path, Path]) -> None:
    _, run, folder = trained
    for name in ("encoder", "heads"):
        model = onnx.load(folder / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert not model.functions
        program = torch.export.load(folder / f"{name}.pt2")
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert targets
        assert all(target.startswith("aten.") for target in targets)
        with zipfile.ZipFile(folder / f"{name}.pt2") as archive:
            contents = {member: archive.read(member) for member in archive.namelist()}
        # A pickle starts with its protocol, and torch.save wraps it into a zip archive.
        assert not [member for member, content in contents.items() if content[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
        configs = [json.loads(content) for member, content in contents.items() if member.endswith("_config.json")]
        assert not any(entry["use_pickle"] for config in configs for entry in config["config"].values())
        contents["onnx"] = (folder / f"{name}.onnx").read_bytes()
        for place in (ROOT, Path(torch.__file__).parent, run):
            assert not [member for member, content in contents.items() if bytes(place) in content]


def test_heads_of_a_trained_run_in_onnxruntime(trained: tuple[str, Path, Path]) -> None:
    _, run, folder = trained
    features = features_of(run, some_images(3))
    state = load_checkpoint(next((run / "checkpoints").glob("*.pt")))["method"]
    projected = by_hand("projector", state, features)
    expected = [projected, by_hand("predictor", state, projected)]
    found = session_of(folder / "heads.onnx").run(["projector", "predictor"], {"features": features.numpy()})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), other, **CLOSE)


def by_hand(name: str, state: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Returns what a head of a checkpoint makes of [n, F] rows, in fp64 by the formulas of its layers."""
    layers = sorted({int(key.split(".")[1]) for key in state if key.startswith(f"{name}.")})
    rows = rows.double()
    for layer in layers:
        of = {key.split(".")[2]: state[key].double() for key in state if key.startswith(f"{name}.{layer}.")}
        if "running_mean" in of:
            rows = (rows - of["running_mean"]) / (of["running_var"] + 1e-5).sqrt() * of["weight"] + of["bias"]
            if layer + 1 not in layers and layer != layers[-1]:  # a ReLU has no state
                rows = rows.clamp(min=0)
        else:
            rows = rows @ of["weight"].T + of.get("bias", 0)
    return rows.float()


def linear_by_hand(state: dict[str, Tensor], rows: Tensor) -> Tensor:
    return rows @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_heads_of_every_method(method: str, tmp_path: Path) -> None:
    run, trained = make_run(tmp_path / "run", method=method)
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    others = {"supervised": ["pt2", "onnx"], "simclr": ["pt2"], "mnclglf": ["pt2"]}  # one of each kind of heads
    folder = mnclglf.export(run, head=True, formats=["safetensors", *others.get(method, [])])
    features = features_of(run, some_images(3, 8))
    if method == "supervised":
        expected = {"classifier": linear_by_hand(state, features)}
    else:
        expected = {"projector": by_hand("projector", state, features)}
        if method not in ("simclr", "mocov2"):
            expected["predictor"] = by_hand("predictor", state, expected["projector"])
    assert json.loads((folder / "export.json").read_text())["heads"] == [*expected]
    results: list[Sequence[Tensor]] = []
    if method in others:
        results.append(torch.export.load(folder / "heads.pt2").module()(features.clone()))
    if "onnx" in others.get(method, []):
        found = session_of(folder / "heads.onnx").run([*expected], {"features": features.numpy()})
        results.append([torch.from_numpy(one) for one in found])
    for found in results:
        for one, other in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    written = load_file(folder / "heads.safetensors")
    assert {name.split(".")[0] for name in written} == {*expected}
    for name, value in written.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[name])


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"supervised", "simclr", "simsiam", "nnclr"}))
def test_the_momentum_network_is_that_of_the_checkpoint(method: str, tmp_path: Path) -> None:
    run, trained = make_run(tmp_path / "run", method=method)
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    folder = mnclglf.export(run, network="momentum", head=True, formats=["safetensors"])
    encoder, heads = (load_file(folder / f"{name}.safetensors") for name in ("encoder", "heads"))
    assert {name.split(".")[0] for name in heads} == {"projector"}  # the predictor is the online network's alone
    for name, value in encoder.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[f"momentum.0.{name}"])
            assert not name.endswith(".weight") or not torch.equal(value, state[f"encoder.{name}"])
    for name, value in heads.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[f"momentum.1.{name.removeprefix('projector.')}"])
    assert "momentum network" in (folder / "README.md").read_text()


@pytest.mark.parametrize("method", ["supervised", "simclr", "simsiam", "nnclr"])
def test_a_method_without_momentum_network_is_named(method: str, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", method=method)
    with pytest.raises(ValueError, match=rf"momentum.*{method}.*online"):
        mnclglf.export(run, network="momentum", formats=["safetensors"])
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json"]


def test_the_newest_checkpoint_or_the_one_that_is_named(tmp_path: Path) -> None:
    run, early = make_run(tmp_path / "run", step=4, seed=1)
    make_run(run, step=8, seed=2)
    newest = mnclglf.export(run, tmp_path / "newest", formats=["safetensors"])
    chosen = mnclglf.export(
        run, tmp_path / "early", formats=["safetensors"], checkpoint=run / "checkpoints" / "step-00000004.pt"
    )
    steps = [json.loads((folder / "export.json").read_text())["trained"]["step"] for folder in (newest, chosen)]
    assert steps == [8, 4]
    written = load_file(chosen / "encoder.safetensors")["conv1.weight"]
    assert torch.equal(written, early.state_dict()["encoder.conv1.weight"])
    assert not torch.equal(written, load_file(newest / "encoder.safetensors")["conv1.weight"])


@pytest.mark.parametrize("width", [2, 80])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_width_without_a_twin_is_named(width: int, stem: str, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", width=width, stem=stem, method="simclr")
    said = json.loads((mnclglf.export(run, formats=["safetensors"]) / "export.json").read_text())["encoder"]
    assert said["torchvision"] is None
    assert f"(encoder resnet18, stem {stem}, width {width})" in said["loads_in"]
    assert f"[{8 * width}], and [512] in resnet18" in said["loads_in"]


def test_a_network_with_the_shapes_but_another_forward_is_no_twin(tmp_path: Path) -> None:
    class Negated(torchvision.models.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    _, method = make_run(tmp_path / "run", width=64, stem="imagenet", method="simclr", image_size=16)
    exported = networks_of(method, "online", 16, head=False)
    assert find_twin(exported) is not None
    other = Negated(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
    other.set_submodule("fc", nn.Identity())
    other.load_state_dict(exported.encoder.state_dict())
    object.__setattr__(exported, "encoder", other.eval())
    assert find_twin(exported) is None


def test_a_former_run_without_normalization_takes_that_of_its_views(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    path = next((run / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    for name in ("mean", "std", "side"):
        del state[name]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"views\.npz.*missing.*train again"):
        mnclglf.export(run, formats=["safetensors"])
    assert not (run / "export").exists()
    views = np.zeros((2, 1, 3, 12, 12), np.float32)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    np.savez(run / "views.npz", images=images, views=views, mean=MEAN.numpy(), std=STD.numpy())
    with pytest.warns(UserWarning, match=r"views\.npz"):
        folder = mnclglf.export(run, formats=["safetensors"])
    said = json.loads((folder / "export.json").read_text())["preprocessing"]
    assert (said["side"], said["mean"], said["std"]) == (12, MEAN.tolist(), STD.tolist())


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = formats.find_spec
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name in packages else find(name))


def test_without_the_extra_onnx_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path / "run")
    hide(monkeypatch, "onnxscript")
    with pytest.warns(UserWarning, match=r"onnxscript.*pip install 'mnclglf\[export\]'"):
        folder = mnclglf.export(run)
    names = {path.name for path in folder.iterdir()}
    assert names == {"encoder.safetensors", "encoder.pt2", "README.md", "export.json"}
    assert "onnx" not in (folder / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was left out that was asked for
        mnclglf.export(run, formats=["pt2"])


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["onnx"], r"onnxruntime.*pip install 'mnclglf\[export\]'"),
        (["safetensors", "onnx"], r"onnxruntime.*pip install"),
        (["torchscript"], r"'torchscript' is none of safetensors, onnx, pt2"),
        ([], r"no format.*safetensors, onnx, pt2"),
    ],
)
def test_formats_that_cannot_be_had_are_named_before_any_work(
    asked: Sequence[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "onnxruntime")
    with pytest.raises(ValueError, match=named):
        mnclglf.export(tmp_path / "no run", formats=asked)


def test_an_operator_of_ours_is_refused() -> None:
    with torch.library._scoped_library("mnclglf_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        library.impl("twice", torch.empty_like, "Meta")

        class Twice(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.mnclglf_test.twice(x)

        with pytest.raises(ExportError, match=r"mnclglf_test\.twice.*--formats safetensors"):
            graphs.trace(Twice(), torch.ones(2, 3))


def test_a_result_that_differs_is_refused() -> None:
    expected = torch.tensor([[0.5, -2.0]])
    check_same("it", expected + torch.tensor([[0.0, 1.9e-5]]), expected)  # 2 times the tolerance, as the largest is 2
    for wrong in (expected + 2.2e-5, expected * torch.nan, expected[:, :1]):
        with pytest.raises(ExportError, match="nothing was written"):
            check_same("it", wrong, expected)


def test_an_export_that_would_be_wrong_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path / "run")
    save = torch.export.save

    def save_other(program: Any, *args: Any, **kwargs: Any) -> None:
        program.state_dict["conv1.weight"].mul_(1.01)
        save(program, *args, **kwargs)

    monkeypatch.setattr(torch.export, "save", save_other)
    with pytest.raises(ExportError, match=r"encoder\.pt2 differs.*nothing was written"):
        mnclglf.export(run, formats=["pt2"])
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    path = next((run / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    state["method"]["encoder.layer3.0.bn1.running_var"][1] = torch.inf
    torch.save(state, path)
    with pytest.raises(ExportError, match=r"layer3\.0\.bn1\.running_var.*--checkpoint"):
        mnclglf.export(run)


def test_the_callers_random_numbers_stay_as_they_are(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    before = torch.get_rng_state()
    mnclglf.export(run, formats=["safetensors"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_run_or_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json.*mnclglf train"):
        mnclglf.export(tmp_path / "nothing")
    run, _ = make_run(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"step-9\.pt is no file.*checkpoints"):
        mnclglf.export(run, checkpoint=run / "step-9.pt")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RuntimeError, match=r"no checkpoint yet.*mnclglf train"):
        mnclglf.export(run)
    assert not (run / "export").exists()
