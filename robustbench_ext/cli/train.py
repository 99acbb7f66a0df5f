"""`rbx train`: train one model with one defense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from robustbench_ext.cli.console import INTERRUPTED, numbers, say, settings


def train(
    defense: str = typer.Argument(help="See `rbx list defenses`."),
    data: str = typer.Option(..., help="Training data: a name or npz:PATH, folder:PATH, torchvision:NAME."),
    model: str = typer.Option("small-cnn", help="Network to train: a reference network or pkg.module:factory."),
    out: Path = typer.Option(..., help="Folder for weights, curve and recipe. The same folder resumes."),
    seed: int = typer.Option(0, help="Of the weights, the data order and the attack's starts."),
    mean: str | None = typer.Option(None, help="Normalisation inside the model, such as 0.5,0.5,0.5."),
    std: str | None = typer.Option(None, help="See --mean."),
    set_: list[str] = typer.Option(
        [], "--set", help="Recipe or defense option: epochs=30, eps=8/255, beta=6, width=32. Repeatable."
    ),
) -> None:
    """Train a model and keep its best epoch, judged on the calibration split.

    Example: rbx train trades --data mnist5k --model small-cnn --out runs/mine --set eps=0.2 --set epochs=20
    """
    from dataclasses import fields

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from defenses.trainer import Architecture, Recipe
    from defenses.trainer import train as run_training
    from robustbench_ext.attacks.base import build
    from robustbench_ext.catalog import DEFENSES, MODELS
    from robustbench_ext.data import load_dataset
    from robustbench_ext.errors import unknown_name

    cls = DEFENSES.load(defense)
    known_recipe = {f.name for f in fields(Recipe)}
    known_defense = {f.name for f in fields(cls)}
    given: dict[str, dict[str, Any]] = {"recipe": {}, "defense": {}, "network": {}}
    for key, value in settings(set_).items():
        if key in known_recipe:
            given["recipe"][key] = value
        elif key in known_defense:
            given["defense"][key] = value
        elif model in MODELS and key == "width":
            given["network"][key] = value
        else:
            raise typer.BadParameter(
                unknown_name("option", key, known_recipe | known_defense | {"width"}), param_hint="--set"
            )
    dataset = load_dataset(data)
    recipe = build(Recipe, "recipe", given["recipe"])
    architecture = Architecture(
        model,
        dataset.shape,
        len(dataset.classes),
        tuple(m) if (m := numbers(mean, "--mean")) else None,
        tuple(s) if (s := numbers(std, "--std")) else None,
        given["network"] or None,
    )
    if (out / "model.json").is_file():
        say(f"{out} holds a finished model; checking that it is this one")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{defense}", total=None)

        def on_batch(epoch: int, batch: int, batches: int) -> None:
            progress.update(task, total=recipe.epochs * batches, completed=epoch * batches + batch)

        def on_epoch(row: dict[str, Any]) -> None:
            progress.console.print(
                f"epoch {row['epoch']:>3}/{recipe.epochs}  loss {row['loss']:7.4f}  clean {row['clean_accuracy']:6.1%}  "
                f"robust {row['robust_accuracy']:6.1%}  {row['seconds']:6.1f} s",
                highlight=False,
            )

        objective = build(cls, defense, given["defense"])
        try:
            run_training(objective, architecture, dataset, recipe, out, seed, on_epoch, on_batch)
        except KeyboardInterrupt:
            progress.stop()
            say(f"interrupted. Finished epochs are kept in {out}: run the same command again to go on.")
            raise typer.Exit(INTERRUPTED) from None
    import json

    described = json.loads((out / "model.json").read_text())
    chosen = described["curve"][described["selected"]["epoch"] - 1]
    say(
        f"kept epoch {chosen['epoch']} (best {described['selected']['by']} accuracy on the calibration split: "
        f"clean {chosen['clean_accuracy']:.1%}, robust {chosen['robust_accuracy']:.1%})"
    )
    print(f"model: {out}")
