"""Shifts of tabular inputs: noisy features, missing features, a test set drawn from another part of the input space.

Pure functions. Draws belong to samples (`SampleRandom`), so the first two do not depend on what else is in the batch. Labels
stay as they are. Covariate shift chooses among the samples of a split, so it needs all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_ext.data.columns import Columns
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.randomness import SampleRandom

PRINCIPAL = "principal"


def feature_noise(x: Tensor, size: float, columns: Columns, random: SampleRandom, flip: float = 0.0) -> Tensor:
    """Numbers plus N(0, (size s_j)^2) with s_j the standard deviation of column j in training; not clipped to any range.

    Args:
        x: float32 (N, d), raw units.
        size: in standard deviations, >= 0.
        columns: of the training inputs.
        random: the samples' random stream.
        flip: the probability, per category and sample, that a category is replaced by another one, each alike likely.

    Returns:
        float32 (N, d). A larger size scales the same draws; a larger flip changes a superset.
    """
    if not size >= 0 or not 0 <= flip <= 1:
        raise ConfigError(f"feature noise: size = {size}, flip = {flip}; expected size >= 0 and 0 <= flip <= 1")
    step = torch.as_tensor(size * columns.std * columns.numeric, dtype=torch.float64, device=x.device)
    out = (x.double() + step * random.child("noise").normal(x.shape[1:]).double()).float()
    if flip == 0:
        return out
    categories = [part for part in columns.parts if not columns.numeric[part[0]]]
    draws = random.child("flip").uniform((max(1, len(categories)), 2))
    for k, part in enumerate(categories):
        rows = torch.nonzero(draws[:, k, 0] < flip)[:, 0]
        out[rows[:, None], list(part)] = _another(x[rows][:, list(part)], draws[rows, k, 1])
    return out


def _another(indicators: Tensor, draw: Tensor) -> Tensor:
    """Another category than the one that is set, chosen by a uniform draw (N,); of a single column, the opposite."""
    count = indicators.shape[1]
    if count == 1:
        return 1 - indicators
    # The draw has 24 bits, so float32 could round draw * (count - 1) up to count - 1: float64.
    move = 1 + (draw.double() * (count - 1)).long()
    chosen = (indicators.argmax(dim=1) + move) % count
    return torch.nn.functional.one_hot(chosen, count).to(indicators.dtype)


def missing_features(x: Tensor, fraction: float, columns: Columns, random: SampleRandom) -> Tensor:
    """A fraction of each sample's features lost, and put in as a simple imputer would: training mean, most frequent category.

    A category is lost as a whole. Of F features a sample loses floor(fraction F) or one more, `fraction` F on average; with a
    higher fraction it loses a superset.

    Args:
        x: float32 (N, d), raw units.
        fraction: in [0, 1].
        columns: of the training inputs.
        random: the samples' random stream.

    Returns:
        float32 (N, d).
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"missing features: fraction = {fraction}, expected a number in [0, 1]")
    count = len(columns.parts)
    order = random.child("which").uniform((count,)).argsort(dim=1, stable=True).argsort(dim=1)  # rank of each feature
    lost = order < torch.floor(fraction * count + random.child("how-many").uniform((1,)).double())
    of_part = torch.empty(x.shape[1], dtype=torch.long, device=x.device)
    for k, part in enumerate(columns.parts):
        of_part[list(part)] = k
    typical = torch.as_tensor(columns.typical, dtype=torch.float32, device=x.device)
    return torch.where(lost[:, of_part], typical, x)


@dataclass(frozen=True)
class Resampled:
    """What a covariate shift left.

    Attributes:
        index: int64 (k,), positions in the split, ascending: what stays in order stays in order.
        kept: k / N.
        before, after: the mean of z over all and over the kept samples, in training standard deviations.
    """

    index: np.ndarray
    kept: float
    before: float
    after: float


def covariate_shift(
    x: Tensor,
    random: SampleRandom,
    strength: float,
    columns: Columns,
    *,
    keep: float = 0.5,
    along: str = PRINCIPAL,
) -> Resampled:
    """Draw samples with weights exp(strength z), without replacement: P(y | x) stays, P(x) moves.

    The k = ceil(keep N) largest of strength z_i + G_i are kept, with G_i a standard Gumbel draw of sample i (Kool, van Hoof,
    Welling 2019, arXiv 1903.06059): the same as k draws, one after the other, from what is left, each in proportion to its
    weight. So the tilt is exponential for small `keep` and weaker for a larger one, where the pool runs out of samples
    of high weight; `keep` = 1 is no shift at all. The kept samples are what they were and keep their ids.

    Args:
        x: float32 (N, d), all inputs of the split, raw units.
        random: the samples' random stream.
        strength: >= 0 towards larger z, < 0 towards smaller; 0 gives a random subset.
        columns: of the training inputs.
        keep: the fraction that is kept, in (0, 1].
        along: "principal": z is the first principal component of the standardised training inputs; or the name of a column. z
            has mean 0 and standard deviation 1 over the training inputs.

    Raises:
        ConfigError: `keep` out of range, an unknown column, or one that is constant in training.
    """
    if not 0 < keep <= 1 or not np.isfinite(strength):
        raise ConfigError(
            f"covariate shift: keep = {keep}, strength = {strength}; expected 0 < keep <= 1, a finite strength"
        )
    if not len(x):
        raise DataError("covariate shift: there are no samples to choose from")
    z = along_axis(x.cpu().numpy(), columns, along)
    unit = (random.child("gumbel").bits(1)[:, 0].cpu().numpy() + 0.5) * 2.0**-32
    order = np.argsort(-(strength * z - np.log(-np.log(unit))), kind="stable")
    index = np.sort(order[: int(np.ceil(keep * len(x)))])
    return Resampled(index, len(index) / len(x), float(z.mean()), float(z[index].mean()))


def along_axis(x: np.ndarray, columns: Columns, along: str = PRINCIPAL) -> np.ndarray:
    """z of `covariate_shift`, float64 (N,)."""
    if along != PRINCIPAL and along not in columns.names:
        raise ConfigError("covariate shift: " + unknown_name("column", along, [PRINCIPAL, *columns.names]))
    axis = columns.axis if along == PRINCIPAL else np.array([float(name == along) for name in columns.names])
    used = axis != 0
    if not used.any() or not (columns.std[used] > 0).all():
        raise ConfigError(f"covariate shift along '{along}': it is constant in the training data; name another column")
    z = (x[:, used].astype(np.float64) - columns.mean[used]) / columns.std[used] @ axis[used]
    return np.asarray(z / columns.spread if along == PRINCIPAL else z)
