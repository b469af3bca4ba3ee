"""Parquet files of images for tests, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mnclglf.data.datasets import load_dataset
from mnclglf.data.images import ImageSet
from mnclglf.data.packed import PackedImages

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub_metadata(
    image: str = "image", label: str | None = "label", classes: Sequence[str] | None = None
) -> dict[str, str]:
    """Returns the metadata that `datasets` writes: the features of the columns."""
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if label is not None and classes is not None:
        features[label] = {"names": list(classes), "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any] | None = None,
    *,
    classes: Sequence[str] | None = None,
    rows: int = 3,
    **how: Any,
) -> Path:
    """Writes images as structs with bytes and path, and labels, so many rows per row group."""
    columns: dict[str, Any] = {
        "image": pa.array(
            [None if data is None else {"bytes": data, "path": f"{at}.png"} for at, data in enumerate(images)], IMAGE
        )
    }
    if labels is not None:
        columns["label"] = pa.array(labels)
    metadata = hub_metadata(classes=classes)
    return write_table(path, pa.table(columns).replace_schema_metadata(metadata), rows=rows, **how)


def write_table(path: Path, table: pa.Table, *, rows: int = 3, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows, **how)
    return path


def load_parquet(pattern: object, *, skip_corrupt: bool = False) -> tuple[PackedImages, ImageSet | None]:
    train, test = load_dataset(f"parquet:{pattern}", skip_corrupt=skip_corrupt)
    assert isinstance(train, PackedImages)
    return train, test
