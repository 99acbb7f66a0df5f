"""What a baseline keeps of a metric, sample by sample: enough to compare another model with it, small, readable in a review.

A share keeps one bit per sample; a mean five digits of each term; an AUROC the ranks of all scores, which are all that it
depends on. What is resampled (ECE, the worst class, RMSE, R²) keeps what it is made of, and is made again by
`per_sample.statistic`. Both sides of a comparison go through this form, so that rounding is the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustbench_ext.axes import CLASSIFIER, CLEAN, REGRESSOR
from robustbench_ext.errors import DataError
from robustbench_ext.index import Recorded
from robustbench_ext.measure import correct
from robustbench_ext.metrics.calibration import confidence_and_correctness
from robustbench_ext.per_sample import Area, Mean, Resampled, Share, Statistic, statistic
from robustbench_ext.results import RunResults

Kept = dict[str, np.ndarray]
DIGITS = 5
_BITS, _NUMBERS = 256, 10  # in a line of the file


@dataclass(frozen=True)
class Quantity:
    """A row of the results of one model: what is kept, and where it was measured."""

    records: Recorded
    results: RunResults
    model: str
    condition: str
    probe: str
    metric: str
    group: str | None = None

    def facts(self) -> Mapping[str, Any]:
        """What the results say of the condition."""
        return next(c for c in self.results.conditions if c["label"] == self.condition)

    def members(self) -> list[str]:
        """The conditions behind it: itself, or those that it is taken over; of a worst case also the clean inputs."""
        facts = self.facts()
        over = [str(label) for label in facts.get("over", [self.condition])]
        return [CLEAN, *over] if facts["kind"] == "worst-case" else over

    def statistic(self, records: Recorded | None = None) -> Statistic | None:
        """Its sample-by-sample form; None where it has none."""
        place = (self.model, self.condition, self.probe, self.metric, self._group())
        return statistic(records or self.records, self.results, *place)

    def _group(self) -> str | None:
        named = self.metric in ("worst_class_accuracy", "worst_domain_accuracy", "mean_accuracy", "set_coverage")
        return None if named else self.group

    def keep(self) -> Kept | None:
        """What a baseline keeps of it; None where the metric has no sample-by-sample form."""
        found = self.statistic()
        if found is None:
            return None
        if isinstance(found, Share):
            return {"right": np.asarray(found.right, dtype=bool)}
        if isinstance(found, Mean):
            return {"values": _rounded(found.values)}
        if isinstance(found, Area):
            _, ranks = np.unique(np.concatenate([found.clean, found.unknown]), return_inverse=True)
            shown = self.records.observations(self.model, self.condition)["id"]
            chosen = np.isin(shown, found.unknown_ids)
            return {"clean": ranks[: len(found.clean)], "unknown": ranks[len(found.clean) :], "chosen": chosen}
        return self._parts()

    def _parts(self) -> Kept | None:
        """What a resampled statistic is made of."""
        if self.metric == "ece":
            seen = self.records.observations(self.model, self.condition)
            read = seen if self.probe == CLASSIFIER else self.records.probe(self.model, self.condition, self.probe)
            confidence, right = confidence_and_correctness(read["logits"], seen["label"])
            return {"right": right.astype(bool), "confidence": _rounded(confidence)}
        if self.metric in ("rmse", "r2"):
            seen = self.records.observations(self.model, self.condition)
            point = seen["prediction"] if self.probe == REGRESSOR else self._read()["point"]
            return {"errors": _rounded(seen["label"] - point)}
        rights = [correct(self.records.observations(self.model, label)) for label in self.members()]
        if self.metric == "worst_domain_accuracy":
            return {"right": np.concatenate(rights)}
        if self.metric == "worst_class_accuracy":
            return {"right": np.logical_and.reduce(rights)}
        return None

    def _read(self) -> Mapping[str, np.ndarray]:
        return self.records.probe(self.model, self.condition, self.probe)

    def restore(self, kept: Kept) -> Statistic:
        """The statistic of what was kept; ids and labels are those of these records, which must be of the same samples."""
        now = self.statistic()
        if now is None:
            raise DataError(f"{self.metric} has no sample-by-sample form")
        if isinstance(now, Share):
            return Share(now.ids, kept["right"])
        if isinstance(now, Mean):
            return Mean(now.ids, kept["values"])
        if isinstance(now, Area):
            shown = self.records.observations(self.model, self.condition)["id"]
            clean, unknown = kept["clean"].astype(np.float64), kept["unknown"].astype(np.float64)
            return Area(now.ids, clean, shown[kept["chosen"]], unknown)
        made = self.statistic(_Rebuilt(self, kept))
        assert isinstance(made, Resampled)  # noqa: S101 - the same metric of the same place
        return made

    def lengths(self, names: Mapping[str, Any]) -> dict[str, int]:
        """How many samples the bits of each kept column are of."""
        now = self.statistic()
        n = 0 if now is None else len(now.ids)
        shown = len(self.records.observations(self.model, self.members()[-1])["id"])
        return {name: shown if name == "chosen" else n for name in names}


class _Rebuilt:
    """Records that say what was kept, for statistics that are made from records."""

    def __init__(self, quantity: Quantity, kept: Kept) -> None:
        self._of, self._kept = quantity, kept

    def observations(self, model: str, condition: str) -> dict[str, np.ndarray]:
        seen = self._of.records.observations(model, condition)
        columns = {"id": seen["id"], "label": seen["label"]}
        if self._of.metric == "ece":
            return columns | {"logits": self._logits(seen)}
        if "errors" in self._kept:
            return columns | {"prediction": seen["label"] - self._kept["errors"]}
        return columns | {"broken": ~self._right(condition)}

    def probe(self, model: str, condition: str, label: str) -> dict[str, np.ndarray]:
        seen = self._of.records.observations(model, condition)
        if "errors" in self._kept:
            return {"point": seen["label"] - self._kept["errors"]}
        return {"logits": self._logits(seen)}

    def own(self, model: str, condition: str, metric: str) -> np.ndarray | None:
        return self._of.records.own(model, condition, metric)

    def _right(self, condition: str) -> np.ndarray:
        right = self._kept["right"]
        if self._of.metric != "worst_domain_accuracy":
            return right
        members = self._of.members()
        sizes = [len(self._of.records.observations(self._of.model, label)["id"]) for label in members]
        return np.split(right, np.cumsum(sizes)[:-1])[members.index(condition)]

    def _logits(self, seen: Mapping[str, np.ndarray]) -> np.ndarray:
        """Logits with the kept confidence in the label, or in another class: all that ECE looks at."""
        classes, y = len(self._of.results.data["classes"]), seen["label"]
        top = np.where(self._kept["right"], y, (y + 1) % classes)
        confidence = np.maximum(self._kept["confidence"], (1 + 1e-9) / classes)
        rest = np.maximum(1 - confidence, 1e-300) / max(1, classes - 1)
        logits = np.repeat(np.log(rest)[:, None], classes, axis=1)
        logits[np.arange(len(y)), top] = np.log(confidence)
        return np.asarray(logits)


# Text ----------------------------------------------------------------------------------------------------------------


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.array([float(f"{v:.{DIGITS}g}") for v in values.tolist()])


def encode(kept: Kept) -> dict[str, list[str]]:
    """Columns as lines of text: 256 samples as hexadecimal digits (the first sample is the highest bit), or ten numbers."""
    out: dict[str, list[str]] = {}
    for name, column in kept.items():
        if column.dtype == bool:
            parts = [column[i : i + _BITS] for i in range(0, len(column), _BITS)]
            out[name] = [np.packbits(part).tobytes().hex() for part in parts]
        else:
            texts = [f"{v:.{DIGITS}g}" if column.dtype.kind == "f" else str(v) for v in column.tolist()]
            out[name] = [" ".join(texts[i : i + _NUMBERS]) for i in range(0, len(texts), _NUMBERS)]
    return out


_BIT_COLUMNS, _RANKS = ("right", "chosen"), ("clean", "unknown")


def decode(lines: Mapping[str, list[str]], lengths: Mapping[str, int]) -> Kept:
    """Columns from lines of text.

    Args:
        lengths: samples of each column of bits.

    Raises:
        DataError: they are not what `encode` writes, or of another number of samples.
    """
    out: Kept = {}
    try:
        for name, column in lines.items():
            if name in _BIT_COLUMNS:
                bits = np.unpackbits(np.frombuffer(bytes.fromhex("".join(column)), dtype=np.uint8))
                out[name] = bits[: lengths[name]].astype(bool)
                if not lengths[name] <= len(bits) < lengths[name] + 8 or bits[lengths[name] :].any():
                    raise ValueError(f"{name}: bits of {len(bits)} samples instead of {lengths[name]}")
            else:
                kind = np.int64 if name in _RANKS else np.float64
                out[name] = np.array([kind(text) for line in column for text in line.split()], dtype=kind)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"kept samples cannot be read: {error}") from None
    sizes = {len(v) for k, v in out.items() if k in ("right", "values", "confidence", "errors", "clean")}
    if sizes - {lengths.get(name, 0) for name in out if name not in ("chosen", "unknown")} or len(sizes) > 1:
        raise DataError("kept samples are of different numbers")
    if "chosen" in out and len(out["unknown"]) != int(out["chosen"].sum()):
        raise DataError("kept ranks and kept bits of unknown inputs do not belong together")
    return out


# Changes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed:
    """Samples that changed most for the worse, the worst first, and counts where samples are right or wrong."""

    worse: list[str]
    lost: int | None = None
    gained: int | None = None

    def describe(self, most: int = 5) -> str:
        """One or two sentences; empty where nothing got worse."""
        if not self.worse:
            return ""
        shown = ", ".join(self.worse[:most]) + (", ..." if len(self.worse) > most else "")
        if self.lost is None:
            return f"changed most for the worse: {shown}"
        return (
            f"right in the baseline and wrong now: {self.lost}, wrong then and right now: {self.gained}. Lost: {shown}"
        )


def changes(quantity: Quantity, now: Kept, before: Kept, higher_is_better: bool) -> Changed:
    """Which samples changed for the worse since the baseline."""
    stat = quantity.statistic()
    ids = np.asarray([] if stat is None else stat.ids)
    if "right" in now:
        lost, gained = before["right"] & ~now["right"], now["right"] & ~before["right"]
        if not higher_is_better and "confidence" not in now:
            lost, gained = gained, lost
        order = np.flatnonzero(lost)
        if "confidence" in now:
            order = order[np.argsort(-now["confidence"][order], kind="stable")]  # confidently wrong first
        return Changed([str(i) for i in ids[order]], int(lost.sum()), int(gained.sum()))
    if "clean" in now:
        shown = quantity.records.observations(quantity.model, quantity.condition)["id"]
        a, b = _placements(now), _placements(before)
        both = now["chosen"] & before["chosen"]
        return _largest(shown[both], b[both] - a[both])
    column = "values" if "values" in now else "errors"
    a, b = (np.abs(k[column]) if column == "errors" else k[column] for k in (now, before))
    worse = a - b if column == "errors" or not higher_is_better else b - a
    return _largest(ids, np.nan_to_num(worse))


def _placements(kept: Kept) -> np.ndarray:
    """Share of clean inputs below each chosen input, at the places of all inputs of the condition."""
    out = np.zeros(len(kept["chosen"]))
    clean = np.sort(kept["clean"])
    below = np.searchsorted(clean, kept["unknown"], "left") + np.searchsorted(clean, kept["unknown"], "right")
    out[kept["chosen"]] = below / (2 * len(clean))
    return out


def _largest(ids: np.ndarray, worse: np.ndarray) -> Changed:
    order = np.argsort(-worse, kind="stable")
    return Changed([str(ids[i]) for i in order if worse[i] > 0])
