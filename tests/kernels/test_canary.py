"""The canary: kernels in order pass it, and one that is wrong in any way is named."""

import pytest
import torch

from mnclglf_kernels import canary
from mnclglf_kernels._triton import (
    augment,
    contrastive,
    launch,
    neighbor,
    nt_xent,
    patches,
    queue,
    queue_contrastive,
)
from mnclglf_kernels.sizes import OPERATORS, PAPER, Sizes

SIZES = Sizes(images=6, side=8, features=12, k=2, width=20, queue=40, source=9)
CPU = torch.device("cpu")
MODULES = {
    "augment": augment,
    "divide": patches,
    "combine": patches,
    "contrastive_losses": contrastive,
    "nearest_neighbor": neighbor,
    "enqueue": queue,
    "nt_xent": nt_xent,
    "queue_contrastive_loss": queue_contrastive,
}
# (kernel, the argument that it writes, operator); a kernel with BACKWARD writes another one there.
WRITTEN = [
    ("augment_kernel", "views", "augment"),
    ("divide_kernel", "patches", "divide"),
    ("divide_kernel", "images", "divide"),
    ("combine_kernel", "combined", "combine"),
    ("combine_kernel", "features", "combine"),
    ("forward_kernel", "sums", "contrastive_losses"),
    ("merge_kernel", "log_sums", "contrastive_losses"),
    ("coefficient_kernel", "coefficients", "contrastive_losses"),
    ("gradient_kernel", "gradients", "contrastive_losses"),
    ("neighbor_merge_kernel", "nearest", "nearest_neighbor"),
    ("enqueue_kernel", "queue", "enqueue"),
    ("advance_kernel", "pointer", "enqueue"),
    ("forward_kernel", "sums", "nt_xent"),
    ("merge_kernel", "log_sums", "nt_xent"),
    ("coefficient_kernel", "coefficients", "nt_xent"),
    ("gradient_kernel", "gradients", "nt_xent"),
    ("queue_forward_kernel", "sums", "queue_contrastive_loss"),
    ("queue_merge_kernel", "misses", "queue_contrastive_loss"),
    ("queue_coefficient_kernel", "coefficients", "queue_contrastive_loss"),
    ("queue_sum_kernel", "sums", "queue_contrastive_loss"),
    ("queue_gradient_kernel", "gradients", "queue_contrastive_loss"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_kernels_pass(dtype, queue_dtype):
    assert canary.failures(SIZES, dtype, queue_dtype, CPU) == {}


@pytest.mark.parametrize(("kernel", "argument", "operator"), WRITTEN)
def test_one_wrong_element_is_found(kernel, argument, operator, monkeypatch):
    def spoil(launches, device):
        for x in launches:
            launch.run([x], device)
            writes = x.arguments.get("BACKWARD", False) == (argument in ("images", "features"))
            if x.kernel.__name__ == kernel and writes:
                result = x.arguments[argument]
                result = result[-1] if isinstance(result, tuple) else result
                result[(0,) * result.dim()] += 3

    monkeypatch.setattr(MODULES[operator], "run", spoil)
    assert set(canary.failures(SIZES, torch.float32, torch.float32, CPU)) == {operator}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("text", ["out of resource: shared memory, Required: 131072\nmore", ""])
def test_a_launch_that_fails_is_named(operator, text, monkeypatch):
    kernels = {kernel for kernel, _, name in WRITTEN if name == operator}

    def fail(launches, device):
        if any(x.kernel.__name__ in kernels for x in launches):
            raise RuntimeError(text)
        launch.run(launches, device)

    monkeypatch.setattr(MODULES[operator], "run", fail)
    found = canary.failures(SIZES, torch.float32, torch.float32, CPU)
    assert found == {operator: f"RuntimeError: {text.splitlines()[0] if text else 'no text'}"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["no radial part", "half of the softmax", "softmax times 0.6", "temperature 1"])
def test_a_wrong_gradient_is_found_in_every_dtype(fault, dtype, monkeypatch):
    """Faults of the backward that are small where rows are random and the softmax uniform."""

    def run(launches, device):
        for x in launches:
            if x.kernel.__name__ == "coefficient_kernel" and fault == "temperature 1":
                x.arguments["inverse_temperature"] = 1.0
            launch.run([x], device)
            if x.kernel.__name__ == "coefficient_kernel":
                onehot = torch.eye(SIZES.images).repeat(14, 1)
                coefficients = x.arguments["coefficients"]
                if fault == "no radial part":
                    x.arguments["prediction_dots"].zero_()
                elif fault == "half of the softmax":
                    coefficients[:, ::2] = -onehot[:, ::2]
                elif fault == "softmax times 0.6":
                    coefficients.copy_(0.6 * (coefficients + onehot) - onehot)

    monkeypatch.setattr(contrastive, "run", run)
    assert set(canary.failures(SIZES, dtype, dtype, CPU)) == {"contrastive_losses"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["not of the column", "half of the softmax", "no radial part", "temperature 1"])
def test_a_wrong_gradient_of_nt_xent_is_found_in_every_dtype(fault, dtype, monkeypatch):
    def run(launches, device):
        for x in launches:
            if x.kernel.__name__ == "coefficient_kernel" and fault == "temperature 1":
                x.arguments["inverse_temperature"] = 1.0
            if x.kernel.__name__ == "gradient_kernel" and fault == "not of the column":
                x.arguments["coefficients"].tril_()
            launch.run([x], device)
            if x.kernel.__name__ == "coefficient_kernel":
                if fault == "no radial part":
                    x.arguments["target_dots"].zero_()
                elif fault == "half of the softmax":
                    x.arguments["coefficients"][:, ::2].clamp_(max=0)

    monkeypatch.setattr(nt_xent, "run", run)
    assert set(canary.failures(SIZES, dtype, dtype, CPU)) == {"nt_xent"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["half of the softmax", "another positive", "sums forgotten", "temperature 1"])
def test_a_wrong_gradient_of_the_queue_s_loss_is_found_in_every_dtype(fault, dtype, monkeypatch):
    def run(launches, device):
        for x in launches:
            if x.kernel.__name__ == "queue_coefficient_kernel" and fault == "temperature 1":
                x.arguments["inverse_temperature"] = 1.0
            if x.kernel.__name__ == "queue_gradient_kernel" and fault == "another positive":
                x.arguments["keys"] = x.arguments["keys"].roll(1, 0)
            launch.run([x], device)
            if x.kernel.__name__ == "queue_coefficient_kernel" and fault == "half of the softmax":
                x.arguments["coefficients"][:, ::2] = 0
            if x.kernel.__name__ == "queue_sum_kernel" and fault == "sums forgotten":
                x.arguments["sums"].zero_()

    monkeypatch.setattr(queue_contrastive, "run", run)
    assert set(canary.failures(SIZES, dtype, dtype, CPU)) == {"queue_contrastive_loss"}


@pytest.mark.parametrize("one_embedding", [False, True])
def test_what_the_canary_launches_is_what_the_run_launches(one_embedding, monkeypatch):
    """One embedding contrasts other numbers of rows; a queue of another dtype splits the pairs."""
    launched = []
    monkeypatch.setattr(contrastive, "run", lambda launches, _: launched.extend(launches))
    canary.failures(SIZES, torch.bfloat16, torch.float32, CPU, one_embedding=one_embedding)
    forward = [x.arguments for x in launched if x.kernel.__name__ == "forward_kernel"]
    subsets = 1 if one_embedding else 6
    assert [x["FIRST_ROWS"] for x in forward] == [(0, 6 * subsets, 12 * subsets), (0, 6, 12)]
    assert [x["targets"][0].dtype for x in forward] == [torch.bfloat16, torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pytorch_s_own_results_pass_at_the_paper_s_sizes(dtype, monkeypatch):
    """The limits are not too narrow where sums are long and gradients small."""
    for name in ("augment", "divide", "combine", "contrastive_losses", "enqueue", "nt_xent", "queue_contrastive_loss"):
        operator = getattr(canary, name)

        def plain(*arguments, operator=operator, **named):
            return operator(*arguments, **named | {"backend": "torch"})

        monkeypatch.setattr(canary, name, plain)
    monkeypatch.setitem(
        canary.CHECKS, "nearest_neighbor", lambda run: None
    )  # 35 GFLOP in fp64; the loss has as long sums
    assert canary.failures(PAPER, dtype, dtype, CPU) == {}


def test_a_device_that_is_too_small_says_nothing_of_the_kernels(monkeypatch):
    def full(launches, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(neighbor, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        canary.failures(SIZES, torch.float32, torch.float32, CPU)


def test_a_kernel_that_takes_the_context_down_ends_the_run(monkeypatch):
    def gone(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(RuntimeError, match=r"of divide took the CUDA context down \(wrong\); take --kernels off"):
        canary.check_context("divide", "wrong", torch.device("cuda"))
    canary.check_context("divide", "wrong", CPU)


def test_a_kernel_that_writes_nan_is_found(monkeypatch):
    def nan(launches, device):
        launch.run(launches, device)
        for x in launches:
            if x.kernel.__name__ == "merge_kernel":
                x.arguments["losses"].fill_(torch.nan)

    monkeypatch.setattr(contrastive, "run", nan)
    found = canary.failures(SIZES, torch.float32, torch.float32, CPU)
    assert found["contrastive_losses"].startswith("the loss is off by nan")


def test_the_canary_leaves_the_generators_alone():
    before = torch.get_rng_state()
    canary.failures(SIZES, torch.float32, torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), before)
