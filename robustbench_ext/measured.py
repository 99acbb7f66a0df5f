"""What every measurement of a run shares: the joined records it reads, the rows and curves it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.metrics import Estimate
from robustbench_ext.results import Cost, Curve, Finding, Row, finite
from robustbench_ext.validation import SPLIT as VALIDATION
from robustbench_ext.validation import held_out

Columns = dict[str, np.ndarray]


@dataclass
class Measured:
    """What the records of a run say."""

    rows: list[Row]
    curves: list[Curve]
    cost: list[Cost]
    gallery: list[dict[str, Any]]
    worst_cases: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    doubts: list[Finding] = field(default_factory=list)

    @classmethod
    def nothing(cls) -> Measured:
        """Before anything was measured."""
        return cls([], [], [], [], [])


class Tables:
    """The joined records of a run: one table per (model, condition), and one per (model, condition, probe)."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.observations = lru_cache(maxsize=64)(self._observations)
        self.probe = lru_cache(maxsize=256)(self._probe)
        self.calibration = lru_cache(maxsize=256)(self._calibration)

    def _cells(self, model: str, condition: str) -> list[Cell]:
        chunks = self._context.chunks(self._context.conditions[condition], "test")
        return [Cell(model, condition, "test", chunk) for chunk in range(chunks)]

    def complete(self, model: str, condition: str) -> bool:
        """Whether every record is there."""
        return all(self._context.is_done(cell) for cell in self._cells(model, condition))

    def _observations(self, model: str, condition: str) -> Columns:
        keys = [self._context.observation_key(cell) for cell in self._cells(model, condition)]
        return join([self._context.store.load(key) for key in keys])

    def _probe(self, model: str, condition: str, label: str) -> Columns:
        probe = self._context.probe(label)
        keys = [self._context.probe_key(cell, probe) for cell in self._cells(model, condition)]
        return join([self._context.store.load(key) for key in keys])

    def _calibration(self, model: str, label: str) -> np.ndarray | None:
        """A detector's scores of clean calibration samples that it has not chosen parameters on; None without a split."""
        if not self._context.thresholds:
            return None
        probe = self._context.probe(label)
        cells = self._context.fit_cells(model, VALIDATION)
        if not all(self._context.is_done(cell) for cell in cells):
            return None
        scores = np.concatenate([self._context.store.load(self._context.probe_key(c, probe))["score"] for c in cells])
        return scores if probe.validate is None else scores[held_out(len(scores))]


def join(parts: list[Columns]) -> Columns:
    """Chunks in order; features and previews are not needed for metrics of more than one chunk."""
    names = [n for n in parts[0] if not n.startswith("features/")]
    return {n: parts[0][n] if n == "preview" else np.concatenate([p[n] for p in parts]) for n in names}


def row(model: str, condition: str, probe: str, metric: str, estimate: Estimate, **extra: Any) -> Row:
    """An estimate as a row of the results; NaN and infinities become null."""
    return Row(
        model=model,
        condition=condition,
        probe=probe,
        metric=metric,
        value=finite(estimate.value),
        ci_low=finite(estimate.ci_low),
        ci_high=finite(estimate.ci_high),
        ci_level=estimate.level,
        ci_method=estimate.ci_method,
        n=estimate.n,
        reason=estimate.reason,
        **extra,
    )


@dataclass
class Place:
    """Where rows and curves belong: one model under one condition, one probe."""

    out: Measured
    model: str
    condition: str
    probe: str

    def row(self, metric: str, estimate: Estimate, **extra: Any) -> None:
        """Add a row."""
        self.out.rows.append(row(self.model, self.condition, self.probe, metric, estimate, **extra))

    def curve(self, kind: Any, data: dict[str, list[float]]) -> None:
        """Add a curve."""
        self.out.curves.append(
            Curve(kind=kind, model=self.model, condition=self.condition, probe=self.probe, data=data)
        )


def rounded(values: np.ndarray) -> list[float]:
    """Six digits: what figures need."""
    return [float(f"{v:.6g}") for v in values]


def nominal_group(coverage: float) -> str:
    """The group of rows about intervals or sets of that nominal coverage: `90 %`."""
    return f"{100 * coverage:.6g} %"
