"""Results as an entry of RobustBench's leaderboard: a file of its `model_info` folder (Croce et al. 2021, arXiv 2010.09670).

An entry is worth something only if it was measured as all others were. So the protocol is held against theirs, and anything
else is refused with the differences. Their numbers are strings of percentages with two digits; intervals have no place in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.named_data import NAMED
from robustbench_ext.numbers import format_number
from robustbench_ext.results import Row, RunResults


class _Benchmark(NamedTuple):
    dataset: str
    n: int
    eps: dict[str, float]


# All 10,000 test images. The 5,000 images of ImageNet are a list of files, which a run's results do not tell.
BENCHMARKS = {
    "torchvision:CIFAR10": _Benchmark("cifar10", 10_000, {"Linf": 8 / 255, "L2": 0.5}),
    "torchvision:CIFAR100": _Benchmark("cifar100", 10_000, {"Linf": 8 / 255}),
}
# AutoAttack's standard version: four attacks of these budgets, each on what the ones before could not break.
MEMBERS = ["apgd-ce", "apgd-t", "fab-t", "square"]
PARAMETERS = {
    "stop": "broken",
    "draws": 1,
    "precision": "float32",
    "steps": 100,
    "targets": 9,
    "queries": 5000,
}
# What no run can know; given by the user or null.
ABOUT = ("link", "name", "authors", "additional_data", "number_forward_passes", "venue", "architecture", "reported")
_REQUIRED_CHECKS = ("determinism", "gradients")  # of the models that the leaderboard accepts


def render_robustbench(
    results: RunResults, model: str, norm: str | None = None, about: Mapping[str, Any] | None = None
) -> tuple[str, str, list[str]]:
    """An entry as JSON, its norm, and the fields that are null because nobody said them.

    Args:
        model: its name in the run.
        norm: "Linf" or "L2"; by default the one that the run has.
        about: fields of `ABOUT`.

    Raises:
        ConfigError: another protocol than theirs, with every difference; or an unknown field.
    """
    about = dict(about or {})
    for key in about:
        if key not in ABOUT:
            raise ConfigError(unknown_name("field of an entry", key, ABOUT))
    norm = norm or _norm(results)
    found = differences(results, model, norm)
    if found:
        told = "\n".join(f"  - {text}" for text in found)
        raise ConfigError(f"{model}: this is not RobustBench's protocol, so there is no entry to write:\n{told}")
    benchmark = BENCHMARKS[_base(results)]
    attack = _standard(results, norm)
    clean, robust = _row(results, model, "clean", "accuracy"), _row(results, model, attack["label"], "robust_accuracy")
    doubts = [f"{f.name}: {f.message}" for f in results.suspicions if f.model == model]
    entry: dict[str, Any] = {
        **{key: about.get(key) for key in ABOUT[:5]},
        "dataset": benchmark.dataset,
        "venue": about.get("venue"),
        "architecture": about.get("architecture"),
        "eps": format_number(attack["eps"]),
        "clean_acc": _percent(clean),
        "reported": about.get("reported"),
        "autoattack_acc": _percent(robust),
        "unreliable": bool(doubts),
    }
    if doubts:
        entry["footnote"] = "; ".join(doubts)
    return json.dumps(entry, indent=2, ensure_ascii=False) + "\n", norm, [key for key in ABOUT if key not in about]


def differences(results: RunResults, model: str, norm: str) -> list[str]:
    """Where the run differs from the leaderboard's protocol: what is expected, and what was found."""
    found: list[str] = []

    def expect(what: str, wanted: Any, got: Any) -> None:
        if wanted != got:
            found.append(f"{what}: expected {wanted}, found {got}")

    benchmark = BENCHMARKS.get(_base(results))
    if benchmark is None:
        hint = (
            " (its 5,000 images are a list of files that results do not tell)"
            if "imagenet" in _base(results).lower()
            else ""
        )
        found.append(f"data: expected {' or '.join(BENCHMARKS)}, found {results.data['name']}{hint}")
    else:
        expect("test split", f"{benchmark.n} samples", f"{results.data['splits']['test']['n']} samples")
    n, budgets = (benchmark.n, benchmark.eps) if benchmark else (10_000, {"Linf": 8 / 255, "L2": 0.5})
    expect("samples", n, results.suite["n"])
    if norm not in budgets:
        found.append(f"norm: expected {' or '.join(budgets)}, found {norm}")
    attack = _standard(results, norm, budgets.get(norm))
    if attack is None:
        others = [str(c["label"]) for c in results.conditions if c["kind"] == "attack"]
        wanted = f"standard {norm}" + (f" {format_number(budgets[norm])}" if norm in budgets else "")
        found.append(f"attack: expected {wanted} ({', '.join(MEMBERS)}), found {', '.join(others) or 'none'}")
    else:
        if norm in budgets and not math.isclose(attack["eps"], budgets[norm], rel_tol=1e-6):
            found.append(f"eps: expected {format_number(budgets[norm])}, found {format_number(attack['eps'])}")
        expect("members of the attack", MEMBERS, attack.get("members"))
        given = attack.get("parameters", {})
        for key in dict.fromkeys([*PARAMETERS, *given]):
            expect(f"attack, {key}", PARAMETERS.get(key, "not given"), given.get(key, "not given"))
    for label, metric in (("clean", "accuracy"), *([(attack["label"], "robust_accuracy")] if attack else [])):
        row = _row(results, model, label, metric)
        if row is None or row.value is None:
            found.append(f"{label}: expected a value, found none" + (f" ({row.reason})" if row and row.reason else ""))
        elif row.n != results.suite["n"]:
            expect(f"samples of {label}", results.suite["n"], row.n)
    for f in (f for f in results.suspicions if f.model == model):
        if f.status == "fail" or f.name in _REQUIRED_CHECKS:
            found.append(f"check {f.name}: expected pass, found {f.status}: {f.message}")
    return found


def _base(results: RunResults) -> str:
    """The data's name without an imbalance, which cuts training samples alone; torchvision's where it has the same samples."""
    name = str(results.data["name"]).partition("@")[0]
    return (NAMED[name].fetched_by if name in NAMED else "") or name


def _norm(results: RunResults) -> str:
    norms = list(dict.fromkeys(str(c["norm"]) for c in results.conditions if c.get("attack") == "standard"))
    if len(norms) > 1:
        raise ConfigError(f"the run has the standard attack under {' and '.join(norms)}: say which with --norm")
    return norms[0] if norms else "Linf"


def _standard(results: RunResults, norm: str, eps: float | None = None) -> Any:
    """The condition that is the standard ensemble under that norm, of that budget if there is one."""
    found = [c for c in results.conditions if c.get("attack") == "standard" and c.get("norm") == norm]
    found.sort(key=lambda c: abs(float(c["eps"] or math.inf) - eps) if eps is not None else 0.0)
    return found[0] if found else None


def _row(results: RunResults, model: str, condition: str, metric: str) -> Row | None:
    rows = results.find(model=model, condition=condition, probe="classifier", metric=metric, group=None)
    return rows[0] if rows else None


def _percent(row: Row | None) -> str:
    return "" if row is None or row.value is None else f"{100 * row.value:.2f}"
