"""Tests of the operators on a GPU: against PyTorch in fp64 on the CPU and in the same dtype, repeated and compiled."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import batch_norms
import method_oracles
import oracles
import pytest
import torch
from table import SMALL, arguments_of, outcomes, tensors_in
from tolerance import (
    ULPS_FP32,
    assert_as_accurate_as_plain,
    assert_nearest,
    combine_floor,
    gradient_floor,
    loss_floor,
    working_epsilon,
)
from torch import Tensor
from torch.nn import functional as F

from mnclglf_kernels import (
    Backend,
    augment,
    batch_norm,
    combine,
    contrastive_loss,
    contrastive_losses,
    conv2d,
    convolution,
    divide,
    enqueue,
    nearest_neighbor,
    nt_xent,
    queue_contrastive_loss,
    self_check,
)
from mnclglf_kernels._cudnn.proof import plan_problem
from mnclglf_kernels.backend import cudnn_problem, faiss_problem
from mnclglf_kernels.operators import OPERATORS, Arguments
from mnclglf_kernels.ops.augment import ViewFormat
from mnclglf_kernels.sizes import PAPER, Sizes

pytestmark = pytest.mark.gpu

REHEARSED = os.environ.get("MNCLGLF_TEST_GPU") == "rehearse"  # on a CPU, with interpreted kernels
DEVICE = torch.device("cpu" if REHEARSED else "cuda")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAUNCHES = 20
PLAIN = oracles.Algorithm1AsPrinted


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Returns the result and the gradients of every input, on the CPU."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    gradients = torch.autograd.grad(result, leaves, upstream.to(result))
    return [x.detach().cpu() for x in (result, *gradients)]


def on_gpu(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in inputs]


def in_fp64(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() for x in inputs]


@pytest.mark.parametrize(("source", "side"), [(32, 32), (28, 16), (64, 64), (50, 33)])
@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_augment(dtype, rotates, cubic, source, side):
    images, rows = torch.randint(256, (20, 3, source, source), dtype=torch.uint8), torch.randperm(20)
    u = torch.rand(60, 13)
    start, length = (u[:, 1:3] * source / 2).floor(), (u[:, 3:5] * source / 2).floor() + 1
    numbers = [360 * u[:, :1] - 180, start, length, (u[:, 5:6] > 0.5).float(), 0.6 + 0.8 * u[:, 6:9], u[:, 9:10] - 0.5]
    numbers += [(u[:, 10:11] > 0.8).float(), 2 * u[:, 11:12] * (u[:, :1] > 0.3), (u[:, 12:] > 0.5).float()]
    parameters = torch.cat(numbers, 1)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    view_format = ViewFormat(side, cubic, 5, rotates)
    given = on_gpu([images, rows, parameters, mean, std])
    doubles = in_fp64([parameters, mean, std])
    truth = augment(images, rows, *doubles, view_format=view_format, dtype=torch.float64, backend="torch")
    ours, plain = (
        (augment(*given, view_format=view_format, dtype=dtype, backend=backend).cpu().double() - truth).abs()
        for backend in ("triton", "torch")
    )
    ours, plain = (255 * std.view(3, 1, 1) * (x - torch.finfo(dtype).eps * truth.abs()) for x in (ours, plain))
    assert ours.max() < 8  # levels: two sums that end on the other side of a half, scaled by the jitter
    # Such sums are frequent if the two sizes have a simple ratio, and fp32 puts half of them on the other side.
    # Tensor cores, which seem to truncate sums, put more there: on an H200 twice as many, or 0.7% if they are few.
    off, expected = ((x > 0.1).double().mean() for x in (ours, plain))
    assert off < 3 * expected + 0.01


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divide(dtype, memory_format):
    images = torch.randn(65, 3, 32, 32).to(dtype).contiguous(memory_format=memory_format)
    upstream = torch.randn(260, 3, 16, 16).to(dtype)
    actual = with_gradients(lambda x: divide(x, backend="triton"), on_gpu([images]), upstream)
    expected = with_gradients(lambda x: divide(x, backend="torch"), in_fp64([images]), upstream)
    for result, truth in zip(actual, expected, strict=True):
        assert torch.equal(result.double(), truth)  # divide copies, so results are exact


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(65, 123), (256, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype, size, k):
    images, width = size
    features = torch.randn(4 * images, width).to(dtype)
    upstream = torch.randn(len(PLAIN.combine(features, k)), width).to(dtype)
    actual = with_gradients(lambda v: combine(v, k, backend="triton"), on_gpu([features]), upstream)
    plain = with_gradients(lambda v: PLAIN.combine(v, k), on_gpu([features]), upstream)
    truth = with_gradients(lambda v: combine(v, k, backend="torch"), in_fp64([features]), upstream)
    for i, read in enumerate((features, upstream)):
        assert actual[i].dtype == dtype
        assert_as_accurate_as_plain(
            actual[i], plain[i], truth[i], combine_floor(read, truth[i]), what=("combine", "its gradient")[i]
        )


BATCHES = [(3, (48, 123, 9, 8)), (3, (192, 64, 16, 16)), (2, (512, 512, 4, 4)), (3, (768, 2048)), (2, (130, 63))]


@pytest.mark.parametrize(("residual", "relu"), batch_norms.VARIANTS, ids=batch_norms.VARIANT_NAMES)
@pytest.mark.parametrize(("views", "shape"), BATCHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_norm(dtype, views, shape, residual, relu):
    drawn = batch_norms.case(shape, dtype, residual, vectors=torch.float32)
    batch_norms.check(drawn, views=views, relu=relu, backend="triton", device=DEVICE)


def test_a_batch_of_more_than_2_to_the_31_elements():
    """All rows but the last two are zero, and so is almost the whole mean."""
    x = torch.zeros(2**25 + 64, 64, dtype=torch.float16, device=DEVICE)
    x[-2:] = 1000
    running = torch.zeros(2, 64, device=DEVICE)
    one, zero = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    y = batch_norm(x, one, zero, *running, momentum=1.0, eps=1.0, backend="triton")
    mean = 2 * 1000 / len(x)
    variance = 2 * 1000**2 / len(x) - mean**2
    torch.testing.assert_close(running.cpu()[:, 0], torch.tensor([mean, variance]), rtol=1e-4, atol=0)
    expected = torch.tensor([-mean, 1000 - mean], dtype=torch.float64) / (variance + 1) ** 0.5
    torch.testing.assert_close(y[[0, -1], 0].double().cpu(), expected, rtol=2**-10, atol=0)


CONVOLUTIONS = [(64, 32, 64, 3, 1), (128, 16, 256, 3, 2), (128, 16, 256, 1, 2), (512, 4, 512, 3, 1), (48, 7, 80, 3, 1)]


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cudnn"])
def test_convolution(backend, dtype, layer, prologue):
    """Checks y, mean and variance of two views; a layer without a kernel or a plan runs PyTorch's form."""
    if backend == "cudnn" and (problem := cudnn_problem(DEVICE, dtype)) is not None:
        pytest.skip(str(problem))
    inputs, side, outputs, taps, stride = layer
    x = torch.randn(16, inputs, side, side).to(dtype)
    weight = (torch.randn(outputs, inputs, taps, taps) / (inputs * taps**2) ** 0.5).to(dtype)
    vectors = torch.randn(2, 2, inputs).unbind() if prologue else ()
    settings: dict[str, Any] = dict(stride=stride, padding=taps // 2, views=2)

    def call(given: Sequence[Tensor], backend: Backend) -> list[Tensor]:
        named: dict[str, Any] = dict(zip(("x", "weight", "scale", "shift"), given, strict=False))
        return [result.cpu() for result in convolution(**named, **settings, backend=backend)]

    given = [x, weight, *vectors]
    actual, plain = (call(on_gpu(given), backend) for backend in (backend, "torch"))
    truth = call(in_fp64(given), "torch")
    eps, greatest = torch.finfo(dtype).eps, truth[0].abs().max().item()
    floors = 2**-20 * greatest, eps * greatest, eps * greatest**2
    for name, floor, ours, theirs, true in zip(("y", "mean", "var"), floors, actual, plain, truth, strict=True):
        assert_as_accurate_as_plain(ours[None], theirs[None], true[None], floor, what=name)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("half_sums", [False, True])
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_plan_of_cudnn_passes_its_proof(dtype, layer, half_sums, prologue, gradient):
    if (problem := cudnn_problem(DEVICE, dtype)) is not None:
        pytest.skip(str(problem))
    if (gradient and (prologue or not half_sums)) or (half_sums and dtype != torch.float16):
        pytest.skip("no operator asks for it")
    inputs, side, outputs, taps, stride = layer
    shapes = (64, inputs, side, side), (outputs, inputs, taps, taps)
    how = dict(half_sums=half_sums, prologue=prologue, gradient=gradient)
    device = torch.empty(0, device=DEVICE).device  # with its number
    assert plan_problem(*shapes, dtype, device, stride=stride, padding=taps // 2, **how) is None


def test_conv2d_that_sums_in_fp16_can_be_captured_and_replayed():
    if (problem := cudnn_problem(DEVICE, torch.float16)) is not None:
        pytest.skip(str(problem))
    x, weight = torch.randn(64, 64, 16, 16).half().to(DEVICE), torch.randn(64, 64, 3, 3).half().to(DEVICE) / 24
    expected = conv2d(x, weight, padding=1, half_sums_forward=True)  # builds the plan
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = conv2d(x, weight, padding=1, half_sums_forward=True)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("size", [(65, 123), (256, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contrastive_losses(dtype, size):
    images, width = size
    temperature, subsets, upstream = 0.1, (6, 2, 1), torch.tensor([1.0, -3.0, 0.5])
    inputs = [torch.randn(rows * images, width).to(dtype) for s in subsets for rows in (s, 1)]

    def losses(*rows: Tensor, backend: Backend) -> Tensor:
        return torch.stack(
            contrastive_losses(list(zip(rows[::2], rows[1::2], strict=True)), temperature, backend=backend)
        )

    def plain_losses(*rows: Tensor) -> Tensor:
        pairs = zip(rows[::2], rows[1::2], strict=True)
        return torch.stack([PLAIN.contrastive_loss(h, p, temperature) for h, p in pairs])

    actual = with_gradients(lambda *rows: losses(*rows, backend="triton"), on_gpu(inputs), upstream)
    plain = with_gradients(plain_losses, on_gpu(inputs), upstream)
    truth = with_gradients(lambda *rows: losses(*rows, backend="torch"), in_fp64(inputs), upstream)
    assert actual[0].dtype == torch.float32
    floor = loss_floor(temperature, images, dtype)
    assert_as_accurate_as_plain(actual[0], plain[0], truth[0], floor, what="losses")
    for i, rows in enumerate(inputs):
        side, scale = ("targets", "predictions")[i % 2], upstream[i // 2].item()
        floor = gradient_floor(rows, len(rows), temperature, scale, truth[i + 1])
        what = f"gradient of {side} {i // 2}"
        assert actual[i + 1].dtype == dtype
        assert_as_accurate_as_plain(actual[i + 1], plain[i + 1], truth[i + 1], floor, what=what)


def check_view_loss(ours: Callable[..., Tensor], published: Callable[..., Tensor], sides: Sequence[Tensor]) -> None:
    """Returns a loss of two views' rows at temperature 0.1, and both gradients."""
    upstream = torch.tensor(-3.0)
    actual = with_gradients(lambda *rows: ours(*rows, 0.1, backend="triton"), on_gpu(sides), upstream)
    plain = with_gradients(lambda *rows: published(*rows, 0.1), on_gpu(sides), upstream)
    truth = with_gradients(lambda *rows: ours(*rows, 0.1, backend="torch"), in_fp64(sides), upstream)
    assert actual[0].dtype == torch.float32
    assert_as_accurate_as_plain(actual[0], plain[0], truth[0], loss_floor(0.1, 16384, sides[0].dtype), what="loss")
    for i, rows in enumerate(sides, start=1):
        floor = gradient_floor(rows, len(rows), 0.1, -3.0, truth[i])
        assert actual[i].dtype == rows.dtype
        assert_as_accurate_as_plain(actual[i], plain[i], truth[i], floor, what=f"gradient {i}")


@pytest.mark.parametrize("size", [(65, 123), (256, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nt_xent(dtype, size):
    sides = [torch.randn(size).to(dtype) for _ in range(2)]

    def published(first: Tensor, second: Tensor, temperature: float) -> Tensor:
        return method_oracles.nt_xent_as_published(first.float(), second.float(), temperature)  # masks by 1e9

    check_view_loss(nt_xent, published, sides)


@pytest.mark.parametrize("size", [(65, 123), (256, 2048)], ids=str)
@pytest.mark.parametrize("loss", [contrastive_loss, nt_xent], ids=["contrastive_loss", "nt_xent"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_losses_of_one_of_several_ranks(dtype, loss, size):
    images, width = size
    sides = [torch.randn(3 * images, width).to(dtype) for _ in range(2)]  # for contrastive_loss the targets of S = 3

    def plain(first: Tensor, second: Tensor, temperature: float) -> Tensor:
        return loss(first.float(), second.float(), temperature, rank=1, ranks=3, backend="torch")

    check_view_loss(partial(loss, rank=1, ranks=3), plain, sides)


@pytest.mark.parametrize("size", [(65, 1000, 123), (256, 16384, 2048), (300, 9000, 512)], ids=str)  # 1, 4, 3 slices
@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queue_contrastive_loss(dtype, queue_dtype, size):
    images, rows, width = size
    sides = [torch.randn(images, width).to(dtype) for _ in range(2)]
    queue = F.normalize(torch.randn(rows, width)).to(queue_dtype)

    def ours(queries: Tensor, keys: Tensor, temperature: float, *, backend: Backend) -> Tensor:
        return queue_contrastive_loss(queries, keys, queue.to(queries.device), temperature, backend=backend)

    def published(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        return method_oracles.queue_loss_as_published(queries, keys, queue.to(queries), temperature)

    check_view_loss(ours, published, sides)


@pytest.mark.parametrize("size", [(65, 1000, 123), (128, 4096, 2048)], ids=str)
@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_neighbor(dtype, query_dtype, size):
    count, rows, width = size
    queries, queue = torch.randn(count, width).to(query_dtype), F.normalize(torch.randn(rows, width)).to(dtype)
    assert_nearest(nearest_neighbor(*on_gpu([queries, queue]), backend="triton").cpu(), queries, queue)
    itself = queue.to(DEVICE)
    assert torch.equal(nearest_neighbor(itself, itself, backend="triton").cpu(), torch.arange(rows))


def test_the_lowest_index_wins_a_tie_and_nan_never():
    corner = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]], device=DEVICE)
    queue = corner[[0, 1, 0, 1]].repeat(5000, 1)
    queue[0, 2] = torch.nan
    queries = torch.cat([corner, torch.zeros(1, 4, device=DEVICE), torch.full((1, 4), torch.nan, device=DEVICE)])
    assert nearest_neighbor(queries, queue, backend="triton").tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_faiss(dtype):
    problem = faiss_problem(DEVICE)
    if problem is not None:
        pytest.skip(str(problem))
    queries, queue = torch.randn(65, 256).to(dtype), F.normalize(torch.randn(4096, 256)).to(dtype)
    index = nearest_neighbor(*on_gpu([queries, queue]), backend="faiss").cpu()
    assert_nearest(index, queries, queue, torch.finfo(dtype).eps)  # FAISS may round scores to the queue's dtype


@pytest.mark.parametrize("row_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_enqueue(dtype, row_dtype):
    before, rows = torch.randn(1000, 2048).to(dtype), (torch.randn(256, 2048) * 5).to(row_dtype)
    cpu, results = torch.device("cpu"), []
    runs: list[tuple[Tensor, torch.device, Backend]] = [(before, DEVICE, "triton"), (before.double(), cpu, "torch")]
    for queue, device, backend in runs:
        ring, pointer = queue.to(device, copy=True), torch.tensor(900, device=device)
        values = rows.to(device) if backend == "triton" else rows.double()
        enqueue(ring, pointer, values, should_update=torch.tensor(True, device=device), backend=backend)
        enqueue(ring, pointer, values, should_update=torch.tensor(False, device=device), backend=backend)
        assert pointer.item() == 156
        results.append(ring.cpu())
    plain = results[1].clone()
    written = (900 + torch.arange(256)) % 1000
    plain[written] = F.normalize(rows.to(DEVICE).float()).to(dtype).double().cpu()
    # Tolerance: one rounding at the store, and that of a norm of 2048 terms in fp32.
    floor = torch.finfo(dtype).eps / 2 + ULPS_FP32 * working_epsilon(row_dtype)
    assert_as_accurate_as_plain(results[0], plain, results[1], floor, what="queue")
    kept = torch.ones(1000, dtype=torch.bool)
    kept[written] = False
    assert torch.equal(results[0][kept], before[kept])


def test_a_queue_of_more_than_2_to_the_31_elements():
    rows = 2**20 + 3
    queue = torch.zeros(rows, 2048, dtype=torch.float16, device=DEVICE)
    queries = torch.eye(2, 2048, dtype=torch.float16, device=DEVICE)
    enqueue(queue, torch.tensor(rows - 2, device=DEVICE), queries, backend="triton")
    assert torch.equal(queue[-2:], queries)
    assert nearest_neighbor(queries, queue, backend="triton").tolist() == [rows - 2, rows - 1]


SIZES = Sizes(images=65, side=16, features=300, k=2, width=300, queue=1000, source=20)


def every_operator(**arguments: Arguments) -> dict[str, Any]:
    """Returns the result of each operator, with nothing between them that a compiler could fuse."""
    return {name: OPERATORS[name].function(**given, backend="triton") for name, given in arguments.items()}


def arguments_of_all(dtype: torch.dtype, device: str | torch.device = DEVICE) -> dict[str, Arguments]:
    return {name: arguments_of(name, dtype, device, SIZES) for name in OPERATORS}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sizes", [SMALL, SIZES, PAPER], ids=["small", "uneven", "paper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_check_passes(dtype, sizes, name):
    assert not self_check.failures(sizes, dtype, dtype, DEVICE, operators=[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_launches_are_equal_bit_by_bit(dtype):
    arguments = arguments_of_all(dtype)
    first = tensors_in(outcomes(every_operator, arguments))
    for _ in range(LAUNCHES - 1):
        for again, result in zip(tensors_in(outcomes(every_operator, arguments)), first, strict=True):
            assert torch.equal(again, result)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_compile_into_one_graph(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(every_operator, fullgraph=True)
    arguments = arguments_of_all(dtype)
    ours, eager = (tensors_in(outcomes(function, arguments)) for function in (compiled, every_operator))
    for actual, expected in zip(ours, eager, strict=True):
        # The queue's loss is a mean of 65 numbers.
        torch.testing.assert_close(actual, expected, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0)


def test_a_cuda_graph_of_lookup_and_loss_replays_on_other_values():
    queries, queue = torch.randn(64, 512, device=DEVICE), F.normalize(torch.randn(4096, 512, device=DEVICE))

    def call() -> list[Tensor]:
        found = nearest_neighbor(queries, queue, backend="triton")
        return [found, *contrastive_losses([(queue[found], queries)], 0.5, backend="triton")]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        queries.copy_(torch.randn_like(queries))
        graph.replay()
        for replayed, eager in zip(captured, call(), strict=True):
            assert torch.equal(replayed, eager)


def test_nothing_waits_for_the_gpu():
    arguments = arguments_of_all(torch.bfloat16)
    outcomes(every_operator, arguments)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcomes(every_operator, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    there, here = (every_operator(**arguments_of_all(torch.bfloat16, device)) for device in ("cuda:1", "cuda:0"))
    for name in OPERATORS:
        for x, same in zip(tensors_in(there[name]), tensors_in(here[name]), strict=True):
            assert x.device == torch.device("cuda:1")
            assert x.shape == same.shape
            assert not x.isnan().any()
