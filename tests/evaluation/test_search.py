"""Tests of the search for the nearest images, against scikit-learn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from sklearn.neighbors import NearestNeighbors

from mnclglf.evaluation import search
from mnclglf.evaluation.embedding_file import Origin, beside
from mnclglf.evaluation.search import Nearest, find_nearest

N, F, Q, K = 700, 16, 5, 7


def origin_of(rows: NDArray[np.float32], **changes: str) -> Origin:
    values: dict[str, Any] = dict(encoder="e", run="runs/x", source="digits", fingerprint="f") | changes
    return Origin(**values, features=rows.shape[1], images=len(rows))


@pytest.fixture
def rows() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(N, F)).astype(np.float32)


@pytest.fixture
def queries() -> NDArray[np.float32]:
    return 3 * np.random.default_rng(1).normal(size=(Q, F)).astype(np.float32)


def truth(rows: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> Nearest:
    distances, found = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(rows).kneighbors(queries)
    return Nearest(found, 1 - distances)


def find(path: Path, rows: NDArray[np.float32], queries: NDArray[np.float32], k: int = K, **changes: Any):
    """Returns what is found in a file of these rows, and what is printed."""
    np.save(path, rows)
    text = io.StringIO()
    return find_nearest(queries, path, origin_of(rows, **changes), k, Console(file=text, width=200)), text.getvalue()


def check(found: Nearest, expected: Nearest) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.similarities, expected.similarities, rtol=0, atol=1e-5)  # fp32 sums of 16 terms


def test_what_a_killed_process_left_of_the_index_is_cleared(
    tmp_path: Path, rows: NDArray[np.float32], queries: NDArray[np.float32]
) -> None:
    left, others = tmp_path / ".a.npy.faiss.12-0123abcd.tmp", tmp_path / ".a.npy.12-0123abcd.tmp"
    left.touch()
    others.touch()
    find(tmp_path / "a.npy", rows, queries)
    assert not left.exists()
    assert others.exists()  # of embed, which has a lock of its own


def test_the_flat_index_finds_the_nearest_and_is_used_again(
    tmp_path: Path, rows: NDArray[np.float32], queries: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npy"
    found, said = find(path, rows, queries)
    check(found, truth(rows, queries, K))
    assert "flat" in said
    assert beside(path, "faiss").exists()
    monkeypatch.setattr(search, "build_index", None)
    check(find(path, rows, queries)[0], truth(rows, queries, K))


def test_without_faiss_every_row_is_compared(
    tmp_path: Path, rows: NDArray[np.float32], queries: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    monkeypatch.setattr(search, "BLOCK", 100)  # several blocks
    found, said = find(tmp_path / "a.npy", rows, queries)
    check(found, truth(rows, queries, K))
    assert "pip install 'mnclglf[faiss-cpu]'" in said
    assert not beside(tmp_path / "a.npy", "faiss").exists()


def test_ivf_pq_with_exact_comparison_finds_nearly_all(
    tmp_path: Path, rows: NDArray[np.float32], queries: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LARGE", 500)
    found, said = find(tmp_path / "a.npy", rows, queries)
    expected = truth(rows, queries, K)
    assert "IVF-PQ" in said
    shared = [len(set(a) & set(b)) / K for a, b in zip(found.rows, expected.rows, strict=True)]
    assert np.mean(shared) > 0.9
    for query, (numbers, similarities) in enumerate(zip(found.rows, found.similarities, strict=True)):
        cosine = rows[numbers] @ queries[query] / np.linalg.norm(rows[numbers], axis=1) / np.linalg.norm(queries[query])
        np.testing.assert_allclose(similarities, cosine, rtol=0, atol=1e-5)  # exact, not quantized
        assert (np.diff(similarities) <= 0).all()


@pytest.mark.parametrize("change", [{"encoder": "other"}, {"fingerprint": "other"}])
def test_an_index_of_something_else_is_built_anew_with_a_word(
    tmp_path: Path, rows: NDArray[np.float32], queries: NDArray[np.float32], change: dict[str, Any]
) -> None:
    find(tmp_path / "a.npy", rows, queries)
    found, said = find(tmp_path / "a.npy", rows[::-1].copy(), queries, **change)
    assert "built anew" in said
    check(found, truth(rows[::-1], queries, K))


@pytest.mark.parametrize("damage", ["cut", "nonsense", "note", "no note", "empty"])
def test_a_damaged_index_is_built_anew(
    tmp_path: Path, rows: NDArray[np.float32], queries: NDArray[np.float32], damage: str
) -> None:
    path = tmp_path / "a.npy"
    find(path, rows, queries)
    index, note = beside(path, "faiss"), beside(path, "faiss.json")
    match damage:
        case "cut":
            index.write_bytes(index.read_bytes()[:-100])
        case "nonsense":
            index.write_bytes(b"no index at all")
        case "empty":
            index.write_bytes(b"")
        case "note":
            note.write_text("{")
        case _:
            note.unlink()
    found, said = find(path, rows, queries)
    assert "built anew" in said
    check(found, truth(rows, queries, K))
    assert "anew" not in find(path, rows, queries)[1]


def test_fewer_rows_than_neighbors_are_all_found(tmp_path: Path, queries: NDArray[np.float32]) -> None:
    rows = np.eye(3, F, dtype=np.float32)
    found, _ = find(tmp_path / "a.npy", rows, queries, k=10)
    assert found.rows.shape == (Q, 3)
    assert {tuple(sorted(row)) for row in found.rows} == {(0, 1, 2)}


def test_a_row_of_zeros_is_like_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((2, F), np.float32)
    rows[1, 0] = 5
    for faiss in (True, False):
        if not faiss:
            monkeypatch.setattr(search, "find_spec", lambda name: None)
        found, _ = find(tmp_path / "a.npy", rows, rows[1:] * 2)
        assert found.rows.tolist() == [[1, 0]]
        np.testing.assert_allclose(found.similarities, [[1, 0]], rtol=0, atol=1e-6)
