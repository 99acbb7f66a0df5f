"""Writing a run down: results.json and results.csv (no clock in them), run.json (dates and timings), the gallery."""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from robustbench_ext import __version__, device, landscape_cards
from robustbench_ext.compare import compare_models
from robustbench_ext.difficulty import FILE as DIFFICULTY
from robustbench_ext.doubts import DOUBTS_VERSION
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.evaluate import CLEAN, Context
from robustbench_ext.files import write_atomically
from robustbench_ext.filters import filter_rows
from robustbench_ext.index import INDEX, index_of
from robustbench_ext.measure import measure, metric_table
from robustbench_ext.measured import Measured, Tables
from robustbench_ext.provenance import environment
from robustbench_ext.results import Failed, Finding, Row, RunResults
from robustbench_ext.seeds import replicates

RESULTS, TABLE, RUN, GALLERY = "results.json", "results.csv", "run.json", "gallery.json"


@dataclass
class RunLog:
    """What happened in a run.

    Attributes:
        failures: parts that could not be computed.
        broken: models that could not be trained or loaded; refused: models that the preflight does not let through.
        computed, reused, trained: cells computed, cells that were there already, models trained.
    """

    failures: list[Failed] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    computed: int = 0
    reused: int = 0
    trained: int = 0


def previous_suite(folder: Path) -> dict[str, Any] | None:
    """The suite of the run that the folder holds, if any."""
    try:
        suite: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))["suite"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return suite


def _checks(context: Context) -> str:
    """The versions of all checks, and of the user's own metrics; other results are measured again."""
    own = [f"{metric.name} {metric.version}" for metric in context.metrics]
    return ", ".join([f"{context.task.preflight_version}.{DOUBTS_VERSION}", *own])


def unchanged_results(context: Context) -> RunResults | None:
    """The folder's results, if they are of this very suite and version; then there is nothing to measure again."""
    if previous_suite(context.folder) != context.suite.model_dump(by_alias=True, mode="json"):
        return None
    try:
        results = RunResults.read(context.folder / RESULTS)
    except (OSError, RobustBenchExtError):
        return None
    same = results.generator["version"] == __version__ and results.generator.get("checks") == _checks(context)
    same &= not results.failures
    loaded = {m["name"]: m["fingerprint"] for m in results.models}
    same &= loaded == {name: context.model(name).fingerprint for name in context.evaluated}
    same &= results.data == json.loads(json.dumps(context.data.describe()))
    return results if same and all((context.folder / name).is_file() for name in (TABLE, GALLERY, INDEX)) else None


def assemble(context: Context, done: RunLog) -> tuple[RunResults, Measured]:
    suite = context.suite
    usable = [name for name in context.evaluated if name not in done.broken]
    measured = measure(context, usable)
    findings = [
        Finding(model=name, name=c.name, status=c.status, message=c.message, hint=c.hint)
        for name in usable
        if context.store.has(context.preflight_key(name))
        for c in context.preflight(name)
    ]
    conditions = [{"label": c.label, "kind": c.kind, **c.facts()} for c in context.conditions.values()]
    probes = [
        {
            "label": p.label,
            "kind": p.kind,
            "fitted_on": " and ".join(p.fit_on),
            "name": p.name,
            "parameters": dict(p.parameters),
        }
        for p in context.probes
    ]
    results = RunResults(
        generator={"name": "robustbench-ext", "version": __version__, "checks": _checks(context)},
        suite={
            "name": suite.name,
            "title": suite.title or suite.name,
            "description": suite.description,
            "n": len(context.samples(context.conditions[CLEAN], "test")),
            "seed": suite.seed,
        },
        data=context.data.describe(),
        models=[_describe(context, name) for name in usable],
        conditions=[*conditions, *measured.worst_cases],
        probes=probes,
        metrics=metric_table(suite.shots) | {metric.name: metric.described() for metric in context.metrics},
        preflight=findings,
        doubts=measured.doubts,
        results=measured.rows,
        curves=measured.curves,
        cost=measured.cost,
        failures=sorted([*done.failures, *_unfit(context, usable)], key=lambda f: f.what),
        notes=[
            *measured.notes,
            *(f"{name} was left out: its package or its data is not there" for name in context.left_out),
            *(text for name in usable for text in context.notes_of(name)),
            *(f"{name} was not evaluated: its preflight failed" for name in sorted(done.refused)),
            *(text for name in usable if _probes_fitted(context, name) for text in context.fit_warnings(name)),
        ],
    )
    results.difficulty = measured.difficulty
    results.landscapes = landscape_cards.cards(context)
    results.replicates = replicates(results)
    results.comparisons = compare_models(Tables(context), results)
    return results, measured


def _describe(context: Context, name: str) -> dict[str, Any]:
    entry, loaded = context.entry(name), context.model(name)
    about: dict[str, Any] = {
        "name": name,
        "spec": entry.spec if entry.spec is not None else context.training[entry.name].spec,
        "fingerprint": loaded.fingerprint,
        "parameters": sum(p.numel() for p in loaded.module.parameters()),
        "notes": list(loaded.notes),
    }
    if entry.replicate_of is not None:
        about["replicate_of"] = entry.replicate_of
    if entry.make is not None:
        about["made"] = json.loads((context.training[name].folder / "model.json").read_text(encoding="utf-8"))["made"]
    if entry.train is not None:
        described = json.loads((context.training[name].folder / "model.json").read_text(encoding="utf-8"))
        told = ("defense", "regressor", "recipe", "seed", "selected", "alarm", "curve")
        about["training"] = {k: described[k] for k in told if k in described}
        if entry.train.data is not None:
            about["training"]["data"] = entry.train.data
    if filters := filter_rows(loaded.module):
        about["filters"] = filters
    if _probes_fitted(context, name):
        about["fitted"] = context.fitted_summaries(name)
    return about


def _unfit(context: Context, models: list[str]) -> list[Failed]:
    """Probes that could not be fitted, with the reason."""
    tried = [(name, probe) for name in models for probe in context.probes_of(name)]
    found = [(name, probe, context.unfit(name, probe)) for name, probe in tried]
    return [Failed(what=f"{name} · {probe.label}", error=error) for name, probe, error in found if error is not None]


def _probes_fitted(context: Context, name: str) -> bool:
    """Whether everything that the probes are fitted on is there."""
    return all(
        context.is_done(c)
        for probe in context.probes_of(name)
        for split in probe.fit_on
        for c in context.fit_cells(name, split)
    )


def write_results(context: Context, results: RunResults, measured: Measured, done: RunLog, began: float) -> None:
    """Write the run's files; run.json alone holds dates and timings."""
    folder = context.folder

    def put(name: str, text: str) -> None:
        write_atomically(folder / name, lambda file: file.write_text(text, encoding="utf-8"))

    usable = [name for name in context.evaluated if name not in done.broken]
    put(RESULTS, results.to_json())
    put(INDEX, index_of(context, usable).model_dump_json(indent=1) + "\n")
    put(TABLE, _csv(results.results))
    put(GALLERY, json.dumps(measured.gallery, indent=0))
    if measured.scored is not None and context.scoring is not None:
        scored, bins = measured.scored, context.scoring.asked.bins
        write_atomically(folder / DIFFICULTY, lambda file: scored.write(file, bins))
    else:
        (folder / DIFFICULTY).unlink(missing_ok=True)  # of another suite that this folder held
    cells = [cell for name in usable for cell in context.cells(name) if context.is_done(cell)]
    meta = {cell: context.store.meta(context.observation_key(cell)) for cell in cells}
    visit = {
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "trained": done.trained,
        "computed": done.computed,
        "reused": done.reused,
        "failures": len(done.failures),
    }
    previous = json.loads((folder / RUN).read_text(encoding="utf-8")) if (folder / RUN).is_file() else {}
    run = {
        "suite": context.suite.model_dump(by_alias=True, mode="json"),
        "environment": environment(),
        "seconds": {
            "training": {
                n: json.loads(f.read_text(encoding="utf-8"))["seconds"] for n, f in _timings(context) if f.is_file()
            },
            "cells": {str(c): said["seconds"] for c, said in meta.items()},
        },
        "device": _device_here(),
        "computed_on": sorted({said["device"] for said in meta.values() if "device" in said}),
        "history": [*previous.get("history", []), visit],
    }
    put(RUN, json.dumps(run, indent=1))


def _device_here() -> dict[str, Any]:
    """The device of the process that wrote the results; a machine that only gives out work need not have the one asked for."""
    try:
        return device.describe()
    except ConfigError as error:
        return {"device": "none here", "reason": str(error)}


def _timings(context: Context) -> list[tuple[str, Path]]:
    return [(name, training.folder / "timing.json") for name, training in context.training.items()]


def _csv(rows: list[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if v is None else v for k, v in row.model_dump().items()})
    return out.getvalue()
