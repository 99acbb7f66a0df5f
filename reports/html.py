"""report.html: one self-contained file. Jinja2 with autoescape, inline SVG, no network, readable without JavaScript."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from reports import (
    detection,
    difficulty,
    ensembles,
    filters,
    landscape,
    pairs,
    robustness,
    tables,
    three_axes,
    truth,
    uncertainty,
)
from reports.longtail import longtail
from reports.names import clean, shorten
from reports.spotlight import MOST, spotlight
from reports.summary import summary
from reports.training import training
from reports.view import View, view
from robustbench_ext import axes
from robustbench_ext.results import RunResults

TEMPLATES = Path(__file__).parent / "templates"
GALLERY_SAMPLES = 8
_REGRESSION = (
    pairs.comparisons,
    pairs.seeds,
    uncertainty.errors,
    uncertainty.intervals,
    uncertainty.regression_uncertainty,
    truth.truth,
)
_CLASSIFICATION = (
    pairs.comparisons,
    pairs.seeds,
    robustness.tradeoffs,
    robustness.robustness,
    robustness.distances,
    robustness.classes,
    longtail,
    robustness.corruptions,
    robustness.domains,
    uncertainty.calibration,
    uncertainty.sets,
    uncertainty.uncertainty,
    uncertainty.abstaining,
    truth.truth,
    detection.energy,
    detection.detection,
)


def render_html(results: RunResults, run: dict[str, Any] | None, gallery: list[dict[str, Any]]) -> str:
    """The whole report.

    Args:
        run: the content of run.json (how the run was made), or None.
        gallery: the content of gallery.json.
    """
    of_task = _REGRESSION if axes.is_regression(results) else _CLASSIFICATION
    pictured = partial(difficulty.difficulty, gallery=gallery)
    parts = (*of_task, pictured, training, landscape.landscape, filters.filters, ensembles.ensembles)
    headline = tables.headline(results)
    suite = yaml.safe_dump(run["suite"], sort_keys=False, allow_unicode=True) if run else ""
    page = (
        _environment(results)
        .get_template("report.html.j2")
        .render(
            results=results,
            regression=axes.is_regression(results),
            run=run,
            verdict=results.verdict,
            findings=results.suspicions,
            suspected=_suspected(results),
            checks=len(results.preflight) + len(results.doubts),
            opening=three_axes.opening(results),
            headline=headline,
            starred=any(cell.best for _, cells in headline.rows for cell in cells),
            summary=summary(results),
            statuses={f.model: f.status for f in reversed(results.suspicions)},
            places={name: i for i, name in enumerate(axes.model_names(results))},
            sections=[section for part in parts if (section := part(results))],
            gallery=_gallery(results, gallery),
            cost=tables.cost(results, run),
            suite_yaml=Markup(escape(suite)),  # its line breaks stay
            metrics=[results.metrics[m] for m in dict.fromkeys(row.metric for row in results.results)],
            css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            js=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        )
    )
    return page + "\n"


def _environment(results: RunResults) -> Environment:
    """Everything that is printed is escaped, and harmless: names and messages come from users."""

    def shown(table: tables.Table) -> View:
        return view(table, results)

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
    )
    environment.filters |= {"view": shown, "short": shorten, "heading": _heading, "number": _number}
    return environment


def _heading(title: str) -> Markup:
    """A heading whose arrow stays on one line with its last word."""
    text = str(escape(clean(title)))
    return Markup(text.replace(" ↑", "&nbsp;↑").replace(" ↓", "&nbsp;↓"))


def _number(value: float) -> str:
    """What a cell is sorted by; more digits sort nothing else."""
    return f"{value:.6g}"


def _suspected(results: RunResults) -> dict[str, dict[str, list[str]]]:
    """Models by the status and the name of the checks that they did not pass, failures first."""
    found: dict[str, dict[str, list[str]]] = {}
    for finding in results.suspicions:
        found.setdefault(finding.status, {}).setdefault(finding.name, []).append(shorten(finding.model))
    return found


def _class_name(classes: list[str], index: int) -> str:
    """A class's name; a model may have more outputs than the data has classes."""
    return classes[index] if index < len(classes) else f"#{index}"


def _gallery(results: RunResults, gallery: list[dict[str, Any]]) -> dict[str, Any]:
    """For each model that is shown by itself the samples under the attack that calibration is shown under."""
    attacks = uncertainty.shown_attacks(results)
    classes = [str(c) for c in results.data["classes"]]
    groups = []
    for model in spotlight(results):
        for condition in attacks:
            items = [g for g in gallery if g["model"] == model and g["condition"] == condition][:GALLERY_SAMPLES]
            # Only images that this project encoded itself are put into the page.
            items = [g for g in items if all(str(i).startswith("data:image/png;base64,") for i in g["images"])]
            named = [{**g, **{k: _class_name(classes, g[k]) for k in ("label", "before", "after")}} for g in items]
            if named:
                groups.append({"model": model, "condition": condition, "items": named})
    part = f"Of {MOST} of {len(results.models)} models; all are in gallery.json." if len(results.models) > MOST else ""
    return {"groups": groups, "part": part}
