"""Argument checks that the operators share. Each error names the value and the requirement."""

from __future__ import annotations

from torch import Tensor


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be floating point")


def check_matrix(name: str, tensor: Tensor, shape: str) -> None:
    """Raises ValueError unless the tensor has two dimensions, TypeError unless it is floating point."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {tensor.dim()} dimensions; it must be {shape}")
    check_floating(name, tensor)


def check_widths(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless both matrices have rows of the same width."""
    if tensor.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} has rows of width {tensor.shape[1]}, {other_name} of {other.shape[1]}; they must agree"
        )


def check_rows(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless both matrices have the same number of rows, at least one."""
    count, other_count = tensor.shape[0], other.shape[0]
    if count != other_count or count == 0:
        raise ValueError(
            f"{name} has {count} rows, {other_name} {other_count}; they need the same number, at least one"
        )


def check_rank(rank: int, ranks: int, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless `rank` is one of `ranks`, each with the same number of the tensor's rows."""
    if ranks < 1:
        raise ValueError(f"ranks {ranks} must be at least 1, the number of processes")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} must be one of 0 to {ranks - 1}, as there are {ranks} ranks")
    if tensor.shape[0] % ranks:
        raise ValueError(
            f"{name} has {tensor.shape[0]} rows, which {ranks} ranks do not divide; gather the same number from each"
        )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be positive")


def check_queue(name: str, tensor: Tensor, queue: Tensor) -> None:
    """Raises ValueError or TypeError unless the queue is floating point, as wide as `tensor`, with a row or more."""
    check_matrix("queue", queue, "[K, D]")
    check_widths(name, tensor, "queue", queue)
    if queue.shape[0] == 0:
        raise ValueError(f"queue has shape {tuple(queue.shape)}; it needs at least one row")
