"""What tests share: data, small trained models, a tiny suite. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses import Standard
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.data import Dataset, load_dataset
from robustbench_ext.models import load_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def mnist() -> Dataset:
    return load_dataset("mnist5k")


def _trained(data: Dataset, folder: Any, epochs: int) -> nn.Module:
    recipe = Recipe(epochs=epochs, eps=0.1, validation_n=50, validation_steps=1)
    train(Standard(), Architecture("small-cnn", data.shape, 10), data, recipe, folder)
    return load_model(str(folder)).module.eval()


@pytest.fixture(scope="session")
def digits_model(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A standard small CNN on digits (about a second to train)."""
    return _trained(digits, tmp_path_factory.mktemp("digits") / "model", 12)


@pytest.fixture(scope="session")
def mnist_model(mnist: Dataset, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A standard small CNN on mnist5k (a few seconds to train)."""
    return _trained(mnist, tmp_path_factory.mktemp("mnist") / "model", 6)


@pytest.fixture(scope="session")
def digits_test(digits: Dataset) -> tuple[Tensor, Tensor, Any]:
    """Inputs, labels and ids of the digits' test split."""
    split = digits["test"]
    return split.images(slice(None)), torch.from_numpy(split.labels), split.ids


@pytest.fixture(scope="session")
def mnist_test(mnist: Dataset) -> tuple[Tensor, Tensor, Any]:
    """Inputs, labels and ids of mnist5k's 1,000 test images."""
    split = mnist["test"]
    return split.images(slice(None)), torch.from_numpy(split.labels), split.ids


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One finished run of the tiny suite and its summary; read it, do not change it."""
    from robustbench_ext.engine import run_suite

    folder = tmp_path_factory.mktemp("run")
    return folder, run_suite(_tiny_suite(), folder)


@pytest.fixture
def tiny_suite() -> dict[str, Any]:
    """Two models on digits under every kind of condition; seconds."""
    return _tiny_suite()


def _tiny_suite() -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "tiny",
        "data": "digits",
        "n": 120,
        "chunk_size": 60,
        "models": [
            {
                "name": "standard",
                "train": {"defense": "standard", "recipe": {"epochs": 4, "eps": 0.1, "validation_n": 50}},
            },
            {
                "name": "trades",
                "train": {
                    "defense": {"name": "trades", "beta": 3},
                    "recipe": {"epochs": 4, "eps": "1e-1", "attack_steps": 2, "validation_n": 50},
                },
            },
        ],
        "conditions": [
            {"attack": "pgd", "eps": ["1/20", 0.1], "steps": 5, "stop": "never"},
            {"attack": "apgd-ce", "eps": 0.1, "steps": 8},
            {"corruption": "gaussian-noise", "severity": [1, 5]},
            {"outliers": ["letters", "uniform-noise"], "n": 60},
        ],
        "detectors": ["msp", "energy", "mahalanobis"],
        "uq": ["temperature"],
    }
