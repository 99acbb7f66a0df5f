"""`rbx check`: preflight only, in seconds."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from robustbench_ext.cli.console import CHECK_FAILED, numbers
from robustbench_ext.errors import ConfigError
from robustbench_ext.settings import DEVICE, UNSAFE, changed

MARKS = {"pass": "ok   ", "doubt": "DOUBT", "fail": "FAIL "}


def check(
    model: str = typer.Option(..., help="Model specification, such as pkg.module:factory or file.py:factory."),
    data: str = typer.Option(..., help="Data specification, such as digits, npz:PATH or folder:PATH."),
    mean: str | None = typer.Option(None, help="Normalisation inside the model, such as 0.485,0.456,0.406."),
    std: str | None = typer.Option(None, help="See --mean."),
    weights: str | None = typer.Option(None, help="A safetensors file, or published weights of torchvision's."),
    n: int = typer.Option(64, min=2, help="Samples to look at."),
    device: str | None = typer.Option(None, help="auto, cpu, cuda, cuda:1, mps; by default $RBX_DEVICE, or auto."),
    allow_unsafe_load: bool = typer.Option(False, "--allow-unsafe-load", help="As in `rbx run`."),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Check whether numbers of this model on this data can be trusted: input range, mode, determinism, logits,
    gradients, eps = 0. Exit code 1 if a check fails.
    """
    from robustbench_ext.data import load_dataset
    from robustbench_ext.models import load_model
    from robustbench_ext.preflight import preflight, verdict

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
        )
        checks = preflight(loaded.module, dataset["test"], n)
    result = verdict(checks)
    if as_json:
        report = {"model": model, "data": data, "verdict": result, "notes": list(loaded.notes)}
        print(json.dumps({**report, "checks": [asdict(c) for c in checks]}, indent=1))
    else:
        import textwrap

        for note in loaded.notes:
            print(f"note   {note}")
        for item in checks:
            text = item.message + (f" {item.hint}" if item.status != "pass" and item.hint else "")
            print(textwrap.fill(f"{MARKS[item.status]}  {item.name}: {text}", 80, subsequent_indent=" " * 7))
        print(f"verdict: {result}")
    if result == "fail":
        raise typer.Exit(CHECK_FAILED)
