"""The index of a shard: DALI's own program writes the same one, and DALI reads ours."""

from __future__ import annotations

import errno
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folder import pixels
from shards import encoded, write_shards, write_tar

from mnclglf.data.errors import DataError
from mnclglf.data.ranges import range_file
from mnclglf.data.shard_index import (
    Sample,
    group,
    image_of,
    index_text,
    is_fresh,
    label_of,
    parse_index,
    quoted_index_text,
)
from mnclglf.data.sources.shards import samples_of
from mnclglf.data.tars import Member, list_members


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def samples_in(path: Path) -> list[Sample]:
    file = range_file(str(path))
    return group(list_members(file.read, file.stamp.size, str(path)).members, str(path))


MEMBERS = [
    ("./cats/1.jpg", b"one" * 300),
    ("./cats/1.cls", b"0"),
    ("./cats/1.meta.json", b"{}"),
    ("./cats/.hidden.jpg", b"no"),
    ("./cats/2.a.jpg", b"two"),
    ("./dogs.d/3.jpg", b""),
    ("4.JPG", b"four"),
]


def test_the_index_is_that_of_dalis_program(tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx", reason="comes with the extra dali-cuda13")
    shard = write_tar(tmp_path / "a.tar", MEMBERS)
    with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    theirs = (tmp_path / "theirs.idx").read_text()
    assert index_text(samples_in(shard)) == theirs
    assert theirs.startswith("v1.2 4\n")
    assert parse_index(theirs, shard.stat().st_size) == samples_in(shard)


def test_dali_reads_our_index(tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn", reason="the extra dali-cuda13 is not installed")
    from nvidia.dali.pipeline import pipeline_def

    write_shards(tmp_path / "d", [pixels(seed=n) for n in range(5)], [3, 1, 4, 1, 5], each=9)
    (tmp_path / "d/train-0000.idx").write_text(index_text(samples_in(tmp_path / "d/train-0000.tar")))

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)  # type: ignore[arg-type]
    def pipeline():
        return tuple(fn.readers.webdataset(
            paths=[str(tmp_path / "d/train-0000.tar")], index_paths=[str(tmp_path / "d/train-0000.idx")],
            ext=["png", "cls"],
        ))  # fmt: skip

    images, labels = pipeline().run()
    assert [bytes(np.array(images[n])) for n in range(5)] == [encoded(pixels(seed=n)) for n in range(5)]
    assert [int(bytes(np.array(labels[n]))) for n in range(5)] == [3, 1, 4, 1, 5]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(WORDS, min_size=1, max_size=8, unique=True), data=st.data())
def test_an_index_holds_what_tarfile_finds(
    keys: list[str], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    extensions = st.lists(st.sampled_from(["jpg", "cls", "json", "a.png"]), min_size=1, unique=True)
    members = [(f"x/{key}.{ext}", key.encode()) for key in keys for ext in data.draw(extensions)]
    shard = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members, tarfile.PAX_FORMAT)
    with tarfile.open(shard) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    for written, quoted in ((quoted_index_text, True), (index_text, False)):
        try:
            text = written(samples_in(shard))
        except ValueError:
            assert not quoted
            assert any(char.isspace() for key in keys for char in key)
            continue
        samples = parse_index(text, shard.stat().st_size, quoted=quoted)
        assert samples is not None
        assert [tuple(member) for sample in samples for member in sample.components.values()] == expected
        assert [sample.key for sample in samples] == [f"x/{key}" for key in keys]
        assert is_fresh(samples, range_file(str(shard)).read)


WHOLE = "v1.2 2\njpg 512 9 a.jpg cls 1536 1 a.cls\njpg 2560 9 b.jpg\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        WHOLE.replace("v1.2", "v1.1"),
        WHOLE.replace("v1.2 2", "v1.2 3"),
        WHOLE[:-1],
        WHOLE.replace("2560", "9999872"),
        WHOLE.replace("2560", "2561"),
        WHOLE.replace("2560 9", "2560 9000"),
        WHOLE.replace("512", "0"),
        WHOLE.replace("512", "-512"),
        WHOLE.replace("512", "x"),
        WHOLE.replace("1536 1", "1536 -1"),
        WHOLE.replace(" a.cls", ""),
        WHOLE.replace("b.jpg", "a.jpg"),
        WHOLE.replace("jpg 2560 9 b.jpg", ""),
        WHOLE.replace("b.jpg", "b.png"),
        "<html>404</html>\n",
    ],
)
def test_what_is_no_index_of_the_shard_is_none(text: str) -> None:
    assert parse_index(WHOLE, 4096) is not None
    assert parse_index(text, 4096) is None


def sample(**members: bytes) -> tuple[Sample, dict[str, bytes]]:
    contents = {f"k.{ext.replace('_', '.')}": data for ext, data in members.items()}
    return group([Member(name, 512, len(data)) for name, data in contents.items()], "x.tar")[0], contents


@pytest.mark.parametrize(
    ("members", "image"),
    [
        ({"jpg": b"", "cls": b""}, "k.jpg"),
        ({"JPEG": b"", "json": b""}, "k.JPEG"),
        ({"jpg": b"", "seg_png": b""}, "k.jpg"),
        ({"large_jpg": b""}, "k.large.jpg"),
        ({"txt": b"", "cls": b""}, None),
    ],
)
def test_the_image_of_a_sample_is_known_by_its_extension(members: dict[str, bytes], image: str | None) -> None:
    found = image_of(sample(**members)[0])
    assert (found and found.name) == image


def test_several_images_of_one_sample_are_refused_by_name() -> None:
    for members in ({"jpg": b"", "png": b""}, {"a_jpg": b"", "b_jpg": b""}):
        with pytest.raises(DataError, match=r"several images, 'k\.\S+', 'k\.\S+'; pack it anew"):
            image_of(sample(**members)[0])


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"jpg": b"x"}, None),
        ({"cls": b" 17\n"}, 17),
        ({"CLS": b"0"}, 0),
        ({"json": b'{"label": 5, "caption": "a"}'}, 5),
        ({"json": b'{"cls": 6}'}, 6),
        ({"json": b'{"cls": 6, "label": 6}', "cls": b"6"}, 6),
        ({"json": b'{"caption": "a"}', "cls": b"2"}, 2),
        ({"json": b"[1, 2]"}, None),
        ({"json": b'{"caption": "a"}'}, None),
    ],
)
def test_the_label_of_a_sample(members: dict[str, bytes], label: int | None) -> None:
    one, contents = sample(**members)
    assert label_of(one, lambda member: contents[member.name]) == label


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"cls": b"cat"}, "label 'cat'"),
        ({"cls": b"-1"}, "label '-1'"),
        ({"cls": b"1.0"}, r"label '1\.0'"),
        ({"cls": b""}, "label ''"),
        ({"cls": "\u0663".encode()}, "label"),
        ({"cls": b"\xff"}, r"\.cls that cannot be read"),
        ({"cls": b"9" * 5000}, "label|cannot be read"),
        ({"json": b'{"label": "cat"}'}, "label 'cat'"),
        ({"json": b'{"label": true}'}, "label True"),
        ({"json": b'{"label": 1.5}'}, r"label 1\.5"),
        ({"json": b'{"label": [1]}'}, r"label \[1\]"),
        ({"json": b'{"label": 1, "cls": 2}'}, "several labels: 1 .*2"),
        ({"json": b'{"label": 1}', "cls": b"2"}, "several labels: 1 .*2"),
        ({"json": b"{"}, "cannot be read"),
        ({"json": b"[" * 100_000}, "cannot be read"),
        ({"json": b" " * (2**20 + 1)}, "too long"),
    ],
)
def test_a_label_that_is_none_is_refused(members: dict[str, bytes], problem: str) -> None:
    one, contents = sample(**members)
    with pytest.raises(DataError, match=problem):
        label_of(one, lambda member: contents[member.name])


def test_members_out_of_order_and_names_given_twice_are_refused() -> None:
    scattered = [Member(name, 512, 1) for name in ("a.jpg", "b.jpg", "a.cls")]
    with pytest.raises(DataError, match=r"x\.tar holds members of 'a' that do not follow each other.*sort=name"):
        group(scattered, "x.tar")
    with pytest.raises(DataError, match=r"x\.tar holds 'a\.jpg' twice"):
        group([Member("a.jpg", 512, 1), Member("a.jpg", 1536, 1)], "x.tar")


def names(path: Path) -> list[str]:
    return [sample.key for sample in samples_of(range_file(str(path)))]


def count_listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from mnclglf.data.sources import shards

    listed: list[str] = []
    real = shards.list_members
    monkeypatch.setattr(
        shards, "list_members", lambda read, size, place: (listed.append(place), real(read, size, place))[1]
    )
    return listed


def test_an_index_is_made_once_and_again_after_the_shard_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = count_listings(monkeypatch)
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    assert names(shard) == names(shard) == ["a", "b"]
    assert len(listed) == 1
    assert (tmp_path / "a.idx").read_text() == "v1.2 2\njpg 512 1 a.jpg\njpg 1536 1 b.jpg\n"
    write_tar(shard, [("c.jpg", b"1"), ("d.jpg", b"2"), ("e.jpg", b"3")])
    assert names(shard) == names(shard) == ["c", "d", "e"]
    assert len(listed) == 2


def test_an_index_of_another_shard_is_seen_by_the_headers(tmp_path: Path) -> None:
    import os

    shard = write_tar(tmp_path / "a.tar", [(f"{n}.jpg", b"1" * 100) for n in range(50)])
    assert len(names(shard)) == 50
    write_tar(shard, [(f"{n}.jpg", b"2" * 99) for n in range(50)])
    os.utime(shard, ns=(10**18, 10**18))  # older than the index, as after a copy that keeps times
    assert len(names(shard)) == 50
    assert " 99 " in (tmp_path / "a.idx").read_text()


@pytest.mark.parametrize("names_hold_blanks", [False, True])
def test_an_index_that_cannot_lie_beside_is_kept_in_the_cache(
    tmp_path: Path, names_hold_blanks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mnclglf.data.sources import shards

    listed = count_listings(monkeypatch)
    shard = write_tar(tmp_path / "place" / "a.tar", [("a é 1.jpg" if names_hold_blanks else "a.jpg", b"1")])
    if not names_hold_blanks:  # root may write anywhere

        def read_only(*_: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a.idx")

        monkeypatch.setattr(shards, "write_index", read_only)
    for _ in range(2):
        assert names(shard) == ["a é 1" if names_hold_blanks else "a"]
    assert len(listed) == 1
    assert list((tmp_path / "place").iterdir()) == [shard]
    assert len(list((tmp_path / "cache/mnclglf/shards").iterdir())) == 1
    write_tar(shard, [("another.jpg", b"1")])
    assert names(shard) == ["another"]
    assert len(listed) == 2
