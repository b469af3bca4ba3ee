"""MoCo v2 against a literal transcription of MoCo's Algorithm 1."""

import copy
from typing import Any

import method_oracles
import pytest
import torch
import torch.nn.functional as F
from method_steps import FP64, K, N, Stepper, compare, gradients_of_views, make_batch, make_method, make_oracle
from torch import Tensor

from mnclglf.methods import MoCoV2


def test_five_steps_equal_algorithm_1_in_fp64() -> None:
    method = make_method(MoCoV2)
    compare(method, make_oracle(method_oracles.MoCoV2, method))


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.05}, {"ema_momentum": 0.0}, {"ema_momentum": 1.0}, {"queue_size": N}], ids=str
)
def test_settings_equal_algorithm_1(setting: dict[str, Any]) -> None:
    method = make_method(MoCoV2, **setting)
    compare(method, make_oracle(method_oracles.MoCoV2, method), steps=2)


def test_the_queue_takes_in_the_keys_of_view_2() -> None:
    method, batch = make_method(MoCoV2), make_batch(first=40)
    before = copy.deepcopy(method)
    Stepper(method)(batch)
    with torch.no_grad():
        k = before.momentum(batch.each()[1])  # the momentum weights as they stood before this step's update
    torch.testing.assert_close(method.queue.rows[:N], F.normalize(k), **FP64)
    torch.testing.assert_close(method.queue.rows[N:], before.queue.rows[N:], rtol=0, atol=0)
    assert method.queue.sources.tolist() == [*range(40, 40 + N), *[-1] * (K - N)]
    assert method.queue_fill() == pytest.approx(N / K)


def test_a_gradient_reaches_the_query_only() -> None:
    method, batch = make_method(MoCoV2), make_batch()
    losses = method(batch.views.requires_grad_())
    assert losses.keys is not None
    assert not losses.keys.requires_grad
    query, key = gradients_of_views(losses.total, batch)
    assert query.abs().max() > 0
    assert not key.any()


def test_every_operator_gets_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    for module in ("enqueue", "queue_contrastive_loss"):

        def record(backend: str, *tensors: Tensor, module: str = module, kind: str = "") -> str:
            asked.append((module, backend))
            return backend

        monkeypatch.setattr(f"mnclglf_kernels.ops.{module}.resolve", record)
    Stepper(make_method(MoCoV2, backend="torch"))(make_batch())
    assert sorted(asked) == [("enqueue", "torch"), ("queue_contrastive_loss", "torch")]
