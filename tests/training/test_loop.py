"""Tests of whole runs on a few 8 x 8 digits: their files, stopping and resuming."""

import dataclasses
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import emulated_graph
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch._dynamo.exc import BackendCompilerFailed

from mnclglf.cli import parse
from mnclglf.commands import Train
from mnclglf.config import MethodName, ModelConfig, ObjectiveConfig, to_dict
from mnclglf.data.images import ImageArray
from mnclglf.data.loader import Batch, batch_indices
from mnclglf.methods import METHODS, Losses, Supervised
from mnclglf.models.batch_norm import batch_norms
from mnclglf.reports import page
from mnclglf.reports.page import write_report
from mnclglf.runs import checkpoint
from mnclglf.runs.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from mnclglf.runs.console import LastingConsole
from mnclglf.runs.locks import TakenError
from mnclglf.runs.metrics import read_records
from mnclglf.training import loop, whole_step
from mnclglf.training.choices import Choice
from mnclglf.training.loop import Trainer, TrainingError
from mnclglf.training.ranks import Ranks
from mnclglf.training.speedups import Forward, share_casts
from mnclglf.training.start import load_trained
from mnclglf.training.timing import Waiting

STEPS, PER_EPOCH = 12, 4
SPEEDS = ("step_seconds", "images_per_second", "images_per_second_p10", "images_per_second_p90", "roofline_fraction")
PHASES = ("data_seconds", "forward_seconds", "backward_seconds", "update_seconds")
# The only figures that may differ; phases are not in the records of the warm-up.
TIMES = (*SPEEDS, "data_wait_seconds", "elapsed_seconds", "peak_memory_bytes")
ARGUMENTS = shlex.split(
    "--dataset digits --recipe quick --image-size 8 --train-images 128 --loader reference --loader-threads 1 "
    "--flip-probability 0 --interpolation bilinear --width 2 --projector-width 16 --predictor-width 8 --queue-size 80 "
    "--one-embedding --epochs 3 --batch-size 32 --lr 0.05 --device cpu --log-every 2 --save-every 0.5"
)
COMMAND = parse(["train", *ARGUMENTS])
assert isinstance(COMMAND, Train)
CONFIG = COMMAND.config


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    """Returns what a silent console was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def digits() -> Bunch:
    """scikit-learn's digits, as they are published."""
    return cast(Bunch, load_digits())


def trainer(out: Path, *, resume: str = "auto", console: Console | None = None, **changes: Any) -> Trainer:
    config = dataclasses.replace(CONFIG, **changes)
    return Trainer(config, out, resume=resume, console=console or silent())


def final_state(out: Path) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(out / "checkpoints")[-1][1])


def assert_identical(first: object, second: Any, name: str = "state") -> None:
    """Asserts equality to the bit, through nested dicts and lists."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), name
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first:
            assert_identical(first[key], second[key], f"{name}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), name
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_identical(a, b, f"{name}.{index}")
    else:
        assert first == second, name


def figures(out: Path) -> list[dict[str, object]]:
    """Returns the records of the run without the figures that depend on time."""
    records = read_records(out / "metrics.jsonl")[0]
    return [{name: value for name, value in record.items() if name not in TIMES + PHASES} for record in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a run without interruptions."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert trainer(out).train() is None
    return out


def test_a_run_leaves_what_the_documents_say(straight: Path) -> None:
    assert sorted(path.name for path in straight.iterdir()) == [
        "checkpoints", "config.json", "environment.json", "metrics.jsonl", "queue.npz", "tensorboard", "views.npz"
    ]  # fmt: skip
    assert json.loads((straight / "config.json").read_text()) == json.loads(json.dumps(to_dict(CONFIG)))
    environment = json.loads((straight / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (environment["loader"], environment["kernels"]) == ("reference", "torch")
    assert environment["method"] == {"needs_labels": False, "divided_views": [1, 3], "batch_candidates": True}
    assert environment["cuda_graphs"] == "not used, the run is on the CPU"
    assert [step for step, _ in list_checkpoints(straight / "checkpoints")] == [10, 12]
    assert list((straight / "tensorboard").iterdir())
    with np.load(straight / "views.npz") as arrays:
        assert arrays["images"].shape == (6, 8, 8, 3)
        assert arrays["views"].shape == (3, 6, 3, 8, 8)


def test_metrics_hold_every_figure(straight: Path) -> None:
    records = read_records(straight / "metrics.jsonl")[0]
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    for record in records:
        assert record["loss"] == pytest.approx(record["loss_s"] + 6 * record["loss_m"], rel=1e-5)
        assert {"lr", "ema_momentum", "gradient_norm", "feature_std", "effective_rank", *TIMES} <= record.keys()
        assert record["queue_fill"] == pytest.approx(min(1, record["step"] * 32 / 80))
    assert records[-1]["epoch"] == 3
    assert all(0 <= record["neighbor_agreement"] <= 1 for record in records[3:])


def test_the_momentum_network_follows_the_schedule(tmp_path: Path) -> None:
    objective = dataclasses.replace(CONFIG.objective, ema_momentum=0.9, ema_schedule="cosine")
    run, taken = trainer(tmp_path / "run", method="byol", objective=objective), []
    after_step = run.method.after_step

    def watched(*args: Any, momentum: float | torch.Tensor, **kwargs: Any) -> None:
        taken.append(float(momentum))
        after_step(*args, momentum=momentum, **kwargs)

    run.method.after_step = watched
    run.train()
    expected = [1 - 0.1 * (np.cos(np.pi * step / STEPS) + 1) / 2 for step in range(STEPS)]
    assert taken == pytest.approx(expected)
    records = read_records(tmp_path / "run" / "metrics.jsonl")[0]
    assert [record["ema_momentum"] for record in records] == pytest.approx(expected[1::2])


def test_the_same_seed_gives_the_same_run_and_another_does_not(straight: Path, tmp_path: Path) -> None:
    trainer(tmp_path / "same").train()
    assert_identical(final_state(tmp_path / "same"), final_state(straight))
    assert figures(tmp_path / "same") == figures(straight)
    trainer(tmp_path / "other", seed=1).train()
    assert figures(tmp_path / "other") != figures(straight)


def at_batch(run: Trainer, step: int, act: Callable[[Batch], object]) -> None:
    """Makes the run's loader call a function at the batch of one step."""
    batches = run.loader.batches

    def acting(start: int, stop: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(start, stop), start):
            if number == step:
                act(batch)
            yield batch

    run.loader.batches = acting


def signalled(out: Path, step: int, number: int) -> Trainer:
    """Makes a trainer whose process gets a signal while it waits for the batch of a step."""
    made = trainer(out)
    at_batch(made, step, lambda batch: os.kill(os.getpid(), number))
    return made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 6], ids=["at the first step", "mid-epoch"])
def test_stopped_and_resumed_equals_straight(straight: Path, tmp_path: Path, number: int, step: int) -> None:
    assert signalled(tmp_path, step, number).train() == number
    assert list_checkpoints(tmp_path / "checkpoints")[-1][0] == step + 1
    resumed = trainer(tmp_path)
    assert resumed.start == step + 1
    assert resumed.train() is None
    assert_identical(final_state(tmp_path), final_state(straight))
    # The stop fell between two records, so one interval is split; every other record is the same.
    assert [record for record in figures(tmp_path) if record in figures(straight)] == figures(straight)


def test_stopped_and_resumed_equals_straight_with_dali_in_bf16(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    settings: dict[str, Any] = {
        "data": dataclasses.replace(CONFIG.data, loader="dali"),
        "engine": dataclasses.replace(CONFIG.engine, precision="bf16"),
    }
    trainer(tmp_path / "straight", **settings).train()
    stopped = trainer(tmp_path / "stopped", **settings)
    at_batch(stopped, 6, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped.train() == signal.SIGTERM
    trainer(tmp_path / "stopped", **settings).train()
    assert_identical(final_state(tmp_path / "stopped"), final_state(tmp_path / "straight"))


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    signalled(tmp_path, 1, signal.SIGTERM).train()
    assert signal.getsignal(signal.SIGTERM) is before


KILLED_AT_STEP_5 = """
import os, signal, sys
from pathlib import Path
from mnclglf.cli import parse
from mnclglf.training.loop import Trainer

trainer = Trainer(parse(["train", *sys.argv[2:]]).config, Path(sys.argv[1]))
batches = trainer.loader.batches

def killing(start, stop):
    for step, batch in enumerate(batches(start, stop), start):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

trainer.loader.batches = killing
trainer.train()
"""


def test_killed_and_resumed_equals_straight(straight: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_AT_STEP_5, str(tmp_path), *ARGUMENTS]
    root = Path(__file__).resolve().parents[2]
    threads = str(torch.get_num_threads())  # another number of threads sums in another order
    environment = {
        **os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"
    }  # fmt: skip
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    killed_at = [step for step, _ in list_checkpoints(tmp_path / "checkpoints")]
    assert killed_at == [2, 4]
    assert killed_at[-1] < STEPS
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"')  # a line torn by the kill
    trainer(tmp_path).train()
    assert_identical(final_state(tmp_path), final_state(straight))
    assert figures(tmp_path) == figures(straight)


def test_a_finished_run_is_not_trained_again(straight: Path) -> None:
    before = figures(straight)
    again = trainer(straight)
    assert again.start == STEPS
    assert again.train() is None
    assert figures(straight) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_larger_than_the_queue_is_refused_where_there_is_a_queue(method: MethodName, tmp_path: Path) -> None:
    engine = dataclasses.replace(CONFIG.engine, precision="fp32")  # oneDNN's bf16 gradients of 1 x 1 images have NaN
    objective = dataclasses.replace(CONFIG.objective, queue_size=31)
    small: dict[str, Any] = dict(method=method, objective=objective, engine=engine)
    if hasattr(METHODS[method](ModelConfig(width=2, classes=10), ObjectiveConfig(queue_size=31)), "queue"):
        with pytest.raises(ValueError, match=r"batch_size 32 .*queue_size 31.*--queue-size"):
            trainer(tmp_path, **small)
    else:
        assert trainer(tmp_path, optim=dataclasses.replace(CONFIG.optim, epochs=1), **small).train() is None


def test_never_refuses_a_directory_that_holds_a_run(straight: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a run of 12 steps; .*--resume auto"):
        trainer(straight, resume="never")


def test_a_checkpoint_of_another_run_can_be_named(straight: Path, tmp_path: Path) -> None:
    earlier = list_checkpoints(straight / "checkpoints")[0][1]
    resumed = trainer(tmp_path, resume=str(earlier))
    assert resumed.start == 10
    resumed.train()
    assert_identical(final_state(tmp_path), final_state(straight))


def test_a_finished_checkpoint_of_another_run_is_taken_over(straight: Path, tmp_path: Path) -> None:
    trainer(tmp_path, resume=str(list_checkpoints(straight / "checkpoints")[-1][1])).train()
    assert_identical(final_state(tmp_path), final_state(straight))


def test_an_earlier_checkpoint_does_not_run_into_later_ones(straight: Path) -> None:
    earlier = list_checkpoints(straight / "checkpoints")[0][1]
    with pytest.raises(CheckpointError, match=r"step-00000012\.pt.*later.*--out"):
        trainer(straight, resume=str(earlier))


def test_a_checkpoint_with_unknown_settings_is_named(straight: Path, tmp_path: Path) -> None:
    state = final_state(straight)
    config = json.loads(state["config"])
    config["optim"]["nesterov"] = True
    torch.save({**state, "config": json.dumps(config)}, tmp_path / "step-00000012.pt")
    with pytest.raises(CheckpointError, match=r"settings that this version does not know: .*nesterov"):
        trainer(tmp_path / "run", resume=str(tmp_path / "step-00000012.pt"))


def test_what_a_killed_process_left_is_cleared_at_the_next_start(straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    others = ("config.json", "environment.json", "views.png", "metrics.jsonl", "report.html", "evaluation.json")
    left_over = [out / "checkpoints" / ".step-00000002.pt.4242.tmp"]
    left_over += [out / f".{name}.4242-0123abcd.tmp" for name in others]
    older = out / "checkpoints" / "step-00000008.pt"  # killed between a save and the deletion of the oldest
    shutil.copy(list_checkpoints(straight / "checkpoints")[0][1], older)
    for path in left_over:
        path.touch()
    trainer(out).train()
    assert not [path for path in (*left_over, older) if path.exists()]
    assert {path.name for path in out.iterdir()} == {path.name for path in straight.iterdir()}


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_dead_encoder_is_named_within_an_epoch(tmp_path: Path, log_every: int) -> None:
    console = silent()
    engine = dataclasses.replace(CONFIG.engine, log_every=log_every)
    optim = dataclasses.replace(CONFIG.optim, lr=1e-9)
    run = trainer(tmp_path / "run", console=console, engine=engine, optim=optim)
    for layer in batch_norms(run.method.encoder):
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    run.train()
    step = 1 if log_every == 1 else run.schedule.steps_per_epoch
    assert f"step {step}: the encoder has collapsed: all images get the same features" in printed(console)
    assert printed(console).count("has collapsed") == 1


def test_a_run_that_learns_is_not_said_to_have_collapsed(tmp_path: Path) -> None:
    console = silent()
    trainer(tmp_path / "run", console=console).train()
    assert "collapsed" not in printed(console)


def test_logs_that_cannot_be_written_do_not_end_a_training(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "queue.npz")

    console, out = silent(), tmp_path / "run"
    run = trainer(out, console=console)
    monkeypatch.setattr("mnclglf.training.queue_pictures.write_pairs", full)
    at_batch(run, 3, lambda _: shutil.rmtree(out / "tensorboard"))
    assert run.train() is None
    assert_identical(final_state(out), final_state(straight))
    assert "queue.npz is not written, and the run goes on without: [Errno 28]" in printed(console)
    assert "logger tensorboard failed, and the run goes on without it" in printed(console)


def test_a_run_outside_the_main_thread_is_the_same(straight: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: trainer(tmp_path).train()).result() is None
    assert_identical(final_state(tmp_path), final_state(straight))


def test_a_run_whose_output_nobody_reads_any_more_goes_on(straight: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as file:
        run = trainer(tmp_path, console=LastingConsole(file=file, width=200))
        at_batch(run, 3, lambda _: os.close(reading))
        assert run.train() is None
    assert_identical(final_state(tmp_path), final_state(straight))


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    first, second = trainer(tmp_path / "run"), trainer(tmp_path / "run")
    left_over = tmp_path / "run" / "checkpoints" / ".step-00000002.pt.4242.tmp"

    def meanwhile(_: Batch) -> None:
        left_over.touch()  # as if the first were just saving
        with pytest.raises(TakenError, match=r"run is being trained by process \d+ on .*--out"):
            second.train()
        with pytest.raises(TakenError, match=r"run is being trained"):
            trainer(tmp_path / "run")
        assert left_over.exists()
        left_over.unlink()

    at_batch(first, 3, meanwhile)
    assert first.train() is None
    before = figures(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run was trained by another process.*step-00000012.*command"):
        second.train()  # was made before there was a checkpoint: it would begin at step 0
    assert figures(tmp_path / "run") == before


def test_a_place_that_cannot_be_written_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(loop, "start_training", lambda *_, **__: pytest.fail("began"))
    with pytest.raises(NotADirectoryError, match=r"another --out.*file"):
        trainer(tmp_path / "file" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_settings_are_refused_by_name(straight: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other settings \(seed: 0 -> 5; objective.k: 2 -> 3\)"):
        trainer(straight, seed=5, objective=dataclasses.replace(CONFIG.objective, k=3))


def test_execution_settings_may_change(straight: Path) -> None:
    engine = dataclasses.replace(CONFIG.engine, log_every=1, keep_last=5)
    assert trainer(straight, engine=engine).start == STEPS


def test_a_damaged_checkpoint_is_named_and_the_earlier_one_serves(straight: Path, tmp_path: Path) -> None:
    for step, path in list_checkpoints(straight / "checkpoints"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        data = path.read_bytes()
        (tmp_path / "checkpoints" / path.name).write_bytes(data if step == 10 else data[: len(data) // 2])
    shutil.copy(straight / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"step-00000012\.pt is damaged .*delete"):
        load_trained(tmp_path)  # an evaluation takes the newest or the one that it is given, and no other
    console = silent()
    run = trainer(tmp_path, console=console)
    assert run.start == 10
    run.train()
    assert re.search(r"step-00000012\.pt is damaged \(its end is missing\)", printed(console))
    assert (tmp_path / "checkpoints" / "step-00000012.pt.damaged").exists()
    assert_identical(final_state(tmp_path), final_state(straight))


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(straight: Path, tmp_path: Path) -> None:
    state = final_state(straight)
    buffers = state["optimizer"]["state"]
    first = next(iter(buffers))
    odd = {**buffers, first: {"momentum_buffer": torch.zeros(2)}}
    for change, named in (
        ({"method": state["method"] | {"queue.rows": torch.zeros(3, 16)}}, r"queue\.rows \(\(3, 16\)"),
        ({"optimizer": {}}, "optimizer or of random numbers"),
        ({"optimizer": {**state["optimizer"], "state": odd}}, r"momentum_buffer of shape \(2,\)"),
        ({"optimizer": {**state["optimizer"], "state": {**buffers, first: 1}}}, "optimizer or of random numbers"),
        ({"rng": torch.zeros(3)}, "optimizer or of random numbers"),
        ({"config": "[" * 100_000}, "settings that this version does not know"),
        ({"config": "3"}, "settings that this version does not know"),
    ):
        path = save_checkpoint(tmp_path / "checkpoints", STEPS, state | change)
        with pytest.raises(CheckpointError, match=rf"step-00000012\.pt holds .*{named}"):
            trainer(tmp_path, resume=str(path))


def test_a_checkpoint_that_cannot_be_written_ends_the_training_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def full(folder: Path, step: int, state: object) -> NoReturn:
        raise CheckpointError(f"step {step} cannot be written")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    run = trainer(tmp_path)
    write = run.writer.write

    def written(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        cast("Future[None]", run.writer._writing).exception()  # waits

    monkeypatch.setattr(run.writer, "write", written)
    at_batch(run, 0, lambda _: done.append(0))
    at_batch(run, 3, lambda _: done.append(3))
    with pytest.raises(CheckpointError, match="step 2 cannot be written"):
        run.train()
    assert done == [0]
    assert not list_checkpoints(tmp_path / "checkpoints")


def test_milestones_stay(tmp_path: Path) -> None:
    engine = dataclasses.replace(CONFIG.engine, keep_every=1, keep_last=1, save_every=100.0)
    trainer(tmp_path, engine=engine).train()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4, 8, 12]


def until(out: Path, step: int, **changes: Any) -> None:
    """Trains as far as a step, with one checkpoint kept besides the milestones."""
    run = trainer(out, engine=dataclasses.replace(CONFIG.engine, keep_last=1, save_every=0.25, **changes))
    at_batch(run, step - 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    run.train()


@pytest.mark.parametrize(("later", "kept"), [(None, [4, 12]), (2, [4, 8, 12]), (3, [4, 12])])
def test_milestones_stay_when_a_run_resumes_with_another_keep_every(
    tmp_path: Path, later: int | None, kept: list[int]
) -> None:
    until(tmp_path, 6, keep_every=1)
    trainer(tmp_path, engine=dataclasses.replace(CONFIG.engine, keep_last=1, keep_every=later)).train()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == kept


def test_what_one_process_keeps_no_later_one_deletes(tmp_path: Path) -> None:
    until(tmp_path, 4)  # a checkpoint that was no milestone when it was saved
    until(tmp_path, 6, keep_every=1)
    until(tmp_path, 9)
    trainer(tmp_path, engine=dataclasses.replace(CONFIG.engine, keep_last=1)).train()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4, 12]


def test_milestones_of_an_earlier_version_stay(tmp_path: Path) -> None:
    until(tmp_path, 6, keep_every=1)
    (tmp_path / "checkpoints" / "milestones.json").unlink()
    trainer(tmp_path, engine=dataclasses.replace(CONFIG.engine, keep_last=1)).train()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [4, 12]


def test_a_non_finite_step_stops_the_run_and_is_not_kept(tmp_path: Path) -> None:
    broken = trainer(tmp_path)
    at_batch(broken, 5, lambda batch: batch.each()[1].fill_(torch.nan))
    with pytest.raises(TrainingError, match=r"step 6: loss_m, gradient, keys not finite"):
        broken.train()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [2, 4]
    assert [record["step"] for record in figures(tmp_path)] == [2, 4]
    failure = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (failure["step"], failure["terms"]) == (6, ["loss_m", "gradient", "keys"])
    assert isinstance(broken.images, ImageArray)
    pixels = broken.images.images[next(broken.loader.batches(5, 6)).indices.numpy()]
    published = np.rint(digits().images[failure["images"]] * (255 / 16))
    assert np.array_equal(published, pixels[..., 0])
    for name, value in broken.method.named_parameters():
        assert value.isfinite().all(), name


@pytest.mark.parametrize(("method", "helps"), [("byol", "lower --lr, in"), ("mnclglf", "lower --lr or raise --temp")])
def test_a_learning_rate_that_explodes_ends_the_run_with_what_helps(
    method: MethodName, helps: str, tmp_path: Path
) -> None:
    optim = dataclasses.replace(CONFIG.optim, lr=1e30, warmup_epochs=0.0)
    run = trainer(tmp_path, method=method, optim=optim)
    with pytest.raises(TrainingError, match=f"step [2-4]: .*gradient.* not finite; .*{helps}"):
        run.train()
    assert all(value.isfinite().all() for value in run.method.parameters())


def test_a_report_that_cannot_be_written_does_not_hide_why_the_training_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run / "report.html"))

    monkeypatch.setattr(page, "write_report", full)
    command = parse(["train", *ARGUMENTS, "--lr", "1e30", "--warmup-epochs", "0", "--out", str(tmp_path / "run")])
    console = silent()
    with pytest.raises(TrainingError, match="not finite"):
        command.execute(console)
    assert "the report cannot be written: [Errno 28] No space left on device" in printed(console)


def test_no_state_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    broken = trainer(tmp_path)

    def spoil(batch: Batch) -> None:
        broken.method.momentum.get_buffer("0.bn1.running_var")[0] = (
            torch.inf
        )  # the batch norms still train on finite values

    at_batch(broken, 3, spoil)
    with pytest.raises(TrainingError, match=r"step 4.*momentum\.0\.bn1\.running_var.*not finite"):
        broken.train()
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [2]


def test_a_figure_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "effective_rank", lambda _: float("nan"))  # as in a step of fp16 that overflows
    until(tmp_path, 4)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert '"effective_rank": null' in text
    (tmp_path / "metrics.jsonl").write_text(text.replace("null", "NaN"))  # as earlier versions wrote it
    trainer(tmp_path).train()  # keeps these lines as they are
    records, unreadable = read_records(tmp_path / "metrics.jsonl")
    assert (records[0]["effective_rank"], unreadable) == (None, 0)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]


@pytest.mark.parametrize("given", ["", ', "elapsed_seconds": null', ', "elapsed_seconds": "long"'])
def test_a_record_without_its_time_is_gone_on_from(straight: Path, tmp_path: Path, given: str) -> None:
    until(tmp_path, 6)
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(re.sub(r', "elapsed_seconds": [0-9.]+', given, text))
    trainer(tmp_path).train()
    assert figures(tmp_path) == figures(straight)


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    console = silent()
    trainer(tmp_path, console=console).train()
    text = printed(console)
    assert "mnclglf on digits: 128 images of side 8, 3 epochs of 4 steps, device cpu" in text
    assert "estimated time: 0:00:" in text
    assert re.search(r"roofline: [\d.e-]+ s per step \(this CPU, [\d.]+ TFLOP/s, [\d.]+ GB/s\)", text)
    assert re.search(r"estimated memory per step: [\d.e-]+ GiB of tensors \([\d.e-]+ GiB of activations\)\n", text)
    assert "largest batch" not in text  # of a GPU that is not there
    assert "step 12/12  epoch 3.0  loss " in text
    assert re.search(
        r"\d images/s \(slowest .*, without the warm-up; \d+% of the roofline; peak memory of the whole process", text
    )
    assert "images/s  0:00:00 left" in text


def test_the_trained_encoder_is_that_of_the_last_step(straight: Path) -> None:
    config, method, step = load_trained(straight)
    assert (config, step) == (CONFIG, STEPS)
    state = final_state(straight)["method"]
    assert torch.equal(method.get_parameter("encoder.conv1.weight"), state["encoder.conv1.weight"])


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_may_be(straight: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt is no file; give one of .*run/checkpoints$"):
        load_trained(straight, Path("none.pt"))


def test_another_run_s_checkpoint_is_refused_and_both_are_named(straight: Path, tmp_path: Path) -> None:
    other, own = tmp_path / "other", list_checkpoints(straight / "checkpoints")[-1][1]
    other.mkdir()
    for change, named in (
        ({"seed": 3}, r"seed: 0 -> 3"),
        ({"recipe": "paper", "seed": 3}, "recipe: quick -> paper; seed"),
    ):
        (other / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(CONFIG, **change))))
        with pytest.raises(CheckpointError, match=rf"{own}.*{other}.*{named}.*{other}/checkpoints"):
            load_trained(other, own)
    moved = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, log_every=7))
    (other / "config.json").write_text(json.dumps(to_dict(moved)))
    assert load_trained(other, own)[2] == STEPS  # engine settings may change


def test_a_trained_checkpoint_with_unknown_settings_is_named(straight: Path, tmp_path: Path) -> None:
    state = final_state(straight)
    torch.save({**state, "config": json.dumps({**json.loads(state["config"]), "mood": 1})}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt.*mood"):
        load_trained(straight, tmp_path / "odd.pt")


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; mnclglf train --out"):
        load_trained(tmp_path)


class Clock:
    """Clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waiting_is_the_time_between_a_step_and_its_batch() -> None:
    clock = Clock()

    class Slow:
        def batches(self, start: int, stop: int) -> Iterator[str]:
            for number in range(start, stop):
                clock.now += 5.0 if number == start else 0.25
                yield f"batch {number}"

    waiting, waits = Waiting(clock), []
    slow: Any = Slow()  # in the place of a loader, with words for batches
    for step, batch, wait in waiting.timed(slow, 3, 7):
        assert batch == f"batch {step}"
        waits.append(wait)
        clock.now += 2.0  # the step
    assert waits == [0.0, 0.25, 0.25, 0.25]
    assert (waiting.first, waiting.later, waiting.elapsed) == (5.0, 0.75, 8.75)
    assert waiting.summary() == "waited 8.6% of the time for data, and 5.0 s for the first batch"


def test_the_time_waited_for_data_is_said_and_kept(straight: Path, tmp_path: Path) -> None:
    console = silent()
    trainer(tmp_path, console=console).train()
    assert re.search(r"waited \d+\.\d% of the time for data, and \d+\.\d s for the first batch", printed(console))
    assert all(record["data_wait_seconds"] >= 0 for record in read_records(straight / "metrics.jsonl")[0])


def test_a_run_goes_on_with_the_images_that_it_began_with(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1][1]
    state = load_checkpoint(path)
    assert state["images"] == trainer(tmp_path / "other").images.fingerprint()
    state.pop("step")
    save_checkpoint(path.parent, STEPS, state | {"images": "of another set"})
    with pytest.raises(CheckpointError, match=r"other images.*digits.*128"):
        trainer(tmp_path / "run")
    del state["images"], state["loader"]  # as an earlier version wrote it
    save_checkpoint(path.parent, STEPS, state)
    assert trainer(tmp_path / "run").start == STEPS


def test_a_run_with_loader_auto_goes_on_with_the_loader_that_it_had(tmp_path: Path) -> None:
    automatic = dataclasses.replace(CONFIG.data, loader="auto")
    first = trainer(tmp_path)
    assert first.loader.name == "reference"
    first.train()
    assert trainer(tmp_path, data=automatic).loader.name == "reference"
    assert trainer(tmp_path / "new", data=automatic).loader.name != "reference"


@pytest.mark.parametrize("labeled", [False, True])
@pytest.mark.parametrize("loader", ["reference", "auto"])
def test_a_run_on_image_files(tmp_path: Path, labeled: bool, loader: str) -> None:
    folder = tmp_path / "photos"
    for number in range(40):
        path = folder / (("ab"[number % 2]) if labeled else "") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 5, 11 + number % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    data = dataclasses.replace(CONFIG.data, train_images=None, loader=loader)
    changes: dict[str, Any] = dict(dataset=f"folder:{folder}", data=data)
    run = trainer(tmp_path / "run", **changes)
    assert run.train() is None
    records = read_records(tmp_path / "run" / "metrics.jsonl")[0]
    assert len(records) == 2  # 1 step per epoch, 3 epochs
    assert all((record["neighbor_agreement"] is None) != labeled for record in records)
    with np.load(tmp_path / "run" / "views.npz") as arrays:
        assert arrays["images"].shape == (6, 8, 8, 3)
    if not labeled:
        with pytest.raises(ValueError, match=r"supervised.*labels.*photos.*class"):
            trainer(tmp_path / "none", method="supervised", **changes)
        assert not (tmp_path / "none").exists()
    broken = trainer(tmp_path / "broken", **changes)
    at_batch(broken, 1, lambda batch: batch.each()[1].fill_(torch.nan))
    with pytest.raises(TrainingError, match=r"images (a/|b/|)\d\d\.png"):
        broken.train()


def test_a_labeled_method_trains_on_the_labels_of_its_images(tmp_path: Path) -> None:
    run = trainer(tmp_path, method="supervised")
    forward, seen = run.step.forward, []

    def watched(views: torch.Tensor, labels: torch.Tensor | None = None) -> Losses:
        seen.append((len(views), labels))
        return forward(views, labels)

    run.step.forward = watched
    assert run.train() is None
    assert len(seen) == STEPS
    for step, (views, labels) in enumerate(seen):
        rows = batch_indices(CONFIG.seed, step, 128, 32)
        assert views == 32
        assert labels is not None
        assert labels.tolist() == digits().target[run.images.published_rows(rows)].tolist()
    records = read_records(tmp_path / "metrics.jsonl")[0]
    assert all(record["cross_entropy"] == record["loss"] for record in records)
    assert all(record["queue_fill"] is None and record["neighbor_agreement"] is None for record in records)
    config, method, _ = load_trained(tmp_path)
    assert isinstance(method, Supervised)
    assert config.model.classes == method.classifier.out_features == 10
    assert trainer(tmp_path, method="supervised").start == STEPS  # the saved number of classes is the data set's
    assert write_report(tmp_path).exists()


def test_too_few_classes_are_refused(tmp_path: Path) -> None:
    model = dataclasses.replace(CONFIG.model, classes=4)
    with pytest.raises(ValueError, match="classes 4 are fewer than the 10 of digits"):
        trainer(tmp_path, method="supervised", model=model)


def test_a_folder_that_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (10, 10, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number:02}.png")
    data = dataclasses.replace(CONFIG.data, train_images=None)
    changes: dict[str, Any] = dict(dataset=f"folder:{tmp_path / 'photos'}", data=data)
    trainer(tmp_path / "run", **changes).train()
    (tmp_path / "photos" / "07.png").unlink()
    with pytest.raises(CheckpointError, match="other images"):
        trainer(tmp_path / "run", **changes)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Pretends a compiler whose forward is the method's own; returns a list to which each `graphs` is appended."""
    found: list[bool] = []

    def pretended(forward: Forward, *, graphs: bool, combo_kernels: bool) -> Forward:
        found.append(graphs)
        return forward

    monkeypatch.setattr("mnclglf.training.start.choose_compile", lambda *_: "graphs")
    monkeypatch.setattr("mnclglf.training.step.compiled", pretended)
    return found


def decided(out: Path) -> str:
    return json.loads((out / "environment.json").read_text())["cuda_graphs"]


def test_the_proof_of_graphs_does_not_change_the_run(straight: Path, tmp_path: Path, compiles: list[bool]) -> None:
    console, out = silent(), tmp_path / "run"
    trainer(out, console=console).train()
    assert "CUDA graphs: used, 2 replays were bit-equal" in printed(console)
    assert decided(out).startswith("used, ")
    assert compiles == [True]
    assert_identical(final_state(straight), final_state(out))
    assert figures(straight) == figures(out)


def broken(run: Trainer) -> None:
    """Makes a replay of the run change one running statistic."""
    forward, calls = run.step.forward, []

    def wrong(views: Any, labels: torch.Tensor | None = None) -> Losses:
        calls.append(views)
        if len(calls) > 1:
            mean = run.method.get_buffer("encoder.bn1.running_mean")
            assert mean is not None
            mean[0] += 1
        return forward(views, labels)

    run.step.forward = wrong


def test_graphs_that_are_not_proved_are_not_used(straight: Path, tmp_path: Path, compiles: list[bool]) -> None:
    console, out = silent(), tmp_path / "run"
    run = trainer(out, console=console)
    broken(run)
    run.train()
    assert "CUDA graphs: not used, the first difference is in encoder.bn1.running_mean: 1 of 2 values" in printed(
        console
    )
    assert "encoder.bn1.running_mean" in decided(out)
    assert compiles == [True, False]
    assert_identical(final_state(straight), final_state(out))


@pytest.mark.usefixtures("compiles")
def test_graphs_that_were_asked_for_have_to_be_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnclglf.training.start.choose_device", lambda _: torch.device("cpu"))
    run = trainer(tmp_path / "run", engine=dataclasses.replace(CONFIG.engine, graphs="on", device="auto"))
    broken(run)
    with pytest.raises(RuntimeError, match=r"encoder\.bn1\.running_mean: 1 of 2 .*--graphs auto"):
        run.train()


@pytest.mark.usefixtures("compiles")
def test_a_failing_compiler_decides_against_graphs(tmp_path: Path) -> None:
    def failing(views: Any, labels: torch.Tensor | None = None) -> NoReturn:
        raise BackendCompilerFailed(loop, ValueError("no such instruction"), None)

    console, out = silent(), tmp_path / "run"
    run = trainer(out, console=console)
    run.step.forward = run._or_eager(failing)  # pyright: ignore[reportPrivateUsage]
    run.train()
    assert "CUDA graphs: not used, torch.compile failed" in printed(console)
    assert decided(out) == "not used, torch.compile failed"


def test_a_failing_compiler_ends_a_rank(tmp_path: Path) -> None:
    """Alone it would go on with messages in another order than the other ranks'."""

    def failing(views: Any, labels: torch.Tensor | None = None) -> NoReturn:
        raise BackendCompilerFailed(loop, ValueError("no such instruction"), None)

    run = trainer(tmp_path / "run")
    run.ranks = Ranks(count=2)
    forward = run._or_eager(failing)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(TrainingError, match=r"no such instruction.*--compile off"):
        forward(torch.zeros(1), None)


def test_a_resumed_run_says_what_is_decided_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: list[bool]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trainer(first).train()
    assert compiles
    monkeypatch.setattr("mnclglf.training.start.choose_compile", lambda *_: "off")
    checkpoint = str(list_checkpoints(first / "checkpoints")[0][1])
    for out, resume in ((second, checkpoint), (first, "auto")):
        console = silent()
        trainer(out, resume=resume, console=console).train()
        assert re.search(r"CUDA graphs: not used, the run is on the CPU; before .*: used, 2 replays", printed(console))
    console = silent()
    trainer(first, console=console).train()
    assert "CUDA graphs: not used, the run is on the CPU\n" in printed(console)
    monkeypatch.setattr("mnclglf.training.start.choose_compile", lambda *_: "graphs")
    trainer(first).train()  # at its end nothing is replayed, so that nothing is decided anew
    assert decided(first) == "not used, the run is on the CPU"


NO_DRAW: dict[str, Any] = {"objective": dataclasses.replace(CONFIG.objective, one_embedding=False)}
"""Settings of a run whose steps draw no random numbers, so that they can be compared."""


@pytest.fixture(scope="module")
def without_draws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("without_draws") / "run"
    assert trainer(out, **NO_DRAW).train() is None
    return out


@pytest.fixture
def as_on_a_gpu(compiles: list[bool], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Pretends a machine where runs choose, and CUDA graphs are the part that can be on."""
    monkeypatch.setattr("mnclglf.training.loop.chooses", lambda _: True)
    reason = lambda engine, _: "--graphs off" if engine.graphs == "off" else None  # noqa: E731
    monkeypatch.setattr("mnclglf.training.choices.ruled_out", reason)
    monkeypatch.setattr("mnclglf.training.loop.choose", partial(loop.choose, rounds=1, steps=1))
    return compiles


def decide(monkeypatch: pytest.MonkeyPatch, verdict: str | None) -> list[int]:
    """Lets a measurement end with a verdict, None for all; returns a list that grows by each measurement."""
    measured: list[int] = []
    monkeypatch.setattr("mnclglf.training.choices.verdict", lambda *_: measured.append(1) or verdict)
    return measured


def choices_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "environment.json").read_text())["choices"]


def test_a_choice_does_not_change_the_run(
    without_draws: Path, tmp_path: Path, as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks a run that measures, one that takes what an earlier start found, and their report."""
    console, out, measured = silent(), tmp_path / "run", decide(monkeypatch, None)
    trainer(out, console=console, **NO_DRAW).train()
    assert measured == [1]
    assert as_on_a_gpu == [True, True, False]  # before the choice, and the two settings
    text = printed(console)
    assert re.search(r"choices, at this start:\n +part +safe +all\n", text)
    number = r"\d+\.\d\d\S*"
    assert re.search(
        r"CUDA graphs +off +on +\(the loader is not resident.*\)\n"
        rf" +error +{number} +{number}\n +ms per step +{number} +{number}\n",
        text,
    )
    assert re.search(r"  taken: all, .* times as fast as safe", text)
    assert decided(out).startswith("used, ")
    assert choices_of(out)["parts"] == {
        "batch_norm": "torch",
        "combo_kernels": "off",
        "convolution": "torch",
        "graphs": "on",
    }
    assert "times as fast as safe" in write_report(out).read_text()
    assert_identical(final_state(without_draws), final_state(out))
    assert figures(without_draws) == figures(out)

    console, again = silent(), tmp_path / "again"
    trainer(again, console=console, **NO_DRAW).train()
    assert measured == [1]
    assert "choices, from an earlier start on this machine:" in printed(console)
    assert choices_of(again)["parts"] == choices_of(out)["parts"]
    assert "CUDA graphs: used, 2 replays" in printed(console)  # proved again
    assert_identical(final_state(without_draws), final_state(again))


def test_the_safe_setting_trains_to_the_same_bit(
    without_draws: Path, tmp_path: Path, as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    console, out = silent(), tmp_path / "run"
    decide(monkeypatch, "it is slow")
    trainer(out, console=console, **NO_DRAW).train()
    assert as_on_a_gpu[-1] is False
    assert "  taken: safe, it is slow" in printed(console)
    assert "CUDA graphs: not used, safe was taken: it is slow" in printed(console)
    assert choices_of(out)["taken"] == "safe"
    assert_identical(final_state(without_draws), final_state(out))


def test_a_resumed_run_takes_its_own_choice(
    tmp_path: Path, as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    decide(monkeypatch, "it is slow")
    trainer(first, **NO_DRAW).train()
    (Path(os.environ["XDG_CACHE_HOME"]) / "mnclglf" / "choices.json").unlink()
    measured = decide(monkeypatch, None)
    checkpoint = str(list_checkpoints(first / "checkpoints")[0][1])
    console = silent()
    trainer(second, resume=checkpoint, console=console, **NO_DRAW).train()
    assert measured == []
    assert "choices, as before it was resumed:" in printed(console)
    assert choices_of(second)["parts"]["graphs"] == "off"
    assert "choices before" not in printed(console)

    engine = dataclasses.replace(CONFIG.engine, choices="all")
    console = silent()
    trainer(third, resume=checkpoint, console=console, engine=engine, **NO_DRAW).train()
    assert measured == []
    assert "choices before it was resumed: graphs off" in printed(console)
    assert choices_of(third)["parts"]["graphs"] == "on"

    # What the machine cannot run is chosen anew.
    path = first / "environment.json"
    parts = {**choices_of(first)["parts"], "graphs": "on"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "choices": {**choices_of(first), "parts": parts}}))
    console = silent()
    engine = dataclasses.replace(CONFIG.engine, graphs="off")
    trainer(tmp_path / "fourth", resume=checkpoint, console=console, engine=engine, **NO_DRAW).train()
    assert "choices before it was resumed: graphs on" in printed(console)
    assert "taken: all, nothing else can run here" in printed(console)
    assert measured == []


RESIDENT: dict[str, Any] = NO_DRAW | {"data": dataclasses.replace(CONFIG.data, loader="resident")}
"""Settings of a run whose whole step can be in a graph."""


@pytest.fixture(scope="module")
def straight_resident(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resident") / "run"
    assert trainer(out, **RESIDENT).train() is None
    return out


@pytest.fixture
def whole(as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Pretends a machine that records the whole step; its graphs are emulated."""
    monkeypatch.setattr(whole_step, "record", emulated_graph.record)
    decide(monkeypatch, None)
    return as_on_a_gpu


def test_a_run_of_replayed_whole_steps_is_the_launched_one_to_the_bit(
    straight_resident: Path, tmp_path: Path, whole: list[bool]
) -> None:
    """Checks a run that measures, one that takes what it found, and one that resumes in the middle."""
    console, out = silent(), tmp_path / "run"
    run = trainer(out, console=console, **RESIDENT)
    run.train()
    assert run.step.recorded is not None
    assert run.loader.deferred
    assert whole == [True, True, False, False]  # before the choice, and the three settings
    assert "CUDA graphs: used for the whole step, 2 replays were bit-equal to the launched step" in printed(console)
    assert re.search(r"part +safe +all +step\n", printed(console))
    assert decided(out).startswith("used for the whole step")
    assert (choices_of(out)["taken"], choices_of(out)["parts"]["graphs"]) == ("step", "step")
    assert "times as fast as all" in write_report(out).read_text()
    assert_identical(final_state(straight_resident), final_state(out))
    assert figures(straight_resident) == figures(out)

    checkpoint = str(list_checkpoints(out / "checkpoints")[0][1])
    for name, resume in (("again", "auto"), ("resumed", checkpoint)):
        console = silent()
        run = trainer(tmp_path / name, resume=resume, console=console, **RESIDENT)
        run.train()
        assert run.step.recorded is not None
        assert "CUDA graphs: used for the whole step" in printed(console)  # proved again
        assert choices_of(tmp_path / name)["parts"]["graphs"] == "step"
        assert_identical(final_state(straight_resident), final_state(tmp_path / name))

    # A loader whose views are made outside of the step cannot go on so.
    console, data = silent(), dataclasses.replace(CONFIG.data, loader="reference")
    run = trainer(tmp_path / "other", resume=checkpoint, console=console, **RESIDENT | {"data": data})
    run.train()
    assert "choices before it was resumed: graphs step" in printed(console)
    assert choices_of(tmp_path / "other")["parts"]["graphs"] == "on"


def test_a_whole_step_that_fails_its_proof_leaves_the_graphs_of_the_forward(
    straight_resident: Path, tmp_path: Path, whole: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(whole_step, "record", forbidden)
    console, out = silent(), tmp_path / "run"
    engine = dataclasses.replace(CONFIG.engine, choices="all")
    run = trainer(out, console=console, engine=engine, **RESIDENT)
    run.train()
    assert "CUDA graphs: not used for the whole step, it cannot be recorded: operation not perm" in printed(console)
    assert "CUDA graphs: used, 2 replays" in printed(console)
    assert decided(out).startswith("used, ")
    assert not run.loader.deferred
    assert whole == [True, False, True]
    assert_identical(final_state(straight_resident)["method"], final_state(out)["method"])


@pytest.mark.usefixtures("whole")
def test_a_whole_step_that_was_asked_for_has_to_be_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnclglf.training.start.choose_device", lambda _: torch.device("cpu"))
    engine = dataclasses.replace(CONFIG.engine, graphs="step", device="auto")
    with pytest.raises(ValueError, match=r"graphs step .*--loader resident"):
        trainer(tmp_path / "reference", engine=engine)
    run = trainer(tmp_path / "run", engine=engine, **RESIDENT)
    run.train()
    assert run.step.recorded is not None

    def forbidden(*_: object) -> NoReturn:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(whole_step, "record", forbidden)
    with pytest.raises(RuntimeError, match=r"graphs step .*not permitted.*--graphs auto"):
        trainer(tmp_path / "fails", engine=engine, **RESIDENT).train()


def test_whole_steps_that_overflow_are_recorded_anew_without_fp16(
    tmp_path: Path, whole: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FEW_OVERFLOWS", 1)
    monkeypatch.setattr("mnclglf.training.choices.cudnn_problem", lambda *_: None)
    monkeypatch.setattr(loop, "prove_plans", lambda *_, **__: None)
    monkeypatch.setattr(METHODS["mnclglf"], "fuse", fuse_by_triton(METHODS["mnclglf"].fuse))
    console, out = silent(), tmp_path / "run"
    engine = dataclasses.replace(CONFIG.engine, precision="bf16", choices="all", log_every=1)
    run = trainer(out, console=console, engine=engine, **RESIDENT)
    with torch.no_grad():
        run.method.get_parameter("momentum.0.layer2.0.conv1.weight").mul_(1e8)
    run.train()
    assert "2 of 2 steps overflowed in fp16 and were skipped" in printed(console)
    decisions = re.findall(r"CUDA graphs: (.*)\n", printed(console))
    assert [decision.startswith("used for the whole step") for decision in decisions] == [True, True], decisions
    assert run.step.recorded is not None
    assert not run.method.encoder.half_sums
    losses = [record["loss"] for record in read_records(out / "metrics.jsonl")[0]]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, cast(list[float], losses[2:])))
    assert whole


def fuse_by_triton(fuse: Callable[..., None]) -> Callable[..., None]:
    """Returns `fuse` with Triton's operator for cuDNN's, which a CPU computes by PyTorch's form."""

    def fused(method: Any, convolution: str, *, half_sums: bool = False) -> None:
        fuse(method, "triton" if convolution == "cudnn" else convolution, half_sums=half_sums)

    return fused


def test_damaged_choices_of_a_run_are_made_anew(
    tmp_path: Path, as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measured = tmp_path / "run", decide(monkeypatch, None)
    trainer(out, **NO_DRAW).train()
    path = out / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "choices": {"taken": 3}}))
    checkpoint = str(list_checkpoints(out / "checkpoints")[0][1])
    console = silent()
    trainer(tmp_path / "next", resume=checkpoint, console=console, **NO_DRAW).train()
    assert "choices, from an earlier start" in printed(console)
    assert measured == [1]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_compiler_that_fails_in_both_settings_leaves_an_eager_run(
    without_draws: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> NoReturn:
        raise BackendCompilerFailed(loop, ValueError("no such instruction"), None)

    monkeypatch.setattr("mnclglf.training.step.compiled", lambda *_, **__: failing)
    console, out = silent(), tmp_path / "run"
    trainer(out, console=console, **NO_DRAW).train()
    assert "torch.compile failed: " in printed(console)
    assert "CUDA graphs: not used, safe was taken: all fails: " in printed(console)
    assert_identical(final_state(without_draws), final_state(out))


def test_a_run_on_the_cpu_has_no_choices(straight: Path) -> None:
    assert "choices" not in json.loads((straight / "environment.json").read_text())


def test_graphs_of_a_setting_that_was_not_measured_are_proved(
    tmp_path: Path, as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks --graphs on, whose steps draw random numbers, so that nothing is compared."""
    monkeypatch.setattr("mnclglf.training.start.choose_device", lambda _: torch.device("cpu"))
    proofs: list[int] = []
    prove = loop.problem_of_replays
    monkeypatch.setattr(loop, "problem_of_replays", lambda *x, **y: proofs.append(1) or prove(*x, **y))
    monkeypatch.setattr("mnclglf.training.loop.forced", lambda *_: None)  # one setting is left, with graphs
    engine = dataclasses.replace(CONFIG.engine, graphs="on", device="auto")
    out = tmp_path / "run"
    trainer(out, engine=engine).train()
    assert choices_of(out)["parts"]["graphs"] == "on"
    assert "random" in choices_of(out)["why"]
    assert proofs == [1]
    assert decided(out).startswith("used, ")


def fused_run(out: Path, console: Console, *, wrong: bool) -> Trainer:
    """Returns a run whose forwards without gradient compute in fp16; `wrong`: those of one network overflow."""
    engine = dataclasses.replace(CONFIG.engine, log_every=1)
    run = trainer(out, console=console, engine=engine)
    run.method.fuse("triton", half_sums=True)
    run.step.forward = share_casts(run.method, torch.bfloat16)
    run.step.dtype = torch.bfloat16
    if wrong:  # a batch norm follows, so that in bf16 it computes the same
        with torch.no_grad():
            run.method.get_parameter("momentum.0.layer2.0.conv1.weight").mul_(1e8)
    parts = {"convolution": "cudnn", "graphs": "off"}
    run.choice = Choice(taken="all", why="it is faster", parts=parts, settings={"safe": parts, "all": parts})
    return run


def test_a_run_with_many_overflows_goes_on_without_fp16_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FEW_OVERFLOWS", 1)
    console, out = silent(), tmp_path / "run"
    run = fused_run(out, console, wrong=True)
    before = run.method.get_parameter("encoder.conv1.weight").clone()
    assert run.train() is None
    assert "2 of 2 steps overflowed in fp16 and were skipped; forwards without gradient go on in" in printed(console)
    assert printed(console).count("overflowed") == 1
    assert run.step.overflows == 2
    assert not run.method.encoder.half_sums
    assert choices_of(out)["parts"] == {"convolution": "torch", "graphs": "off"}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record.get("overflows") for record in records[:3]] == [1, None, None]
    assert not torch.equal(run.method.get_parameter("encoder.conv1.weight"), before)  # the later steps have trained


def test_a_run_without_overflows_stays_in_fp16(tmp_path: Path) -> None:
    console = silent()
    run = fused_run(tmp_path / "run", console, wrong=False)
    assert run.train() is None
    assert "overflowed" not in printed(console)
    assert run.method.encoder.half_sums
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["overflows"] for record in records} == {0}


def test_fused_convolutions_that_win_train_and_are_noted(
    tmp_path: Path, as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks the choice and the run after it; the width has no Triton kernel, so PyTorch computes."""
    monkeypatch.setattr("mnclglf.training.choices._is_geforce", lambda _: True)
    measured, console, out = decide(monkeypatch, None), silent(), tmp_path / "run"
    engine = dataclasses.replace(CONFIG.engine, precision="bf16", graphs="off")
    run = trainer(out, console=console, engine=engine, **NO_DRAW)
    backends = run.here.backends._replace(convolution="triton")
    run.here = run.here._replace(backends=backends)
    assert run.here.dtype == torch.bfloat16
    assert run.train() is None
    assert measured == [1]
    assert re.search(r"convolutions without gradient +torch +triton", printed(console))
    assert choices_of(out)["parts"]["convolution"] == "triton"
    assert {encoder.convolution for encoder in run.method.encoders()} == {"triton"}
    assert as_on_a_gpu


def test_plans_of_cudnn_are_proved_before_they_are_used(
    tmp_path: Path, as_on_a_gpu: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnclglf.training.choices.cudnn_problem", lambda *_: None)
    asked: list[dict[str, Any]] = []

    def prove(*_: object, say: Callable[[str], object], **how: Any) -> None:
        asked.append(how)
        say("a plan is left out")

    monkeypatch.setattr(loop, "prove_plans", prove)
    console = silent()
    for choices in ("safe", "auto"):  # auto finds that cuDNN cannot run here, and takes safe
        engine = dataclasses.replace(CONFIG.engine, precision="bf16", graphs="off", choices=choices)
        run = trainer(tmp_path / choices, console=console, engine=engine, **NO_DRAW)
        assert run.train() is None
        assert choices_of(tmp_path / choices)["parts"]["convolution"] == "torch"
    assert asked == [dict(without_gradient=True, online="off")]  # safe has none
    assert "a plan is left out" in printed(console)
