"""Tests of embedding a source into a file: rows, names, resuming, memory, files that are not ours."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from embedding import MEAN, STD, embed_folder, folder_of, image, small_embedder
from numpy.typing import NDArray
from PIL import Image

from mnclglf.config import UsageError
from mnclglf.data.errors import DataError
from mnclglf.evaluation import embed, embedding_file
from mnclglf.evaluation.embedding_file import beside, made_of, read_embeddings
from mnclglf.runs.locks import TakenError, held

# The encoder sums in fp32, in another order for another batch: 1e-5 is 80 units in the last place of 1.
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def batches_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "MOST_IMAGES", 4)


def truth(numbers: list[int], seed: int = 0) -> NDArray[np.float32]:
    """Returns the features of these images, normalized by hand: they have the encoder's side, so nothing is resized."""
    pixels = np.stack([(image(number).astype(np.float32) / 255 - MEAN) / STD for number in numbers])
    with torch.no_grad():
        return small_embedder(seed).encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()


def rows_of_csv(out: Path) -> list[list[str]]:
    with beside(out, "csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def test_a_npy_has_the_features_and_a_csv_the_names(tmp_path: Path) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / "out" / "photos.npy"
    stopped, said = embed_folder(root, out)
    assert stopped is None
    assert "10 rows" in said
    np.testing.assert_allclose(np.load(out), truth(list(range(10))), **CLOSE)
    expected = [[f"class{n // 5}/{n:03}.png", "train", str(n // 5), f"class{n // 5}"] for n in range(10)]
    assert rows_of_csv(out) == expected
    hidden = {path.name for path in out.parent.iterdir()} - {".photos.npy.lock"}
    assert hidden == {"photos.npy", "photos.npy.csv", "photos.npy.json"}  # nothing partial is left


def test_parquet_and_npz_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_file, "GROUP_ROWS", 3)  # several groups
    root = folder_of(tmp_path / "photos", 10)
    for name in ("a.npy", "a.parquet", "a.npz"):
        embed_folder(root, tmp_path / name)
    expected = np.load(tmp_path / "a.npy")
    table = pq.read_table(tmp_path / "a.parquet")
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), expected)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 4
    rows = rows_of_csv(tmp_path / "a.npy")
    assert [table[column].to_pylist() for column in ("name", "split", "label", "class")] == [
        [row[0] for row in rows], ["train"] * 10, [int(row[2]) for row in rows], [row[3] for row in rows],
    ]  # fmt: skip
    arrays = np.load(tmp_path / "a.npz", allow_pickle=False)
    np.testing.assert_array_equal(arrays["embeddings"], expected)
    assert arrays["names"].tolist() == [row[0] for row in rows]
    assert arrays["splits"].tolist() == ["train"] * 10
    assert arrays["labels"].tolist() == [int(row[2]) for row in rows]
    assert arrays["classes"].tolist() == ["class0", "class1"]
    for name in ("a.npy", "a.parquet", "a.npz"):
        np.testing.assert_array_equal(read_embeddings(tmp_path / name), expected)


def test_images_without_labels_have_none(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    root.mkdir()
    Image.fromarray(image(0)).save(root / "a.png")
    for name in ("a.npy", "a.parquet", "a.npz"):
        embed_folder(root, tmp_path / name)
    assert rows_of_csv(tmp_path / "a.npy") == [["a.png", "train", "-1", ""]]
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["label"].to_pylist() == table["class"].to_pylist() == [None]
    arrays = np.load(tmp_path / "a.npz", allow_pickle=False)
    assert (arrays["labels"].tolist(), arrays["classes"].size) == ([-1], 0)


def test_odd_names_are_in_every_file(tmp_path: Path) -> None:
    root, names = tmp_path / "a [b] ü", ['na"ïve, 名.png', "two\nlines.png", os.fsdecode(b"caf\xe9.png")]
    root.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(image(number)).save(root / "x.png")
        (root / "x.png").rename(root / name)
    expected = {'na"ïve, 名.png', "two\nlines.png", "caf\\xe9.png"}
    for name in ("a.npy", "a.parquet", "a.npz"):
        embed_folder(root, tmp_path / name)
    assert {row[0] for row in rows_of_csv(tmp_path / "a.npy")} == expected
    assert set(pq.read_table(tmp_path / "a.parquet")["name"].to_pylist()) == expected
    assert set(np.load(tmp_path / "a.npz")["names"].tolist()) == expected


@pytest.mark.parametrize("name", ["a.npy", "a.parquet", "a.npz"])
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path / "photos", 22)
    out, whole = tmp_path / name, tmp_path / "whole" / name
    code = f"from embedding import *; killed_after(Path({str(root)!r}), Path({str(out)!r}), 12)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed process: the order of sums may depend on it
    embedded: list[int] = []
    views = embed.Embedder.view
    monkeypatch.setattr(embed.Embedder, "view", lambda self, pixels: embedded.append(1) or views(self, pixels))
    _, said = embed_folder(root, out)
    assert "going on after 12 of 22" in said
    assert len(embedded) == 10  # what was done is not done again
    embed_folder(root, whole)
    torch.set_num_threads(threads)
    assert out.read_bytes() == whole.read_bytes()
    if name == "a.npy":
        assert beside(out, "csv").read_bytes() == beside(whole, "csv").read_bytes()
    np.testing.assert_allclose(read_embeddings(out), truth(list(range(22))), **CLOSE)


def stop_after(monkeypatch: pytest.MonkeyPatch, images: int, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal when so many images are done."""
    advance = embed.Meter.advance

    def counted(self: embed.Meter, done: int) -> None:
        advance(self, done)
        if done == images:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(embed.Meter, "advance", counted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_batches_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / "a.npy"
    with monkeypatch.context() as patch:
        stop_after(patch, 4, number)
        stopped, said = embed_folder(root, out)
    assert stopped == number
    assert "4 of 10" in said
    assert not out.exists()
    assert "going on after 4 of 10" in embed_folder(root, out)[1]
    np.testing.assert_allclose(np.load(out), truth(list(range(10))), **CLOSE)


def begin(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeds the first eight images."""
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        assert embed_folder(root, out)[0]


@pytest.mark.parametrize("change", ["encoder", "image", "new name before", "removed", "class"])
def test_what_was_begun_of_something_else_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    root, out, numbers, seed = folder_of(tmp_path / "photos", 10), tmp_path / "a.npy", list(range(10)), 0
    begin(root, out, monkeypatch)
    match change:
        case "encoder":
            seed = 1
        case "image":  # of the same size at the same time
            path = root / "class0" / "002.png"
            before = path.stat()
            Image.fromarray(image(77)).save(tmp_path / "new.png")
            os.utime(tmp_path / "new.png", ns=(before.st_atime_ns, before.st_mtime_ns))
            (tmp_path / "new.png").replace(path)
            numbers[2] = 77
        case "new name before":
            Image.fromarray(image(77)).save(root / "class0" / "000a.png")
            numbers.insert(1, 77)
        case "removed":
            (root / "class0" / "000.png").unlink()
            numbers.remove(0)
        case _:
            (root / "class0").rename(root / "a class")
    _, said = embed_folder(root, out, seed=seed)
    assert "starting anew" in said
    np.testing.assert_allclose(np.load(out), truth(numbers, seed), **CLOSE)


def test_images_that_come_after_what_was_done_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / "a.npy"
    begin(root, out, monkeypatch)
    Image.fromarray(image(77)).save(root / "class1" / "008.png")
    Image.fromarray(image(78)).save(root / "class1" / "new.png")
    assert "going on after 8 of 11" in embed_folder(root, out)[1]
    np.testing.assert_allclose(np.load(out), truth([*range(8), 77, 9, 78]), **CLOSE)


@pytest.mark.parametrize("damage", ["state", "short", "no state", "nonsense"])
def test_a_damaged_partial_file_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / "a.npy"
    begin(root, out, monkeypatch)
    partial, state = beside(out, "partial"), beside(out, "partial.json")
    match damage:
        case "state":
            state.write_text(state.read_text()[:40])
        case "short":
            partial.write_bytes(partial.read_bytes()[:-5])
        case "no state":
            state.unlink()
        case _:
            state.write_text('{"format": 1, "left_out": [3], "images": "many"}')
    assert "going on" not in embed_folder(root, out)[1]
    np.testing.assert_allclose(np.load(out), truth(list(range(10))), **CLOSE)


def test_rows_beyond_the_last_count_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / "a.npy"
    begin(root, out, monkeypatch)
    with beside(out, "partial").open("ab") as file:
        file.write(b"\xff" * 99)
    embed_folder(root, out)
    np.testing.assert_allclose(np.load(out), truth(list(range(10))), **CLOSE)


@pytest.mark.parametrize("name", ["a.npy", "a.parquet"])
@pytest.mark.parametrize("step", ["json", "out", "partial"])
def test_a_process_killed_while_it_finishes_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    root, out, whole = folder_of(tmp_path / "photos", 6), tmp_path / name, tmp_path / "whole" / name
    embed_folder(root, whole)

    class Killed(BaseException):
        pass

    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if step == "json":
            patch.setattr(embedding_file.EmbeddingFile, "finish", killed)
        elif step == "out":
            patch.setattr(embedding_file, "write_names" if name == "a.npy" else "write_parquet", killed)
        else:
            patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            embed_folder(root, out)
    embed_folder(root, out)
    assert out.read_bytes() == whole.read_bytes()
    assert made_of(out).rows == 6
    assert not beside(out, "partial").exists()


@pytest.mark.parametrize("is_made", [False, True])
def test_what_killed_processes_left_is_cleared_and_nothing_else(tmp_path: Path, is_made: bool) -> None:
    root, out = folder_of(tmp_path / "photos", 6), tmp_path / "out" / "a[1].npz"
    out.parent.mkdir()
    if is_made:
        embed_folder(root, out)
    endings = ("", ".json", ".csv", ".partial.json")
    left = [f".a[1].npz{ending}.12-0123abcd.tmp" for ending in endings]
    kept = [".a1.npz.12-0123abcd.tmp", ".a[1].npz.faiss.12-0123abcd.tmp", ".a[1].npz.mine.tmp", "a[1].npz.tmp"]
    for name in (*left, *kept):
        (out.parent / name).touch()
    if is_made:  # killed before the last file was removed
        beside(out, "partial").touch()
        beside(out, "partial.json").touch()
    embed_folder(root, out)
    found = {path.name for path in out.parent.iterdir() if not path.name.endswith(".lock")}
    assert found == {*kept, "a[1].npz", "a[1].npz.json"}


def test_a_finished_file_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = folder_of(tmp_path / "photos", 6), tmp_path / "a.npy"
    embed_folder(root, out)
    monkeypatch.setattr(embed.Embedder, "embed", None)
    assert "up to date: 6 rows" in embed_folder(root, out)[1]
    moved = root.rename(tmp_path / "moved")  # the same files at another place
    assert "up to date: 6 rows" in embed_folder(moved, out)[1]


@pytest.mark.parametrize("name", ["a.npy", "a.parquet", "a.npz"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_finished_file_that_is_cut_is_made_anew_with_a_word(tmp_path: Path, name: str, kept: float) -> None:
    root, out = folder_of(tmp_path / "photos", 6), tmp_path / name
    embed_folder(root, out)
    whole = out.read_bytes()
    out.write_bytes(whole[: int(kept * len(whole))])
    assert "anew: it is cut or damaged" in embed_folder(root, out)[1]
    assert out.read_bytes() == whole
    assert "up to date" in embed_folder(root, out)[1]


def test_a_finished_file_of_changed_images_or_encoder_is_made_anew_with_a_word(tmp_path: Path) -> None:
    root, out = folder_of(tmp_path / "photos", 6), tmp_path / "a.npy"
    embed_folder(root, out)
    Image.fromarray(image(77)).save(root / "class1" / "new.png")
    assert "anew: the images have changed" in embed_folder(root, out)[1]
    np.testing.assert_allclose(np.load(out), truth([*range(6), 77]), **CLOSE)
    assert "anew: the encoder" in embed_folder(root, out, seed=1)[1]
    np.testing.assert_allclose(np.load(out), truth([*range(6), 77], 1), **CLOSE)


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    root, out = folder_of(tmp_path / "photos", 6), tmp_path / "a.npy"
    out.write_bytes(b"thesis")
    with pytest.raises(UsageError, match=r"a\.npy is there.*remove"):
        embed_folder(root, out)
    assert out.read_bytes() == b"thesis"
    out.unlink()
    embed_folder(root, out)
    with pytest.raises(UsageError, match=r"holds the embeddings of folder:\S*photos, not of \S*others.*another --out"):
        embed_folder(folder_of(tmp_path / "others", 4), out)
    beside(out, "json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.npy\.json is damaged.*remove"):
        embed_folder(root, out)


def test_another_process_that_writes_the_file_is_named(tmp_path: Path) -> None:
    root, out = folder_of(tmp_path / "photos", 4), tmp_path / "a.npy"
    with held(tmp_path / ".a.npy.lock"), pytest.raises(TakenError, match=r"a\.npy is being written.*wait"):
        embed_folder(root, out)


# corrupt images


def test_a_corrupt_image_stops_and_after_its_repair_the_same_call_goes_on(tmp_path: Path) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / "a.npy"
    (root / "class1" / "006.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"class1/006\.png cannot be read.*--skip-corrupt"):
        embed_folder(root, out)
    Image.fromarray(image(6)).save(root / "class1" / "006.png")
    assert "going on after 4 of 10" in embed_folder(root, out)[1]
    np.testing.assert_allclose(np.load(out), truth(list(range(10))), **CLOSE)


@pytest.mark.parametrize("name", ["a.npy", "a.parquet", "a.npz"])
def test_a_corrupt_image_that_may_be_skipped_has_no_row(tmp_path: Path, name: str) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / name
    (root / "class1" / "006.png").write_bytes(b"<html>")
    Image.fromarray(image(0)[:4]).save(root / "class0" / "003.png")  # 4 x 16 pixels
    _, said = embed_folder(root, out, skip_corrupt=True)
    assert "8 rows" in said
    assert "2 images that cannot be used have no row" in said
    numbers = [0, 1, 2, 4, 5, 7, 8, 9]
    np.testing.assert_allclose(read_embeddings(out), truth(numbers), **CLOSE)
    origin = made_of(out)
    assert list(origin.kept()) == numbers
    assert [(row, "6.png" in problem) for row, problem in origin.left_out] == [(3, False), (6, True)]
    if name == "a.npy":
        assert [row[0] for row in rows_of_csv(out)] == [f"class{n // 5}/{n:03}.png" for n in numbers]
    with pytest.raises(DataError, match=r"006\.png.*--skip-corrupt"):
        embed_folder(root, out)  # what was left out is not passed over in silence


def test_a_folder_of_corrupt_images_alone_is_named(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    root.mkdir()
    (root / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no image that can be used.*a\.png"):
        embed_folder(root, tmp_path / "a.npy", skip_corrupt=True)
    assert not (tmp_path / "a.npy").exists()


def test_a_full_disk_is_named_and_the_same_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = folder_of(tmp_path / "photos", 10), tmp_path / "a.npy"
    monkeypatch.setattr(embedding_file, "SAVE_SECONDS", 0.0)
    fsync, calls = os.fsync, list[int]()

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left.*free space.*a\.npy\.partial"):
            embed_folder(root, out)
    assert "going on after" in embed_folder(root, out)[1]
    np.testing.assert_allclose(np.load(out), truth(list(range(10))), **CLOSE)


def test_an_encoder_of_nan_is_named(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", 4)
    broken = small_embedder()
    next(broken.encoder.parameters()).data[:] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*runs/x.*another run"):
        broken.embed([broken.view(image(0))])
    assert root.exists()


# memory


class Live:
    """Counts the images that are alive, and the most there were at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()

    def change(self, by: int) -> None:
        with self.lock:
            self.now += by
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("count", [24, 96])
def test_no_more_images_are_alive_the_longer_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """At most the batch in use and the next one, of four images each, whatever their number is."""
    import weakref

    live, view, rows = Live(), embed.Embedder.view, list[int]()

    def counted(self: embed.Embedder, pixels: NDArray[np.uint8]) -> torch.Tensor:
        made = view(self, pixels)
        live.change(1)
        weakref.finalize(made, live.change, -1)
        return made

    append = embedding_file.EmbeddingFile.append

    def appended(self: embedding_file.EmbeddingFile, part: NDArray[np.float32], origin: embedding_file.Origin) -> None:
        rows.append(len(part))
        append(self, part, origin)

    monkeypatch.setattr(embed.Embedder, "view", counted)
    monkeypatch.setattr(embedding_file.EmbeddingFile, "append", appended)
    embed_folder(folder_of(tmp_path / "photos", count), tmp_path / "a.npy")
    assert sum(rows) == count
    assert max(rows) == 4
    assert live.now == 0
    assert 4 <= live.most <= 8


@pytest.mark.parametrize("name", ["a.npz", "a.parquet"])
def test_a_file_is_written_in_groups_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(embedding_file, "GROUP_ROWS", 5)
    sizes, groups = list[int](), embedding_file._groups

    def counted(origin: embedding_file.Origin):
        for group in groups(origin):
            sizes.append(len(group))
            yield group

    monkeypatch.setattr(embedding_file, "_groups", counted)
    embed_folder(folder_of(tmp_path / "photos", 23), tmp_path / name)
    assert max(sizes) == 5
    if name == "a.npz":
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None


def test_the_json_says_what_the_rows_are_made_of(tmp_path: Path) -> None:
    root, out = folder_of(tmp_path / "photos", 6), tmp_path / "a.npy"
    embed_folder(root, out)
    said = json.loads(beside(out, "json").read_text())
    assert (said["images"], said["features"], said["source"]) == (6, 32, f"folder:{root}")
