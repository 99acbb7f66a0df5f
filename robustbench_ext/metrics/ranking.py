"""Does uncertainty rank errors? All of this depends on the uncertainty through its order alone.

The area between sparsification curves, which does too, is in `selective`.
"""

from __future__ import annotations

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.detection import auroc
from robustbench_ext.metrics.estimate import Estimate, require
from robustbench_ext.metrics.resampling import of_ranks


def error_spearman(uncertainty: np.ndarray, errors: np.ndarray) -> Estimate:
    """Spearman's rank correlation (mid-ranks) of uncertainty with the absolute errors; undefined where either is constant.

    Args:
        uncertainty: (N,), higher = less certain; errors: (N,), signed or absolute.

    The interval is a percentile bootstrap; above 16,384 samples Student's t over random batches.
    """
    require("Spearman", uncertainty=uncertainty, errors=errors)
    if uncertainty.ndim != 1 or errors.ndim != 1:
        raise DataError(f"Spearman: uncertainty {uncertainty.shape} and errors {errors.shape}, expected (N,) and (N,)")
    size, n = np.abs(errors), len(errors)
    for name, values in (("errors", size), ("uncertainties", uncertainty)):
        if values.min() == values.max():
            return Estimate.undefined(n, f"all {name} are equal")
    a, b = _Ranks(uncertainty), _Ranks(size)

    def alone(part: np.ndarray) -> float:
        ones = np.ones((1, len(part)))
        return float(_correlation(_Ranks(uncertainty[part]).of(ones), _Ranks(size[part]).of(ones), ones)[0])

    value = alone(np.arange(n))
    return of_ranks(value, lambda w: _correlation(a.of(w), b.of(w), w), alone, n, lower=-1.0, upper=1.0)


class _Ranks:
    """Mid-ranks of values (N,) in resamples, a sample of weight w standing for w copies."""

    def __init__(self, values: np.ndarray) -> None:
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        self._first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        self._sizes = np.diff(np.append(self._first, len(values)))

    def of(self, weights: np.ndarray) -> np.ndarray:
        """Mid-ranks (r, N), less their mean, in the order of the samples, for weights (r, N)."""
        mass = np.add.reduceat(weights[:, self._order], self._first, axis=1)
        upto = np.cumsum(mass, axis=1)
        ranks = np.empty_like(weights)
        ranks[:, self._order] = np.repeat(upto - mass / 2 - upto[:, -1:] / 2, self._sizes, axis=1)
        return ranks


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted correlations (r,) of centred ranks (r, N); NaN where one of them is constant."""
    both = (weights * a * b).sum(axis=1)
    scale = np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1))
    return np.asarray(np.divide(both, scale, out=np.full(len(both), np.nan), where=scale > 0))


def error_auroc(uncertainty: np.ndarray, wrong: np.ndarray) -> Estimate:
    """AUROC of uncertainty (N,) for telling mistakes from correct answers, `wrong` bool (N,) being the positives; DeLong."""
    require("AUROC of mistakes", uncertainty=uncertainty, wrong=wrong)
    wrong = wrong.astype(bool)
    if wrong.all() or not wrong.any():
        return Estimate.undefined(len(wrong), f"every answer is {'wrong' if wrong.all() else 'correct'}")
    return auroc(uncertainty[~wrong], uncertainty[wrong])
