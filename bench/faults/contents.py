"""What the files of a folder hold, without what differs between two runs of the same command: times."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

TIMES = re.compile(r"seconds|images_per_second|peak_memory_bytes|roofline|packages|commit|created")
CHECKPOINT = re.compile(r"step-\d+\.pt$")
LOCKS = re.compile(r"\.[^/]*\.?lock")
"""Lock files stay for the next process and are documented."""


def contents_of(folder: Path) -> dict[str, object]:
    """Returns what each file of a folder holds, by its path in it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): content_of(path) for path in paths if not LOCKS.fullmatch(path.name)}


def content_of(path: Path) -> Any:
    """Returns what a file holds, in a form that can be compared."""
    if path.suffix in (".json", ".html"):
        return untimed(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [untimed(json.loads(line)) for line in path.read_text().split("\n")[:-1]]  # a torn line is no JSON
    data = path.read_bytes()
    if path.suffix == ".pt":
        return comparable(torch.load(io.BytesIO(data), weights_only=True))
    if path.suffix == ".npz":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: comparable(arrays[name]) for name in arrays.files}
    if zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError(f"{path.name} is a zip archive of an unknown kind")
    return data


def untimed(value: Any) -> Any:
    """Returns JSON without the entries that are times, and results of evaluations in one order."""
    if isinstance(value, dict):
        return {name: untimed(kept) for name, kept in value.items() if not TIMES.search(name)}
    if not isinstance(value, list):
        return value
    entries = [untimed(kept) for kept in value]
    results = all(isinstance(entry, dict) and "protocol" in entry for entry in entries)
    return sorted(entries, key=json.dumps) if results else entries


def comparable(value: Any) -> Any:
    """Returns nested dicts and lists with their tensors and arrays as bytes; NaN equals NaN."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: comparable(kept) for name, kept in value.items()}
    return [comparable(kept) for kept in value] if isinstance(value, list | tuple) else value


def differences(folder: Path, true: dict[str, object]) -> list[str]:
    """Returns what of a folder is not as in `true`: files missing, left over, unreadable or with other contents."""
    lost: list[str] = []
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    found = {name for name in found if not LOCKS.fullmatch(Path(name).name)}
    # A signal saves at any step: which checkpoint is the last but one depends on it.
    older = [name for name in found if CHECKPOINT.search(name) and name != max(filter(CHECKPOINT.search, found))]
    older_true = [name for name in true if CHECKPOINT.search(name) and name != max(filter(CHECKPOINT.search, true))]
    if len(older) != len(older_true):
        lost.append(f"{len(older)} older checkpoints where {len(older_true)} belong")
    expected = true.keys() - {*older_true}
    for name in sorted(found & true.keys()):
        try:
            content = content_of(folder / name)
        except Exception as error:  # a torn file raises anything
            lost.append(f"{name} cannot be read: {error}")
            continue
        if content != true[name]:
            lost.append(f"{name} differs")
    lost += [f"{name} is left over" for name in sorted(found - expected - {*older})]
    return lost + [f"{name} is missing" for name in sorted(expected - found)]
