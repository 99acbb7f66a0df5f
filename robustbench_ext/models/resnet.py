"""ResNet-18 and PreActResNet-18 for small images (He, Zhang, Ren, Sun, CVPR 2016, arXiv 1512.03385; ECCV 2016, arXiv
1603.05027), in the form that the papers on adversarial training use.

Against the ImageNet form the stem is one 3x3 convolution without max-pooling, and the pooling before the linear layer is
over whatever map is left (4x4 at 28x28 and 32x32). Two blocks in each of four stages of width, 2, 4 and 8 width; the
last three stages halve the size. 64x64 images (Tiny-ImageNet) go through the same network, their last map is 8x8; this
is WEAT's form. Some papers let the stem halve them (`stem_stride = 2`), at a quarter of the cost.

Modules have the published code's names, so that its weights fit and its layers (`layer2.1.conv2`) can be named.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.models.networks import _Block
from robustbench_ext.models.options import check_size, whole


class _PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))). Where the size or the width changes, the shortcut is a 1x1 convolution of
    relu(bn(x)), without batch norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False)) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut
        return out


def _stage(block: type[_Block] | type[_PreActBlock], inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(inputs, outputs, stride), block(outputs, outputs, 1))


class ResNet18(nn.Module):
    """Convolution, batch norm, ReLU; eight blocks; average pooling; `linear`."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 64, stem_stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(_Block, width, width, 1)
        self.layer2 = _stage(_Block, width, 2 * width, 2)
        self.layer3 = _stage(_Block, 2 * width, 4 * width, 2)
        self.layer4 = _stage(_Block, 4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class PreActResNet18(nn.Module):
    """Convolution; eight pre-activation blocks; batch norm, ReLU; average pooling; `linear`.

    This is the form of AWP (and of the paper). A common variant has no batch norm and ReLU after the last block, and
    16 width fewer parameters; its weights do not fit.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 64, stem_stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        self.layer1 = _stage(_PreActBlock, width, width, 1)
        self.layer2 = _stage(_PreActBlock, width, 2 * width, 2)
        self.layer3 = _stage(_PreActBlock, 2 * width, 4 * width, 2)
        self.layer4 = _stage(_PreActBlock, 4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(F.relu(self.bn(x)).mean(dim=(2, 3)))
        return logits


def _options(name: str, image_size: int, width: int, stem_stride: int) -> tuple[int, int]:
    stride = whole(stem_stride, 1, f"{name}: stem_stride")
    check_size(name, image_size, 8 * stride, f"stem and stages shrink the sides by {8 * stride}")
    return whole(width, 1, f"{name}: width"), stride


def resnet_18(in_channels: int, num_classes: int, image_size: int, width: int = 64, stem_stride: int = 1) -> nn.Module:
    """`resnet-18`: see `ResNet18`. 11,173,962 parameters at width 64, three channels, ten classes."""
    return ResNet18(in_channels, num_classes, *_options("resnet-18", image_size, width, stem_stride))


def preact_resnet_18(
    in_channels: int, num_classes: int, image_size: int, width: int = 64, stem_stride: int = 1
) -> nn.Module:
    """`preact-resnet-18`: see `PreActResNet18`. 11,172,170 parameters at width 64, three channels, ten classes."""
    return PreActResNet18(in_channels, num_classes, *_options("preact-resnet-18", image_size, width, stem_stride))
