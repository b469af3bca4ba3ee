"""shards:PATTERN: the batches of a folder with the same images, labels, splits, corrupt samples, resuming."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_folder import load as load_folder
from image_folder import pixels
from shards import encoded, load_shards, write_shards, write_tar

from mnclglf.config import ViewConfig
from mnclglf.data import ranges
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError, UnreachableError
from mnclglf.data.images import ImageSet
from mnclglf.data.loader import Loader
from mnclglf.data.loaders import make_loader
from mnclglf.data.sources import cache_dir, examination

try:
    import nvidia.dali  # noqa: F401

    BACKENDS = ["reference", "dali"]
except ImportError:
    BACKENDS = ["reference"]
COUNT = 23


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def loader_of(images: ImageSet, backend: str, **changes: Any) -> Loader:
    arguments: dict[str, Any] = dict(
        view=ViewConfig(rotation_degrees=10), views=2, side=12, batch_size=4, seed=5, dtype=torch.float32,
        device=torch.device("cpu"), backend=backend, threads=2,
    )  # fmt: skip
    return make_loader(images, **(arguments | changes))


KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("JPEG", "jpg", {"quality": 90}),
    ("PNG", "png", {}),
    ("WEBP", "webp", {}),
    ("TIFF", "tif", {}),  # decoded by Pillow, beside files that DALI decodes
    ("GIF", "gif", {}),
    ("BMP", "bmp", {}),
]


@pytest.fixture
def both(photos: Callable[..., np.ndarray], tmp_path: Path) -> tuple[Path, Path]:
    """Makes a folder of two classes and shards of the same images in the same order, of many kinds and sizes."""
    from PIL import Image

    turned = Image.Exif()
    turned[0x0112] = 6
    folder, members = tmp_path / "photos", list[tuple[str, bytes]]()
    for row, image in enumerate(photos(COUNT, 40)):
        kind, suffix, how = KINDS[row % len(KINDS)]
        how = how | ({"exif": turned} if kind == "JPEG" and row % 4 == 0 else {})
        data = encoded(image[: 14 + row % 5, : 12 + 2 * (row % 7)], kind, **how)
        label = int(row >= 11)
        path = folder / "ab"[label] / f"{row:03}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        members += [(f"{row:03}.{suffix}", data), (f"{row:03}.cls", str(label).encode())]
    for number in range(3):
        write_tar(tmp_path / "shards" / f"train-{number}.tar", members[number * 16 : (number + 1) * 16])
    return folder, tmp_path / "shards"


@pytest.mark.parametrize("block", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_are_those_of_a_folder_with_the_same_images(
    both: tuple[Path, Path], backend: str, block: int | None
) -> None:
    files, (packed, _) = load_folder(both[0])[0], load_shards(both[1])
    assert packed.labels.tolist() == files.labels.tolist()
    assert packed.classes == ("0", "1")
    assert [Path(name).name for name in packed.paths] == [Path(name).name for name in files.paths]
    assert packed.digests == files.digests
    assert all(np.array_equal(a, b) for a, b in zip(packed.statistics(), files.statistics(), strict=True))
    for row in range(COUNT):
        np.testing.assert_array_equal(packed.pixels(row), files.pixels(row))
    ours, theirs = (list(loader_of(images, backend, shuffle_block=block).batches(2, 9)) for images in (packed, files))
    assert len(ours) == 7
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.views, two.views)
    rows = np.array([7, 0, 22])
    for one, two in zip(*(loader_of(images, backend).render(rows, 3) for images in (packed, files)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_has_the_same_batch_wherever_the_run_starts(both: tuple[Path, Path], backend: str) -> None:
    images, _ = load_shards(both[1])
    whole = list(loader_of(images, backend, shuffle_block=2).batches(0, 8))
    for start in (1, 4, 7):
        resumed = list(loader_of(images, backend, shuffle_block=2).batches(start, 8))
        assert all(torch.equal(a.views, b.views) for a, b in zip(resumed, whole[start:], strict=True))


def test_a_part_of_the_images_and_its_names(both: tuple[Path, Path]) -> None:
    images, _ = load_shards(both[1])
    part = images.subset([9, 2])
    assert part.names(np.array([0, 1])) == ["train-1.tar/009.tif", "train-0.tar/002.webp"]
    np.testing.assert_array_equal(part.pixels(0), images.pixels(9))
    assert part.published_rows(np.array([0])).tolist() == [9]
    assert images.place(9) == f"{both[1]}/train-1.tar/009.tif"


def test_the_order_is_that_of_the_names_of_shards_and_then_of_each_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "d/train-b.tar", [(f"{key}.png", encoded(pixels(seed=1))) for key in ("2", "1")])
    write_tar(tmp_path / "d/train-a.tar", [(f"{key}.png", encoded(pixels(seed=2))) for key in ("9", "3")])
    images, test = load_shards(tmp_path / "d")
    assert images.paths == ("train-a.tar/9.png", "train-a.tar/3.png", "train-b.tar/2.png", "train-b.tar/1.png")
    assert test is None
    assert not images.labeled


def test_files_from_the_root_and_from_the_working_folder_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, [("1.png", encoded(pixels()))])
    monkeypatch.chdir(tmp_path)
    named = rf"shards:\{{\S*a\.tar,b\.tar\}} names {tmp_path}/a\.tar, .* and b\.tar, .*; give all of them from /"
    with pytest.raises(DataError, match=named):
        load_shards(f"{{{tmp_path}/a.tar,b.tar}}")


def test_a_split_has_labels_and_names_of_classes(tmp_path: Path) -> None:
    images = [pixels(seed=n) for n in range(9)]
    write_shards(tmp_path / "d", images[:6], [0, 1, 2, 0, 1, 2], each=4)
    write_shards(tmp_path / "d", images[6:], [2, 1, 0], each=4, name="val")
    train, test = load_shards(tmp_path / "d")
    assert test is not None
    assert (train.classes, test.classes, test.split) == (("0", "1", "2"), ("0", "1", "2"), "test")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2, 0, 1, 2], [2, 1, 0])
    (tmp_path / "d/classes.txt").write_text("cat\ndog\nrat\n")
    assert load_shards(tmp_path / "d")[0].classes == ("cat", "dog", "rat")
    (tmp_path / "d/classes.txt").write_text("cat\ndog\n")  # too few
    assert load_shards(tmp_path / "d")[0].classes == ("0", "1", "2")


def test_labels_that_do_not_fit_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [pixels(seed=n) for n in range(3)]
    write_shards(tmp_path / "d", images, [0, 1, 1], each=4)
    write_shards(tmp_path / "d", images, [0, 1, 2], each=4, name="val")
    with pytest.raises(DataError, match=r"label 2.*classes 0 to 1"):
        load_shards(tmp_path / "d")
    write_shards(tmp_path / "d", images, None, each=4, name="val")
    with caplog.at_level(logging.WARNING):
        assert load_shards(tmp_path / "d")[1] is None
    assert "no labels" in caplog.text
    write_tar(tmp_path / "m/a.tar", [("1.png", encoded(images[0])), ("1.cls", b"0"), ("2.png", encoded(images[1]))])
    with pytest.raises(DataError, match=r"a\.tar/2\.png has no label, and others have"):
        load_shards(tmp_path / "m")
    write_shards(tmp_path / "many", images, [0, 1, 70_000], each=4)
    with pytest.raises(DataError, match="label 70000 is no number of a class"):
        load_shards(tmp_path / "many")


def test_what_is_no_image_is_left_alone_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = ("1.png", encoded(pixels()))
    write_tar(tmp_path / "d/a.tar", [whole, ("1.txt", b"caption"), ("2.avif", b"?"), ("2.cls", b"1"), ("notes", b"")])
    with caplog.at_level(logging.WARNING):
        images, _ = load_shards(tmp_path / "d")
    assert images.paths == ("a.tar/1.png",)
    assert "1 samples have no image: 2" in caplog.text
    write_tar(tmp_path / "e/a.tar", [("1.txt", b"caption")])
    with pytest.raises(DataError, match="holds no image"):
        load_shards(tmp_path / "e")


def spoiled(how: str) -> list[tuple[str, bytes]]:
    good = [(f"{n}.png", encoded(pixels(seed=n))) for n in range(3)]
    bad = {
        "cut": [("x.png", good[0][1][:60])],
        "empty": [("x.png", b"")],
        "text": [("x.png", b"<html>404</html>")],
        "small": [("x.png", encoded(pixels(4, 4)))],
        "label": [("x.png", good[0][1]), ("x.cls", b"cat")],
        "json": [("x.png", good[0][1]), ("x.json", b"{")],
    }[how]
    return [*good[:1], *bad, *good[1:]]


@pytest.mark.parametrize("how", ["cut", "empty", "text", "small", "label", "json"])
def test_a_corrupt_sample_among_good_ones_is_named_or_left_out(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "d/a.tar", spoiled(how))
    with pytest.raises(DataError, match=r"1 of 4 image files of .* cannot be used: a\.tar/x\.png .*--skip-corrupt"):
        load_shards(tmp_path / "d")
    with caplog.at_level(logging.WARNING):
        images, _ = load_shards(tmp_path / "d", skip_corrupt=True)
    assert images.paths == ("a.tar/0.png", "a.tar/1.png", "a.tar/2.png")
    assert "1 of 4 image files" in caplog.text
    assert len(images.corrupt) == 1
    for row in range(3):
        np.testing.assert_array_equal(images.pixels(row), pixels(seed=row))


@pytest.mark.parametrize("member", ["0.png", "0.cls"])
def test_a_sample_that_cannot_be_read_now_is_not_left_out_as_corrupt(
    tmp_path: Path, member: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {"0.png": encoded(pixels()), "0.cls": b"1"}
    write_tar(tmp_path / "d/a.tar", [*contents.items(), ("1.png", contents["0.png"]), ("1.cls", b"0")])
    read = os.pread

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if size == len(contents[member]):
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(UnreachableError, match=r"a\.tar cannot be read .*Input/output error.*check the disk"):
        load_shards(tmp_path / "d", skip_corrupt=True)


def test_images_are_examined_once_and_again_where_a_shard_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    real = examination.decode_image
    monkeypatch.setattr(
        examination, "decode_image", lambda data, path: (decoded.append(str(path)), real(data, path))[1]
    )
    write_shards(tmp_path / "d", [pixels(seed=n) for n in range(6)], [0, 1] * 3, each=3)
    before, _ = load_shards(tmp_path / "d")
    assert len(decoded) == 6
    again, _ = load_shards(tmp_path / "d/train-{0000..0001}.tar")
    assert len(decoded) == 6
    assert again.fingerprint() == before.fingerprint()
    assert again.labels.tolist() == before.labels.tolist() == [0, 1] * 3
    kept = cache_dir("shards").glob("*.npz")
    assert len(list(kept)) == 2
    write_tar(tmp_path / "d/train-0001.tar", [("00003.png", encoded(pixels(seed=3))), ("00003.cls", b"0")])
    changed, _ = load_shards(tmp_path / "d")
    assert len(decoded) == 7
    assert len(changed) == 4
    assert changed.fingerprint() != before.fingerprint()


def test_a_shard_that_is_cut_or_no_tar_is_refused_by_name(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [pixels(seed=n) for n in range(6)], None, each=3)
    shard = tmp_path / "d/train-0001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000])
    with pytest.raises(DataError, match=r"train-0001\.tar is cut"):
        load_shards(tmp_path / "d")
    shard.write_bytes(b"<html>404</html>" * 99)
    with pytest.raises(DataError, match=r"train-0001\.tar is damaged or no tar"):
        load_shards(tmp_path / "d")


def test_malicious_members_are_left_out_by_name_and_nothing_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = encoded(pixels())
    write_tar(tmp_path / "d/a.tar", [("../evil.png", data), ("/evil.png", data), ("good.png", data)])
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    with caplog.at_level(logging.WARNING):
        images, _ = load_shards(tmp_path / "d")
    assert images.paths == ("a.tar/good.png",)
    assert "2 members are left out: '../evil.png'" in caplog.text
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before | {tmp_path / "d/a.idx"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shard_that_changes_while_a_run_reads_is_named(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "d", [pixels(seed=n) for n in range(8)], None, each=4)
    images, _ = load_shards(tmp_path / "d")
    shard = tmp_path / "d/train-0001.tar"
    os.truncate(shard, 2000)
    with pytest.raises(DataError, match=r"train-0001\.tar"):
        list(loader_of(images, backend).batches(0, 4))
    shard.unlink()
    monkeypatch.setattr(ranges.LocalFile, "_open", ranges._Kept(4))
    with pytest.raises(DataError, match=r"train-0001\.tar.*no such file"):
        loader_of(images, backend).render(np.arange(8), 0)
    write_tar(shard, [("a.png", encoded(pixels()))])
    with pytest.raises(DataError, match=r"train-0001\.tar has changed since"):
        loader_of(images, backend).render(np.arange(8), 0)


def open_files() -> list[str]:
    names: list[str] = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            names.append(os.readlink(link))
    return names


def test_few_files_are_open_at_once_and_threads_may_share_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges.LocalFile, "_open", ranges._Kept(3))
    write_shards(tmp_path / "d", [pixels(seed=n) for n in range(40)], None, each=4)
    images, _ = load_shards(tmp_path / "d")
    wrong: list[int] = []

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, 40, 200).tolist()
        wrong.extend(row for row in rows if images.contents(row) != encoded(pixels(seed=row)))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    still_open = [name for name in open_files() if name.startswith(f"{tmp_path}/d/train")]
    assert len(still_open) == 3


def test_contents_are_read_ahead_in_order(tmp_path: Path) -> None:
    write_shards(tmp_path / "d", [pixels(seed=n) for n in range(12)], None, each=5)
    images, _ = load_shards(tmp_path / "d")
    plan = [np.array(rows) for rows in ([3, 0, 11], [7], [1, 2], [5, 5], [10])]
    for threads in (1, 3):
        made = list(images.contents_ahead(iter(plan), threads))
        assert made == [[encoded(pixels(seed=row)) for row in rows] for rows in plan]


def test_a_second_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_dir \S*nowhere .*leave out --data-dir"):
        load_dataset(f"shards:{tmp_path}", tmp_path / "nowhere")
