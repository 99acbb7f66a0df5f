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

    from robustbench_ext.suite import bundled_parts, bundled_suites

    files = bundled_suites() | bundled_parts()
    suites = ((name, yaml.safe_load(file.read_text(encoding="utf-8"))) for name, file in files.items())
    return [{"kind": "suites", "name": name, "summary": str(s.get("description", "")).strip()} for name, s in suites]


def _recipes() -> list[dict[str, Any]]:
    import yaml

    from robustbench_ext.catalog import RECIPES

    files = sorted(RECIPES.glob("*.yaml"))
    read = ((file.stem, yaml.safe_load(file.read_text(encoding="utf-8"))) for file in files)
    return [
        {
            "kind": "recipes",
            "name": name,
            "summary": f"{r['title']}: {', '.join(r['methods'])}",
            "network": r["network"],
        }
        for name, r in read
    ]


_FILES = {"suites": _suites, "recipes": _recipes}
_WITH = {"models": ("models", "sources")}  # who asks for models wants to know where they can come from


def _here(name: str) -> dict[str, Any]:
    """Of a published dataset: whether it is on this machine, and what is missing; of others nothing."""
    from robustbench_ext.named_data import NAMED, lacking

    if name not in NAMED:
        return {}
    missing = lacking(NAMED[name])
    return {"here": missing is None, **({} if missing is None else {"missing": missing})}


def _items(kinds: Iterable[str]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for kind in kinds:
        if kind in _FILES:
            out += _FILES[kind]()
        else:
            out += [{"kind": kind, "name": e.name, "summary": e.summary, **e.facts} for e in ALL[kind]]
    return out


def markdown(items: list[dict[str, Any]]) -> str:
    """One table for each kind: name, summary, and a column for each fact."""
    tables = []
    for kind in dict.fromkeys(item["kind"] for item in items):
        rows = [item for item in items if item["kind"] == kind]
        facts = [key for key in dict.fromkeys(k for row in rows for k in row) if key not in ("kind", "name", "summary")]
        cells = [["name", *(fact.replace("_", " ") for fact in facts), "what it does"], ["---"] * (len(facts) + 2)]
        cells += [[f"`{row['name']}`", *(_told(row.get(fact)) for fact in facts), row["summary"]] for row in rows]
        lines = [f"| {' | '.join(line)} |" for line in cells]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value if value is not None else "")


def list_(
    kind: str | None = typer.Argument(None, help=f"One of {', '.join([*ALL, *_FILES])}; all by default."),
    as_json: bool = typer.Option(False, "--json", help="A JSON list of objects with name and summary."),
    as_markdown: bool = typer.Option(
        False, "--markdown", help="Tables for a document, with all that is known of each."
    ),
) -> None:
    """List attacks, corruptions, defenses, detectors, uq, datasets, outliers, models, suites and recipes by name."""
    kinds = [*ALL, *_FILES]
    kind = "datasets" if kind == "data" else kind
    if kind is not None and kind not in kinds:
        raise ConfigError(unknown_name("kind", kind, kinds))
    items = _items(kinds if kind is None else _WITH.get(kind, (kind,)))
    if not as_markdown:  # a document is about no machine
        for item in items:
            item |= _here(item["name"]) if item["kind"] == "datasets" else {}
    if as_json:
        print(json.dumps(items, indent=1))
        return
    if as_markdown:
        print(markdown(items))
        return
    import textwrap

    width = max(len(item["name"]) for item in items)
    for heading in dict.fromkeys(item["kind"] for item in items):
        print(heading)
        for item in (i for i in items if i["kind"] == heading):
            lead = f"  {item['name']:<{width}}  "
            there = {True: " [here]", False: f" [{item.get('missing')}]", None: ""}[item.get("here")]
            print(
                textwrap.fill(
                    item["summary"] + there,
                    80,
                    initial_indent=lead,
                    subsequent_indent=" " * len(lead),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
