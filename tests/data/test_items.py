"""Items of a Dataset: what becomes an image, what is refused, and reading by worker processes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from mnclglf.data.errors import DataError
from mnclglf.data.images import ImageArray, ImageSet
from mnclglf.data.items import ImageItems, pixels_of, read_batches, read_item
from mnclglf.data.sources import Request
from mnclglf.data.sources.objects import give_object, given_object
from tests.helpers.image_folder import load, pixels

PICTURE = pixels(9, 14)
CHW = PICTURE.transpose(2, 0, 1)


def loaded(train: object, test: object = None) -> tuple[ImageSet, ImageSet | None]:
    return given_object(give_object(train, test)).load(Request())


@pytest.mark.parametrize(
    "item",
    [
        Image.fromarray(PICTURE),
        PICTURE,
        CHW,
        torch.from_numpy(PICTURE.copy()),
        torch.from_numpy(CHW.copy()),
        np.concatenate([PICTURE, PICTURE[..., :1]], axis=2),  # a fourth channel
        torch.from_numpy(CHW.astype(np.uint16) * 257),
        (Image.fromarray(PICTURE), 3),
        [PICTURE],
        {"img": PICTURE, "label": np.int64(3)},
        {"image": Image.fromarray(PICTURE), "labels": torch.tensor(3), "more": "text"},
    ],
    ids=["pil", "array", "array-chw", "tensor", "tensor-chw", "rgba", "uint16", "pair", "list", "dict", "hub"],
)
def test_every_form_of_an_image_is_read(item: Any) -> None:
    found = read_item([item], 0, "x")
    np.testing.assert_array_equal(found.pixels, PICTURE)
    assert found.pixels.dtype == np.uint8
    assert found.label in (3, None)


def test_gray_and_16_bits() -> None:
    gray = PICTURE[..., 0]
    for image in (gray, gray[None], gray[..., None], torch.from_numpy(gray.copy()), Image.fromarray(gray)):
        np.testing.assert_array_equal(pixels_of(image), gray[..., None].repeat(3, axis=2))
    np.testing.assert_array_equal(pixels_of(gray.astype(np.uint16) * 257), pixels_of(gray))


def test_where_both_orders_fit_a_tensor_has_its_channels_first_and_an_array_last() -> None:
    both = np.random.default_rng(0).integers(0, 256, (3, 20, 3), dtype=np.uint8).repeat(4, axis=1)
    with pytest.raises(ValueError, match="80 x 3 pixels"):
        pixels_of(torch.from_numpy(both))  # 3 channels of 80 x 3
    with pytest.raises(ValueError, match="3 x 80 pixels"):
        pixels_of(both)


@pytest.mark.parametrize(
    ("item", "named"),
    [
        (torch.rand(3, 9, 9), r"item 0 is float32: .*ToTensor, .*PILToTensor"),
        (np.zeros((9, 9, 3)), "float64"),
        (np.zeros((9, 9, 3), np.int64), "int64.*uint8"),
        (np.zeros((9, 9, 5), np.uint8), r"\(9, 9, 5\).*1, 3 or 4 channels"),
        (np.zeros((2, 9, 9, 3), np.uint8), r"\(2, 9, 9, 3\)"),
        (np.zeros((7, 9, 3), np.uint8), "7 x 9 pixels, smaller than 8"),
        ("a.png", "is a str: give a PIL image"),
        ({"pixel_values": PICTURE}, "dict of pixel_values: name the image image or img"),
        ((PICTURE, 1, 2), "tuple of 3"),
        ((PICTURE, "cat"), "label 'cat'.*number of its class"),
        ((PICTURE, -1), "label -1"),
        ((PICTURE, 0.5), r"label 0\.5"),
    ],
)
def test_what_is_no_image_is_refused_with_the_remedy(item: Any, named: str) -> None:
    with pytest.raises(DataError, match=f"x: item 0 .*{named}|x: {named}"):
        read_item([item], 0, "x")


def cut_file(kind: str) -> Image.Image:
    """Returns the image of a file that is cut, which Pillow notices when the pixels are needed."""
    file = io.BytesIO()
    Image.fromarray(PICTURE.repeat(8, axis=0).repeat(8, axis=1)).save(file, kind)
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


def closed_image() -> Image.Image:
    image = Image.fromarray(PICTURE)
    image.close()
    return image


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (lambda: cut_file("JPEG"), "OSError: image file is truncated"),
        (lambda: cut_file("PNG"), "OSError: "),
        (closed_image, "ValueError: Operation on closed image"),
        (lambda: torch.from_numpy(PICTURE.copy()).to("meta"), "NotImplementedError: "),
        (lambda: torch.from_numpy(PICTURE.copy()).to_sparse(), "TypeError: "),
    ],
    ids=["jpeg", "png", "closed", "meta", "sparse"],
)
def test_an_image_whose_pixels_cannot_be_had_is_named(item: Callable[[], Any], why: str) -> None:
    with pytest.raises(DataError, match=rf"^x: item 1 cannot be read \({why}.*repair it, or leave it out"):
        read_item([PICTURE, (item(), 1)], 1, "x")


class Fails(Dataset[Any]):
    """The third item cannot be read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            raise OSError("truncated")
        return np.full((10, 10 + index, 3), index, np.uint8)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_that_fails_is_named_also_from_a_worker(workers: int) -> None:
    plan = [np.array([0, 1]), np.array([5, 2])]
    read = read_batches(Fails(), plan, name="object:Fails", workers=workers)
    assert [item.pixels.shape for item in next(read)] == [(10, 10, 3), (10, 11, 3)]
    with pytest.raises(DataError, match=r"^object:Fails: item 2 cannot be read \(OSError: truncated\).*Subset"):
        next(read)


def test_workers_read_the_same_in_order_and_leave_random_numbers_alone() -> None:
    items = [np.random.default_rng(n).integers(0, 256, (9 + n % 3, 9, 3), dtype=np.uint8) for n in range(23)]
    plan = [np.random.default_rng(n).integers(0, 23, 5) for n in range(7)]
    state = torch.get_rng_state()
    batches = list(read_batches(items, plan, name="x", workers=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(batches) == 7
    for indices, batch in zip(plan, batches, strict=True):
        for index, item in zip(indices, batch, strict=True):
            np.testing.assert_array_equal(item.pixels, items[index])


def test_small_images_of_one_size_are_in_memory_and_others_are_not() -> None:
    small, _ = loaded([(np.full((16, 20), n, np.uint8), n % 2) for n in range(6)])
    assert isinstance(small, ImageArray)
    assert small.images.shape == (6, 16, 20, 3)
    for items in ([PICTURE, pixels(10, 14)], [pixels(65, 20)] * 3):
        others, _ = loaded(items)
        assert isinstance(others, ImageItems)
        for row, pixel in enumerate(items):
            np.testing.assert_array_equal(others.pixels(row), pixel)


def test_items_have_the_statistics_and_sizes_of_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = [pixels(9 + n % 4, 30 - n, n) for n in range(9)]
    for number, picture in enumerate(pictures):
        (tmp_path / "x").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "x" / f"{number}.png")
    files, _ = load(tmp_path / "x")
    items, _ = loaded(pictures)
    for ours, theirs in zip(items.statistics(), files.statistics(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rows = np.arange(9)
    for ours, theirs in zip(items.sizes(rows), files.sizes(rows), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    flat = np.concatenate([picture.reshape(-1, 3).mean(0)[None] for picture in pictures]) / 255
    np.testing.assert_allclose(items.statistics()[0], flat.mean(0), rtol=1e-6)  # fp32


def test_a_fingerprint_is_of_pixels_and_labels_not_of_the_object() -> None:
    def fingerprint(change: Callable[[list[Any]], object] = lambda items: None) -> str:
        items = [(pixels(9 + n, 12, n), n % 2) for n in range(5)]
        change(items)
        return loaded(items)[0].fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    for change in (
        lambda items: items[3][0].__setitem__((0, 0, 0), items[3][0][0, 0, 0] ^ 1),
        lambda items: items.__setitem__(1, (items[1][0], 0)),
        lambda items: items.reverse(),
        lambda items: items.pop(),
    ):
        assert fingerprint(change) != first


def test_names_of_classes(tmp_path: Path) -> None:
    class Named(list[Any]):
        classes = ("cat", "dog")

    class Column:
        names = ("owl", "eel")

    class HuggingFace(list[Any]):
        features = MappingProxyType({"image": None, "label": Column()})

    items = [(PICTURE, 0), (PICTURE, 1)]
    assert loaded(Named(items))[0].classes == ("cat", "dog")
    assert loaded(Subset(cast(Any, Named(items)), [1, 0]))[0].classes == ("cat", "dog")
    hugging = HuggingFace({"image": image, "label": label} for image, label in items)
    assert loaded(hugging)[0].classes == ("owl", "eel")
    assert loaded(items)[0].classes == ("0", "1")
    assert loaded([PICTURE])[0].classes == ()
    assert loaded([PICTURE])[0].labels.tolist() == [-1]


class Jumping(Dataset[Any]):
    """A random transform."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng().integers(0, 256, (12, 12, 3), dtype=np.uint8)


class Flowing(IterableDataset[Any]):
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter([PICTURE] * 3)


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return PICTURE

    def __len__(self) -> int:
        raise RuntimeError("no end is known")


@pytest.mark.parametrize(
    ("items", "named"),
    [
        (Jumping(), r"object:Jumping: item \d is another image each time.*random transforms"),
        (Flowing(), "object:Flowing.*map-style.*folder:PATH"),
        (object(), "object:object.*__getitem__ and __len__"),
        (Endless(), r"object:Endless.*no length \(RuntimeError: no end is known\).*map-style"),
        (Jumping, r"Jumping is a class: give an object of it, as Jumping\("),
        ([], "object:list holds no images"),
        ([(PICTURE, 0), PICTURE], "item 1 has no label, and others have"),
        ([(PICTURE, 10**6)], "label 1000000 is no number of a class"),
    ],
    ids=["random", "iterable", "object", "endless", "class", "empty", "some", "large"],
)
def test_a_dataset_that_cannot_be_used_is_refused(items: object, named: str) -> None:
    with pytest.raises(DataError, match=named):
        loaded(items)


def test_images_to_test_on_need_labels_of_the_training_images() -> None:
    train = [(PICTURE, 0), (PICTURE, 1)]
    with pytest.raises(DataError, match=r"test_dataset has the label 2.*classes 0 to 1"):
        loaded(train, [(PICTURE, 2)])
    with pytest.raises(DataError, match="test_dataset has no labels"):
        loaded(train, [PICTURE])
    _, test = loaded(train, [(PICTURE, 1)])
    assert test is not None
    assert test.labels.tolist() == [1]


def test_an_object_is_read_once_and_again_when_it_has_changed() -> None:
    class Counted(list[Any]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            type(self).reads += 1
            return super().__getitem__(index)

    items = Counted((np.full((70, 70, 3), n, np.uint8), 0) for n in range(200))
    first, _ = loaded(items)
    assert Counted.reads == 200 + 64  # and 64 again, to see whether they stay what they are
    Counted.reads = 0
    assert loaded(items)[0].fingerprint() == first.fingerprint()
    assert Counted.reads == 64
    items[0] = (np.full((70, 70, 3), 77, np.uint8), 0)
    assert loaded(items)[0].fingerprint() != first.fingerprint()
