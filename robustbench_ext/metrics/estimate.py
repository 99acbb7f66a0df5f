"""What a metric gives, and what is known of every metric by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.fingerprint import Rows
from robustbench_ext.metrics.blocks import blocks

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
    "mean_accuracy": MetricInfo(
        "mean accuracy",
        "Over all corruptions of the suite: mean over samples of each sample's share of conditions in which it is classified "
        "correctly. Over all domains: unweighted mean of the domains' accuracies.",
        True,
        True,
    ),
    "worst_domain_accuracy": MetricInfo(
        "worst domain",
        "The lowest accuracy of any domain; biased downwards like the worst class, with the same kind of interval.",
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
    "class_spread": MetricInfo(
        "spread over classes",
        "The standard deviation over classes (divisor K) of their true accuracies on clean inputs: that of the measured ones, "
        "without what their samples add to it by chance. It is not the spread over training seeds.",
        False,
        True,
    ),
    "relative_change": MetricInfo(
        "relative change",
        "The mean over classes of accuracy under this condition minus that on clean inputs, relative to the latter; robust "
        "accuracy under attacks, the mean over conditions for summaries. Negative is a loss, -100 % all of it.",
        True,
        True,
    ),
    "harmonic_accuracy": MetricInfo(
        "harmonic mean",
        "The harmonic mean of all classes' accuracies, K / sum_k 1 / accuracy_k (robust accuracies under attacks): led by the "
        "worst classes, 0 where one is never right. Biased downwards at small n; the interval allows for it.",
        True,
        True,
    ),
    "relative_accuracy": MetricInfo(
        "relative accuracy",
        "Accuracy divided by the larger of two that models trained on as many balanced samples have (named under `against`: "
        "plain training, and the same method) on the same test samples. May exceed 100 %. The larger of two measured ones is "
        "biased upwards, and so the value downwards; the interval allows for it.",
        True,
        True,
    ),
    "robust_relative_accuracy": MetricInfo(
        "robust relative accuracy",
        "As relative accuracy, with robust accuracies under the same attack in all three places.",
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
    "accuracy_by_difficulty": MetricInfo(
        "accuracy by difficulty",
        "Accuracy on a slice of the test samples, cut by their difficulty for other networks into parts of equal size.",
        True,
        True,
    ),
    "robust_accuracy_by_difficulty": MetricInfo(
        "robust accuracy by difficulty",
        "Robust accuracy on a slice of the test samples, cut into parts of equal size by their difficulty for other networks.",
        True,
        True,
    ),
    "change_by_difficulty": MetricInfo(
        "change by difficulty",
        "On a slice of the test samples by difficulty: accuracy under the condition (robust accuracy under attacks) minus "
        "clean accuracy, paired by sample.",
        True,
        True,
    ),
    "rmsce_by_difficulty": MetricInfo(
        "RMS gap by difficulty",
        "Root of the debiased ECE² on a slice of the test samples by difficulty. Where difficulty looks at labels, as "
        "all scores here do, a calibrated model has a gap in easy and in hard slices: only differences between models tell.",
        False,
        True,
    ),
    "brier_by_difficulty": MetricInfo(
        "Brier by difficulty", "Brier score on a slice of the test samples by difficulty, in [0, 2].", False, False
    ),
    "auroc_by_difficulty": MetricInfo(
        "AUROC by difficulty",
        "AUROC of clean test inputs of a slice by difficulty against the condition's inputs: of the same slice where these are "
        "the same samples (of an attack, those that fooled the classifier), otherwise all.",
        True,
        True,
    ),
    "difficulty_of_mistakes": MetricInfo(
        "difficulty of mistakes",
        "Probability that a wrongly classified sample is more difficult for other networks than a correctly "
        "classified one, ties counted half (AUROC). 0.5: mistakes have nothing to do with difficulty. Under attacks, of "
        "broken samples.",
        None,
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
    "ece_equal_mass": MetricInfo(
        "ECE, equal mass",
        "As ECE, over 15 bins of equal counts instead of equal widths; equal confidences share the bin of the first of them.",
        False,
        True,
    ),
    "ece2_debiased": MetricInfo(
        "ECE² debiased",
        "Mean over 15 equal-mass bins of (accuracy - confidence)^2 less its expectation from chance alone, accuracy "
        "(1 - accuracy) / (n - 1). Estimates a square, so that it may be negative; bins of one sample count 0.",
        False,
        False,
    ),
    "rmsce_debiased": MetricInfo(
        "RMS gap",
        "Root of the debiased ECE², 0 where that is negative: the root mean squared calibration error, without the upward "
        "bias of ECE.",
        False,
        True,
    ),
    "mce": MetricInfo(
        "MCE",
        "The largest |accuracy - confidence| of any non-empty bin of ECE's. Rests on the smallest bins; the interval holds "
        "for all bins at once (Clopper-Pearson at a level raised for their number, Bonferroni).",
        False,
        True,
    ),
    "classwise_ece": MetricInfo(
        "classwise ECE",
        "Mean over classes k of the ECE of p_k against 1[y = k], over all samples and 15 equal-width bins. Most p_k are near "
        "0, so that it looks small: not to be compared with ECE.",
        False,
        True,
    ),
    "ace": MetricInfo(
        "ACE", "Adaptive calibration error: classwise ECE with 15 bins of equal counts for every class.", False, True
    ),
    "tace": MetricInfo(
        "TACE",
        "ACE over the probabilities of at least 0.01 alone: the others are dropped, and not counted in N; mean over the "
        "classes that have any.",
        False,
        True,
    ),
    "brier_reliability": MetricInfo(
        "reliability",
        "Part of the Brier score: sum over classes of the mean over 15 equal-width bins of (mean p_k - share of class k)^2. "
        "Biased upwards at small n; the interval reaches down to cover it.",
        False,
        False,
    ),
    "brier_resolution": MetricInfo(
        "resolution",
        "Part of the Brier score, with a minus: sum over classes of the mean over the same bins of (share of class k in the "
        "bin - share of class k)^2. Biased upwards at small n; the interval reaches down to cover it.",
        True,
        False,
    ),
    "brier_uncertainty": MetricInfo(
        "outcome",
        "Part of the Brier score: sum over classes of share (1 - share), the Brier score of forecasting the classes' shares. "
        "A matter of the data, not of the model.",
        None,
        False,
    ),
    "brier_within": MetricInfo(
        "within bins",
        "What is left of the Brier score: sum over classes of the variance of p_k within bins, less twice its covariance with "
        "1[y = k]. Brier = reliability - resolution + outcome + within bins, exactly; 0 where bins share one forecast.",
        None,
        False,
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
    "augrc": MetricInfo(
        "AUGRC",
        "Area under the generalised risk-coverage curve: mean over all coverages of the probability that a sample is answered "
        "and wrong, in [0, 1/2 + 1/(2n)]; ties take their expectation.",
        False,
        True,
    ),
    "ause": MetricInfo(
        "AUSE",
        "Area between the sparsification curve (mean error of the least uncertain i of n samples, over i) and that of the "
        "oracle, which knows the errors; divided by the mean error. 0 is a perfect order; ties take their expectation.",
        False,
        False,
    ),
    "error_spearman": MetricInfo(
        "Spearman", "Rank correlation (mid-ranks) of the uncertainty with the absolute error.", True, False
    ),
    "error_auroc": MetricInfo(
        "AUROC of mistakes",
        "Probability that the uncertainty of a wrongly classified sample is above that of a correctly classified one, ties "
        "counted half.",
        True,
        True,
    ),
    "set_coverage": MetricInfo(
        "coverage", "Share of samples whose label is in the prediction set. To be read beside the set size.", None, True
    ),
    "set_size": MetricInfo("set size", "Mean number of classes in the prediction set.", False, False),
    "set_empty": MetricInfo("empty sets", "Share of prediction sets without any class.", None, True),
    "set_single": MetricInfo("single sets", "Share of prediction sets of exactly one class.", True, True),
    "set_size_stratified_coverage": MetricInfo(
        "worst size",
        "The lowest coverage among samples with prediction sets of equal size, empty sets counting with those of one class. "
        "The interval holds for all sizes at once (Wilson, Bonferroni).",
        True,
        True,
    ),
    "set_class_coverage": MetricInfo(
        "worst class's coverage",
        "The lowest coverage of any class's samples. The interval holds for all classes at once (Wilson, Bonferroni).",
        True,
        True,
    ),
    "rmse": MetricInfo("RMSE", "Root of the mean squared error of the point prediction, in units of y.", False, False),
    "mae": MetricInfo("MAE", "Mean absolute error of the point prediction, in units of y.", False, False),
    "r2": MetricInfo(
        "R²",
        "1 - sum of squared errors / sum of squared deviations of y from its mean over these samples. 0 is no better than "
        "that mean; it may be negative.",
        True,
        False,
    ),
    "error_rise": MetricInfo(
        "rise of the error",
        "Mean of |error| under the condition minus |error| clean, paired, over the samples that both have, in units of y.",
        False,
        False,
    ),
    "coverage": MetricInfo(
        "coverage",
        "Share of samples inside their interval, both ends included (PICP). To be read beside the width.",
        None,
        True,
    ),
    "coverage_above": MetricInfo(
        "coverage above",
        "Share of y <= upper end among the samples above their point prediction (PICP+).",
        None,
        True,
    ),
    "coverage_below": MetricInfo(
        "coverage below",
        "Share of y >= lower end among the samples below their point prediction (PICP-).",
        None,
        True,
    ),
    "side_error": MetricInfo(
        "side error",
        "|coverage above - nominal| + |coverage below - nominal| (SPIECE).",
        False,
        True,
    ),
    "width": MetricInfo("width", "Mean width of the intervals, in units of y (MPIW).", False, False),
    "width_normalised": MetricInfo(
        "width / sd",
        "Mean width of the intervals divided by the standard deviation of y over these samples (NMPIW, which elsewhere may "
        "divide by the range of y).",
        False,
        False,
    ),
    "interval_score": MetricInfo(
        "interval score",
        "Mean of (u - l) + (2 / a) max(l - y, 0) + (2 / a) max(y - u, 0) for the interval [l, u] of nominal coverage 1 - a "
        "(Winkler score), in units of y. Proper.",
        False,
        False,
    ),
    "wis_sum": MetricInfo(
        "WIS (sum)",
        "Weighted interval score, sum form: mean of |y - median| + sum_a a * interval score at a, that is twice the sum of "
        "the pinball losses of all levels.",
        False,
        False,
    ),
    "wis_mean": MetricInfo(
        "WIS (mean)",
        "Weighted interval score, forecasting-hub form: the sum form divided by the number of levels 2K + 1, that is twice the "
        "mean pinball loss.",
        False,
        False,
    ),
    "pinball": MetricInfo(
        "pinball", "Mean over samples and levels of max(t (y - q), (t - 1)(y - q)), in units of y.", False, False
    ),
    "crps": MetricInfo(
        "CRPS",
        "Continuous ranked probability score, mean over samples, in units of y. From quantiles it is twice the pinball loss, "
        "weighted by the share of (0, 1) that is nearest to each level: an approximation whose error falls as 1 / levels.",
        False,
        False,
    ),
    "crossing_rate": MetricInfo(
        "crossing",
        "Share of adjacent pairs of quantiles of which the upper lay below the lower, before they were sorted.",
        False,
        True,
    ),
    "sharpness": MetricInfo(
        "sharpness", "Root of the mean predicted variance, in units of y: small is sharp.", False, False
    ),
    "interval_ece": MetricInfo(
        "interval ECE",
        "Mean over the nominal levels of |coverage - nominal|. Biased upwards at small n; the interval reaches down to cover "
        "it.",
        False,
        True,
    ),
    "quantile_ece": MetricInfo(
        "quantile ECE",
        "Mean over the levels t of |share of y <= q_t - t|. Biased upwards at small n; the interval reaches down to cover it.",
        False,
        True,
    ),
    "worst_group_coverage": MetricInfo(
        "worst group's coverage",
        "The lowest coverage of any of the groups. The interval holds for all groups at once (Wilson, Bonferroni).",
        True,
        True,
    ),
    "width_stratified_coverage": MetricInfo(
        "worst width",
        "The lowest coverage among five groups of samples of equal counts, by the width of their intervals. The interval holds "
        "for all groups at once (Wilson, Bonferroni).",
        True,
        True,
    ),
    "worst_slab_coverage": MetricInfo(
        "worst slab",
        "Coverage within a slab a <= v.x <= b of at least a tenth of the inputs that was chosen on one half of the samples, "
        "among 1,000 random directions v, for having the lowest coverage there, and is measured on the other half.",
        True,
        True,
    ),
    "mse_p": MetricInfo(
        "MSE_p",
        "Mean over samples of half the sum over classes of (true probability - predicted probability)^2; with two classes, of "
        "(p - q)^2. The outcomes are not looked at.",
        False,
        False,
    ),
    "kl_p": MetricInfo(
        "KL to the truth",
        "Mean over samples of sum_k p_k log(p_k / q_k), p true and q predicted, natural logarithm, nothing clipped: the "
        "expected excess of the NLL over that of the true probabilities.",
        False,
        False,
    ),
    "ks_error": MetricInfo(
        "KS error",
        "Of the second of two classes: the most, over thresholds t, of |sum over predicted q <= t of (q - outcome)| / n; "
        "samples of equal q come together. Biased upwards at small n; the interval reaches down to cover it.",
        False,
        True,
    ),
    "excess_nll": MetricInfo(
        "excess NLL",
        "Mean over samples of NLL minus the truth's own on the same outcomes, natural logarithm. Of regressors: of the normal "
        "laws that point and widths of the intervals imply, the truth's taken alike.",
        False,
        False,
    ),
    "kl_normal": MetricInfo(
        "KL to the truth",
        "Mean over samples of the Kullback-Leibler divergence from the normal law of the true mean and spread to that of the "
        "point and the spread of the intervals (mean over coverages of width / 2z); the outcomes are not looked at.",
        False,
        False,
    ),
    "mse_mean": MetricInfo(
        "squared error of the mean",
        "Mean over samples of (point - true conditional mean)^2, in units of y squared. The point of quantile methods is their "
        "median.",
        False,
        False,
    ),
    "log_variance_error": MetricInfo(
        "|log variance| error",
        "Mean over samples of |log s^2 - log s*^2|, s the spread of the intervals (mean over coverages of width / 2z) and s* "
        "that of the true ones. 0.69 is a factor of two.",
        False,
        False,
    ),
    "true_coverage": MetricInfo(
        "true coverage",
        "Mean over inputs of the true probability, given the input, that the outcome lies in the interval, or the label in the "
        "set.",
        None,
        True,
    ),
    "coverage_gap": MetricInfo(
        "gap at each input",
        "Mean over inputs of |true coverage given the input - nominal|. 0 only if the promise is kept at every input; of sets "
        "of few classes it cannot be 0.",
        False,
        True,
    ),
    "coverage_shortfall": MetricInfo(
        "shortfall at each input",
        "Mean over inputs of max(0, nominal - true coverage given the input): by how much the promise is broken.",
        False,
        True,
    ),
    "noise_spearman": MetricInfo(
        "Spearman with the noise",
        "Rank correlation (mid-ranks) of the uncertainty with how uncertain the outcome truly is: the entropy of the true "
        "probabilities, or the true standard deviation of the noise.",
        True,
        False,
    ),
    "truth_error_spearman": MetricInfo(
        "Spearman with the distance from the truth",
        "Rank correlation (mid-ranks) of the uncertainty with the distance of the prediction from the truth: the root of a "
        "sample's part of MSE_p, or |point - true mean|.",
        True,
        False,
    ),
    "epistemic_spearman": MetricInfo(
        "Spearman with the true epistemic part",
        "Rank correlation (mid-ranks) of the uncertainty with the true standard deviation of the mean for want of data, where "
        "the truth is an exact posterior.",
        True,
        False,
    ),
    "mean_corruption_error": MetricInfo(
        "mean corruption error",
        "Top-1 error, mean over the fifteen corruptions of ImageNet-C and five severities; undefined for fewer. Whole samples "
        "are resampled, with all their verdicts.",
        False,
        True,
    ),
    "accuracy_drop": MetricInfo(
        "drop of the accuracy",
        "Clean accuracy minus the mean over the fifteen corruptions of ImageNet-C and five severities, paired by sample.",
        False,
        True,
    ),
    "corruption_mce": MetricInfo(
        "mCE",
        "Mean over the fifteen corruptions of the error summed over five severities, divided by the baseline's sum (AlexNet's "
        "published errors on ImageNet-C as published, and the suite's baseline model, named under `against`). 100 % is as many "
        "errors as the baseline makes.",
        False,
        True,
    ),
    "corruption_relative_mce": MetricInfo(
        "relative mCE",
        "As mCE, of the errors' rise over the clean error: sum over severities of (error - clean error), divided by the "
        "baseline's. Negative where corruption helps; unstable where the baseline's rise is small.",
        False,
        True,
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


def require(name: str, **arrays: Rows) -> None:
    """Raise DataError on empty, NaN or ragged input: a metric never returns a number for those."""
    lengths = {key: len(value) for key, value in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}: lengths differ: {lengths}")
    for key, value in arrays.items():
        if len(value) == 0:
            raise DataError(f"{name}: {key} is empty")
        if np.issubdtype(value.dtype, np.floating) and any(np.isnan(block).any() for _, block in blocks(value)):
            raise DataError(f"{name}: {key} holds NaN")
