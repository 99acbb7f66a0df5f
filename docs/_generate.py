"""The pages of the documentation that nobody writes: made from catalog, docstrings, signatures, command line and schemas.

MkDocs runs this file as a hook; the pages exist in the built site alone, so they cannot be out of date. `pages()` gives all of
them by path. The hook also leads links to files outside `docs` to copies of them in the site.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import posixpath
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from robustbench_ext.catalog import ALL  # noqa: E402
from robustbench_ext.registry import Entry  # noqa: E402

# Page: title, lead, the catalog's kinds on it with their headings, and whether parameters are shown.
METHODS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "attacks": (
        "All attacks",
        "What they have in common, and how they compare with the reference, is in [Attacks](../attacks.md).",
        {"attacks": "Classifiers", "regression-attacks": "Regressors of tables"},
        True,
    ),
    "defenses": (
        "All defenses",
        "How they train and what came out of comparing them is in [Defenses](../defenses.md).",
        {
            "defenses": "Training methods",
            "makers": "Models made of other models",
            "regression-defenses": "Training methods of regressors",
        },
        True,
    ),
    "detectors": (
        "All detectors",
        "Higher score = more unlike the training data, always. See [Detectors](../detectors.md).",
        {"detectors": "Detectors"},
        True,
    ),
    "uncertainty": (
        "All estimators",
        "What they are measured by, and what came out, is in [Uncertainty](../uncertainty.md).",
        {"uq": "Of classifiers", "intervals": "Of regressors"},
        True,
    ),
    "shift": (
        "All corruptions and shifts",
        "Severities, departures from the published scripts and results are in [Shift](../shift.md).",
        {"corruptions": "Corruptions of images", "shifts": "Shifts of tables"},
        False,
    ),
    "data": ("All data sets", "", {"datasets": "Data sets", "outliers": "Inputs of no class"}, False),
    "models": (
        "All networks and sources of models",
        "",
        {"models": "Reference networks", "sources": "Models from elsewhere", "regressors": "Networks for tables"},
        True,
    ),
    "trackers": ("All trackers", "", {"trackers": "Experiment trackers"}, False),
}

# Base classes whose parameters every method of a kind has: told once.
SHARED = {"attacks": ("robustbench_ext.attacks.base", "Attack", "Parameters of all attacks")}

_METRICS = (
    *(
        "estimate",
        "classification",
        "calibration",
        "binned",
        "classwise",
        "detection",
        "selective",
        "corruption",
        "energy",
    ),
    *(
        "distance",
        "tails",
        "relative",
        "regression",
        "crps",
        "quantiles",
        "coverage_curves",
        "conditional",
        "conformal",
        "intervals",
    ),
    *("paired", "decision"),
)

# What is public, by page. `::: NAME` is mkdocstrings' own notation.
API: dict[str, tuple[str, tuple[str, ...]]] = {
    "robustbench_ext": ("robustbench_ext", ("robustbench_ext",)),
    "attacks": (
        "Attacks",
        ("robustbench_ext.attacks", "robustbench_ext.attacks.base", "robustbench_ext.attacks.search"),
    ),
    "models": (
        "Models",
        (
            "robustbench_ext.models",
            "robustbench_ext.models.checkpoints",
            "robustbench_ext.preflight",
            "robustbench_ext.landscape",
        ),
    ),
    "data": ("Data", ("robustbench_ext.data",)),
    "metrics": (
        "Metrics",
        tuple(f"robustbench_ext.metrics.{name}" for name in _METRICS),
    ),
    "results": (
        "Runs and results",
        tuple(
            f"robustbench_ext.{name}"
            for name in ("engine", "results", "compare", "difficulty", "callbacks", "settings", "errors")
        ),
    ),
    "testing": ("Checks for methods of your own", ("robustbench_ext.testing",)),
    "defenses": (
        "defenses",
        ("defenses", *(f"defenses.{name}" for name in ("base", "trainer", "recipe", "self_distill", "cs_ib"))),
    ),
    "detectors": ("detectors", ("detectors", "detectors.base")),
    "uq": ("uq", ("uq", "uq.base", "uq.regression")),
    "reports": ("reports", ("reports",)),
}


def pages() -> dict[str, str]:
    """Every generated page, by its path in the documentation."""
    made = {f"methods/{name}.md": _methods(*told) for name, told in METHODS.items() if _known(told[2])}
    made["methods/metrics.md"] = _metrics()
    made |= {f"api/{name}.md": _api(*told) for name, told in API.items()}
    made["reference/cli.md"] = _cli()
    made["reference/suites.md"] = _suites()
    made["reference/results.md"] = _schema()
    made["experiments.md"] = _experiments()
    made["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    made["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return made


def _known(kinds: Mapping[str, str]) -> bool:
    return any(kind in ALL for kind in kinds)


# Methods


def _methods(title: str, lead: str, kinds: Mapping[str, str], parameters: bool) -> str:
    parts = [f"# {title}", "Made from the catalog and the docstrings; `rbx list` has the same names.", lead]
    for kind, heading in kinds.items():
        if kind not in ALL:
            continue
        if len(kinds) > 1:
            parts.append(f"## {heading}")
        shared = None
        if kind in SHARED:
            module, name, told = SHARED[kind]
            shared = getattr(importlib.import_module(module), name)
            parts += [f"**{told}**", _parameters(shared)]
        parts += [_entry(entry, "###" if len(kinds) > 1 else "##", parameters, shared) for entry in ALL[kind]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _entry(entry: Entry, level: str, parameters: bool, shared: Any = None) -> str:
    try:
        target = entry.load()
    except ImportError as error:
        return f"{level} `{entry.name}`\n\n{_escape(entry.summary)}\n\nNeeds a package that is not installed here ({error})."
    summary, sections = read_docstring(inspect.getdoc(target) or "")
    if not (inspect.isclass(target) or inspect.isroutine(target)):  # a corruption: an object round its function
        target = getattr(target, "function", None) or getattr(target, "__wrapped__", target)
    module = sys.modules[target.__module__]
    parts = [f"{level} `{entry.name}`", f"**{_sentence(entry.summary)}**"]
    if facts := _facts(entry.facts):
        parts.append(facts)
    parts.append(_prose(summary))
    if (told := re.search(r"see `(\w+)`", summary)) and (seen := getattr(module, told[1], None)):
        parts.append(_prose(read_docstring(inspect.getdoc(seen) or "")[0]))
    for name, text in sections.items():
        if name not in ("Args", "Attributes"):
            parts.append(f"**{name}**: {_prose(text)}")
    if parameters and (table := _parameters(target, shared)):
        parts.append(table)
    reference = _reference(target, module)
    file = Path(inspect.getsourcefile(target) or "").resolve().relative_to(ROOT)
    source = f"{f'Reference: {reference}. ' if reference else ''}Source: `{file}`"
    return "\n\n".join([*parts, source])


def _facts(facts: Mapping[str, Any]) -> str:
    def told(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    return " · ".join(f"{name.replace('_', ' ')}: {told(value)}" for name, value in facts.items())


def _reference(target: Any, module: Any) -> str:
    """The class attribute `reference`, else what the first paragraph of the docstrings cites in brackets."""
    told = str(getattr(target, "reference", "") or "")
    if not told:
        for text in (inspect.getdoc(target) or "", module.__doc__ or ""):
            first = re.split(r"\n\s*\n", text)[0].replace("\n", " ")
            cited = re.findall(r"\(((?:[^()]|\([^()]*\))*?\b(?:19|20)\d\d[^()]*)\)", first)
            if cited:
                told = cited[0]
                break
    return link_references(_escape(told))


def link_references(text: str) -> str:
    """`arXiv 1706.06083` as a link, and addresses too."""
    text = re.sub(r"arXiv:? ?(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"(?<![(\"])(https?://[^\s)]+)", r"<\1>", text)


_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Cost|Yields|Example|Examples)(?: \([^)]*\))?:[ ]?(.*)$")


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's text, and its sections by name."""
    lead: list[str] = []
    sections: dict[str, list[str]] = {}
    current = lead
    for line in text.splitlines():
        opening = _SECTION.match(line)
        if opening is not None:
            current = sections.setdefault(opening[1], [])
            current += [opening[2]] if opening[2] else []
        elif current is not lead and line and not line.startswith(" "):
            current = lead if current is not lead and _ended(line) else current
            current.append(line)
        else:
            current.append(line)
    return "\n".join(lead).strip(), {
        name: textwrap.dedent("\n".join(lines)).strip() for name, lines in sections.items()
    }


def _ended(line: str) -> bool:
    """A line at the margin after a section is text again, unless it goes on with a `Cost:` line."""
    return line[:1].isupper()


def described(section: str) -> dict[str, str]:
    """`a, b: text` lines of an Args section by name; continuation lines are indented."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        opening = re.match(r"^(\*{0,2}[A-Za-z_]\w*(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:\s*(.*)$", line)
        if opening is None and line[:1].strip():  # `x, labels, ids: ...; y: ...` has its own line for each
            opening = re.match(r"^([A-Za-z_]\w*(?:, \w+)*):\s*(.*)$", line)
        if opening is not None:
            names = [name.strip() for name in opening[1].split(",")]
            for name in names:
                found[name] = opening[2]
        else:
            for name in names:
                found[name] += f" {line.strip()}"
    return found


def _parameters(target: Any, shared: Any = None) -> str:
    """Parameters with defaults and what they mean, those of base classes included; without those that are told elsewhere."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return ""
    meanings: dict[str, str] = {}
    for told in _docstrings(target):
        sections = read_docstring(inspect.cleandoc(told))[1]
        meanings |= described(sections.get("Args", "")) | described(sections.get("Attributes", ""))
    rows = []
    elsewhere = inspect.signature(shared).parameters if shared is not None else {}
    for name, parameter in signature.parameters.items():
        if name in elsewhere and parameter.default == elsewhere[name].default:
            continue
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name == "self":
            continue
        rows.append((f"`{parameter.name}`", _default(parameter.default), _cell(meanings.get(parameter.name, ""))))
    return _table(("parameter", "default", "meaning"), rows) if rows else ""


def _docstrings(target: Any) -> Iterable[str]:
    """Of a function; of a class and its bases, the most special last, with those of their constructors."""
    if not inspect.isclass(target):
        return [target.__doc__ or ""]
    owners = [one for cls in reversed(inspect.getmro(target)) for one in (cls, cls.__dict__.get("__init__"))]
    return [one.__doc__ or "" for one in owners if one is not None]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "*needed*"
    if value is dataclasses.MISSING or type(value).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return "`{}`"
    text = repr(value)
    return f"`{text}`" if len(text) < 80 and " at 0x" not in text else "*an object*"


# Metrics


def _metrics() -> str:
    from robustbench_ext.metrics.estimate import METRICS

    better = {True: "higher", False: "lower", None: "neither"}
    rows = [
        (
            f"`{name}`",
            _cell(info.title),
            _cell(info.definition),
            better[info.higher_is_better],
            "%" if info.percent else "",
        )
        for name, info in METRICS.items()
    ]
    return "\n\n".join(
        [
            "# All metrics",
            "Names and definitions as in `results.json`. Every estimate has n, an interval and the interval's method; the "
            "functions are in the [API](../api/metrics.md), and why each interval is what it is in [Design](../design.md).",
            _table(("name", "title", "definition", "better", "unit"), rows),
        ]
    )


# API


def _api(title: str, modules: Iterable[str]) -> str:
    parts = [f"# {title}"]
    told: list[Any] = []  # what a package lends out under its own name is not told again for its module
    for module in modules:
        here = importlib.import_module(module)
        members = [name for name in _public(module) if not any(getattr(here, name) is one for one in told)]
        told += [getattr(here, name) for name in members]
        options = {"members": members, "show_root_heading": True, "heading_level": 2}
        lines = "\n".join(f"      {key}: {json.dumps(value)}" for key, value in options.items())
        parts.append(f"::: {module}\n    options:\n{lines}")
    return "\n\n".join(parts) + "\n"


def _public(module_name: str) -> list[str]:
    """`__all__`, else what is defined there under a public name."""
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if name != "__version__"]
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module_name and callable(value)
    ]
    return sorted(defined, key=lambda name: inspect.getsourcelines(getattr(module, name))[1])


# Command line


def _cli() -> str:
    import typer.main

    from robustbench_ext.cli.main import app

    top: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        "`rbx`, or `python -m robustbench_ext.cli`. Exit codes: 0 fine, 1 a check failed (or something is worse, where that "
        "was asked), 2 usage, 4 partial (some cells failed; the rest is in the report), 130 interrupted.",
    ]
    for name, command in sorted(top.commands.items()):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
        usage = " ".join(
            ["rbx", name, *("[" + _argument(a) + "]" if not a.required else _argument(a) for a in arguments)]
        )
        parts += [
            f"## `rbx {name}`",
            _prose(inspect.cleandoc(command.help or "")),
            f"```text\n{usage}{' [OPTIONS]' if options else ''}\n```",
        ]
        if arguments:
            rows = [(f"`{_argument(a)}`", _cell(getattr(a, "help", "") or "")) for a in arguments]
            parts.append(_table(("argument", "meaning"), rows))
        if options:
            rows = [
                (f"`{', '.join([*o.opts, *o.secondary_opts])}`", _option_default(o), _cell(o.help or ""))
                for o in options
            ]
            parts.append(_table(("option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _argument(argument: Any) -> str:
    return str(argument.name).strip("_").upper() + ("..." if argument.nargs == -1 else "")


def _option_default(option: Any) -> str:
    if option.required:
        return "*needed*"
    value = option.default
    if value in (None, (), [], False) or callable(value):
        return ""
    return f"`{value}`"


# Suites


def _suites() -> str:
    from robustbench_ext import suite as module
    from robustbench_ext.conditions import parse_conditions
    from robustbench_ext.probes import parse_probes
    from robustbench_ext.regression_conditions import parse_regression_conditions

    parts = [
        "# Suites",
        "A suite is a YAML file (or a mapping in Python). Unknown keys are errors that name the nearest known one; numbers may "
        "be written `8/255` or `1e-3`. `rbx plan FILE` says what it would cost.",
    ]
    for cls, heading in (
        (module.Suite, "The suite"),
        (module.ModelEntry, "A model"),
        (module.Training, "`train`"),
        (module.Making, "`make`"),
        (module.Landscapes, "`landscape`"),
        (module.Difficulty, "`difficulty`"),
    ):
        text, sections = read_docstring(inspect.getdoc(cls) or "")
        meanings = described(sections.get("Attributes", ""))
        rows = [
            (
                f"`{field.alias or name}`",
                _cell(_type(field.annotation)),
                _field_default(field),
                _cell(meanings.get(name, "")),
            )
            for name, field in cls.model_fields.items()
        ]
        parts += [f"## {heading}", _prose(text), _table(("key", "type", "default", "meaning"), rows)]
    for function, heading in (
        (parse_conditions, "Conditions"),
        (parse_regression_conditions, "Conditions of tables"),
        (parse_probes, "Detectors and estimators"),
    ):
        text, sections = read_docstring(inspect.getdoc(function) or "")
        told = "\n\n".join([text, *(value for name, value in sections.items() if name == "Args")])
        parts += [f"## {heading}", _prose(told)]
    parts.append("## Bundled suites\n\n`rbx run NAME`; copy one to start your own.")
    for name, file in module.bundled_suites().items():
        parts.append(f"### `{name}`\n\n```yaml\n{file.read_text(encoding='utf-8').strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _type(annotation: Any) -> str:
    text = (
        annotation.__name__
        if isinstance(annotation, type) and not getattr(annotation, "__args__", ())
        else str(annotation)
    )
    return text.replace("typing.", "").replace("robustbench_ext.suite.", "").replace("NoneType", "None")


def _field_default(field: Any) -> str:
    if field.is_required():
        return "*needed*"
    return "`{}`" if field.default_factory is not None else f"`{field.default!r}`"


# Results


def _schema() -> str:
    from reports.schema import render_schema

    schema = json.loads(render_schema())
    parts = [
        "# results.json",
        _prose(schema["description"].split("Attributes:")[0].strip()) if schema.get("description") else "",
        "One file per run, without a clock in it: equal records give equal bytes. The [JSON Schema](../results.schema.json) is "
        "the same as this page; `rbx export --to schema` writes it.",
    ]
    for name, part in {"The file": schema, **schema["$defs"]}.items():
        told = "" if name == "The file" else part.get("description", "")
        rows = [
            (f"`{key}`", _cell(_json_type(value)), _cell(value.get("description", "")))
            for key, value in part["properties"].items()
        ]
        parts += [f"## {name}", _prose(told), _table(("key", "type", "meaning"), rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _json_type(value: Mapping[str, Any]) -> str:
    if "$ref" in value:
        return str(value["$ref"]).rpartition("/")[2]
    if "anyOf" in value:
        return " or ".join(_json_type(one) for one in value["anyOf"])
    if "enum" in value:
        return "one of " + ", ".join(f"`{one}`" for one in value["enum"])
    if value.get("type") == "array":
        return f"list of {_json_type(value.get('items', {}))}"
    return str(value.get("type", value.get("const", "any")))


# Experiments


def _experiments() -> str:
    parts = [
        "# Experiments",
        "Numbers in the documentation come from scripts of the folder `benchmarks`, and what they wrote lies beside them. "
        "None of them belongs to the tests; all say what they need.",
    ]
    for file in sorted((ROOT / "benchmarks").glob("*/*.py")):
        text = inspect.cleandoc(_module_docstring(file))
        if not text:
            continue
        results = sorted(p.name for p in (file.parent / "results").glob(f"{file.stem.replace('_', '-')}*"))
        parts += [f"## `{file.relative_to(ROOT)}`", _prose(text)]
        if results:
            parts.append("Results: " + ", ".join(f"`{name}`" for name in results))
    return "\n\n".join(parts) + "\n"


def _module_docstring(file: Path) -> str:
    import ast

    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


# Text


def _prose(text: str) -> str:
    """A docstring's text as Markdown: formulas and comparisons are text and not markup, indented lines stay as they are."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    out = []
    for paragraph in paragraphs:
        lines = paragraph.splitlines()
        if all(line.startswith("    ") for line in lines):
            out.append(f"```text\n{textwrap.dedent(paragraph)}\n```")
        elif any(line.lstrip().startswith(("- ", "* ")) for line in lines):
            out.append("\n" + "\n".join(_escape(line) for line in lines))
        elif any(line.startswith("    ") for line in lines):
            head = [line for line in lines if not line.startswith("    ")]
            indented = [line for line in lines if line.startswith("    ")]
            if lines.index(indented[0]) == len(lines) - len(indented):
                out.append(_escape(" ".join(head)))
                out.append("```text\n" + textwrap.dedent("\n".join(indented)) + "\n```")
            else:
                out.append(_escape(" ".join(line.strip() for line in lines)))
        elif ">>>" in paragraph:
            out.append(f"```pycon\n{paragraph}\n```")
        else:
            out.append(_escape(" ".join(lines)))
    return "\n\n".join(out)


def _escape(text: str) -> str:
    """Outside of backticks, characters that Markdown and HTML would take for markup."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*\[\]|\\])", r"\\\1", parts[i]).replace("<", "&lt;").replace("~", r"\~")
        parts[i] = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", parts[i])
    return "`".join(parts)


def _cell(text: str) -> str:
    """One line of a table."""
    parts = " ".join(text.split()).split("`")
    for i, part in enumerate(parts):
        parts[i] = _escape(part) if i % 2 == 0 else part.replace("|", r"\|")
    return "`".join(parts)


def _sentence(text: str) -> str:
    text = _escape(text)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")")) else ".")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *[list(row) for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# MkDocs


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and copies of files outside `docs` that pages link to."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    linked = {target for file in files.documentation_pages() for target in _outside(file.src_uri, file.content_string)}
    for target in sorted(linked):
        source = ROOT / target
        if source.is_file():
            files.append(File.generated(config, f"files/{target}", content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave `docs`: to the copies in the site; a folder's link becomes its name."""
    here = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        target = _leaves(page.file.src_uri, match[2])
        if target is None:
            return match[0]
        if (ROOT / target).is_file():
            return f"[{match[1]}]({posixpath.relpath('files/' + target, here or '.')})"
        return f"{match[1]} (`{target}`)" if target not in match[1] else f"`{target}`"

    return _LINK.sub(replaced, markdown)


_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)\)")


def _leaves(page: str, target: str) -> str | None:
    """Where a link of a page leads outside `docs`, relative to the repository; None where it stays inside."""
    if re.match(r"[a-z]+:", target):
        return None
    # Changelog and contributing guide are written for the repository's root.
    home = "" if page in ("changelog.md", "contributing.md") else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(home, target))
    return None if path.startswith("docs/") or not (ROOT / path).exists() else path


def _outside(page: str, markdown: str) -> set[str]:
    return {path for _, target in _LINK.findall(markdown) if (path := _leaves(page, target)) is not None}
