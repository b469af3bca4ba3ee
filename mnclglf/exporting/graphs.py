"""The networks as graphs of standard operators, with a dynamic batch: torch.export programs, and ONNX made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mnclglf.exporting.networks import Exported, ExportError, Heads, check_same, sample

METADATA = "metadata.json"  # extra file of a .pt2
COUNTS = (1, 5)  # images of the checks: neither is the size of a batch that was traced
TRACED = 2


def write_graphs(exported: Exported, folder: Path, formats: Sequence[str], header: Mapping[str, str]) -> None:
    """Writes encoder.pt2 and encoder.onnx, those among `formats`, and the same of the heads; checks what was written.

    Raises:
        ExportError: a graph has an operator that is not a standard one, or gives other results than the module.
    """
    images = sample(exported, max(COUNTS))
    with torch.inference_mode():
        features = exported.encoder(images).clone()
    subjects: list[tuple[str, nn.Module, Tensor, str, list[str]]] = [
        ("encoder", exported.encoder, images, "images", ["features"])
    ]
    if exported.heads:
        subjects.append(("heads", Heads(exported.heads).eval(), features, "features", [*exported.heads]))
    for name, module, inputs, taken, given in subjects:
        program = trace(module, inputs[:TRACED])
        with torch.inference_mode():
            expected = [results(module(inputs[:count])) for count in COUNTS]
        if "pt2" in formats:
            path = folder / f"{name}.pt2"
            torch.export.save(program, path, extra_files={METADATA: json.dumps(header)})
            check_program(path, inputs, expected)
        if "onnx" in formats:
            path = folder / f"{name}.onnx"
            write_onnx(program, inputs[:TRACED], path, taken, given, header)
            check_onnx(path, taken, inputs, expected)


def results(found: Any) -> list[Tensor]:
    """Returns what a module returned, one tensor or several, as a list."""
    return [*found] if isinstance(found, tuple | list) else [found]


def trace(module: nn.Module, example: Tensor) -> ExportedProgram:
    """Returns the module's program for any number of rows of `example`, without the paths of this machine.

    Raises:
        ExportError: an operator is not PyTorch's.
    """
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch")},))
    program.example_inputs = None  # would be written as a pickle
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    own = [node.target for node in program.graph.nodes if node.op == "call_function"]
    check_operators([str(target) for target in own if getattr(target, "namespace", "aten") != "aten"])
    return program


def check_operators(foreign: Sequence[str]) -> None:
    """Raises ExportError if there are operators that only this project has."""
    if foreign:
        raise ExportError(
            f"the graph has operators that are not standard ones: {', '.join(sorted({*foreign}))}; export it as "
            "--formats safetensors"
        )


def check_program(path: Path, inputs: Tensor, expected: Sequence[Sequence[Tensor]]) -> None:
    """Raises ExportError unless the .pt2 gives the expected results on the first rows of `inputs`."""
    module = torch.export.load(path).module()
    for count, wanted in zip(COUNTS, expected, strict=True):
        with torch.inference_mode():
            found = results(module(inputs[:count]))
        for one, other in zip(found, wanted, strict=True):
            check_same(f"the result of {path.name}", one, other)


def write_onnx(
    program: ExportedProgram, example: Tensor, path: Path, taken: str, given: Sequence[str], header: Mapping[str, str]
) -> None:
    """Writes a program as ONNX, with `header` as its metadata.

    Args:
        program: the program.
        example: input of the program.
        path: file to write; weights of more than 1.5 GB go into a second file beside it.
        taken: name of the input.
        given: names of the outputs.
        header: text by name.

    Raises:
        ExportError: an operator is not one of ONNX.
    """
    made = torch.onnx.export(
        program,
        (example,),
        dynamo=True,
        input_names=[taken],
        output_names=[*given],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    model = cast(Any, made).model
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()  # the insides of torch.export
        for node in graph:
            node.metadata_props.clear()
    check_operators([f"{node.domain}.{node.op_type}" for node in model.graph if node.domain not in ("", "ai.onnx")])
    model.metadata_props.update(header)
    cast(Any, made).save(path)


def check_onnx(path: Path, taken: str, inputs: Tensor, expected: Sequence[Sequence[Tensor]]) -> None:
    """Raises ExportError unless onnxruntime gives the expected results on the first rows of `inputs`."""
    import onnxruntime  # an extra

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count, wanted in zip(COUNTS, expected, strict=True):
        found = session.run(None, {taken: inputs[:count].numpy()})
        for one, other in zip(found, wanted, strict=True):
            check_same(f"the result of {path.name} in onnxruntime", torch.from_numpy(one), other)
