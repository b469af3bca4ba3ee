"""Shards behind http and s3: the images of those here, by requests for ranges."""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Generator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_parquet import load_parquet, write_parquet
from image_folder import pixels
from shards import encoded, load_shards, write_shards, write_tar

from mnclglf.config import LoaderName, ViewConfig, shown
from mnclglf.data import ranges
from mnclglf.data.datasets import load_dataset
from mnclglf.data.errors import DataError, UnreachableError
from mnclglf.data.loaders import make_loader
from mnclglf.data.packed import PackedImages, ShardStore
from mnclglf.data.ranges import RemoteFile, file_system

pytest.importorskip("fsspec", reason="the extra remote is not installed")
pytest.importorskip("aiohttp", reason="the extra remote is not installed")
COUNT = 24


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(RemoteFile, "_fetched", ranges._Kept(64))
    monkeypatch.setattr(ranges, "_PAUSE_SECONDS", 0.01)


class Ranged(SimpleHTTPRequestHandler):
    """A server of files that knows ranges, and can be made to fail."""

    asked: list[tuple[str, str, str]]
    """Command, name and range of each request."""
    fails: int
    """Number of requests to come that fail."""
    knows_ranges: bool

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        kind = type(self)
        wanted = self.headers.get("Range", "")
        kind.asked.append((self.command, self.path, wanted))
        if kind.fails > 0:
            kind.fails -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        size, span = len(data), re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        self_range = ""
        if span and kind.knows_ranges:
            first, last = int(span[1]), min(int(span[2]), size - 1)
            data, status, self_range = data[first : last + 1], 206, f"bytes {first}-{last}/{size}"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if kind.knows_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if self_range:
            self.send_header("Content-Range", self_range)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET


class Server:
    """A place of files behind an address."""

    def __init__(self, root: Path) -> None:
        self.handler = type("Handler", (Ranged,), {"asked": [], "fails": 0, "knows_ranges": True})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(self.handler, directory=str(root)))
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def asked(self) -> list[tuple[str, str, str]]:
        return self.handler.asked

    def fetched(self) -> int:
        """Returns the bytes of all ranges that were asked for."""
        spans = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) for _, _, wanted in self.asked]
        return sum(int(span[2]) - int(span[1]) + 1 for span in spans if span)

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Makes shards of images that are too noisy to be small, without indices."""
    write_shards(tmp_path / "d", [pixels(40, 40, seed=n) for n in range(COUNT)], [n % 3 for n in range(COUNT)], each=9)
    (tmp_path / "d/classes.txt").write_text("a\nb\nc\n")
    return tmp_path / "d"


@pytest.fixture
def server(here: Path) -> Generator[Server]:
    made = Server(here)
    yield made
    made.close()


def batches(images: PackedImages, backend: LoaderName = "reference", **changes: Any) -> list[torch.Tensor]:
    loader = make_loader(
        images, ViewConfig(), backend=backend, views=1, side=12, batch_size=6, seed=5, dtype=torch.float32,
        device=torch.device("cpu"), threads=2, **changes,
    )  # fmt: skip
    return [batch.views for batch in loader.batches(1, 7)]


PATTERN = "train-{0000..0002}.tar"


@pytest.mark.parametrize("backend", ["reference", "dali"])
@pytest.mark.parametrize("block", [None, 2])
def test_shards_behind_http_are_those_here(here: Path, server: Server, backend: LoaderName, block: int | None) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    far, _ = load_shards(f"{server.address}/{PATTERN}")
    near, _ = load_shards(here / PATTERN)
    assert far.digests == near.digests
    assert far.labels.tolist() == near.labels.tolist()
    assert far.paths == near.paths
    assert far.classes == ("a", "b", "c")
    assert far.fingerprint() == near.fingerprint()
    np.testing.assert_array_equal(far.pixels(COUNT - 1), near.pixels(COUNT - 1))
    ours, theirs = (batches(images, backend, shuffle_block=block) for images in (far, near))
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_shards_are_fetched_once_to_be_examined_and_not_at_the_next_start(server: Server, here: Path) -> None:
    load_shards(f"{server.address}/{PATTERN}")
    whole = sum(path.stat().st_size for path in here.glob("*.tar"))
    assert server.fetched() == whole
    server.asked.clear()
    load_shards(f"{server.address}/{PATTERN}")
    assert server.fetched() == 0
    assert len(server.asked) <= 2 * 3 + 2  # one for each shard's size, and the names of the classes


def test_the_index_beside_is_taken(server: Server, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_shards(here)  # writes it
    shutil.rmtree(tmp_path / "cache")
    from mnclglf.data.sources import shards

    monkeypatch.setattr(shards, "list_members", lambda *_: pytest.fail("the tar was listed"))
    far, _ = load_shards(f"{server.address}/{PATTERN}")
    assert len(far) == COUNT
    assert ("GET", "/train-0001.idx", "") in server.asked


def test_a_stale_index_beside_is_not_taken(server: Server, here: Path, tmp_path: Path) -> None:
    load_shards(here)
    shutil.rmtree(tmp_path / "cache")
    write_tar(here / "train-0002.tar", [(f"{n}.png", encoded(pixels(20, 20, seed=n))) for n in range(8)])
    far, _ = load_shards(f"{server.address}/train-0002.tar")
    assert far.paths[:2] == ("train-0002.tar/0.png", "train-0002.tar/1.png")


def test_a_shard_that_has_changed_is_examined_again(server: Server, here: Path) -> None:
    before, _ = load_shards(f"{server.address}/train-0000.tar")
    write_shards(here, [pixels(40, 40, seed=90 + n) for n in range(9)], [n % 3 for n in range(9)], each=9)
    (here / "train-0000.idx").unlink(missing_ok=True)
    file_system(server.address).invalidate_cache()
    after, _ = load_shards(f"{server.address}/train-0000.tar")
    assert after.digests != before.digests
    np.testing.assert_array_equal(after.pixels(0), pixels(40, 40, seed=90))


def test_an_exact_order_asks_for_images_and_one_in_blocks_for_large_parts(
    here: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "FETCHED", 16 * 1024)
    far, _ = load_shards(f"{server.address}/{PATTERN}")
    monkeypatch.setattr(RemoteFile, "_fetched", ranges._Kept(64))
    server.asked.clear()
    batches(far)
    assert len(server.asked) == 36
    assert server.fetched() == sum(int(far.file_sizes[rows].sum()) for rows in make_rows(far))
    server.asked.clear()
    batches(far, shuffle_block=2)
    parts = sum(-(-path.stat().st_size // (16 * 1024)) for path in here.glob("*.tar"))
    assert len(server.asked) <= parts  # each part once, though two epochs were seen


def make_rows(images: PackedImages) -> list[np.ndarray]:
    from mnclglf.data.loader import batch_indices

    return [batch_indices(5, step, len(images), 6) for step in range(1, 7)]


def test_a_server_that_fails_for_a_moment_is_asked_again(server: Server) -> None:
    far, _ = load_shards(f"{server.address}/train-0000.tar")
    far = far.to_shuffle(None)  # else what was fetched would do
    server.handler.fails = 2
    assert far.contents(3) == encoded(pixels(40, 40, seed=3))
    server.handler.fails = 99
    with pytest.raises(DataError, match=r"train-0000\.tar: the server does not answer .*503.*try again"):
        far.contents(3)


def test_a_server_that_is_away_for_a_while_does_not_make_images_corrupt(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardStore.read

    def read_from_failing(*arguments: Any, **options: Any) -> bytes:
        server.handler.fails = 99
        return read(*arguments, **options)

    monkeypatch.setattr(ranges, "FETCHED", 512)  # so that a shard's index has not fetched the images too
    monkeypatch.setattr(ranges, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(ShardStore, "read", read_from_failing)
    with pytest.raises(UnreachableError, match=r"train-0000\.tar: the server does not answer .*try again"):
        load_shards(f"{server.address}/train-0000.tar", skip_corrupt=True)


def test_what_is_not_there_and_a_server_without_ranges_are_refused(server: Server) -> None:
    with pytest.raises(DataError, match=r"http://127\S*/train-0009\.tar: there is no such file"):
        load_shards(f"{server.address}/train-0009.tar")
    far, _ = load_shards(f"{server.address}/train-0000.tar")
    server.handler.knows_ranges = False
    with pytest.raises(DataError, match=r"train-0000\.tar: the server sent .*no range requests; copy the file here"):
        far.to_shuffle(None).contents(3)


def test_a_shard_that_is_cut_far_away_is_refused_by_name(server: Server, here: Path) -> None:
    (here / "train-0001.tar").write_bytes((here / "train-0001.tar").read_bytes()[:2000])
    with pytest.raises(DataError, match=r"http://127\S*/train-0001\.tar is cut"):
        load_shards(f"{server.address}/{PATTERN}")


def test_what_is_secret_in_an_address_is_not_shown(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    assert shown("https://user:word@host/a.tar?token=x") == "https://host/a.tar"
    assert shown("/data/a?b.tar") == "/data/a?b.tar"
    with caplog.at_level(logging.WARNING), pytest.raises(DataError) as error:
        load_shards(f"{server.address}/none.tar?token=secret")
    assert "secret" not in str(error.value) + caplog.text


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(address: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3://bucket/a\.tar cannot be opened.*s3fs.*mnclglf\[remote\]"):
        load_dataset("shards:s3://bucket/a.tar")


def test_parquet_files_behind_http_are_fetched_once(server: Server, here: Path) -> None:
    data = [encoded(pixels(40, 40, seed=n)) for n in range(COUNT)]
    for part in range(2):
        write_parquet(here / f"train-{part}.parquet", data[part::2], ["x", "y"] * 6)
    far, _ = load_parquet(f"{server.address}/train-{{0..1}}.parquet")
    near, _ = load_parquet(here / "train-{0..1}.parquet")
    assert (far.digests, far.paths, far.classes) == (near.digests, near.paths, near.classes)
    assert far.fingerprint() == near.fingerprint()
    assert [far.contents(row) for row in range(COUNT)] == [*data[::2], *data[1::2]]
    server.asked.clear()
    again, _ = load_parquet(f"{server.address}/train-{{0..1}}.parquet")
    assert all(torch.equal(one, two) for one, two in zip(batches(again), batches(near), strict=True))
    assert server.fetched() == 0


def test_shards_in_a_bucket_are_those_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs", reason="the extra remote is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint), ("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        bucket = boto3.resource("s3").create_bucket(Bucket="images")
        write_shards(here, [pixels(40, 40, seed=n) for n in range(4)], [0, 1, 2, 0], each=9, name="val")
        for path in here.glob("*.t*"):
            bucket.upload_file(str(path), f"photos/{path.name}")
        rows = write_parquet(here / "train.parquet", [encoded(pixels(seed=n)) for n in range(4)])
        bucket.upload_file(str(rows), "hub/data/train.parquet")
        assert load_parquet("s3://images/hub")[0].digests == load_parquet(rows)[0].digests
        near, near_test = load_shards(here)
        for pattern in ("s3://images/photos", "s3://images/photos/"):
            far, far_test = load_shards(pattern)
            assert far_test is not None
            assert near_test is not None
            assert far.digests == near.digests
            assert far.paths == near.paths
            assert far.classes == ("a", "b", "c")
            assert far_test.labels.tolist() == near_test.labels.tolist()
        globbed, none = load_shards("s3://images/photos/train-*.tar")
        assert none is None
        assert globbed.digests == load_shards(f"s3://images/photos/{PATTERN}")[0].digests == near.digests
        assert all(torch.equal(one, two) for one, two in zip(batches(globbed), batches(near), strict=True))
        with pytest.raises(DataError, match=r"s3://images/none\.tar: there is no such file"):
            load_shards("s3://images/none.tar")
    finally:
        server.stop()
