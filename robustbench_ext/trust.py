"""Which uncertainty may be trusted for what? The parts of a joint run whose data knows the truth, read together.

Every judgement is a count over parts of rows that the parts' results hold, by a rule that is written down here, so that the
text of a report is a function of the numbers. Comparisons are paired by sample and corrected by Holm's method for all of a
task's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from robustbench_ext.axes import CLASSIFIER, CLEAN, SHOWN, estimators, is_regression, model_names
from robustbench_ext.compare import Run, test
from robustbench_ext.metrics import paired
from robustbench_ext.metrics.estimate import LEVEL
from robustbench_ext.per_sample import statistic
from robustbench_ext.results import Row

TOLERANCE = 0.02  # of a coverage on average
AT_EACH = 0.05  # of a coverage at each input: the mean gap
STRONG, SOME = 0.7, 0.3  # rank correlations that do what is asked, and that are of some use
BASELINE = (
    "split-conformal"  # what interval estimators are compared with: constant width around the model's own prediction
)
Task = Literal["classification", "regression"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Strict):
    """The lowest and the highest value over `n` parts (and conditions)."""

    low: float
    high: float
    n: int


class Versus(_Strict):
    """In how many of `n` paired comparisons an estimator's law is closer to the truth than `against`'s, or farther from it."""

    against: str
    closer: int
    farther: int
    n: int


class Trusted(_Strict):
    """An estimator over all parts. Ranges are of values, clean, where nothing else is said; null where it has none of this.

    Attributes:
        kl, kl_shifted: divergence from the true law, nats; the latter over all conditions but clean.
        rms: root of MSE_p, of classifiers.
        versus, versus_shifted: paired comparisons of the divergence.
        promised: of sets and intervals, such as "90 %".
        coverage, coverage_shifted, gap: true coverage, and its mean distance from the promise at each input (of sets:
        shortfall).
        noise: rank correlation of the aleatoric part with the true noise.
        distance: of the epistemic part with the distance from the truth. A classifier itself has one score for both: 1 - max p.
        epistemic: of the epistemic part with the true one, where it is known.
        good, bad: what the rules say it is good for, and what it is bad at.
    """

    task: Task
    model: str
    probe: str
    parts: int
    kl: Range | None = None
    kl_shifted: Range | None = None
    rms: Range | None = None
    versus: Versus | None = None
    versus_shifted: Versus | None = None
    promised: str | None = None
    coverage: Range | None = None
    coverage_shifted: Range | None = None
    gap: Range | None = None
    noise: Range | None = None
    distance: Range | None = None
    epistemic: Range | None = None
    good: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()


class Answer(_Strict):
    """A question, and what the numbers say to it, in plain words."""

    task: Task
    question: str
    text: str


def judge(runs: Sequence[Run], shifted: Collection[str] = ()) -> tuple[list[Trusted], list[Answer]]:
    """Every estimator over all runs, and the answers; both empty where no run knows the truth.

    Args:
        shifted: names of runs whose clean test inputs are unlike their training inputs: they count as shifted.
    """
    trusted: list[Trusted] = []
    answers: list[Answer] = []
    for task in ("classification", "regression"):
        mine = [run for run in runs if is_regression(run.results) == (task == "regression") and _knows(run)]
        if mine:
            found = _Judge(task, mine, frozenset(shifted)).all()
            trusted += found
            answers += _answers(task, found)
    return trusted, answers


def _knows(run: Run) -> bool:
    return bool(run.results.find(metric="true_coverage") or run.results.find(metric="mse_p"))


@dataclass(frozen=True)
class _Judge:
    task: Task
    runs: Sequence[Run]
    beyond: frozenset[str]

    def all(self) -> list[Trusted]:
        names = dict.fromkeys(
            (model, probe)
            for run in self.runs
            for model in model_names(run.results)
            for probe in (CLASSIFIER, *estimators(run.results))
            if self._has(run, model, probe)
        )
        compared = self._compared(list(names))
        return [self._one(model, probe, compared) for model, probe in names]

    def _has(self, run: Run, model: str, probe: str) -> bool:
        about = {"model": model, "condition": CLEAN, "probe": probe}
        return any(run.results.find(**about, metric=m) for m in ("mse_p", "kl_normal", "true_coverage"))

    @property
    def _kl(self) -> str:
        return "kl_p" if self.task == "classification" else "kl_normal"

    def _rows(self, model: str, probe: str, metric: str, shifted: bool = False, group: str | None = None) -> list[Row]:
        """Rows with values, over parts, clean or under all other conditions."""
        return [
            row
            for run in self.runs
            for row in run.results.find(model=model, probe=probe, metric=metric, group=group)
            if row.value is not None and self._shifted(run, row) == shifted
        ]

    def _shifted(self, run: Run, row: Row) -> bool:
        return row.condition != CLEAN or run.name in self.beyond

    # Comparisons -----------------------------------------------------------------------------------------------------

    def _against(self, run: Run, model: str, probe: str) -> tuple[str, str] | None:
        """What an estimator is compared with: the classifier's own probabilities, plain conformal intervals, or, of a model
        that is made of another, that one.
        """
        if self.task == "regression":
            return None if probe == BASELINE else (model, BASELINE)
        if probe != CLASSIFIER:
            return model, CLASSIFIER
        about = next(m for m in run.results.models if m["name"] == model)
        return (about["made"]["of"][0], CLASSIFIER) if "made" in about else None

    def _compared(
        self, names: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str, bool], list[tuple[str, float, float]]]:
        """By model, probe and whether shifted: (against, difference of the divergence, corrected p)."""
        found: list[tuple[tuple[str, str, bool], str, paired.Comparison]] = []
        for run in self.runs:
            for model, probe in names:
                other = self._against(run, model, probe) if self._has(run, model, probe) else None
                if other is None:
                    continue
                for row in run.results.find(model=model, probe=probe, metric=self._kl):
                    made = [
                        statistic(run.records, run.results, m, row.condition, p, self._kl)
                        if run.results.find(model=m, condition=row.condition, probe=p, metric=self._kl)
                        else None
                        for m, p in ((model, probe), other)
                    ]
                    if made[0] is not None and made[1] is not None:
                        of = other[1] if other[0] == model else f"{other[0]} · {other[1]}"
                        found.append(((model, probe, self._shifted(run, row)), of, test(made[0], made[1])))
        adjusted = paired.holm([comparison.p_value for _, _, comparison in found])
        told: dict[tuple[str, str, bool], list[tuple[str, float, float]]] = {}
        for (key, of, comparison), p in zip(found, adjusted, strict=True):
            told.setdefault(key, []).append((of, comparison.difference.value, p))
        return told

    # One estimator ---------------------------------------------------------------------------------------------------

    def _one(
        self, model: str, probe: str, compared: dict[tuple[str, str, bool], list[tuple[str, float, float]]]
    ) -> Trusted:
        kl, shifted = self._rows(model, probe, self._kl), self._rows(model, probe, self._kl, shifted=True)
        promised = self._promised(model, probe)
        gap = "coverage_gap" if self.task == "regression" else "coverage_shortfall"
        own = probe == CLASSIFIER
        noise = self._rows(model, f"{probe} · {'msp' if own else 'aleatoric'}", "noise_spearman")
        doubt = f"{probe} · {'msp' if own else 'epistemic'}"
        distance = self._rows(model, doubt, "truth_error_spearman")
        epistemic = self._rows(model, doubt, "epistemic_spearman")
        versus = {s: _versus(compared.get((model, probe, s), [])) for s in (False, True)}
        coverage = {
            s: self._rows(model, probe, "true_coverage", s, promised) if promised else [] for s in (False, True)
        }
        gaps = self._rows(model, probe, gap, group=promised) if promised else []
        good, bad = _rules(self.task, versus, promised, coverage, gaps, noise, distance, epistemic)
        return Trusted(
            task=self.task,
            model=model,
            probe=probe,
            parts=sum(self._has(run, model, probe) for run in self.runs),
            kl=_range(row.value for row in kl),
            kl_shifted=_range(row.value for row in shifted),
            rms=_range((row.value or 0.0) ** 0.5 for row in self._rows(model, probe, "mse_p")),
            versus=versus[False],
            versus_shifted=versus[True],
            promised=promised,
            coverage=_range(row.value for row in coverage[False]),
            coverage_shifted=_range(row.value for row in coverage[True]),
            gap=_range(row.value for row in gaps),
            noise=_range(row.value for row in noise),
            distance=_range(row.value for row in distance),
            epistemic=_range(row.value for row in epistemic),
            good=tuple(good),
            bad=tuple(bad),
        )

    def _promised(self, model: str, probe: str) -> str | None:
        groups = [
            row.group for run in self.runs for row in run.results.find(model=model, probe=probe, metric="true_coverage")
        ]
        return SHOWN if self.task == "regression" and groups else next((g for g in groups if g is not None), None)


def _versus(found: Sequence[tuple[str, float, float]]) -> Versus | None:
    if not found:
        return None
    sure = [value for _, value, p in found if p < 1 - LEVEL]
    return Versus(against=found[0][0], closer=sum(v < 0 for v in sure), farther=sum(v > 0 for v in sure), n=len(found))


def _range(values: Iterable[float | None]) -> Range | None:
    found = [v for v in values if v is not None]
    return Range(low=min(found), high=max(found), n=len(found)) if found else None


# Rules ---------------------------------------------------------------------------------------------------------------

LAW, LAW_SHIFTED = "how likely", "how likely, under shift"
AVERAGE, EACH, SHIFTED = "coverage on average", "coverage at each input", "coverage under shift"
NOISE, WRONG, IGNORANCE = "which outcomes are noisy", "where it is wrong", "where data is missing"


def _rules(
    task: Task,
    versus: dict[bool, Versus | None],
    promised: str | None,
    coverage: dict[bool, list[Row]],
    gaps: list[Row],
    noise: list[Row],
    distance: list[Row],
    epistemic: list[Row],
) -> tuple[list[str], list[str]]:
    """What an estimator is good for, and bad at; neither where the parts disagree or chance could decide."""
    good: list[str] = []
    bad: list[str] = []

    def rule(name: str, is_good: bool, is_bad: bool) -> None:
        if is_good:
            good.append(name)
        elif is_bad:
            bad.append(name)

    for shifted, name in ((False, LAW), (True, LAW_SHIFTED)):
        v = versus[shifted]
        if v is not None:
            rule(name, v.closer > 0 and not v.farther, v.farther > v.closer)
    if promised is not None:
        nominal = float(promised.removesuffix(" %")) / 100
        least = nominal - TOLERANCE
        most = nominal + TOLERANCE if task == "regression" else 1.0  # sets of few classes cannot be smaller
        kept = [_high(row) >= least and _low(row) <= most for row in coverage[False]]
        if kept:
            rule(AVERAGE, all(kept), True)
            rule(EACH, all(_high(row) <= AT_EACH for row in gaps), all(_low(row) > AT_EACH for row in gaps))
        if coverage[True]:
            broken = [_high(row) < least for row in coverage[True]]
            rule(SHIFTED, not any(broken), True)
    for rows, name in ((noise, NOISE), (distance, WRONG), (epistemic, IGNORANCE)):
        if rows:
            strong = STRONG if rows is not distance else SOME
            rule(name, all(_low(row) >= strong for row in rows), all(_high(row) < strong for row in rows))
    return good, bad


def _low(row: Row) -> float:
    return row.ci_low if row.ci_low is not None else row.value or 0.0


def _high(row: Row) -> float:
    return row.ci_high if row.ci_high is not None else row.value or 0.0


# In plain words ------------------------------------------------------------------------------------------------------

_QUESTIONS: dict[Task, dict[str, str]] = {
    "classification": {
        LAW: "How likely is the outcome?",
        LAW_SHIFTED: "How likely is it, when the picture is noisy or attacked?",
        AVERAGE: "Is the label in the set as often as was promised?",
        EACH: "Is that so at each input?",
        SHIFTED: "Is it so under noise and attack?",
        NOISE: "Which outcomes are uncertain by nature?",
        WRONG: "Where are the probabilities wrong?",
    },
    "regression": {
        LAW: "Which values are how likely?",
        LAW_SHIFTED: "And when the inputs are noisy or from elsewhere?",
        AVERAGE: "Is the target in the interval as often as was promised?",
        EACH: "Is that so at each input?",
        SHIFTED: "Is it so when the inputs are noisy or from elsewhere?",
        NOISE: "Where is the noise large?",
        WRONG: "Where is the prediction far from the truth?",
        IGNORANCE: "Where is data missing?",
    },
}
_TRUSTED = ("Trusted", "Not to be trusted", "Undecided, or not the same in all parts")
_BETTER = ("Better", "Worse", "No better, or not in all parts")
_RULES = {
    LAW: "divergence from the true law (KL, nats) against {against}, paired by sample; better is closer somewhere and farther "
    "nowhere, worse is farther more often than closer",
    LAW_SHIFTED: "the same comparison under every condition but clean, and where test inputs are unlike the training inputs",
    AVERAGE: "true coverage: trusted where it is within {tolerance} points of the promise in every part (sets: not below)",
    EACH: "mean distance of the true coverage from the promise at each input (sets: shortfall): trusted up to {each} points",
    SHIFTED: "true coverage in the same places: trusted where it is nowhere more than {tolerance} points below",
    NOISE: "rank correlation of the aleatoric part with the true noise: trusted from {strong} on in every part",
    WRONG: "rank correlation of the epistemic part with the distance from the truth: trusted from {some} on in every part",
    IGNORANCE: "rank correlation of the epistemic part with the true one: trusted from {strong} on in every part",
}


def _answers(task: Task, found: Sequence[Trusted]) -> list[Answer]:
    against = "the classifier's own probabilities (of a model that is made of another, those of that one)"
    if task == "regression":
        against = f"{BASELINE} of the same model"
    values = {
        "against": against,
        "tolerance": f"{100 * TOLERANCE:g}",
        "each": f"{100 * AT_EACH:g}",
        "strong": STRONG,
        "some": SOME,
    }
    answers = []
    for key, question in _QUESTIONS[task].items():
        yes, no, else_ = _BETTER if key in (LAW, LAW_SHIFTED) else _TRUSTED
        groups: dict[str, list[str]] = {yes: [], no: [], else_: []}
        for one in found:
            said = _evidence(key, one)
            if said is not None:
                groups[yes if key in one.good else no if key in one.bad else else_].append(f"{_name(one)} ({said})")
        if any(groups.values()):
            told = [
                f"{group}: {'; '.join(names) or 'none'}" for group, names in groups.items() if names or group == yes
            ]
            rule = _RULES[key].format(**values)
            answers.append(Answer(task=task, question=question, text=f"{'. '.join(told)}. Rule: {rule}."))
    return answers


def _name(one: Trusted) -> str:
    """`temperature`; the model is named where it says something itself."""
    return one.model if one.probe == CLASSIFIER else f"{one.probe} of {one.model}"


def _evidence(key: str, one: Trusted) -> str | None:
    """The numbers behind a judgement; None where there are none."""
    if key in (LAW, LAW_SHIFTED):
        v, kl = (one.versus, one.kl) if key == LAW else (one.versus_shifted, one.kl_shifted)
        if v is None or kl is None:
            return None
        return f"{_span(kl.low, kl.high, '', 3)}; closer in {v.closer}, farther in {v.farther} of {v.n}"
    percent = {AVERAGE: one.coverage, SHIFTED: one.coverage_shifted, EACH: one.gap}
    if key in percent:
        of = percent[key]
        return None if of is None else _span(100 * of.low, 100 * of.high, " %" if key != EACH else " points", 1)
    of = {NOISE: one.noise, WRONG: one.distance, IGNORANCE: one.epistemic}[key]
    return None if of is None else _span(of.low, of.high, "", 2)


def _span(low: float, high: float, unit: str, digits: int) -> str:
    a, b = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return f"{a}{unit}" if a == b else f"{a} to {b}{unit}"
