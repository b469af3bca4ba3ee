"""Which implementation each operator of a run gets: decided once, after the kernels have proved themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from rich.console import Console

from mnclglf.config import RunConfig
from mnclglf.methods import METHODS
from mnclglf_kernels import Backends, resolve, self_check
from mnclglf_kernels.backend import triton_problem
from mnclglf_kernels.operators import OperatorName
from mnclglf_kernels.sizes import Sizes


def choose_backends(
    config: RunConfig,
    source: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    console: Console,
    *,
    operators: Sequence[OperatorName] | None = None,
) -> Backends:
    """The operators' backends: Triton where it can run and is right at this run's sizes, else PyTorch, and said.

    Args:
        config: the run; `engine.kernels` and `engine.lookup` are what is asked for.
        source: longer side of the images that views are made of.
        side: of a view.
        dtype: autocast's.
        device: of the run.
        console: where a kernel that is not used is reported.
        operators: those that are needed; None for those of the method, and of the loader.

    Raises:
        RuntimeError: kernels are required and cannot run, or one is wrong; or FAISS cannot run here.
    """
    policy, probe = config.engine.kernels, torch.empty(0, dtype=dtype, device=device)
    problem = triton_problem((probe,), "matmul")
    if policy == "require" and problem is not None:
        raise RuntimeError(f"kernels are required, but {problem}; take --kernels auto to go on without them")
    if policy == "auto" and problem is not None and device.type == "cuda":
        console.print(f"PyTorch does the kernels' work: {problem}", highlight=False, markup=False, soft_wrap=True)
    backends = Backends.all("torch")
    if policy == "require" or (policy == "auto" and resolve("auto", probe, kind="matmul") == "triton"):
        backends = Backends.all("triton")
        sizes = sizes_of(config, side, source)
        queue_dtype = torch.float32 if config.objective.queue_dtype == "float32" else dtype
        one = config.objective.one_embedding
        needed: Sequence[OperatorName] = (
            (*METHODS[config.method].operators, "augment") if operators is None else operators
        )
        used: list[OperatorName] = [
            op for op in needed if op != "augment" or config.data.loader in ("auto", "resident")
        ]
        problems = self_check.failures(sizes, dtype, queue_dtype, device, one_embedding=one, operators=used)
        if problems and policy == "require":
            found = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
            raise RuntimeError(f"kernels are required, and {found}; take --kernels auto to go on without what is wrong")
        for name, problem in problems.items():
            console.print(
                f"WARNING: the Triton kernel of {name} is wrong on this machine ({problem}); PyTorch does its work. "
                "`make gpu-report` writes a file to attach to an issue.",
                style="bold red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            backends = backends._replace(**{name: "torch"})
    if config.engine.lookup == "faiss":
        resolve("faiss", probe, kind="lookup")
        backends = backends._replace(nearest_neighbor="faiss")
    return backends


def sizes_of(config: RunConfig, side: int, source: int) -> Sizes:
    """What the operators of a run see: views of `side`, made of images of `source` pixels a side."""
    return Sizes(
        images=config.optim.batch_size,
        side=side,
        features=8 * config.model.width,
        k=config.objective.k,
        width=config.model.projector_width,
        queue=config.objective.queue_size,
        source=source,
    )


def describe_backends(backends: Backends) -> str:
    """One word where all are alike, else the most used one and the exceptions: "triton, nearest_neighbor faiss"."""
    (most, _), *_ = Counter(backends).most_common(1)
    return ", ".join([most, *(f"{name} {used}" for name, used in backends._asdict().items() if used != most)])
