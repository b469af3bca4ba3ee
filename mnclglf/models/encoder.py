"""ResNet-18 (He et al. 2016) of torchvision's blocks, with a choice of stem and width."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.init import skip_init
from torchvision.models.resnet import BasicBlock, conv1x1

from mnclglf.config import Stem
from mnclglf.models.batch_norm import BatchNorm, Fork, Stack, Views, without_batch_counters
from mnclglf.models.fused import features_without_gradient
from mnclglf_kernels import Backend


class ResNet18(nn.Module):
    """Encoder from [N, 3, H, W] images to [N, 8 * width] features; parameters have torchvision's names.

    Args:
        stem: "cifar" is a 3 x 3 convolution of stride 1 without max-pool; "imagenet" the 7 x 7 of stride 2 with it.
        width: channels of the first stage; 64 is ResNet-18.

    Attributes:
        convolution: backend of training forwards without gradient; "auto" and "torch" compute them as those with one.
        half_sums: whether these sum in fp16, see `set_half`.
        overflow: bool, 0-D, there with `half_sums`: whether one of these was not finite since it was last set to false.
    """

    convolution: Backend = "auto"
    half_sums: bool = False
    overflow: Tensor

    def __init__(self, stem: Stem = "cifar", width: int = 64) -> None:
        super().__init__()
        self.stem, self.features = stem, 8 * width
        kernel, stride, padding = (3, 1, 1) if stem == "cifar" else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        self.bn1 = BatchNorm(width)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        without_batch_counters(self)

    def forward(self, images: Tensor, views: Views | int = 1) -> Tensor:
        """Returns the features, [V * N, 8 * width], of V views that share a batch, one after the other."""
        if self.convolution in ("triton", "cudnn") and self.training and not torch.is_grad_enabled():
            return features_without_gradient(self, images, views)
        x, shortcut = self.bn1.fork(self.conv1(images), views)
        if self.stem == "imagenet":
            x = shortcut = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x, shortcut = block(x, shortcut, views)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


class Block(BasicBlock):
    """torchvision's residual block, with each batch norm, the addition and the ReLU after it as one operator.

    It takes and returns a result twice: for the convolutions and for the shortcut.
    """

    def forward(self, x: Tensor, shortcut: Tensor, views: Views | int = 1) -> Fork:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.bn1(self.conv1(x), views, relu=True)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut, views)
        return self.bn2.fork(self.conv2(y), views, residual=shortcut)  # pyright: ignore[reportCallIssue]


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        convolution = conv1x1(inputs, outputs, stride) if inputs >= 8 else NarrowShortcut(inputs, outputs, stride)
        shortcut = Stack(convolution, BatchNorm(outputs))
    first = Block(inputs, outputs, stride, shortcut, norm_layer=BatchNorm)
    if stride != 1:  # skip_init draws no random numbers, so that a seed gives the same weights as plain BasicBlocks
        place = first.conv1.weight.device
        convolution = skip_init(StridedConv2d, inputs, outputs, 3, stride, 1, bias=False, device=place)
        first.conv1 = cast(StridedConv2d, convolution)
    return nn.Sequential(first, Block(outputs, outputs, norm_layer=BatchNorm))


class NarrowShortcut(nn.Conv2d):
    """Strided 1 x 1 convolution of fewer than 8 channels, computed as a dense one of the pixels that the stride leaves.

    PyTorch 2.14's own backward of it corrupts the heap on a CPU with AVX2 and no AVX-512 (fp32, channels_last, one
    thread; found with glibc's MALLOC_CHECK_=3). From 8 channels on it is sound.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        down, right = self.stride
        return F.conv2d(input[:, :, ::down, ::right], self.weight)


class StridedConv2d(nn.Conv2d):
    """3 x 3 convolution that uses only its middle tap on an image of one pixel, as the other taps meet padding.

    On a CPU in bf16, PyTorch 2.14 leaves the gradients of those taps, which are 0, as uninitialized memory.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-2:] == (1, 1):
            return F.conv2d(input, self.weight[:, :, 1:2, 1:2])
        return super().forward(input)
