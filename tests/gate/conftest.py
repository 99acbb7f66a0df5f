"""A tiny project for pytester: three classes of 8 x 8 images and a linear model; no download, no training."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Loaded once here: what an inner pytest imports first is forgotten when it ends.
import robustbench_ext.gate.session
import robustbench_ext.gate.summary
import robustbench_ext.testing  # noqa: F401
import uq.regression  # noqa: F401

TINY = '''
import torch
from torch import nn


def data(n=300, seed=0):
    """Images (n, 1, 8, 8) in [0, 1] and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 0.5 + 0.3 * templates()[y] + 0.25 * torch.randn(n, 1, 8, 8, generator=generator)
    return x.clamp(0, 1), y


def templates():
    generator = torch.Generator().manual_seed(7)
    shades = torch.tensor([0.15, 0.0, -0.15]).view(3, 1, 1, 1)
    return torch.rand(3, 1, 8, 8, generator=generator) - 0.5 + shades


class Net(nn.Module):
    def __init__(self, noise=0.0, seed=0):
        super().__init__()
        self.flat, self.head = nn.Flatten(), nn.Linear(64, 3)
        generator = torch.Generator().manual_seed(seed)
        weights = 10 * templates().flatten(1)
        with torch.no_grad():
            self.head.weight.copy_(weights + noise * torch.randn(weights.shape, generator=generator))
            self.head.bias.copy_(-0.5 * weights.sum(1) - 1.5 * (templates().flatten(1) ** 2).sum(1))

    def forward(self, x):
        return self.head(self.flat(x))


def make():
    return Net().eval()
'''

CONFTEST = """
import os
import pytest

@pytest.fixture(scope="session")
def model():
    import tiny  # the controller of xdist needs no torch
    return tiny.Net(float(os.environ.get("NOISE", "0"))).eval()

@pytest.fixture(scope="session")
def test_data():
    import tiny
    return tiny.data()
"""


class Project:
    """A project in pytester's folder, and ways to run it."""

    def __init__(self, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pytester, self._monkeypatch = pytester, monkeypatch
        self.path: Path = pytester.path
        monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("COLUMNS", "80")
        self.write("tiny.py", TINY)
        self.write("conftest.py", CONFTEST)
        self.write("pytest.ini", "[pytest]\naddopts = --strict-markers -p no:cacheprovider\n")

    def write(self, name: str, text: str) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    def save_data(self) -> None:
        """The images as `npz:data.npz`."""
        namespace: dict[str, Any] = {}
        exec(TINY, namespace)
        x, y = namespace["data"]()
        np.savez(self.path / "data.npz", x=x.numpy(), y=y.numpy())

    def run(self, *args: str, noise: float = 0.0) -> pytest.RunResult:
        """In this process."""
        self._monkeypatch.setenv("NOISE", str(noise))
        return self.pytester.runpytest_inprocess(*args)

    def start(self, *args: str, noise: float = 0.0) -> pytest.RunResult:
        """In a process of its own."""
        self._monkeypatch.setenv("NOISE", str(noise))
        return self.pytester.runpytest_subprocess(*args)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(pytester, monkeypatch)
