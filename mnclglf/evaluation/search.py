"""The nearest images of a source by the cosine similarity of their embeddings."""

# n rows, q queries, k neighbors, F feature width

from __future__ import annotations

import importlib
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from mnclglf.data.decoding import read_image
from mnclglf.data.errors import DataError
from mnclglf.evaluation.embed import Embedder
from mnclglf.evaluation.embedding_file import Origin, beside, read_embeddings
from mnclglf.runs.console import say
from mnclglf.runs.files import read_object, write_atomically, write_json
from mnclglf.runs.locks import held

LARGE = 500_000  # rows from which on the index is IVF-PQ: 64 bytes per row where a flat one has 2 KB of 512 features
BLOCK = 16384  # rows at once
RECHECKED = 20  # candidates per neighbor that are compared exactly after IVF-PQ
PROBES = 64  # lists of an IVF-PQ that are searched
INDEX_FORMAT = 1


class Nearest(NamedTuple):
    """The k nearest rows of q queries, the nearest first."""

    rows: NDArray[np.int64]
    """[q, k]"""
    similarities: NDArray[np.float32]
    """[q, k], cosine: 1 is the same direction."""


def embed_queries(embedder: Embedder, paths: tuple[Path, ...]) -> tuple[NDArray[np.float32], list[NDArray[np.uint8]]]:
    """Returns the embeddings [q, F] of image files, and their pixels.

    Raises:
        DataError: a file is missing or is no image.
    """
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"--query {missing[0]} is no file; give one or more image files")
    images = [read_image(path) for path in paths]
    size = embedder.batch_images
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    return np.concatenate([embedder.embed([embedder.view(image) for image in batch]) for batch in batches]), images


def find_nearest(
    queries: NDArray[np.float32], embeddings: Path, origin: Origin, neighbors: int, console: Console
) -> Nearest:
    """Returns the nearest rows of a file of embeddings.

    With FAISS its index beside the file is searched, which is built or built anew where it is not of these embeddings.
    Without FAISS all rows are compared.

    Args:
        queries: [q, F].
        embeddings: the file.
        origin: what the file's rows are made of.
        neighbors: k; all rows if there are fewer.
        console: where it says what is done.
    """
    rows, k = read_embeddings(embeddings), min(neighbors, origin.rows)
    units = normalized(queries)
    if find_spec("faiss") is None:
        say(console, "faiss is not installed: comparing every row; pip install 'mnclglf[faiss-cpu]' keeps an index")
        return exact_nearest(units, rows, k)
    with held(embeddings.with_name(f".{embeddings.name}.faiss.lock"), wait=True):  # a second search has its index then
        index = open_index(embeddings, rows, origin, console)
    approximate = origin.rows >= LARGE
    candidates = min(RECHECKED * k, origin.rows) if approximate else k
    similarities, found = index.search(units, candidates)
    return among_candidates(units, rows, found, k) if approximate else Nearest(found, similarities)


def normalized(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns rows [n, F] divided by their lengths; a row of zeros stays."""
    rows = np.asarray(rows, np.float32)
    return np.ascontiguousarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def exact_nearest(units: NDArray[np.float32], rows: NDArray[np.float32], k: int) -> Nearest:
    """Returns the k nearest rows of queries [q, F] of length 1; of equal ones the first in the file."""
    found = Nearest(np.empty((len(units), 0), np.int64), np.empty((len(units), 0), np.float32))
    for start in range(0, len(rows), BLOCK):
        scores = units @ normalized(rows[start : start + BLOCK]).T
        numbers = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
        both = Nearest(np.hstack([found.rows, numbers]), np.hstack([found.similarities, scores]))
        found = _best(both, k)
    return found


def among_candidates(
    units: NDArray[np.float32], rows: NDArray[np.float32], candidates: NDArray[np.int64], k: int
) -> Nearest:
    """Returns the k nearest of each query's candidates [q, c] by exact similarity; -1 is none."""
    scores = np.full(candidates.shape, -np.inf, np.float32)
    for query, (unit, found) in enumerate(zip(units, candidates, strict=True)):
        there = found >= 0
        scores[query, there] = normalized(rows[found[there]]) @ unit
    return _best(Nearest(candidates, scores), k)


def _best(found: Nearest, k: int) -> Nearest:
    order = np.argsort(-found.similarities, axis=1, kind="stable")[:, :k]
    return Nearest(np.take_along_axis(found.rows, order, 1), np.take_along_axis(found.similarities, order, 1))


def open_index(embeddings: Path, rows: NDArray[np.float32], origin: Origin, console: Console) -> Any:
    """Reads the FAISS index beside a file of embeddings, or builds and writes it.

    It is built anew, with a word, if FILE.faiss.json names another encoder or other images, or if it is damaged.
    """
    faiss: Any = importlib.import_module("faiss")  # its stubs lack the readers and writers
    path, note = beside(embeddings, "faiss"), beside(embeddings, "faiss.json")
    kind = "IVF-PQ" if origin.rows >= LARGE else "flat"
    made_of = dict(
        format=INDEX_FORMAT, kind=kind, encoder=origin.encoder, fingerprint=origin.fingerprint, rows=origin.rows
    )
    if path.exists():
        problem = "it is of other images or of another encoder"
        try:
            if read_object(note) == made_of:
                with path.open("rb") as file:  # not by its name, which may be no text
                    index = faiss.read_index(faiss.PyCallbackIOReader(file.read))
                if index.ntotal == origin.rows and index.d == origin.features:
                    return index
                problem = f"it holds {index.ntotal:,} rows"
        except (ValueError, RuntimeError) as error:  # FAISS raises RuntimeError for whatever it cannot read
            problem = f"it is damaged ({str(error).splitlines()[-1]})"
        say(console, f"{path} is built anew: {problem}")
    index = build_index(rows, kind)
    note.unlink(missing_ok=True)  # between the two writes there is no note, so that no wrong one is believed
    write_atomically(path, lambda file: faiss.write_index(index, faiss.PyCallbackIOWriter(file.write)))
    write_json(note, made_of)
    say(console, f"index: {path} ({kind}, {origin.rows:,} rows)")
    return index


def build_index(rows: NDArray[np.float32], kind: str) -> Any:
    """Returns a FAISS index of the rows' directions by inner product."""
    faiss: Any = importlib.import_module("faiss")
    count, features = rows.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(features)
    else:
        lists = int(4 * math.sqrt(count))  # as FAISS advises
        pieces = next(size for size in (64, 32, 16, 8, 4, 2, 1) if features % size == 0)  # bytes per row
        quantizer = faiss.IndexFlatIP(features)
        index = faiss.IndexIVFPQ(quantizer, features, lists, pieces, 8, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(PROBES, lists)
        sample = np.linspace(0, count - 1, min(count, 64 * lists), dtype=np.int64)
        index.train(normalized(rows[sample]))
    for start in range(0, count, BLOCK):
        index.add(normalized(rows[start : start + BLOCK]))
    return index
