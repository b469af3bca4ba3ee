"""What every interpreted kernel is held to: it writes all of its result, once, and touches nothing else."""

import os
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from mnclglf_kernels.backend import HAS_TRITON, INTERPRETED

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic


@pytest.fixture(autouse=True)
def uninitialised_memory_is_filled() -> Iterator[None]:
    """torch.empty and its kin give NaN, or the greatest integer (torch.utils.deterministic says so)."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernels_are_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel loads and stores elements of its arguments alone, and stores each once."""
    if not (HAS_TRITON and INTERPRETED):
        return
    from interpreter import confined

    from mnclglf_kernels._triton import augment, contrastive, neighbor, nt_xent, patches, queue, queue_contrastive
    from mnclglf_kernels._triton.launch import Launch, run

    def run_confined(launches: Sequence[Launch], device: torch.device) -> None:
        for launch in launches:
            values = [
                x for value in launch.arguments.values() for x in (value if isinstance(value, tuple) else (value,))
            ]
            with confined([x for x in values if isinstance(x, Tensor)], launch.kernel.fn.__name__):
                run([launch], device)

    for module in (augment, contrastive, neighbor, nt_xent, patches, queue, queue_contrastive):
        monkeypatch.setattr(module, "run", run_confined)
