"""Patterns of files: braces as a naive oracle has them, globs, and splits by the names of files."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnclglf.config import UsageError
from mnclglf.data.errors import DataError
from mnclglf.data.sources.patterns import expand_braces, find_files, part_of

LITERALS = st.text("ab./-_", max_size=4)
NUMBERS = st.tuples(st.integers(0, 120), st.integers(0, 120), st.integers(0, 4))
WORDS = st.lists(st.text("xyz", max_size=2), min_size=2, max_size=4)


def numbers(span: tuple[int, int, int]) -> tuple[str, list[str]]:
    first, last, width = span
    a, b = str(first).zfill(width), str(last).zfill(width)
    step = 1 if first <= last else -1
    padded = (len(a) > 1 and a[0] == "0") or (len(b) > 1 and b[0] == "0")
    most = max(len(a), len(b)) if padded else 0
    return f"{{{a}..{b}}}", [str(number).zfill(most) for number in range(first, last + step, step)]


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            LITERALS.map(lambda text: (text, [text])),
            NUMBERS.map(numbers),
            WORDS.map(lambda words: (f"{{{','.join(words)}}}", words)),
        ),
        max_size=4,
    )
)
def test_braces_stand_for_the_product_of_their_choices(parts: list[tuple[str, list[str]]]) -> None:
    if len(list(itertools.islice(itertools.product(*(made for _, made in parts)), 5001))) > 5000:
        return
    expected = ["".join(chosen) for chosen in itertools.product(*(made for _, made in parts))]
    assert expand_braces("".join(text for text, _ in parts)) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "train-{0000..0003}.tar",
        "{a,b}/{08..11}.tar",
        "{train,val{1..2}}-{3..1}.tar",
        "x{a,{b,c}d}y",
        "{1..03}",
        "{a,}b",
    ],
)
def test_braces_stand_for_what_they_do_in_bash(pattern: str) -> None:
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == done.stdout.splitlines()


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("a{0..3.tar", "does not close"),
        ("a}.tar", "does not open"),
        ("a{}.tar", "neither a range"),
        ("a{x}.tar", "neither a range"),
        ("a{a..c}.tar", "neither a range"),
        ("a{0..99999999}.tar", "more than"),
        ("{0..9999}{0..9999}", "more than"),
    ],
)
def test_a_brace_that_is_none_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        expand_braces(pattern)


def lay_out(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def found(pattern: object) -> tuple[list[str], list[str]]:
    train, test = find_files(str(pattern), ".tar")
    return [Path(file).name for file in train], [Path(file).name for file in test]


def test_a_folder_has_its_split_by_the_names_of_its_files(tmp_path: Path) -> None:
    lay_out(tmp_path, "train-1.tar", "train-0.tar", "val-0.tar", ".hidden.tar", "train-0.idx", "readme.md")
    assert found(tmp_path) == (["train-0.tar", "train-1.tar"], ["val-0.tar"])
    assert found(tmp_path / "train-*.tar") == (["train-0.tar", "train-1.tar"], [])
    assert found(tmp_path / "train-{0..1}.tar") == (["train-0.tar", "train-1.tar"], [])
    assert found(tmp_path / "train-{1,0}.tar") == (["train-0.tar", "train-1.tar"], [])
    assert found(tmp_path / "{train,val}-?.tar") == (["train-0.tar", "train-1.tar", "val-0.tar"], [])
    assert found(tmp_path / "val-0.tar") == (["val-0.tar"], [])


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["0.tar", "1.tar"], ["0.tar", "1.tar"], []),
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], ["imagenet1k-train-0000.tar"],
         ["imagenet1k-validation-00.tar"]),
        (["train/0.tar", "val/0.tar"], ["0.tar"], ["0.tar"]),
        (["train-00000-of-00002.tar", "test-00000-of-00001.tar"], ["train-00000-of-00002.tar"],
         ["test-00000-of-00001.tar"]),
        (["train_0.tar", "test_0.tar", "val_0.tar"], ["train_0.tar"], ["val_0.tar"]),
        (["train2017.tar", "val2017.tar"], ["train2017.tar"], ["val2017.tar"]),
        (["trainer-0.tar", "valley-1.tar"], ["trainer-0.tar", "valley-1.tar"], []),
    ],
)  # fmt: skip
def test_words_in_a_name_are_a_part(names: list[str], train: list[str], test: list[str], tmp_path: Path) -> None:
    assert found(lay_out(tmp_path, *names)) == (train, test)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], "holds no .tar file"),
        (["val-0.tar", "test-0.tar"], "no train"),
        (["train-0.tar", "more-0.tar"], r"more-0\.tar beside files of a split, train-0\.tar"),
        (["train-val-0.tar"], "train and val"),
    ],
)
def test_half_a_split_is_refused(names: list[str], problem: str, tmp_path: Path) -> None:
    tmp_path.joinpath("d").mkdir()
    with pytest.raises(DataError, match=problem):
        find_files(str(lay_out(tmp_path / "d", *names)), ".tar")


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path, "a.tar")
    with pytest.raises(DataError, match=r"b\*\.tar: there is no such file"):
        find_files(f"{tmp_path}/b*.tar", ".tar")
    with pytest.raises(DataError, match=r"a\.tar twice"):
        find_files(f"{tmp_path}/{{a,a}}.tar", ".tar")
    with pytest.raises(UsageError, match="does not list its files"):
        find_files("http://127.0.0.1:1/a-*.tar", ".tar")


def test_the_folder_of_a_place_is_no_word_of_its_files() -> None:
    assert part_of("/data/train/a-0.tar", "/data/train") is None
    assert part_of("/data/train/a-0.tar", "/data") == "train"


def test_files_that_differ_only_in_what_a_server_is_asked_are_refused() -> None:
    with pytest.raises(DataError, match=r"names https://h/get twice; .* copy files here that differ only after the \?"):
        find_files("https://user:pw@h/get?file=train-{0..3}.tar", ".tar")


def test_a_pattern_that_cannot_be_expanded_is_shown_without_what_is_secret() -> None:
    with pytest.raises(UsageError, match=r"pattern 'https://h/x-\{0' does not close") as caught:
        expand_braces("https://user:pw@h/x-{0?sig=SECRET")
    assert "SECRET" not in str(caught.value)
    assert "pw" not in str(caught.value)
