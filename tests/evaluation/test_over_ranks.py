"""Evaluations and embeddings over two real processes against one, which the other tests of evaluations check."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks_of_evaluations as of_rank
import torch
from embedding import folder_of
from rank_processes import run_on_ranks

from mnclglf.config import KnnConfig
from mnclglf.evaluation.embedding_file import beside
from mnclglf.evaluation.monitor import KnnMonitor
from mnclglf.evaluation.run import evaluate_run
from mnclglf.runs.quality import load_qualities
from mnclglf.training.loop import Trainer
from mnclglf.training.ranks import Ranks

RANKS = 2
IMAGES = 34  # eight batches of four and a short one: in the last round rank 1 has none
DAMAGED = {5, 21, 22, 23}  # 20 .. 23 are a batch of one usable image


@contextmanager
def one_thread() -> Generator[None]:
    """Context in which this process has one thread, as each rank has: the last bits depend on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run in `one`, copies it to `two`, and writes images, some of them damaged."""
    place = tmp_path_factory.mktemp("ranks")
    Trainer(of_rank.CONFIG, place / "one", console=of_rank.silent(), monitor=KnnMonitor).train()
    shutil.copytree(place / "one", place / "two")
    folder_of(place / "damaged", IMAGES)
    for number, path in enumerate(sorted((place / "damaged").rglob("*.png"))):
        if number in DAMAGED:
            path.write_bytes(path.read_bytes()[:60])
    return place


@pytest.fixture(scope="module")
def one(place: Path) -> dict[str, Any]:
    """Returns what one process makes, and leaves a file that it has begun for the ranks to go on with."""
    with one_thread():
        exact, linear = of_rank.evaluate_all(place / "one")
        whole = of_rank.embed_folder(place / "damaged", place / "one.npy")
        refused = of_rank.embed_folder(place / "damaged", place / "one-refused.npy", skip_corrupt=False)
        begun = of_rank.embed_folder(place / "damaged", place / "begun-by-one.npy", stop_after=12)
        layer = of_rank.train_linear_layer()
    assert begun.startswith("15\n")
    return {"exact": exact, "linear": linear, "whole": whole, "refused": refused, "layer": layer}


@pytest.fixture(scope="module")
def two(place: Path, one: dict[str, Any]) -> list[list[Any]]:
    """Returns what each rank returned; one start of the processes does all."""
    damaged = {"root": place / "damaged"}
    calls = [
        ("evaluate_all", {"run": place / "two"}),
        ("train_with_knn", {"out": place / "watched"}),
        ("embed_folder", {**damaged, "out": place / "two.npy"}),
        ("embed_folder", {**damaged, "out": place / "two.npy"}),
        ("embed_folder", {**damaged, "out": place / "two-refused.npy", "skip_corrupt": False}),
        ("embed_folder", {**damaged, "out": place / "begun-by-one.npy"}),
        ("embed_folder", {**damaged, "out": place / "begun-by-two.npy", "stop_after": 16}),
        ("train_linear_layer", {}),
    ]
    return run_on_ranks("ranks_of_evaluations:all_in_turn", RANKS, calls)


def test_features_are_those_of_one_process(place: Path, one: dict[str, Any], two: list[list[Any]]) -> None:
    """The same figures to the last bit, as the batches are those of one process."""
    exact = [each[0][0] for each in two]
    assert exact[0] == one["exact"]
    assert [len(results) for results in one["exact"]] == [3, 2]  # the pretrained and untrained encoder, and raw pixels
    assert exact[1:] == [[[], []]]
    figures = [load_qualities(place / name / "quality.json") for name in ("one", "two")]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 2


def test_linear_evaluation_is_that_of_one_process(one: dict[str, Any], two: list[list[Any]]) -> None:
    """Up to the rounding of a forward of half the batch: an image in a hundred may change its class by it."""
    (expected,), (found,) = one["linear"], two[0][0][1]
    assert [each[0][1] for each in two[1:]] == [[[]]]
    assert len(found) == len(expected) == 2
    for result, true in zip(found, expected, strict=True):
        assert result.settings == true.settings
        assert result.top1 == pytest.approx(true.top1, abs=0.01)
        assert result.top5 == pytest.approx(true.top5, abs=0.01)


def test_every_rank_takes_the_steps_of_one_process(one: dict[str, Any], two: list[list[Any]]) -> None:
    weights = [each[-1] for each in two]
    assert torch.equal(weights[0], weights[1])
    # Features of an encoder in fp64 are the same in fp32, but where a rounding falls to the other side.
    torch.testing.assert_close(weights[0], one["layer"], rtol=1e-5, atol=1e-7)


def test_knn_while_training_is_the_same_on_all_ranks(place: Path, two: list[list[Any]]) -> None:
    figures = [each[1] for each in two]
    assert figures[0] == figures[1]
    (record,) = figures[0]
    (knn, *_) = evaluate_run(place / "watched", KnnConfig(device="cpu", raw_pixels=False), of_rank.silent())
    assert record["knn_top1"] == pytest.approx(knn.top1, abs=1e-6)  # rounded to six places


def files_of(out: Path) -> dict[str, bytes]:
    """Returns the files of embeddings and what lies beside them."""
    return {"npy": out.read_bytes(), "csv": beside(out, "csv").read_bytes(), "json": beside(out, "json").read_bytes()}


def test_the_embeddings_are_those_of_one_process_to_the_byte(
    place: Path, one: dict[str, Any], two: list[list[Any]]
) -> None:
    assert files_of(place / "two.npy") == files_of(place / "one.npy")
    ended, *_, last = two[0][2].splitlines()
    assert ended == "None"
    assert last == one["whole"].splitlines()[-1].replace("one.npy", "two.npy")
    assert f"{IMAGES - len(DAMAGED)} rows" in last
    assert [each[2] for each in two[1:]] == ["None\n"]
    assert "is up to date" in two[0][3]


def test_a_damaged_image_ends_all_ranks_where_one_process_ends(
    place: Path, one: dict[str, Any], two: list[list[Any]]
) -> None:
    """The first of them is in the second batch, which only rank 1 reads."""
    assert "--skip-corrupt" in one["refused"]
    for each in two:
        assert each[4].split("\n", 1)[0] == one["refused"].split("\n", 1)[0]
    partial = {name: beside(place / f"{name}-refused.npy", "partial").read_bytes() for name in ("one", "two")}
    assert partial["one"] == partial["two"]
    assert not (place / "two-refused.npy").exists()


def test_a_file_is_gone_on_with_by_any_number_of_ranks(place: Path, two: list[list[Any]]) -> None:
    assert "going on after 12 of 34" in two[0][5]
    assert files_of(place / "begun-by-one.npy") == files_of(place / "one.npy")
    for each in two:  # the signal came to rank 1
        assert each[6].startswith("15\n")
    assert "stopped after 16 of 34" in two[0][6]
    assert not (place / "begun-by-two.npy").exists()
    with one_thread():
        assert "going on after 16 of 34" in of_rank.embed_folder(place / "damaged", place / "begun-by-two.npy")
    assert files_of(place / "begun-by-two.npy") == files_of(place / "one.npy")


@pytest.mark.parametrize(("start", "stop", "size"), [(0, 38, 4), (4, 12, 4), (0, 1, 4), (8, 8, 4), (0, 36, 4)])
def test_batches_in_turn_are_those_of_one_process(start: int, stop: int, size: int) -> None:
    every = [Ranks(rank=rank, count=3).batches(start, stop, size) for rank in range(3)]
    in_turn = [batch for of_round in zip(*every, strict=True) for batch in of_round]
    assert [[*batch] for batch in in_turn if batch] == [
        [*range(first, min(first + size, stop))] for first in range(start, stop, size)
    ]
