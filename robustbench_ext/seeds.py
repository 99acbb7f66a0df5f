"""Several trainings of the same model: what another training would give, beside what other test samples would give.

A suite's `train` entry with `seeds` becomes one model per seed. Each has its own rows, whose intervals are about samples; the
spread over seeds has rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from scipy import stats

from robustbench_ext.axes import Axis
from robustbench_ext.metrics import paired
from robustbench_ext.metrics.estimate import LEVEL
from robustbench_ext.metrics.intervals import seed_spread
from robustbench_ext.results import Compared, Row, RunResults, finite


def groups(results: RunResults) -> dict[str, list[str]]:
    """The models of every entry that is trained several times, by the entry's name."""
    found: dict[str, list[str]] = {}
    for model in results.models:
        if name := model.get("replicate_of"):
            found.setdefault(str(name), []).append(str(model["name"]))
    return {name: members for name, members in found.items() if len(members) > 1}


def replicates(results: RunResults) -> list[Row]:
    """The mean over seeds of every estimate that all seeds of an entry have, with Student's interval."""
    found: list[Row] = []
    for name, members in groups(results).items():
        for row in results.find(model=members[0]):
            rows = [_like(row, results, member) for member in members]
            values = [other.value for other in rows if other is not None and other.value is not None]
            if len(values) < len(members):
                continue
            spread = seed_spread(np.array(values))
            found.append(
                row.model_copy(
                    update={
                        "model": name,
                        "group": row.group if all(r is not None and r.group == row.group for r in rows) else None,
                        "against": row.against
                        if all(r is not None and r.against == row.against for r in rows)
                        else None,
                        "value": finite(spread.value),
                        "ci_low": finite(spread.ci_low),
                        "ci_high": finite(spread.ci_high),
                        "ci_method": spread.ci_method,
                        "n": spread.n,
                        "reason": spread.reason,
                        "n_unknown": None,
                    }
                )
            )
    return found


def _like(row: Row, results: RunResults, model: str) -> Row | None:
    """The same estimate of another model; of the lowest of several groups, whichever group it is."""
    place = {"condition": row.condition, "probe": row.probe, "metric": row.metric}
    rows = results.find(model=model, **place)
    if len(rows) == len(results.find(model=row.model, **place)) == 1:
        return rows[0]
    same = [other for other in rows if (other.group, other.against) == (row.group, row.against)]
    return same[0] if len(same) == 1 else None


def between_seeds(results: RunResults, wanted: Iterable[Axis]) -> list[Compared]:
    """Entries that are trained several times, in pairs: Welch's t-test over the seeds' values, corrected on every axis.

    It says whether the methods differ on these test samples whatever the seed; with three seeds only large differences show.
    """
    found: list[Compared] = []
    for axis in wanted:
        values = {}
        for name, members in groups(results).items():
            rows = [axis.row(results, member) for member in members]
            if all(row is not None and row.value is not None for row in rows):
                values[name] = np.array([row.value for row in rows if row is not None], dtype=np.float64)
        pairs = [(b, a) for a, b in combinations(values, 2)]
        tests = [_welch(values[a], values[b]) for a, b in pairs]
        adjusted = paired.holm([p for _, _, _, p in tests])
        higher = results.metrics[axis.metric]["higher_is_better"]
        for (a, b), (difference, low, high, p), corrected in zip(pairs, tests, adjusted, strict=True):
            decided = higher is not None and corrected < 1 - LEVEL
            found.append(
                Compared(
                    model=a,
                    against=b,
                    condition=axis.condition,
                    probe=axis.probe_of(groups(results)[a][0]),
                    metric=axis.metric,
                    group=None if axis.group is ... else axis.group,
                    value=difference,
                    ci_low=finite(low),
                    ci_high=finite(high),
                    ci_level=LEVEL,
                    ci_method="Welch over seeds",
                    test="Welch's t over seeds",
                    p_value=finite(p),
                    p_adjusted=finite(corrected),
                    outcome="inconclusive" if not decided else "better" if (difference > 0) == higher else "worse",
                    n=len(values[a]) + len(values[b]),
                    reason="" if p == p else "the seeds do not differ",
                )
            )
    return found


def _welch(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float, float]:
    """Difference of means, both ends of its interval, p-value; NaN where no seed differs from the others."""
    difference = float(a.mean() - b.mean())
    if a.var() + b.var() == 0:
        return difference, float("nan"), float("nan"), float("nan")
    test = stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    return difference, float(interval.low), float(interval.high), float(test.pvalue)
