"""Tests of the whole step as one graph, emulated on a CPU: N replays are N launched steps, to the bit."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import emulated_graph
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from training.test_graphs import state_of

from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig, ViewConfig
from mnclglf.data.images import ImageArray
from mnclglf.data.loader import Batch
from mnclglf.data.loaders.resident import ResidentLoader
from mnclglf.methods import METHODS, Method
from mnclglf.methods.base import Losses
from mnclglf.models.encoder import ResNet
from mnclglf.training import whole_step
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.health import effective_rank, feature_std, neighbor_agreement
from mnclglf.training.schedule import Schedule
from mnclglf.training.step import TrainStep
from mnclglf.training.whole_step import WholeStep, problem_of_whole_step

CPU = torch.device("cpu")
IMAGES, CLASSES, SIDE, N, QUEUE, STEPS = 40, 3, 8, 6, 15, 6  # the queue wraps in the third step, within a batch
LABELS = torch.arange(IMAGES) % CLASSES
RATES = {"lr": 0.05, "momentum": 0.9}
SCHEDULE = Schedule(
    steps_per_epoch=6, total_steps=9, warmup_steps=2, peak_lr=0.05, start_momentum=0.9, momentum_rises=True
)
Outcome = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_step, "record", emulated_graph.record)


def loader_of(method: Method, dtype: torch.dtype, device: torch.device) -> ResidentLoader:
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8)
    images = ImageArray(name="noise", split="train", images=pixels, labels=LABELS.numpy(), classes=("a", "b", "c"))
    settings: dict[str, Any] = dict(views=method.views, side=SIDE, batch_size=N, seed=5, threads=1)
    return ResidentLoader(images, ViewConfig(rotation_degrees=10), dtype=dtype, device=device, **settings)


def make_run(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    one_embedding: bool = False,
    half: bool = False,
    device: torch.device = CPU,
    **optim: Any,
) -> tuple[TrainStep, ResidentLoader]:
    """Makes a step of a method and its loader; fp64 is without autocast."""
    torch.manual_seed(1)
    model = ModelConfig(width=2, projector_width=8, predictor_width=4, classes=CLASSES)
    settings = ObjectiveConfig(queue_size=QUEUE, one_embedding=one_embedding)
    method = METHODS[name](model, settings, queue_dtype=dtype).to(device, torch.promote_types(dtype, torch.float32))
    if half:
        method.fuse("triton", half_sums=True)  # on the CPU PyTorch's form computes
    autocast = torch.float32 if dtype == torch.float64 else dtype
    method = method.to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    step = TrainStep(method, OptimConfig(lr=0.05, **optim), EngineConfig(), autocast, labels=LABELS.to(device))
    loader = loader_of(method, dtype, device)
    step.augment = loader.views_of
    return step, loader


def trajectory(step: TrainStep, loader: ResidentLoader, *, first: int = 0, broken: int | None = None) -> Outcome:
    """Trains from step `first` on, at a schedule; returns, after each step, what the loop reads and all of the state.

    `broken` is the step whose first view is not finite.
    """
    torch.manual_seed(9)  # of --one-embedding
    found: Outcome = []
    for number, batch in enumerate(loader.batches(first, STEPS), start=first):
        assert batch.parameters is not None
        if number == broken:
            batch.parameters[0, 6] = torch.nan  # the factor of brightness
        if step.recorded is None:
            batch = batch._replace(views=loader.views_of(batch.indices, batch.parameters))
        momentum = SCHEDULE.ema_momentum(number)
        losses, gradient_norm = step(number, batch, lr=SCHEDULE.lr(number), momentum=momentum)
        found.append(figures(step, losses, gradient_norm, batch.indices) | state(step))
    return found


def figures(step: TrainStep, losses: Losses, gradient_norm: Tensor, indices: Tensor) -> dict[str, Any]:
    """Returns what the loop logs of a step."""
    agreement = None if losses.neighbors is None else neighbor_agreement(losses.neighbors, indices, LABELS)
    finite = bool(losses.features.isfinite().all())
    return {
        "losses": [loss.item() for loss in (losses.total, *losses.terms.values())],
        "gradient norm": gradient_norm.item(),
        "health": [feature_std(losses.features), effective_rank(losses.features)] if finite else None,
        "queue": [agreement, step.method.queue_fill()],
    }


def state(step: TrainStep) -> dict[str, Any]:
    """Returns copies of all that a step changes."""
    optimizer = [x.clone() for x in tree_leaves(step.optimizer.state_dict()) if isinstance(x, Tensor)]
    found = {name: x.clone() for name, x in step.method.state_dict().items()}
    guard = [step.guard.failed_step.clone(), step.guard.finite.clone(), step.overflows.clone()]
    return found | {"optimizer": optimizer, "guard": guard, "loss scale": step.scaler.state_dict()}


def same(one: object, two: object) -> bool:
    """Returns whether nested values are equal to the bit; a NaN is equal to a NaN."""
    ours, theirs = tree_leaves(one), tree_leaves(two)
    return len(ours) == len(theirs) and all(map(_same_leaf, ours, theirs))


def _same_leaf(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (one, two)]
        return one.dtype == two.dtype and torch.equal(*bits)
    return bool(one == two or (one != one and two != two))


def differences(one: Outcome, two: Outcome) -> list[str]:
    """Returns what differs, as `step: name`."""
    assert len(one) == len(two)
    found = [(number, name, pair) for number, pair in enumerate(zip(one, two, strict=True)) for name in pair[0]]
    return [f"{number}: {name}" for number, name, (a, b) in found if not same(a[name], b[name])]


def replayed(step: TrainStep, loader: ResidentLoader, **how: Any) -> Outcome:
    """Records the step by its first batch, as a run's start does, and returns the trajectory of the replays."""
    batch = next(iter(loader.batches(how.get("first", 0), STEPS)))
    assert problem_of_whole_step(step, batch, **RATES) is None
    assert step.recorded is not None
    loader.deferred = True
    return trajectory(step, loader, **how)


EVERY = [
    pytest.param(name, dict(dtype=dtype), id=f"{name} {str(dtype).removeprefix('torch.')}")
    for name in METHODS
    for dtype in (torch.float64, torch.float32, torch.float16)
]
OTHERS = [
    pytest.param("byol", dict(optimizer="lars", clip_norm=0.1), id="LARS, clipped"),
    pytest.param("simsiam", dict(constant_predictor_lr=True, sgd_momentum=0.0), id="two rates, no momentum"),
    pytest.param("mnclglf", dict(one_embedding=True), id="random numbers"),
    pytest.param("mocov2", dict(dtype=torch.bfloat16, half=True), id="fp16 without gradient"),
]


@pytest.mark.parametrize(("name", "how"), EVERY + OTHERS)
def test_replays_are_the_launched_steps_to_the_bit(name: str, how: Mapping[str, Any]) -> None:
    expected, found = trajectory(*make_run(name, **how)), replayed(*make_run(name, **how))
    assert differences(expected, found) == []
    assert len({step["losses"][0] for step in found}) == STEPS  # other images, and weights that learn


@pytest.mark.parametrize("name", ["mnclglf", "byol", "supervised"])
def test_a_broken_step_is_found_and_nothing_of_it_kept(name: str) -> None:
    (step, loader), (again, other) = make_run(name), make_run(name)
    assert differences(trajectory(step, loader, broken=3), found := replayed(again, other, broken=3)) == []
    assert [int(each["guard"][0]) for each in found] == [-1, -1, -1, 3, 3, 3]
    with pytest.raises(NonFiniteError, match=r"step 3: .*gradient"):
        again.guard.raise_if_failed()
    assert same(found[3]["optimizer"][0], found[5]["optimizer"][0])


def test_a_run_that_goes_on_from_a_checkpoint_replays_on_from_it() -> None:
    expected, (step, loader) = trajectory(*make_run("mnclglf")), make_run("mnclglf")
    trajectory(step, loader)  # other weights than at the start
    whole, (before, feed) = step, make_run("mnclglf")
    for number, batch in enumerate(feed.batches(0, 4)):
        before(number, batch, lr=SCHEDULE.lr(number), momentum=SCHEDULE.ema_momentum(number))
    whole.method.load_state_dict(before.method.state_dict())
    whole.load_state_dict(before.state_dict())
    assert differences(expected[4:], replayed(whole, loader, first=4)) == []


def number_of_the_host(name: str) -> Callable[[TrainStep], None]:
    """Returns a fault: a number of the schedule is passed to the step's launches, as a Python number."""

    def fault(step: TrainStep) -> None:
        write, tensor = step.set_schedule, getattr(step, name, None)

        def set_schedule(number: int, *, lr: float, momentum: float) -> None:
            if tensor is not None:
                setattr(step, name, tensor)
            write(number, lr=lr, momentum=momentum)
            if name == "lr":
                for group in step.optimizer.param_groups:
                    group["lr"] = lr
            else:
                setattr(step, name, {"number": number, "momentum": momentum}[name])

        step.set_schedule = set_schedule  # pyright: ignore[reportAttributeAccessIssue]

    return fault


def pointer_of_the_host(step: TrainStep) -> None:
    enqueued = [0]

    def push(rows: Tensor, sources: Tensor, should_update: Tensor, backend: str) -> None:
        where = (torch.arange(len(rows)) + enqueued[0]) % QUEUE
        enqueued[0] += len(rows)
        step.method.queue.rows[where] = torch.nn.functional.normalize(rows)

    step.method.queue.push = push  # pyright: ignore[reportAttributeAccessIssue]


def guard_elsewhere(step: TrainStep) -> None:
    check = step.guard.check

    def moved(*given: Any) -> Tensor:
        step.guard.failed_step = step.guard.failed_step.clone()
        return check(*given)

    step.guard.check = moved  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (number_of_the_host("lr"), "the first difference is in encoder.conv1.weight"),
        (number_of_the_host("momentum"), "the first difference is in momentum."),
        (pointer_of_the_host, "the first difference is in queue.rows"),
        (number_of_the_host("number"), None),  # it shows in a step that is not finite
        (guard_elsewhere, None),
    ],
    ids=["lr", "momentum", "pointer", "number", "guard"],
)
def test_what_a_recording_bakes_in_is_seen(fault: Callable[[TrainStep], None], seen: str | None) -> None:
    """Breaks the step on purpose: by the proof, where it can know, and by the comparison with launched steps."""
    (step, loader), (again, other) = make_run("mnclglf"), make_run("mnclglf")
    fault(again)
    batch = next(iter(other.batches(0, STEPS)))
    problem = problem_of_whole_step(again, batch, **RATES)
    assert (problem is None) == (seen is None)
    assert (seen or "") in (problem or "")
    again, other = make_run("mnclglf")
    fault(again)
    with torch.random.fork_rng():
        again.set_schedule(0, lr=SCHEDULE.lr(0), momentum=SCHEDULE.ema_momentum(0))
        start = whole_step.saved_state(again)
        again.recorded = whole = WholeStep(again, batch)
        whole_step.restore_state(again, start)
        again.recorded = whole
    assert differences(trajectory(step, loader, broken=4), trajectory(again, other, broken=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_proof_changes_nothing(dtype: torch.dtype) -> None:
    step, loader = make_run("mnclglf", dtype, one_embedding=True)
    loader.into = step.fix_input((3 * N, 3, SIDE, SIDE))
    for number, batch in enumerate(loader.batches(0, 3)):
        step(number, batch, lr=0.05, momentum=0.9)
    (batch,) = loader.batches(3, 4)
    before, views = state_of(step), batch.views.clone()
    assert problem_of_whole_step(step, batch, **RATES) is None
    assert state_of(step) == before
    assert torch.equal(batch.views, views)


def test_a_step_that_reads_on_the_host_is_left_out() -> None:
    step, loader = make_run("simclr")
    forward = step.forward

    def reading(views: Tensor, labels: Tensor | None = None) -> Losses:
        losses = forward(views, labels)
        assert losses.total < 1e9
        return losses

    step.forward = reading
    (batch,), before = loader.batches(0, 1), state_of(step)
    problem = problem_of_whole_step(step, batch, **RATES) or ""
    assert "cannot be recorded: operation not permitted" in problem
    assert "_local_scalar_dense" in problem
    assert step.recorded is None
    assert state_of(step) == before


def test_an_optimizer_that_makes_its_state_late_is_left_out() -> None:
    step, loader = make_run("simclr", optimizer="lars")
    step.optimizer.state.clear()
    encoder = cast(ResNet, step.method.encoder)
    (batch,), before = loader.batches(0, 1), encoder.conv1.weight.clone()
    assert "makes its state in its first step" in (problem_of_whole_step(step, batch, **RATES) or "")
    assert step.recorded is None
    assert not step.optimizer.state
    assert torch.equal(encoder.conv1.weight, before)


def test_views_that_are_made_elsewhere_cannot_be_recorded() -> None:
    step, loader = make_run("simclr")
    (batch,) = loader.batches(0, 1)
    assert "outside of the step" in (problem_of_whole_step(step, Batch(batch.views, batch.indices), **RATES) or "")
    step.augment = None
    assert "outside of the step" in (problem_of_whole_step(step, batch, **RATES) or "")


def test_what_is_read_before_the_next_step_is_its_own() -> None:
    """Reads the losses of a step after the loader has made the next batch, as the loop does, and keeps them."""
    step, loader = make_run("simclr")
    (batch,) = loader.batches(0, 1)
    assert problem_of_whole_step(step, batch, **RATES) is None
    loader.deferred, totals = True, []
    batches = loader.batches(0, STEPS)
    batch = next(batches)
    for number in range(STEPS - 1):
        losses, _ = step(number, batch, **RATES)
        assert batch.views.numel() == 0
        batch = next(batches)
        totals.append(losses.total.item())
    again, feed = make_run("simclr")
    assert totals == [again(number, each, **RATES)[0].total.item() for number, each in enumerate(feed.batches(0, 5))]


def test_a_checkpoint_drops_the_recording() -> None:
    step, loader = make_run("simclr")
    (batch,) = loader.batches(0, 1)
    assert problem_of_whole_step(step, batch, **RATES) is None
    step.load_state_dict(step.state_dict())
    assert step.recorded is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_recorded_on_the_gpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records eager forwards, which is stricter than compiled ones: more operations have to allow it."""
    monkeypatch.undo()
    step, loader = make_run(name, dtype, device=torch.device("cuda"))
    batch, *batches = loader.batches(0, STEPS)
    before = state_of(step)
    assert problem_of_whole_step(step, batch, **RATES) is None
    assert state_of(step) == before
    for number, each in enumerate([batch, *batches]):
        losses, gradient_norm = step(number, each, lr=SCHEDULE.lr(number), momentum=SCHEDULE.ema_momentum(number))
        assert losses.total.isfinite()
        assert gradient_norm > 0
    step.guard.raise_if_failed()
