"""`rbx list`: everything that has a name. Imports neither torch nor any method."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import typer

from robustbench_ext.catalog import ALL
from robustbench_ext.errors import ConfigError, unknown_name


def _suites() -> list[dict[str, Any]]:
    import yaml

    from robustbench_ext.suite import bundled_suites

    suites = ((name, yaml.safe_load(file.read_text())) for name, file in bundled_suites().items())
    return [{"kind": "suites", "name": name, "summary": str(s.get("description", "")).strip()} for name, s in suites]


def _items(kinds: Iterable[str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for kind in kinds:
        if kind == "suites":
            out += _suites()
        else:
            out += [{"kind": kind, "name": e.name, "summary": e.summary, **e.facts} for e in ALL[kind]]
    return out


def list_(
    kind: str | None = typer.Argument(None, help=f"One of {', '.join([*ALL, 'suites'])}; all by default."),
    as_json: bool = typer.Option(False, "--json", help="A JSON list of objects with name and summary."),
) -> None:
    """List attacks, corruptions, defenses, detectors, uq, datasets, outliers, models and suites by name."""
    kinds = [*ALL, "suites"]
    if kind is not None and kind not in kinds:
        raise ConfigError(unknown_name("kind", kind, kinds))
    items = _items(kinds if kind is None else [kind])
    if as_json:
        print(json.dumps(items, indent=1, ensure_ascii=False))
        return
    import textwrap

    width = max(len(item["name"]) for item in items)
    for heading in dict.fromkeys(item["kind"] for item in items):
        print(heading)
        for item in (i for i in items if i["kind"] == heading):
            lead = f"  {item['name']:<{width}}  "
            print(textwrap.fill(item["summary"], 80, initial_indent=lead, subsequent_indent=" " * len(lead)))
