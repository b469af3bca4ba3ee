"""Which implementation an operator runs: decided in one place, the same way for all."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Backend = Literal["auto", "triton", "torch"]


def resolve(backend: Backend, tensor: Tensor) -> Literal["torch"]:
    """The backend that an operator called with `backend` on `tensor` runs.

    Raises:
        ValueError: `backend` is not a name this package knows.
        RuntimeError: the backend was asked for by name and cannot run; only "auto" falls back.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is not one of {', '.join(get_args(Backend))}")
    if backend == "triton" and not tensor.is_cuda:
        raise RuntimeError(f"backend 'triton' needs CUDA tensors, got one on {tensor.device}; use 'auto' or 'torch'")
    if backend == "triton":
        raise RuntimeError("backend 'triton' is not built in this version; use 'auto' or 'torch'")
    return "torch"
