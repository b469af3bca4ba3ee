"""Tests of the oracle itself, against numbers by hand and against vectorized PyTorch that shares no code with it."""

import itertools
import math
from copy import deepcopy
from typing import Any

import method_oracles
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SETTINGS = {
    "temperature": 0.5,
    "ema_momentum": 0.9,
    "lambda_": 6.0,
    "k": 2,
    "lr": 0.1,
    "sgd_momentum": 0.9,
    "weight_decay": 1e-2,
}


def test_divide_by_hand():
    images = torch.arange(8).reshape(2, 1, 2, 2)
    assert oracles.divide(images).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert oracles.divide(torch.arange(8).reshape(1, 1, 2, 4)).tolist() == [
        [[[0, 1]]],
        [[[2, 3]]],
        [[[4, 5]]],
        [[[6, 7]]],
    ]


def test_combine_by_hand():
    features = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    assert torch.equal(oracles.combine(features, 1), features)
    assert oracles.combine(features, 2).flatten().tolist() == [1.5, 2.5, 4.5, 3.0, 5.0, 6.0]
    assert oracles.combine(features, 3).flatten().tolist() == pytest.approx([7 / 3, 11 / 3, 13 / 3, 14 / 3])
    assert oracles.combine(features, 4).flatten().tolist() == [3.75]
    rows = torch.randn(20, 7, dtype=torch.float64)
    torch.testing.assert_close(oracles.combine(rows, 4), rows.unflatten(0, (4, 5)).mean(0))
    assert [len(oracles.combine(rows, k)) for k in (1, 2, 3, 4)] == [20, 30, 20, 5]


def test_loss_of_uniform_and_of_orthogonal_embeddings():
    ones = torch.ones(5, 3, dtype=torch.float64)
    assert oracles.contrastive_loss(ones.repeat(4, 1), 7 * ones, 0.3).item() == pytest.approx(math.log(5))
    axes = torch.eye(5, dtype=torch.float64)
    expected = math.log(1 + 4 * math.exp(-1 / 0.3))
    assert oracles.contrastive_loss(3 * axes, axes, 0.3).item() == pytest.approx(expected)
    swapped = axes[[1, 2, 3, 4, 0]]
    assert oracles.contrastive_loss(torch.cat([axes, swapped]), axes, 0.3).item() == pytest.approx(expected + 0.5 / 0.3)
    assert oracles.contrastive_loss(torch.zeros_like(axes), axes, 0.3).item() == pytest.approx(math.log(5))


def test_loss_against_cross_entropy():
    h, p = torch.randn(12, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    logits = F.cosine_similarity(h[:, None], p[None], dim=2) / 0.2
    expected = F.cross_entropy(logits, torch.arange(12) % 4)
    torch.testing.assert_close(oracles.contrastive_loss(h, p, 0.2), expected)


def test_nearest_neighbor_by_hand():
    nan = math.nan
    queue = torch.tensor([[nan, 1.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.0], [-1.0, -1.0], [0.0, 0.0]])
    queries = torch.tensor([[0.1, 5.0], [1e-9, 0.0], [0.0, 0.0], [nan, 1.0], [-2.0, -2.1]])
    assert oracles.nearest_neighbor(queries, queue).tolist() == [1, 3, 1, 0, 4]


def test_the_printed_enqueue_takes_rows_of_another_dtype():
    """Covers fp32 rows with a bf16 queue: on a GPU autocast normalizes in fp32."""
    queue, _ = oracles.Algorithm1AsPrinted.enqueue(torch.zeros(3, 2, dtype=torch.bfloat16), 0, torch.ones(1, 2))
    assert queue[0].tolist() == pytest.approx([0.5**0.5] * 2, rel=2**-8)


def test_enqueue_by_hand():
    queue, pointer = oracles.enqueue(torch.zeros(3, 2), 2, torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    assert pointer == 1
    torch.testing.assert_close(queue, torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.6, 0.8]]))


def test_reference_networks_have_the_paper_s_sizes():
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(oracles.reference_resnet18(stem="imagenet")) == 11_689_512 - 513_000  # torchvision's count minus fc
    assert count(oracles.reference_resnet18()) == 11_176_512 - 64 * 3 * (49 - 9)
    assert count(oracles.reference_projector(512, 2048)) == 512 * 2048 + 2 * 2048**2 + 3 * 2 * 2048
    assert count(oracles.reference_predictor(2048, 512)) == 2 * 2048 * 512 + 2 * 512 + 2048
    with torch.no_grad():
        encoder = oracles.reference_resnet18()
        maps = []
        encoder.get_submodule("layer4").register_forward_hook(
            lambda _module, _inputs, output: maps.append(output.shape)
        )
        assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 512)
        assert maps == [(2, 512, 4, 4)]
    with pytest.raises(ValueError, match="32"):
        oracles.reference_resnet18(width=32)
    with pytest.raises(ValueError, match="other"):
        oracles.reference_resnet18(stem="other")


def small_networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds an encoder to 8 features, a projector to 6 and a predictor, in fp64, each with batch norm."""
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return encoder.double(), oracles.reference_projector(8, 6).double(), oracles.reference_predictor(6, 4).double()


def small_run(**changes) -> tuple[oracles.Algorithm1, list[Tensor]]:
    """Returns Algorithm 1 on small networks with a queue of 11 rows, and three views of 5 images."""
    queue = F.normalize(torch.randn(11, 6, dtype=torch.float64), dim=1)
    run = oracles.Algorithm1(*small_networks(), queue, **(SETTINGS | changes))
    return run, [torch.randn(5, 3, 8, 8, dtype=torch.float64) for _ in range(3)]


def vectorised_losses(run: oracles.Algorithm1, views: list[Tensor], subset: int | None = None):
    """Returns (copy of f_o with gradients, loss_s, loss_m) by Algorithm 1 in vectorized PyTorch, from the run."""
    online, stopped, momentum = deepcopy(run.f_o), deepcopy(run.f_s), deepcopy(run.f_m)

    def loss(h: Tensor, p: Tensor) -> Tensor:
        logits = F.normalize(h, dim=1) @ F.normalize(p, dim=1).t() / run.temperature
        return F.cross_entropy(logits, torch.arange(len(h)) % len(p))

    def local(view: Tensor) -> Tensor:
        patches = view.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
        features = stopped["encoder"](patches).unflatten(0, (4, -1))
        subsets = list(itertools.combinations(range(4), run.k))
        c = stopped["projector"](torch.cat([features[list(chosen)].mean(0) for chosen in subsets]))
        return c if subset is None else c.unflatten(0, (len(subsets), -1))[subset]

    def neighbor(view: Tensor) -> Tensor:
        z = F.normalize(momentum["projector"](momentum["encoder"](view)), dim=1)
        return run.queue[(z @ run.queue.t()).argmax(dim=1)]

    p1, p2, p3 = (online["predictor"](online["projector"](online["encoder"](view))) for view in views)
    with torch.no_grad():
        n1, n2 = neighbor(views[0]), neighbor(views[1])
        c1, c3 = local(views[0]), local(views[2])
    return online, (loss(c1, p3) + loss(c3, p1)) / 2, (loss(n1, p2) + loss(n2, p1)) / 2


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_step_against_vectorised_pytorch(k):
    run, views = small_run(k=k)
    twin = deepcopy(run.f_o)  # updated by torch.optim.SGD
    optimizer = torch.optim.SGD(
        twin.parameters(), momentum=SETTINGS["sgd_momentum"], weight_decay=SETTINGS["weight_decay"]
    )
    for lr in (0.1, 0.05, 0.02):
        online, loss_s, loss_m = vectorised_losses(run, views)
        loss = loss_s + SETTINGS["lambda_"] * loss_m
        loss.backward()
        for parameter, reference in zip(twin.parameters(), online.parameters(), strict=True):
            parameter.grad = reference.grad
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

        step = run.step(*views, lr=lr)
        for name, expected in (("loss", loss), ("loss_s", loss_s), ("loss_m", loss_m)):
            assert step[name] == pytest.approx(expected.item(), rel=1e-12)
        for name, reference in online.named_parameters():
            torch.testing.assert_close(step["gradients"][name], reference.grad, rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(run.f_o.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_step_updates_what_algorithm_1_says():
    run, views = small_run()
    before = deepcopy(run)
    step = run.step(*views)
    online, old_momentum = dict(run.f_o.named_parameters()), dict(before.f_m.named_parameters())
    for name, parameter in run.f_s.named_parameters():
        assert torch.equal(parameter, online[name])
    for name, parameter in run.f_m.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * old_momentum[name] + 0.1 * online[name].detach())
    with torch.no_grad():
        z1 = before.f_m["projector"](before.f_m["encoder"](views[0]))
    torch.testing.assert_close(run.queue, torch.cat([F.normalize(z1, dim=1), before.queue[5:]]))
    assert run.pointer == 5
    assert all(gradient.abs().sum() > 0 for gradient in step["gradients"].values())
    assert [index.shape for index in step["neighbors"]] == [(5,), (5,)]


def test_each_network_counts_its_own_batches():
    run, views = small_run()
    run.step(*views)
    counts = [network.get_buffer("encoder.1.num_batches_tracked").item() for network in (run.f_o, run.f_s, run.f_m)]
    assert counts == [3, 2, 2]
    means = [network.get_buffer("encoder.1.running_mean") for network in (run.f_o, run.f_s, run.f_m)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(means, 2))


def test_one_embedding():
    run, views = small_run()
    whole = deepcopy(run).step(*views)
    single = [deepcopy(run).step(*views, subset=subset) for subset in range(6)]
    assert sum(step["loss_s"] for step in single) / 6 == pytest.approx(whole["loss_s"], rel=1e-12)
    assert len({step["loss_s"] for step in single}) == 6
    assert {step["loss_m"] for step in single} == {whole["loss_m"]}
    _, loss_s, _ = vectorised_losses(run, views, subset=4)
    assert single[4]["loss_s"] == pytest.approx(loss_s.item(), rel=1e-12)


def test_the_given_modules_are_left_alone():
    networks = small_networks()
    before = deepcopy(networks)
    queue = F.normalize(torch.randn(11, 6, dtype=torch.float64), dim=1)
    kept = queue.clone()
    oracles.Algorithm1(*networks, queue, **SETTINGS).step(
        *(torch.randn(5, 3, 8, 8, dtype=torch.float64) for _ in range(3))
    )
    assert torch.equal(queue, kept)
    for network, original in zip(networks, before, strict=True):
        for name, value in network.state_dict().items():
            assert torch.equal(value, original.state_dict()[name])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_printed_matrix_forms_equal_the_loops(k):
    loops, printed = oracles.Algorithm1, oracles.Algorithm1AsPrinted
    images, features = torch.randn(3, 2, 6, 4, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    assert torch.equal(printed.divide(images), loops.divide(images))
    exact: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)  # fp64 sums in another order
    torch.testing.assert_close(printed.combine(features, k), loops.combine(features, k), **exact)
    h, p = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(printed.contrastive_loss(h, p, 0.5), loops.contrastive_loss(h, p, 0.5), **exact)
    assert torch.equal(printed.nearest_neighbor(h, features), loops.nearest_neighbor(h, features))
    first, second, queue = h[:3], h[3:], F.normalize(features)
    published = method_oracles.nt_xent_as_published(first, second, 0.5)
    torch.testing.assert_close(published, method_oracles.nt_xent(first, second, 0.5), **exact)
    published = method_oracles.queue_loss_as_published(first, second, queue, 0.5)
    torch.testing.assert_close(published, method_oracles.queue_contrastive_loss(first, second, queue, 0.5), **exact)
    ours, pointer = loops.enqueue(features, 10, p)
    theirs, their_pointer = printed.enqueue(features.clone(), 10, p)
    torch.testing.assert_close(theirs, ours, **exact)
    assert pointer == their_pointer == 1
