"""Atomic writes, and the settings in a run directory. Imports no torch."""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from mnclglf.config import RunConfig, from_dict, to_dict

# Settings that may differ when a run is resumed, as they do not change the results.
FREE_TO_CHANGE = {"engine", "data.data_dir", "data.download", "data.loader", "data.loader_threads"}

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Returns the folder for files that can be made again: <XDG_CACHE_HOME or ~/.cache>/mnclglf.

    If there is no home, or nothing can be made there, as in a container under a user number that it does not know, it
    is mnclglf-<user number> in the temporary folder, and a warning says so.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "mnclglf"
    try:
        usual = Path.home() / ".cache" / "mnclglf"
    except RuntimeError:  # neither HOME nor an entry in passwd
        usual = None
    if usual is not None and (os.path.exists(usual) or os.access(nearest_folder(usual), os.W_OK | os.X_OK)):
        return usual
    folder = Path(tempfile.gettempdir()) / f"mnclglf-{os.getuid()}"
    _warn_once(f"there is no home to keep caches in: they are in {folder}; set XDG_CACHE_HOME to choose their place")
    return folder


def nearest_folder(path: Path) -> Path:
    """Returns the path, or its nearest parent that exists."""
    # Not Path.exists, which raises PermissionError below a folder that this user may not search.
    return next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))


def check_writable(folder: Path, remedy: str) -> None:
    """Raises OSError, with the remedy, unless files can be written into the folder or, if missing, where it is made."""
    nearest = nearest_folder(folder)
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: nothing can be written there; {remedy}", str(nearest)) from error


@cache
def _warn_once(text: str) -> None:
    logger.warning(text)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces `path` by the output of `write`, whole or not at all: temporary file, fsync, rename.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    # Containers that share a folder may have the same process number, hence the random part.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None and error.errno is not None:  # of a write or an fsync, which name no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename outlives a power failure once the folder is on disk too. Some file systems cannot do that (EINVAL, EIO
    # and ENOTSUP were seen, on network and FUSE mounts); the file itself is whole there all the same.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as readable JSON, whole or not at all.

    Raises:
        ValueError: a number in it is not finite.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> object:
    """Reads a JSON file; None if there is no file.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # malformed JSON or UTF-8
        raise ValueError(f"{path} is damaged: {error}") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file that holds an object, e.g. environment.json; None if there is no file.

    Raises:
        ValueError: the file is not JSON, or holds no object; the message names it.
    """
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__} where an object belongs")
    return cast("dict[str, Any] | None", value)


def read_config(run: Path) -> RunConfig:
    """Reads the configuration of a run directory.

    Raises:
        FileNotFoundError, ValueError: there is no config.json, or it does not hold a configuration.
    """
    path = run / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; mnclglf train --out {run} makes a run there")
    try:
        return from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def differences(saved: RunConfig, asked: RunConfig) -> list[str]:
    """Returns the settings that differ and change the results, as `name: saved -> asked`."""

    def flatten(config: RunConfig) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in to_dict(config).items():
            if name not in FREE_TO_CHANGE:
                flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        return {name: value for name, value in flat.items() if name not in FREE_TO_CHANGE}

    before, now = flatten(saved), flatten(asked)
    return [f"{name}: {before[name]} -> {now[name]}" for name in before if before[name] != now[name]]
