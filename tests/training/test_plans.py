"""Tests of the proof of cuDNN's plans: which convolutions a step has, and what is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mnclglf.config import HalfSums, ModelConfig, ObjectiveConfig
from mnclglf.methods import METHODS, Method
from mnclglf.training.plans import convolutions_of, prove_plans

N, SIDE = 4, 16


def make(name: str) -> Method:
    model = ModelConfig(width=8, projector_width=16, predictor_width=8, classes=3)
    return METHODS[name](model, ObjectiveConfig(queue_size=16)).train()


def views_of(method: Method) -> torch.Tensor:
    return torch.randn(method.views * N, 3, SIDE, SIDE)


@pytest.mark.parametrize("name", METHODS)
def test_only_methods_that_say_so_have_forwards_without_gradient(name: str) -> None:
    method = make(name)
    found = convolutions_of(method, views_of(method))
    assert any(x.has_gradient for x in found)
    assert any(not x.has_gradient for x in found) == method.without_gradient


def test_the_convolutions_of_a_step_are_found_with_their_views() -> None:
    method = make("mnclglf")
    before = {name: x.clone() for name, x in method.state_dict().items()}
    found = convolutions_of(method, views_of(method))
    stems = [(x.x, x.views, x.has_gradient) for x in found if x.x[1] == 3]
    assert stems == [
        ((3 * N, 3, SIDE, SIDE), 3, True),
        ((2 * N, 3, SIDE, SIDE), 2, False),  # momentum network
        ((8 * N, 3, SIDE // 2, SIDE // 2), 2, False),  # patches of two views
    ]
    first = [x for x in found if x.weight == (8, 8, 3, 3) and not x.has_gradient and x.x[2] == SIDE]
    assert [x.follows for x in first] == [False, True]
    assert {(x.stride, x.padding) for x in found if x.weight[2] == 1} == {(2, 0)}
    assert all(x.device.type == "cpu" for x in method.parameters())
    for key, x in method.state_dict().items():
        assert torch.equal(x, before[key]), key


@pytest.mark.parametrize(
    ("without_gradient", "online", "kinds"),
    [
        (True, "off", {(False, False), (True, False)}),
        (False, "forward", {(False, False)}),
        (False, "input-gradient", {(False, True)}),
        (False, "both", {(False, False), (False, True)}),
        (False, "off", set()),
    ],
)
def test_what_is_used_is_compared(without_gradient: bool, online: HalfSums, kinds: set[tuple[bool, bool]]) -> None:
    method, said = make("byol"), list[str]()
    asked: list[tuple[Any, dict[str, Any]]] = []

    def problem_of(x: Any, weight: Any, dtype: torch.dtype, device: torch.device, **how: Any) -> str | None:
        assert (dtype, device.type, how["half_sums"]) == (torch.float16, "cpu", True)
        asked.append((x, how))
        return "y is off by 3" if weight[1] == 3 else None

    prove_plans(
        method,
        views_of(method),
        without_gradient=without_gradient,
        online=online,
        say=said.append,
        problem_of=problem_of,
    )
    assert {(how.get("prologue", False), how.get("gradient", False)) for _, how in asked} == kinds
    images = {x[0] for x, _ in asked}
    assert images == ({N} if without_gradient else {2 * N} if kinds else set())
    stems = 0 if not kinds else 2 if online == "both" else 1
    assert len([line for line in said if "4 x 3" in line or "8 x 3" in line]) == len(said) == stems
    assert all("y is off by 3" in line for line in said)
