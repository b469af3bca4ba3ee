"""Tests of the self-check: right kernels pass, and a kernel that is wrong in any way is named."""

from dataclasses import replace

import pytest
import torch

from mnclglf_kernels import operators, self_check
from mnclglf_kernels._triton import launch
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import PAPER, Sizes

SIZES = Sizes(images=6, side=8, features=12, k=2, width=20, queue=40, source=9)
CPU = torch.device("cpu")
# (kernel, argument that it writes, operator). With BACKWARD a kernel writes another argument.
WRITTEN = [
    ("augment_kernel", "views", "augment"),
    ("divide_kernel", "patches", "divide"),
    ("divide_kernel", "images", "divide"),
    ("combine_kernel", "combined", "combine"),
    ("combine_kernel", "features", "combine"),
    ("contrastive_losses_forward_kernel", "sums", "contrastive_losses"),
    ("contrastive_losses_merge_kernel", "log_sums", "contrastive_losses"),
    ("contrastive_losses_coefficient_kernel", "coefficients", "contrastive_losses"),
    ("contrastive_losses_gradient_kernel", "gradients", "contrastive_losses"),
    ("nearest_neighbor_merge_kernel", "nearest", "nearest_neighbor"),
    ("enqueue_write_kernel", "queue", "enqueue"),
    ("enqueue_advance_kernel", "pointer", "enqueue"),
    ("queue_contrastive_loss_forward_kernel", "sums", "queue_contrastive_loss"),
    ("queue_contrastive_loss_merge_kernel", "misses", "queue_contrastive_loss"),
    ("queue_contrastive_loss_coefficient_kernel", "coefficients", "queue_contrastive_loss"),
    ("queue_contrastive_loss_sum_kernel", "sums", "queue_contrastive_loss"),
    ("queue_contrastive_loss_gradient_kernel", "gradients", "queue_contrastive_loss"),
    ("convolution_kernel", "y", "convolution"),
    ("convolution_kernel", "moments", "convolution"),
    ("convolution_combine_kernel", "mean", "convolution"),
    ("convolution_combine_kernel", "var", "convolution"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_kernels_pass(dtype, queue_dtype):
    assert self_check.failures(SIZES, dtype, queue_dtype, CPU) == {}


def those_that_launch(kernels: set[str]) -> set[str]:
    """Returns the operators that launch one of these kernels. nt_xent launches those of contrastive_losses."""
    example = Example(sizes=SIZES)
    return {op for op, row in OPERATORS.items() if kernels & {x.kernel.__name__ for x in row.launches(example)}}


def tensors_of(x: launch.Launch) -> dict[str, torch.Tensor]:
    """Returns the tensors among a launch's arguments by name; of a tuple of tensors the last."""
    last = {name: value[-1] if isinstance(value, tuple) and value else value for name, value in x.arguments.items()}
    return {name: value for name, value in last.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kernel_of_an_operator_is_checked(operator, monkeypatch):
    """Spoils one element of one tensor that a kernel writes, until the self-check finds it: once per kernel."""
    run, written = launch.run, set()

    def note(launches, device):
        for x in launches:
            before = {name: tensor.clone() for name, tensor in tensors_of(x).items()}
            run([x], device)
            written.update(
                (x.kernel.__name__, name)
                for name, tensor in tensors_of(x).items()
                if not torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
            )

    monkeypatch.setattr(launch, "run", note)
    assert self_check.failures(SIZES, torch.float32, torch.float32, CPU, operators=[operator]) == {}
    found = set()
    for kernel, argument in sorted(written):

        def spoil(launches, device, kernel=kernel, argument=argument):
            for x in launches:
                run([x], device)
                if x.kernel.__name__ == kernel:
                    result = tensors_of(x)[argument]
                    result[(0,) * result.dim()] += 3

        monkeypatch.setattr(launch, "run", spoil)
        if self_check.failures(SIZES, torch.float32, torch.float32, CPU, operators=[operator]):
            found.add(kernel)
    assert found == {x.kernel.__name__ for x in OPERATORS[operator].launches(Example(sizes=SIZES))}


@pytest.mark.parametrize(("kernel", "argument", "operator"), WRITTEN)
def test_one_wrong_element_is_found(kernel, argument, operator, monkeypatch):
    run = launch.run

    def spoil(launches, device):
        for x in launches:
            run([x], device)
            writes = x.arguments.get("BACKWARD", False) == (argument in ("images", "features"))
            if x.kernel.__name__ == kernel and writes:
                result = x.arguments[argument]
                result = result[-1] if isinstance(result, tuple) else result
                result[(0,) * result.dim()] += 3

    monkeypatch.setattr(launch, "run", spoil)
    assert set(self_check.failures(SIZES, torch.float32, torch.float32, CPU)) == those_that_launch({kernel})


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("text", ["out of resource: shared memory, Required: 131072\nmore", ""])
def test_a_launch_that_fails_is_named(operator, text, monkeypatch):
    run, kernels = launch.run, {x.kernel.__name__ for x in OPERATORS[operator].launches(Example(sizes=SIZES))}

    def fail(launches, device):
        if any(x.kernel.__name__ in kernels for x in launches):
            raise RuntimeError(text)
        run(launches, device)

    monkeypatch.setattr(launch, "run", fail)
    found = self_check.failures(SIZES, torch.float32, torch.float32, CPU)
    message = f"RuntimeError: {text.splitlines()[0] if text else 'no text'}"
    assert found == dict.fromkeys(those_that_launch(kernels), message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["no radial part", "half of the softmax", "softmax times 0.6", "temperature 1"])
def test_a_wrong_gradient_is_found_in_every_dtype(fault, dtype, monkeypatch):
    """Plants faults in the backward that would be small for random rows and a uniform softmax."""

    run = launch.run

    def spoil(launches, device):
        for x in launches:
            if x.kernel.__name__ == "contrastive_losses_coefficient_kernel" and fault == "temperature 1":
                x.arguments["inverse_temperature"] = 1.0
            run([x], device)
            if x.kernel.__name__ == "contrastive_losses_coefficient_kernel":
                onehot = torch.eye(SIZES.images).repeat(14, 1)
                coefficients = x.arguments["coefficients"]
                if fault == "no radial part":
                    x.arguments["prediction_dots"].zero_()
                elif fault == "half of the softmax":
                    coefficients[:, ::2] = -onehot[:, ::2]
                elif fault == "softmax times 0.6":
                    coefficients.copy_(0.6 * (coefficients + onehot) - onehot)

    monkeypatch.setattr(launch, "run", spoil)
    assert set(self_check.failures(SIZES, dtype, dtype, CPU, operators=("contrastive_losses",))) == {
        "contrastive_losses"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["not of the column", "half of the softmax", "no radial part", "temperature 1"])
def test_a_wrong_gradient_of_nt_xent_is_found_in_every_dtype(fault, dtype, monkeypatch):
    run = launch.run

    def spoil(launches, device):
        for x in launches:
            if x.kernel.__name__ == "contrastive_losses_coefficient_kernel" and fault == "temperature 1":
                x.arguments["inverse_temperature"] = 1.0
            if x.kernel.__name__ == "contrastive_losses_gradient_kernel" and fault == "not of the column":
                x.arguments["coefficients"].tril_()
            run([x], device)
            if x.kernel.__name__ == "contrastive_losses_coefficient_kernel":
                if fault == "no radial part":
                    x.arguments["target_dots"].zero_()
                elif fault == "half of the softmax":
                    x.arguments["coefficients"][:, ::2].clamp_(max=0)

    monkeypatch.setattr(launch, "run", spoil)
    assert set(self_check.failures(SIZES, dtype, dtype, CPU, operators=("nt_xent",))) == {"nt_xent"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["half of the softmax", "another positive", "sums forgotten", "temperature 1"])
def test_a_wrong_gradient_of_the_queue_s_loss_is_found_in_every_dtype(fault, dtype, monkeypatch):
    run = launch.run

    def spoil(launches, device):
        for x in launches:
            if x.kernel.__name__ == "queue_contrastive_loss_coefficient_kernel" and fault == "temperature 1":
                x.arguments["inverse_temperature"] = 1.0
            if x.kernel.__name__ == "queue_contrastive_loss_gradient_kernel" and fault == "another positive":
                x.arguments["keys"] = x.arguments["keys"].roll(1, 0)
            run([x], device)
            if x.kernel.__name__ == "queue_contrastive_loss_coefficient_kernel" and fault == "half of the softmax":
                x.arguments["coefficients"][:, ::2] = 0
            if x.kernel.__name__ == "queue_contrastive_loss_sum_kernel" and fault == "sums forgotten":
                x.arguments["sums"].zero_()

    monkeypatch.setattr(launch, "run", spoil)
    assert set(self_check.failures(SIZES, dtype, dtype, CPU, operators=("queue_contrastive_loss",))) == {
        "queue_contrastive_loss"
    }


@pytest.mark.parametrize("one_embedding", [False, True])
def test_what_the_self_check_launches_is_what_the_run_launches(one_embedding, monkeypatch):
    """Checks the rows that one embedding contrasts, and the pairs that a queue of another dtype splits."""
    launched = []
    monkeypatch.setattr(launch, "run", lambda launches, _: launched.extend(launches))
    self_check.failures(
        SIZES, torch.bfloat16, torch.float32, CPU, one_embedding=one_embedding, operators=("contrastive_losses",)
    )
    forward = [x.arguments for x in launched if x.kernel.__name__ == "contrastive_losses_forward_kernel"]
    subsets = 1 if one_embedding else 6
    assert [x["FIRST_ROWS"] for x in forward] == [(0, 6 * subsets, 12 * subsets), (0, 6, 12)]
    assert [x["targets"][0].dtype for x in forward] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_right_kernels_of_a_rank_pass(dtype):
    used = ("contrastive_losses", "nt_xent", "enqueue")
    assert self_check.failures(SIZES, dtype, torch.float32, CPU, operators=used, rank=1, ranks=3) == {}


def test_what_the_self_check_of_a_rank_launches_is_what_the_run_launches(monkeypatch):
    """Checks that the rows are those of one rank, and the candidates and the rows to enqueue those of all."""
    launched = []
    monkeypatch.setattr(launch, "run", lambda launches, _: launched.extend(launches))
    used = ("contrastive_losses", "nt_xent", "enqueue")
    self_check.failures(SIZES, torch.float32, torch.float32, CPU, operators=used, rank=1, ranks=3)
    losses = [x.arguments for x in launched if x.kernel.__name__ == "contrastive_losses_forward_kernel"]
    assert [(x["RANK"], x["RANKS"], x["N"]) for x in losses] == [(1, 3, 18), (1, 3, 36)]
    assert [x["FIRST_ROWS"] for x in losses] == [(0, 36, 72, 78, 84), (0, 12)]
    assert {len(x.arguments["rows"]) for x in launched if x.kernel.__name__ == "enqueue_write_kernel"} == {18}


@pytest.mark.parametrize(
    ("operator", "kernel"),
    [
        ("contrastive_losses", "forward"),
        ("contrastive_losses", "coefficient"),
        ("nt_xent", "forward"),
        ("nt_xent", "coefficient"),
        ("nt_xent", "gradient"),
    ],
)
def test_another_rank_s_positives_are_found(operator, kernel, monkeypatch):
    run = launch.run

    def spoil(launches, device):
        for x in launches:
            if x.kernel.__name__ == f"contrastive_losses_{kernel}_kernel":
                x.arguments["RANK"] = 0
        run(launches, device)

    monkeypatch.setattr(launch, "run", spoil)
    found = self_check.failures(SIZES, torch.float32, torch.float32, CPU, operators=[operator], rank=1, ranks=3)
    assert set(found) == {operator}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pytorch_s_own_results_pass_at_the_paper_s_sizes(dtype, monkeypatch):
    """Checks that the limits are wide enough for long sums and small gradients."""
    for name, row in OPERATORS.items():
        if row.check is not None:
            continue  # these rows' checks are run below, but for two that take 35 and 155 GFLOP in fp64

        def plain(*arguments, function=row.function, **named):
            return function(*arguments, **named | {"backend": "torch"})

        # PyTorch rounds the sum of the gradients of two uses, which the Triton kernels do not.
        variants = tuple(changes for changes in row.variants if "fork" not in changes)
        monkeypatch.setitem(OPERATORS, name, replace(row, function=plain, variants=variants))
    for name in ("augment", "enqueue"):
        function = getattr(operators, name)
        monkeypatch.setattr(
            operators, name, lambda *given, f=function, **named: f(*given, **named | {"backend": "torch"})
        )
    used = tuple(op for op in OPERATORS if op not in ("nearest_neighbor", "convolution"))
    assert self_check.failures(PAPER, dtype, dtype, CPU, operators=used) == {}


def test_a_device_that_is_too_small_says_nothing_of_the_kernels(monkeypatch):
    def full(launches, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        self_check.failures(SIZES, torch.float32, torch.float32, CPU)


def test_a_kernel_that_takes_the_context_down_ends_the_run(monkeypatch):
    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(RuntimeError, match=r"divide.*CUDA context.*wrong.*--kernels off"):
        self_check.check_context("divide", "wrong", torch.device("cuda"))
    self_check.check_context("divide", "wrong", CPU)


def test_a_kernel_that_writes_nan_is_found(monkeypatch):
    run = launch.run

    def nan(launches, device):
        run(launches, device)
        for x in launches:
            if x.kernel.__name__ == "contrastive_losses_merge_kernel":
                x.arguments["losses"].fill_(torch.nan)

    monkeypatch.setattr(launch, "run", nan)
    found = self_check.failures(SIZES, torch.float32, torch.float32, CPU)
    assert found["contrastive_losses"].startswith("the result is off by nan")


def test_the_self_check_leaves_the_generators_alone():
    before = torch.get_rng_state()
    self_check.failures(SIZES, torch.float32, torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), before)
