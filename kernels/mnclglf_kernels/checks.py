"""Checks of arguments that the operators share; each error names the value and what is needed."""

from __future__ import annotations

from torch import Tensor


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor is floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be floating point")


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    """ValueError unless the tensor has two dimensions, TypeError unless it is floating point."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {tensor.dim()} dimensions; it must be {shape}")
    check_floating(name, tensor)


def check_widths(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both matrices have rows of the same width."""
    if tensor.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has rows of width {tensor.shape[1]}, {other_name} of {other.shape[1]}; they must agree"
        )
