from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import tarfile
import urllib.error
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sklearn.datasets import load_digits
from torchvision.datasets import utils

from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray
from mnclglf.data.sources import SOURCES, cache_dir, cifar, fashion_mnist
from mnclglf.data.sources.cifar import Cifar10, Cifar100
from mnclglf.data.sources.fashion_mnist import DEBIAN

RECORDS = 4  # in each batch file of the small CIFAR-10 below


@pytest.fixture(autouse=True)
def no_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides this machine's data sets and caches, and forbids downloads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "no-debian-package")

    def refuse(url: str, *_: object, **__: object) -> None:
        raise urllib.error.URLError(f"no network in tests: {url}")

    monkeypatch.setattr(utils, "download_url", refuse)


def load(name: str, data_dir: Path | None = None, *, download: bool = False) -> tuple[ImageArray, ImageArray]:
    """Returns the training and the test images of a data set that has both, and in memory."""
    train, test = load_dataset(name, data_dir, download=download)
    assert isinstance(train, ImageArray)
    assert isinstance(test, ImageArray)
    return train, test


@pytest.mark.parametrize(("name", "train", "test", "side"), [("mnist5k", 4000, 1000, 28), ("digits", 1447, 350, 8)])
def test_digits_are_split_evenly_and_for_good(name: str, train: int, test: int, side: int) -> None:
    sets = load(name)
    assert [len(part) for part in sets] == [train, test]
    for part, split in zip(sets, ("train", "test"), strict=True):
        assert (part.name, part.split, part.classes) == (name, split, tuple("0123456789"))
        assert part.images.shape == (len(part), side, side, 3)
        assert part.images.max() == 255
        assert (part.images == part.images[..., :1]).all()  # gray
        assert part.labels.dtype == np.int64
    assert set(np.bincount(sets[1].labels)) == {test // 10}
    # the choice must never change: a later version would test on images that an earlier one trained on
    digest = hashlib.sha256(sets[1].images.tobytes() + sets[1].labels.tobytes()).hexdigest()
    assert digest[:16] == {"mnist5k": "5d2f04a088890536", "digits": "2567e550514b4de0"}[name]


def test_no_image_is_in_both_parts_and_labels_stay_with_images() -> None:
    train, test = load("digits")
    whole = np.concatenate([train.images, test.images])[..., 0].reshape(-1, 64)

    pixels, labels = load_digits(return_X_y=True)
    scaled = np.rint(pixels * 255 / 16).astype(np.uint8)
    pairs = sorted((*row, label) for row, label in zip(scaled.tolist(), labels.tolist(), strict=True))
    found = np.concatenate([train.labels, test.labels]).tolist()
    assert sorted((*row, label) for row, label in zip(whole.tolist(), found, strict=True)) == pairs


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_the_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", DEBIAN)
    train, test = load("fashion_mnist")
    assert train.images.shape == (60_000, 28, 28, 3)
    assert test.images.shape == (10_000, 28, 28, 3)
    assert set(np.bincount(train.labels)) == {6000}
    assert train.classes[train.labels[0]] == "Ankle boot"  # as its README shows


def write_fashion_mnist(folder: Path, *, suffix: str = ".gz", images: int = 60_000, labels: int = 60_000) -> None:
    """Writes black images, which compress quickly; every tenth label is 3."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, counts in (("train", (images, labels)), ("t10k", (10_000, 10_000))):
        sizes = struct.pack(">4B3I", 0, 0, 8, 3, counts[0], 28, 28), struct.pack(">4BI", 0, 0, 8, 1, counts[1])
        contents = bytes(counts[0] * 784), bytes([3] + [0] * 9) * (counts[1] // 10)
        for kind, size, content in zip(("images-idx3", "labels-idx1"), sizes, contents, strict=True):
            data = size + content
            path = folder / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(data, 1) if suffix else data)


@pytest.mark.parametrize("where", ["files", "FashionMNIST/raw"])
def test_fashion_mnist_in_a_folder(tmp_path: Path, where: str) -> None:
    write_fashion_mnist(tmp_path / "d" / where, suffix="" if where == "files" else ".gz")
    train, test = load("fashion_mnist", tmp_path / "d" / where if where == "files" else tmp_path / "d")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert (train.labels[:11] == [3] + [0] * 9 + [3]).all()
    assert (train.name, train.split, test.split) == ("fashion_mnist", "train", "test")


def test_fashion_mnist_of_another_size_is_refused(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, labels=50_000)
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz: holds an array \(50000,\)"):
        load_dataset("fashion_mnist", tmp_path)


def test_missing_files_name_what_where_and_the_remedies(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        load_dataset("fashion_mnist")
    for part in ("train-images-idx3-ubyte.gz", "no-debian-package", str(cache_dir("fashion_mnist"))):
        assert part in str(raised.value)
    for remedy in ("--data-dir", "--download", "apt install dataset-fashion-mnist"):
        assert remedy in str(raised.value)
    with pytest.raises(DataError) as raised:
        load_dataset("cifar10", tmp_path / "elsewhere")
    for part in ("cifar-10-batches-bin", "cifar-10-python.tar.gz", "elsewhere", "--data-dir", "--download"):
        assert part in str(raised.value)
    assert "apt" not in str(raised.value)


def test_a_given_folder_is_the_only_one_that_is_looked_in(tmp_path: Path) -> None:
    write_fashion_mnist(cache_dir("fashion_mnist"))
    load_dataset("fashion_mnist")
    with pytest.raises(DataError, match="empty"):
        load_dataset("fashion_mnist", tmp_path / "empty")


# CIFAR-10


@pytest.fixture
def small_cifar10(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Returns pixels [6, RECORDS, 3, 32, 32] of a small CIFAR-10, in which record r of file f has label f + r."""
    monkeypatch.setattr(Cifar10, "records", (RECORDS, RECORDS))
    return np.random.default_rng(0).integers(0, 256, (6, RECORDS, 3, 32, 32), dtype=np.uint8)


def write_cifar10(folder: Path, form: str, pixels: np.ndarray) -> Path:
    """Writes the batch files of one form in their own folder below `folder`."""
    batches = folder / {"bin": "cifar-10-batches-bin", "py": "cifar-10-batches-py"}[form]
    batches.mkdir(parents=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, (name, images) in enumerate(zip(names, pixels, strict=True)):
        labels = [number + record for record in range(RECORDS)]
        if form == "bin":
            records = [bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True)]
            (batches / f"{name}.bin").write_bytes(b"".join(records))
        else:
            batch = {b"data": images.reshape(RECORDS, 3072), b"labels": labels}
            (batches / name).write_bytes(pickle.dumps(batch, protocol=2))
    return batches


def assert_is_small_cifar10(sets: tuple[ImageArray, ImageArray], pixels: np.ndarray) -> None:
    train, test = sets
    assert (len(train), len(test)) == (5 * RECORDS, RECORDS)
    assert (train.name, train.split, test.name, test.split) == ("cifar10", "train", "cifar10", "test")
    np.testing.assert_array_equal(train.images, pixels[:5].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(test.images, pixels[5].transpose(0, 2, 3, 1))
    assert train.labels.tolist() == [number + record for number in range(5) for record in range(RECORDS)]
    assert test.labels.tolist() == [5 + record for record in range(RECORDS)]
    assert (train.classes[0], train.classes[6], train.classes[9]) == ("airplane", "frog", "truck")


@pytest.mark.parametrize("form", ["bin", "py"])
@pytest.mark.parametrize("place", ["folder", "inside"])
def test_cifar10_in_a_folder(tmp_path: Path, small_cifar10: np.ndarray, form: str, place: str) -> None:
    batches = write_cifar10(tmp_path, form, small_cifar10)
    assert_is_small_cifar10(load("cifar10", tmp_path if place == "folder" else batches), small_cifar10)


@pytest.mark.parametrize("form", ["bin", "py"])
def test_cifar10_in_an_archive(
    tmp_path: Path, small_cifar10: np.ndarray, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = Cifar10.forms[form == "py"]
    batches = write_cifar10(tmp_path / "made", form, small_cifar10)
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / version.archive, "w:gz") as tar:
        tar.add(batches, batches.name)
    with pytest.raises(DataError, match=f"{version.archive}: has MD5 .* where {version.md5} is published"):
        load_dataset("cifar10", folder)
    md5 = hashlib.md5((folder / version.archive).read_bytes()).hexdigest()
    monkeypatch.setattr(Cifar10, "forms", (replace(version, md5=md5),))
    assert_is_small_cifar10(load("cifar10", folder), small_cifar10)
    (folder / version.archive).unlink()
    assert_is_small_cifar10(load("cifar10", folder), small_cifar10)  # extracted for good


def test_cifar10_that_another_process_unpacks_meanwhile_is_read(
    tmp_path: Path, small_cifar10: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / Cifar10.forms[0].archive).touch()
    monkeypatch.setattr(cifar, "check_md5", lambda *_: write_cifar10(tmp_path, "bin", small_cifar10))
    assert_is_small_cifar10(load("cifar10", tmp_path), small_cifar10)


def test_cifar10_with_a_missing_or_short_file_names_it(tmp_path: Path, small_cifar10: np.ndarray) -> None:
    batches = write_cifar10(tmp_path, "bin", small_cifar10)
    short = batches / "data_batch_3.bin"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*12,291.*12,292"):
        load_dataset("cifar10", tmp_path)
    short.unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: cannot be read"):
        load_dataset("cifar10", tmp_path)


# CIFAR-100


@pytest.fixture
def small_cifar100(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Returns pixels [6, 3, 32, 32]: 4 train, 2 test. Record r has fine label 90 + r and coarse label r."""
    monkeypatch.setattr(Cifar100, "records", (4, 2))
    return np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)


def write_cifar100(folder: Path, form: str, pixels: np.ndarray) -> Path:
    made = folder / {"bin": "cifar-100-binary", "py": "cifar-100-python"}[form]
    made.mkdir(parents=True)
    for name, rows in (("train", range(4)), ("test", range(4, 6))):
        if form == "bin":
            records = [bytes([row, 90 + row]) + pixels[row].tobytes() for row in rows]
            (made / f"{name}.bin").write_bytes(b"".join(records))
        else:
            fine, coarse = [90 + row for row in rows], list(rows)
            batch = {b"data": pixels[list(rows)].reshape(-1, 3072), b"fine_labels": fine, b"coarse_labels": coarse}
            (made / name).write_bytes(pickle.dumps(batch, protocol=2))
    return made


@pytest.mark.parametrize("form", ["bin", "py"])
def test_cifar100_has_fine_labels(tmp_path: Path, small_cifar100: np.ndarray, form: str) -> None:
    write_cifar100(tmp_path, form, small_cifar100)
    train, test = load("cifar100", tmp_path)
    assert (train.labels.tolist(), test.labels.tolist()) == ([90, 91, 92, 93], [94, 95])
    assert (len(train.classes), train.classes[0], train.classes[91], train.classes[99]) == (
        100,
        "apple",
        "trout",
        "worm",
    )
    assert list(train.classes) == sorted(train.classes)
    np.testing.assert_array_equal(train.images, small_cifar100[:4].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(test.images, small_cifar100[4:].transpose(0, 2, 3, 1))


def test_cifar100_with_labels_out_of_range_is_refused(tmp_path: Path, small_cifar100: np.ndarray) -> None:
    made = write_cifar100(tmp_path, "bin", small_cifar100)
    data = bytearray((made / "train.bin").read_bytes())
    data[1] = 100
    (made / "train.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.bin: has labels from 91 to 100, outside 0\.\.99"):
        load_dataset("cifar100", tmp_path)


def test_another_version_is_not_taken_for_it(
    tmp_path: Path, small_cifar10: np.ndarray, small_cifar100: np.ndarray
) -> None:
    write_cifar10(tmp_path, "bin", small_cifar10)
    with pytest.raises(DataError, match=r"CIFAR-100.*missing.*cifar-100-binary/"):
        load_dataset("cifar100", tmp_path)
    made = write_cifar100(tmp_path / "other", "py", small_cifar100)
    batch = pickle.loads((made / "train").read_bytes())
    (made / "train").write_bytes(pickle.dumps({b"data": batch[b"data"], b"labels": [0] * 4}, protocol=2))
    with pytest.raises(DataError, match=r"train: its b'fine_labels' is not a list of 4 integers"):
        load_dataset("cifar100", tmp_path / "other")


def test_the_table_of_sources_is_the_list_of_names() -> None:
    assert all(source.name == name for name, source in SOURCES.items())
    with pytest.raises(ValueError, match="dataset 'mnist' is none of mnist5k"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="dataset 'folder:' is none of"):
        load_dataset("folder:")


# downloads, from a stand-in for the network


def test_cifar10_is_fetched_into_the_cache_once(
    tmp_path: Path, small_cifar10: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = write_cifar10(tmp_path / "server", "bin", small_cifar10)
    archive = tmp_path / "server" / "archive"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(Cifar10, "forms", (replace(Cifar10.forms[0], md5=md5),))
    fetched: list[tuple[str, str | None]] = []

    def fetch(url: str, root: Path, filename: str, md5: str | None = None) -> None:
        fetched.append((url, md5))
        root.mkdir(parents=True, exist_ok=True)
        (root / filename).write_bytes(archive.read_bytes())

    monkeypatch.setattr(utils, "download_url", fetch)
    assert_is_small_cifar10(load("cifar10", download=True), small_cifar10)
    assert fetched == [("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", md5)]
    assert_is_small_cifar10(load("cifar10", download=True), small_cifar10)
    assert_is_small_cifar10(load("cifar10"), small_cifar10)
    assert len(fetched) == 1
    assert not list(cache_dir("cifar10").glob("*.part"))


def test_fashion_mnist_is_fetched_with_the_published_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path / "server")
    checksums: dict[str, str | None] = {}

    def fetch(url: str, root: Path, filename: str, md5: str | None = None) -> None:
        name = url.rsplit("/", 1)[1]
        checksums[name] = md5
        root.mkdir(parents=True, exist_ok=True)
        (root / filename).write_bytes((tmp_path / "server" / name).read_bytes())

    monkeypatch.setattr(utils, "download_url", fetch)
    train, _ = load_dataset("fashion_mnist", tmp_path / "data", download=True)
    assert len(train) == 60_000
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(checksums)
    assert checksums["train-images-idx3-ubyte.gz"] == "8d4fb7e6c68d591d4c3dfef9ec88bf0d"
    assert len(checksums) == 4
    assert None not in checksums.values()


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_a_download_that_fails_says_so_and_leaves_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"cannot download .* no network in tests") as raised:
        load_dataset(name, tmp_path / "data", download=True)
    assert str(tmp_path / "data") in str(raised.value)

    def damaged(url: str, root: Path, filename: str, md5: str | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / filename).write_bytes(b"half a file")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(utils, "download_url", damaged)
    with pytest.raises(DataError, match="cannot download"):
        load_dataset(name, tmp_path / "data", download=True)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_a_data_set_without_files_takes_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data_dir \S*here .*{name}.*leave out --data-dir"):
        load_dataset(name, tmp_path / "here")


def test_a_folder_in_the_home_directory_may_be_given_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_fashion_mnist(tmp_path / "d")
    assert len(load("fashion_mnist", Path("~/d"))[0]) == 60_000


@pytest.mark.parametrize(("name", "module"), [("cifar10", cifar), ("fashion_mnist", fashion_mnist)])
def test_files_missing_after_a_download_say_so(
    name: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "download", lambda *_: None)  # of a server that sends nothing
    with pytest.raises(DataError, match=r"missing even after --download.*--data-dir") as raised:
        load_dataset(name, tmp_path / "d", download=True)
    assert "let --download" not in str(raised.value)
