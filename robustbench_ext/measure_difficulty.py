"""Results by difficulty: models under every condition, on slices of the test samples that other networks find equally hard.

Scores look at labels, so a slice is not a random sample for any model: whoever resembles the scorers is worst where they are.
Slices compare models, and say where attacks and shifts take their toll; they say nothing of a model by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from robustbench_ext.conditions import Condition
from robustbench_ext.difficulty import Scored, Slice, easiest_first
from robustbench_ext.evaluate import CLEAN, Context
from robustbench_ext.fingerprint import Rows
from robustbench_ext.measured import Columns, Measured, Place, Tables, correct, png, rows
from robustbench_ext.metrics import Estimate, binned, paired, ranking
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.metrics import classification as cls
from robustbench_ext.metrics import detection as det
from robustbench_ext.metrics.resampling import sample_mean
from robustbench_ext.probes import CLASSIFIER
from robustbench_ext.results import Difficulty, Hard, finite
from robustbench_ext.results import Slice as Described
from robustbench_ext.scoring import Scoring

FEWEST = 10  # inputs of either kind for an AUROC of a slice
GALLERY = "difficulty"  # in gallery.json, the condition of the hardest samples' images


def measure(out: Measured, context: Context, tables: Tables, models: Sequence[str]) -> None:
    """Rows by slice of these models, if the suite asks for them, and what the results say of the samples' difficulty."""
    scoring = context.scoring
    if scoring is None:
        return
    if not scoring.is_complete:
        out.notes.append("difficulty: scores are missing, so there are no results by difficulty; the failures say why")
        return
    scored = scoring.scores()
    cut = scored.slices(scoring.asked.bins)
    measured = [model for model in models if tables.complete(model, CLEAN)]
    for model in measured:
        _of_model(out, context, tables, model, scored, cut)
    out.scored = scored
    out.difficulty = Difficulty(
        score=scoring.asked.score,
        models={name: list(scoring.scorer(name).epochs) for name in scoring.asked.models},
        slices=[
            Described(group=group_of(part, cut), n=len(part.index), low=finite(part.low), high=finite(part.high))
            for part in cut
        ],
        hardest=_hardest(out, context, tables, measured, scored, scoring.asked.hardest),
    )
    out.notes += _notes(context, scoring, measured, scored, cut)


def group_of(part: Slice, cut: Sequence[Slice]) -> str:
    """How rows name a slice: `slice 3 of 10`."""
    return f"slice {part.number} of {len(cut)}"


def _of_model(
    out: Measured, context: Context, tables: Tables, model: str, scored: Scored, cut: Sequence[Slice]
) -> None:
    done = {k: c for k, c in context.conditions_of(model).items() if tables.complete(model, k)}
    clean = correct(tables.observations(model, CLEAN))
    for label, condition in done.items():
        columns = tables.observations(model, label)
        if _has_verdicts(condition, columns):
            place, attacked = Place(out, model, label, CLASSIFIER), condition.kind == "attack"
            _accuracies(place, correct(columns), None if label == CLEAN else clean, attacked, scored, cut)
            _calibration(place, rows(columns, "logits"), columns["label"], cut)
        if label != CLEAN:
            _detectors(out, context, tables, model, condition, cut)
    for label, members in _worst_cases(out, context, model, set(done)).items():
        right = cls.worst_case([correct(tables.observations(model, name)) for name in (CLEAN, *members)])
        _accuracies(Place(out, model, label, CLASSIFIER), right, clean, True, scored, cut)


def _has_verdicts(condition: Condition, columns: Columns) -> bool:
    """Whether each of the very test samples was judged under a condition."""
    return (
        condition.kind != "outliers"
        and not condition.own_samples
        and not condition.facts().get("minimum_norm")
        and "audit" not in columns
    )


def _worst_cases(out: Measured, context: Context, model: str, done: set[str]) -> dict[str, list[str]]:
    """The worst cases over attacks that have rows for a model, with their attacks."""
    mine = set(context.conditions_for(model))
    found: dict[str, list[str]] = {}
    for entry in (e for e in out.worst_cases if e["kind"] == "worst-case"):
        # Another model may meet fewer attacks: the same worst case is then taken over fewer.
        over = [str(label) for label in entry["over"]]
        if mine.issuperset(over) and len(over) > len(found.get(entry["label"], ())):
            found[str(entry["label"])] = over
    return {label: over for label, over in found.items() if done.issuperset(over)}


def _accuracies(
    place: Place, right: np.ndarray, clean: np.ndarray | None, attacked: bool, scored: Scored, cut: Sequence[Slice]
) -> None:
    """Accuracy of every slice and its change from clean inputs; how difficult mistakes are."""
    name = "robust_accuracy_by_difficulty" if attacked else "accuracy_by_difficulty"
    for part in cut:
        group = group_of(part, cut)
        place.row(name, cls.accuracy(right[part.index]), group=group)
        if clean is not None:
            change = paired.compare_proportions(right[part.index], clean[part.index]).difference
            place.row("change_by_difficulty", change, group=group, against=CLEAN)
    # Ranks: samples that were never learnt are infinitely hard.
    place.row("difficulty_of_mistakes", ranking.error_auroc(rankdata(scored.values), ~right))


def _calibration(place: Place, logits: Rows, y: np.ndarray, cut: Sequence[Slice]) -> None:
    confidence, right = cal.confidence_and_correctness(logits, y)
    terms = cal.brier_terms(logits, y)
    for part in cut:
        group, here = group_of(part, cut), part.index
        place.row(
            "rmsce_by_difficulty", binned.ece_debiased(confidence[here], right[here])["rmsce_debiased"], group=group
        )
        place.row("brier_by_difficulty", sample_mean(terms[here]), group=group)


def _detectors(
    out: Measured, context: Context, tables: Tables, model: str, condition: Condition, cut: Sequence[Slice]
) -> None:
    """AUROC of every detector between clean inputs of a slice and the condition's."""
    columns, same = tables.observations(model, condition.label), not condition.own_samples
    chosen = np.ones(len(columns["label"]), dtype=bool)
    if condition.kind == "attack":
        chosen = columns["broken"] & correct(tables.observations(model, CLEAN))
    for probe in (p for p in context.probes_read(model) if p.kind == "detector"):
        place = Place(out, model, condition.label, probe.label)
        clean = tables.probe(model, CLEAN, probe.label)["score"]
        there = tables.probe(model, condition.label, probe.label)["score"]
        for part in cut:
            unknown = there[part.index][chosen[part.index]] if same else there[chosen]
            estimate = Estimate.undefined(len(unknown), f"fewer than {FEWEST} inputs of a kind")
            if min(len(unknown), len(part.index)) >= FEWEST:
                estimate = det.auroc(clean[part.index], unknown)
            extra = {"group": group_of(part, cut), "against": CLEAN, "n_unknown": len(unknown)}
            place.row("auroc_by_difficulty", estimate, **extra)


def _hardest(
    out: Measured, context: Context, tables: Tables, models: Sequence[str], scored: Scored, count: int
) -> list[Hard]:
    """The most difficult samples with every model's clean prediction; their images go to the gallery."""
    hard = np.flip(easiest_first(scored.values, scored.ids))[:count]
    samples = context.samples(context.conditions[CLEAN], "test")
    predictions = {
        model: {i: int(rows(tables.observations(model, CLEAN), "logits")[i : i + 1].argmax()) for i in hard.tolist()}
        for model in models
    }
    for i in hard.tolist():
        x = context.task.inputs(samples, slice(i, i + 1))
        if x.ndim == 4 and x.shape[1] in (1, 3):
            shown = context.task.preview(x)["preview"][0]
            about = {"id": str(scored.ids[i]), "label": int(scored.labels[i])}
            out.gallery.append({"model": "", "condition": GALLERY, **about, "images": [png(shown)]})
    return [
        Hard(
            id=str(scored.ids[i]),
            label=int(scored.labels[i]),
            score=finite(float(scored.values[i])),
            predictions={model: found[i] for model, found in predictions.items()},
        )
        for i in hard.tolist()
    ]


def _notes(
    context: Context, scoring: Scoring, models: Sequence[str], scored: Scored, cut: Sequence[Slice]
) -> list[str]:
    found = []
    makers = {context.model(name).fingerprint: name for name in scoring.asked.models}
    for model in models:
        if maker := makers.get(context.model(model).fingerprint):
            own = "it" if maker == model else f"{maker}, which has the same weights,"
            found.append(
                f"difficulty: {model} is judged by slices that {own} helped to make, so its hard slices are those of its own "
                f"mistakes; take other networks, such as trainings from other seeds with evaluate: false"
            )
    for name in scoring.asked.models:
        if another := scoring.scorer(name).another:
            found.append(
                f"difficulty: the weights of {name} after epoch {', '.join(map(str, another))} are from another training of "
                f"the same recipe and seed than its model"
            )
    value, most = Counter(scored.values.tolist()).most_common(1)[0]
    if most > len(cut[0].index):
        found.append(
            f"difficulty: {most} of {len(scored.ids)} samples have the same score, {value:.3g}, which is more than a slice "
            f"holds: a hash of their ids says which slice each is in, and slices that hold only such do not differ"
        )
    return found
