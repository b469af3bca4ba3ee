"""Graphs of the convolutions that cuDNN is asked to plan: on the current GPU, or on one that is described.

bench/cudnn_plans.py asks with the same functions, without a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

TYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}


class Shape(NamedTuple):
    """A convolution of one view's images."""

    images: int
    inputs: int  # channels
    height: int
    width: int
    outputs: int  # channels
    taps: int  # side of the filter
    stride: int
    padding: int

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the result."""
        down, right = ((side + 2 * self.padding - self.taps) // self.stride + 1 for side in (self.height, self.width))
        return down, right


class Form(NamedTuple):
    """What a graph computes beside the convolution, and how.

    Attributes:
        dtype: dtype of images and filters, fp16 or bf16.
        half_sums: the products are summed in fp16, not in fp32.
        prologue: the convolution reads relu(x * scale + shift).
        epilogue: sum and sum of squares of y per channel are results too, in fp32.
        fp32_vectors: scale and shift are in fp32, not in `dtype`.
    """

    dtype: torch.dtype
    half_sums: bool = False
    prologue: bool = False
    epilogue: bool = False
    fp32_vectors: bool = False


class Graph(NamedTuple):
    """A graph, and its tensors by name."""

    graph: Any
    tensors: dict[str, Any]


def forward(cudnn: Any, shape: Shape, form: Form, **place: Any) -> Graph:
    """Returns the graph of a forward: x, weight, scale and shift to y, sum and squares.

    Args:
        cudnn: module of nvidia-cudnn-frontend.
        shape: the convolution.
        form: what is computed beside it.
        place: `handle` of the current GPU, or `device_property` of a described one.
    """
    graph, dtype, fp32 = begin(cudnn, form, place)
    down, right = shape.sides
    x = tensor(graph, "x", (shape.images, shape.inputs, shape.height, shape.width), dtype)
    weight = tensor(graph, "weight", (shape.outputs, shape.inputs, shape.taps, shape.taps), dtype)
    tensors, read = dict(x=x, weight=weight), x
    if form.prologue:
        vectors = fp32 if form.fp32_vectors else dtype
        tensors |= {name: tensor(graph, name, (1, shape.inputs, 1, 1), vectors) for name in ("scale", "shift")}
        read = graph.relu(graph.add(graph.mul(x, tensors["scale"]), tensors["shift"]))
        read.set_data_type(dtype)
    y = graph.conv_fprop(image=read, weight=weight, **settings(cudnn, shape, form))
    tensors["y"] = output(y, (shape.images, shape.outputs, down, right), dtype)
    if form.epilogue:
        for name, sums in zip(("sum", "squares"), graph.genstats(y), strict=True):
            tensors[name] = output(sums, (1, shape.outputs, 1, 1), fp32)
    return Graph(graph, tensors)


def input_gradient(cudnn: Any, shape: Shape, form: Form, **place: Any) -> Graph:
    """Returns the graph of a backward: upstream gradient and weight to the gradient of x."""
    graph, dtype, _ = begin(cudnn, form, place)
    upstream = tensor(graph, "upstream", (shape.images, shape.outputs, *shape.sides), dtype)
    weight = tensor(graph, "weight", (shape.outputs, shape.inputs, shape.taps, shape.taps), dtype)
    gradient = graph.conv_dgrad(loss=upstream, filter=weight, **settings(cudnn, shape, form))
    output(gradient, (shape.images, shape.inputs, shape.height, shape.width), dtype)
    return Graph(graph, dict(upstream=upstream, weight=weight, gradient=gradient))


def begin(cudnn: Any, form: Form, place: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Returns an empty graph, cuDNN's name of the form's dtype, and that of fp32."""
    dtype, fp32 = getattr(cudnn.data_type, TYPES[form.dtype]), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=dtype, intermediate_data_type=fp32, compute_data_type=fp32, **place)
    return graph, dtype, fp32


def channels_last(dims: tuple[int, ...]) -> list[int]:
    """Returns the strides of dense channels_last images."""
    _, channels, height, width = dims
    return [height * width * channels, 1, width * channels, channels]


def tensor(graph: Any, name: str, dims: tuple[int, ...], dtype: Any) -> Any:
    return graph.tensor(name=name, dim=[*dims], stride=channels_last(dims), data_type=dtype)


def output(made: Any, dims: tuple[int, ...], dtype: Any) -> Any:
    return made.set_output(True).set_dim([*dims]).set_stride(channels_last(dims)).set_data_type(dtype)


def settings(cudnn: Any, shape: Shape, form: Form) -> dict[str, Any]:
    sums = cudnn.data_type.HALF if form.half_sums else cudnn.data_type.FLOAT
    sizes = dict(padding=[shape.padding] * 2, stride=[shape.stride] * 2, dilation=[1, 1])
    return dict(**sizes, compute_data_type=sums)


def propose(cudnn: Any, graph: Any) -> None:
    """Makes cuDNN list its plans for a graph, the one that it takes for the fastest first.

    Raises:
        cudnn.cudnnGraphNotSupportedError: it has none.
    """
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
