"""What every measurement of a run shares: the joined records it reads, the rows and curves it writes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from robustbench_ext.difficulty import Scored
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.fingerprint import Rows
from robustbench_ext.metrics import Estimate
from robustbench_ext.metrics.classification import predicted
from robustbench_ext.results import Cost, Curve, Difficulty, Finding, Row, finite
from robustbench_ext.validation import SPLIT as VALIDATION
from robustbench_ext.validation import held_out

Columns = Mapping[str, np.ndarray]


@dataclass
class Measured:
    """What the records of a run say; `scored` holds the difficulty of every test sample."""

    rows: list[Row]
    curves: list[Curve]
    cost: list[Cost]
    gallery: list[dict[str, Any]]
    worst_cases: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    doubts: list[Finding] = field(default_factory=list)
    difficulty: Difficulty | None = None
    scored: Scored | None = None

    @classmethod
    def nothing(cls) -> Measured:
        """Before anything was measured."""
        return cls([], [], [], [], [])


PREVIEW, ID = "preview", "id"
_IN_RECORDS = 1 << 24  # bytes from which a column is not kept in memory
_KEPT = 1 << 26  # bytes of tables that are kept for whoever asks next


class Load(Protocol):
    """Reads a record: all of its columns, or those of these names alone."""

    def __call__(self, key: Any, names: Iterable[str] | None = None, /) -> Mapping[str, np.ndarray]: ...


class Table(Mapping[str, np.ndarray]):
    """Records one after the other, as one table of a row per sample. Features are left out.

    Numbers of each sample are in memory, and so is all of a small table. The large columns of many samples, such as logits,
    stay in the records: `rows` reads them block by block; `table[name]` joins them, which takes as much memory as they are
    large. Ids are always read when they are asked for.

    Args:
        keys: of the records, in order; load: reads one.
        ids: gives the ids, where somebody has them already.
    """

    def __init__(
        self,
        keys: Sequence[Any],
        load: Load,
        ids: Callable[[], np.ndarray] | None = None,
    ) -> None:
        self._keys, self._load, self._ids = keys, load, ids
        part = load(keys[0])
        self._like = {name: part[name][:0] for name in part if not name.startswith("features/")}
        self._inside = {PREVIEW: part[PREVIEW]} if PREVIEW in part else {}
        found: dict[str, list[np.ndarray]] = {
            name: [part[name]]
            for name in self._like
            if name not in (PREVIEW, ID) and (part[name].ndim == 1 or len(keys) * part[name].nbytes < _IN_RECORDS)
        }
        sizes = [_length(part)]
        # Something of each sample has to be read to count them: where no column is kept, the narrowest one.
        narrow = min((n for n in part if n != PREVIEW), key=lambda n: part[n].nbytes)
        for key in keys[1:]:
            part = load(key, list(found) or [narrow])
            sizes.append(_length(part))
            for name, parts in found.items():
                parts.append(part[name])
        self._ends = np.cumsum(sizes)
        for name in list(found):
            self._inside[name] = np.concatenate(found.pop(name))

    def __len__(self) -> int:
        return len(self._like)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._inside:
            return self._inside[name]
        if name not in self._like:
            raise KeyError(name)
        if name == ID:
            return (
                self._ids()
                if self._ids is not None
                else np.concatenate([self._load(key, [ID])[ID] for key in self._keys])
            )
        return _InRecords(self, name)[:]

    def rows(self, name: str) -> Rows:
        """A column to be read block by block: in memory or not, `rows(name)[a:b]` are its rows a to b."""
        return self._inside[name] if name in self._inside else _InRecords(self, name)

    @property
    def nbytes(self) -> int:
        """What the table takes in memory."""
        return sum(column.nbytes for column in self._inside.values())

    @cached_property
    def right(self) -> np.ndarray:
        """See `correct`."""
        return _correct(self)


def _length(part: Mapping[str, np.ndarray]) -> int:
    return len(next(column for name, column in part.items() if name != PREVIEW))


class _InRecords:
    """A column of a table that stays in the records; slices of it are read."""

    def __init__(self, table: Table, name: str) -> None:
        like = table._like[name]
        self._table, self._name = table, name
        self.shape: tuple[int, ...] = (int(table._ends[-1]), *like.shape[1:])
        self.dtype = like.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, _ = index.indices(len(self))
        found = np.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        ends = self._table._ends
        for number in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
            begin = int(ends[number - 1]) if number else 0
            if begin >= stop:
                break
            part = self._table._load(self._table._keys[number], [self._name])[self._name]
            found[max(begin - start, 0) : int(ends[number]) - start] = part[max(start - begin, 0) : stop - begin]
        return found


def rows(columns: Mapping[str, np.ndarray], name: str) -> Rows:
    """A column to be read block by block, whoever holds it."""
    return columns.rows(name) if isinstance(columns, Table) else columns[name]


def correct(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Correct samples (N,) bool: by the attack's own verdict where there was one, otherwise by the logits.

    An attack's verdict and the logits of the pass that reads probes can differ by rounding for a sample on the
    boundary; the verdict counts.
    """
    return columns.right if isinstance(columns, Table) else _correct(columns)


def _correct(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    if "broken" in columns:
        return np.asarray(~columns["broken"])
    return predicted(rows(columns, "logits"), columns["label"])


class Recent:
    """Tables that were asked for last, as many as take `_KEPT` bytes in memory; the last one in any case."""

    def __init__(self, make: Callable[..., Table]) -> None:
        self._make, self._kept = make, dict[tuple[Any, ...], Table]()

    def __call__(self, *key: Any) -> Table:
        table = self._kept.pop(key) if key in self._kept else self._make(*key)
        self._kept[key] = table  # at the end: the first one was asked for longest ago
        sizes = [kept.nbytes for kept in self._kept.values()]
        while len(self._kept) > 1 and sum(sizes) > _KEPT:
            self._kept.pop(next(iter(self._kept)))
            sizes.pop(0)
        return table

    def cache_clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()


class Tables:
    """The joined records of a run: one table per (model, condition), and one per (model, condition, probe)."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.observations = Recent(self._observations)
        self.probe = Recent(self._probe)
        self.calibration = lru_cache(maxsize=256)(self._calibration)

    def _cells(self, model: str, condition: str) -> list[Cell]:
        chunks = self._context.chunks(self._context.conditions[condition], "test")
        return [Cell(model, condition, "test", chunk) for chunk in range(chunks)]

    def complete(self, model: str, condition: str) -> bool:
        """Whether every record is there."""
        return all(self._context.is_done(cell) for cell in self._cells(model, condition))

    def _observations(self, model: str, condition: str) -> Table:
        keys = [self._context.observation_key(cell) for cell in self._cells(model, condition)]

        def ids() -> np.ndarray:
            return self._context.samples(self._context.conditions[condition], "test").ids

        return Table(keys, self._context.store.load, ids)

    def _probe(self, model: str, condition: str, label: str) -> Table:
        probe = self._context.probe(label)
        keys = [self._context.probe_key(cell, probe) for cell in self._cells(model, condition)]
        return Table(keys, self._context.store.load)

    def own(self, model: str, condition: str, metric: str) -> np.ndarray | None:
        """What a metric of the user's own gave for each sample; None where it could not."""
        for found in self._context.metrics:
            key = self._context.metric_key(model, condition, found) if found.name == metric else ""
            if key and self._context.store.has(key):
                return self._context.store.load(key)["value"]
        return None

    def _calibration(self, model: str, label: str) -> np.ndarray | None:
        """A detector's scores of clean calibration samples that it has not chosen parameters on; None without a split."""
        if not self._context.thresholds:
            return None
        probe = self._context.probe(label)
        cells = self._context.fit_cells(model, VALIDATION)
        if not all(self._context.is_done(cell) for cell in cells):
            return None
        keys = [self._context.probe_key(cell, probe) for cell in cells]
        scores = np.concatenate([self._context.store.load(key, ["score"])["score"] for key in keys])
        return scores if probe.validate is None else scores[held_out(len(scores))]


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


def png(image: np.ndarray) -> str:
    """(C, H, W) uint8 as a data URI."""
    from PIL import Image

    picture = Image.fromarray(image.transpose(1, 2, 0) if image.shape[0] == 3 else image[0])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def nominal_group(coverage: float) -> str:
    """The group of rows about intervals or sets of that nominal coverage: `90 %`."""
    return f"{100 * coverage:.6g} %"
