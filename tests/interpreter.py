"""Triton's interpreter, made to round as a GPU does. Imported by conftest.py where kernels are interpreted."""

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
