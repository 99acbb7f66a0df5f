"""`rbx rift`: criticality of a trained network's modules, and fine-tuning of the one that robustness needs least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from robustbench_ext.cli.console import INTERRUPTED, numbers, paragraph, say, settings

if TYPE_CHECKING:
    from rich.progress import Progress

    from defenses.criticality import AdversarialSet, Criticality, ModuleCriticality
    from defenses.rift import Alpha, RiFTRecipe


def rift(
    model: str = typer.Argument(help="An adversarially trained model: a folder of `rbx train`, or pkg.module:factory."),
    data: str = typer.Option(..., help="What it was trained on: a name or npz:PATH, folder:PATH, torchvision:NAME."),
    out: Path = typer.Option(..., help="Folder for weights, findings and figure. The same folder resumes."),
    seed: int = typer.Option(0, help="Of the attacks' starts and the data order."),
    mean: str | None = typer.Option(None, help="Normalisation inside the model, such as 0.5,0.5,0.5."),
    std: str | None = typer.Option(None, help="See --mean."),
    weights: str | None = typer.Option(None, help="A safetensors file, or published weights of torchvision's."),
    kwarg: list[str] = typer.Option([], help="Argument of the factory or network, such as width=8. Repeatable."),
    device: str = typer.Option("cpu", help="Such as cpu or cuda:0."),
    set_: list[str] = typer.Option(
        [], "--set", help="Option of the method: eps=8/255, module=layer2.1.conv2, bn=train, lr=0.01. Repeatable."
    ),
) -> None:
    """Measure how critical each module is for robustness, fine-tune the least critical one on natural inputs, and keep
    the interpolation with the best clean accuracy that costs no robustness (RiFT, arXiv 2308.02533).

    Example: rbx rift runs/mine --data mnist5k --out runs/mine-rift --set eps=0.2
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from defenses.criticality import candidates
    from defenses.rift import ARGMIN, RiFTRecipe
    from defenses.rift_folder import RIFT_FILE, base_model, rift_checkpoint
    from robustbench_ext.attacks.base import build
    from robustbench_ext.data import load_dataset

    recipe: RiFTRecipe = build(RiFTRecipe, "rift", settings(set_))
    dataset = load_dataset(data)
    base = base_model(
        model,
        dataset,
        mean=numbers(mean, "--mean"),
        std=numbers(std, "--std"),
        weights=weights,
        kwargs=settings(kwarg),
        device=device,
    )
    if (out / "model.json").is_file():
        say(f"{out} holds a finished model; checking that it is this one")
    modules = len(candidates(base.module)[0]) if recipe.module == ARGMIN else 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        try:
            rift_checkpoint(base, dataset, recipe, out, seed, _told(progress, recipe, modules))
        except KeyboardInterrupt:
            progress.stop()
            paragraph(f"interrupted. Finished modules are kept in {out}: run the same command again to go on.")
            raise typer.Exit(INTERRUPTED) from None
    found = json.loads((out / RIFT_FILE).read_text(encoding="utf-8"))
    _draw(out, found)
    _summary(found)
    print(f"model: {out}")


def _draw(out: Path, found: dict[str, Any]) -> None:
    """The modules' criticality, as a figure beside the numbers."""
    from reports.figures import module_criticality
    from reports.svg import save

    height = max(1.8, 0.9 + 0.22 * len(found["criticality"]["modules"]))
    save(out / "criticality.svg", [lambda axes: module_criticality(found, axes)], (5.2, height))


def _told(progress: Progress, recipe: RiFTRecipe, modules: int) -> Any:
    """A watcher that moves the bar and prints a line for every module, epoch and alpha."""
    from defenses.rift import Watcher

    task = progress.add_task("attack", total=None)

    def line(text: str) -> None:
        progress.console.print(text, highlight=False, markup=False)

    class Told(Watcher):
        def inputs(self, inputs: AdversarialSet) -> None:
            line(f"attacked {len(inputs)} {recipe.split} inputs: PGD-{recipe.attack_steps} {recipe.threat()}")

        def ascent(self, name: str, before: int, epoch: int) -> None:
            total = modules * recipe.ascent_epochs
            progress.update(task, description=name, total=total, completed=before * recipe.ascent_epochs + epoch)

        def module(self, found: ModuleCriticality) -> None:
            line(
                f"{found.name.removesuffix('.weight'):<28} criticality {found.mrc:8.4f}  "
                f"accuracy {found.accuracy:6.1%}" + (f"  ({found.cut} epochs cut short)" if found.cut else "")
            )

        def chosen(self, criticality: Criticality, module: str) -> None:
            mrc = {m.name: m.mrc for m in criticality.modules}
            line(
                f"tuning {module.removesuffix('.weight')}: criticality {mrc[module]:.4f} "
                f"(all: {min(mrc.values()):.4f} to {max(mrc.values()):.4f})"
            )

        def batch(self, epoch: int, batch: int, batches: int) -> None:
            done = (epoch - 1) * batches + batch
            progress.update(task, description="fine-tuning", total=recipe.epochs * batches, completed=done)

        def epoch(self, row: dict[str, float]) -> None:
            line(
                f"epoch {int(row['epoch']):>3}/{recipe.epochs}  loss {row['loss']:7.4f}  "
                f"clean {row['clean_accuracy']:6.1%}"
            )

        def alpha(self, row: Alpha) -> None:
            progress.update(
                task, description="alpha", total=recipe.steps + 1, completed=round(row.alpha * recipe.steps) + 1
            )
            mark = "" if row.admissible else "  loses too much"
            line(f"alpha {row.alpha:4.2f}  clean {row.clean_accuracy:6.1%}  robust {row.robust_accuracy:6.1%}{mark}")

    return Told()


def _summary(found: dict[str, Any]) -> None:
    rows = {row["alpha"]: row for row in found["alphas"]}
    kept, start = rows[found["alpha"]], rows[0.0]
    clean, robust = (kept[k] - start[k] for k in ("clean_correct", "robust_correct"))
    say(f"kept alpha {kept['alpha']:g}, on the calibration split:")
    say(f"clean  {start['clean_accuracy']:6.1%} -> {kept['clean_accuracy']:6.1%}  ({clean:+d} of {found['n']} samples)")
    say(
        f"robust {start['robust_accuracy']:6.1%} -> {kept['robust_accuracy']:6.1%}  ({robust:+d} of "
        f"{found['n_attacked']}; {found['tolerance_samples']} may be lost)"
    )
    if found["alpha"] == 0:
        say("No other point was better, so these are the weights of the base, bit for bit.")
    elif not found["inside"]:
        say("The weight left the ball that its criticality looked at: that number says nothing about it.")
