"""Weights of a training after some of its epochs, kept beside its model for what is read off a training and not off its end.

In the folder of a trained model, `epoch-0003.safetensors` holds the weights that would have been published after the third
epoch; `kept` in model.json names the file and seals it. Keeping changes nothing of the training and is in no key.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from robustbench_ext.errors import ModelError
from robustbench_ext.files import fits
from robustbench_ext.models.loading import RECIPE_FILE, LoadedModel, load_model


def file_of(epoch: int) -> str:
    """The name of the file of an epoch, from 1."""
    return f"epoch-{epoch:04d}.safetensors"


def kept(folder: Path) -> dict[int, dict[str, Any]]:
    """What model.json says of every checkpoint of a finished training that is there and whole, by epoch, in their order.

    `file`, `bytes` and `sha256`; `another` is true where it is from another training of the same recipe, data and seed than
    the published weights (see `defenses.trainer.train`).
    """
    notes = _described(folder).get("kept", {})
    found = {int(epoch): note for epoch, note in notes.items() if fits(folder / note["file"], note)}
    return dict(sorted(found.items()))


def missing(folder: Path, wanted: Iterable[int]) -> list[int]:
    """Those of the wanted epochs that a finished training went through and that are not kept."""
    wanted = sorted(set(wanted))
    there, reached = (kept(folder), epochs_of(folder)) if wanted else ({}, 0)
    return [epoch for epoch in wanted if epoch <= reached and epoch not in there]


def epochs_of(folder: Path) -> int:
    """How many epochs a finished training went through; it may have ended early."""
    return len(_described(folder).get("curve", []))


def load_checkpoint(folder: Path, epoch: int) -> LoadedModel:
    """The network with the weights after an epoch.

    Raises:
        ModelError: they are not kept.
    """
    there = kept(folder)
    if epoch not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise ModelError(
            f"{folder}: the weights after epoch {epoch} are not kept (there are: {listed}). Train with keep: [{epoch}]; what "
            f"is trained already is done again up to that epoch."
        )
    return load_model(str(folder), weights=str(folder / there[epoch]["file"]))


def _described(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
