"""What a metric gives, and what is known of every metric by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from robustbench_ext.errors import DataError

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        value, ci_low, ci_high: NaN where undefined; then `reason` says why.
        ci_method: how the interval was made, as reports print it.
        n: samples that the value rests on.
        level: nominal coverage of the interval.
    """

    value: float
    ci_low: float
    ci_high: float
    ci_method: str
    n: int
    reason: str = ""
    level: float = LEVEL

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"undefined ({self.reason})"
        return f"{self.value:.4g} [{self.ci_low:.4g}, {self.ci_high:.4g}] ({self.ci_method}, n = {self.n})"

    @classmethod
    def undefined(cls, n: int, reason: str) -> Estimate:
        """No value, and why."""
        return cls(math.nan, math.nan, math.nan, "none", n, reason)


@dataclass(frozen=True)
class MetricInfo:
    """What reports need to know of a metric.

    Attributes:
        title: short heading; `definition`: one sentence, exact enough to recompute.
        higher_is_better: None where neither direction is good in itself.
        percent: shown in percent (a proportion) rather than as a plain number.
    """

    title: str
    definition: str
    higher_is_better: bool | None
    percent: bool


METRICS: dict[str, MetricInfo] = {
    "accuracy": MetricInfo("accuracy", "Share of samples whose largest logit is the label's.", True, True),
    "robust_accuracy": MetricInfo(
        "robust accuracy",
        "Share of samples classified correctly clean and at every input that the attack submitted. For worst-case "
        "conditions: under every attack of that norm with at most that budget (per sample, not the least average).",
        True,
        True,
    ),
    "worst_class_accuracy": MetricInfo(
        "worst class",
        "The lowest accuracy of any class. The minimum of noisy estimates is biased downwards; the interval "
        "runs over all classes' Wilson intervals at a level raised for their number (Bonferroni).",
        True,
        True,
    ),
    "balanced_accuracy": MetricInfo(
        "mean over classes",
        "The mean of all classes' accuracies, each class counting the same. Under attacks: of their robust accuracies.",
        True,
        True,
    ),
    "tail30_accuracy": MetricInfo(
        "tail 30 %",
        "The mean accuracy of the ceil(0.3 K) classes that this model classifies worst under this condition (robust accuracy "
        "under attacks). Picking the lowest of noisy estimates biases the value downwards; the interval is for the lowest true "
        "accuracies, whichever classes have them, and allows for the selection.",
        True,
        True,
    ),
    "many_shot_accuracy": MetricInfo(
        "many shot", "The mean accuracy of the classes with more than 100 training samples.", True, True
    ),
    "medium_shot_accuracy": MetricInfo(
        "medium shot", "The mean accuracy of the classes with 20 to 100 training samples.", True, True
    ),
    "few_shot_accuracy": MetricInfo(
        "few shot", "The mean accuracy of the classes with fewer than 20 training samples.", True, True
    ),
    "head_accuracy": MetricInfo(
        "head",
        "The mean accuracy of the classes with the larger number of training samples, where there are just two such numbers.",
        True,
        True,
    ),
    "tail_accuracy": MetricInfo(
        "tail",
        "The mean accuracy of the classes with the smaller number of training samples, where there are just two such numbers.",
        True,
        True,
    ),
    "energy_marginal": MetricInfo(
        "E(x)",
        "Mean marginal energy -logsumexp f(x) of the condition's inputs; of an attack, of the samples that it worked on "
        "(classified correctly clean, and not of the target class). High = unlike the training data. Levels of different "
        "networks cannot be compared.",
        None,
        False,
    ),
    "energy_joint": MetricInfo(
        "E(x, y)",
        "Mean joint energy -f(x)[y] of the true class, over the same samples. E(x, y) - E(x) is the cross-entropy.",
        None,
        False,
    ),
    "delta_energy": MetricInfo(
        "ΔE(x)",
        "Mean of E(natural) - E(attacked), paired, over the samples that the attack worked on. Positive: attacked inputs look "
        "more like the training data.",
        None,
        False,
    ),
    "abs_delta_energy": MetricInfo("|ΔE(x)|", "Mean of |E(natural) - E(attacked)| over the same samples.", None, False),
    "delta_energy_joint": MetricInfo(
        "ΔE(x, y)", "Mean of E(natural, y) - E(attacked, y), paired, over the same samples.", None, False
    ),
    "ece": MetricInfo(
        "ECE",
        "Expected calibration error: mean over 15 equal-width bins (right-closed) of |accuracy - confidence|, weighted "
        "by the bins' counts. The plug-in value is biased upwards at small n; the interval reaches down to cover it.",
        False,
        True,
    ),
    "nll": MetricInfo("NLL", "Mean of -log p(label), natural logarithm, no clipping.", False, False),
    "brier": MetricInfo("Brier", "Mean over samples of sum_k (p_k - 1[y = k])^2, in [0, 2].", False, False),
    "auroc": MetricInfo(
        "AUROC",
        "Probability that an unknown (or corrupted, or successfully attacked) input scores above a clean test input, "
        "ties counted half. 0.5 is chance.",
        True,
        True,
    ),
    "aupr_out": MetricInfo("AUPR-out", "Average precision with the unknown inputs as positives.", True, True),
    "aupr_in": MetricInfo(
        "AUPR-in", "Average precision with the clean inputs as positives (scores negated).", True, True
    ),
    "fpr95": MetricInfo(
        "FPR@95",
        "Share of unknown inputs accepted at the threshold that accepts at least 95 % of the clean ones (clean "
        "positive, as in the Mahalanobis, ODIN and energy papers; OpenOOD has it the other way round).",
        False,
        True,
    ),
    "tnr95": MetricInfo(
        "TNR@95",
        "One minus FPR@95: share of unknown inputs rejected where 95 % of the clean ones are accepted.",
        True,
        True,
    ),
    "detection_accuracy": MetricInfo(
        "detection accuracy",
        "The most, over all thresholds, of (share of unknown inputs detected + share of clean inputs accepted) / 2. The "
        "threshold is chosen on the very samples, so it is optimistic; 0.5 is chance.",
        True,
        True,
    ),
    "auroc_gain": MetricInfo(
        "AUROC gain",
        "AUROC minus that of the suite's first detector (named under `against`), on the same samples: paired DeLong interval.",
        True,
        True,
    ),
    "auroc_gain_p": MetricInfo(
        "p of the gain",
        "Two-sided p-value of an AUROC gain of 0 (paired DeLong), corrected by Holm's method for the number of detectors "
        "compared under this condition.",
        None,
        False,
    ),
    "false_alarms": MetricInfo(
        "false alarms",
        "Share of clean test inputs with a conformal p-value of at most 0.05, from clean calibration samples: at most 5 % are "
        "to be expected, whatever the detector.",
        False,
        True,
    ),
    "alarms": MetricInfo(
        "alarms",
        "Share of the condition's inputs (of an attack: those that fooled the classifier) with a conformal p-value of at most "
        "0.05: what the detector catches at a false-alarm rate of at most 5 %.",
        True,
        True,
    ),
    "aurc": MetricInfo(
        "AURC",
        "Area under the risk-coverage curve: mean error rate over all coverages when the least suspicious samples are answered "
        "first; ties take their expectation.",
        False,
        True,
    ),
    "e_aurc": MetricInfo(
        "E-AURC", "AURC minus the least that is possible with as many errors: 0 is a perfect order.", False, True
    ),
    "audited_accuracy": MetricInfo(
        "robust accuracy here",
        "What the full protocol's robust accuracy would be on these very samples, estimated from an audit: the survivors of "
        "a screen less those that the protocol broke, the drawn ones standing for the others. Exact hypergeometric interval.",
        True,
        True,
    ),
    "screen_accuracy": MetricInfo(
        "after the screen", "Share of samples classified correctly clean and not broken by the screen.", None, True
    ),
    "audited_share": MetricInfo("audited", "Share of all samples that met the full protocol.", None, True),
    "broken_by": MetricInfo(
        "broken by",
        "Share of all samples that this member of an ensemble broke, the members before it having failed.",
        None,
        True,
    ),
    "median_norm": MetricInfo(
        "median distance",
        "Median, over the samples that are classified correctly clean, of the smallest perturbation that a minimum-norm attack "
        "found; undefined where half of them or more were never broken.",
        True,
        False,
    ),
    "targeted_success": MetricInfo(
        "target reached",
        "Share of the samples classified correctly clean, and not of the target class, that a targeted attack turned into "
        "its target.",
        False,
        True,
    ),
    "mean_norm": MetricInfo(
        "perturbation", "Mean norm of the perturbation over the samples that the attack broke.", None, False
    ),
}


def require(name: str, **arrays: np.ndarray) -> None:
    """Raise DataError on empty, NaN or ragged input: a metric never returns a number for those."""
    lengths = {key: len(value) for key, value in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}: lengths differ: {lengths}")
    for key, value in arrays.items():
        if len(value) == 0:
            raise DataError(f"{name}: {key} is empty")
        if np.issubdtype(value.dtype, np.floating) and np.isnan(value).any():
            raise DataError(f"{name}: {key} holds NaN")
