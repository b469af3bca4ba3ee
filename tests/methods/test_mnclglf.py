"""MNCLGLF against the literal transcription of Algorithm 1, and each decision of docs/reference/algorithm.md alone."""

import copy
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig
from mnclglf.data.loader import Batch
from mnclglf.methods import MNCLGLF, Method
from mnclglf.models.batch_norm import batch_norms
from mnclglf.training.guard import NonFiniteError
from mnclglf.training.step import TrainStep
from mnclglf_kernels import Backend, Backends

N, SIDE, K = 6, 16, 20  # K is no multiple of N: the ring wraps in the fourth step
CLASSES = 3  # for the methods that need labels
MODEL = ModelConfig(width=4, projector_width=24, predictor_width=12, classes=CLASSES)
OPTIM = OptimConfig(lr=0.1, batch_size=N)

# Both compute in fp64 but sum in another order (rows one by one against matmul). Five steps of SGD through 30 batch
# norms amplify 1e-16 to at most about 1e-11 here; a wrong term or order is off by more than 1e-3.
FP64: dict[str, Any] = dict(rtol=1e-8, atol=1e-10)


def make_method(dtype: torch.dtype = torch.float64, backend: Backend = "auto", **objective: object) -> MNCLGLF:
    settings = ObjectiveConfig(**{"queue_size": K, "temperature": 0.5, "ema_momentum": 0.9, **objective})
    return MNCLGLF(MODEL, settings, queue_dtype=dtype, backend=backend).to(dtype).train()


def make_oracle(method: MNCLGLF) -> oracles.Algorithm1:
    settings = method.objective
    return oracles.Algorithm1(
        method.encoder,
        method.projector,
        method.predictor,
        method.queue.rows,
        temperature=settings.temperature,
        ema_momentum=settings.ema_momentum,
        lambda_=settings.lambda_,
        k=settings.k,
        lr=OPTIM.lr,
        sgd_momentum=OPTIM.sgd_momentum,
        weight_decay=OPTIM.weight_decay,
    )


def make_batch(dtype: torch.dtype = torch.float64, first: int = 0) -> Batch:
    return Batch(torch.randn(3 * N, 3, SIDE, SIDE, dtype=dtype), torch.arange(first, first + N))


class Stepper:
    """Our step, which counts itself."""

    def __init__(self, method: Method, dtype: torch.dtype = torch.float32, optim: OptimConfig = OPTIM) -> None:
        self.method, self.number = method, 0
        labels = torch.arange(1000) % CLASSES
        self.step = TrainStep(method, optim, EngineConfig(channels_last=False), dtype, labels=labels)
        self.optimizer, self.guard = self.step.optimizer, self.step.guard

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        losses, _ = self.step(self.number, batch, lr=OPTIM.lr, momentum=self.method.objective.ema_momentum)
        self.number += 1
        return {"loss": losses.total, **losses.terms}


def oracle_state(oracle: oracles.Algorithm1) -> dict[str, Tensor]:
    """Weights and running statistics of f_o and f_m under our names."""
    state = dict(oracle.f_o.state_dict())
    for name, value in oracle.f_m.state_dict().items():
        head, rest = name.split(".", 1)
        state[f"momentum.{'0' if head == 'encoder' else '1'}.{rest}"] = value
    return state


def assert_same_state(method: MNCLGLF, oracle: oracles.Algorithm1) -> None:
    expected = oracle_state(oracle)
    ours = {name: value for name, value in method.state_dict().items() if not name.startswith("queue.")}
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], **FP64, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(method.queue.rows, oracle.queue, **FP64)
    assert method.queue.pointer.item() == oracle.pointer


def compare(method: MNCLGLF, steps: int = 5) -> None:
    ours, oracle = Stepper(method), make_oracle(method)
    for step in range(steps):
        batch = make_batch(first=step * N)
        subset = None
        if method.objective.one_embedding:
            with torch.random.fork_rng():
                subset = int(torch.randint(6, (1,)))
        losses = ours(batch)
        expected = oracle.step(*batch.each(), subset=subset)
        for name, value in losses.items():
            assert value.item() == pytest.approx(expected[name], rel=FP64["rtol"]), f"{name} of step {step}"
        assert_same_state(method, oracle)


def test_five_steps_equal_algorithm_1_in_fp64() -> None:
    compare(make_method())


def test_fp32_steps_are_as_accurate_as_algorithm_1_in_fp32() -> None:
    method = make_method(torch.float32)
    truth, plain, ours = make_oracle(copy.deepcopy(method).double()), make_oracle(method), Stepper(method)
    for step in range(2):
        batch = make_batch(torch.float32, first=step * N)
        ours(batch)
        plain.step(*batch.each())
        truth.step(*(view.double() for view in batch.each()))
    true_state, plain_state = oracle_state(truth), oracle_state(plain)

    def error(state: dict[str, Tensor]) -> float:
        return max((state[name] - value).abs().max().item() for name, value in true_state.items())

    # Two roundings of one computation through 30 batch norms of a few rows: the same error within a factor of 4. The
    # floor, some roundings of fp32 at 1.0, counts only where plain fp32 happens to be exact.
    assert error(dict(method.state_dict())) <= 4 * error(plain_state) + 1e-6


@pytest.mark.parametrize(
    "setting",
    [
        {"k": 1},
        {"k": 3},
        {"k": 4},
        {"lambda_": 2.0},
        {"lambda_": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.05},
        {"ema_momentum": 0.0},
        {"ema_momentum": 1.0},
        {"queue_size": N},
        {"one_embedding": True},
    ],
    ids=lambda setting: "-".join(f"{name}={value}" for name, value in setting.items()),
)
def test_settings_equal_algorithm_1(setting: dict[str, Any]) -> None:
    compare(make_method(**setting), steps=3)


def test_one_embedding_draws_every_combination() -> None:
    method = make_method(one_embedding=True)
    x1, _, x3 = make_batch().each()
    with torch.no_grad():
        drawn = {round(method.stop_gradient_network(x1, x3)[0].sum().item(), 9) for _ in range(80)}
    assert len(drawn) == 6  # C(4, 2); the chance of missing one in 80 draws is below 3e-6


def test_queue_takes_in_the_momentum_projection_of_view_1_from_before_the_lookup() -> None:
    method = make_method()
    batch, before = make_batch(first=40), copy.deepcopy(method)
    Stepper(method)(batch)
    with torch.no_grad():
        z1 = before.momentum(batch.each()[0])  # the momentum weights as they stood before this step's update
    torch.testing.assert_close(method.queue.rows[:N], F.normalize(z1), **FP64)
    torch.testing.assert_close(method.queue.rows[N:], before.queue.rows[N:], rtol=0, atol=0)
    assert method.queue.sources.tolist() == [*range(40, 40 + N), *[-1] * (K - N)]
    assert method.queue.pointer.item() == N


def test_neighbors_are_those_of_view_1_as_images() -> None:
    method = make_method(queue_size=N)
    Stepper(method)(make_batch(first=100))
    batch = make_batch()  # images that the queue does not hold
    with torch.no_grad():
        losses = method(batch.views)
        z1 = method.momentum(batch.each()[0])
    nearest = (F.normalize(z1) @ method.queue.rows.T).argmax(dim=1)
    assert losses.neighbors is not None
    assert losses.neighbors.tolist() == (100 + nearest).tolist()


def test_stop_gradient_network_leaves_the_online_running_statistics() -> None:
    method = make_method()
    x1, _, x3 = make_batch().each()
    before = {name: buffer.clone() for name, buffer in method.encoder.named_buffers()}
    with torch.no_grad():
        c1, _ = method.stop_gradient_network(x1, x3)
    for name, buffer in method.encoder.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
    # Normalised by the joint statistics of all S * N rows: every column has mean 0, a split's columns have not.
    assert c1.mean(dim=0).abs().max() < 1e-12
    assert c1[:N].mean(dim=0).abs().max() > 1e-3


def test_online_batch_statistics_are_per_view() -> None:
    method = make_method()
    batch = make_batch()
    views, shifted = batch.views, batch.views.clone()
    shifted[N : 2 * N] += 3.0
    first, second = method(views).features, method(shifted).features
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # view 1's features do not see view 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("term", ["loss_s", "loss_m"])
def test_every_term_trains_encoder_and_heads(term: str, dtype: torch.dtype) -> None:
    method = make_method(torch.float32)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        losses = method(make_batch(torch.float32).views)
    losses.terms[term].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("momentum."):
            assert parameter.grad is None, f"{name} must have no gradient"
        else:
            assert parameter.grad is not None, f"{term} gives {name} no gradient"
            assert parameter.grad.abs().max() > 0, f"{term} gives {name} a zero gradient"


def test_momentum_network_follows_after_the_optimizer_step() -> None:
    method = make_method(ema_momentum=0.75)
    follower = method.momentum.get_parameter("0.conv1.weight")
    before = follower.clone()
    Stepper(method)(make_batch())
    after_step = method.get_parameter("encoder.conv1.weight").detach()
    assert not torch.equal(after_step, before)
    torch.testing.assert_close(follower, 0.75 * before + 0.25 * after_step, **FP64)


def state_of(stepper: Stepper) -> dict[str, Tensor]:
    """Everything that must not take in a non-finite value: weights, moving average, queue, the optimizer's momentum."""
    method = stepper.method
    state = {name: value.clone() for name, value in method.named_parameters()}
    state |= {f"queue.{name}": value.clone() for name, value in method.queue.named_buffers()}
    for index, entry in enumerate(stepper.optimizer.state.values()):
        state[f"velocity.{index}"] = entry["momentum_buffer"].clone()
    return state


def assert_unchanged(stepper: Stepper, before: dict[str, Tensor]) -> None:
    for name, value in state_of(stepper).items():
        assert torch.equal(value, before[name]), f"{name} changed"


def test_nothing_is_kept_of_a_non_finite_step_or_any_after_it() -> None:
    stepper = Stepper(make_method())
    stepper(make_batch())
    before = state_of(stepper)
    broken = make_batch()
    broken.each()[1][2, 0, 3, 3] = torch.nan
    stepper(broken)
    stepper(make_batch())  # the host has not looked yet
    assert_unchanged(stepper, before)
    with pytest.raises(NonFiniteError, match="step 1: loss_m, gradient, keys not finite") as caught:
        stepper.guard.raise_if_failed()
    assert (caught.value.step, caught.value.terms) == (1, ["loss_m", "gradient", "keys"])


def test_non_finite_keys_with_finite_losses_are_kept_out_of_the_queue() -> None:
    stepper = Stepper(make_method())
    last = batch_norms(stepper.method.momentum)[-1]
    last.bias.data[3] = torch.nan  # every score is NaN, so every neighbor is row 0 and the losses are finite
    before_rows = stepper.method.queue.rows.clone()
    losses = stepper(make_batch())
    assert all(value.isfinite() for value in losses.values())
    assert torch.equal(stepper.method.queue.rows, before_rows)
    with pytest.raises(NonFiniteError, match="step 0: keys not finite"):
        stepper.guard.raise_if_failed()


def test_a_non_finite_second_momentum_embedding_is_found() -> None:
    stepper, batch = Stepper(make_method()), make_batch()
    forward = stepper.method.momentum.forward
    second = torch.tensor([1.0, torch.nan]).repeat_interleave(N)[:, None]
    stepper.method.momentum.forward = lambda x, views: forward(x, views) * second
    assert all(value.isfinite() for value in stepper(batch).values())
    with pytest.raises(NonFiniteError, match="step 0: keys not finite"):
        stepper.guard.raise_if_failed()


def test_every_operator_gets_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    modules = ("divide", "combine", "contrastive_losses", "nearest_neighbor", "enqueue")
    for module in modules:

        def record(backend: str, *tensors: Tensor, module: str = module, kind: str = "") -> str:
            asked.append((module, backend))
            return backend

        monkeypatch.setattr(f"mnclglf_kernels.ops.{module}.resolve", record)
    method = MNCLGLF(MODEL, ObjectiveConfig(queue_size=K), queue_dtype=torch.float64, backend="torch").double()
    Stepper(method)(make_batch())
    counts = {module: sum(name == module for name, _ in asked) for module in modules}
    assert counts == {"divide": 2, "combine": 2, "contrastive_losses": 1, "nearest_neighbor": 1, "enqueue": 1}
    assert {backend for _, backend in asked} == {"torch"}


def test_faiss_looks_up_and_the_other_operators_choose_for_themselves() -> None:
    faiss, torch_only = (make_method(torch.float32, backend=backend) for backend in ("faiss", "torch"))
    assert faiss.backends == Backends.all("auto")._replace(nearest_neighbor="faiss")
    faiss.load_state_dict(torch_only.state_dict())
    batch = make_batch(torch.float32)
    losses, expected = Stepper(faiss)(batch), Stepper(torch_only)(batch)
    assert torch.equal(losses["loss"], expected["loss"])  # the same neighbors, and the rest is the same code


def test_good_steps_pass_the_guard() -> None:
    stepper = Stepper(make_method())
    for _ in range(3):
        stepper(make_batch())
    stepper.guard.raise_if_failed()
