"""Fixtures that check each interpreted kernel: it writes its whole result, once, and touches nothing else."""

import os
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from mnclglf_kernels.backend import HAS_TRITON, INTERPRETED

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic


@pytest.fixture(autouse=True)
def uninitialised_memory_is_filled() -> Iterator[None]:
    """Fills the memory of torch.empty with NaN, or the greatest integer (see torch.utils.deterministic)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_are_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that a kernel loads and stores only elements of its arguments, and stores each once."""
    if not (HAS_TRITON and INTERPRETED):
        return
    from interpreter import confined

    from mnclglf_kernels._triton import launch

    run = launch.run

    def run_confined(launches: Sequence[launch.Launch], device: torch.device) -> None:
        for x in launches:
            values = [
                value for group in x.arguments.values() for value in (group if isinstance(group, tuple) else [group])
            ]
            with confined([value for value in values if isinstance(value, Tensor)], x.kernel.fn.__name__):
                run([x], device)

    monkeypatch.setattr(launch, "run", run_confined)
