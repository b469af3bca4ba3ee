"""Supervised training against a loop of torchvision's ResNet-18, torch.optim.SGD and nn.CrossEntropyLoss."""

import pytest
import torch
import torchvision
from method_steps import FP64, Stepper, inputs_of, make_batch, make_method
from torch import Tensor, nn

from mnclglf.config import EngineConfig, ModelConfig, ObjectiveConfig, OptimConfig
from mnclglf.data.batches import Batch
from mnclglf.engine.step import TrainStep
from mnclglf.methods import Supervised

IMAGES, CLASSES, SIDE = 6, 10, 8
OPTIM = OptimConfig(lr=0.05, sgd_momentum=0.9, weight_decay=1e-3)


def torchvision_resnet18() -> nn.Module:
    """As it is usually made for CIFAR: a 3 x 3 stem of stride 1 without max-pool."""
    network = torchvision.models.resnet18(num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network.double().train()


def under_our_names(network: nn.Module) -> dict[str, Tensor]:
    """What the network holds, less the counters of batches, which ours has not."""
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    return {
        name.replace("fc.", "classifier.") if name.startswith("fc.") else f"encoder.{name}": value
        for name, value in state.items()
    }


def test_five_steps_equal_a_plain_training_loop_in_fp64() -> None:
    network = torchvision_resnet18()
    method = Supervised(ModelConfig(classes=CLASSES), ObjectiveConfig()).double().train()
    method.load_state_dict(under_our_names(network), strict=False)  # load_state_dict adds counters of batches itself
    labels = torch.randint(CLASSES, (40,))
    step = TrainStep(method, OPTIM, EngineConfig(channels_last=False), torch.float32, labels=labels)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for number in range(5):
        images = torch.randn(IMAGES, 3, SIDE, SIDE, dtype=torch.float64)
        rows = torch.randperm(40)[:IMAGES]
        losses, _ = step(number, Batch((images,), rows), lr=0.05, momentum=0.99)

        optimizer.zero_grad()
        loss = criterion(network(images), labels[rows])
        loss.backward()
        optimizer.step()

        assert losses.total.item() == pytest.approx(loss.item(), rel=FP64["rtol"])
        expected, ours = under_our_names(network), method.state_dict()
        assert ours.keys() == expected.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, expected[name], **FP64, msg=lambda text, name=name: f"{name}: {text}")
    step.guard.raise_if_failed()


def test_it_learns_the_labels() -> None:
    stepper = Stepper(make_method(Supervised))
    batch = make_batch(views=1)
    losses = [stepper(batch)["loss"].item() for _ in range(30)]
    assert losses[-1] < 0.1 * losses[0]
    logits = stepper.method.classifier(stepper.method.encoder(batch.views[0]))
    assert torch.equal(logits.argmax(dim=1), inputs_of(stepper.method, batch)[1])


def test_there_is_nothing_but_the_network() -> None:
    method = make_method(Supervised)
    losses = method(*inputs_of(method, make_batch(views=1)))
    assert (losses.keys, losses.neighbors, method.queue_fill()) == (None, None, None)
    assert {name.split(".")[0] for name in method.state_dict()} == {"encoder", "classifier"}


def test_a_classifier_needs_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"classes None: .*ModelConfig\(classes=10\)"):
        Supervised(ModelConfig(), ObjectiveConfig())
