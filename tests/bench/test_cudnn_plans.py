"""bench/cudnn_plans.py: its convolutions, its table, and what cuDNN answers where the extra is installed."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import cudnn_plans
from bench.cudnn_plans import COLUMNS, Plans, Shape, description, main, shapes, table
from bench.proof import ROOT

# (channels, side, channels of the result, taps, stride) of ResNet-18 with the 3 x 3 stem on 32 x 32 images.
RESNET_18 = [
    (3, 32, 64, 3, 1),
    (64, 32, 64, 3, 1),
    (64, 32, 128, 3, 2),
    (64, 32, 128, 1, 2),
    (128, 16, 128, 3, 1),
    (128, 16, 256, 3, 2),
    (128, 16, 256, 1, 2),
    (256, 8, 256, 3, 1),
    (256, 8, 512, 3, 2),
    (256, 8, 512, 1, 2),
    (512, 4, 512, 3, 1),
]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, which a stand-in for the driver may be loaded into."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_the_convolutions_are_those_of_resnet_18_at_the_batch_of_each_network():
    networks = shapes("mnclglf", batch=4, side=32)
    assert {name: {shape.images for shape in found} for name, found in networks.items()} == {
        "online": {3 * 4},
        "momentum": {2 * 4},
        "stop-gradient": {8 * 4},
    }
    for name in ("online", "momentum"):
        assert {shape[1:] for shape in networks[name]} == set(RESNET_18)
    patches = [(c, side // 2, *rest) for c, side, *rest in RESNET_18]
    assert {shape[1:] for shape in networks["stop-gradient"]} == set(patches)
    assert set(shapes("simsiam", batch=4, side=32)) == {"online"}
    assert set(shapes("byol", batch=4, side=32)) == {"online", "momentum"}


def test_the_table_has_a_row_per_convolution_and_the_least_and_the_most():
    first, second = Shape(8, 64, 32, 64, 3, 1), Shape(8, 64, 32, 128, 1, 2)
    found = {
        first: {column: Plans(40, 1_048_576) for column in COLUMNS},
        second: {column: Plans(0 if "epilogue" in column else 7, 0) for column in COLUMNS},
    }
    lines = table({"online": [first], "momentum": [second, first]}, found).splitlines()
    assert lines[2].startswith("| online | 8 x 64 x 32 x 32 to 64, 3 x 3, stride 1 | 40 (1,049 kB) |")
    assert lines[3].startswith("| momentum | 8 x 64 x 32 x 32 to 128, 1 x 1, stride 2 | 7 | 7 | - | 7 |")
    assert lines[5].startswith("| all | | 7 to 40 | 7 to 40 | 0 to 40 | 7 to 40 |")
    assert len({line.count("|") for line in lines}) == 1


def test_the_described_gpu_is_that_of_the_architecture():
    described = json.loads(description(86))
    assert described["deviceVer"] == 860
    assert described["multiProcessorCount"] == 82
    assert described["maxSharedMemoryPerBlockOptin"] == 101_376


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    cudnn_plans.frontend.cache_clear()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(SystemExit, match=r"nvidia-cudnn-frontend .*pip install 'mnclglf\[cudnn\]'"):
        main(["--batch", "4"])


def test_without_cudnn_in_torch_the_command_says_so(monkeypatch):
    cudnn_plans.frontend.cache_clear()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"without cuDNN.*TORCH_INDEX"):
        main(["--batch", "4"])


def test_a_network_that_the_method_lacks_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--method", "simsiam", "--network", "momentum"])
    assert "simsiam has no momentum network; it has online" in capsys.readouterr().err


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_a_stand_in_for_the_driver_knows_no_device():
    code = "from bench.cudnn_plans import load_driver as l; import ctypes, torch; print(l(), torch.cuda.is_available())"
    done = run(f"{code}; print(ctypes.CDLL('libcuda.so.1').cuInit(0))")
    assert done.returncode == 0, done.stderr
    if not has_driver():
        assert done.stdout.split() == ["stand-in", "False", "100"]  # CUDA_ERROR_NO_DEVICE
    else:
        assert done.stdout.startswith("CUDA driver")


ASK = """
from bench.cudnn_plans import COLUMNS, Shape, ask
import json
shape = Shape(512, 64, 32, 64, 3, 1)
print(json.dumps({" ".join(column): ask(shape, *column, 86).count for column in COLUMNS}))
"""


def test_cudnn_s_answers_for_an_rtx_3090_where_the_extra_is_installed():
    pytest.importorskip("cudnn")
    done = run(ASK)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    declined = {"fp16, fp16 sums epilogue", "fp16, fp16 sums both", "bf16 epilogue", "bf16 both"}
    assert {name for name, count in counts.items() if not count} == declined


OPERATOR = """
from bench.cudnn_plans import plans, shapes
from mnclglf_kernels._cudnn.plans import Question, describe
import json, sys, torch

arch, views = int(sys.argv[1]), {"online": 3, "momentum": 2, "stop-gradient": 8}
half, brain = torch.float16, torch.bfloat16
kinds = [(half, False), (half, True), (brain, False)]
asked = set()
for network, found in shapes("mnclglf", 256, 32).items():
    for shape in found:
        whole = shape.of_operator()
        view = whole._replace(images=whole.images // views[network])
        asked |= {Question(whole, half, half_sums=True), Question(whole, half, half_sums=True, gradient=True)}
        asked |= {Question(view, *kind, prologue) for kind in kinds for prologue in (False, shape.inputs > 3)}
counts = {}
for question in asked:
    assert question.misaligned() is None
    has = [plans(lambda cudnn, **at: question.graph(cudnn, form, **at), arch, "") for form in question.forms()]
    counts[describe(question)] = [x.count for x in has]
print(json.dumps(counts))
"""


@pytest.mark.parametrize("arch", ["86", *(pytest.param(arch, marks=pytest.mark.aot) for arch in ("89", "90"))])
def test_cudnn_has_a_plan_for_every_graph_that_the_operators_run_where_the_extra_is_installed(arch):
    """Checks every convolution of the paper's step: per view, with and without a prologue; conv2d both ways."""
    pytest.importorskip("cudnn")
    done = run(OPERATOR, arch)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert len(counts) > 100
    assert [question for question, found in counts.items() if not any(found)] == []
    first = [question for question, found in counts.items() if not found[0]]
    assert all(" x 3 x " in question for question in first)  # only three channels are without an epilogue


def test_an_engine_that_finds_no_driver_is_no_answer_where_the_extra_is_installed():
    pytest.importorskip("cudnn")
    if has_driver():
        pytest.skip("this machine has a driver")
    done = run(f"import bench.cudnn_plans as plans; plans.load_driver = lambda: 'none'\n{ASK}")
    assert "RuntimeError: cuDNN could not ask its compiler" in done.stderr
