"""Tests of the kernels compiled for GPUs that are not here: resource limits, tensor cores, no spills."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mnclglf_kernels.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]

MATMULS = {
    "nearest_neighbor_search_kernel",
    "contrastive_losses_forward_kernel",
    "contrastive_losses_coefficient_kernel",
    "contrastive_losses_gradient_kernel",
    "queue_contrastive_loss_forward_kernel",
    "queue_contrastive_loss_coefficient_kernel",
    "queue_contrastive_loss_sum_kernel",
    "convolution_kernel",
}
OVER_RANKS = {"batch_norm_merge_moments_kernel", "batch_norm_merge_sums_kernel"}  # no call of one process has them
WIDTHS = [96, 123, 512, 2048]  # one per bucket of the table, and 123, which no vector load fits
LIMITS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}  # KiB of shared memory per block

# Every test run compiles for sm_86; `make check-aot` compiles for the others.
LIMITS_AND_WIDTHS = [
    pytest.param((arch, width), id=f"{arch}-{width}", marks=[] if arch == "sm_86" else [pytest.mark.aot])
    for arch in LIMITS
    for width in WIDTHS
]


def aot(*arguments: str) -> str:
    """Returns the output of python -m mnclglf_kernels.aot, in a separate process because this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mnclglf_kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", params=LIMITS_AND_WIDTHS)
def variants(request):
    arch, width = request.param
    return json.loads(aot("--json", "--arch", arch, "--width", str(width)))["variants"]


def test_every_kernel_of_every_operator_is_there(variants):
    found = {(v["op"], v["kernel"]) for v in variants}
    assert {op for op, _ in found} == set(OPERATORS)
    sources = [path.read_text() for path in (ROOT / "kernels" / "mnclglf_kernels" / "_triton").glob("*.py")]
    written = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)}
    assert {kernel for _, kernel in found} == written - OVER_RANKS >= MATMULS
    assert {v["dtype"] for v in variants} == {"bf16", "fp16", "fp32"}


def test_no_register_is_spilled(variants):
    assert [v for v in variants if v["stack_bytes"]] == []


def test_shared_memory_fits_a_block(variants):
    assert {v["shared_limit_bytes"] for v in variants} == {1024 * LIMITS[variants[0]["arch"]]}
    assert [v for v in variants if v["shared_bytes"] > v["shared_limit_bytes"] or not v["blocks_per_sm"]] == []


def test_half_precision_multiplies_on_tensor_cores_and_sums_in_fp32(variants):
    for v in variants:
        if v["kernel"] in MATMULS:
            assert (v["mma"] > 0) == (v["dtype"] != "fp32"), v
            assert v["mma_fp32"], v


@pytest.mark.parametrize(
    ("arch", "width"),
    [
        pytest.param(arch, width, marks=[] if (arch, width) == ("sm_86", 2048) else [pytest.mark.aot])
        for arch in LIMITS
        for width in WIDTHS
    ],
)
def test_the_losses_of_one_of_two_ranks_spill_nothing_and_multiply_on_tensor_cores(arch, width):
    """Checks the kernels of the last rank, whose offsets are not 0."""
    options = "--ranks", "2", "--op", "contrastive_losses", "nt_xent", "--arch", arch, "--width", str(width)
    found = json.loads(aot("--json", *options))["variants"]
    assert len(found) == 3 * (5 + 4)
    for v in found:
        assert not v["stack_bytes"], v
        assert v["shared_bytes"] <= v["shared_limit_bytes"], v
        if v["kernel"] in MATMULS:
            assert (v["mma"] > 0) == (v["dtype"] != "fp32"), v
            assert v["mma_fp32"], v


def test_augment_multiplies_on_tensor_cores_whatever_it_writes(variants):
    found = [v for v in variants if v["kernel"] == "augment_kernel"]
    assert len(found) == 3
    assert all(v["mma"] and v["mma_fp32"] for v in found)


def test_loads_are_wide_where_the_width_allows():
    for v in json.loads(aot("--json"))["variants"]:
        if v["kernel"] in ("divide_kernel", "combine_kernel", "enqueue_write_kernel") or v["op"] in (
            "batch_norm",
            "convolution",
        ):
            assert v["wide_loads"], v
        if v["kernel"] in MATMULS:
            assert v["async_copies"], v


def test_the_paper_s_sizes_keep_82_processors_busy():
    ops = ("nearest_neighbor", "contrastive_losses", "queue_contrastive_loss")  # nt_xent has only 64 programs
    for v in json.loads(aot("--json", "--op", *ops, "--dtype", "bf16"))["variants"]:
        programs = v["grid"][0] * (v["grid"][1] if len(v["grid"]) > 1 else 1)
        if v["kernel"] in MATMULS:
            assert programs >= 82, v


def test_the_table_for_a_reader():
    title, *lines = aot("--op", "combine", "--dtype", "bf16").splitlines()
    assert title.startswith("sm_86, bounds of an RTX 3090; images 256 ")
    assert lines[0].split()[:4] == ["operator", "kernel", "dtype", "grid"]
    assert [line.split()[:3] for line in lines[1:]] == [["combine", "combine_kernel", "bf16"]] * 2


def test_the_table_in_the_documents_is_what_the_command_prints():
    assert aot("--dtype", "bf16", "--markdown") in (ROOT / "docs" / "explain" / "kernels.md").read_text()


# A launch goes through triton.jit's own argument binding up to the compiled kernel, as far as it can without a GPU.
JIT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 86, 32)
    get_current_device = get_current_stream = lambda self, *_: 0

driver.set_active(Driver())
from mnclglf_kernels.aot import compile_launch
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import Sizes

sizes = Sizes(images=64, side=32, features=64, k=2, width=256, queue=512)
for row in OPERATORS.values():
    for x in row.launches(Example(sizes=sizes, device=torch.device("cpu"))):
        options = dict(num_warps=x.warps, num_stages=x.stages)
        compiled = x.kernel.run(grid=x.grid, warmup=True, **x.arguments, **options)
        assert compiled.asm["ptx"] == compile_launch(x, 86).asm["ptx"], x.kernel.__name__
        print(x.kernel.__name__)
"""


def test_what_is_compiled_ahead_of_time_is_what_a_launch_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", JIT]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert len(printed) >= 28  # launches of the operators that there are today
    assert set(printed) >= MATMULS


BATCH_NORM = """
import re
import sys
import torch
from mnclglf_kernels._triton.batch_norm import launches
from mnclglf_kernels.aot import compile_launch, resources

seen = set()
arch, dtype, ranks = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
for views, shape in ((3, (768, 2048)), (3, (768, 512, 4, 4)), (2, (512, 64, 32, 32)), (8, (2048, 128, 8, 8))):
    x = torch.empty(shape, dtype=dtype, device="meta")
    weight, bias, mean, variance = torch.empty(4, shape[1], device="meta").unbind()
    for residual, relu, running in ((None, False, False), (None, True, True), (x, False, True), (x, True, True)):
        given = (mean, variance) if running else (None, None)
        how = dict(views=views, residual=residual, relu=relu, ranks=ranks)
        for launch in launches(x, weight, bias, *given, **how) + launches(x, weight, bias, *given, fork=True, **how):
            constants = [(k, getattr(v, "dtype", v)) for k, v in launch.arguments.items()]
            if str((launch.kernel.__name__, constants)) in seen:
                continue
            seen.add(str((launch.kernel.__name__, constants)))
            compiled = compile_launch(launch, arch)
            wide = re.findall("ld.global[^ ]*[.](?:v4.b32|v2.b64|v8.b16)", compiled.asm["ptx"])
            print(launch.kernel.__name__, len(wide), resources(compiled.asm["cubin"])[1], compiled.metadata.shared)
"""


@pytest.mark.aot
@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_batch_norm_spills_in_no_variant_and_loads_128_bits(ranks, dtype, arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BATCH_NORM, arch.removeprefix("sm_"), dtype, str(ranks)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    merges = 0 if ranks == 1 else 2
    assert len(rows) == 4 * (1 + 4 + 7 + 4 + merges)  # per shape: moments, applications, sums, gradients
    assert [row for row in rows if not int(row[1]) or int(row[2]) or int(row[3]) > LIMITS[arch] * 1024] == []


BATCH_NORM_OVER_RANKS = """
import torch
from mnclglf_kernels._triton.batch_norm import launches
from mnclglf_kernels.aot import compile_launch, resources

x = torch.empty(768, 512, 4, 4, dtype=torch.bfloat16, device="meta")
vectors = torch.empty(4, 512, device="meta").unbind()
found = launches(x, *vectors, views=3, residual=x, relu=True, ranks=8) + launches(x, *vectors[:2], views=3, ranks=8)
for launch in (found[1], found[2], found[4], found[5], found[8], found[11]):  # those that one process has not
    compiled = compile_launch(launch, 86)
    print(launch.kernel.__name__, resources(compiled.asm["cubin"])[1], compiled.metadata.shared)
"""


def test_batch_norm_over_ranks_does_not_spill_on_the_rtx_3090():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", BATCH_NORM_OVER_RANKS]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    assert {name for name, *_ in rows} == OVER_RANKS | {"batch_norm_apply_kernel", "batch_norm_gradient_kernel"}
    assert [row for row in rows if int(row[1]) or int(row[2]) > 99 * 1024] == []


AUGMENT = """
import torch
from mnclglf_kernels._triton.augment import augment_launches, empty_views
from mnclglf_kernels.aot import compile_launch, resources
from mnclglf_kernels.ops.augment import PARAMETERS

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

sizes = ((64, 64, True, 7), (64, 64, False, 7), (28, 16, True, 5), (64, 32, True, 5), (8, 64, True, 7))
for source, side, rotates, window in sizes:
    numbers = empty(6, len(PARAMETERS))
    given = empty(2, 3, source, source, dtype=torch.uint8), empty(2, dtype=torch.int64), numbers, empty(3), empty(3)
    views = empty_views(numbers, side, torch.bfloat16)
    (launch,) = augment_launches(*given, views, cubic=True, blur_window=window, rotates=rotates)
    compiled = compile_launch(launch, 86)
    print(source, side, rotates, resources(compiled.asm["cubin"])[1], compiled.metadata.shared)
"""


def test_augment_spills_at_no_size_and_fits_the_rtx_3090():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AUGMENT]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    assert len(rows) == 5
    assert [row for row in rows if int(row[3]) or int(row[4]) > 99 * 1024] == []
