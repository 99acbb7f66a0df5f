"""Baselines: what a test measured when somebody last said "this is how it should be", kept in the repository.

One small JSON file per measurement, `.robustness/NAME.json`: the protocol (samples, seed, exact specifications of conditions
and probes), the model's fingerprint, and for each metric that the test compares its value, interval and kept samples
(`kept.py`). A model is compared with it sample by sample, and only if it was measured by the same protocol.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustbench_ext import __version__, fingerprint
from robustbench_ext.axes import CLEAN
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.evaluate import RECORD_VERSION, Context
from robustbench_ext.files import write_atomically
from robustbench_ext.gate.kept import Kept, Quantity, decode, encode
from robustbench_ext.numbers import format_number
from robustbench_ext.results import Row

SCHEMA = 1
_LONGEST = 120


def file_name(name: str) -> str:
    """A file name for a test, readable, and different for different tests.

    >>> file_name("tests/test_model.py::test_linf")
    'test_model.test_linf-6875.json'
    """
    path, _, rest = name.partition("::")
    readable = f"{Path(path).name.removesuffix('.py')}.{rest}" if rest else name
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", readable.replace("::", ".")).strip("-.")
    digits = (
        4 if len(slug) <= _LONGEST else 12
    )  # of hundreds of long names that begin alike, two would share four digits
    return f"{slug[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:digits]}.json"


@dataclass(frozen=True)
class Protocol:
    """What was measured, exactly: two results may be compared where these are equal.

    Attributes:
        common: of everything in a file: seed, samples.
        conditions: specification and samples of each condition, by label.
        probes: specification of each probe, by label.
    """

    common: dict[str, Any]
    conditions: dict[str, Any]
    probes: dict[str, Any]

    @classmethod
    def of(cls, context: Context, quantity: Quantity) -> Protocol:
        """Of one row of a measurement."""
        clean = context.samples(context.conditions[CLEAN], "test")
        common = {
            "task": context.data.task,
            "seed": context.suite.seed,
            "records": RECORD_VERSION,
            "samples": {
                "n": len(clean),
                "ids": fingerprint.hash_strings(clean.ids.tolist()),
                "content": clean.fingerprint(),
            },
        }
        conditions: dict[str, Any] = {}
        for label in quantity.members():
            condition = context.conditions[label]
            about: dict[str, Any] = {"spec": condition.spec()}
            if condition.own_samples:
                shown = context.samples(condition, "test")
                about["samples"] = {
                    "n": len(shown),
                    "ids": fingerprint.hash_strings(shown.ids.tolist()),
                    "content": shown.fingerprint(),
                }
            if condition.against is not None:
                about["against"] = context.probe(condition.against).spec()
            if condition.batch_dependent:
                about["batch_size"] = context.suite.batch_size
            conditions[label] = about
        name = quantity.probe.partition(" · ")[0]
        probes = {p.label: p.spec() for p in context.probes if p.label == name}
        # As they come back from the file: tuples as lists, numbers as numbers.
        plain = json.loads(json.dumps([common, conditions, probes], default=str))
        return cls(*plain)


@dataclass
class Baseline:
    """The content of one file."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Baseline | None:
        """The baseline in a file; None where there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"baseline {path}: cannot be read ({error}). {_AGAIN}") from None
        keys = ("model", "common", "conditions", "probes", "metrics")
        if not isinstance(content, dict) or content.get("schema") != SCHEMA or any(k not in content for k in keys):
            raise ConfigError(f"baseline {path}: not a baseline that this version can read. {_AGAIN}")
        return cls(path, content)

    @property
    def model(self) -> str:
        """Fingerprint of the model that it was taken of."""
        return str(self.content["model"])

    def entry(self, quantity: Quantity) -> dict[str, Any] | None:
        """What is kept of a metric: of that very place, else of it elsewhere, for `refusal` to say what differs."""
        wanted = [quantity.condition, quantity.probe, quantity.group]
        found = [e for e in self.content["metrics"] if e["metric"] == quantity.metric]
        exact = [e for e in found if [e["condition"], e["probe"], e["group"]] == wanted or _same(e, quantity)]
        return next(iter(exact or found), None)

    def refusal(self, quantity: Quantity, protocol: Protocol) -> str:
        """Why a metric cannot be compared with this baseline: what differs, then what is now. Empty where it can."""
        entry = self.entry(quantity)
        if entry is None:
            there = ", ".join(dict.fromkeys(e["metric"] for e in self.content["metrics"])) or "nothing"
            return f"it holds no {quantity.metric}, only {there}"
        found = _differing("", self.content["common"], protocol.common)
        was = {label: self.content["conditions"][label] for label in entry["over"]}
        if len(was) == len(protocol.conditions) == 1 and set(was) != set(protocol.conditions):
            (a,), (b,) = was.values(), protocol.conditions.values()
            found += _differing(entry["condition"], a, b) or [f"condition: {entry['condition']} / {quantity.condition}"]
        else:
            found += [
                text
                for label in dict.fromkeys([*was, *protocol.conditions])
                for text in _differing(label, was.get(label), protocol.conditions.get(label))
            ]
        if entry["probe"] != quantity.probe:
            found.append(f"probe: {entry['probe']} / {quantity.probe}")
        else:
            name = quantity.probe.partition(" · ")[0]
            found += _differing(quantity.probe, self.content["probes"].get(name), protocol.probes.get(name))
        if not _same_group(entry["group"], quantity):
            found.append(f"group: {entry['group']} / {quantity.group}")
        return "; ".join(found)

    def kept(self, quantity: Quantity) -> Kept:
        """The kept samples of a metric that `refusal` has nothing against."""
        entry = self.entry(quantity)
        assert entry is not None  # noqa: S101 - the caller asked for a refusal first
        try:
            return decode(entry["kept"], quantity.lengths(entry["kept"]))
        except DataError as error:
            raise ConfigError(f"baseline {self.path}: {error}. {_AGAIN}") from None

    def write(self) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps(self.content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(self.path, lambda file: file.write_text(text, encoding="utf-8"))


_AGAIN = "Write it again with --robust-update."


def updated(
    old: Baseline | None,
    path: Path,
    test: str,
    model: str,
    quantity: Quantity,
    protocol: Protocol,
    row: Row,
    kept: Kept,
) -> Baseline:
    """The baseline with a metric put in, or in the place of what it held of it.

    Metrics that were measured by another protocol or of another model are dropped.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "test": test,
        "written by": f"robustbench-ext {__version__}",
        "model": model,
        "common": protocol.common,
        "conditions": {},
        "probes": {},
        "metrics": [],
    }
    if old is not None and old.model == model and old.content["common"] == protocol.common:
        content = {**old.content, "written by": content["written by"], "test": test}
    content["conditions"] = {**content["conditions"], **protocol.conditions}
    content["probes"] = {**content["probes"], **protocol.probes}
    entry = {
        "metric": quantity.metric,
        "condition": quantity.condition,
        "over": list(protocol.conditions),
        "probe": quantity.probe,
        "group": quantity.group,
        "value": row.value,
        "interval": [row.ci_low, row.ci_high],
        "n": row.n,
        "kept": encode(kept),
    }
    others = [e for e in content["metrics"] if not (e["metric"] == quantity.metric and _same(e, quantity))]
    content["metrics"] = [*(e for e in others if _stands(e, old, protocol)), entry]
    used = {label for e in content["metrics"] for label in e["over"]}
    content["conditions"] = {label: about for label, about in content["conditions"].items() if label in used}
    return Baseline(path, content)


def _stands(entry: Mapping[str, Any], old: Baseline | None, protocol: Protocol) -> bool:
    """Whether what was kept before was measured by the protocol that the file now speaks of."""
    if old is None:
        return False
    conditions, probes = old.content["conditions"], old.content["probes"]
    name = entry["probe"].partition(" · ")[0]
    return all(conditions[label] == protocol.conditions.get(label, conditions[label]) for label in entry["over"]) and (
        probes.get(name) == protocol.probes.get(name, probes.get(name))
    )


def _same(entry: Mapping[str, Any], quantity: Quantity) -> bool:
    return (entry["condition"], entry["probe"]) == (quantity.condition, quantity.probe) and _same_group(
        entry["group"], quantity
    )


def _same_group(group: str | None, quantity: Quantity) -> bool:
    """Of the worst class the group is only who it happened to be."""
    return group == quantity.group or quantity.metric.startswith("worst_")


def _differing(where: str, a: Any, b: Any) -> list[str]:
    """`where: key old / new` for all that differs between two JSON-like values."""
    if a == b:
        return []
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            text
            for key in dict.fromkeys([*a, *b])
            for text in _differing(f"{where} {key}".strip() if key not in ("spec",) else where, a.get(key), b.get(key))
        ]
    words = {
        "samples ids": "test samples: other ones, or in another order",
        "samples content": "test samples: other content",
    }
    return [words.get(where, f"{where}: {_shown(a)} / {_shown(b)}")]


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, float):
        return format_number(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
