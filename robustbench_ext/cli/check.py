"""`rbx check`: preflight only, in seconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer

from robustbench_ext.checks import Check, verdict
from robustbench_ext.cli.console import CHECK_FAILED, numbers
from robustbench_ext.errors import ConfigError
from robustbench_ext.settings import DEVICE, UNSAFE, changed

MARKS = {"pass": "ok   ", "doubt": "DOUBT", "fail": "FAIL "}


def check(
    model: str | None = typer.Option(
        None, help="As in `rbx run`: file.py:factory, or SOURCE:NAME (`rbx list models`)."
    ),
    data: str | None = typer.Option(None, help="Data specification, such as digits, npz:PATH or folder:PATH."),
    mean: str | None = typer.Option(None, help="Normalisation inside the model, such as 0.485,0.456,0.406."),
    std: str | None = typer.Option(None, help="See --mean."),
    weights: str | None = typer.Option(
        None, help="A safetensors file, or the name of published weights, such as DEFAULT."
    ),
    attack: list[str] = typer.Option(
        [],
        help="An attack instead of a model, such as file.py:MyAttack: does it keep what every attack must? Repeatable.",
    ),
    detector: list[str] = typer.Option([], help="The same of a detector. Repeatable."),
    n: int = typer.Option(64, min=2, help="Samples to look at."),
    device: str | None = typer.Option(None, help="auto, cpu, cuda, cuda:1, mps; by default $RBX_DEVICE, or auto."),
    allow_unsafe_load: bool = typer.Option(False, "--allow-unsafe-load", help="As in `rbx run`."),
    duplicates: bool | None = typer.Option(
        None, help="Look for test images in other splits; by default where that takes seconds."
    ),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Check whether numbers of this model on this data can be trusted: input range, mode, determinism, logits,
    gradients, eps = 0. Or whether attacks and detectors of your own can be. Exit code 1 if a check fails.
    """
    if attack or detector:
        if model or data:
            raise ConfigError("--attack and --detector are checked on a small network: leave out --model and --data")
        from robustbench_ext.testing import check_methods

        _say(check_methods(attack, detector), {"attacks": attack, "detectors": detector}, as_json)
        return
    if not model or not data:
        raise ConfigError("give --model and --data, or --attack file.py:MyAttack, or --detector file.py:MyDetector")
    from robustbench_ext.data import load_dataset
    from robustbench_ext.data.duplicates import check_duplicates
    from robustbench_ext.device import settled
    from robustbench_ext.memory import fitting
    from robustbench_ext.models import load_model
    from robustbench_ext.preflight import preflight

    name, equals, rest = model.partition("=")
    if equals and "/" not in name and ":" not in name:
        model = rest  # NAME=SPEC, as `rbx run` takes it
    if (mean is None) != (std is None):
        raise ConfigError("--mean and --std go together: give both, or neither")
    with changed(**{DEVICE: device, UNSAFE: "1" if allow_unsafe_load else None}):
        dataset = load_dataset(data)
        loaded = load_model(
            model,
            shape=dataset.shape,
            num_classes=len(dataset.classes),
            mean=numbers(mean, "--mean"),
            std=numbers(std, "--std"),
            weights=weights,
            data=dataset,
        )
        with settled() as where:
            model_there = loaded.module.to(where)
            checks, _ = fitting(lambda size: preflight(model_there, dataset["test"], size), n)
        if duplicates is not False and (twins := check_duplicates(dataset, bool(duplicates))) is not None:
            checks.append(twins)
    _say(checks, {"model": model, "data": data, "notes": list(loaded.notes)}, as_json)


def _say(checks: list[Check], about: dict[str, Any], as_json: bool) -> None:
    """Print the checks and the verdict; exit code 1 where one failed."""
    result = verdict(checks)
    if as_json:
        print(json.dumps({**about, "verdict": result, "checks": [asdict(c) for c in checks]}, indent=1))
    else:
        import textwrap

        for note in about.get("notes", ()):
            print(f"note   {note}")
        for item in checks:
            text = item.message + (f". {item.hint}" if item.status != "pass" and item.hint else "")
            print(textwrap.fill(f"{MARKS[item.status]}  {item.name}: {text}", 80, subsequent_indent=" " * 7))
        print(f"verdict: {result}")
    if result == "fail":
        raise typer.Exit(CHECK_FAILED)
