"""The small network that TRADES trains on MNIST (Zhang et al., ICML 2019, arXiv 1901.08573), after Carlini and Wagner.

Two convolutions of `width` (32) channels, max-pooling, two of 2 width, max-pooling; all 3x3 without padding and with
bias, no batch norm. Then two layers of `hidden` (200) units with dropout between, and the logits. On 28x28 images 4x4
maps of 64 channels are left, so the first linear layer reads 1,024 numbers; on 32x32 they are 5x5, on 64x64 13x13.

The last layer starts at zero, so all logits of a fresh network are 0 and the first attack of a training sees gradients
of exactly zero. Modules have the published code's names.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from robustbench_ext.models.options import check_size, dropout_rate, whole


class _Conv2d(nn.Conv2d):
    """A 3x3 convolution that draws its weights from N(0, 2 / (9 inputs)), bias 0, also when it is reset."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, also when it is reset."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def _side(image_size: int) -> int:
    """The side of the last map: each pair of convolutions takes four pixels, each pooling halves and rounds down."""
    return ((image_size - 4) // 2 - 4) // 2


class TradesCNN(nn.Module):
    """See the module. `classifier.fc3` is the last layer."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: int,
        width: int = 32,
        hidden: int = 200,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=_Conv2d(in_channels, width, 3),
                relu1=nn.ReLU(),
                conv2=_Conv2d(width, width, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=_Conv2d(width, 2 * width, 3),
                relu3=nn.ReLU(),
                conv4=_Conv2d(2 * width, 2 * width, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(2 * width * _side(image_size) ** 2, hidden),
                relu1=nn.ReLU(),
                drop=nn.Dropout(dropout),
                fc2=nn.Linear(hidden, hidden),
                relu2=nn.ReLU(),
                fc3=_ZeroLinear(hidden, num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.feature_extractor(x), 1))
        return logits


def trades_cnn(
    in_channels: int, num_classes: int, image_size: int, width: int = 32, hidden: int = 200, dropout: float = 0.5
) -> nn.Module:
    """`trades-cnn`: see `TradesCNN`. 312,202 parameters for ten classes of 1x28x28 images."""
    check_size("trades-cnn", image_size, 16, "two pairs of unpadded convolutions and two poolings leave nothing of it")
    return TradesCNN(
        in_channels,
        num_classes,
        image_size,
        whole(width, 1, "trades-cnn: width"),
        whole(hidden, 1, "trades-cnn: hidden"),
        dropout_rate(dropout, "trades-cnn: dropout"),
    )
