"""What the engine leaves to the task: how models are loaded and trained, what is observed of them, what probes see of that.

A suite's data decides the task. Everything else - cells, keys, chunks, records, resuming - is the same for both
(`robustbench_ext.evaluate`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from robustbench_ext.checks import Check
from robustbench_ext.conditions import Condition
from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.errors import ConfigError
from robustbench_ext.files import fits
from robustbench_ext.models import LoadedModel, checkpoints
from robustbench_ext.probes import Probe
from robustbench_ext.suite import ModelEntry

if TYPE_CHECKING:
    from robustbench_ext.evaluate import Context
    from robustbench_ext.own_metrics import OwnMetric

Columns = dict[str, np.ndarray]
FINISHED = "model.json"  # in a model's folder: written last


@dataclass(frozen=True)
class Training:
    """A model that a run trains itself.

    Attributes:
        spec: of its network.
        folder: where its weights are kept, or will be; `model.json` in it marks it as finished.
        needs: models of the suite that must be finished before it.
        epochs: of the whole training; 0 where it has none.
        architecture: of a classifier, `defenses.trainer.Architecture`.
        fresh: gives the network with fresh weights.
        run: trains into the folder; its argument is called with every epoch's row of the curve.
        keep: epochs after which the weights are kept as well; see `robustbench_ext.models.checkpoints`.
        data: of a classifier, what it is trained on, or its members were: the suite's data, perhaps with another train split.
    """

    spec: str
    folder: Path
    epochs: int
    fresh: Callable[[], nn.Module]
    run: Callable[[Callable[[dict[str, Any]], None]], None]
    needs: tuple[str, ...] = ()
    architecture: Any = None
    keep: tuple[int, ...] = ()
    data: Any = None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train: it is finished, its weights are those that were written, nothing to keep
        is missing.
        """
        return self.is_whole and not checkpoints.missing(self.folder, self.keep)

    @property
    def is_whole(self) -> bool:
        """Whether the trained model is there, and its weights are those that were written."""
        try:
            described = json.loads((self.folder / FINISHED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        # What is fitted instead of trained has no weights, and earlier versions did not seal them.
        sealed = described.get("weights")
        return sealed is None or fits(self.folder / sealed["file"], sealed)

    def discard_damaged(self) -> bool:
        """Forget a finished model whose files are damaged, so that it is trained again; whether there was one."""
        damaged = (self.folder / FINISHED).is_file() and not self.is_whole
        if damaged:
            (self.folder / FINISHED).unlink()
        return damaged


class Task(ABC):
    """Classification or regression, on one dataset."""

    estimator: ClassVar[type[Probe]]
    preflight_version: ClassVar[str | int]
    preflight_n: ClassVar[int]

    def __init__(self, data: Dataset) -> None:
        self.data = data

    # Before anything runs --------------------------------------------------------------------------------------------

    @abstractmethod
    def conditions(self, entries: Sequence[str | Mapping[str, Any]]) -> list[Condition]:
        """The conditions of a suite."""

    def metrics(self, specs: Sequence[str]) -> list[OwnMetric]:
        """The metrics of the user's own that a suite names."""
        if specs:
            raise ConfigError(
                f"metrics: {', '.join(specs)}: metrics of your own are functions of logits and labels, and this suite has "
                f"data of a {self.data.task} task"
            )
        return []

    def refuse(self, context: Context) -> None:  # noqa: B027 - classification refuses nothing
        """Raise ConfigError where a suite asks for what makes no sense for this task, or for one of its models."""

    # Models ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def training(self, entry: ModelEntry, models: Path, others: Mapping[str, Training]) -> Training:
        """What it takes to train an entry with `train`, or to make one with `make`, into a folder under `models`.

        `others` are the entries before it that the run trains or makes.
        """

    @abstractmethod
    def load(self, entry: ModelEntry) -> LoadedModel:
        """An entry with `spec`."""

    @abstractmethod
    def adopt(self, module: nn.Module, entry: ModelEntry) -> LoadedModel:
        """A module that was handed over."""

    @abstractmethod
    def load_other(self, spec: str) -> LoadedModel:
        """A model that is no entry: a checkpoint's folder, or what was trained into one."""

    def preflight_samples(self) -> Any:
        """What the preflight looks at, for its key."""
        return self.data["test"].fingerprint()

    @abstractmethod
    def preflight(self, model: nn.Module, seed: int, n: int) -> list[Check]:
        """May this model's numbers be trusted? It looks at n samples at once, `preflight_n` where memory allows."""

    # Cells -----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def targets(self, samples: Split, rows: slice) -> np.ndarray:
        """Labels int64 or targets float64, (n,)."""

    @abstractmethod
    def inputs(self, samples: Split, rows: slice) -> Tensor:
        """The samples as they are, float32 (n, ...)."""

    @abstractmethod
    def clean_outputs(self, columns: Sequence[Columns]) -> Tensor:
        """What the records of clean cells say of the model's outputs, for conditions that start from them."""

    @abstractmethod
    def reader(self, model: nn.Module, taps: Sequence[str]) -> Any:
        """What `observe` reads outputs and features with; made once per model."""

    @abstractmethod
    def observe(self, reader: Any, x: Tensor, targets: np.ndarray, batch_size: int) -> Columns:
        """What the model says of inputs: the columns of a record beside `id` and those that the condition made."""

    def check_clean(self, model: str, columns: Columns) -> None:  # noqa: B027
        """Raise DataError where clean records show that data and model do not belong together."""

    def preview(self, x: Tensor) -> Columns:
        """Columns that show a reader the first inputs; none where there is nothing to look at."""
        return {}

    @abstractmethod
    def seen(self, columns: Sequence[Columns]) -> Any:
        """What probes see of the joined records: `models.Observations`, or `uq.Samples`."""

    @abstractmethod
    def progress(self, columns: Columns) -> dict[str, Any]:
        """What a progress line says of a cell."""
