"""What may be said of an estimate or a difference - better, worse, or not decided - and how many samples would decide it."""

from __future__ import annotations

import math
from typing import Literal

from scipy.special import ndtri

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.estimate import LEVEL, Estimate
from robustbench_ext.metrics.paired import Comparison

Outcome = Literal["better", "worse", "inconclusive"]
Verdict = Literal["pass", "fail", "inconclusive"]

ALPHA = 1 - LEVEL
POWER = 0.8


def outcome(comparison: Comparison, higher_is_better: bool, alpha: float = ALPHA, margin: float = 0.0) -> Outcome:
    """Whether a is better than b.

    Without a margin the p-value decides: "better" or "worse" where it is below alpha, by the sign of the difference. With a
    margin > 0 (non-inferiority) the question is whether a is worse than b by more than the margin: "worse" where it surely
    is, "better" where it surely is not, by the interval, rescaled from its own level to 1 - alpha as a normal one.

    Args:
        comparison: a - b; give it a corrected p-value where several were tested.
        alpha: two-sided, in (0, 1).
        margin: >= 0, in units of the metric.
    """
    _check(alpha, margin)
    d = comparison.difference
    if margin == 0:
        if not comparison.p_value < alpha or not d.value:
            return "inconclusive"
        return "better" if (d.value > 0) == higher_is_better else "worse"
    if math.isnan(d.ci_low) or math.isnan(d.ci_high):
        return "inconclusive"
    scale = _z(1 - alpha) / _z(d.level)
    below, above = scale * (d.value - d.ci_low), scale * (d.ci_high - d.value)
    value = d.value if higher_is_better else -d.value
    least, most = (below, above) if higher_is_better else (above, below)
    if value - least > -margin:
        return "better"
    return "worse" if value + most < -margin else "inconclusive"


def samples_to_decide(
    comparison: Comparison, alpha: float = ALPHA, power: float = POWER, margin: float = 0.0
) -> int | None:
    """About how many samples would show a true difference of the size measured, with this power.

    n ((z_{1 - alpha/2} + z_power) se / |d|)^2, se from the side of the interval towards 0; the composition of the samples is
    taken to stay. None where there is no difference or no interval. The room for bias that comparisons of ECE and of the worst
    class leave shrinks faster than 1 / sqrt(n) where there is a difference: the number is then on the safe side, looking ahead.

    Args:
        alpha: two-sided; divide it by the number of tests where these are corrected.
        margin: the difference a - b that is tested against: minus the margin of `outcome` where higher is better, plus it
            where lower is.
    """
    _check(alpha, 0.0)
    return _needed(comparison.difference, margin, alpha, power)


def at_least(estimate: Estimate, threshold: float) -> Verdict:
    """Whether the true value is at least the threshold: "pass" where the whole interval is, "fail" where none of it is.

    Each of the two statements is wrong with a probability of at most (1 - level) / 2. Without an interval: "inconclusive".
    """
    if estimate.ci_low >= threshold:
        return "pass"
    return "fail" if estimate.ci_high < threshold else "inconclusive"


def at_most(estimate: Estimate, threshold: float) -> Verdict:
    """Whether the true value is at most the threshold; see `at_least`."""
    if estimate.ci_high <= threshold:
        return "pass"
    return "fail" if estimate.ci_low > threshold else "inconclusive"


def samples_to_decide_threshold(estimate: Estimate, threshold: float, power: float = POWER) -> int | None:
    """About how many samples would put the interval of `at_least` or `at_most` on one side of the threshold, with this power,
    if the true value were the one measured. None where it is the threshold itself, or where there is no interval.

    Wilson's interval is a test with variance t (1 - t): n = ((z sqrt(t (1 - t)) + z_power sqrt(p (1 - p))) / (p - t))^2.
    Of any other interval the side towards the threshold is taken for z standard errors.
    """
    gap, z = estimate.value - threshold, _z(estimate.level)
    if estimate.ci_method == "Wilson" and 0 < threshold < 1 and gap:
        p, t = estimate.value, threshold
        _check_power(power)
        spread = z * math.sqrt(t * (1 - t)) + float(ndtri(power)) * math.sqrt(p * (1 - p))
        return math.ceil((spread / gap) ** 2)
    return _needed(estimate, threshold, 1 - estimate.level, power)


def _needed(estimate: Estimate, threshold: float, alpha: float, power: float) -> int | None:
    _check_power(power)
    gap = estimate.value - threshold
    half = estimate.value - estimate.ci_low if gap > 0 else estimate.ci_high - estimate.value
    if not gap or not math.isfinite(gap) or not math.isfinite(half):
        return None
    errors = (_z(1 - alpha) + float(ndtri(power))) / _z(estimate.level)
    return max(1, math.ceil(estimate.n * (errors * half / gap) ** 2))


def _z(level: float) -> float:
    """Half the width of a normal interval of this level, in standard errors."""
    return -float(ndtri((1 - level) / 2))


def _check(alpha: float, margin: float) -> None:
    if not 0 < alpha < 1:
        raise DataError(f"decision: alpha = {alpha}, expected a number between 0 and 1")
    if not (margin >= 0 and math.isfinite(margin)):
        raise DataError(f"decision: margin = {margin}, expected 0 or more, in units of the metric")


def _check_power(power: float) -> None:
    if not 0.5 <= power < 1:
        raise DataError(f"decision: power = {power}, expected at least 0.5 and less than 1")
