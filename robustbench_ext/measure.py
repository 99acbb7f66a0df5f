"""From records to results: every metric of every (model, condition, probe). No model is touched here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from robustbench_ext import (
    detection_rows,
    measure_axes,
    measure_difficulty,
    measure_regression,
    measure_relative,
    measure_truth,
    measure_uncertainty,
)
from robustbench_ext.conditions import Condition, UnderAttack
from robustbench_ext.data.corruptions.levels import FIFTEEN
from robustbench_ext.doubts import Attacked, access_of, doubts
from robustbench_ext.evaluate import CLEAN, PREVIEWS, Context
from robustbench_ext.measured import Columns, Measured, Place, Tables, png, rounded, row, rows
from robustbench_ext.measured import correct as correct  # where others look for it
from robustbench_ext.metrics import METRICS, Estimate, audit, corruption, distance, energy, tails
from robustbench_ext.metrics import classification as cls
from robustbench_ext.metrics import detection as det
from robustbench_ext.metrics.resampling import resampled_mean
from robustbench_ext.models.black_box import CLIP, FLAT
from robustbench_ext.numbers import format_number
from robustbench_ext.own_metrics import measure_own
from robustbench_ext.probes import CLASSIFIER
from robustbench_ext.results import Cost, Finding
from robustbench_ext.suite import Shots

HISTOGRAM_BINS = 40
RIGHT = "classified correctly"  # the group of clean samples that attacks work on
CORRUPTIONS, DOMAINS = "all corruptions", "all domains"  # labels of what is taken over several conditions
NAMED_CLASSES = 10  # of a group of classes; the others are counted


def measure(context: Context, models: Sequence[str]) -> Measured:
    """All results of these models' complete records; conditions with missing records are left out."""
    if context.data.task == "regression":
        return measure_regression.measure(context, models)
    tables, out = Tables(context), Measured.nothing()
    for model in models:
        if not tables.complete(model, CLEAN):
            continue
        done = {k: c for k, c in context.conditions_of(model).items() if tables.complete(model, k)}
        for label, condition in done.items():
            columns = tables.observations(model, label)
            if condition.facts().get("minimum_norm"):
                # Without a budget everything breaks sooner or later: the distances count, not the verdicts.
                _distances(out, tables, model, condition, columns)
            elif condition.kind != "outliers":
                _classifier(out, context, model, condition, columns)
                if "audit" not in columns:  # an audit leaves most samples without a verdict of their own
                    measure_uncertainty.estimators(out, context, tables, model, label)
                    measure_own(out, context, model, label, columns)
                measure_truth.classifier(out, context, tables, model, condition)
            if _target(condition) != "none":
                _targeted(out, tables, model, condition, columns)
            _energies(out, tables, model, condition, columns)
            _detectors(out, context, tables, model, condition)
            _abstaining(out, context, tables, model, condition, columns)
            if condition.kind == "attack":
                out.cost.append(
                    Cost(
                        model=model,
                        condition=label,
                        n=len(columns["label"]),
                        forwards=int(columns["forwards"].sum()),
                        backwards=int(columns["backwards"].sum()),
                    )
                )
        _worst_cases(out, context, tables, model, set(done))
        _shifts(out, context, tables, model, set(done))
        measure_axes.three_axes(out, context, tables, model, set(done))
        _doubts(out, context, tables, model, done)
        _gallery(out, tables, model, done)
    measure_relative.relative(out, context, tables, models)
    measure_difficulty.measure(out, context, tables, models)
    return out


def _accuracies(
    out: Measured, context: Context, model: str, condition: str, name: str, right: np.ndarray, y: np.ndarray
) -> None:
    """Overall, per class, worst class, and means over groups of classes."""
    classes = context.data.classes
    out.rows.append(row(model, condition, CLASSIFIER, name, cls.accuracy(right)))
    for label, estimate in zip(classes, cls.per_class_accuracy(right, y, len(classes)), strict=True):
        out.rows.append(row(model, condition, CLASSIFIER, name, estimate, group=label))
    worst, k = cls.worst_class_accuracy(right, y, len(classes))
    out.rows.append(row(model, condition, CLASSIFIER, "worst_class_accuracy", worst, group=classes[k]))
    balanced = tails.balanced_accuracy(right, y, len(classes))
    out.rows.append(row(model, condition, CLASSIFIER, "balanced_accuracy", balanced))
    harmonic = tails.harmonic_accuracy(right, y, len(classes))
    out.rows.append(row(model, condition, CLASSIFIER, "harmonic_accuracy", harmonic))
    tail, lowest = tails.tail_accuracy(right, y, len(classes))
    out.rows.append(row(model, condition, CLASSIFIER, "tail30_accuracy", tail, group=_named(classes, lowest)))
    for group, members in _shots(context).items():
        estimate = tails.class_mean_accuracy(right, y, members)
        out.rows.append(
            row(model, condition, CLASSIFIER, f"{group}_accuracy", estimate, group=_named(classes, members))
        )


def _shots(context: Context) -> dict[str, np.ndarray]:
    """Groups of classes by their training samples, where the train split is there and imbalanced."""
    if "train" not in context.data.splits:
        return {}
    cuts = {} if context.suite.shots is None else context.suite.shots.model_dump()
    return tails.class_groups(np.bincount(context.data["train"].labels, minlength=len(context.data.classes)), **cuts)


def _named(classes: Sequence[str], members: np.ndarray) -> str:
    """`3 classes: cat, dog, owl`; of many classes only the first are named."""
    names = [str(classes[k]) for k in members[:NAMED_CLASSES]] + ["..."] * (len(members) > NAMED_CLASSES)
    return f"{len(members)} class{'' if len(members) == 1 else 'es'}: {', '.join(names)}"


def _audited(out: Measured, context: Context, model: str, condition: str, columns: Columns) -> None:
    """Estimates of what the full protocol would find: overall, on these very samples, per class; what was audited."""
    level = float(columns["audit_level"][0])
    counts = audit.count(columns["audit"], columns["broken"], level)

    def add(name: str, estimate: Estimate, group: str | None = None) -> None:
        out.rows.append(row(model, condition, CLASSIFIER, name, estimate, group=group))

    add("robust_accuracy", counts.population())
    add("audited_accuracy", counts.here())
    add("screen_accuracy", cls.accuracy(columns["audit"] != audit.DECIDED))
    add("audited_share", cls.accuracy(np.isin(columns["audit"], (audit.TAKEN, audit.DRAWN))))
    for k, label in enumerate(context.data.classes):
        here = columns["label"] == k
        if here.any():
            # A draw from all is a draw from each class.
            add(
                "robust_accuracy",
                audit.count(columns["audit"][here], columns["broken"][here], level).population(),
                label,
            )
    out.notes.append(f"{model}, {condition}: {audit.describe(counts)}")


def _classifier(out: Measured, context: Context, model: str, condition: Condition, columns: Columns) -> None:
    attacked = condition.kind == "attack"
    if "audit" in columns:
        _audited(out, context, model, condition.label, columns)
        return
    name = "robust_accuracy" if attacked else "accuracy"
    _accuracies(out, context, model, condition.label, name, correct(columns), columns["label"])
    place = Place(out, model, condition.label, CLASSIFIER)
    measure_uncertainty.calibration(place, rows(columns, "logits"), columns["label"])
    if attacked:
        _mean_norm(out, model, condition, columns)
        members = condition.facts()["members"]
        if len(members) > 1:
            for number, member in enumerate(members):
                share = cls.accuracy(columns["broken_by"] == number)
                out.rows.append(row(model, condition.label, CLASSIFIER, "broken_by", share, group=member))


def _mean_norm(out: Measured, model: str, condition: Condition, columns: Columns) -> None:
    moved = columns["norm"][columns["broken"] & (columns["norm"] > 0)].astype(np.float64)
    estimate = Estimate.undefined(len(moved), f"the attack broke {len(moved)} samples, too few for an interval")
    if len(moved) > 1:
        estimate = resampled_mean(moved)
    out.rows.append(row(model, condition.label, CLASSIFIER, "mean_norm", estimate))


def _target(condition: Condition) -> str | int:
    """What the condition's attack turns samples into; "none" where any mistake will do."""
    target: str | int = condition.facts().get("parameters", {}).get("target", "none")
    return target


def _eligible(tables: Tables, model: str, condition: Condition, columns: Columns) -> np.ndarray:
    """Samples that the attack had to do something about, bool (N,): correct clean, and not of the target class."""
    right = correct(tables.observations(model, CLEAN))
    target = _target(condition)
    return right & (columns["label"] != target) if isinstance(target, int) else right


def _distances(out: Measured, tables: Tables, model: str, condition: Condition, columns: Columns) -> None:
    """What a minimum-norm attack without a budget found: median and mean distance, robust accuracy at every budget."""
    distances = np.where(columns["reached"], columns["norm"].astype(np.float64), np.inf)
    mine = _eligible(tables, model, condition, columns)
    out.rows.append(row(model, condition.label, CLASSIFIER, "median_norm", distance.median_distance(distances[mine])))
    _mean_norm(out, model, condition, columns)
    if _target(condition) != "none":
        return  # robust means robust to any mistake
    curve = distance.robust_accuracy_curve(np.where(mine, distances, 0.0))
    if curve:
        data = {name: rounded(values) for name, values in curve.items()}
        Place(out, model, condition.label, CLASSIFIER).curve("robust-accuracy", data)


def _targeted(out: Measured, tables: Tables, model: str, condition: Condition, columns: Columns) -> None:
    """How often a targeted attack reached its target."""
    mine = _eligible(tables, model, condition, columns)
    estimate = Estimate.undefined(0, "no sample is classified correctly clean and not of the target class")
    if mine.any():
        estimate = cls.accuracy(columns["reached"][mine])
    out.rows.append(row(model, condition.label, CLASSIFIER, "targeted_success", estimate))


def _energies(out: Measured, tables: Tables, model: str, condition: Condition, columns: Columns) -> None:
    """Energies of clean inputs, and of attacked ones beside the same samples as they were.

    Only of attacks that go on to the end and keep the input of highest loss (`stop: never`): the others return the first
    misclassified input, or the nearest one, whose energies say where a search ended and not what an attack can do. Of the
    samples those count that the attack worked on; the others would only draw the differences towards 0. So clean energies are
    there twice: of all samples, and of those that are classified correctly, to compare attacked ones with.
    """
    full_length = (
        isinstance(condition, UnderAttack) and condition.attack.stop == "never" and condition.attack.keep == "loss"
    )
    if condition.kind != CLEAN and not full_length:
        return
    natural = tables.observations(model, CLEAN)
    before = energy.sample_energies(rows(natural, "logits"), natural["label"])

    def add(found: dict[str, Estimate], group: str | None = None) -> None:
        out.rows.extend(row(model, condition.label, CLASSIFIER, name, e, group=group) for name, e in found.items())

    if condition.kind == CLEAN:
        add(energy.clean_metrics(before))
        add(energy.clean_metrics(before.of(correct(natural))), RIGHT)
        return
    mine = _eligible(tables, model, condition, columns)
    before, after = before.of(mine), energy.sample_energies(rows(columns, "logits"), columns["label"]).of(mine)
    add(energy.attack_metrics(before, after))
    if mine.any():
        histograms = energy.energy_histograms(before, after)
        data = {name: rounded(values) for name, values in histograms.items()}
        Place(out, model, condition.label, CLASSIFIER).curve("energies", data)


def _detectors(out: Measured, context: Context, tables: Tables, model: str, condition: Condition) -> None:
    """Clean test inputs against this condition's, by detectors and by uncertainties.

    Of an attack's inputs those count that fooled the classifier.
    """
    label = condition.label
    columns = tables.observations(model, label)
    chosen = np.ones(len(columns["label"]), dtype=bool)
    if condition.kind == "attack":
        chosen = columns["broken"] & correct(tables.observations(model, CLEAN))
    detectors = {
        probe.label: detection_rows.Scores(
            tables.probe(model, CLEAN, probe.label)["score"],
            tables.probe(model, label, probe.label)["score"][chosen],
            tables.calibration(model, probe.label),
        )
        for probe in context.probes_read(model)
        if probe.kind == "detector"
    }
    void = _void(context, tables, model)
    if condition.kind == CLEAN:
        for probe, metric, estimate, _ in detection_rows.false_alarms(detectors):
            Place(out, model, CLEAN, probe).row(metric, _unless(void.get(probe), estimate))
        return
    clean = measure_uncertainty.scores(context, tables, model, CLEAN)
    here = measure_uncertainty.scores(context, tables, model, label)
    # Estimators are fitted on the calibration split, so no alarm threshold can be set on it.
    uncertainties = {name: detection_rows.Scores(clean[name], here[name][chosen], None) for name in clean}
    for scores in (detectors, uncertainties):
        _separated(out, model, label, scores, int(chosen.sum()), void)
    for probe, s in detectors.items():
        if len(s.unknown) and probe not in void:
            Place(out, model, label, probe).curve("scores", _histogram(s.clean, s.unknown))


def _separated(
    out: Measured,
    model: str,
    condition: str,
    scores: dict[str, detection_rows.Scores],
    n_unknown: int,
    void: Mapping[str, str],
) -> None:
    for probe, metric, estimate, extra in detection_rows.separation(scores):
        fields = {"against": CLEAN, "n_unknown": n_unknown, **extra}
        why = void.get(probe, void.get(extra.get("against", "")))
        Place(out, model, condition, probe).row(metric, _unless(why, estimate), **fields)
    for probe, s in scores.items():
        if len(s.unknown) and probe not in void:
            band = zip(("fpr", "tpr", "low", "high"), det.roc_band(s.clean, s.unknown), strict=True)
            Place(out, model, condition, probe).curve("roc", {name: rounded(values) for name, values in band})


def _void(context: Context, tables: Tables, model: str) -> dict[str, str]:
    """Detectors whose scores of this model are rounding errors around nothing, and why: what ranks them says nothing."""
    found = {}
    flat = max(FLAT, len(context.data.classes) * CLIP)
    for probe in context.probes_read(model):
        if probe.name != "energy" or dict(probe.parameters).get("reading") == "joint":
            continue
        if np.abs(tables.probe(model, CLEAN, probe.label)["score"]).max() < flat:
            found[probe.label] = (
                "the model gives log-probabilities, whose energy is 0 for every input; take msp or entropy"
            )
    return found


def _unless(why: str | None, estimate: Estimate) -> Estimate:
    return estimate if why is None else Estimate.undefined(estimate.n, why)


def _abstaining(
    out: Measured, context: Context, tables: Tables, model: str, condition: Condition, columns: Columns
) -> None:
    """What every detector is worth for selective prediction, where each sample has a verdict of its own."""
    if condition.kind == "outliers" or condition.facts().get("minimum_norm") or "audit" in columns:
        return
    labels = [probe.label for probe in context.probes_read(model) if probe.kind == "detector"]
    scores = {label: tables.probe(model, condition.label, label)["score"] for label in labels}
    void = _void(context, tables, model)
    for probe, metric, estimate, _ in detection_rows.abstaining(scores, correct(columns)):
        Place(out, model, condition.label, probe).row(metric, _unless(void.get(probe), estimate))


def _histogram(clean: np.ndarray, unknown: np.ndarray) -> dict[str, list[float]]:
    """Densities of both groups over common bins, between the 0.5 % and 99.5 % points of all scores together."""
    both = np.concatenate([clean, unknown])
    low, high = np.quantile(both, [0.005, 0.995])
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, HISTOGRAM_BINS + 1)

    def share(scores: np.ndarray) -> list[float]:
        counts, _ = np.histogram(np.clip(scores, low, high), edges)
        return rounded(counts / len(scores))

    # `edges` has one entry more than the shares; the last share is repeated so that the lists are of equal length.
    clean_share, unknown_share = share(clean), share(unknown)
    return {
        "edges": rounded(edges),
        "clean": [*clean_share, clean_share[-1]],
        "unknown": [*unknown_share, unknown_share[-1]],
    }


def _worst_cases(out: Measured, context: Context, tables: Tables, model: str, done: set[str]) -> None:
    """For each norm and budget: correct clean and under every attack of that norm with at most that budget.

    Undefined where one of these attacks could not be computed: a worst case over fewer attacks looks better than it is.
    """
    attacks: dict[str, list[tuple[float, Condition]]] = {}
    for condition in context.conditions_for(model).values():  # those too that were left out for want of a gradient
        facts = condition.facts()
        if condition.kind == "attack" and facts["eps"] is not None:
            attacks.setdefault(facts["norm"], []).append((facts["eps"], condition))
    for norm, found in sorted(attacks.items()):
        for eps in sorted({e for e, _ in found}):
            members = [c.label for e, c in found if e <= eps]
            if all(c.whole for e, c in found if e <= eps):
                continue  # audits alone: most samples have no verdict of their own
            label = f"worst case {norm} {format_number(eps)}"
            missing = [member for member in members if member not in done]
            if missing:
                undefined = Estimate.undefined(0, f"could not be computed: {', '.join(missing)}")
                out.rows.append(row(model, label, CLASSIFIER, "robust_accuracy", undefined))
            else:
                verdicts = [correct(tables.observations(model, name)) for name in (CLEAN, *members)]
                y = tables.observations(model, CLEAN)["label"]
                _accuracies(out, context, model, label, "robust_accuracy", cls.worst_case(verdicts), y)
            entry = {"label": label, "kind": "worst-case", "norm": norm, "eps": eps, "over": members}
            if entry not in out.worst_cases:
                out.worst_cases.append(entry)


def _shifts(out: Measured, context: Context, tables: Tables, model: str, done: set[str]) -> None:
    """Means over all corruptions and all domains of the suite, and the worst domain; undefined where a condition is missing."""
    conditions = context.conditions_of(model)
    of_kind = {k: [c.label for c in conditions.values() if c.kind == k] for k in ("corruption", "domain")}
    for labels, name, kind in (
        (of_kind["corruption"], CORRUPTIONS, "corruptions"),
        (of_kind["domain"], DOMAINS, "domains"),
    ):
        if len(labels) < 2:
            continue
        entry = {"label": name, "kind": kind, "over": labels}
        if entry not in out.worst_cases:
            out.worst_cases.append(entry)
        if missing := [label for label in labels if label not in done]:
            undefined = Estimate.undefined(0, f"could not be computed: {', '.join(missing)}")
            out.rows.append(row(model, name, CLASSIFIER, "mean_accuracy", undefined))
            continue
        right = [correct(tables.observations(model, label)) for label in labels]
        group = f"{len(labels)} conditions"
        if kind == "corruptions":
            # The same samples under each: a sample's mean over corruptions is what is independent.
            mean = resampled_mean(np.mean(right, axis=0))
            out.rows.append(row(model, name, CLASSIFIER, "mean_accuracy", mean, group=group))
            _corruption_errors(out, context, tables, model, [conditions[label] for label in labels])
            continue
        which = np.repeat(np.arange(len(right)), [len(part) for part in right])
        mean = tails.class_mean_accuracy(np.concatenate(right), which, np.arange(len(right)))
        out.rows.append(row(model, name, CLASSIFIER, "mean_accuracy", mean, group=group))
        worst, k = cls.worst_class_accuracy(np.concatenate(right), which, len(right))
        out.rows.append(row(model, name, CLASSIFIER, "worst_domain_accuracy", worst, group=labels[k]))


def _corruption_errors(
    out: Measured, context: Context, tables: Tables, model: str, conditions: Sequence[Condition]
) -> None:
    """Mean corruption errors where the fifteen corruptions are there at five severities: plain, and relative to baselines."""
    places = {(c.facts()["corruption"], c.facts()["severity"]): c.label for c in conditions}
    if not {(c, s) for c in FIFTEEN for s in range(1, 6)} <= set(places):
        return
    # What AlexNet's errors are known for.
    published = all(c.facts()["levels"] == "imagenet-c, as published" for c in conditions)
    same = tables.observations(model, CLEAN)["id"], tables.observations(model, conditions[0].label)["id"]
    paired = np.array_equal(*same)  # a rise is paired by sample

    def verdicts(name: str) -> tuple[dict[tuple[str, int], np.ndarray], np.ndarray]:
        seen = {place: correct(tables.observations(name, label)) for place, label in places.items()}
        return seen, correct(tables.observations(name, CLEAN))

    def add(metric: str, estimate: Estimate, against: str | None = None) -> None:
        fields = {"group": "fifteen corruptions", "against": against}
        out.rows.append(row(model, CORRUPTIONS, CLASSIFIER, metric, estimate, **fields))

    mine, clean = verdicts(model)
    add("mean_corruption_error", corruption.mean_error(mine))
    if paired:
        add("accuracy_drop", corruption.accuracy_drop(mine, clean))
    if published:
        add("corruption_mce", corruption.mce(mine))
        if paired:
            add("corruption_relative_mce", corruption.relative_mce(mine, clean))
    base = context.suite.baseline
    if base is None or not all(tables.complete(base, label) for label in (CLEAN, *places.values())):
        return
    theirs, their_clean = verdicts(base)
    add("corruption_mce", corruption.mce(mine, theirs), base)
    if paired:
        add("corruption_relative_mce", corruption.relative_mce(mine, clean, theirs, their_clean), base)


def _doubts(out: Measured, context: Context, tables: Tables, model: str, done: dict[str, Condition]) -> None:
    """What the attacks' records, held against each other, say of themselves."""
    clean = tables.observations(model, CLEAN)
    attacks = [_attacked(c, tables.observations(model, k)) for k, c in done.items() if isinstance(c, UnderAttack)]
    checked = context.preflight(model) if context.store.has(context.preflight_key(model)) else []
    randomised = any(c.name == "determinism" and c.status == "fail" for c in checked)
    found = doubts(correct(clean), clean["label"], rows(clean, "logits").shape[1], attacks, randomised)
    out.doubts += [Finding(model=model, **asdict(check)) for check in found]


def _attacked(condition: UnderAttack, columns: Columns) -> Attacked:
    facts = condition.facts()
    return Attacked(
        label=condition.label,
        attack=facts["attack"],
        norm=facts["norm"],
        eps=facts["eps"],
        access=access_of(condition.attack),
        broken=columns["broken"],
        norms=columns["norm"],
        broken_by=columns["broken_by"],
        # Records of earlier versions do not say it.
        late_gain=columns.get("late_gain", np.full(len(columns["broken"]), np.nan)),
        members=tuple(facts["members"]),
        parameters=facts["parameters"],
        partial="audit" in columns,
    )


def _gallery(out: Measured, tables: Tables, model: str, conditions: dict[str, Condition]) -> None:
    """Small images of the first samples: clean, as the attack left them, and the difference."""
    clean = tables.observations(model, CLEAN)
    for label, condition in conditions.items():
        if condition.kind != "attack":
            continue
        columns = tables.observations(model, label)
        shown = range(min(PREVIEWS, len(columns["preview"])))
        first = slice(0, len(shown))
        logits, attacked = rows(clean, "logits")[first], rows(columns, "logits")[first]
        for i in shown:
            before, after = clean["preview"][i], columns["preview"][i]
            difference = after.astype(np.float64) - before
            scale = np.abs(difference).max() or 1.0
            out.gallery.append(
                {
                    "model": model,
                    "condition": label,
                    "id": str(columns["id"][i]),
                    "label": int(columns["label"][i]),
                    "before": int(logits[i].argmax()),
                    "after": int(attacked[i].argmax()),
                    "broken": bool(columns["broken"][i]),
                    "norm": float(f"{columns['norm'][i]:.4g}"),
                    "images": [png(before), png(after), png(np.uint8(127.5 + 127.5 * difference / scale))],
                }
            )


def metric_table(shots: Shots | None = None) -> dict[str, dict[str, Any]]:
    """What results.json says of every metric; `shots`, where classes are cut into groups by their training samples."""
    table = {name: asdict(info) for name, info in METRICS.items()}
    if shots is not None:
        for name, definition in tails.shot_definitions(shots.many, shots.few).items():
            table[name]["definition"] = definition
    return table
