"""What is expected of a number, and what is said where it is not met.

A verdict is statistical: the interval of the estimate decides, not its value. Wholly on the right side of the threshold: pass.
Wholly on the wrong side: fail. Otherwise the number of samples does not suffice to say, which is *inconclusive*. So a model
whose true value meets the threshold fails with a probability of at most (1 - confidence) / 2, 2.5 % by default, for each
expectation; who states k of them may give `confidence=1 - 0.05 / k` (Bonferroni). Verdicts are also reproducible: the same
model, data and seed give the same numbers, so nothing fails at one time and passes at another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from scipy.special import ndtri

from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics import decision, paired
from robustbench_ext.metrics.estimate import METRICS, Estimate
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.numbers import parse_number

if TYPE_CHECKING:
    from robustbench_ext.gate.measurement import Measurement
    from robustbench_ext.results import Row

Outcome = Literal["pass", "fail", "inconclusive", "skipped"]
ROUNDING = 1e-5  # relative differences below this are no differences: other machines round otherwise


@dataclass(frozen=True)
class Verdict:
    """What an expectation came to."""

    outcome: Outcome
    message: str


# Deciding: pure functions ----------------------------------------------------------------------------------------------


def at_level(estimate: Estimate, level: float) -> Estimate:
    """The estimate with an interval of another level: Wilson's exactly, others rescaled as normal ones."""
    if level == estimate.level or math.isnan(estimate.value):
        return estimate
    if estimate.ci_method == "Wilson":
        low, high = wilson(round(estimate.value * estimate.n), estimate.n, level)
    else:
        scale = float(ndtri((1 + level) / 2) / ndtri((1 + estimate.level) / 2))
        low = estimate.value - scale * (estimate.value - estimate.ci_low)
        high = estimate.value + scale * (estimate.ci_high - estimate.value)
    return replace(estimate, ci_low=low, ci_high=high, level=level)


def judge_range(estimate: Estimate, low: float, high: float) -> tuple[Outcome, int | None]:
    """Whether the true value lies in [low, high]; and where that is not decided, about how many samples would decide.

    Args:
        low, high: -inf or inf where there is no bound.
    """
    verdicts = []
    if low > -math.inf:
        verdicts.append((decision.at_least(estimate, low), low))
    if high < math.inf:
        verdicts.append((decision.at_most(estimate, high), high))
    if any(verdict == "fail" for verdict, _ in verdicts):
        return "fail", None
    open_ = [threshold for verdict, threshold in verdicts if verdict == "inconclusive"]
    if not open_:
        return "pass", None
    if math.isnan(estimate.value):
        return "inconclusive", None
    needed = [decision.samples_to_decide_threshold(estimate, threshold) for threshold in open_]
    return "inconclusive", None if None in needed else max(n for n in needed if n is not None)


def judge_difference(
    comparison: paired.Comparison, higher_is_better: bool, margin: float = 0.0, level: float = 0.95, scale: float = 0.0
) -> tuple[Outcome, int | None]:
    """Whether now is not worse than before by more than a margin; comparison: now - before.

    Without a margin nothing but a significant drop can be asked about, and its absence passes. With a margin the interval has
    to exclude a drop of that size to pass.

    Args:
        scale: size of the values compared; differences below `ROUNDING` of it are none.
    """
    value = comparison.difference.value
    if abs(value) <= ROUNDING * scale and margin == 0:
        return "pass", None
    found = decision.outcome(comparison, higher_is_better, 1 - level, margin)
    if found == "worse":
        return "fail", None
    if found == "better" or (margin == 0 and not math.isnan(comparison.p_value)):
        return "pass", None
    return "inconclusive", decision.samples_to_decide(
        comparison, 1 - level, margin=-margin if higher_is_better else margin
    )


# Stating -------------------------------------------------------------------------------------------------------------


class Expectation:
    """A measured number of which something can be expected.

    Attributes:
        metric, condition, probe, group: what it is, as in results.json.
        estimate: value, interval, its method and n; None where it was not measured in time, then `reason` says why.
    """

    def __init__(
        self,
        measurement: Measurement,
        metric: str,
        condition: str,
        probe: str,
        group: str | None,
        row: Row | None,
        reason: str = "",
    ) -> None:
        self.measurement, self.metric, self.condition, self.probe, self.group = (
            measurement,
            metric,
            condition,
            probe,
            group,
        )
        self.row = row
        self.estimate = None if row is None else estimate_of(row)
        self.reason = reason or (row.reason if row is not None else "")

    @property
    def value(self) -> float:
        """The estimate's value; NaN where undefined."""
        return math.nan if self.estimate is None else self.estimate.value

    @property
    def interval(self) -> tuple[float, float]:
        """Its interval."""
        return (math.nan, math.nan) if self.estimate is None else (self.estimate.ci_low, self.estimate.ci_high)

    @property
    def name(self) -> str:
        """Metric, condition, and where they say something the probe and the group."""
        where = [self.condition] if self.condition != "clean" else []
        where += [self.probe] if self.probe not in ("", "classifier", "regressor") else []
        where += [self.group] if self.group else []
        return self.metric + (f" ({', '.join(where)})" if where else "")

    def __repr__(self) -> str:
        return f"<{self.name}: {self.estimate if self.estimate is not None else self.reason}>"

    def _not_bare(self, *_: object) -> NoReturn:
        raise TypeError(
            f"{self.name} is an estimate with an interval, not a number: use .at_least(...), .at_most(...) or .between(...), "
            f"or .value for the bare number"
        )

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = _not_bare  # type: ignore[assignment]
    __eq__ = __ne__ = _not_bare  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def at_least(self, threshold: float | str, *, confidence: float | None = None) -> Verdict:
        """Expect the true value to be at least the threshold.

        Raises:
            AssertionError: the whole interval is below it; or it holds it, with --robust-strict.
        """
        __tracebackhide__ = True
        return self._expect(self._number(threshold), math.inf, confidence)

    def at_most(self, threshold: float | str, *, confidence: float | None = None) -> Verdict:
        """Expect the true value to be at most the threshold; see `at_least`."""
        __tracebackhide__ = True
        return self._expect(-math.inf, self._number(threshold), confidence)

    def between(self, low: float | str, high: float | str, *, confidence: float | None = None) -> Verdict:
        """Expect the true value to lie in [low, high]; see `at_least`."""
        __tracebackhide__ = True
        least, most = self._number(low), self._number(high)
        if not least < most:
            raise ConfigError(f"{self.metric}: between({low}, {high}), expected the lower bound first")
        return self._expect(least, most, confidence)

    def not_worse_than_baseline(
        self, *, margin: float | str = 0.0, confidence: float | None = None, higher_is_better: bool | None = None
    ) -> Verdict:
        """Expect it not to be worse than in the baseline by more than a margin; see `Measurement.not_worse_than_baseline`."""
        __tracebackhide__ = True
        return self.measurement._compare(self, margin, confidence, higher_is_better)

    def _number(self, threshold: Any) -> float:
        number = parse_number(threshold, f"{self.metric}: threshold")
        if METRICS[self.metric].percent and abs(number) > 1:
            raise ConfigError(
                f"{self.metric}: threshold {threshold}, expected a proportion between 0 and 1: 0.45, not 45"
            )
        return number

    def _expect(self, low: float, high: float, confidence: float | None) -> Verdict:
        __tracebackhide__ = True
        level = self.measurement.engine.confidence(confidence)
        wanted = wanted_text(low, high)
        if self.estimate is None or math.isnan(self.estimate.value):
            text = f"{self.name}, wanted {wanted}: there is no number to judge ({self.reason or 'undefined'})"
            return self.measurement.engine.conclude(self, "inconclusive", wanted, text)
        estimate = at_level(self.estimate, level)
        outcome, needed = judge_range(estimate, low, high)
        side = {"pass": "meets", "fail": "misses", "inconclusive": "does not decide"}[outcome]
        lines = [
            f"{self.name} {side} {wanted}: {self.shown(estimate.value)}, {100 * level:.6g} % interval "
            f"{self.shown(estimate.ci_low)} to {self.shown(estimate.ci_high)} ({estimate.ci_method}, n = {estimate.n})"
        ]
        if outcome == "inconclusive":
            lines.append(more_samples(needed, estimate.n))
        if outcome == "fail":
            lines += self.measurement._evidence(self)
        return self.measurement.engine.conclude(self, outcome, wanted, "\n".join(lines), estimate)

    def shown(self, value: float) -> str:
        """A value of this metric as text."""
        return f"{value:.3f}" if METRICS[self.metric].percent else f"{value:.4g}"


def estimate_of(row: Row) -> Estimate:
    """A row's estimate; null is NaN again."""
    low, value, high = (math.nan if v is None else v for v in (row.ci_low, row.value, row.ci_high))
    return Estimate(value, low, high, row.ci_method, row.n, row.reason, row.ci_level)


def wanted_text(low: float, high: float) -> str:
    """`>= 0.45`, `<= 0.05`, `in [0.85, 0.95]`."""
    if high == math.inf:
        return f">= {low:g}"
    return f"<= {high:g}" if low == -math.inf else f"in [{low:g}, {high:g}]"


def more_samples(needed: int | None, n: int) -> str:
    """What would decide."""
    if needed is None:
        return "no number of samples can be named that would decide this"
    return f"about {needed} samples would decide it, in four cases of five (n = {n})"
