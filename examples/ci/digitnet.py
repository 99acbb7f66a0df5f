"""The project's own model: a small convolutional network for 8x8 digits, and the data it is tested on."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights.safetensors"


class DigitNet(nn.Sequential):
    """Grey images (N, 1, 8, 8) in [0, 1] to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


def build() -> nn.Module:
    """The trained model."""
    model = DigitNet()
    model.load_state_dict(load_file(str(WEIGHTS)))
    return model.eval()


def split() -> dict[str, tuple[Tensor, Tensor]]:
    """1,197 images for training, 600 for testing; each (x, y)."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(y)), test_size=600, random_state=0, stratify=digits.target)
    return {"train": (x[train], y[train]), "test": (x[test], y[test])}
