"""Tests of mnclglf embed and mnclglf search from a user's side."""

from __future__ import annotations

import base64
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_folder import pixels, write
from PIL import Image

import mnclglf
from mnclglf.cli import main
from mnclglf.commands import embed as command
from mnclglf.data.datasets import load_dataset
from mnclglf.evaluation.features import extract_features
from mnclglf.training.start import choose_machine, elsewhere

TINY = (
    "train --dataset digits --recipe quick --method simsiam --image-size 8 --train-images 128 --width 2 "
    "--projector-width 16 --predictor-width 8 --epochs 1 --batch-size 64 --device cpu --precision fp32"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed") / "run"
    assert main([*shlex.split(TINY), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images, four cats and two dogs; dogs/1.png and dogs/2.png are nearly the same."""
    root = tmp_path / "my photos [1]"
    for number in range(4):
        write(root / "cats" / f"{number}.png", pixels(20, 30, seed=number))
    almost = pixels(20, 30, seed=9)
    write(root / "dogs" / "1.png", almost)
    write(root / "dogs" / "2.png", almost // 2 * 2)
    return root


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_embed_is_what_the_evaluations_see(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", str(run), "digits", "--device", "cpu"]) == 0
    out = run / "embeddings" / "digits.npy"
    assert f"{out}: 1,797 rows of 16 features" in said(capsys).replace("\n", "")
    encoder = mnclglf.load_encoder(run)
    machine = choose_machine(elsewhere(mnclglf.RunConfig().engine, "cpu"))
    train, test = load_dataset("digits")
    assert test is not None
    mean, std = (encoder.get_buffer(name).flatten().numpy() for name in ("mean", "std"))
    expected = [
        extract_features(
            encoder, images, side=8, mean=mean, std=std, dtype=mnclglf_dtype(run), device=machine.device
        ).numpy()
        for images in (train, test)
    ]
    np.testing.assert_allclose(np.load(out), np.concatenate(expected), rtol=1e-5, atol=1e-6)  # other batches


def mnclglf_dtype(run: Path):
    import torch

    from mnclglf.runs.files import read_config

    assert read_config(run).engine.precision == "fp32"
    return torch.float32


def test_embed_a_folder_by_its_plain_path(run: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "photos.parquet"
    assert main(["embed", str(run), str(photos), "--out", str(out), "--device", "cpu"]) == 0
    frame = pq.read_table(out).to_pandas()
    assert frame["name"].tolist() == [*(f"cats/{n}.png" for n in range(4)), "dogs/1.png", "dogs/2.png"]
    assert frame["class"].tolist() == ["cats"] * 4 + ["dogs"] * 2
    assert np.stack(frame["embedding"].to_list()).shape == (6, 16)


def query(run: Path, photos: Path, *options: str) -> int:
    return main(["search", str(run), str(photos), "--device", "cpu", *options])


def test_search_finds_the_image_and_its_like(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "new <b>.png", pixels(20, 30, seed=9)[::-1].copy()[::-1])
    page, file = tmp_path / "page.html", tmp_path / "e.npy"
    options = ["--neighbors", "2", "--embeddings", str(file), "--out", str(page)]
    assert query(run, photos, "--query", str(photos / "dogs" / "2.png"), str(other), *options) == 0
    lines = [line.strip("| ").split(" | ") for line in said(capsys).splitlines() if line.startswith("| ")]
    assert lines[0] == ["query", "rank", "similarity", "class", "name"]
    assert [(line[0], line[4]) for line in lines[1:]] == [
        (str(photos / "dogs" / "2.png"), "dogs/2.png"), (str(photos / "dogs" / "2.png"), "dogs/1.png"),
        (str(other), "dogs/1.png"), (str(other), "dogs/2.png"),
    ]  # fmt: skip
    assert lines[1][2:4] == ["1.0000", "dogs"]
    html = page.read_text()
    assert "new &lt;b&gt;.png" in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # self-contained
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(found) == 6
    with Image.open(io.BytesIO(base64.b64decode(found[0]))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels(20, 30, seed=9) // 2 * 2)
    assert (tmp_path / "e.npy.faiss").exists()


def test_search_again_uses_what_is_there_and_a_changed_folder_is_embedded_anew(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--query", str(photos / "dogs" / "1.png"), "--embeddings", str(tmp_path / "e.npy")]
    assert query(run, photos, *options) == 0
    assert "index: " in said(capsys)
    assert query(run, photos, *options) == 0
    again = said(capsys)
    assert "up to date" in again
    assert "index: " not in again
    write(photos / "dogs" / "0.png", pixels(20, 30, seed=9))
    assert query(run, photos, *options) == 0
    third = " ".join(said(capsys).split())
    assert "made anew: the images have changed" in third
    assert "built anew" in third
    assert "dogs/0.png" in third


def test_search_leaves_out_what_is_corrupt_and_names_the_right_rows(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cats" / "1.png").write_bytes(b"<html>")
    options = ["--query", str(photos / "dogs" / "2.png"), "--embeddings", str(tmp_path / "e.npy"), "--neighbors", "1"]
    assert query(run, photos, *options) == 1
    assert "--skip-corrupt" in said(capsys)
    assert query(run, photos, *options, "--skip-corrupt") == 0
    assert "| 1 | 1.0000 | dogs | dogs/2.png |" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ("embed {run} {photos} --out a.csv", 2, r"a\.csv must end in \.npy, \.parquet or \.npz"),
        ("embed {run} nowhere", 2, r"source 'nowhere' is no folder"),
        ("embed nowhere {photos}", 2, r"nowhere is no run directory.*mnclglf train"),
        ("embed {run} {photos} --data-dir .", 1, r"second folder .*leave out --data-dir"),
        ("embed {run} digits --data-dir .", 1, r"data_dir \. has no effect"),
        ("embed {run} {photos} --checkpoint x.pt", 1, r"x\.pt is no file"),
        ("search {run} {photos} --query x.png", 1, r"--query x\.png is no file"),
        ("search {run} {photos} --query {photos}", 1, r"is no file; give one or more image files"),
        ("search {run} {photos} --query text.png", 1, r"text\.png cannot be read as an image"),
        ("search {run} {photos} --query text.png --neighbors 0", 2, r"neighbors 0 .*--neighbors from 1"),
        ("search {run} {photos} --query text.png --out x.png", 2, r"x\.png must end in \.html"),
        ("search {run} {photos} --query text.png --out no/x.html", 2, r"there is no folder no; make it"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: str, code: int, named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("text")
    words = [word.format(run=run, photos=photos) for word in arguments.split()]
    try:
        found = main(words)
    except SystemExit as stop:
        found = stop.code
    text = " ".join(said(capsys).split())
    assert found == code, text
    assert re.search(named, text), text


def test_search_needs_a_query(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        query(run, photos)
    assert stop.value.code == 2
    assert "--query" in said(capsys)


def test_parquet_without_pyarrow_names_the_package(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mnclglf.evaluation import embedding_file

    monkeypatch.setattr(embedding_file, "find_spec", lambda name: None)
    assert main(["embed", str(run), str(photos), "--out", str(tmp_path / "a.parquet")]) == 1
    assert "pip install 'mnclglf[parquet]'" in said(capsys)
    assert not (tmp_path / "a.parquet.partial").exists()  # named before any work


def test_the_commands_parse_without_torch() -> None:
    code = "import sys; from mnclglf.cli import parse; parse(['embed', '.', '.']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True)


def test_the_default_file_lies_in_the_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    made = command.Embed(run=Path("runs/x"), source=str(tmp_path / "photos")).default_file()
    assert made == Path("runs/x/embeddings/folder-photos.npy")
