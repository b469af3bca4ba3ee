"""`python -m bench.inductor`: counts what Inductor makes of a compiled training step on a GPU that is not here.

For forward and backward it prints the launches of Inductor's kernels by kind and the bytes that they read and write (by
Inductor's estimate), the launches and unique bytes of our own operators, the calls of libraries, and the peak of
Inductor's buffers. Optimizer and `after_step` run outside of the compiled graph and are not in it.

Nothing runs. The step is traced on CPU tensors, as autograd on fake CUDA tensors would ask the driver. Its graphs are
moved to fake CUDA tensors, Inductor generates code for a GPU that `described_gpu` describes, and the code is read
instead of compiled. So choices that Inductor makes by timing are not seen: padded products, max-autotune's templates.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx, memory, scheduler
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils._ordered_set import OrderedSet
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.roofline import config_of
from bench.steps import Size, noise
from mnclglf.config import RunConfig
from mnclglf.methods import METHODS
from mnclglf.training.speedups import compiled, share_casts
from mnclglf.training.start import build_method
from mnclglf_kernels import Backend, Backends, backend
from mnclglf_kernels._triton import launch
from mnclglf_kernels.aot import GPUS

CUDA = torch.device("cuda", 0)
OURS = "our operators"
COMBO = "combo"  # several kernels in one launch: multi-tensor operations, and with combo kernels any
# Inductor's other kernels by the prefix of their name.
KINDS = {"poi": "pointwise", "red": "reduction", "per": "reduction", "tem": "template"}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation")
LIBRARIES = {"convolution": "convolution", "convolution_backward": "convolution, backward"}
LIBRARIES |= dict.fromkeys(PRODUCTS, "product")

FIGURES = ("launches", "moved", "calls", "peak_bytes")  # of Counted, as JSON


@dataclass
class Counted:
    """What one graph launches.

    Attributes:
        launches: launches by kind, ours under OURS.
        moved: bytes read and written by these launches.
        calls: calls of libraries by kind; a call that is not in LIBRARIES is counted under its own name.
        own: the launches of our operators, by name of the custom operator.
        peak_bytes: greatest sum of buffers that are alive at once, the graph's inputs included, by Inductor's estimate.
    """

    launches: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    own: dict[str, list[launch.Launch]] = field(default_factory=dict)
    peak_bytes: int = 0


class Stop(BaseException):
    """Ends a call whose graphs have been counted. No exception handler of the compiler catches it."""


@contextmanager
def described_gpu(arch: int) -> Generator[None]:
    """Answers what Inductor and Triton ask about a GPU. They cache answers: one GPU per process."""
    gpu, (major, minor) = GPUS[arch], divmod(arch, 10)
    properties = SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.processors,
        regs_per_multiprocessor=gpu.registers,
        max_threads_per_multi_processor=32 * gpu.warps,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_block,
        shared_memory_per_multiprocessor=gpu.shared_processor,
    )
    answers: dict[str, object] = dict(
        is_available=True,
        device_count=1,
        current_device=0,
        get_device_properties=properties,
        get_device_capability=(major, minor),
        get_rng_state=torch.empty(0),  # kept and put back around the generation of code
        set_rng_state=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
    )
    triton_driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
    )
    with ExitStack() as stack:

        def answer(place: Any, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(place, name, return_value=value))

        for name, value in answers.items():
            answer(torch.cuda, name, value)
            if hasattr(CudaInterface, name):  # a reference to torch.cuda's
                answer(CudaInterface, name, value)
        answer(scheduler, "has_triton", True)
        # cuDNN is asked for the memory format of a convolution's result. Without one the answer is contiguous, and
        # every convolution gets a copy that a GPU does not make.
        answer(torch._C, "_conv_determine_backend_memory_format", torch.channels_last)
        stack.enter_context(mock.patch.object(driver, "_active", triton_driver))
        yield


def own_launches(graph: Graph) -> dict[str, list[launch.Launch]]:
    """Returns the launches of our operators in a graph of fake CUDA tensors, by name of the custom operator.

    A custom operator of a `_triton` module is opaque in the graph. Its body is called here with what it would be called
    with, and what it gives to `launch.run` is kept.
    """
    found: dict[str, list[launch.Launch]] = {}
    for node in graph.nodes:
        body = OPDEFS[node.target.name()]._init_fn if is_custom(node.target) else None
        if body is not None and body.__module__.startswith(launch.__package__):
            args, kwargs = tree_map_only(Node, lambda operand: operand.meta["val"], (node.args, node.kwargs))
            made = found.setdefault(node.target.name().removeprefix("mnclglf::"), [])
            record = mock.patch.object(launch, "run", lambda launches, device, made=made: made.extend(launches))
            with record, V.fake_mode:
                body(*args, **kwargs)
    return found


def is_custom(target: object) -> bool:
    """Returns whether a node's target is an operator that torch.library.custom_op made."""
    return isinstance(target, OpOverload) and target.name() in OPDEFS


def peak_bytes(lowered: GraphLowering) -> int:
    """Returns Inductor's estimate of a graph's peak, computed as its own passes do."""
    nodes, outputs = lowered.scheduler.nodes, OrderedSet(lowered.get_output_names())
    freeable = memory.get_freeable_input_buf(nodes, OrderedSet(lowered.graph_inputs))
    memory.assign_memory_planning_info_for_scheduler_buffers(nodes, lowered.scheduler.name_to_buf)
    memory.assign_memory_planning_info_for_scheduler_nodes(
        nodes, lowered.scheduler.name_to_fused_node, lowered.scheduler.name_to_buf, freeable
    )
    return memory.estimate_peak_memory(nodes, freeable, outputs)[0]


def read_code(code: str, own: Collection[str] = ()) -> Counted:
    """Counts the launches and calls in Inductor's code of one graph, but the calls of our operators `own`."""
    counted = Counted()
    kinds: dict[str, str] = {}
    moved: dict[str, float] = {}
    written: list[tuple[str, str]] = re.findall(
        r"^(triton_\w+) = async_compile\.triton\((.*?)^''', device_str", code, re.M | re.S
    )
    for name, source in written:
        found = re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)
        if found is None:
            raise RuntimeError(f"Inductor's kernel {name} has no kernel_num_gb, which profile_bandwidth writes")
        moved[name] = 1e9 * float(found[1])
        kinds[name] = COMBO if "combo_grid_meta" in source else KINDS.get(name.split("_")[1], name)
    launched: list[str] = re.findall(r"^\s+(triton_\w+)\.run\(", code, re.M)
    for name in launched:
        counted.launches[kinds[name]] += 1
        counted.moved[kinds[name]] += round(moved[name])
    called: list[tuple[str, str]] = re.findall(r"(extern_kernels|torch\.ops\.\w+)\.(\w+)(?:\.\w+)?\(", code)
    for place, name in called:
        if place != "torch.ops.mnclglf" or name not in own:
            counted.calls[LIBRARIES.get(name, name)] += 1
    return counted


def count(function: Callable[..., object], *inputs: object, arch: int) -> list[Counted]:
    """Counts the graphs of a function that torch.compile made: the forward, and the backward where there is one.

    Args:
        function: compiled function of CPU tensors. Its backward must be compiled with the forward
            (force_non_lazy_backward_lowering), as that of `speedups.compiled` is.
        inputs: its arguments.
        arch: compute capability of the described GPU.
    """
    graphs: list[Counted] = []
    generate: Any = compile_fx._compile_fx_inner

    def on_cuda(graph: GraphModule, inputs: Sequence[object], *args: Any, **kwargs: Any) -> Any:
        for node in graph.graph.nodes:
            operands = tree_map_only(torch.device, lambda _: CUDA, (node.args, dict(node.kwargs)))
            node.args, node.kwargs = operands
        graph.recompile()
        with described_gpu(arch):
            return generate(graph, [on_gpu(x) for x in inputs], *args, **kwargs)

    def read(lowered: Any) -> SimpleNamespace:
        code, _ = lowered.codegen()
        own = own_launches(lowered.graph)
        counted = read_code(code.value, own)
        counted.own, counted.peak_bytes = own, peak_bytes(lowered)
        ours = [x for made in counted.own.values() for x in made]
        counted.launches[OURS] += len(ours)
        counted.moved[OURS] += sum(x.traffic.unique_bytes for x in ours)
        graphs.append(counted)
        return SimpleNamespace(call=stop)

    def stop(inputs: object) -> object:
        raise Stop

    torch._dynamo.reset()
    with (
        inductor.patch(force_disable_caches=True, profile_bandwidth=True, compile_threads=1),
        mock.patch.object(compile_fx, "_compile_fx_inner", on_cuda),
        mock.patch.object(GraphLowering, "compile_to_module", read),
        mock.patch.object(backend, "INTERPRETED", True),  # lets our operators be traced on CPU tensors
    ):
        try:
            function(*inputs)
        except Stop:
            return graphs
    raise RuntimeError("the function ran: torch.compile did not compile it, or its backend is not inductor")


def on_gpu(value: object) -> object:
    """Returns a fake tensor of the same layout on the described GPU; what is no tensor is returned as it is."""
    if not isinstance(value, Tensor):
        return value
    with detect_fake_mode([value]) or FakeTensorMode():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)


def count_step(config: RunConfig, side: int, arch: int, convolution: Backend = "torch") -> list[Counted]:
    """Counts forward and backward of a run's compiled step in bf16, with all our operators.

    `convolution` is the backend of the fused convolutions in forwards without gradient; "torch" fuses none.
    """
    dtype, images = torch.bfloat16, config.optim.batch_size
    method = build_method(config, dtype).train()
    method.backends = Backends.all("triton")
    method.fuse(convolution)
    views = torch.cat(noise(Size(images, side), torch.device("cpu"), method.views))
    views = views.to(dtype, memory_format=torch.channels_last)
    labels = torch.zeros(images, dtype=torch.int64) if method.needs_labels else None
    step = compiled(share_casts(method, dtype), graphs=False, combo_kernels=config.engine.combo_kernels == "on")
    with torch.autocast("cpu", dtype=dtype):
        return count(step, views, labels, arch=arch)


def table(graphs: Sequence[Counted]) -> str:
    """Formats the graphs as Markdown, one row per kind and one pair of columns per graph."""
    names = ["forward", "backward"][: len(graphs)]
    lines = [
        "| | " + " | ".join(f"{name}: launches | GB" for name in names) + " |",
        "|---" + "|--:|--:" * len(names) + "|",
    ]

    def line(name: str, cells: Iterable[tuple[object, float | None]]) -> None:
        pairs = [f"{count} | {'' if moved is None else f'{moved / 1e9:.3f}'}" for count, moved in cells]
        lines.append(f"| {name} | {' | '.join(pairs)} |")

    kinds = dict.fromkeys(
        [*KINDS.values(), COMBO, *(kind for graph in graphs for kind in graph.launches if kind != OURS), OURS]
    )
    for kind in kinds:
        line(kind, [(graph.launches[kind], graph.moved[kind]) for graph in graphs])
    line("together", [(graph.launches.total(), graph.moved.total()) for graph in graphs])
    for call in dict.fromkeys(call for graph in graphs for call in graph.calls):
        line(f"library: {call}", [(graph.calls[call], None) for graph in graphs])
    line("peak of buffers", [("", graph.peak_bytes) for graph in graphs])
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.inductor", description=__doc__)
    parser.add_argument("--arch", type=int, choices=GPUS, default=86)
    parser.add_argument("--method", choices=METHODS, default="mnclglf")
    parser.add_argument(
        "--combo-kernels", action="store_true", help="merge independent kernels, as the run's option does"
    )
    parser.add_argument(
        "--convolution", choices=("torch", "triton"), default="torch", help="of forwards without gradient"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=64, help="channels of the encoder's first stage")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print the exact figures")
    options = parser.parse_args(arguments)
    config = config_of(options.method, options.batch)
    config = replace(
        config,
        model=replace(config.model, width=options.width),
        engine=replace(config.engine, combo_kernels="on" if options.combo_kernels else "off"),
    )
    graphs = count_step(config, options.side, options.arch, options.convolution)
    if options.json:
        figures = [{name: getattr(graph, name) for name in FIGURES} for graph in graphs]
        print(json.dumps({"torch": torch.__version__, "graphs": figures}, indent=1, sort_keys=True))
        return
    size = Size(options.batch, options.side, options.width)
    print(
        f"{options.method}, {size}, bf16, sm_{options.arch}, combo kernels {'on' if options.combo_kernels else 'off'}, "
        f"convolutions without gradient {options.convolution}, "
        f"torch {torch.__version__}, triton {triton.__version__}\n\n{table(graphs)}"
    )


if __name__ == "__main__":
    main()
