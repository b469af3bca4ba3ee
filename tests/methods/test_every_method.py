"""The contract of mnclglf.methods.base, for every method of the table."""

import json
import math
import sys
from typing import Any

import oracles
import pytest
import torch
from method_steps import CLASSES, Stepper, inputs_of, make_batch, make_method
from methods.test_compiled_step import TinyEncoder
from methods.test_mnclglf import SIDE, N
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mnclglf.config import METHOD_NAMES, MethodName, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from mnclglf.methods import METHODS, Method
from mnclglf.models.batch_norm import batch_norms
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.roofline import step_parts

AUTOCAST = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
EVERY = pytest.mark.parametrize("name", METHODS)
STOPPED = {"mnclglf_official": {"loss_s"}}  # terms that no gradient comes from


def lasting(stepper: Stepper) -> dict[str, Tensor]:
    """Everything that must not take in a non-finite value: weights, queue, the optimizer's momentum."""
    method = stepper.method
    state = {name: value.clone() for name, value in method.named_parameters()}
    state |= {name: value.clone() for name, value in method.named_buffers() if name.startswith("queue.")}
    for index, entry in enumerate(stepper.optimizer.state.values()):
        state[f"velocity.{index}"] = entry["momentum_buffer"].clone()
    return state


@EVERY
@AUTOCAST
def test_every_term_trains_encoder_and_heads_and_nothing_that_follows(name: MethodName, dtype: torch.dtype) -> None:
    method = make_method(METHODS[name], torch.float32)
    batch = make_batch(torch.float32, views=method.views)
    Stepper(method)(batch)  # a batch norm that starts with weight 0 lets no gradient through
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses = method(*inputs_of(method, batch))
    for term, loss in losses.terms.items():
        assert loss.dtype == torch.float32
        assert loss.requires_grad == (term not in STOPPED.get(name, ()))
        if not loss.requires_grad:
            continue
        method.zero_grad()
        loss.backward(retain_graph=True)
        for path, parameter in method.named_parameters():
            if path.startswith("momentum."):
                assert parameter.grad is None, f"{path} must have no gradient"
            else:
                assert parameter.grad is not None, f"{term} gives {path} no gradient"
                assert parameter.grad.abs().max() > 0, f"{term} gives {path} a zero gradient"


@EVERY
def test_the_features_are_the_first_view_s(name: MethodName) -> None:
    method = make_method(METHODS[name])
    batch = make_batch(views=method.views)
    losses = method(*inputs_of(method, batch))
    assert not losses.features.requires_grad
    (x1, *_), encoder = batch.each(), method.encoder
    # Fast-MoCo encodes patches only: the mean over an image's four, in fp64.
    expected = oracles.combine(encoder(oracles.divide(x1)), 4) if name == "fast_moco" else encoder(x1)
    torch.testing.assert_close(losses.features, expected, rtol=0, atol=1e-14 if name == "fast_moco" else 0)


@EVERY
@pytest.mark.parametrize("view", [0, 1])
def test_nothing_is_kept_of_a_non_finite_step_or_any_after_it(name: MethodName, view: int) -> None:
    method = make_method(METHODS[name])
    stepper, (good, broken, late) = Stepper(method), (make_batch(views=method.views) for _ in range(3))
    stepper(good)
    before = lasting(stepper)
    broken.each()[view % method.views][2, 0, 3, 3] = torch.nan
    stepper(broken)
    stepper(late)  # the host has not looked yet
    for key, value in lasting(stepper).items():
        assert torch.equal(value, before[key]), f"{key} changed"
    with pytest.raises(NonFiniteError, match="step 1"):
        stepper.guard.raise_if_failed()


def two_steps(method: Method, *, compiled: bool) -> list[Tensor]:
    """Losses and gradients of two steps, and the state after them."""
    forward = torch.compile(method.forward, fullgraph=True, backend="aot_eager") if compiled else method.forward
    results: list[Tensor] = []
    for step in range(2):
        torch.manual_seed(step)
        batch = make_batch(torch.float32, views=method.views)
        losses = forward(*inputs_of(method, batch))
        losses.total.backward()
        results.append(losses.total.detach())
        with torch.no_grad():
            for parameter in method.trained_parameters():
                assert parameter.grad is not None
                results.append(parameter.grad)
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        method.after_step(losses, batch.indices, momentum=0.5, should_update=torch.tensor(True))
    return results + [value.clone() for value in method.state_dict().values()]


@EVERY
def test_the_forward_is_one_graph(name: MethodName, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("base", "mnclglf_official"):
        monkeypatch.setattr(f"mnclglf.methods.{module}.make_encoder", TinyEncoder)
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(5)
        results.append(two_steps(make_method(METHODS[name], torch.float32), compiled=compiled))
    expected, ours = results
    for result, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-6)  # the same operators, some of them fused


class Called(TorchDispatchMode):
    """Notes which of our operators are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mnclglf":
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@EVERY
def test_a_step_calls_the_operators_that_its_method_names(name: MethodName, fused_sgd_on_meta: None) -> None:
    with torch.device("meta"):
        method = make_method(METHODS[name], torch.float32, backend="triton")
        with Called() as called:
            views = torch.empty(method.views * 4, 3, 16, 16)
            losses = method(views, torch.zeros(4, dtype=torch.int64) if method.needs_labels else None)
            method.after_step(losses, torch.arange(4), momentum=0.5, should_update=torch.tensor(True))
    assert called.names == {*method.operators, "batch_norm"}


# Passes of a view through an encoder, forward and backward; the patches of a view count as one. A method without a row
# may take each view once through each of its networks (see most_passes).
PASSES = {
    "mnclglf": (7, 3),
    "mnclglf_official": (7, 2),
    "supervised": (1, 1),
    "simclr": (2, 2),
    "mocov2": (2, 1),
    "simsiam": (2, 2),
    "byol": (4, 2),
    "nnclr": (2, 2),
    "fast_moco": (4, 2),
}


def most_passes(name: MethodName) -> tuple[int, int]:
    """Each view forward through online encoder, its patches and momentum encoder; backward through the first."""
    method = make_method(METHODS[name])
    networks = 1 + ("divide" in method.operators) + hasattr(method, "momentum")
    return method.views * networks, method.views


@EVERY
def test_a_step_is_counted_and_encodes_no_view_too_often(name: MethodName) -> None:
    def flops(method: MethodName, direction: str) -> int:
        config = RunConfig(
            method=method,
            model=ModelConfig(width=4, projector_width=24, predictor_width=12, classes=CLASSES),
            objective=ObjectiveConfig(queue_size=20),
            optim=OptimConfig(batch_size=6),
        )
        return step_parts(config, 16, "bf16")[f"convolutions, {direction}"].flops

    for place, direction in enumerate(("forward", "backward")):
        taken, two_passes = flops(name, direction), flops("simclr", direction)
        assert 0 < 2 * taken <= most_passes(name)[place] * two_passes
        if name in PASSES:
            assert 2 * taken == PASSES[name][place] * two_passes


def test_the_table_holds_the_files() -> None:
    """config.py lists the names by the files, so that --help needs no torch."""
    assert sorted(METHODS) == list(METHOD_NAMES)
    assert {name: kind.__module__ for name, kind in METHODS.items()} == {
        name: f"mnclglf.methods.{name}" for name in METHODS
    }


@EVERY
def test_the_views_that_it_says_are_cut_are_cut(name: MethodName, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = []

    def divide(images: Tensor, **options: Any) -> Tensor:
        cut.append(images)
        return real(images, **options)

    method = make_method(METHODS[name])
    if "divide" in method.operators:
        module = sys.modules[METHODS[name].__module__]
        real = module.divide
        monkeypatch.setattr(module, "divide", divide)
    batch = make_batch(views=method.views)
    method(*inputs_of(method, batch))
    assert method.divided_views == tuple(
        number for number, view in enumerate(batch.each(), 1) if any(torch.equal(view, images) for images in cut)
    )


@EVERY
def test_it_says_whether_its_terms_are_ln_n_while_all_images_look_alike(name: MethodName) -> None:
    method = make_method(METHODS[name])
    for layer in batch_norms(method):  # a bias of 0 would leave rounding errors alone, in any direction
        torch.nn.init.normal_(layer.bias)
    image = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64)
    labels = torch.zeros(N, dtype=torch.int64) if method.needs_labels else None
    terms = method(image.expand(method.views * N, -1, -1, -1), labels).terms
    level = [abs(term.item() - math.log(N)) < 1e-6 for term in terms.values()]
    assert all(level) == method.batch_candidates


def test_what_a_method_says_of_itself_is_json() -> None:
    for method in METHODS.values():
        facts = method.facts()
        assert json.loads(json.dumps(facts)) == facts
