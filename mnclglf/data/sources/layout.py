"""Layout of a folder of images: which folders are a split, which are classes, and which files are images."""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

from mnclglf.config import FOLDER
from mnclglf.data.decoding import SUFFIXES
from mnclglf.data.errors import DataError
from mnclglf.runs.files import MOST_JSON, open_file, read_bytes

logger = logging.getLogger(__name__)

UNREAD = {
    *(".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dib", ".dng", ".exr", ".hdr", ".heic", ".heif"),
    *(".hif", ".ico", ".j2k", ".jp2", ".jxl", ".nef", ".orf", ".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".raf"),
    *(".raw", ".rw2", ".svg", ".tga", ".xbm", ".xpm"),
}
"""Suffixes of image files that are not read; decoding.FORMATS has those that are."""
PICTURES = ("-images.png", "-views.png")
"""Ends of the names of the pictures that `mnclglf data` draws."""
_OF_SYSTEMS = {
    *("__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "lost+found", "$recycle.bin"),
    "system volume information",
}
_SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_FILLERS = ("data", "dataset", "image", "images", "img", "imgs", "seg", "set", "split")
_SPLIT_NAME = re.compile(f"(?:{'|'.join(_FILLERS)})*({'|'.join(_SPLITS)})(?:{'|'.join(_FILLERS)})*")
# What else a part may be called: too vague to read such folders as a split, and enough to ask.
_HINTS = {**_SPLITS, "holdout": "val", "heldout": "val"}
_HINT_STARTS = {"train": "train", "valid": "val", "eval": "val", "test": "test"}
_ABBREVIATIONS = {"tr": "train", "va": "val", "te": "test", "unlabeled": "unlabeled", "unlabelled": "unlabeled"}
_NAMED = 5  # names in a message
_BEGINNING = 1024  # bytes of a picture that hold the name of the program that drew it


def find_splits(root: Path) -> tuple[Path, Path | None]:
    """Returns the folder of the training images and that of the images to test on, or None.

    Folders named train and val (or test), in any usual spelling and case, are a split. Others are classes, all of
    `root` is then for training.

    Raises:
        DataError: a split has no train, has one part twice, or lies beside further images.
    """
    folders = [folder for folder in _folders(root) if split_of(folder.name) or _holds_image(folder)]
    parts: dict[str | None, list[Path]] = {}
    for folder in folders:
        parts.setdefault(split_of(folder.name), []).append(folder)
    classes = parts.pop(None, [])
    complete = "train" in parts and len(parts) > 1
    if not parts or (classes and not complete):
        _refuse_hidden_split(root, folders)
        _refuse_inner_split(root, folders)
        return root, None
    twice = next((found for found in parts.values() if len(found) > 1), None)
    if twice is not None:
        raise DataError(
            f"{root} holds {few(twice)}, which are one part of a split; rename one of them, or, if all are classes, "
            "move all into a folder named train"
        )
    if "train" not in parts:
        (first,), *_ = parts.values()
        raise DataError(
            f"{root} holds {few(folders)} and no train; rename the folder of the training images to train, or give "
            f"{FOLDER}{first} to train on that one"
        )
    beside = [*classes, *(path for path in root.iterdir() if _is_image(path) and not _is_picture(path))]
    if beside:
        raise DataError(
            f"{root} holds {few(beside)} beside {few([path for (path,) in parts.values()])}: if these are a split, "
            "move the first away or into train; if all are classes, move all into a folder named train"
        )
    (train,), tests = parts["train"], [parts[name][0] for name in ("val", "test") if name in parts]
    if len(tests) == 2:
        logger.warning("%s has %s: evaluating on %s", root, few(tests), tests[0].name)
    if tests and tests[0].resolve() == train.resolve():
        raise DataError(
            f"{tests[0]} is the same folder as {train}; remove it, and hold images out with --validation-images"
        )
    _refuse_inner_split(train, [folder for folder in _folders(train) if _holds_image(folder)])
    return train, tests[0] if tests else None


def split_of(name: str) -> str | None:
    """Returns train, val or test for a usual spelling of it in a folder's name, e.g. Valid, test_set or train2017."""
    lower = unicodedata.normalize("NFKC", name).lower()
    found = _SPLIT_NAME.fullmatch(re.sub(r"(?<!\d)(19|20)\d\d(?!\d)|[\W_]+", "", lower))
    return _SPLITS[found[1]] if found else None


def _hints(name: str, vague: Mapping[str, str] = MappingProxyType({})) -> set[str]:
    """Returns the parts of a split that a folder's name may mean; `vague` names further words."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = re.findall(r"[^\W\d_]+", spaced.lower())
    known = {**_HINTS, **vague}
    found = {known[word] for word in (*words, "".join(words)) if word in known}
    found |= {part for word in words for start, part in _HINT_STARTS.items() if word.startswith(start)}
    return found | {"train" for word in words if word.endswith("train")}


def _refuse_hidden_split(root: Path, folders: Sequence[Path]) -> None:
    """Raises DataError if classes may be a split: by all their names, or by one and by subfolders of the same names."""
    remedy = (
        "if these are a split, rename them to train and val; if all are classes, move all into a folder named train"
    )
    inside = {folder: {inner.name for inner in _folders(folder)} for folder in folders}
    for folder, names in inside.items():
        for other, others in inside.items():
            if other != folder and names & others and _hints(folder.name):
                raise DataError(
                    f"{root} holds {folder.name} and {other.name}, both with {few(sorted(names & others))}: {remedy}"
                )
    meant = [_hints(folder.name, _ABBREVIATIONS) for folder in folders]
    parts = set[str]().union(*meant)
    if all(meant) and "train" in parts and len(parts) > 1:
        raise DataError(f"{root} holds {few(folders)}: {remedy}")


def _refuse_inner_split(root: Path, folders: Sequence[Path]) -> None:
    """Raises DataError if a class holds a split, so that its images to test on would be trained on."""
    for folder in folders:
        inner = [path for path in _folders(folder) if split_of(path.name) and _holds_image(path)]
        parts = {split_of(path.name): path for path in inner}
        if "train" in parts and len(parts) > 1:
            raise DataError(
                f"{folder} holds {few(inner)}: for this split give {FOLDER}{folder}; if each class has one, move them "
                f"to {root / parts['train'].name / folder.name} and so on; if they are no split, rename them"
            )


def find_images(root: Path, known: tuple[str, ...] | None = None) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Returns the paths of the images relative to `root`, their labels, and the classes (none without subfolders).

    Args:
        root: folder of the images.
        known: classes of the training images, for images to test on; None for the names of the subfolders.

    Raises:
        DataError: there is no image, a subfolder has no image, images lie beside subfolders, two subfolders are one, or
            a class is not among those known.
    """
    search = Search()
    inside = _images_of_folders(root, search)
    loose = sorted(path.name for path in root.iterdir() if search.counts(path))
    if loose and inside:
        raise DataError(
            f"{root} holds {loose[0]} beside the folder {next(iter(inside))}: move the images into folders, one a "
            "class, or the folders away, for images without labels"
        )
    present = [name for name, paths in inside.items() if paths]
    if not loose and not present and (known is not None or not inside):
        raise DataError(f"{root} holds no image; {', '.join(SUFFIXES)} are read{search.unread_text('; not ')}")
    empty = [name for name, paths in inside.items() if not paths]
    if empty and known is None:
        why = search.taken.get(empty[0], "") + search.unread_text("; not ")
        raise DataError(
            f"{root / empty[0]} holds no image ({', '.join(SUFFIXES)}{why}); fill it or remove it, among the images to "
            "test on too"
        )
    classes = tuple(inside) if known is None else known
    unknown = set(present) - set(classes) if classes else {*present}
    if loose and classes:
        unknown = set(classes)
    if unknown:
        raise DataError(
            f"train and {root.name} have other classes, {few(sorted(unknown))}; give both the same subfolders ({root})"
        )
    search.report(root)
    labels = {name: label for label, name in enumerate(classes)}
    paths = [path for part in inside.values() for path in part]
    return loose + paths, [-1] * len(loose) + [labels[name] for name in inside for _ in inside[name]], classes


def images_below(root: Path) -> list[str]:
    """Returns the paths, relative to `root`, of all images below it, however they lie; sorted.

    Raises:
        DataError: a folder cannot be listed.
    """
    search = Search()
    paths = sorted(str(path.relative_to(root)) for path in search.walk(root, {}))
    search.report(root)
    return paths


def _images_of_folders(root: Path, search: Search) -> dict[str, list[str]]:
    """Returns the paths, relative to `root`, of the images in each subfolder but those that hold only runs of ours.

    Raises:
        DataError: two subfolders are one, or one is a link to a folder around it.
    """
    folders = _folders(root)
    real = {folder: os.path.realpath(folder) for folder in folders}
    by_real: dict[str, Path] = {}
    for folder in sorted(folders, key=lambda folder: folder.is_symlink()):  # links last, so that they are blamed
        first = by_real.setdefault(real[folder], folder)
        if first != folder:
            raise DataError(f"{folder} is a link to {first}, so its images would have two classes; remove the link")
        if os.path.realpath(root).startswith(f"{real[folder]}{os.sep}") or real[folder] == os.path.realpath(root):
            raise DataError(f"{folder} is a link to a folder around it; remove the link")
    found: dict[str, list[str]] = {}
    others = {real[folder]: folder.name for folder in folders} | {os.path.realpath(root): ""}
    for folder in folders:
        del others[real[folder]]
        inside = sorted(str(path.relative_to(root)) for path in search.walk(folder, others))
        others[real[folder]] = folder.name
        if inside or folder not in search.of_runs:
            found[folder.name] = inside
    return found


def _folders(root: Path) -> list[Path]:
    """Returns the subfolders that may hold images, sorted by name.

    Raises:
        DataError: the folder cannot be listed.
    """
    try:
        return sorted(path for path in root.iterdir() if is_visible(path.name) and path.is_dir())
    except PermissionError as error:
        raise DataError(
            f"{error.filename} cannot be listed ({error.strerror}); make it readable, or move it away"
        ) from error


def is_visible(name: str) -> bool:
    """Returns whether a file or folder may be a user's: it is neither hidden nor an operating system's."""
    return not name.startswith(".") and name.lower() not in _OF_SYSTEMS


def _holds_image(folder: Path) -> bool:
    return next(Search().walk(folder, {}), None) is not None


def _is_image(path: Path) -> bool:
    """Returns whether the name is that of an image; a broken link counts, and is later reported as corrupt."""
    return path.suffix.lower() in SUFFIXES and is_visible(path.name) and not path.is_dir()


def _is_picture(path: Path) -> bool:
    """Returns whether a file is a picture that `mnclglf data` drew under its usual name."""
    if not path.name.endswith(PICTURES) or not path.is_file():
        return False
    try:
        with open_file(path) as file:
            return is_drawn(file.read(_BEGINNING))
    except OSError:  # reported as corrupt, as any image that cannot be read
        return False


def is_drawn(data: bytes) -> bool:
    """Returns whether the contents of a file are a picture of ours, by the program that it names."""
    return b"Software\0mnclglf" in data[:_BEGINNING]


def _is_run(folder: Path) -> bool:
    """Returns whether a folder is a run directory, by its config.json."""
    try:
        config = json.loads(read_bytes(folder / "config.json", MOST_JSON))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"method", "dataset", "recipe"} <= set(cast("dict[str, object]", config))


def check_picture(picture: Path, dataset: str) -> None:
    """Raises DataError if a picture would become an image of the data set that it shows."""
    if not dataset.startswith(FOLDER) or picture.name.endswith(PICTURES):
        return
    root = Path(dataset.removeprefix(FOLDER)).expanduser().resolve()
    if picture.resolve().is_relative_to(root):
        raise DataError(
            f"--out {picture} lies in {root} and would become one of its images; give a path outside, or a name that "
            f"ends in {' or '.join(PICTURES)}"
        )


def few(names: Sequence[Path] | Sequence[str]) -> str:
    """Returns the first names of a sequence, for a message."""
    shown = [name.name if isinstance(name, Path) else name for name in names[:_NAMED]]
    return f"{', '.join(shown)}{', ...' if len(names) > _NAMED else ''}"


def report_pictures(root: Path, pictures: Sequence[Path]) -> None:
    """Logs which pictures of ours are left out, if there are any."""
    if pictures:
        logger.warning("%s: left out as pictures that mnclglf drew: %s", root, few(pictures))


class Search:
    """A search for images, which notes what it leaves out."""

    def __init__(self) -> None:
        self.unread: Counter[str] = Counter()
        """Number of image files by suffix, of formats that are not read."""
        self.pictures: list[Path] = []
        """Pictures that `mnclglf data` drew."""
        self.of_runs: set[Path] = set()
        """Folders searched that hold a run directory."""
        self.taken: dict[str, str] = {}
        """By the name of a folder searched, which other class has its images."""

    def counts(self, path: Path) -> bool:
        """Returns whether a file is an image to read, and notes one that is left out."""
        if path.suffix.lower() in UNREAD and is_visible(path.name) and not path.is_dir():
            self.unread[path.suffix.lower()] += 1
        if not _is_image(path):
            return False
        if _is_picture(path):
            self.pictures.append(path)
            return False
        return True

    def walk(self, folder: Path, others: Mapping[str, str]) -> Iterator[Path]:
        """Yields the images below a folder; follows links, but enters each real folder once.

        Args:
            folder: folder to search.
            others: real paths that are not entered, other classes' among them, with these classes' names.

        Raises:
            DataError: a folder cannot be listed.
        """

        def unreadable(error: OSError) -> None:
            raise DataError(f"{error.filename} cannot be listed ({error.strerror}); make it readable, or move it away")

        seen: set[str] = set()
        for at, inner, files in os.walk(folder, followlinks=True, onerror=unreadable):
            real = os.path.realpath(at)
            if real in seen or real in others or ("config.json" in files and _is_run(Path(at))):
                if others.get(real):
                    self.taken[folder.name] = f"; those below it are of class {others[real]}"
                if real not in seen and real not in others:
                    self.of_runs.add(folder)
                inner.clear()
                continue
            seen.add(real)
            inner[:] = sorted(name for name in inner if is_visible(name))
            yield from (path for path in (Path(at, name) for name in files) if self.counts(path))

    def unread_text(self, start: str) -> str:
        """Returns how many files of which formats are not read, after `start`; empty if there are none."""
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(self.unread.items()))
        return f"{start}{counts}" if counts else ""

    def report(self, root: Path) -> None:
        """Logs what is left out."""
        if self.unread:
            logger.warning(
                "%s: left out as their formats are not read: %s; convert them to PNG, for instance",
                root,
                self.unread_text(""),
            )
        report_pictures(root, self.pictures)
