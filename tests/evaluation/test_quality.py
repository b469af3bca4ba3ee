"""Tests of the figures without labels, against numpy and cases by hand, and of the whole command."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.neighbors import NearestNeighbors

import mnclglf
from mnclglf.cli import main
from mnclglf.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, QualityConfig, RunConfig, ViewConfig
from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageArray
from mnclglf.data.views import whole_views
from mnclglf.evaluation import quality as module
from mnclglf.evaluation.quality import alignment, measure_quality, nearest_neighbors, uniformity
from mnclglf.reports.quality_page import page_name
from mnclglf.runs.quality import FeatureQuality, load_qualities, save_qualities
from mnclglf.training.health import effective_rank
from mnclglf.training.loop import Trainer
from mnclglf.training.start import load_trained

CONFIG = RunConfig(
    method="simclr",
    dataset="digits",
    view=ViewConfig(blur_probability=0.0, flip_probability=0.0),
    data=DataConfig(image_size=8, train_images=200, loader="reference"),
    model=ModelConfig(width=2, projector_width=8, predictor_width=8),
    optim=OptimConfig(epochs=1, batch_size=50),
    engine=EngineConfig(device="cpu", precision="fp32"),
)
QUALITY = QualityConfig(device="cpu", images=60, queries=4, neighbors=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def silent() -> Console:
    return Console(file=io.StringIO(), width=1000)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_alignment_is_the_mean_squared_distance_of_unit_vectors() -> None:
    first, second = random(30, 7), random(2, 30, 7)[1] * 5
    pairs = zip(unit(first.double().numpy()), unit(second.double().numpy()), strict=True)
    expected = np.mean([sum((x - y) ** 2) for x, y in pairs])
    assert alignment(first, second) == pytest.approx(expected, rel=1e-5)  # fp32
    assert alignment(first, 3 * first) == pytest.approx(0, abs=1e-12)
    assert alignment(first, -first) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("chunk", [2**25, 50])
def test_uniformity_is_the_log_mean_potential_of_all_pairs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_PAIRS", chunk)
    features = random(23, 6)
    rows = unit(features.double().numpy())
    expected = np.log(np.mean([np.exp(-2 * sum((x - y) ** 2)) for x, y in itertools.combinations(rows, 2)]))
    assert uniformity(features) == pytest.approx(expected, rel=1e-5)  # fp32
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)  # a collapse: all pairs at distance 0
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)  # opposite: exp(-2 * 4)
    assert uniformity(torch.eye(4)) == pytest.approx(-4)  # orthogonal: squared distance 2
    with pytest.raises(ValueError, match=r"1 image has no pair.*two"):
        uniformity(torch.ones(1, 3))


def test_effective_rank_is_rankme() -> None:
    features = random(40, 9) @ torch.diag(torch.tensor([5.0, 3, 2, 1, 1, 0.5, 0.1, 0.01, 0]))
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7  # equation 1 of Garrido et al. 2023
    # theirs adds 1e-7 to each share, which is 9 * 1e-7 * log(1e7) = 1.5e-5 of the entropy at most; fp32 the rest
    assert effective_rank(features) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-4)
    assert effective_rank(torch.ones(20, 8)) == pytest.approx(1, abs=1e-3)  # identical features
    orthonormal = torch.linalg.qr(random(30, 6)).Q
    assert effective_rank(orthonormal) == pytest.approx(6, rel=1e-5)
    assert effective_rank(torch.cat([torch.eye(3), torch.zeros(3, 4)], dim=1)) == pytest.approx(3, rel=1e-5)


def test_nearest_neighbors_are_those_of_scikit_learn() -> None:
    features, queries = random(40, 6), torch.tensor([0, 7, 39])
    rows, similarities = nearest_neighbors(features, queries, 5)
    fitted = NearestNeighbors(n_neighbors=6, metric="cosine").fit(features.numpy())
    distances, expected = fitted.kneighbors(features[queries].numpy())
    np.testing.assert_array_equal(rows, expected[:, 1:])  # theirs begin with the query itself
    np.testing.assert_allclose(similarities, 1 - distances[:, 1:], atol=1e-6)  # fp32
    doubles = torch.cat([features[:2], features[:2]])
    assert nearest_neighbors(doubles, torch.tensor([1]), 1)[0].tolist() == [[3]]  # a duplicate is a neighbor


def test_a_run_is_judged_beside_its_untrained_encoder(run: Path) -> None:
    judged = measure_quality(run, dataclasses.replace(QUALITY, images=1000), silent())
    pretrained, untrained = judged.results
    assert (pretrained.representation, untrained.representation) == ("pretrained", "untrained")
    assert (pretrained.split, pretrained.images, pretrained.step, pretrained.features) == ("test", 350, 4, 16)
    _, test = load_dataset("digits")
    assert isinstance(test, ImageArray)
    state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)
    with torch.no_grad():
        views = whole_views(test.images, 8, state["mean"].numpy(), state["std"].numpy(), torch.float32)
        features = load_trained(run)[1].encoder.eval()(views)
    assert pretrained.uniformity == pytest.approx(uniformity(features), abs=1e-4)  # batches of another size, fp32
    assert pretrained.effective_rank == pytest.approx(effective_rank(features), rel=1e-3)
    assert 0 < pretrained.alignment < 4
    assert pretrained.alignment != untrained.alignment
    assert load_qualities(run / "quality.json") == judged.results
    assert measure_quality(run, dataclasses.replace(QUALITY, images=1000), silent()).results == judged.results


def test_without_test_images_those_that_were_held_out_are_judged(tmp_path: Path) -> None:
    data = dataclasses.replace(CONFIG.data, train_images=None, validation_images=5, image_size=16)
    optim = dataclasses.replace(CONFIG.optim, batch_size=8)
    folder = photos(tmp_path / "photos", 20)
    config = dataclasses.replace(CONFIG, dataset=f"folder:{folder}", view=ViewConfig(), data=data, optim=optim)
    Trainer(config, tmp_path / "run", console=silent()).train()
    judged = measure_quality(tmp_path / "run", QUALITY, silent())
    assert [(found.split, found.images) for found in judged.results] == [("validation", 5)] * 2


def photos(root: Path, count: int = 7) -> Path:
    """Writes images without labels, in odd names, of several sizes and modes."""
    root.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(draw.integers(0, 255, (20 + 50 * number, 130, 3), dtype=np.uint8))
        image.convert(("RGB", "L", "RGBA")[number % 3]).save(root / f"<b>[{number}] ü & $x$.png")
    return root


def test_a_folder_without_labels_is_judged_and_its_page_needs_no_other_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "my <photos>")
    assert main(["quality", str(run), "--dataset", f"folder:{folder}", "--device", "cpu", "--queries", "3"]) == 0
    printed = capsys.readouterr().out
    assert "| Effective rank" in printed
    assert "20 x 130 to 320 x 130 pixels are resized to the 8 x 8" in printed
    (page,) = run.glob("neighbors-*.html")
    assert str(page) in printed
    text = page.read_text()
    assert "<b>[" not in text
    assert "&lt;b&gt;[0] ü &amp; $x$.png" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert len(pictures) == 3 * (1 + 6)  # six other images, fewer than the eight neighbors asked for
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert max(image.size) <= 96
    (found, _) = load_qualities(run / "quality.json")
    assert (found.dataset, found.split, found.images) == (f"folder:{folder}", "train", 7)
    report = (run / "report.html").read_text()
    assert "Without labels" in report
    assert "7 train images of folder:" in report


def test_the_page_shows_each_query_with_its_neighbors(run: Path) -> None:
    judged = measure_quality(run, QUALITY, silent())
    assert [len(row) for row in judged.tiles] == [4] * 4
    for query, *near in judged.tiles:
        assert query.similarity is None
        found = [tile.similarity or 0.0 for tile in near]
        assert found == sorted(found, reverse=True)
        assert query.name not in [tile.name for tile in near]
        assert query.label in tuple("0123456789")
    _, test = load_dataset("digits")
    assert isinstance(test, ImageArray)
    query = judged.tiles[0][0]  # its name is its number among all digits, those to train on included
    assert test.origin is not None
    np.testing.assert_array_equal(query.pixels, test.images[test.origin.tolist().index(int(query.name))])


def test_results_of_other_images_stand_beside_each_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnclglf.api.write_report", lambda _: None)  # whose pictures take seconds
    folder = photos(tmp_path / "photos", 4)
    mnclglf.quality(run, images=60, device="cpu", queries=1)
    mnclglf.quality(run, images=50, device="cpu", queries=1)
    mnclglf.quality(run, images=60, device="cpu", queries=1)
    mnclglf.quality(run, dataset=f"folder:{folder}", device="cpu", queries=1)
    mnclglf.quality(run, dataset="digits", images=60, device="cpu", queries=1)  # the run's own
    found = load_qualities(run / "quality.json")
    assert [(r.dataset, r.images) for r in found[::2]] == [(None, 60), (None, 50), (f"folder:{folder}", 4)]
    assert sorted(path.name for path in run.glob("neighbors*.html")) == sorted(
        ["neighbors.html", page_name(f"folder:{folder}", other=True)]
    )


def test_names_of_pages_are_short_and_do_not_collide() -> None:
    names = [page_name(f"folder:{place}", other=True) for place in ("/a/x", "/b/x", "/" + 200 * "ü", "/c/\udcff")]
    assert len(set(names)) == 4
    assert max(len(name.encode()) for name in names) <= 255
    assert page_name("mnist5k", other=True) == "neighbors-mnist5k.html"


def test_one_image_cannot_be_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(tmp_path / "one", 1)
    assert main(["quality", str(run), "--dataset", f"folder:{folder}"]) == 2
    assert "holds 1 image; two or more" in capsys.readouterr().err
    assert not (run / "quality.json").exists()
    (tmp_path / "none").mkdir()
    assert main(["quality", str(run), "--dataset", f"folder:{tmp_path}/none"]) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("quality", "run"),
        ("quality x --images 1", "images 1 must be at least 2"),
        ("quality x --queries 0", "queries 0 must lie in 1..100"),
        ("quality x --dataset cifr", "dataset 'cifr' is none of"),
    ],
)
def test_wrong_usage_is_named(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", '{"version": 9, "results": []}', '{"version": 1, "results": [{"a": 1}]}'])
def test_a_damaged_file_is_named_before_any_work(run: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "quality.json").write_text(text)
    monkeypatch.setattr(module, "load_trained", lambda *_: pytest.fail("began"))
    with pytest.raises(ValueError, match=r"quality\.json.*(damaged|remove it)"):
        measure_quality(run, QUALITY, silent())
    assert (run / "quality.json").read_text() == text


def test_figures_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    good = FeatureQuality(
        representation="pretrained", split="test", images=3, step=1, alignment=0.1, uniformity=-2.0, effective_rank=2.0,
        features=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="uniformity nan"):
        dataclasses.replace(good, uniformity=float("nan"))
    save_qualities(tmp_path / "quality.json", [good])
    assert json.loads((tmp_path / "quality.json").read_text())["version"] == 1
