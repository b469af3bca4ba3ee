"""Inputs that atheris makes: each subject begins with a valid file, and what no reader may raise is seen."""

from pathlib import Path

import pytest

from bench.faults.guided import one_input, subjects

SUBJECTS = subjects()


@pytest.mark.parametrize("kind", [kind for kind in SUBJECTS if kind != "postscript"])
def test_the_file_to_begin_with_is_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole, name, read = SUBJECTS[kind]
    path = tmp_path / "inside" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(whole)
    read(path)


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError("deep"), MemoryError()])
def test_what_no_reader_may_raise_reaches_atheris(error: Exception, tmp_path: Path) -> None:
    def refuses(path: Path) -> None:
        raise ValueError(f"{path} is damaged; remove it")

    def fails(path: Path) -> None:
        raise error

    one_input(tmp_path / "a", refuses)(b"x")
    with pytest.raises(type(error)):
        one_input(tmp_path / "a", fails)(b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
