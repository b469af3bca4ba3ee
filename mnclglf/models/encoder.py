"""Encoders: what one is, and ResNets (He et al. 2016) of torchvision's blocks with a choice of stem and width."""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.init import skip_init
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from mnclglf.config import TIMM, ModelConfig, Stem, UsageError, require
from mnclglf.models.batch_norm import BatchNorm, Fork, Stack, Views, without_batch_counters
from mnclglf.models.fused import features_without_gradient
from mnclglf_kernels import Backend


class Encoder(nn.Module):
    """Maps [V * N, 3, H, W] images of V views, one view after the other, to [V * N, F] features.

    The features of a view do not depend on the other views in the batch.

    Attributes:
        features: F.
        interpolates: whether it has position embeddings, which are interpolated to images of another size.
        fusible: whether models/fused.py has a forward of it without gradient.
        convolution: backend of training forwards without gradient; "auto" and "torch" compute them as those with one.
        half_sums: whether these sum in fp16, see `set_half`.
        overflow: bool, 0-D, there with `half_sums`: whether one of these was not finite since it was last set to false.
    """

    features: int
    interpolates: bool = False
    fusible: bool = False
    convolution: Backend = "auto"
    half_sums: bool = False
    overflow: Tensor

    @property
    def published(self) -> nn.Module:
        """Returns the network by itself, whose parameters have the names of the library that it comes from."""
        return self

    def blocks(self) -> list[nn.Module]:
        """Returns its residual blocks, in order, where it has such."""
        return []

    def start_blocks_as_identity(self) -> None:
        """Sets the weight of the last batch norm in each residual block to 0."""


class ResNet(Encoder):
    """Encoder from [N, 3, H, W] images to [N, F] features; parameters have torchvision's names.

    Args:
        stem: "cifar" is a 3 x 3 convolution of stride 1 without max-pool; "imagenet" the 7 x 7 of stride 2 with it.
        width: channels of the first stage; 64 is the published network. F is 8 * width, of ResNet-50 32 * width.
        name: a row of RESNETS.
    """

    def __init__(self, stem: Stem = "cifar", width: int = 64, name: str = "resnet18") -> None:
        super().__init__()
        block, depths = RESNETS[name]
        self.stem, self.fusible = stem, block is Block
        kernel, stride, padding = (3, 1, 1) if stem == "cifar" else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False)
        self.bn1 = BatchNorm(width)
        expansion = block.expansion
        self.features = 8 * width * expansion
        self.layer1 = _stage(block, width, width, depths[0], stride=1)
        self.layer2 = _stage(block, width * expansion, 2 * width, depths[1], stride=2)
        self.layer3 = _stage(block, 2 * width * expansion, 4 * width, depths[2], stride=2)
        self.layer4 = _stage(block, 4 * width * expansion, 8 * width, depths[3], stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        without_batch_counters(self)

    def forward(self, images: Tensor, views: Views | int = 1) -> Tensor:
        """Returns the features, [V * N, F], of V views that share a batch, one after the other."""
        if self.convolution in ("triton", "cudnn") and self.training and not torch.is_grad_enabled():
            return features_without_gradient(self, images, views)
        x, shortcut = self.bn1.fork(self.conv1(images), views)
        if self.stem == "imagenet":
            x = shortcut = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for block in self.blocks():
            x, shortcut = block(x, shortcut, views)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def start_blocks_as_identity(self) -> None:
        for block in self.blocks():
            nn.init.zeros_(block.get_parameter("bn3.weight" if isinstance(block, BottleneckBlock) else "bn2.weight"))


class Block(BasicBlock):
    """torchvision's residual block, with each batch norm, the addition and the ReLU after it as one operator.

    It takes and returns a result twice: for the convolutions and for the shortcut.
    """

    def forward(self, x: Tensor, shortcut: Tensor, views: Views | int = 1) -> Fork:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.bn1(self.conv1(x), views, relu=True)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut, views)
        return self.bn2.fork(self.conv2(y), views, residual=shortcut)  # pyright: ignore[reportCallIssue]


class BottleneckBlock(Bottleneck):
    """torchvision's bottleneck block in the same way; the stride is that of the 3 x 3 convolution."""

    def forward(self, x: Tensor, shortcut: Tensor, views: Views | int = 1) -> Fork:  # pyright: ignore[reportIncompatibleMethodOverride]
        y = self.bn1(self.conv1(x), views, relu=True)
        y = self.bn2(self.conv2(y), views, relu=True)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut, views)
        return self.bn3.fork(self.conv3(y), views, residual=shortcut)  # pyright: ignore[reportCallIssue]


BlockType = type[Block] | type[BottleneckBlock]
RESNETS: dict[str, tuple[BlockType, tuple[int, ...]]] = {
    "resnet18": (Block, (2, 2, 2, 2)),
    "resnet34": (Block, (3, 4, 6, 3)),
    "resnet50": (BottleneckBlock, (3, 4, 6, 3)),
}
"""The kind of block and the number of blocks per stage, by the name of the network (He et al. 2016, table 1)."""


def _stage(kind: BlockType, inputs: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    outputs, shortcut = channels * kind.expansion, None
    if stride != 1 or inputs != outputs:
        convolution = conv1x1(inputs, outputs, stride) if inputs >= 16 else NarrowShortcut(inputs, outputs, stride)
        shortcut = Stack(convolution, BatchNorm(outputs))
    first = kind(inputs, channels, stride, shortcut, norm_layer=BatchNorm)
    if stride != 1:  # skip_init draws no random numbers, so that a seed gives the same weights as torchvision's blocks
        strided = "conv1" if kind is Block else "conv2"
        plain = cast(nn.Conv2d, first.get_submodule(strided))
        made = skip_init(
            StridedConv2d, plain.in_channels, channels, 3, stride, 1, bias=False, device=plain.weight.device
        )
        setattr(first, strided, made)
    return nn.Sequential(first, *(kind(outputs, channels, norm_layer=BatchNorm) for _ in range(depth - 1)))


class NarrowShortcut(nn.Conv2d):
    """Strided 1 x 1 convolution of few channels, computed as a dense one of the pixels that the stride leaves.

    PyTorch 2.14's own backward of it corrupts the heap on a CPU, channels_last: in fp32 below 8 channels with AVX2 and
    no AVX-512, in bf16 below 16 channels with AVX-512, for an odd batch. From 16 to 128 channels it was not seen to,
    with glibc's MALLOC_CHECK_=3.
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


def make_encoder(model: ModelConfig) -> Encoder:
    """Makes the encoder of a run, with random weights.

    Raises:
        UsageError: there is no such encoder in timm, or its features or norms cannot be used; the message says why.
        ImportError: the encoder is timm's, and timm is not installed.
    """
    if not model.encoder.startswith(TIMM):
        return ResNet(model.stem, model.width, model.encoder)
    from mnclglf.models.timm_encoder import TimmEncoder  # timm is an extra

    return TimmEncoder(model.encoder.removeprefix(TIMM))


@cache
def features_of(model: ModelConfig) -> int:
    """Returns F, the width of the features of a run's encoder."""
    with torch.device("meta"):
        return make_encoder(model).features


def check_sides(model: ModelConfig, sides: dict[str, int]) -> None:
    """Raises UsageError unless a model of timm makes features of images of these sides, found on the meta device.

    Our ResNets take any size.

    Args:
        model: a run's model.
        sides: side in pixels by what the images are: views or patches.
    """
    if not model.encoder.startswith(TIMM):
        return
    with torch.device("meta"):
        encoder = make_encoder(model)
    for what, side in sides.items():
        try:
            found = tuple(encoder(torch.empty(2, 3, side, side, device="meta")).shape)
        except Exception as error:  # a model raises any kind of error for a size that it is not made for
            raise UsageError(
                f"encoder {model.encoder} cannot take {what} of side {side} ({error}); give another --image-size, or "
                "another --encoder"
            ) from error
        wanted = (2, encoder.features)
        require(found == wanted, f"encoder {model.encoder} returns {found} and not {wanted}: it has no pooled features")
