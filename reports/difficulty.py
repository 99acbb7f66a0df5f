"""The section of a report on results by difficulty: slices of the test samples that other networks find equally hard."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.ticker import MaxNLocator, PercentFormatter

from reports.figures import MARKERS, new_axes
from reports.names import clip, shorten
from reports.section import Section, figure
from reports.spotlight import MOST
from reports.svg import MUTED, PALETTE
from reports.tables import NOT_MEASURED, Cell, Column, Table, heading, number
from robustbench_ext import axes
from robustbench_ext.axes import CLASSIFIER, CLEAN
from robustbench_ext.results import Difficulty, Row, RunResults

ACCURACY, ROBUST, CHANGE = "accuracy_by_difficulty", "robust_accuracy_by_difficulty", "change_by_difficulty"
CALIBRATION = ("rmsce_by_difficulty", "brier_by_difficulty")
NAMES = {
    "el2n": "EL2N (the length of the probabilities' error)",
    "margin": "margins (of the most probable wrong class over the right one)",
    "forgetting": "forgetting (how often a sample went from right to wrong during training)",
    "vog": "VoG (how much the gradient of the right class's logit moved during training, normalised by class)",
}
IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")
PER_LINE = 6  # images of the hardest samples beside each other
DASHES = (0, (4, 2))


def difficulty(results: RunResults, gallery: Sequence[dict[str, Any]] = ()) -> Section:
    """Where do models fail: on what is hard for everybody?

    Args:
        gallery: the content of gallery.json, which has images of the hardest samples.
    """
    found, section = results.difficulty, Section("difficulty", "Results by difficulty")
    if found is None or not results.find(metric=ACCURACY):
        return section
    section.text = _about(found, results)
    threats = [str(c["label"]) for c in axes.main_threats(results) if results.find(metric=ROBUST, condition=c["label"])]
    for i, threat in enumerate(threats or [None]):
        names = f"Accuracy of every model by difficulty, clean{f' and under {threat}' if threat else ''}; in the tables below."
        section.figures.append(
            figure(
                f"difficulty-{i}",
                names,
                lambda ax, threat=threat: by_difficulty(results, threat, ax),
                (5.6, 3.6),
            )
        )
    if picture := _pictures(found, results, gallery):
        section.drawn.append((f"The {len(picture)} hardest samples", [_mosaic(picture)]))
    section.tables = [table for table in accuracies(results) if table.rows]
    section.more = [
        t for t in (changes(results), ranks(results), *calibrations(results), *detection(results)) if t.rows
    ]
    section.more += [t for t in [hardest(results)] if t.rows]
    return section


def _about(found: Difficulty, results: RunResults) -> str:
    after = {", ".join(map(str, epochs)) for epochs in found.models.values()}
    when = " and ".join(sorted(f"after epoch {text}" if text else "as published" for text in after))
    asked = ", ".join(found.models) if len(found.models) <= MOST else f"{len(found.models)} models"
    seeds = _seeds(results)
    bands = "Bands are 95 % intervals over test samples"
    bands += (
        f"; of {', '.join(seeds)}, means over training seeds with 95 % intervals for another training" if seeds else ""
    )
    bands += f". Drawn are the first {MOST} models." if len(_entries(results)) > MOST else "."
    return (
        f"The test samples are cut into {len(found.slices)} slices of equal size by {NAMES.get(found.score, found.score)}, as "
        f"measured on {asked} {when}; the first slice is the easiest. {bands} Scores look at labels, so every model that "
        f"resembles these networks is worst where they are, and a calibrated one is under-confident on easy and over-confident "
        f"on hard slices: compare models within a slice. Hard samples may be mislabelled."
    )


def _seeds(results: RunResults) -> list[str]:
    """Entries that were trained several times, by the name that their means have."""
    return list(dict.fromkeys(row.model for row in results.replicates))


def _entries(results: RunResults) -> list[str]:
    """What has a line or a column: entries that were trained several times as one, other models by themselves."""
    seeds = set(_seeds(results))
    several = {str(m["name"]): str(m["replicate_of"]) for m in results.models if m.get("replicate_of") in seeds}
    return list(dict.fromkeys(several.get(name, name) for name in axes.model_names(results)))


def _named(results: RunResults, entry: str) -> str:
    """An entry's name in a table, with the number of trainings that its values are means over."""
    seeds = sum(m.get("replicate_of") == entry for m in results.models) if entry in _seeds(results) else 0
    return f"{entry}, {seeds} seeds" if seeds else entry


def _row(results: RunResults, entry: str, **wanted: Any) -> Row | None:
    there = results.find(model=entry, **wanted)
    if not there:
        there = [
            r for r in results.replicates if r.model == entry and all(getattr(r, k) == v for k, v in wanted.items())
        ]
    return there[0] if there else None


def by_difficulty(results: RunResults, threat: str | None, ax: Axes | None = None) -> Axes:
    """Accuracy of every model by slice: clean dashed, under a threat (a condition's label) solid, with 95 % bands."""
    ax = ax or new_axes()
    found = results.difficulty
    cut = [part.group for part in found.slices] if found else []
    x = np.arange(1, len(cut) + 1)
    for i, entry in enumerate(_entries(results)[:MOST]):
        clean, colour = _values(results, entry, ACCURACY, CLEAN, cut), PALETTE[i]
        under = _values(results, entry, ROBUST, threat, cut) if threat else clean
        if threat:
            ax.plot(x, clean[:, 0], linestyle=DASHES, linewidth=1.2, color=colour)
        ax.plot(x, under[:, 0], marker=MARKERS[i % len(MARKERS)], markersize=4, label=shorten(entry, 26), color=colour)
        ax.fill_between(x, under[:, 1], under[:, 2], alpha=0.16, linewidth=0, color=colour)
    if threat:
        ax.plot([], [], color=MUTED, linestyle=DASHES, linewidth=1.2, label="clean")
    ax.set_xlabel("difficulty for other networks (1: easiest)")
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(clip(f"Accuracy by difficulty: {f'{threat}, and clean' if threat else 'clean'}", 54))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, borderaxespad=4.4, handlelength=1.6)
    return ax


def _values(results: RunResults, entry: str, metric: str, condition: str, cut: Sequence[str]) -> np.ndarray:
    """Value and both ends of the interval, within [0, 1], of every slice: (slices, 3), NaN where there is none."""
    query = {"condition": condition, "probe": CLASSIFIER, "metric": metric}
    rows = [_row(results, entry, **query, group=group) for group in cut]
    found = [(None, None, None) if r is None else (r.value, r.ci_low, r.ci_high) for r in rows]
    return np.clip(np.array(found, dtype=np.float64).reshape(len(cut), 3), 0, 1)


# Tables --------------------------------------------------------------------------------------------------------------


def accuracies(results: RunResults) -> list[Table]:
    """Accuracy by slice, clean and at the main threats: a row per slice, a column per entry."""
    found = [_by_slice(results, "Accuracy by difficulty, clean, %", ACCURACY, CLEAN)]
    for threat in axes.main_threats(results):
        label = str(threat["label"])
        found.append(_by_slice(results, f"Robust accuracy by difficulty, {label}, %", ROBUST, label))
    return [table for table in found if table.rows]


def _by_slice(results: RunResults, caption: str, metric: str, condition: str, probe: str = CLASSIFIER) -> Table:
    definition, entries, found = results.metrics[metric]["definition"], _entries(results), results.difficulty
    score = Column(found.score if found else "score", "The smallest and the largest score of the slice.")
    table = Table(caption, "slice", [score, *(Column(_named(results, entry), definition) for entry in entries)])
    query = {"condition": condition, "probe": probe, "metric": metric}
    for part in found.slices if found else []:
        rows = [_row(results, entry, **query, group=part.group) for entry in entries]
        if any(rows):
            span = Cell(f"{_score(part.low)} to {_score(part.high)}", part.low, f"n = {part.n}")
            table.rows.append((part.group, [span, *(number(row, results) for row in rows)]))
    return table


def _score(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"


def changes(results: RunResults) -> Table:
    """Robust minus clean accuracy by slice, at the first main threat."""
    threats = [str(c["label"]) for c in axes.main_threats(results)]
    if not threats:
        return Table("", "slice", [])
    caption = f"{threats[0]} minus clean accuracy, points"
    return _by_slice(results, caption, CHANGE, threats[0])


def ranks(results: RunResults) -> Table:
    """How difficult for other networks the mistakes of every model are: a row per model, a column per condition."""
    metric = "difficulty_of_mistakes"
    conditions = list(dict.fromkeys(row.condition for row in results.find(metric=metric)))
    shown = [CLEAN, *(str(c["label"]) for c in axes.main_threats(results))]
    shown += [c for c in conditions if c not in shown][: MOST - len(shown)]
    columns = [Column(c, results.metrics[metric]["definition"]) for c in shown if c in conditions]
    table = Table("How hard for other networks the mistakes of a model are (AUROC, %)", "model", columns)
    for entry in _entries(results) if columns else []:
        rows = [_row(results, entry, condition=c.title, probe=CLASSIFIER, metric=metric, group=None) for c in columns]
        table.rows.append((_named(results, entry), [number(row, results) for row in rows]))
    return table


def calibrations(results: RunResults) -> list[Table]:
    """Calibration by slice, clean."""
    return [
        _by_slice(results, f"{heading(metric, results).title}, clean", metric, CLEAN)
        for metric in CALIBRATION
        if results.find(metric=metric, condition=CLEAN)
    ]


def detection(results: RunResults) -> list[Table]:
    """AUROC by slice of the first detector, for every condition that has any."""
    rows = results.find(metric="auroc_by_difficulty")
    places = dict.fromkeys((row.probe, row.condition) for row in rows)
    first = next((probe for probe, _ in places), "")
    return [
        _by_slice(results, f"AUROC by difficulty, {probe}: {condition}, %", "auroc_by_difficulty", condition, probe)
        for probe, condition in list(places)
        if probe == first
    ]


def hardest(results: RunResults) -> Table:
    """The most difficult samples, for people to look at: what they are called, and what every model takes them for."""
    found, entries = results.difficulty, axes.model_names(results)[: 2 * MOST]
    label, score = Column("label", "The class that the data gives it."), Column("score", "Higher is harder.")
    table = Table("The hardest samples, and what every model takes them for, clean", "sample", [label, score])
    table.columns.extend(Column(name, "The predicted class.") for name in entries)
    classes = [str(c) for c in results.data["classes"]]
    for hard in found.hardest if found else []:
        cells = [Cell(_class(classes, hard.label)), Cell(_score(hard.score), hard.score)]
        for name in entries:
            guess = hard.predictions.get(name)
            cells.append(Cell("–", None, NOT_MEASURED) if guess is None else Cell(_class(classes, guess)))
        table.rows.append((hard.id, cells))
    return table


def _class(classes: Sequence[str], k: int) -> str:
    return classes[k] if k < len(classes) else f"#{k}"


# Images --------------------------------------------------------------------------------------------------------------


def _pictures(
    found: Difficulty, results: RunResults, gallery: Sequence[dict[str, Any]]
) -> list[tuple[str, np.ndarray]]:
    """The hardest samples' images (H, W) or (H, W, 3) with captions, hardest first."""
    classes = [str(c) for c in results.data["classes"]]
    images = {g["id"]: g["images"][0] for g in gallery if g.get("condition") == "difficulty" and g.get("images")}
    pictures = []
    for place, hard in enumerate(found.hardest, start=1):
        text = str(images.get(hard.id, ""))
        if IMAGE.fullmatch(text):  # only images that this project encoded itself
            pixels = imread(io.BytesIO(base64.b64decode(text.partition(",")[2])), format="png")
            pictures.append((f"{place}: {clip(_class(classes, hard.label), 12)}", pixels))
    return pictures


def _mosaic(pictures: Sequence[tuple[str, np.ndarray]]) -> Any:
    lines = -(-len(pictures) // PER_LINE)

    def paint(ax: Axes) -> None:
        for i, (caption, pixels) in enumerate(pictures):
            x, y = i % PER_LINE, lines - 1 - i // PER_LINE
            place = (x, x + 0.9, y, y + 0.76)
            # Colours and their limits say something of grey images alone.
            ax.imshow(pixels, "gray", vmin=0, vmax=1, extent=place, interpolation="nearest", aspect="auto")
            ax.text(x + 0.45, y + 0.8, caption, ha="center", va="bottom", fontsize=8)
        ax.set_xlim(0, PER_LINE)
        ax.set_ylim(0, lines)
        ax.set_axis_off()

    alt = "The hardest samples, hardest first: " + ", ".join(caption for caption, _ in pictures)
    return figure("hardest", alt, paint, (5.6, 0.2 + 1.1 * lines))
