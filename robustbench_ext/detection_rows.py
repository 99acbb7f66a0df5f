"""What is said of detectors under one condition, from their scores alone: how well they tell it from clean inputs, how that
compares with the first detector, what they catch at a stated false-alarm rate, what they are worth for abstaining.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from robustbench_ext.metrics import Estimate, conformal, paired, selective
from robustbench_ext.metrics import detection as det

NO_UNKNOWN = "no unknown inputs (no attack succeeded)"


@dataclass(frozen=True)
class Scores:
    """A detector's scores of clean test inputs, of a condition's (those that count), and of clean calibration inputs.

    `calibration` is None where the data has no calibration split.
    """

    clean: np.ndarray
    unknown: np.ndarray
    calibration: np.ndarray | None


Found = tuple[str, str, Estimate, dict[str, str]]  # probe, metric, estimate, further fields of the row


def separation(scores: Mapping[str, Scores]) -> Iterator[Found]:
    """Threshold-free and threshold metrics of every detector, gains over the first, alarms."""
    for probe, s in scores.items():
        yield probe, "auroc", det.auroc(s.clean, s.unknown), {}
        for metric, estimate in det.threshold_metrics(s.clean, s.unknown).items():
            yield probe, metric, estimate, {}
        if s.calibration is not None:
            none = Estimate.undefined(0, NO_UNKNOWN)
            yield probe, "alarms", conformal.alarms(s.calibration, s.unknown) if len(s.unknown) else none, {}
    yield from _gains(scores)


def _gains(scores: Mapping[str, Scores]) -> Iterator[Found]:
    if not scores:
        return
    first, *others = scores.items()
    name, base = first
    compared = [(probe, paired.compare_auroc(s.clean, s.unknown, base.clean, base.unknown)) for probe, s in others]
    corrected = paired.holm([c.p_value for _, c in compared])
    for (probe, comparison), p in zip(compared, corrected, strict=True):
        gain = comparison.difference
        yield probe, "auroc_gain", gain, {"against": name}
        reason = gain.reason or ("" if p == p else "no test")
        yield probe, "auroc_gain_p", Estimate(p, float("nan"), float("nan"), "Holm", gain.n, reason), {"against": name}


def false_alarms(scores: Mapping[str, Scores]) -> Iterator[Found]:
    """What a threshold set on clean calibration inputs says of clean test inputs."""
    for probe, s in scores.items():
        if s.calibration is not None:
            yield probe, "false_alarms", conformal.alarms(s.calibration, s.clean), {}


def abstaining(scores: Mapping[str, np.ndarray], right: np.ndarray) -> Iterator[Found]:
    """Risk and coverage where the classifier answers the least suspicious samples first."""
    for probe, suspicion in scores.items():
        area, excess = selective.aurc_and_excess(suspicion, ~right)
        yield probe, "aurc", area, {}
        yield probe, "e_aurc", excess, {}
