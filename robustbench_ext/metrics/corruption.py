"""Errors under corruptions: the plain mean, mCE and relative mCE of ImageNet-C, the drop in accuracy.

Hendrycks, Dietterich: *Benchmarking neural network robustness to common corruptions and perturbations*, ICLR 2019,
arXiv 1903.12261. With the top-1 error E_{s,c} at severity s of corruption c, and a baseline's A_{s,c},

    mean error     (1/15) sum_c (1/5) sum_s E_{s,c}
    mCE            (1/15) sum_c  sum_s E_{s,c} / sum_s A_{s,c}
    relative mCE   (1/15) sum_c  sum_s (E_{s,c} - E_clean) / sum_s (A_{s,c} - A_clean)
    drop           (1/15) sum_c (1/5) sum_s E_{s,c} - E_clean: clean accuracy less the mean one under corruptions

Ratios are of sums over severities, not means of ratios. All fifteen corruptions and all five severities are needed: a mean over
fewer is another number. The four extra ones (speckle noise, Gaussian blur, spatter, saturate) stay out. The published baseline
is AlexNet on ImageNet-C, and means something for ImageNet-C alone: no baseline is standard for CIFAR-10-C and other small
images, where the plain mean is what is reported. A relative mCE may be negative, and is unstable where errors differ little.

The samples are the same under every corruption, and so they are resampled: whole samples, with all their 75 verdicts. Another
model's errors on the same samples are resampled with them; published ones are taken as known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import Estimate, require
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.metrics.resampling import percentile, resampled_sums, sample_mean

SEVERITIES = (1, 2, 3, 4, 5)
Verdicts = Mapping[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class Baseline:
    """A model's errors that others are divided by.

    Attributes:
        name: for reports.
        errors: by corruption, the top-1 error as a fraction, mean over the five severities.
        clean: its error without corruption.
    """

    name: str
    errors: Mapping[str, float]
    clean: float


# Published with ImageNet-C; the clean error is that of torchvision's weights, which they were measured with.
ALEXNET = Baseline(
    "AlexNet",
    {
        "gaussian-noise": 0.886428,
        "shot-noise": 0.894468,
        "impulse-noise": 0.922640,
        "defocus-blur": 0.819880,
        "glass-blur": 0.826268,
        "motion-blur": 0.785948,
        "zoom-blur": 0.798360,
        "snow": 0.866816,
        "frost": 0.826572,
        "fog": 0.819324,
        "brightness": 0.564592,
        "contrast": 0.853204,
        "elastic-transform": 0.646056,
        "pixelate": 0.717840,
        "jpeg-compression": 0.606500,
    },
    0.43478,
)
FIFTEEN = tuple(ALEXNET.errors)


def mean_error(correct: Verdicts) -> Estimate:
    """Mean top-1 error over the fifteen corruptions and five severities, a fraction.

    Args:
        correct: bool (N,) by (corruption, severity), the same samples in the same order for all; others than the fifteen are
            left out.

    Raises:
        DataError: a corruption or a severity is missing, or the numbers of samples differ.
    """
    per_sample = _errors(correct).mean(axis=1)
    n, value = len(per_sample), float(per_sample.mean())
    if per_sample.min() == per_sample.max() and value in (0.0, 1.0):
        # No resample differs. Wilson's end holds: the mean is at most the probability of any mistake at all.
        return Estimate(value, *wilson(round(value * n), n), "Wilson", n)
    return sample_mean(per_sample)


def accuracy_drop(correct: Verdicts, clean: np.ndarray) -> Estimate:
    """Clean accuracy minus the mean over the fifteen corruptions and five severities, paired by sample, in [-1, 1].

    Args:
        correct, clean: as in `relative_mce`.

    Raises:
        DataError: as in `mean_error`.
    """
    per_sample = _rises(correct, clean).mean(axis=1)
    n, value = len(per_sample), float(per_sample.mean())
    if per_sample.min() == per_sample.max():
        return Estimate(value, math.nan, math.nan, "none", n, "no resample differs")
    return sample_mean(per_sample)


def mce(correct: Verdicts, baseline: Baseline | Verdicts = ALEXNET) -> Estimate:
    """mCE as a fraction of the baseline: 1 is as many errors as it makes.

    Args:
        correct: as in `mean_error`.
        baseline: published errors, or another model's verdicts on the same samples.

    Raises:
        DataError: as in `mean_error`; in the baseline likewise.
    """
    return _against(correct, None, baseline, None)


def relative_mce(
    correct: Verdicts,
    clean: np.ndarray,
    baseline: Baseline | Verdicts = ALEXNET,
    baseline_clean: np.ndarray | None = None,
) -> Estimate:
    """Relative mCE as a fraction of the baseline's: 1 is as large a rise of the error over the clean one.

    Args:
        correct, baseline: as in `mce`.
        clean: bool (N,), the verdicts on the same samples without corruption.
        baseline_clean: the other model's, where `baseline` holds verdicts.

    Raises:
        DataError: as in `mce`, or the other model's clean verdicts are missing.
    """
    if not isinstance(baseline, Baseline) and baseline_clean is None:
        raise DataError("relative mCE: the baseline's verdicts without corruption are missing; give baseline_clean")
    return _against(correct, clean, baseline, baseline_clean)


def mce_of_errors(errors: Mapping[str, float], baseline: Baseline = ALEXNET) -> float:
    """mCE of errors that are known only as means over the five severities, such as published ones.

    >>> mce_of_errors(ALEXNET.errors)
    1.0

    Raises:
        DataError: one of the fifteen corruptions is missing, here or in the baseline.
    """
    return float(np.mean(_known(errors, "errors") / _known(baseline.errors, baseline.name)))


def relative_mce_of_errors(errors: Mapping[str, float], clean: float, baseline: Baseline = ALEXNET) -> float:
    """Relative mCE, as `mce_of_errors`; `clean` is the error without corruption.

    >>> relative_mce_of_errors(ALEXNET.errors, ALEXNET.clean)
    1.0
    """
    rise = _known(baseline.errors, baseline.name) - baseline.clean
    return float(np.mean((_known(errors, "errors") - clean) / rise))


def _known(errors: Mapping[str, float], what: str) -> np.ndarray:
    if missing := [name for name in FIFTEEN if name not in errors]:
        raise DataError(f"mCE: {what}: no error for {', '.join(missing)}; all of the fifteen corruptions are needed")
    return np.array([errors[name] for name in FIFTEEN], dtype=np.float64)


def _errors(correct: Verdicts) -> np.ndarray:
    """Mean error over severities of each sample and corruption, (N, 15)."""
    wanted = [(name, severity) for name in FIFTEEN for severity in SEVERITIES]
    if missing := [f"{name} at severity {severity}" for name, severity in wanted if (name, severity) not in correct]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            f"corruption error: no verdicts for {shown}. It is a mean over fifteen corruptions at severities 1 to 5 and not "
            f"defined for fewer; run them all (names with hyphens, as in {FIFTEEN[0]})"
        )
    columns = {f"{name} {severity}": np.asarray(correct[name, severity], dtype=bool) for name, severity in wanted}
    require("corruption error", **columns)
    wrong = ~np.stack(list(columns.values()), axis=1)
    return np.asarray(wrong.reshape(len(wrong), len(FIFTEEN), len(SEVERITIES)).mean(axis=2))


def _against(
    correct: Verdicts, clean: np.ndarray | None, baseline: Baseline | Verdicts, baseline_clean: np.ndarray | None
) -> Estimate:
    """Mean over corruptions of one model's errors over another's, both less their clean ones where these are given."""
    above = _rises(correct, clean)
    n = len(above)
    if isinstance(baseline, Baseline):
        known = _known(baseline.errors, baseline.name) - (0.0 if clean is None else baseline.clean)
        below = np.broadcast_to(known, above.shape)
    else:
        below = _rises(baseline, baseline_clean)
        require("mCE", model=above, baseline=below)
    point = np.concatenate([above, below], axis=1).mean(axis=0)[None]
    if (bad := np.flatnonzero(point[0, len(FIFTEEN) :] <= 0)).size:
        names = ", ".join(FIFTEEN[k] for k in bad)
        return Estimate.undefined(
            n,
            f"the baseline's errors are no higher than {'its clean ones' if clean is not None else '0'} under {names}",
        )
    value = float(_ratio(point)[0])
    values = _ratio(resampled_sums(np.concatenate([above, below], axis=1)))
    if not np.isfinite(values).all():
        return Estimate(value, math.nan, math.nan, "none", n, "the baseline makes no error in some resamples")
    if np.ptp(values) <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, math.nan, math.nan, "none", n, "no resample differs")
    return percentile(value, values, n)


def _rises(correct: Verdicts, clean: np.ndarray | None) -> np.ndarray:
    errors = _errors(correct)
    if clean is None:
        return errors
    clean = np.asarray(clean, dtype=bool)
    require("relative mCE", corrupted=errors, clean=clean)
    return np.asarray(errors - ~clean[:, None])


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Mean of the first fifteen columns over the last fifteen: (r, 30) to (r,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((sums[:, : len(FIFTEEN)] / sums[:, len(FIFTEEN) :]).mean(axis=1))
