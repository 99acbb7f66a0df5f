"""Filter quality: are a network's 3x3 filters varied, or copies of each other? Seconds, without data.

Gavrikov, Keuper: *CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters*, CVPR 2022, arXiv 2203.15331.
For a layer's filters as rows of a matrix (n, 9), centred by column, with singular values s:

    variance entropy  H = -sum v_i log10 v_i,  v = s^2 / sum s^2,  in [0, log10 9 = 0.954]
    normalised        H / T(n),  T(n) = L / (1 + exp(-k (log2 n - x0))) + b: what n random filters have
    sparsity          the share of filters whose every |w| is below 1 % of the layer's largest

Near 0 filters are copies of a few; about 0.9 is usual of healthy networks; 1 or more cannot be told from random numbers. A low
value goes with poor robustness in the authors' collection; it proves nothing about one network.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SPARSE = 0.01
LEAST = 8  # filters below which T(n) says nothing (T(2) is negative)
_L, _X0, _K, _B = 1.2618047, 2.30436435, 0.88767525, -0.31050834


@dataclass(frozen=True)
class FilterQuality:
    """Of one layer; NaN where its weights are not finite.

    Attributes:
        layer: the module's name.
        n: 3x3 filters.
        sparsity: in [0, 1].
        entropy: in [0, 0.954].
        normalised: entropy over that of n random filters; None for fewer than eight filters.
        clean_entropy: entropy without the sparse filters.
        orthogonality: 1 for output filters at right angles, lower the more they point in the same directions; None for one
            output channel.
    """

    layer: str
    n: int
    sparsity: float
    entropy: float
    normalised: float | None
    clean_entropy: float
    orthogonality: float | None


def random_entropy(n: int) -> float:
    """T(n): the variance entropy of n random filters, fitted by the authors."""
    return _L / (1 + math.exp(-_K * (math.log2(n) - _X0))) + _B


def variance_entropy(filters: Tensor) -> float:
    """H of filters (n, 9); 0 where they are all the same, NaN where they are not finite."""
    filters = filters.double()
    if not bool(torch.isfinite(filters).all()):
        return math.nan
    if len(filters) == 0:
        return 0.0
    centred = filters - filters.mean(dim=0)
    # Squared singular values, from the 9 x 9 products of columns: n of any size costs 81 n. Errors are 1e-16 of the largest,
    # which is what a share of that size would add to the entropy.
    variances = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0.0)
    # What rounding leaves of equal filters is no variance.
    floor = (torch.finfo(torch.float32).eps * filters.norm()) ** 2
    total = float(variances.sum())
    if total <= float(floor):
        return 0.0
    share = (variances / total).numpy()
    share = share[share > 0]
    return max(0.0, float(-(share * np.log10(share)).sum()))


def layer_quality(layer: str, weight: Tensor) -> FilterQuality:
    """Of a weight (out, in / groups, 3, 3)."""
    weight = weight.detach().cpu()
    filters = weight.reshape(-1, 9)
    if not bool(torch.isfinite(filters).all()):
        return FilterQuality(layer, len(filters), *[math.nan] * 5)
    largest = float(filters.abs().max())
    sparse = (
        (filters.abs() < SPARSE * largest).all(dim=1) if largest > 0 else torch.ones(len(filters), dtype=torch.bool)
    )
    entropy = variance_entropy(filters)
    return FilterQuality(
        layer=layer,
        n=len(filters),
        sparsity=float(sparse.double().mean()),
        entropy=entropy,
        normalised=entropy / random_entropy(len(filters)) if len(filters) >= LEAST else None,
        clean_entropy=variance_entropy(filters[~sparse]),
        orthogonality=_orthogonality(weight.flatten(1).double()),
    )


def _orthogonality(rows: Tensor) -> float | None:
    """1 - sum |W W' - I| / (n (n - 1)) of rows brought to length 1; a row of zeros is at right angles to all."""
    n = len(rows)
    if n < 2:
        return None
    unit = nn.functional.normalize(rows, dim=1)
    gram = (unit @ unit.T).abs()
    gram.fill_diagonal_(0.0)
    return float(1 - gram.sum() / (n * (n - 1)))


def filter_quality(model: nn.Module) -> list[FilterQuality]:
    """Of every 3x3 convolution of a network, in the order in which they are defined; empty where it has none."""
    return [
        layer_quality(name, part.weight)
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)
    ]


def filter_rows(model: nn.Module) -> list[dict[str, Any]]:
    """The same as JSON-like values for results: six digits, null where undefined or not finite."""
    return [{name: _told(value) for name, value in asdict(found).items()} for found in filter_quality(model)]


def _told(value: Any) -> Any:
    """A number to six digits: sums over many filters may differ in the last ones from machine to machine."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
