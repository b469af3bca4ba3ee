"""Encoders of timm against timm's own networks, one forward per view."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any, cast

import pytest
import timm
import torch
from models.test_encoder import TOLERANCE, states_of, train
from timm.layers.drop import DropPath
from timm.layers.evo_norm import EvoNorm2dB0
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from mnclglf.config import (
    METHOD_NAMES,
    EngineConfig,
    MethodName,
    ModelConfig,
    OptimConfig,
    RunConfig,
    UsageError,
)
from mnclglf.models.batch_norm import Views, batch_statistics_only
from mnclglf.models.encoder import check_sides, make_encoder
from mnclglf.models.momentum import momentum_copy
from mnclglf.models.timm_encoder import InBatch, PerViewBatchNorm, TimmEncoder, check_norms, check_random
from mnclglf.training.memory import step_memory
from mnclglf.training.roofline import step_parts
from mnclglf.training.start import build_method

# Batch norm, and batch norm with an activation.
WITH_BATCH_NORM = pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
EVERY = pytest.mark.parametrize("name", METHOD_NAMES)


def pair(name: str) -> tuple[TimmEncoder, nn.Module]:
    """Returns an encoder of ours and timm's network with the same weights, in fp64 and train mode."""
    torch.manual_seed(0)
    ours, reference = TimmEncoder(name), timm.create_model(name, num_classes=0)
    reference.load_state_dict({**reference.state_dict(), **ours.network.state_dict()})
    return ours.double().train(), reference.double().train()


@WITH_BATCH_NORM
def test_views_in_one_batch_are_separate_passes_of_timm_s_network(name: str) -> None:
    ours, reference = pair(name)
    images = torch.randn(9, 3, 32, 32, dtype=torch.float64)
    expected = torch.cat([reference(view) for view in images.chunk(3)])
    ways = torch.randn_like(expected)
    found = ours(images, 3)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    torch.testing.assert_close(states_of(ours.network), states_of(reference), **TOLERANCE)  # running statistics
    for result in (found, expected):
        (result * ways).sum().backward()
    for (path, x), y in zip(ours.network.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-8, msg=path)  # through 1 / sqrt(var)
    torch.testing.assert_close(ours.eval()(images, 3), reference.eval()(images), **TOLERANCE)


def test_views_in_two_batches_leave_the_statistics_of_separate_passes_in_order() -> None:
    ours, reference = pair("test_resnet")
    x1, x2, x3 = torch.randn(9, 3, 32, 32, dtype=torch.float64).chunk(3)
    for view in (x1, x2, x3):
        reference(view)
    ours(torch.cat([x1, x3]), Views(after=(2, 0), decays=3))
    ours(x2, Views(after=(1,), decays=0))
    torch.testing.assert_close(states_of(ours.network), states_of(reference), **TOLERANCE)


def test_no_running_statistic_changes_where_none_is_tracked() -> None:
    ours, reference = pair("test_efficientnet")
    with batch_statistics_only(ours):
        ours(torch.randn(4, 3, 32, 32, dtype=torch.float64), 2)
    torch.testing.assert_close(states_of(ours.network), states_of(reference), rtol=0, atol=0)


def test_a_momentum_copy_has_views_of_its_own() -> None:
    ours, _ = pair("test_efficientnet")
    follower = momentum_copy(ours)
    follower(torch.randn(4, 3, 32, 32, dtype=torch.float64), 2)
    assert isinstance(follower, TimmEncoder)
    assert (follower.batch.views, ours.batch.views) == (2, 1)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_networks_of_layer_norms_are_timm_s(name: str) -> None:
    ours, reference = pair(name)
    side = 160 if name == "test_vit" else 64  # the position embeddings are of 160
    images = torch.randn(4, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(ours(images, 2), reference(images), **TOLERANCE)


def test_position_embeddings_are_interpolated_as_timm_does_for_a_model_of_that_size() -> None:
    ours, _ = pair("test_vit")
    assert ours.interpolates
    reference = timm.create_model("test_vit", num_classes=0, img_size=64).double().eval()
    load_state = cast(Any, timm.models.vision_transformer.checkpoint_filter_fn)  # what timm loads pretrained weights by
    reference.load_state_dict(load_state(dict(ours.network.state_dict()), reference))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(images), reference(images), rtol=1e-5, atol=1e-5)  # interpolated in fp32


def test_a_batch_norm_of_tokens_takes_statistics_per_view() -> None:
    reference = nn.BatchNorm1d(5).double().train()
    ours = PerViewBatchNorm(nn.BatchNorm1d(5), InBatch()).double().train()
    ours.batch.views = 2
    for shape in ((6, 5), (6, 5, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x), torch.cat([reference(view) for view in x.chunk(2)]), **TOLERANCE)
    torch.testing.assert_close(ours.running_var, reference.running_var, **TOLERANCE)


def test_the_activation_of_a_batch_norm_is_kept() -> None:
    layer = BatchNormAct2d(4, act_layer=nn.SiLU)
    x = torch.randn(4, 4, 3, 3)
    torch.testing.assert_close(PerViewBatchNorm(cast(Any, layer), InBatch())(x), layer(x))


class Odd(nn.Module):
    """A layer with running statistics that is no batch norm of torch or timm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.ones(3))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.SyncBatchNorm(4), "SyncBatchNorm"),
        (nn.BatchNorm2d(4, affine=False), "BatchNorm2d"),
        (nn.BatchNorm2d(4, momentum=None), "BatchNorm2d"),
        (BatchNormAct2d(4, drop_layer=nn.Dropout), "BatchNormAct2d"),
        (Odd(), "Odd"),
    ],
)
def test_a_norm_that_cannot_take_views_is_named(layer: nn.Module, kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(layer))
    with pytest.raises(UsageError, match=rf"timm:x.* 1\.0, a {kind}.*take a model"):
        check_norms("timm:x", network)


def test_an_evo_norm_of_timm_is_refused() -> None:
    with pytest.raises(UsageError, match="EvoNorm2dB0"):
        check_norms("timm:x", nn.Sequential(EvoNorm2dB0(4)))


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), DropPath(0.2)])
def test_a_layer_that_draws_random_numbers_is_named(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match=rf"layer 0, a {type(layer).__name__} of .*0\.[12].*take another model"):
        check_random("timm:x", nn.Sequential(layer))
    check_random("timm:x", nn.Sequential(nn.Dropout(0.0), DropPath(0.0)))


@pytest.mark.parametrize(
    ("name", "sides", "fault"),
    [
        ("convnext_tiny", {"views": 32, "patches": 16}, "patches of side 16"),  # four stages of stride 2 after one of 4
        ("vit_tiny_patch16_224", {"views": 40}, "views of side 40"),  # no multiple of 16
        ("vit_tiny_patch16_224", {"views": 32, "patches": 8}, "patches of side 8"),
        ("mixer_s16_224", {"views": 64}, "views of side 64"),  # its tokens are counted in its weights
    ],
)
def test_a_size_that_a_model_cannot_take_is_named(name: str, sides: dict[str, int], fault: str) -> None:
    with pytest.raises(UsageError, match=rf"timm:{name} cannot take {fault}.*--image-size"):
        check_sides(ModelConfig(encoder=f"timm:{name}"), sides)


@pytest.mark.parametrize(
    ("name", "sides"),
    [("convnext_tiny", {"views": 64, "patches": 32}), ("vit_tiny_patch16_224", {"views": 32, "patches": 16})],
)
def test_sizes_that_a_model_can_take_pass(name: str, sides: dict[str, int]) -> None:
    check_sides(ModelConfig(encoder=f"timm:{name}"), sides)


@pytest.mark.parametrize(
    ("name", "hint"), [("resnet_18", "did you mean.*resnet18"), ("", "list_models"), ("§", "list_m")]
)
def test_an_unknown_model_is_named_with_near_ones(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"timm:{name}: .*{hint}"):
        TimmEncoder(name)


def test_without_timm_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm:resnet18 .*pip install 'mnclglf\[timm\]'"):
        TimmEncoder("resnet18")


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        (dict(engine=EngineConfig(activation_checkpointing=True)), "--activation-checkpointing"),
        (dict(engine=EngineConfig(half_sums="on")), "--half-sums on"),
        (dict(engine=EngineConfig(precision="fp16", half_sums_online="both")), "--half-sums-online both"),
    ],
)
def test_what_only_our_resnets_can_do_is_refused(settings: dict[str, Any], option: str) -> None:
    with pytest.raises(UsageError, match=f"{option} .*timm:test_vit.*leave it out"):
        RunConfig(model=ModelConfig(encoder="timm:test_vit"), **settings)


@EVERY
@pytest.mark.parametrize(("encoder", "side"), [("test_efficientnet", 32), ("test_convnext", 64), ("test_vit", 32)])
def test_every_method_trains_it(name: MethodName, encoder: str, side: int) -> None:
    assert all(torch.tensor(train(name, f"timm:{encoder}", side)).isfinite())


def test_a_step_is_one_graph() -> None:
    torch._dynamo.reset()
    model = ModelConfig(encoder="timm:test_efficientnet", projector_width=8, predictor_width=4)
    method = build_method(RunConfig(method="simsiam", model=model), torch.float32).train()
    twin = copy.deepcopy(method)
    compiled = torch.compile(twin.forward, fullgraph=True, backend="eager")
    for _ in range(2):  # the views that a forward leaves behind make no second graph differ
        views = torch.randn(8, 3, 32, 32)
        torch.testing.assert_close(compiled(views).total, method(views).total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(twin.state_dict(), method.state_dict(), rtol=1e-5, atol=1e-6)  # fp32 in another order


@pytest.mark.parametrize("encoder", ["resnet50", "timm:test_efficientnet", "timm:test_vit"])
def test_memory_and_roofline_know_it(encoder: str) -> None:
    model = ModelConfig(encoder=encoder, projector_width=8, predictor_width=4)
    config = RunConfig(method="fast_moco", model=model, optim=OptimConfig(batch_size=4))
    weights = sum(x.numel() for x in make_encoder(model).parameters())
    memory = step_memory(config, 4, 32, torch.float32)
    assert memory.gradients > 4 * weights  # and those of the heads
    assert memory.activations > 0
    parts = step_parts(config, 32, "fp32")
    assert parts["optimizer"].unique_bytes > 20 * weights
    one = step_parts(replace(config, optim=OptimConfig(batch_size=2)), 32, "fp32")
    for part in ("convolutions, forward", "matrix products"):  # work is that of the images
        assert parts[part].flops == 2 * one[part].flops > 0
