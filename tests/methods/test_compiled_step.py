"""The whole step compiled into one graph, and the whole step with every operator interpreted."""

import copy

import pytest
import torch
from methods.test_mnclglf import N, Stepper, make_batch, make_method, make_oracle, oracle_state
from torch import Tensor, nn
from torch._inductor import config as inductor

from mnclglf.config import ModelConfig
from mnclglf.methods import MNCLGLF
from mnclglf.models.batch_norm import BatchNorm, Stack, without_batch_counters
from mnclglf_kernels import Backend

BACKENDS = ["torch", "triton"]


class TinyEncoder(Stack):
    """One convolution in place of a ResNet-18, whose graph costs Inductor minutes."""

    features = 8

    def __init__(self, model: ModelConfig) -> None:
        norm = BatchNorm(8)
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        without_batch_counters(self)


def two_steps(method: MNCLGLF, compiler: str | None) -> list[Tensor]:
    """Loss and gradients of each step, then queue, pointer and moving average, whose update is a call of its own."""
    forward = method.forward if compiler is None else torch.compile(method.forward, fullgraph=True, backend=compiler)
    results: list[Tensor] = []
    torch.manual_seed(11)
    for step in range(2):
        batch = make_batch(torch.float32, first=step * N)
        losses = forward(batch.views)
        losses.total.backward()
        assert losses.neighbors is not None
        results += [losses.total.detach(), losses.neighbors.clone()]
        with torch.no_grad():
            for parameter in method.trained_parameters():
                assert parameter.grad is not None
                results.append(parameter.grad)
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        method.after_step(losses, batch.indices, momentum=0.5, should_update=torch.tensor(True))
    return results + [value.clone() for value in method.state_dict().values()]


def assert_compiled_equals_eager(backend: Backend, compiler: str) -> None:
    torch._dynamo.reset()
    method = make_method(torch.float32, backend=backend)
    expected, compiled = two_steps(copy.deepcopy(method), None), two_steps(copy.deepcopy(method), compiler)
    largest = max(value.abs().max().item() for value in expected if value.is_floating_point())
    for result, reference in zip(compiled, expected, strict=True):
        # fp32 sums in another order, through batch norms of six rows and an update: relative to the largest gradient,
        # of which that was up to 3e-5; a queue that is written before the lookup makes 0.4 of it.
        torch.testing.assert_close(result, reference, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_one_graph(backend):
    assert_compiled_equals_eager(backend, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor_keeps_queue_and_gradients(backend, monkeypatch):
    """torch 2.14's Inductor drops `queue.clone()` before an enqueue in one graph, and gradients are silently wrong."""
    monkeypatch.setattr("mnclglf.methods.base.make_encoder", TinyEncoder)
    with inductor.patch(force_disable_caches=True):
        assert_compiled_equals_eager(backend, "inductor")


@pytest.mark.slow
def test_interpreted_steps_are_as_accurate_as_algorithm_1_in_fp32():
    method = make_method(torch.float32, backend="triton")
    truth, plain, ours = make_oracle(copy.deepcopy(method).double()), make_oracle(method), Stepper(method)
    for step in range(3):
        batch = make_batch(torch.float32, first=step * N)
        losses = ours(batch)
        plain_losses, true_losses = plain.step(*batch.each()), truth.step(*(view.double() for view in batch.each()))
        # The worst of the losses: through batch norms of six rows, one of plain fp32 may be near the truth by chance.
        # PyTorch sums batch norms in fp64 on a CPU, the kernels in fp32.
        found = {name: value.item() for name, value in losses.items()}
        error, plain_error = (max(abs(x[name] - true_losses[name]) for name in found) for x in (found, plain_losses))
        assert error <= 4 * plain_error + 1e-5 * max(true_losses[name] for name in found), f"step {step}"
    true_state, plain_state = oracle_state(truth), oracle_state(plain)

    def error_of(state: dict[str, Tensor]) -> float:
        return max((state[name] - value).abs().max().item() for name, value in true_state.items())

    # Two roundings of one computation through 30 batch norms of six rows: the same error within a factor of 4. The
    # floor, some roundings of fp32 at 1.0, counts only where plain fp32 happens to be exact.
    assert error_of(dict(method.state_dict())) <= 4 * error_of(plain_state) + 1e-6
    torch.testing.assert_close(method.queue.rows.double(), truth.queue, rtol=0, atol=4 * error_of(plain_state) + 1e-6)
    assert method.queue.pointer.item() == truth.pointer
