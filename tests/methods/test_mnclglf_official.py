"""The released code's MNCLGLF against a transcription of what that code computes, and each departure on its own."""

import copy
from dataclasses import replace
from typing import Any

import method_oracles
import pytest
import torch
import torch.nn.functional as F
from method_steps import FP64, OPTIM, K, N, Stepper, compare, gradients_of_views, make_batch, make_method
from method_steps import make_oracle as make_transcription
from torch import Tensor
from torchvision.models.resnet import BasicBlock

from mnclglf.config import OptimConfig
from mnclglf.data.loader import Batch
from mnclglf.methods import MNCLGLFOfficial
from mnclglf.models.batch_norm import batch_norms

CLIPPED = replace(OPTIM, clip_norm=1.0)


def make_oracle(method: MNCLGLFOfficial, optim: OptimConfig) -> method_oracles.Transcription:
    oracle = make_transcription(method_oracles.MNCLGLFOfficial, method, optim)
    for ours, network in zip(method.momentum.children(), oracle.f_m.values(), strict=True):
        network.load_state_dict(ours.state_dict())
    return oracle


@pytest.mark.parametrize("optim", [OPTIM, CLIPPED], ids=["unclipped", "clipped at 1"])
def test_five_steps_equal_the_released_code_s_in_fp64(optim: OptimConfig) -> None:
    method = make_method(MNCLGLFOfficial)
    compare(method, make_oracle(method, optim), optim=optim)


@pytest.mark.parametrize(
    "setting", [{"k": 1}, {"k": 3}, {"temperature": 1.0}, {"lambda_": 2.0}, {"queue_size": N}], ids=str
)
def test_settings_equal_the_released_code_s(setting: dict[str, Any]) -> None:
    method = make_method(MNCLGLFOfficial, **setting)
    compare(method, make_oracle(method, OPTIM), steps=2)


def test_weights_start_as_in_the_released_code() -> None:
    method = make_method(MNCLGLFOfficial, torch.float32)
    momentum_encoder, momentum_projector = method.momentum.children()
    online, follower = dict(method.encoder.named_parameters()), dict(momentum_encoder.named_parameters())
    convolutions = [name for name, weight in online.items() if weight.dim() == 4]
    assert not any(torch.equal(online[name], follower[name]) for name in convolutions)
    first = "0.weight"
    assert not torch.equal(method.projector.get_parameter(first), momentum_projector.get_parameter(first))
    for head in (method.projector, method.predictor, momentum_projector):
        for layer in batch_norms(head):
            assert 0 <= layer.weight.min() < 0.4  # the chance of no draw of twelve below it is 0.6^12, 0.2%
            assert 0.6 < layer.weight.max() < 1
            assert not layer.bias.any()
    blocks = [module for module in method.modules() if isinstance(module, BasicBlock)]
    assert len(blocks) == 2 * 8
    assert not any(block.get_parameter("bn2.weight").any() for block in blocks)
    assert all((block.get_parameter("bn1.weight") == 1).all() for block in blocks)


def after_a_step(first: int = 0) -> tuple[MNCLGLFOfficial, Batch]:
    """A method that has made a step, so that its residual blocks do something, and the next batch."""
    method = make_method(MNCLGLFOfficial)
    Stepper(method)(make_batch(first=first, views=3))
    return method, make_batch(first=first + N, views=3)


def test_only_loss_m_has_a_gradient_and_view_2_none() -> None:
    method, batch = after_a_step()
    losses = method(batch.views.requires_grad_())
    assert not losses.terms["loss_s"].requires_grad
    first, second, third = gradients_of_views(losses.terms["loss_m"], batch)
    assert first.abs().max() > 0
    assert not second.any()
    assert third.abs().max() > 0


def test_the_queue_takes_in_the_momentum_projection_of_view_3() -> None:
    method, batch = after_a_step(first=40)
    before = copy.deepcopy(method)
    losses = Stepper(method)(batch)
    assert all(value.isfinite() for value in losses.values())
    with torch.no_grad():
        z3 = before.momentum(batch.each()[2])
    torch.testing.assert_close(method.queue.rows[N : 2 * N], F.normalize(z3), **FP64)
    assert method.queue.sources.tolist() == [*range(40, 40 + 2 * N), *[-1] * (K - 2 * N)]


def test_neighbors_are_those_of_view_3_as_images() -> None:
    method = make_method(MNCLGLFOfficial, queue_size=N)
    batch = make_batch(first=100, views=3)
    Stepper(method)(batch)
    before = copy.deepcopy(method)
    with torch.no_grad():
        losses = method(batch.views)
        z3 = before.momentum(batch.each()[2])
    nearest = (F.normalize(z3) @ method.queue.rows.T).argmax(dim=1)
    assert losses.neighbors.tolist() == (100 + nearest).tolist()


def test_patches_move_the_online_running_statistics() -> None:
    method, batch = after_a_step()
    x1, x2, _ = batch.each()
    before = {name: buffer.clone() for name, buffer in method.encoder.named_buffers()}
    with torch.no_grad():
        p1, p2 = (method.predictor(method.projector(method.encoder(x))) for x in (x1, x2))
        moved = {name: buffer.clone() for name, buffer in method.encoder.named_buffers()}
        method.local_loss(x1, x2, p1, p2)
    for name, buffer in method.encoder.named_buffers():
        assert not torch.equal(buffer, before[name])
        assert not torch.equal(buffer, moved[name])


def test_every_operator_gets_the_chosen_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    for module in ("divide", "combine", "contrastive_losses", "nearest_neighbor", "enqueue"):

        def record(backend: str, *tensors: Tensor, module: str = module, kind: str = "") -> str:
            asked.append((module, backend))
            return backend

        monkeypatch.setattr(f"mnclglf_kernels.ops.{module}.resolve", record)
    Stepper(make_method(MNCLGLFOfficial, backend="torch"))(make_batch(views=3))
    counts = {"combine": 2, "contrastive_losses": 1, "divide": 2, "enqueue": 1, "nearest_neighbor": 1}
    assert sorted(asked) == [(name, "torch") for name, count in counts.items() for _ in range(count)]
