"""Classifiers that are asked and not looked into: no gradient, no features, scores alone.

A module is one where a module in it has the attribute `differentiable = False`. What needs a gradient or a feature is left out
for it (`robustbench_ext.evaluate`): an attack that follows a gradient of zero would break nothing and look like robustness.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import ModelError

CLIP = 1e-6  # probabilities below it count as it: a forest's zeros would become minus infinity
FLAT = 1e-4  # a logsumexp below it, of all inputs, is the rounding of log-probabilities
SUM_TOLERANCE = 1e-3  # of a row of probabilities: float32 sums over thousands of classes, and rounded outputs


def is_black_box(model: nn.Module) -> bool:
    """Whether a model, or a part of it, says that it has no gradient."""
    return any(getattr(module, "differentiable", True) is False for module in model.modules())


class BlackBox(nn.Module, ABC):
    """Scores of something that is no network.

    Args:
        said: what it is and all that its outputs depend on; part of the printed structure, and so of its fingerprint.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, said: str) -> None:
        super().__init__()
        self.said = said
        self.training = False

    def extra_repr(self) -> str:
        return self.said

    @abstractmethod
    def scores(self, x: np.ndarray) -> np.ndarray:
        """Logits (n, K) of float32 (n, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, unused-ignore]
            # A trace would record one batch's outputs as constants, and hold for all inputs that are classified alike.
            raise ModelError(f"{self.said} cannot be traced: it is no network")
        out = np.ascontiguousarray(self.scores(x.detach().cpu().numpy()), dtype=np.float32)
        return torch.from_numpy(out).to(x.device)


def log_probabilities(probabilities: Any, n: int, what: str) -> np.ndarray:
    """log(max(p, 1e-6)), float64 (n, K), of probabilities.

    Their softmax is p again, but for the clip (at most K times 1e-6). Energies say nothing of such logits: logsumexp of
    log-probabilities is 0, and what the clip adds counts the classes below it.

    Raises:
        ModelError: they are no probabilities of n samples.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or len(p) != n or p.shape[1] < 2:
        raise ModelError(f"{what}: predict_proba gave shape {p.shape} for {n} inputs, expected ({n}, K) with K >= 2")
    if not np.isfinite(p).all() or p.min() < -SUM_TOLERANCE or (np.abs(p.sum(axis=1) - 1) > SUM_TOLERANCE).any():
        raise ModelError(
            f"{what}: predict_proba gave rows that are no probabilities (values in [{p.min():.4g}, {p.max():.4g}], sums in "
            f"[{p.sum(axis=1).min():.4g}, {p.sum(axis=1).max():.4g}]); expected values in [0, 1] that sum to 1"
        )
    return np.asarray(np.log(np.maximum(p, CLIP)))


@contextmanager
def one_thread() -> Iterator[None]:
    """The order in which a multi-threaded sum adds up depends on the number of threads."""
    with _thread_pools().limit(limits=1):
        yield


@cache
def _thread_pools() -> Any:
    import sklearn.ensemble  # noqa: F401 - its OpenMP runtime must be loaded to be found
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()
