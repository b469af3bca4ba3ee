"""bench/gpu_stages.py: the stages of the GPU report, on the CPU with interpreted kernels and small sizes."""

import pytest
import torch

from bench import gpu_stages
from mnclglf.config import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from mnclglf_kernels._triton import launch
from mnclglf_kernels.operators import OPERATORS, Example
from mnclglf_kernels.sizes import Sizes

CONFIG = RunConfig(
    model=ModelConfig(width=4, projector_width=24, predictor_width=12),
    objective=ObjectiveConfig(queue_size=20),
    optim=OptimConfig(batch_size=6),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages that are a GPU's, on the CPU with interpreted kernels and small sizes."""
    monkeypatch.setattr(gpu_stages, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_stages, "SIZES", Sizes(images=6, side=16, features=12, k=2, width=20, queue=40))
    monkeypatch.setattr(gpu_stages, "STEPS", 5)
    monkeypatch.setattr(gpu_stages, "REPEATS", 3)
    monkeypatch.setattr("mnclglf.recipes.paper", lambda *_: CONFIG)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("triton.testing.do_bench", lambda call, return_mode: (call(), 0.25)[1])


def test_the_stages_of_a_gpu_run_through(tiny):
    assert gpu_stages.kernels()[gpu_stages.WRONG] == []
    training = gpu_stages.training(kernels="require", precision="fp32", compile="off")
    assert training["kernels"] == "triton"
    assert training["images/s"] > 0
    assert training["roofline fraction"] > 0
    shares = gpu_stages.roofline()
    launches = [x for row in OPERATORS.values() for x in row.launches(Example(sizes=gpu_stages.SIZES))]
    assert len(shares) == 3 + len(launches)  # the GPU, its matmul and copy, and a line per launch
    assert all("250.0 us, at least " in share for name, share in shares.items() if "kernel" in name)


def test_a_wrong_kernel_fails_its_stage(tiny, monkeypatch):
    run = launch.run
    right = lambda launches: [x for x in launches if not x.kernel.__name__.startswith("enqueue")]  # noqa: E731
    monkeypatch.setattr(launch, "run", lambda launches, device: run(right(launches), device))
    wrong = gpu_stages.kernels()["wrong"]
    assert [problem.split(": ")[0] for problem in wrong] == [
        f"{dtype}, enqueue" for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    assert "the pointer is" in wrong[0]


def test_a_pytest_stage_fails_where_nothing_passed():
    passed = gpu_stages.pytest("tests/training/test_roofline.py", "-k", "by_hand", "-p", "no:cacheprovider")()
    assert passed[gpu_stages.WRONG] == []
    assert passed["result"].startswith("1 passed")
    skipped = gpu_stages.pytest(
        "tests/training/test_roofline.py", "-k", "nothing_of_this_name", "-p", "no:cacheprovider"
    )()
    assert len(skipped[gpu_stages.WRONG]) == 1
