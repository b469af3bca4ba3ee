"""Tests of the model card: its Python blocks run as a reader would run them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_runs import MEAN, STD, make_run
from PIL import Image
from torch import Tensor

import mnclglf
from mnclglf.data.decoding import read_image
from mnclglf.data.views import whole_views
from mnclglf.exporting.card import inline
from mnclglf.runs.results import Result, save_results

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
SIDE = 16


def oblong_picture(path: Path) -> None:
    """Writes a picture that is turned by its EXIF orientation and has alpha, as a reader's own may."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels, "RGBA").save(path, exif=exif)


def follow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[str, Tensor]], dict[str, Any]]:
    """Runs the card's blocks from its top; returns each new value of `features`, with its block, and all names."""
    oblong_picture(folder / "photo.png")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    found: list[tuple[str, Tensor]] = []
    for text in BLOCK.findall((folder / "README.md").read_text()):
        before = names.get("features")
        exec(compile(text, str(folder / "README.md"), "exec"), names)
        if names.get("features") is not before:
            found.append((text, names["features"]))
    return found, names


@pytest.mark.parametrize(
    ("settings", "options", "loaders"),
    [
        (dict(stem="imagenet", width=64), dict(), ["torchvision", "timm", "torch.export", "onnxruntime"]),
        (dict(stem="cifar", width=64), dict(formats=["safetensors"]), ["torchvision", "timm"]),
        (dict(method="mnclglf"), dict(head=True, formats=["safetensors", "pt2"]), ["torch.export"]),
        (dict(method="supervised"), dict(head=True), ["torch.export", "onnxruntime"]),
        (dict(method="byol"), dict(head=True, network="momentum", formats=["onnx"]), ["onnxruntime"]),
        (dict(method="simclr"), dict(head=True, formats=["safetensors"]), ["torch.zeros"]),
        (dict(encoder="timm:test_vit"), dict(head=True, formats=["safetensors", "pt2"]), ["timm", "torch.export"]),
    ],
    ids=["imagenet", "cifar", "heads", "supervised", "momentum", "another width", "timm"],
)
def test_the_blocks_give_the_encoders_features(
    settings: dict[str, Any],
    options: dict[str, Any],
    loaders: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: dict[str, Any] = {"image_size": SIDE, "method": "simsiam", **settings}
    run, method = make_run(tmp_path / "run", **chosen)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    folder = mnclglf.export(run, tmp_path / "export", **options)
    found, names = follow(folder, monkeypatch)
    assert len(found) == len(loaders)
    # The pictures that the evaluations show the encoder, and the encoder that they evaluate.
    images = whole_views([read_image(folder / "photo.png")], SIDE, MEAN.numpy(), STD.numpy(), torch.float32)
    assert torch.equal(names["images"], images)
    encoder = mnclglf.load_encoder(run)
    if options.get("network") == "momentum":
        names_of = {name: value for name, value in state.items() if name.startswith("momentum.0.")}
        encoder.load_state_dict({name.removeprefix("momentum.0."): x for name, x in names_of.items()}, strict=False)
    with torch.inference_mode():
        expected = encoder(images)
    for (text, features), loader in zip(found, loaders, strict=True):
        assert loader in text
        if loader == "torch.zeros":  # no format of this export makes features
            assert features.shape == expected.shape
        else:
            torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    if options.get("head"):
        heads = json.loads((folder / "export.json").read_text())["heads"]
        assert len(names["results"]) in (len(heads), len(heads) + 1)  # with the features before them, or without


def test_the_heads_of_plain_pytorch_are_those_of_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, method = make_run(tmp_path / "run", method="mnclglf")
    folder = mnclglf.export(run, head=True, formats=["safetensors"])
    _, names = follow(folder, monkeypatch)
    rows = torch.randn(5, 16)
    assert {type(layer).__module__.partition(".")[0] for layer in names["heads"].modules()} == {"torch"}
    method.eval()
    with torch.no_grad():
        embeddings = method.projector(rows)
        torch.testing.assert_close(names["heads"]["projector"](rows), embeddings)
        torch.testing.assert_close(
            names["heads"]["predictor"](embeddings), method.get_submodule("predictor")(embeddings)
        )


def result(step: int | None, top1: float, **settings: Any) -> Result:
    made = {"k": 20, **({} if step is None else {"step": step}), **settings}
    return Result(protocol="knn", representation="pretrained", top1=top1, top5=1.0, settings=made)


def test_results_are_those_of_the_exported_checkpoint_with_how_they_were_measured(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", step=4, method="byol")
    make_run(run, step=8, seed=2, method="byol")
    card = (mnclglf.export(run, formats=["safetensors"]) / "README.md").read_text()
    assert "was not evaluated" in card
    encoder = next(line for line in card.splitlines() if line.startswith("| encoder |"))
    assert re.fullmatch(r"\| encoder \| ResNet(, (encoder|init|stem|width) [\w.]+)+; [\d,]+ parameters \|", encoder)
    (run / "export" / "README.md").unlink()
    save_results(
        run / "evaluation.json",
        [result(8, 0.1234, train_images=128), result(4, 0.5678, k=5), result(None, 0.4321, k=7)],
    )
    newest = (mnclglf.export(run, formats=["safetensors"]) / "README.md").read_text()
    assert "**12.3** / 100.0" in newest
    assert "128 training images" in newest
    assert "nearest by cosine similarity" in newest
    assert "56.8" not in newest
    assert "43.2" not in newest  # of an earlier version, which does not say of which checkpoint
    assert "other checkpoints are left out" in newest
    checkpoint = run / "checkpoints" / "step-00000004.pt"
    early = mnclglf.export(run, tmp_path / "early", formats=["safetensors"], checkpoint=checkpoint)
    assert "**56.8** / 100.0" in (early / "README.md").read_text()
    momentum = mnclglf.export(run, tmp_path / "momentum", formats=["safetensors"], network="momentum")
    text = (momentum / "README.md").read_text()
    assert "12.3" not in text
    assert "of its online network" in text


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged.*remove it"):
        mnclglf.export(run, formats=["safetensors"])
    assert not (run / "export").exists()


@pytest.mark.parametrize("name", ["photos", "a|b `c` *d*", "[x](y)", "ü 图", "{{ 7 * 7 }}", "```", "a\nb\x1b[0m"])
def test_a_folder_of_any_name_is_shown_as_it_is_and_its_place_is_not(name: str, tmp_path: Path) -> None:
    place = tmp_path / "private" / name
    run, _ = make_run(tmp_path / "run", dataset=f"folder:{place}", image_size=8)
    folder = mnclglf.export(run, formats=["safetensors"])
    for path in folder.iterdir():
        assert b"private" not in path.read_bytes(), path
    card = (folder / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| data |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # one cell
    assert len(BLOCK.findall(card)) == 1
    assert re.sub(r"\\(.)", r"\1", row.split(" | ")[1]).startswith(
        f"folder-{' '.join(name.split())}".replace("\x1b", "?")
    )


def test_text_of_any_kind_is_one_line() -> None:
    assert inline("a\n# b") == "a # b"
    assert inline("\udcff|<b>") == "\\\\udcff\\|\\<b\\>"


def test_the_card_cites_the_paper_leaves_the_license_open_and_names_the_method(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", method="byol")
    card = (mnclglf.export(run, formats=["safetensors"]) / "README.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text().partition("preferred-citation")[2]
    fields = re.findall(r"(?:given-names|family-names|  title|notes): (.+)", citation)
    assert len(fields) == 8  # three authors, a title and where it is
    assert all(field.rstrip(".") in card for field in fields)
    assert "Grill et al. 2020" in card
    assert "license:" not in re.sub(r"^#.*", "", card.split("---")[1], flags=re.M)
    assert "None is chosen yet" in card
