"""bench/inductor.py: what Inductor makes of a step, and our operators in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.inductor import OURS, Counted, read_code, table
from bench.proof import ROOT
from mnclglf_kernels.operators import OPERATORS

SMALL_STEP = ("-m", "bench.inductor", "--batch", "8", "--width", "16", "--json")


def run(*arguments: str) -> str:
    """Runs Python with these arguments, in which Triton's kernels are not interpreted, and returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def difference(made: dict, expected: dict) -> str:
    """Describes what changed; empty if nothing did."""
    lines = [
        f"{graph}, {figure} of {kind}: {was.get(kind, 0):,} with torch {expected['torch']}, "
        f"{now.get(kind, 0):,} with torch {made['torch']}"
        for graph, new, old in zip(("forward", "backward"), made["graphs"], expected["graphs"], strict=True)
        for figure in expected["graphs"][0]
        for now, was in [[{"": x[figure]} if figure == "peak_bytes" else x[figure] for x in (new, old)]]
        for kind in {**was, **now}
        if now.get(kind, 0) != was.get(kind, 0)
    ]
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--combo-kernels",)], ids=["plain", "combo"])
def test_inductor_launches_what_it_did(options, request):
    """Sees an upgrade of PyTorch, or a change of the step, that undoes a fusion."""
    path = Path(__file__).with_name(f"inductor_{request.node.callspec.id}.json")
    command = (*SMALL_STEP, *options)
    changed = difference(json.loads(run(*command)), json.loads(path.read_text()))
    renew = f"python {' '.join(command)} > {path.relative_to(ROOT)}"
    assert not changed, f"{changed}\nif that is as it should be, renew the figures: {renew}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["86", "90"])
def test_every_operator_is_counted_in_a_compiled_graph(arch):
    different = json.loads(run("tests/helpers/inductor_operators.py", arch))
    assert different == dict.fromkeys(OPERATORS)


CODE = """
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', '''
    inductor_meta={'kernel_name': 'triton_poi_fused_add_0', 'kernel_num_gb': 0.001},
''', device_str='cuda')


triton_for_fused_1 = async_compile.triton('triton_for_fused_1', '''
    inductor_meta={'combo_grid_meta': {'num_kernels': 2}, 'kernel_num_gb': 2e-05},
''', device_str='cuda')
triton_new_fused_2 = async_compile.triton('triton_new_fused_2', '''
    inductor_meta={'kernel_num_gb': 1.0},
''', device_str='cuda')

def call(args):
            triton_poi_fused_add_0.run(arg0_1, buf0, 64, stream=raw_stream0)
            triton_poi_fused_add_0.run(arg1_1, buf1, 64, stream=raw_stream0)
            triton_for_fused_1.run(arg1_1, buf1, stream=raw_stream0)
            triton_new_fused_2.run(arg1_1, buf1, stream=raw_stream0)
            buf2 = extern_kernels.convolution(buf0, buf1, stride=(1, 1))
            extern_kernels.mm(buf0, buf1, out=buf3)
            buf4 = torch.ops.aten.convolution_backward.default(buf2, buf0)
            buf5 = torch.ops.mnclglf.divide.default(buf4)
            buf7 = torch.ops.mnclglf.convolution.default(buf4)
            buf6 = torch.ops.mnclglf.faiss_nearest_neighbor.default(buf5)
"""


def test_code_is_counted_as_by_hand():
    counted = read_code(CODE, {"divide", "convolution"})  # ours, and a library's of the same name
    assert counted.launches == {"pointwise": 2, "combo": 1, "triton_new_fused_2": 1}
    assert counted.moved == {"pointwise": 2_000_000, "combo": 20_000, "triton_new_fused_2": 1_000_000_000}
    calls = ("convolution", "product", "convolution, backward", "faiss_nearest_neighbor")
    assert counted.calls == dict.fromkeys(calls, 1)


def test_a_kernel_without_its_bytes_is_named():
    with pytest.raises(RuntimeError, match=r"triton_for_fused_1 .*profile_bandwidth"):
        read_code(CODE.replace("'kernel_num_gb': 2e-05", ""))


def test_the_table_has_a_row_per_kind_that_is_there():
    forward, backward = read_code(CODE, {"divide", "convolution"}), Counted(peak_bytes=10**9)
    backward.launches[OURS], backward.moved[OURS] = 3, 5 * 10**8
    rows = {row.split(" | ")[0]: row.split(" | ")[1:] for row in table([forward, backward]).splitlines()[2:]}
    assert rows["| pointwise"] == ["2", "0.002", "0", "0.000 |"]
    assert rows["| triton_new_fused_2"] == ["1", "1.000", "0", "0.000 |"]
    assert rows[f"| {OURS}"] == ["0", "0.000", "3", "0.500 |"]
    assert rows["| together"] == ["4", "1.002", "3", "0.500 |"]
    assert rows["| library: convolution"][0] == "1"


def test_a_change_is_named_with_both_figures():
    old = {"torch": "2.14.1", "graphs": [{"launches": {"combo": 3}, "peak_bytes": 5}] * 2}
    new = {"torch": torch.__version__, "graphs": [{"launches": {"combo": 3, "pointwise": 1200}, "peak_bytes": 5}] * 2}
    assert difference(old, old) == ""
    assert f"pointwise: 0 with torch 2.14.1, 1,200 with torch {torch.__version__}" in difference(new, old)
