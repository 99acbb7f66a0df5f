"""`rbx train`: train one model with one defense."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from robustbench_ext.cli.console import INTERRUPTED, numbers, say, settings


def train(
    defense: str = typer.Argument(help="See `rbx list defenses`."),
    data: str = typer.Option(..., help="Training data: a name or npz:PATH, folder:PATH, torchvision:NAME."),
    model: str | None = typer.Option(
        None, help="Network: a reference network or pkg.module:factory. The recipe's own, or small-cnn, by default."
    ),
    out: Path = typer.Option(..., help="Folder for weights, curve and recipe. The same folder resumes."),
    recipe: str | None = typer.Option(None, help="Start from a bundled recipe: see `rbx list recipes`."),
    seed: int = typer.Option(0, help="Of the weights, the data order and the attack's starts."),
    mean: str | None = typer.Option(None, help="Normalisation inside the model, such as 0.5,0.5,0.5."),
    std: str | None = typer.Option(None, help="See --mean."),
    device: str = typer.Option("auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1."),
    set_: list[str] = typer.Option(
        [],
        "--set",
        help="Option of the defense, the recipe or (net.) the network: beta=6, epochs=30, eps=8/255, net.width=32, "
        "'augmentation={crop: 4, flip: true}' (in quotes). recipe. in front means the recipe where both have one. Repeatable.",
    ),
) -> None:
    """Train a model and keep its best epoch, judged on the calibration split.

    Example: rbx train trades --data mnist5k --model small-cnn --out runs/mine --set eps=0.2 --set epochs=20

    Several GPUs or processes: accelerate launch -m robustbench_ext.cli train ...
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from defenses.recipes import plan
    from defenses.trainer import Architecture
    from defenses.trainer import train as run_training
    from robustbench_ext.data import load_dataset

    options, network, chosen = _sorted(defense, settings(set_))
    if recipe is not None:
        chosen["name"] = recipe
    made = plan(defense, chosen, options, model, network)
    dataset = load_dataset(data)
    architecture = Architecture(
        made.network,
        dataset.shape,
        len(dataset.classes),
        tuple(m) if (m := numbers(mean, "--mean")) else None,
        tuple(s) if (s := numbers(std, "--std")) else None,
        dict(made.kwargs) or None,
    )
    if (out / "model.json").is_file():
        say(f"{out} holds a finished model; checking that it is this one")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    alarmed = False
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(defense, total=None)

        def on_batch(epoch: int, batch: int, batches: int) -> None:
            progress.update(task, total=made.recipe.epochs * batches, completed=epoch * batches + batch)

        def on_epoch(row: dict[str, Any]) -> None:
            nonlocal alarmed
            energies = f"  dE {row['delta_energy_train']:6.2f}" if "delta_energy_train" in row else ""
            progress.console.print(
                f"epoch {row['epoch']:>3}/{made.recipe.epochs}  loss {row['loss']:8.4f}  clean {row['clean_accuracy']:6.1%}  "
                f"robust {row['robust_accuracy']:6.1%}{energies}  {row['seconds']:6.1f} s",
                highlight=False,
            )
            if row["alarm"] and not alarmed:
                alarmed = True
                progress.console.print(
                    f"alarm: energies of training data fall while the robust accuracy does not rise (epoch {row['alarm']}): "
                    f"the network has begun to overfit robustly",
                    highlight=False,
                )
            accuracies = f"clean {row['clean_accuracy']:.1%}, robust {row['robust_accuracy']:.1%}"
            progress.update(task, description=f"{defense} ({accuracies})")

        try:
            run_training(made.defense, architecture, dataset, made.recipe, out, seed, on_epoch, on_batch, device=device)
        except KeyboardInterrupt:
            progress.stop()
            say(f"interrupted. What is done is kept in {out}: run the same command again to go on.")
            raise typer.Exit(INTERRUPTED) from None
    _finish(out)


def _sorted(defense: str, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Options by what they belong to: the defense, the network, the recipe."""
    from defenses.recipe import Recipe
    from robustbench_ext.catalog import DEFENSES
    from robustbench_ext.errors import unknown_name

    recipe = {f.name for f in fields(Recipe)}
    own = {f.name for f in fields(DEFENSES.load(defense))}
    options: dict[str, dict[str, Any]] = {"defense": {}, "network": {}, "recipe": {}}
    for key, value in given.items():
        if key.startswith("net."):
            options["network"][key.removeprefix("net.")] = value
        elif key.startswith("recipe.") and key.removeprefix("recipe.") in recipe:
            options["recipe"][key.removeprefix("recipe.")] = value
        elif key in own:
            options["defense"][key] = value
        elif key in recipe:
            options["recipe"][key] = value
        else:
            known = unknown_name("option", key, recipe | own)
            raise typer.BadParameter(f"{known} Options of the network begin with net.", param_hint="--set")
    return options["defense"], options["network"], options["recipe"]


def _finish(out: Path) -> None:
    """Say what was kept, and draw the curves."""
    import json
    import os

    if int(os.environ.get("RANK", "0")):
        return
    from reports.figures import training_curve, training_energies
    from reports.svg import save

    described = json.loads((out / "model.json").read_text(encoding="utf-8"))
    model = {"name": described["defense"]["defense"], "training": described}
    paints = [lambda ax: training_curve(model, ax)]
    if "delta_energy_train" in described["curve"][0]:
        paints.append(lambda ax: training_energies(model, ax))
    save(out / "curves.svg", paints)
    chosen = described["curve"][described["selected"]["epoch"] - 1]
    say(
        f"kept epoch {chosen['epoch']} (best {described['selected']['by']} accuracy on the calibration split: "
        f"clean {chosen['clean_accuracy']:.1%}, robust {chosen['robust_accuracy']:.1%})"
    )
    _say_filters(out)
    print(f"model: {out}")


def _say_filters(out: Path) -> None:
    """How varied the 3x3 filters are: seconds, and no data."""
    from robustbench_ext.filters import filter_quality
    from robustbench_ext.models import load_model

    found = [(f.normalised, f.layer) for f in filter_quality(load_model(str(out)).module) if f.normalised is not None]
    if found:
        (least, layer), (most, _) = min(found), max(found)
        say(
            f"filters: normalised variance entropy {least:.2f} ({layer}) to {most:.2f} over {len(found)} 3x3 layers "
            f"(0: copies of a few, about 0.9: usual, 1: as random numbers)"
        )
