"""The schema of results.json, versioned. Reports know this and nothing else.

Numbers are numbers, undefined is null with a reason, units are in the definitions under `metrics`. There is no
timestamp and no timing in it: equal records give equal bytes. What a run cost in seconds is in run.json.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from robustbench_ext.checks import Status, verdict
from robustbench_ext.errors import ConfigError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Part):
    """One estimate.

    Attributes:
        model, condition, probe: what was measured; `probe` is "classifier" for the model's own logits, "regressor" for its
            own prediction, `ESTIMATOR · epistemic` and the like for an estimator's uncertainties.
        metric: a key of `metrics`.
        group: the class (or other subset, or nominal coverage of intervals: "90 %") that the estimate is about; null for
            all samples.
        against: the condition, the probe, or the models that a metric compares with; null otherwise.
        value, ci_low, ci_high: null where undefined, then `reason` says why.
        n: samples behind the value.
        n_unknown: of them unknown or attacked inputs, for detection metrics; AUPR depends on this share.
    """

    model: str
    condition: str
    probe: str
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    ci_level: float
    ci_method: str
    n: int
    group: str | None = None
    against: str | None = None
    n_unknown: int | None = None
    reason: str = ""


class Curve(_Part):
    """Numbers behind a figure; `data` holds lists of equal length.

    Attributes:
        kind: "reliability", "scores", "roc", "robust-accuracy" (against eps, from a minimum-norm attack), "energies"
            (histograms of natural and attacked inputs, marginal and joint), "risk-coverage" (errors among the samples that
            are answered), "coverage" (of intervals, against their nominal coverage), or "intervals" (of some samples).
            "low" and "high" are a band that holds the whole curve at 95 %; of "intervals" they are these.
    """

    kind: Literal[
        "reliability", "scores", "roc", "robust-accuracy", "energies", "risk-coverage", "coverage", "intervals"
    ]
    model: str
    condition: str
    probe: str
    data: dict[str, list[float]]


class Compared(_Part):
    """Two models on the same samples: `model` against `against`.

    Attributes:
        condition, probe, metric, group: what is compared, as in a row.
        value, ci_low, ci_high: the metric of `model` minus that of `against`, with its interval, which is not corrected for the
            number of comparisons; null where undefined, then `reason` says why.
        test: how the p-value was made; p_value: two-sided, of no difference; p_adjusted: corrected by Holm's method for the
            number of comparisons on the same axis (condition, probe, metric, group).
        outcome: "better" or "worse" where p_adjusted is below one minus ci_level, and "inconclusive" otherwise.
        n: samples that both have.
        n_to_decide: samples at which a true difference of this size would be found with a probability of 80 %; null where that
            is known to be decided, or where there is no difference to find.
    """

    model: str
    against: str
    condition: str
    probe: str
    metric: str
    group: str | None = None
    value: float | None
    ci_low: float | None
    ci_high: float | None
    ci_level: float
    ci_method: str
    test: str
    p_value: float | None
    p_adjusted: float | None
    outcome: Literal["better", "worse", "inconclusive"]
    n: int
    n_to_decide: int | None = None
    reason: str = ""


class Cost(_Part):
    """Passes spent on making a condition's inputs, in samples: one forward of a batch of 250 counts 250."""

    model: str
    condition: str
    n: int
    forwards: int
    backwards: int


class Finding(_Part):
    """One check of one model: of the model before the run (preflight), or of its results after it (doubts)."""

    model: str
    name: str
    status: Status
    message: str
    hint: str = ""


class Failed(_Part):
    """A part of the run that could not be computed."""

    what: str
    error: str


class Slice(_Part):
    """Test samples of similar difficulty.

    Attributes:
        group: as rows name it, `slice 1 of 10`; the first holds the easiest samples.
        n: the number of these samples.
        low, high: their smallest and largest score; null where infinite (a sample that was never classified correctly).
    """

    group: str
    n: int
    low: float | None
    high: float | None


class Hard(_Part):
    """One of the most difficult test samples.

    Attributes:
        id: of the sample; label: its class, as an index.
        score: its difficulty; null where infinite.
        predictions: the class that each model gives it clean, by model.
    """

    id: str
    label: int
    score: float | None
    predictions: dict[str, int]


class Difficulty(_Part):
    """How hard the test samples are; every sample's score is in difficulty.csv.

    Attributes:
        score: el2n, margin, forgetting or vog.
        models: the models that were asked, by name, with the epochs after which; no epochs: as they were published.
        slices: the samples cut by score into parts of equal size, easiest first.
        hardest: the most difficult samples, hardest first.
    """

    score: str
    models: dict[str, list[int]]
    slices: list[Slice]
    hardest: list[Hard]


class Quantity(_Part):
    """A number with what is known of its uncertainty.

    Attributes:
        value, ci_low, ci_high: null where undefined.
        ci_method: how the ends were made; at 95 % where they are those of an interval.
        n: what the ends rest on: samples, or random probes.
        reason: why something is null.
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None
    ci_method: str
    n: int
    reason: str = ""


class Landscape(_Part):
    """The loss landscape round two networks and between them, on training samples.

    Attributes:
        models: the two, in the direction of the line.
        loss: `clean`, or the attack that every sample is under at the weights in question.
        n: training samples.
        train_loss, top_eigenvalue, trace: of each network as it is: mean cross-entropy, the largest eigenvalue and the trace of
            its Hessian. The ends of an eigenvalue are what Lanczos has left open.
        connectivity: mean of the losses at both ends of the line minus that at `at`; negative: a barrier.
        at: where on the line, from 0 to 1, the loss is farthest from the mean of its ends.
        cka: linear centred kernel alignment of the logits, in [0, 1].
        phase: I, II, III, IV-A or IV-B; null where it is none of them, or no cut-offs were given.
        phase_reason: why the phase is null.
        cuts: the suite's cut-offs.
        curve: `t`, `loss`, `low` and `high` of the points of the line, of equal length.
        forwards, backwards: passes of all of it, in samples; what two cards share is counted in both.
    """

    models: list[str]
    loss: str
    n: int
    train_loss: list[Quantity]
    top_eigenvalue: list[Quantity]
    trace: list[Quantity]
    connectivity: Quantity
    at: float
    cka: Quantity
    phase: str | None
    phase_reason: str
    cuts: dict[str, float] | None
    curve: dict[str, list[float]]
    forwards: int
    backwards: int


class RunResults(_Part):
    """results.json.

    Attributes:
        comparisons: all pairs of models on the axes of the headline, each pair once.
        replicates: the spread over training seeds of models that a suite trains several times: `model` is their common name, n
            the number of seeds. They say what another training would give on these samples, `results` what other samples would
            give for these weights.
        difficulty: how hard the test samples are, where the suite asks for it.
        landscapes: what lies round and between networks, where the suite asks for it: one for each pair and loss.
    """

    schema_version: Literal[1] = 1
    generator: dict[str, str]
    suite: dict[str, Any]
    data: dict[str, Any]
    models: list[dict[str, Any]]
    conditions: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    preflight: list[Finding]
    results: list[Row]
    curves: list[Curve]
    cost: list[Cost]
    failures: list[Failed]
    notes: list[str] = []
    doubts: list[Finding] = []
    comparisons: list[Compared] = []
    replicates: list[Row] = []
    difficulty: Difficulty | None = None
    landscapes: list[Landscape] = []

    _indices: dict[tuple[str, ...], dict[tuple[Any, ...], list[Row]]] = PrivateAttr(default_factory=dict)
    _indexed: tuple[int, int] = PrivateAttr(default=(0, -1))

    def __eq__(self, other: object) -> bool:
        """Whether both say the same; what was looked up in them before is no part of it."""
        return isinstance(other, RunResults) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> str:
        """Stable JSON text."""
        return json.dumps(self.model_dump(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, file: Path) -> RunResults:
        """Read results.json.

        Raises:
            ConfigError: it is damaged, or of a schema that this version cannot read.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "top level"
            raise ConfigError(f"{file} does not keep the schema of results.json: at {where}: {first['msg']}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: damaged: {error}") from None

    @property
    def suspicions(self) -> list[Finding]:
        """The checks that did not pass, before the run and after it, failures first."""
        found = [f for f in (*self.preflight, *self.doubts) if f.status != "pass"]
        return sorted(found, key=lambda f: f.status != "fail")

    @property
    def verdict(self) -> Status:
        """The worst status of all checks of all models."""
        return verdict((*self.preflight, *self.doubts))

    def find(self, **wanted: Any) -> list[Row]:
        """Rows with these field values, in their order. Indexed on first use: reports ask thousands of times."""
        now = (id(self.results), len(self.results))
        if self._indexed != now:
            self._indices, self._indexed = {}, now  # not cleared: a copy of these results may share it
        fields = tuple(sorted(wanted))
        if fields not in self._indices:
            index: dict[tuple[Any, ...], list[Row]] = {}
            for row in self.results:
                index.setdefault(tuple(getattr(row, k) for k in fields), []).append(row)
            self._indices[fields] = index
        return list(self._indices[fields].get(tuple(wanted[k] for k in fields), []))

    def compared(self, metric: str, condition: str) -> list[Compared]:
        """Comparisons of models by one metric under one condition."""
        return [c for c in self.comparisons if (c.metric, c.condition) == (metric, condition)]


def finite(value: float) -> float | None:
    """NaN and infinities as null: JSON has no other way to say undefined."""
    return float(value) if math.isfinite(value) else None
