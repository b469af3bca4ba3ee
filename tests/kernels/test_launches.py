"""Tests of launches: their number, blank memory before them, and the checks of conftest.py on them."""

from typing import Any

import pytest
import torch
from interpreter import confined
from torch import Tensor

from mnclglf_kernels import (
    augment,
    batch_norm,
    combine,
    contrastive_losses,
    divide,
    enqueue,
    nearest_neighbor,
    nt_xent,
    queue_contrastive_loss,
)
from mnclglf_kernels._triton import launch
from mnclglf_kernels._triton.divide import divide_launches
from mnclglf_kernels._triton.launch import Launch
from mnclglf_kernels.ops.augment import ViewFormat, view_parameters


@pytest.fixture
def launched(monkeypatch) -> list[Launch]:
    """Returns a list that records every launch in order."""
    launches: list[Launch] = []

    def record(some: list[Launch], device: torch.device) -> None:
        launches.extend(some)
        run(some, device)

    run = launch.run
    monkeypatch.setattr(launch, "run", record)
    return launches


def pairs_of(subsets: tuple[int, ...], images: int, width: int, targets_learn: bool) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(s * images, width, requires_grad=targets_learn), torch.randn(images, width, requires_grad=True))
        for s in subsets
    ]


def stored() -> tuple[Tensor, ...]:
    """Returns an image, parameters of three views, mean and std."""
    numbers = view_parameters(8, 8, sigma=1).repeat(3, 1)
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    return image, torch.tensor([0]), numbers, torch.zeros(3), torch.ones(3)


def learner(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def normalized(**how: Any) -> Any:
    return batch_norm(learner(6, 4), learner(4), learner(4), views=3, **how, backend="triton")


def part_of_a_loss(targets: Tensor, predictions: Tensor) -> Tensor:
    return contrastive_losses([(targets, predictions)], 0.5, rank=1, ranks=2, backend="triton")[0]


def queue_loss(queries: Tensor, keys: Tensor) -> Tensor:
    return queue_contrastive_loss(queries, keys, torch.randn(7, 4), 0.5, backend="triton")


def test_the_queue_s_loss_takes_two_launches_more_for_each_slice(launched, monkeypatch):
    monkeypatch.setattr("mnclglf_kernels._triton.queue_contrastive_loss.COEFFICIENTS", 3 * 64)
    queue_contrastive_loss(learner(3, 4), torch.randn(3, 4), torch.randn(150, 4), 0.5, backend="triton").backward()
    assert [x.arguments["K"] for x in launched if x.kernel.__name__ == "queue_contrastive_loss_coefficient_kernel"] == [
        64,
        64,
        22,
    ]
    assert len(launched) == 2 + 3 * 2 + 1
    memory = {x.arguments["coefficients"].data_ptr() for x in launched if "coefficients" in x.arguments}
    assert len(memory) == 1


@pytest.mark.parametrize("targets_learn", [False, True], ids=["predictions learn", "both learn"])
@pytest.mark.parametrize("groups", [1, 2])
def test_pairs_of_one_shape_and_dtype_share_their_launches(groups, targets_learn, launched):
    pairs = [pair for group in range(groups) for pair in pairs_of((6, 6, 1, 1), 5 + group, 9, targets_learn)]
    losses = contrastive_losses(pairs, 0.5, backend="triton")
    assert len(launched) == 2 * groups
    launched.clear()
    torch.stack(losses).sum().backward()
    assert len(launched) == (3 if targets_learn else 2) * groups


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda: divide(torch.randn(2, 3, 4, 4, requires_grad=True), backend="triton").sum().backward(), 2),
        (lambda: combine(torch.randn(8, 5, requires_grad=True), 2, backend="triton").sum().backward(), 2),
        (lambda: normalized(running_mean=torch.zeros(4), running_var=torch.ones(4)), 2),
        (lambda: normalized(relu=True).sum().backward(), 4),
        (lambda: normalized(relu=True, residual=learner(6, 4)).sum().backward(), 4),
        (lambda: torch.stack(normalized(relu=True, residual=learner(6, 4), fork=True)).sum().backward(), 4),
        (lambda: augment(*stored(), view_format=ViewFormat(6), backend="triton"), 1),
        (lambda: nearest_neighbor(torch.randn(3, 5), torch.randn(7, 5), backend="triton"), 2),
        (lambda: enqueue(torch.randn(7, 5), torch.tensor(0), torch.randn(3, 5), backend="triton"), 2),
        (lambda: contrastive_losses([(torch.randn(6, 4), torch.randn(3, 4))], 0.5, backend="triton"), 2),
        (lambda: nt_xent(torch.randn(3, 4), torch.randn(3, 4), 0.5, backend="triton"), 2),
        (lambda: nt_xent(learner(3, 4), learner(3, 4), 0.5, backend="triton").backward(), 4),
        (lambda: nt_xent(torch.randn(3, 4), learner(3, 4), 0.5, backend="triton").backward(), 4),
        (lambda: nt_xent(learner(6, 4), learner(6, 4), 0.5, rank=1, ranks=2, backend="triton").backward(), 4),
        (lambda: part_of_a_loss(torch.randn(6, 4), learner(6, 4)).backward(), 4),
        (lambda: queue_loss(torch.randn(3, 4), torch.randn(3, 4)), 2),
        (lambda: queue_loss(learner(3, 4), torch.randn(3, 4)).backward(), 5),
        (lambda: queue_loss(learner(3, 4), learner(3, 4)).backward(), 6),
        (lambda: queue_loss(torch.randn(3, 4), learner(3, 4)).backward(), 3),
    ],
    ids=[
        "divide and its gradient",
        "combine and its gradient",
        "batch_norm",
        "batch_norm and its gradients",
        "batch_norm with a residual and its gradients",
        "batch_norm with a residual and two uses",
        "augment",
        "nearest_neighbor",
        "enqueue",
        "loss alone",
        "nt_xent",
        "nt_xent and its gradient",
        "nt_xent and the gradient of one view",
        "nt_xent of a rank and its gradient",
        "contrastive_losses of a rank and its gradient",
        "queue_contrastive_loss",
        "queue_contrastive_loss and the queries' gradient",
        "queue_contrastive_loss and both gradients",
        "queue_contrastive_loss and the keys' gradient",
    ],
)
def test_number_of_launches(call, count, launched):
    call()
    assert len(launched) == count


def is_blank(memory: Tensor) -> bool:
    """Returns True if memory holds only the values with which conftest.py's fixture fills uninitialized memory."""
    return bool(memory.isnan().all() if memory.is_floating_point() else (memory == torch.iinfo(memory.dtype).max).all())


def test_what_a_kernel_writes_is_blank_before(monkeypatch):
    """Checks that outputs start blank, so that a NaN in a result means an element was not written."""
    inputs: list[Tensor] = []
    written: set[str] = set()

    def inspect(launches: list[Launch], device: torch.device) -> None:
        given = {x.untyped_storage().data_ptr() for x in inputs}
        for x_launch in launches:
            for name, value in x_launch.arguments.items():
                for x in value if isinstance(value, tuple) else [value]:
                    if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                        assert is_blank(x), f"{name} of {x_launch.kernel.fn.__name__}"
                        written.add(name)
        run(launches, device)

    run = launch.run
    monkeypatch.setattr(launch, "run", inspect)

    def known(x: Tensor) -> Tensor:
        inputs.append(x)
        return x

    operators = torch.ops.mnclglf
    images = known(torch.randn(2, 3, 4, 4))
    operators.divide_backward(known(operators.divide(images)))
    operators.divide(known(images.contiguous(memory_format=torch.channels_last)))
    operators.combine_backward(known(operators.combine(known(torch.randn(8, 5)), 2)), 2)
    operators.nearest_neighbor(known(torch.randn(3, 5)), known(torch.randn(70, 5)))
    pair = [known(torch.randn(140, 5))], [known(torch.randn(70, 5))]
    losses, *saved = operators.contrastive_losses(*pair, 0.5)
    saved = [known(x) for x in saved]
    operators.contrastive_losses_backward(known(torch.ones_like(losses)), *pair, *saved, 0.5, True, True)
    views = known(torch.randn(80, 5))
    losses, *saved = operators.nt_xent(views, 0.5)
    saved = [known(x) for x in saved]
    operators.nt_xent_backward(known(torch.ones_like(losses)), views, *saved, 0.5)
    three = [known(torch.randn(9, 5)), known(torch.randn(9, 5)), known(torch.randn(70, 5))]
    losses, *saved = operators.queue_contrastive_loss(*three, 0.5)
    saved = [known(x) for x in saved]
    operators.queue_contrastive_loss_backward(known(torch.ones_like(losses)), *three, *saved, 0.5, True, True)

    x, residual, upstream = (known(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last)) for _ in range(3))
    weight, bias, *running = (known(x) for x in torch.ones(4, 5).unbind())
    y, *saved = operators.batch_norm(x, weight, bias, *running, residual, [0.4, 0.3, 0.3], 1e-5, True)
    saved = [known(x) for x in saved]
    other = known(torch.randn(y.shape).to(memory_format=torch.channels_last))
    operators.batch_norm_backward(upstream, other, x, known(y), weight, bias, *saved, True, True)

    assert written == {
        *("patches", "images", "combined", "features"),
        *("scores", "rows", "nearest"),
        *("maxima", "sums", "positives", "tops", "log_sums", "losses", "inverse_targets", "inverse_predictions"),
        *("coefficients", "target_dots", "prediction_dots", "dots", "other_dots", "gradients"),
        *("misses", "inverse_queries", "inverse_keys"),
        *("moments", "y", "mean", "deviation", "gradient", "weight_gradient", "bias_gradient", "masked", "upstream"),
    }


def test_a_kernel_that_leaves_its_tensors_is_found():
    images, patches = torch.randn(1, 1, 2, 2), torch.empty(4, 1, 1, 1)
    launches = divide_launches(images, patches, backward=False)
    with pytest.raises(Exception, match="1 addresses that are no elements"), confined([images, patches[:3]], "divide"):
        launch.run(launches, images.device)
    with (
        pytest.raises(Exception, match="2 addresses that are no elements"),
        confined([images[..., 0], patches], "divide"),
    ):
        launch.run(launches, images.device)


def test_an_element_that_is_stored_twice_is_found():
    images, patches = torch.empty(1).expand(1, 1, 2, 2), torch.randn(4, 1, 1, 1)
    with pytest.raises(AssertionError, match="two owners"), confined([images, patches], "divide"):
        launch.run(divide_launches(images, patches, backward=True), images.device)
