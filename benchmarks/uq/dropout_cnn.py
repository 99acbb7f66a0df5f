"""small-cnn with dropout in front of its two linear layers, for estimators that sample dropout."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.models.networks import SmallCNN


class DropoutCNN(SmallCNN):
    def __init__(self, p: float) -> None:
        super().__init__(1, 10, 28)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.fc1(self.drop1(torch.flatten(x, 1))))
        logits: Tensor = self.fc2(self.drop2(x))
        return logits


def build(p: float = 0.3) -> nn.Module:
    return DropoutCNN(p)
