"""What `robustness(...)` returns: every number that was measured, by name, as something of which one can expect something."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from robustbench_ext import compare
from robustbench_ext.axes import CLASSIFIER, CLEAN, REGRESSOR, SHOWN
from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.gate.baseline import Baseline, Protocol, updated
from robustbench_ext.gate.expectation import Expectation, Verdict, judge_difference, more_samples
from robustbench_ext.gate.kept import Quantity, changes
from robustbench_ext.gate.locks import Task, share
from robustbench_ext.gate.packages import own_packages
from robustbench_ext.gate.run import MODEL, Measured
from robustbench_ext.measure import correct
from robustbench_ext.metrics.estimate import METRICS
from robustbench_ext.numbers import parse_number
from robustbench_ext.per_sample import Share
from robustbench_ext.results import Row

if TYPE_CHECKING:
    from robustbench_ext.gate.session import Robustness

# First words of names that say which condition is meant: robust_ece is the ECE under attack.
KINDS = {
    "robust": "attack",
    "attacked": "attack",
    "corrupted": "corruption",
    "domain": "domain",
    "shifted": "shift",
    "outlier": "outliers",
}
HINTS = {
    "attack": "give attack= and eps=",
    "corruption": "give corruption= and perhaps severity=",
    "domain": "give domain=",
    "shift": "give shift=",
    "outliers": "give outliers= and perhaps detector=",
}
_DETECTION = ("auroc", "aupr", "fpr95", "tnr95", "detection_accuracy", "alarms", "false_alarms")
_INTERVALS = ("coverage", "width", "interval", "wis", "crps", "pinball", "quantile", "set_", "crossing")


class Measurement:
    """One model, measured.

    Every metric is an attribute: `r.accuracy`, `r.ece`, `r.auroc`, `r.rmse` are clean ones, or of the only condition that they
    make sense for; a first word says which other condition is meant: `r.robust_accuracy`, `r.robust_ece`,
    `r.corrupted_accuracy`, `r.domain_accuracy`, `r.attacked_rmse`. Of several attacks `robust_...` is the worst case, sample by
    sample; of several corruptions `corrupted_accuracy` is the mean. Whatever is not clear from the name is said:
    `r["ece", "fog 3"]`, `r["auroc", "outliers letters", "energy"]`, `r.metric("coverage", group="80 %")`.

    Attributes:
        results: everything that was measured, as in results.json.
        undone: what there was no time for, by condition.
    """

    def __init__(self, engine: Robustness, measured: Measured, key: str, name: str, title: str) -> None:
        self.engine, self._measured, self.key, self.name, self.title = engine, measured, key, name, title
        self.results, self.undone = measured.results, measured.undone

    def __repr__(self) -> str:
        return f"<Measurement of {self.title}: {', '.join(self.conditions)}>"

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *dict.fromkeys(row.metric for row in self.results.results)]

    def __getattr__(self, name: str) -> Expectation:
        __tracebackhide__ = True
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.metric(name)
        except ConfigError as error:
            raise AttributeError(str(error)) from None

    def __getitem__(self, key: str | tuple[str | None, ...]) -> Expectation:
        __tracebackhide__ = True
        parts = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(parts) <= 4:
            raise ConfigError("r[...]: expected metric, and perhaps condition, probe and group")
        return self.metric(*parts)  # type: ignore[arg-type]

    @property
    def conditions(self) -> list[str]:
        """Labels of all conditions, those that are taken over several included."""
        labels = [*self._measured.context.conditions_of(MODEL), *(c["label"] for c in self.results.conditions)]
        return list(dict.fromkeys(labels))

    def not_worse_than_baseline(
        self,
        metric: str,
        margin: float | str = 0.0,
        *,
        condition: str | None = None,
        probe: str | None = None,
        group: str | None = None,
        confidence: float | None = None,
        higher_is_better: bool | None = None,
    ) -> Verdict:
        """Expect a metric not to be worse than in the stored baseline, on the same samples.

        Without a margin it fails where the metric is significantly worse, and passes otherwise: that no drop was seen. With a
        margin it fails where the metric is surely worse by more than that, passes where that is excluded, and is inconclusive
        in between. Without a baseline it fails; `--robust-update` writes one.

        Args:
            margin: in units of the metric, >= 0.
            higher_is_better: for metrics of which neither direction is better, such as coverage.
        """
        __tracebackhide__ = True
        found = self.metric(metric, condition, probe, group)
        return self._compare(found, margin, confidence, higher_is_better)

    # Finding ---------------------------------------------------------------------------------------------------------

    def metric(
        self, metric: str, condition: str | None = None, probe: str | None = None, group: str | None = None
    ) -> Expectation:
        """The number of that name; what is not said is what is obvious.

        Raises:
            ConfigError: there is no such number, or it is not clear which of several is meant.
        """
        name, kind = self._named(metric, condition)
        labels = [condition] if condition is not None else self._labels(metric, name, kind)
        if condition is not None and condition not in self.conditions:
            raise ConfigError(f"{metric}: {unknown_name('condition', condition, self.conditions)}")
        if kind == "corruption" and labels == ["all corruptions"] and name == "accuracy":
            name = "mean_accuracy"
        if kind == "domain" and labels == ["all domains"] and name == "accuracy":
            name = "mean_accuracy"
        missing = [f"{label}: {why}" for label, why in self.undone.items() if label in self._behind(labels)]
        rows = [row for row in self.results.find(metric=name) if row.condition in labels]
        if not rows and missing:
            return Expectation(self, name, labels[0], probe or "", group, None, "; ".join(missing))
        if not rows:
            raise ConfigError(self._nothing(metric, name, kind, labels))
        rows = self._chosen(metric, rows, "condition", None)
        rows = self._chosen(metric, rows, "probe", probe)
        (row,) = self._chosen(metric, rows, "group", group)
        return Expectation(self, name, row.condition, row.probe, row.group, row)

    def _named(self, metric: str, condition: str | None) -> tuple[str, str | None]:
        """The metric's own name, and the kind of condition that the given name speaks of."""
        if metric == "robust_accuracy":
            return metric, "attack" if condition is None else None
        if metric in METRICS:
            return metric, None
        first, _, rest = metric.partition("_")
        if first in KINDS and rest in METRICS:
            return rest, KINDS[first]
        words = [
            f"{word}_{name}" for word in KINDS for name in ("accuracy", "ece", "nll", "worst_class_accuracy", "rmse")
        ]
        raise ConfigError(_short(unknown_name("metric", metric, [*METRICS, *words])) + self._measured_names())

    def _labels(self, given: str, metric: str, kind: str | None) -> list[str]:
        """The conditions that a name may speak of; of one kind, the one that stands for all."""
        own = self._measured.context.conditions_of(MODEL)
        if kind is None:
            return self._plain(metric)
        of_kind = [label for label, c in own.items() if c.kind == kind and not c.facts().get("minimum_norm")]
        if not of_kind:
            raise ConfigError(f"{given} was not measured: {HINTS[kind]}.")
        if len(of_kind) == 1:
            return of_kind
        if kind == "attack":
            budgets = {(f["norm"], f["eps"]) for f in (own[label].facts() for label in of_kind) if "norm" in f}
            over = [c for c in self.results.conditions if c["kind"] == "worst-case"]
            found = [str(c["label"]) for c in over if set(c["over"]) == set(of_kind)]
            if len(budgets) == 1 and found and self.results.find(metric=metric, condition=found[0]):
                return found
            if len(budgets) == 1 and self.undone:
                return of_kind
            labels = [*of_kind, *(str(c["label"]) for c in over)]
        else:
            name = {"corruption": "all corruptions", "domain": "all domains"}.get(kind)
            if name is not None and metric in ("accuracy", "mean_accuracy"):
                return [name]
            labels = of_kind
        raise ConfigError(f"{given}: of which condition? Say r['{metric}', CONDITION], one of: {', '.join(labels)}")

    def _plain(self, metric: str) -> list[str]:
        """Where a metric without a first word is looked for: clean; else among outliers; else wherever it is."""
        rows = self.results.find(metric=metric)
        there = list(dict.fromkeys(row.condition for row in rows))
        if CLEAN in there or (not there and CLEAN in self.undone):
            return [CLEAN]
        if not there:
            return list(self.undone)
        kinds = {c["label"]: c["kind"] for c in self.results.conditions}
        return [label for label in there if kinds[label] == "outliers"] or there

    def _behind(self, labels: list[str]) -> set[str]:
        over = {str(c["label"]): c.get("over", []) for c in self.results.conditions}
        return {label for name in labels for label in (name, *over.get(name, self._parts(name)))}

    def _parts(self, label: str) -> list[str]:
        """The conditions of a summary that there are no results of."""
        kind = {"all corruptions": "corruption", "all domains": "domain"}.get(label)
        return [name for name, c in self._measured.context.conditions_of(MODEL).items() if c.kind == kind]

    def _chosen(self, metric: str, rows: list[Row], field: str, wanted: str | None) -> list[Row]:
        """The rows with a field's wanted value, or with the obvious one."""
        there = list(dict.fromkeys(getattr(row, field) for row in rows))
        if wanted is not None:
            if wanted not in there:
                raise ConfigError(f"{metric}: {unknown_name(field, wanted, [str(t) for t in there if t is not None])}")
            return [row for row in rows if getattr(row, field) == wanted]
        usual = {"probe": (CLASSIFIER, REGRESSOR), "group": (None, SHOWN)}.get(field, ())
        obvious = there if len(there) == 1 else [value for value in usual if value in there]
        if not obvious:
            names = ", ".join(map(str, there))
            raise ConfigError(
                f"{metric}: of which {field}? Say r.metric('{rows[0].metric}', {field}=...), one of: {names}"
            )
        return [row for row in rows if getattr(row, field) == obvious[0]]

    def _nothing(self, given: str, metric: str, kind: str | None, labels: list[str]) -> str:
        failed = [f"{f.what.removeprefix(MODEL + ' · ')}: {f.error}" for f in self.results.failures]
        where = f" under {labels[0]}" if len(labels) == 1 else ""
        hint = HINTS.get(kind or "", "")
        if not hint and metric.startswith(_DETECTION):
            hint = HINTS["outliers"]
        if not hint and metric.startswith(_INTERVALS):
            hint = "give uq=, such as uq='split-conformal' of a regressor or uq='aps' of a classifier"
        more = f" {hint}." if hint else ""
        lost = f" Failed: {'; '.join(failed)}." if failed else ""
        return f"{given} was not measured{where}:{more}{lost}{self._measured_names()}"

    def _measured_names(self) -> str:
        return f" Measured: {', '.join(sorted({row.metric for row in self.results.results})) or 'nothing'}."

    # Baselines -------------------------------------------------------------------------------------------------------

    def _quantity(self, found: Expectation) -> Quantity:
        place = (found.condition, found.probe, found.metric, found.group)
        return Quantity(self._measured.records, self.results, MODEL, *place)

    def _compare(
        self, found: Expectation, margin: float | str, confidence: float | None, higher_is_better: bool | None
    ) -> Verdict:
        __tracebackhide__ = True
        with own_packages():
            outcome, wanted, message, facts = self._compared(found, margin, confidence, higher_is_better)
        return self.engine.conclude(found, outcome, wanted, message, found.estimate, facts)

    def _compared(
        self, found: Expectation, margin: float | str, confidence: float | None, higher_is_better: bool | None
    ) -> tuple[Any, str, str, dict[str, Any]]:
        """Outcome, what was wanted, message, further facts for the summary."""
        allowed = parse_number(margin, f"{found.metric}: margin")
        if allowed < 0:
            raise ConfigError(f"{found.metric}: margin = {margin}, expected 0 or more, in units of the metric")
        higher = METRICS[found.metric].higher_is_better if higher_is_better is None else higher_is_better
        if higher is None:
            raise ConfigError(
                f"{found.metric}: neither direction is better in itself. Say higher_is_better=True or False, or use .between()"
            )
        level = self.engine.confidence(confidence)
        wanted = "baseline" if not allowed else f"baseline {'-' if higher else '+'} {allowed:g}"
        if self.engine.no_baseline:
            return "skipped", wanted, f"{found.name}: not compared with a baseline (--robust-no-baseline)", {}
        if found.row is None or found.row.value is None:
            why = found.reason or "undefined"
            return "inconclusive", wanted, f"{found.name}: nothing to compare with the baseline ({why})", {}
        quantity = self._quantity(found)
        kept = quantity.keep()
        if kept is None:
            raise ConfigError(
                f"{found.metric} has no sample-by-sample form, so two models cannot be compared in it on the same samples. "
                f"Compare a related metric (auroc instead of fpr95, ece instead of mce), or use .at_least() or .at_most()."
            )
        protocol = Protocol.of(self._measured.context, quantity)
        test = self.engine.baseline_name(self)
        path = self.engine.baseline_path(self)
        shown = self.engine.relative(path)
        if self.engine.update:
            text = self._update(found, quantity, kept, protocol, test, path)
            return "pass", wanted, f"{shown}: {text}", {"updated": f"{shown}: {text}"}
        baseline = Baseline.read(path)
        if baseline is None:
            message = (
                f"{found.name}: there is no baseline {shown} to compare with. Write it with --robust-update once the model is "
                f"as it should be, and commit it."
            )
            return "fail", wanted, message, {}
        refusal = baseline.refusal(quantity, protocol)
        if refusal:
            message = (
                f"{found.name}: the baseline {shown} measured something else (then / now): {refusal}. "
                f"If that is meant, write it again with --robust-update."
            )
            return "fail", wanted, message, {}
        before = baseline.kept(quantity)
        entry = baseline.entry(quantity) or {}
        comparison = compare.test(quantity.restore(kept), quantity.restore(before))
        size = max(abs(found.value), abs(entry.get("value") or 0.0))
        outcome, needed = judge_difference(comparison, higher, allowed, level, size)
        unchanged = baseline.model == self._measured.fingerprint
        if unchanged and outcome != "fail":
            return "pass", wanted, f"{found.name}: the model is the baseline's own ({found.shown(found.value)})", {}
        d = comparison.difference
        was = found.shown(entry["value"]) if entry.get("value") is not None else "?"
        verb = {"fail": "is worse than", "pass": "is not worse than", "inconclusive": "may be worse than"}[outcome]
        lines = [
            f"{found.name} {verb} the baseline{f' by more than {allowed:g}' if allowed else ''}: {was} then, "
            f"{found.shown(found.value)} now (n = {d.n})",
            f"difference {_signed(d.value)}, {100 * d.level:.6g} % interval {_signed(d.ci_low)} to {_signed(d.ci_high)} "
            f"({d.ci_method}), p = {comparison.p_value:.2g} ({comparison.test})",
        ]
        if d.reason:
            lines.append(d.reason)
        if outcome == "inconclusive":
            lines.append(more_samples(needed, d.n))
        changed = changes(quantity, kept, before, higher)
        if outcome != "pass" and changed.describe():
            lines.append(changed.describe())
        if unchanged:
            lines.append(
                "the model's fingerprint is the baseline's: what changed is outside of its weights and classes"
            )
        return outcome, wanted, "\n".join(lines), {"before": entry.get("value"), "difference": _or_none(d.value)}

    def _update(
        self, found: Expectation, quantity: Quantity, kept: Any, protocol: Protocol, test: str, path: Any
    ) -> str:
        """Write the metric into the baseline; returns what changed."""
        said: list[str] = []
        fingerprint = self._measured.fingerprint
        assert found.row is not None  # noqa: S101 - the caller looked

        def write() -> None:
            try:
                old = Baseline.read(path)
                entry = old.entry(quantity) if old is not None else None
                refusal = "" if old is None or entry is None else old.refusal(quantity, protocol)
                if old is None or entry is None:
                    said.append(f"{found.name} {found.shown(found.value)} (new)")
                elif refusal:
                    said.append(f"{found.name} {found.shown(found.value)}, measured otherwise than before ({refusal})")
                else:
                    lost = changes(quantity, kept, old.kept(quantity), True)
                    counts = "" if lost.lost is None else f", {lost.lost} samples lost, {lost.gained} gained"
                    was = "?" if entry["value"] is None else found.shown(entry["value"])
                    said.append(f"{found.name} {was} -> {found.shown(found.value)}{counts}")
            except ConfigError as error:
                old = None
                said.append(
                    f"{found.name} {found.shown(found.value)}, in the place of what could not be read ({error})"
                )
            updated(old, path, test, fingerprint, quantity, protocol, found.row, kept).write()  # type: ignore[arg-type]

        done: list[bool] = []

        def run() -> None:
            write()
            done.append(True)

        task = Task(f"baseline-{path.stem}", lambda: bool(done), run)
        share([task], self._measured.context.folder / "locks")
        return "; ".join(said)

    # Evidence --------------------------------------------------------------------------------------------------------

    def _evidence(self, found: Expectation) -> list[str]:
        """Samples behind a number that misses its threshold: those that changed since the baseline, else wrong ones."""
        higher = METRICS[found.metric].higher_is_better
        if found.row is None or higher is None:
            return []
        with own_packages():
            quantity = self._quantity(found)
            kept = quantity.keep()
            if kept is None:
                return []
            try:
                path = self.engine.baseline_path(self)
                baseline = Baseline.read(path)
                protocol = Protocol.of(self._measured.context, quantity)
                if baseline is not None and not baseline.refusal(quantity, protocol):
                    text = changes(quantity, kept, baseline.kept(quantity), higher).describe()
                    return [text] if text else []
            except ConfigError:
                pass  # a baseline that cannot be read is no reason to say less of the threshold
            return self._wrong(quantity)

    def _wrong(self, quantity: Quantity) -> list[str]:
        """The samples that count against a share, those first that are right as they are."""
        stat = quantity.statistic()
        if not isinstance(stat, Share) or stat.right.all():
            return []
        wrong = ~stat.right
        clean = self._measured.records.observations(MODEL, CLEAN)
        if quantity.condition != CLEAN and np.array_equal(clean["id"], stat.ids) and "logits" in clean:
            lost = wrong & correct(clean)
            if lost.any():
                return [f"right as they are and wrong here: {int(lost.sum())}, such as {_first(stat.ids[lost])}"]
        return [f"wrong: {int(wrong.sum())}, such as {_first(stat.ids[wrong])}"]


def _first(ids: np.ndarray, most: int = 5) -> str:
    return ", ".join(map(str, ids[:most].tolist()))


def _signed(value: float) -> str:
    return f"{value:+.4g}"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(text: str) -> str:
    """An unknown name without the list of all known ones, which would fill a screen."""
    return text.partition(" Known: ")[0]
