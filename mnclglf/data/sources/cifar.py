"""CIFAR-10 and CIFAR-100, in the binary and in the pickled form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnclglf.config import DataConfig
from mnclglf.data.archives import extract, read_cifar_binary, read_cifar_pickle
from mnclglf.data.images import ImageArray
from mnclglf.data.sources.source import Request, Source, cache_dir, check_md5, download, missing

URL = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Form:
    """Published form of a set: binary or pickled."""

    folder: str
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    pickled: bool


class Cifar(Source):
    """32 x 32 images in files with the same number of records each.

    Attributes:
        title: common name of the set.
        classes: names of the classes, by label.
        records: number of records in a training file, and in the test file.
        label_bytes: bytes of labels per record in the binary form; the last one is the label.
        labels_key: key of the labels in the pickled form.
        forms: the published forms; the first one is downloaded.
    """

    tuned = True
    quick_data = DataConfig(image_size=16, train_images=10_000)

    title: str
    classes: tuple[str, ...]
    records: tuple[int, int]
    label_bytes: int
    labels_key: bytes
    forms: tuple[Form, ...]

    def load(self, request: Request) -> tuple[ImageArray, ImageArray]:
        folder = request.data_dir or cache_dir(self.name)
        found = self._find(folder)
        if found is None and request.download:
            form = self.forms[0]
            download([URL + form.archive], folder / form.archive, form.md5)
            found = self._find(folder)
        if found is None:
            looked = " or ".join(f"{form.folder}/ or {form.archive}" for form in self.forms)
            raise missing(self.title, looked, [folder], request)
        form, files = found
        train = [files / name for name in form.train]
        return self._read(form, train, "train", self.records[0]), self._read(
            form, [files / form.test], "test", self.records[1]
        )

    def _find(self, folder: Path) -> tuple[Form, Path] | None:
        """Returns the form found and the folder of its files: extracted files first, then an archive."""
        for form in self.forms:
            for files in (folder / form.folder, folder):
                if (files / form.train[0]).is_file():
                    return form, files
        for form in self.forms:
            archive = folder / form.archive
            if archive.is_file():
                check_md5(archive, form.md5)
                return form, extract(archive, folder, form.folder, [*form.train, form.test])
        return None

    def _read(self, form: Form, paths: list[Path], split: str, records: int) -> ImageArray:
        classes = len(self.classes)
        if form.pickled:
            parts = [read_cifar_pickle(path, records, classes=classes, key=self.labels_key) for path in paths]
        else:
            parts = [read_cifar_binary(path, records, classes=classes, label_bytes=self.label_bytes) for path in paths]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return ImageArray(name=self.name, split=split, images=images, labels=labels, classes=self.classes)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


class Cifar10(Cifar):
    """50,000 + 10,000 images of 10 classes."""

    name, title = "cifar10", "CIFAR-10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    records, label_bytes, labels_key = (10_000, 10_000), 1, b"labels"
    forms = (
        Form(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            pickled=False,
        ),
        Form(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            _BATCHES,
            "test_batch",
            pickled=True,
        ),
    )


_FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class Cifar100(Cifar):
    """50,000 + 10,000 images of 100 classes, the "fine" labels."""

    name, title = "cifar100", "CIFAR-100"
    class_count = 100
    classes = tuple(_FINE.split())
    records, label_bytes, labels_key = (50_000, 10_000), 2, b"fine_labels"
    forms = (
        Form(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            ("train.bin",),
            "test.bin",
            pickled=False,
        ),
        Form(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            ("train",),
            "test",
            pickled=True,
        ),
    )
