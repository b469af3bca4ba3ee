"""Memory that a kernel should have written and has not is NaN, or the greatest integer, so that it shows."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic


@pytest.fixture(autouse=True)
def uninitialised_memory_is_filled() -> Iterator[None]:
    """torch.empty and its kin fill what they return: torch.utils.deterministic.fill_uninitialized_memory."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
