"""bench/gpu_stages.py: the stages of a day on a GPU, on the CPU with interpreted kernels and small sizes.

The rehearsal in test_gpu_day.py runs all of them; here is what a passing one does not show.
"""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated_graph
import pytest
import torch

from bench import gpu_stages
from bench.gpu_stages import LEFT_OUT, WRONG, Figures, Setting, Work
from mnclglf.training import choices
from mnclglf_kernels import Backends
from mnclglf_kernels._triton import launch
from mnclglf_kernels.operators import OPERATORS, Example


@pytest.fixture
def tiny(tmp_path: Path) -> Setting:
    return gpu_stages.on_a_cpu(folder=tmp_path)


def figures_of(work: Work, setting: Setting) -> Figures:
    """Returns all figures of a stage."""
    found: Figures = {WRONG: []}
    for figures in work(setting):
        found |= figures | {WRONG: found[WRONG] + figures.get(WRONG, [])}
    return found


def test_each_launch_stands_beside_its_least_time(tiny, monkeypatch):
    monkeypatch.setattr("bench.roofline.measured_parts", lambda *_: {"matrix products": 0.001})
    setting = replace(tiny, milliseconds=lambda call: (call(), 0.25)[1])
    found = figures_of(gpu_stages.roofline, setting)
    launches = [x for row in OPERATORS.values() for x in row.launches(Example(sizes=setting.sizes))]
    assert len(found["launches"]) == len(launches)
    assert {row["us"] for row in found["launches"]} == {"250.0"}
    assert {"part", "roofline ms", "measured ms", "fraction"} <= set(found["parts of the eager step"][0])


def test_a_wrong_kernel_fails_its_stage(tiny, monkeypatch):
    run = launch.run
    right = lambda launches: [x for x in launches if not x.kernel.__name__.startswith("enqueue")]  # noqa: E731
    monkeypatch.setattr(launch, "run", lambda launches, device: run(right(launches), device))
    wrong = figures_of(gpu_stages.kernels, tiny)[WRONG]
    assert sorted(problem.split(": ")[0] for problem in wrong) == sorted(
        f"{dtype}, enqueue" for dtype in (torch.bfloat16, torch.float16, torch.float32)
    )
    assert "the pointer is" in wrong[0]


def test_launches_that_differ_fail_their_stage(tiny, monkeypatch):
    times = iter(range(1000))
    monkeypatch.setattr(gpu_stages, "results", lambda *_: [torch.tensor(next(times))])
    monkeypatch.setattr("mnclglf_kernels.self_check.failures", lambda *_: {})
    assert figures_of(gpu_stages.kernels, tiny)[WRONG] == [f"{name}: launches differ" for name in OPERATORS]


def test_a_pytest_run_fails_where_nothing_passed(tiny):
    def run(name: str) -> Figures:
        chosen = ("tests/test_make_pack.py", "-k", name, "-p", "no:cacheprovider")
        return figures_of(gpu_stages.tests, replace(tiny, tests=chosen))

    passed = run("left_whole")
    assert passed[WRONG] == []
    assert passed["result"].startswith("1 passed")
    assert len(run("nothing_of_this_name")[WRONG]) == 1


def test_an_option_that_this_torch_lacks_is_left_out(tiny):
    found = figures_of(lambda setting: gpu_stages.training(setting, options={"no_such_option": True}), tiny)
    assert "no_such_option" in found[LEFT_OUT]
    assert "median step, ms" not in found


def test_a_package_that_is_missing_is_left_out_with_its_reason(tiny, monkeypatch):
    def missing(*_, **__):
        raise ImportError("DALI is not installed")

    monkeypatch.setattr("mnclglf_kernels.backend.HAS_FAISS", False)
    found = figures_of(gpu_stages.faiss, tiny)
    assert "faiss, which is not installed" in found[f"{LEFT_OUT}: faiss"]
    assert [row["lookup"] for row in found["lookups"]] == ["torch", "triton"]
    monkeypatch.setattr("mnclglf.data.loaders._dali_problem", lambda: ImportError("no module nvidia.dali"))
    found = figures_of(gpu_stages.loaders, tiny)
    assert "no module nvidia.dali" in found[f"{LEFT_OUT}: dali"]
    assert [row["loader"] for row in found["loaders"]] == ["resident", "torchvision (reference)"]
    assert found[WRONG] == []


def test_a_loader_that_makes_other_views_fails_its_stage(tiny, monkeypatch):
    monkeypatch.setattr(gpu_stages, "PARITY", {"resident": (0.0, 0.0), "dali": (0.5, 0.02)})
    monkeypatch.setattr("mnclglf.data.loaders._dali_problem", lambda: ImportError("none"))
    (wrong,) = figures_of(gpu_stages.loaders, tiny)[WRONG]
    assert wrong.startswith("resident: ")


def test_a_run_takes_the_epochs_that_fit(tiny, monkeypatch):
    """Checks 300 - 15 - 5 s at four steps an epoch of 0.5 s: 140 epochs."""
    asked: Figures = {}

    def train_until(out: Path, seconds: float, **how: Any) -> None:
        asked.update(how, seconds=seconds)
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / "step-10.pt").touch()
        (out / "metrics.jsonl").write_text('{"step": 10, "epoch": 1.5, "loss": 2.5, "step_seconds": 0.5}\n')

    monkeypatch.setattr(gpu_stages, "train_until", train_until)
    monkeypatch.setattr(gpu_stages, "real_images", lambda _: ("mnist5k", None, 4000))
    monkeypatch.setattr("mnclglf.evaluate", lambda run, protocol: [])
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    (tiny.folder / "triton.log").write_text('figures: {"median step, ms": 900.0}\n')
    (tiny.folder / "graphs.log").write_text(
        'figures: {"median step, ms": 800.0}\nfigures: {"median step, ms": 500.0}\n'
    )
    found = figures_of(gpu_stages.run, replace(tiny, seconds=300))
    assert (asked["epochs"], asked["seconds"]) == (140, 285)
    assert (found["epochs"], found["images/s"]) == (1.5, 128)
    assert [*tiny.folder.glob("run-*/metrics.jsonl")]
    assert not [*tiny.folder.rglob("*.pt")]


def test_a_run_that_had_no_time_for_a_step_says_so(tiny, monkeypatch):
    monkeypatch.setattr(gpu_stages, "train_until", lambda *_, **__: None)
    monkeypatch.setattr(gpu_stages, "real_images", lambda _: ("mnist5k", None, 4000))
    (wrong,) = figures_of(gpu_stages.run, replace(tiny, seconds=0.3))[WRONG]
    assert "recorded nothing" in wrong


def test_training_stops_when_the_time_is_up(monkeypatch, tmp_path, capsys):
    """Checks Ctrl-C's way: the run saves itself, and the stage goes on."""

    stopped: list[bool] = []

    def train(**_: object) -> None:
        try:
            time.sleep(300)
        except KeyboardInterrupt:
            stopped.append(True)
            raise

    monkeypatch.setattr("mnclglf.train", train)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it; a training catches it
    try:
        gpu_stages.train_until(tmp_path, 1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped
    assert "the time is up" in capsys.readouterr().out


def test_real_images_come_from_a_pack_where_it_has_them(tmp_path, monkeypatch):
    asked: list[Path | None] = []

    def load(name: str, place: Path | None, *, download: bool) -> tuple[list[int], list[int]]:
        asked.append(place)
        if name == "fashion_mnist" and place is None:
            raise FileNotFoundError("Fashion-MNIST is missing")
        return [0] * 7, []

    monkeypatch.setattr("mnclglf.data.datasets.load_dataset", load)
    assert gpu_stages.real_images([]) == ("mnist5k", None, 7)
    (tmp_path / "clothes").mkdir()
    (tmp_path / "clothes" / "train-images-idx3-ubyte.gz").touch()
    assert gpu_stages.real_images([tmp_path]) == ("fashion_mnist", tmp_path / "clothes", 7)


@pytest.fixture
def pretended_compiler(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Pretends a compiler and a GPU's parts; returns a list of what is compiled: graphs, combo kernels."""
    made: list[tuple[bool, bool]] = []

    def compiled(forward: Any, *, graphs: bool, combo_kernels: bool) -> Any:
        made.append((graphs, combo_kernels))
        return forward

    monkeypatch.setattr("mnclglf.training.step.compiled", compiled)
    allow(monkeypatch, "combo_kernels", "graphs")
    return made


def allow(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Pretends a machine that can run these parts."""
    free = [replace(part, ruled_out=lambda here, value: None) if part.name in names else part for part in choices.PARTS]
    monkeypatch.setattr(choices, "PARTS", tuple(free))


@pytest.fixture
def tiny_choice(tiny: Setting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setting:
    """Returns a setting whose batch norm stays PyTorch's, which is not interpreted in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mnclglf.training.start.choose_backends", lambda *_: Backends.all("torch"))
    return replace(tiny, seconds=1000.0, rounds=1, steps=5)


def test_each_part_is_timed_alone(tiny_choice, pretended_compiler, monkeypatch):
    monkeypatch.setattr("mnclglf.training.whole_step.record", emulated_graph.record)
    monkeypatch.setattr(choices, "verdict", lambda *_: None)  # pretended parts save no time, so chance would decide
    found = figures_of(gpu_stages.choices, tiny_choice)
    assert found[WRONG] == []
    rows = {row["setting"]: (row["graphs"], row["combo_kernels"]) for row in found["settings"]}
    assert rows == {
        "safe": ("off", "off"),
        "all": ("on", "on"),
        "step": ("step", "on"),
        "all without CUDA graphs": ("off", "on"),
        "all without combo kernels": ("on", "off"),
    }
    assert all(float(row["ms"]) > 0 and float(row["error"]) > 0 for row in found["settings"])
    assert [row["of safe's"] for row in found["settings"]] == ["1.00"] * 5
    assert {*pretended_compiler} == {(True, True), (False, False), (False, True), (True, False)}
    assert found["taken"].startswith(("all: ", "safe: ", "step: "))
    assert len(json.loads((choices.cache_file()).read_text())) == 1  # for the real run, later on


def test_no_part_is_begun_that_does_not_fit(tiny_choice, pretended_compiler):
    found = figures_of(gpu_stages.choices, replace(tiny_choice, seconds=0.0))
    assert [row["setting"] for row in found["settings"]] == ["safe", "all"]
    assert "time is over" in found[f"{LEFT_OUT}: all without CUDA graphs"]


def test_parts_that_compute_something_else_fail_their_stage(tiny_choice, monkeypatch):
    def compiled(forward: Any, *, graphs: bool, combo_kernels: bool) -> Any:
        def run(*inputs: Any) -> Any:
            losses = forward(*inputs)
            return losses._replace(total=losses.total * (3 if combo_kernels else 1))

        return run

    monkeypatch.setattr("mnclglf.training.step.compiled", compiled)
    allow(monkeypatch, "combo_kernels")
    (wrong,) = figures_of(gpu_stages.choices, tiny_choice)[WRONG]
    assert "of the losses, more than 2 times" in wrong
