"""What is said of a classifier's probabilities, and of its uncertainty estimators: calibration, prediction sets, uncertainties.

An estimator's errors are those of its own prediction, the class of its largest logit, at the inputs that the condition showed:
most estimators leave the classifier's prediction alone, ensembles and vector scaling do not. Where there are estimators, the
classifier has the same rows, so that each gain has a number to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from scipy.special import logsumexp

from robustbench_ext import detection_rows
from robustbench_ext.evaluate import Context
from robustbench_ext.fingerprint import Rows
from robustbench_ext.measured import Measured, Place, Tables, nominal_group, rounded, rows
from robustbench_ext.metrics import binned, classwise, ranking, selective, sets
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.metrics import classification as cls
from robustbench_ext.metrics.blocks import blocks, each
from robustbench_ext.probes import CLASSIFIER

PARTS = ("aleatoric", "epistemic")
# What uncertainties have to beat: the classifier's own lack of confidence, one minus its largest probability.
BASELINE = f"{CLASSIFIER} · msp"


def calibration(place: Place, logits: Rows, y: np.ndarray) -> None:
    """Error of the top label's confidence, proper scores, and the reliability diagram.

    Args:
        logits: (N, K); y: labels (N,).
    """
    confidence, right = cal.confidence_and_correctness(logits, y)
    place.row("ece", cal.ece(confidence, right))
    place.row("nll", cal.nll(logits, y))
    place.row("brier", cal.brier(logits, y))
    bins = [asdict(b) for b in cal.reliability(confidence, right)]
    names = ("confidence", "accuracy", "low", "high", "n")
    band = cal.consistency_band(confidence)
    data = {name: [float(b[name]) for b in bins] for name in names}
    place.curve(
        "reliability", data | {"calibrated_low": rounded(band.low_all), "calibrated_high": rounded(band.high_all)}
    )


def estimators(out: Measured, context: Context, tables: Tables, model: str, condition: str) -> None:
    """Every estimator under a condition whose samples have labels, beside the classifier itself."""
    probes = [probe for probe in context.probes_read(model) if probe.kind == "estimator"]
    if not probes:
        return
    seen = tables.observations(model, condition)
    y = seen["label"]
    _compared(Place(out, model, condition, CLASSIFIER), rows(seen, "logits"), y)
    for probe in probes:
        label, read = probe.label, tables.probe(model, condition, probe.label)
        place, logits = Place(out, model, condition, label), rows(read, "logits")
        right = cls.predicted(logits, y)
        # What only adds sets leaves the probabilities as they are; the classifier's rows would be there twice.
        if not all(np.array_equal(block, rows(seen, "logits")[here]) for here, block in blocks(logits)):
            place.row("accuracy", cls.accuracy(right))
            calibration(place, logits, y)
            _compared(place, logits, y)
        if "sets" in read:
            _sets(place, read["sets"], y, context.data.classes, probe.spec().get("alpha"))
        for part in PARTS:
            if part in read:
                _worth(Place(out, model, condition, f"{label} · {part}"), read[part], right)


def _compared(place: Place, logits: Rows, y: np.ndarray) -> None:
    """Other calibration errors, the parts of the Brier score, what the largest probability is worth for abstaining."""
    confidence, right = cal.confidence_and_correctness(logits, y)
    place.row("ece_equal_mass", binned.ece_equal_mass(confidence, right))
    for metric, estimate in binned.ece_debiased(confidence, right).items():
        place.row(metric, estimate)
    place.row("mce", binned.mce(confidence, right))
    place.row("classwise_ece", classwise.classwise_ece(logits, y))
    for metric, estimate in classwise.brier_parts(logits, y).items():
        place.row(metric, estimate)
    _worth(place, lack_of_confidence(logits), right)


def _worth(place: Place, doubt: np.ndarray, right: np.ndarray) -> None:
    """A score (N,), higher = less to be trusted, for finding mistakes and for abstaining."""
    for _, metric, estimate, _ in detection_rows.abstaining({place.probe: doubt}, right):
        place.row(metric, estimate)
    place.row("error_auroc", ranking.error_auroc(doubt, ~right))
    band = zip(("coverage", "risk", "low", "high"), selective.risk_coverage_band(doubt, ~right), strict=True)
    place.curve("risk-coverage", {name: rounded(values) for name, values in band})


def _sets(place: Place, read: np.ndarray, y: np.ndarray, classes: Sequence[str], alpha: float | None) -> None:
    """Coverage and size of prediction sets (N, K), and where the coverage is worst: among classes, among sizes.

    The coverage that was promised, 1 - alpha, is the group of the coverage's row.
    """
    found = sets.set_metrics(read, y)
    place.row("set_coverage", found["set_coverage"], group=None if alpha is None else nominal_group(1 - alpha))
    for metric in ("set_size", "set_single", "set_empty"):
        place.row(metric, found[metric])
    worst, k = sets.class_coverage(read, y)
    place.row("set_class_coverage", worst, group=str(classes[k]))
    worst, size = sets.size_stratified_coverage(read, y)
    place.row(
        "set_size_stratified_coverage", worst, group=f"{int((read.sum(axis=1) == size).sum())} sets of size {size}"
    )


def scores(context: Context, tables: Tables, model: str, condition: str) -> dict[str, np.ndarray]:
    """Uncertainties as scores (N,), higher = less to be trusted, by `ESTIMATOR · PART`; first the classifier's own.

    Empty where no estimator tells its uncertainties.
    """
    found: dict[str, np.ndarray] = {}
    for probe in context.probes_read(model):
        if probe.kind == "estimator":
            read = tables.probe(model, condition, probe.label)
            found |= {f"{probe.label} · {part}": read[part] for part in PARTS if part in read}
    if not found:
        return {}
    return {BASELINE: lack_of_confidence(rows(tables.observations(model, condition), "logits")), **found}


def lack_of_confidence(logits: Rows) -> np.ndarray:
    """1 - max_k p_k as its log-odds (N,): the same order, without the rounding to 0 that would tie all confident samples."""

    def log_odds(block: np.ndarray) -> tuple[np.ndarray]:
        z = np.sort(block.astype(np.float64), axis=1)
        return (logsumexp(z[:, :-1], axis=1) - z[:, -1],)

    return each(log_odds, logits)[0]
