"""Triton's interpreter, made to round as a GPU does. Imported by conftest.py where kernels are interpreted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_to_nearest_bf16() -> None:
    """fp32 to bf16 rounds to the nearest on a GPU; triton 3.8's interpreter truncates, an error twice as large."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.tensor(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, dtype.scalar)
        return cast(self, source, dtype)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


@dataclass
class Counted:
    """Bytes that interpreted kernels loaded and stored: all of them, and each address once (loads and stores apart)."""

    issued_bytes: int = 0
    sizes: dict[str, dict[int, int]] = field(default_factory=lambda: {"load": {}, "store": {}})  # by address

    @property
    def unique_bytes(self) -> int:
        return sum(sum(sizes.values()) for sizes in self.sizes.values())

    def add(self, kind: str, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        self.issued_bytes += addresses.size * size
        self.sizes[kind].update(dict.fromkeys(addresses.tolist(), size))


@contextmanager
def counting() -> Iterator[Counted]:
    """Counts the traffic of the kernels that are interpreted within."""
    counted, builder = Counted(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest, **named):
        counted.add("load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest, **named):
        counted.add("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield counted
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
