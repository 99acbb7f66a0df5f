"""Wide residual networks (Zagoruyko, Komodakis, BMVC 2016, arXiv 1605.07146), in the form of TRADES' WRN-34-10.

A 3x3 stem of `width` (16) channels; three stages of n pre-activation blocks with 1, 2 and 4 times width x widen_factor
channels, the last two halve the size; batch norm, ReLU, average pooling over whatever map is left (8x8 at 32x32, 7x7 at
28x28, 16x16 at 64x64; `stem_stride = 2` lets the stem halve large images); a linear layer. depth = 6 n + 4 counts the
convolutions with those of the shortcuts. Madry et al. leave the shortcuts out: their 32-10 has the n = 5 of 34-10.

Published code often carries an unused copy of the first stage (`sub_block1`, 2,102,112 parameters for 34-10). It is not
here. Modules have the published code's names otherwise (`block1.layer.3.conv2`).
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError
from robustbench_ext.models.options import check_size, dropout_rate, whole


class _Conv2d(nn.Conv2d):
    """A convolution without bias that draws its weights from N(0, 2 / (k^2 outputs)), also when it is reset."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class _Linear(nn.Linear):
    """A linear layer whose bias starts at zero."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)


class _WideBlock(nn.Module):
    """x + conv(dropout(relu(bn(conv(relu(bn(x))))))); a shortcut that changes the shape is a 1x1 convolution of
    relu(bn(x)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.convShortcut = _Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active))))) + shortcut
        return out


class WideResNet(nn.Module):
    """See the module. `fc` is the linear layer."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        depth: int = 34,
        widen_factor: int = 10,
        dropout: float = 0.0,
        width: int = 16,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        wide = width * widen_factor
        self.conv1 = _Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        stages = []
        for (inputs, outputs), stride in zip(pairwise([width, wide, 2 * wide, 4 * wide]), (1, 2, 2), strict=True):
            first = _WideBlock(inputs, outputs, stride, dropout)
            others = [_WideBlock(outputs, outputs, 1, dropout) for _ in range((depth - 4) // 6 - 1)]
            stages.append(nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others))))
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(4 * wide)
        self.fc = _Linear(4 * wide, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))
        return logits


def _build(
    name: str,
    in_channels: int,
    num_classes: int,
    image_size: int,
    depth: int,
    widen_factor: int,
    dropout: float,
    width: int,
    stem_stride: int,
) -> WideResNet:
    depth = whole(depth, 10, f"{name}: depth")
    if depth % 6 != 4:
        raise ConfigError(
            f"{name}: depth = {depth}, expected 6 n + 4 for n blocks a stage (10, 16, 22, 28, 34, 40, ...); where shortcuts "
            f"are not counted, as in Madry et al.'s 32-10, add 2"
        )
    stride = whole(stem_stride, 1, f"{name}: stem_stride")
    check_size(name, image_size, 4 * stride, f"stem and stages shrink the sides by {4 * stride}")
    widen_factor, width = whole(widen_factor, 1, f"{name}: widen_factor"), whole(width, 1, f"{name}: width")
    rate = dropout_rate(dropout, f"{name}: dropout")
    return WideResNet(in_channels, num_classes, depth, widen_factor, rate, width, stride)


def wide_resnet(
    in_channels: int,
    num_classes: int,
    image_size: int,
    depth: int = 28,
    widen_factor: int = 10,
    dropout: float = 0.0,
    width: int = 16,
    stem_stride: int = 1,
) -> nn.Module:
    """`wide-resnet`: see `WideResNet`. The defaults are the paper's WRN-28-10.

    Args:
        depth: 6 n + 4 for n blocks a stage: 10, 16, 22, 28, 34, 40, ...
        widen_factor: channels of the first stage, in units of `width`.
        dropout: share of units dropped between the two convolutions of a block; 0 in TRADES.
        width: channels of the stem.
        stem_stride: 2 lets the stem halve the size.
    """
    return _build("wide-resnet", in_channels, num_classes, image_size, depth, widen_factor, dropout, width, stem_stride)


def wide_resnet_34_10(
    in_channels: int,
    num_classes: int,
    image_size: int,
    dropout: float = 0.0,
    width: int = 16,
    stem_stride: int = 1,
) -> nn.Module:
    """`wide-resnet-34-10`: see `WideResNet`. 46,160,474 parameters at width 16, three channels, ten classes."""
    return _build("wide-resnet-34-10", in_channels, num_classes, image_size, 34, 10, dropout, width, stem_stride)
