"""The canary: kernels in order pass it, and one that is wrong in any way is named."""

import pytest
import torch

from mnclglf_kernels import canary
from mnclglf_kernels._triton import contrastive, launch, neighbor, patches, queue
from mnclglf_kernels.sizes import OPERATORS, Sizes

SIZES = Sizes(images=6, side=8, features=12, k=2, width=20, queue=40)
CPU = torch.device("cpu")
MODULES = {
    "divide": patches,
    "combine": patches,
    "contrastive_losses": contrastive,
    "nearest_neighbor": neighbor,
    "enqueue": queue,
}
# (kernel, the argument that it writes, operator); a kernel with BACKWARD writes another one there.
WRITTEN = [
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
