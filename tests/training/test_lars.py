"""Tests of LARS against its paper in numpy, and against torch's SGD on gradients scaled by hand."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor

from mnclglf.training.lars import LARS

TRUST = 0.001


def local_rate(weight: NDArray, gradient: NDArray, decay: float, trust: float) -> float:
    """You et al. 2017, equation 6; 1 if a norm is 0."""
    norm, gradient_norm = math.sqrt((weight**2).sum()), math.sqrt((gradient**2).sum())
    return 1.0 if norm == 0 or gradient_norm == 0 else trust * norm / (gradient_norm + decay * norm)


def algorithm_1(
    weight: NDArray, gradients: list[NDArray], lr: float, momentum: float, decay: float, trust: float
) -> NDArray:
    """You et al. 2017, Algorithm 1, for one layer, with a constant global rate, in fp64."""
    w = weight.astype(np.float64)
    v = np.zeros_like(w)
    for gradient in gradients:
        g = gradient.astype(np.float64)
        v = momentum * v + lr * local_rate(w, g, decay, trust) * (g + decay * w)
        w = w - v
    return w


def drawn(seed: int, steps: int, *shapes: tuple[int, ...]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Draws fp64 weights, and gradients [step][weight], of very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [draw(shape, 10.0**i) for i, shape in enumerate(shapes)]
    return weights, [[draw(shape, 0.1**i) for i, shape in enumerate(shapes)] for _ in range(steps)]


def trained(
    weights: list[Tensor], gradients: list[list[Tensor]], rates: list[float], **settings: float
) -> list[Tensor]:
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = LARS(parameters, lr=99.0, **settings)
    for step, rate in zip(gradients, rates, strict=True):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for parameter, gradient in zip(parameters, step, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)
    return [parameter.detach() for parameter in parameters]


@given(
    seed=st.integers(0, 999),
    momentum=st.sampled_from([0.0, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    trust=st.sampled_from([TRUST, 0.02]),
    rows=st.integers(1, 4),
)
def test_agrees_with_algorithm_1(seed: int, momentum: float, decay: float, trust: float, rows: int):
    weights, gradients = drawn(seed, 6, (rows, 3), (rows,))  # a layer's weight and its bias
    results = trained(weights, gradients, [0.8] * 6, momentum=momentum, weight_decay=decay, trust_coefficient=trust)
    for index, result in enumerate(results):
        own = [step[index].numpy() for step in gradients]
        expected = algorithm_1(weights[index].numpy(), own, 0.8, momentum, decay, trust)
        np.testing.assert_allclose(result, expected, rtol=1e-12)  # fp64: six steps of a few roundings of 1e-16


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_changing_rate_multiplies_the_momentum_as_in_sgd(decay: float):
    (weight,), gradients = drawn(3, 8, (4, 3))
    rates = [0.8 * math.cos(step / 8) for step in range(8)]
    sgd_weight = torch.nn.Parameter(weight.clone())
    sgd = torch.optim.SGD([sgd_weight], lr=1.0, momentum=0.9)
    for (gradient,), rate in zip(gradients, rates, strict=True):
        ratio = local_rate(sgd_weight.detach().numpy(), gradient.numpy(), decay, TRUST)
        sgd_weight.grad = ratio * (gradient + decay * sgd_weight.detach())
        sgd.param_groups[0]["lr"] = rate
        sgd.step()
    (result,) = trained([weight], gradients, rates, momentum=0.9, weight_decay=decay)
    torch.testing.assert_close(result, sgd_weight.detach(), rtol=1e-12, atol=0)


def test_without_weight_decay_a_step_is_a_share_of_the_weight():
    weights, gradients = drawn(1, 1, (5, 3), (5,))
    for weight, result in zip(weights, trained(weights, gradients, [0.8]), strict=True):
        assert (result - weight).norm() / weight.norm() == pytest.approx(0.8 * TRUST, rel=1e-9)


def test_what_has_no_norm_takes_a_plain_step():
    gradient = torch.tensor([3.0, -4.0])
    (from_zero,) = trained([torch.zeros(2)], [[gradient]], [0.5])
    torch.testing.assert_close(from_zero, -0.5 * gradient)
    (still,) = trained([gradient], [[torch.zeros(2)]], [0.5])
    assert torch.equal(still, gradient)


def test_a_weight_without_a_gradient_stays():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    LARS([used, unused], lr=0.8).step()
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


def test_a_step_asks_the_device_for_no_value():
    weight = torch.nn.Parameter(torch.empty(4, 3, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = LARS([weight], lr=0.8)
    for _ in range(2):
        optimizer.step()  # on the meta device, reading a value raises
    with pytest.raises(RuntimeError, match="meta"):
        weight.norm().item()
