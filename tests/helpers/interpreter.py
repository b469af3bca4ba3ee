"""Triton's interpreter, patched to round as a GPU does. conftest.py imports it if kernels are interpreted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter


def round_to_nearest_bf16() -> None:
    """Makes fp32 to bf16 round to nearest, as on a GPU; triton 3.8's interpreter truncates, with twice the error."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(rounded, dst_type.scalar)
        return cast(self, src, dst_type)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def index_one_element() -> None:
    """Lets a tensor of one element be an index: triton 3.6's interpreter converts an array, which numpy 2.4 refuses."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


@dataclass
class Counted:
    """Bytes that interpreted kernels loaded and stored, in total and by unique address (loads and stores apart)."""

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
    """Counts the traffic of the kernels interpreted inside its `with` block."""
    counted, builder = Counted(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest, **named):
        counted.add("load", pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def counted_store(self, pointers, value, mask, *rest, **named):
        counted.add("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    with mock.patch.multiple(builder, create_masked_load=counted_load, create_masked_store=counted_store):
        yield counted


def are_elements(addresses: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Returns a mask of the addresses of the tensor's elements; its strides must not overlap but may be 0."""
    offsets = addresses.astype(np.int64) - tensor.data_ptr()
    inside = (offsets >= 0) & (offsets % tensor.element_size() == 0) & (tensor.numel() > 0)
    offsets //= tensor.element_size()
    steps = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if stride and size > 1]
    for stride, size in sorted(steps, reverse=True):
        inside &= offsets // stride < size
        offsets %= stride
    return inside & (offsets == 0)


@contextmanager
def confined(tensors: Sequence[Tensor], kernel: str) -> Iterator[None]:
    """Asserts that a kernel interpreted inside its `with` block touches only `tensors` and stores each element once."""
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    stored: list[np.ndarray] = []

    def touched(pointers, mask) -> np.ndarray:
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        outside = np.ones(addresses.shape, dtype=bool)
        for tensor in tensors:
            outside &= ~are_elements(addresses, tensor)
            if not outside.any():
                return addresses
        raise AssertionError(f"{kernel} touches {outside.sum()} addresses that are no elements of its arguments")

    def confined_load(self, pointers, mask, *rest, **named):
        touched(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def confined_store(self, pointers, value, mask, *rest, **named):
        stored.append(touched(pointers, mask))
        return store(self, pointers, value, mask, *rest, **named)

    with mock.patch.multiple(builder, create_masked_load=confined_load, create_masked_store=confined_store):
        yield
    addresses = np.concatenate(stored)
    assert np.unique(addresses).size == addresses.size, f"{kernel} stores an element twice: it has two owners"
