"""cuDNN's plans of convolutions: built once per shape and form, kept, run on torch's current stream.

A plan is one kernel in one configuration.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mnclglf_kernels._cudnn.graphs import Form, Graph, Shape, forward, input_gradient, propose
from mnclglf_kernels.backend import first_line

ALIGNMENT = 16  # bytes, of every pointer that cuDNN gets


class Question(NamedTuple):
    """What cuDNN is to compute for one view.

    Attributes:
        shape: the convolution.
        dtype: dtype of images and filters.
        half_sums: the products are summed in fp16.
        prologue: it reads relu(x * scale + shift).
        gradient: it is the gradient of x instead.
    """

    shape: Shape
    dtype: torch.dtype
    half_sums: bool = False
    prologue: bool = False
    gradient: bool = False

    def forms(self) -> list[Form]:
        """Returns the forms to try, in order. Only fp16 with fp32 sums has an epilogue, with vectors in fp16."""
        form = Form(self.dtype, half_sums=self.half_sums, prologue=self.prologue)
        if self.gradient or self.half_sums or self.dtype != torch.float16:
            return [form._replace(fp32_vectors=True)]
        return [form._replace(epilogue=True), form._replace(fp32_vectors=True)]

    def graph(self, cudnn: Any, form: Form, **place: Any) -> Graph:
        """Returns the graph of a form; `place` is as in forward."""
        make = input_gradient if self.gradient else forward
        return make(cudnn, self.shape, form, **place)

    def misaligned(self) -> str | None:
        """Returns why cuDNN cannot read a view where it lies in a batch, or None."""
        s, itemsize = self.shape, self.dtype.itemsize
        down, right = s.sides
        steps = {"x": s.images * s.inputs * s.height * s.width, "y": s.images * s.outputs * down * right}
        steps |= {"scale": s.inputs} if self.prologue else {}
        uneven = [name for name, step in steps.items() if step * itemsize % ALIGNMENT]
        return f"a view of {uneven[0]} is no multiple of {ALIGNMENT} bytes" if uneven else None


class Plan(NamedTuple):
    """A plan that can be run."""

    graph: Graph
    form: Form
    workspace: int  # bytes

    def run(self, device: torch.device, tensors: dict[str, Tensor]) -> None:
        """Runs the plan on torch's current stream. Torch allocates the workspace, so that a CUDA graph can hold it."""
        cudnn, handle = importlib.import_module("cudnn"), handle_of(device)
        with torch.cuda.device(device):
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
            workspace = torch.empty(max(self.workspace, 1), dtype=torch.uint8, device=device)
            given = {self.graph.tensors[name]: tensor for name, tensor in tensors.items()}
            self.graph.graph.execute(given, workspace, handle=handle)


class Choice:
    """The plan of a question on a device, and why others are left out.

    Attributes:
        plan: the first plan that could be built and that nothing rejected; None if there is none.
        reasons: why each earlier form is left out.
    """

    def __init__(self, question: Question, device: torch.device) -> None:
        self.reasons: list[str] = []
        self._built = self._build(question, device)
        self.plan = next(self._built, None)

    def reject(self, reason: str) -> None:
        """Leaves the present plan out, and takes the next form."""
        self.reasons.append(reason)
        self.plan = next(self._built, None)

    def _build(self, question: Question, device: torch.device) -> Iterator[Plan]:
        if (reason := question.misaligned()) is not None:
            self.reasons.append(reason)
            return
        for form in question.forms():
            try:
                cudnn, handle = importlib.import_module("cudnn"), handle_of(device)
                with torch.cuda.device(device):
                    graph = question.graph(cudnn, form, handle=handle)
                    propose(cudnn, graph.graph)
                    graph.graph.check_support()
                    graph.graph.build_plans(cudnn.build_plan_policy.HEURISTICS_CHOICE)
                yield Plan(graph, form, graph.graph.get_workspace_size())
            except Exception as error:  # a library or a driver may raise anything
                self.reasons.append(first_line(error))


@cache
def handle_of(device: torch.device) -> Any:
    """Returns cuDNN's handle of a GPU. One is enough: a backward's thread runs while the forward's waits."""
    with torch.cuda.device(device):
        return importlib.import_module("cudnn").create_handle()


@cache
def choice(question: Question, device: torch.device) -> Choice:
    """Returns the choice for a question, made once, with a warning where it is the PyTorch form."""
    made = Choice(question, device)
    if made.plan is None:
        reasons = "; ".join(made.reasons)
        warnings.warn(f"cuDNN has no plan for {describe(question)} ({reasons}); it runs in PyTorch", stacklevel=2)
    return made


def plan_of(question: Question, device: torch.device) -> Plan | None:
    """Returns the plan to run, or None for the PyTorch form."""
    return choice(question, device).plan if has_plans(device) else None


def has_plans(device: torch.device) -> bool:
    """Returns whether cuDNN can plan for a device at all."""
    return device.type == "cuda"


def describe(question: Question) -> str:
    """Returns a question in words."""
    s, dtype = question.shape, str(question.dtype).removeprefix("torch.")
    what = [f"{s.images} x {s.inputs} x {s.height} x {s.width} to {s.outputs}, {s.taps} x {s.taps}, stride {s.stride}"]
    what += [dtype, "fp16 sums" if question.half_sums else "fp32 sums"]
    what += ["prologue"] * question.prologue + ["gradient of x"] * question.gradient
    return ", ".join(what)
