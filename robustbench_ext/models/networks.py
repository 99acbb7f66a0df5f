"""Two small reference networks for 8x8 to 32x32 inputs, built by (in_channels, num_classes, image_size)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.errors import ModelError


class CosineLinear(nn.Module):
    """A last layer that returns cosines between features and class weights, times a fixed scale (Wang et al. 2018)."""

    def __init__(self, features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.linear = nn.Linear(features, num_classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        # Through the linear layer, so that `penultimate` finds the features; their length is taken out afterwards.
        cosines = self.linear(x) / self.linear.weight.norm(dim=1).clamp_min(1e-12)
        scaled: Tensor = self.scale * cosines / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return scaled


def _head(features: int, num_classes: int, cosine: bool) -> nn.Module:
    return CosineLinear(features, num_classes) if cosine else nn.Linear(features, num_classes)


def _check_size(name: str, image_size: int) -> None:
    if not 8 <= image_size <= 64:
        raise ModelError(
            f"{name} is made for inputs of 8x8 to 64x64, not {image_size}x{image_size}; use torchvision:NAME"
        )


class SmallCNN(nn.Module):
    """Three convolutions (width, 2 width, 2 width; strides 1 or 2, 2, 2) with batch norm, then 64 units, then logits.

    Inputs of 20 pixels and more start with a 5x5 convolution of stride 2. `fc1` is the penultimate layer.
    """

    def __init__(
        self, in_channels: int, num_classes: int, image_size: int, width: int = 16, cosine_head: bool = False
    ) -> None:
        super().__init__()
        large = image_size >= 20
        self.conv1 = nn.Conv2d(in_channels, width, 5 if large else 3, 2 if large else 1, 2 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        with torch.no_grad():
            side = self.conv3(self.conv2(self.conv1(torch.zeros(1, in_channels, image_size, image_size)))).shape[-1]
        self.fc1 = nn.Linear(2 * width * side * side, 64)
        self.fc2 = _head(64, num_classes, cosine_head)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        logits: Tensor = self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))
        return logits


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem, three residual blocks (width, 2 width, 4 width; the last two halve the size), average pooling, logits."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 16, cosine_head: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = _Block(width, width, 1)
        self.layer2 = _Block(width, 2 * width, 2)
        self.layer3 = _Block(2 * width, 4 * width, 2)
        self.fc = _head(4 * width, num_classes, cosine_head)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def small_cnn(
    in_channels: int, num_classes: int, image_size: int, width: int = 16, cosine_head: bool = False
) -> nn.Module:
    """`small-cnn`: see `SmallCNN`."""
    _check_size("small-cnn", image_size)
    return SmallCNN(in_channels, num_classes, image_size, width, cosine_head)


def small_resnet(
    in_channels: int, num_classes: int, image_size: int, width: int = 16, cosine_head: bool = False
) -> nn.Module:
    """`small-resnet`: see `SmallResNet`."""
    _check_size("small-resnet", image_size)
    return SmallResNet(in_channels, num_classes, width, cosine_head)
