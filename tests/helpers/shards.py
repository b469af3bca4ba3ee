"""Tar files of images for tests, written by tarfile."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet
from mnclglf.data.packed import PackedImages


def encoded(image: np.ndarray, kind: str = "PNG", **how: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **how)  # type: ignore[arg-type]
    return stream.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(
    folder: Path, images: Sequence[np.ndarray], labels: Sequence[int] | None, *, each: int, name: str = "train"
) -> Path:
    """Writes PNG files, with labels as .cls, so many images in each of name-0000.tar, name-0001.tar, ..."""
    for number, start in enumerate(range(0, len(images), each)):
        members: list[tuple[str, bytes]] = []
        for row in range(start, min(start + each, len(images))):
            members.append((f"{row:05}.png", encoded(images[row])))
            members += [] if labels is None else [(f"{row:05}.cls", str(labels[row]).encode())]
        write_tar(folder / f"{name}-{number:04}.tar", members)
    return folder


def load_shards(pattern: object, *, skip_corrupt: bool = False) -> tuple[PackedImages, ImageSet | None]:
    train, test = load_dataset(f"shards:{pattern}", skip_corrupt=skip_corrupt)
    assert isinstance(train, PackedImages)
    return train, test
