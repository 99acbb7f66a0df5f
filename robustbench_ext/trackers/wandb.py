"""Weights & Biases, online or, with WANDB_MODE=offline, into files that `wandb sync` sends later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from robustbench_ext.errors import MissingExtraError
from robustbench_ext.trackers.base import Tracker

PROJECT = "robustbench-ext"


class WandB(Tracker):
    """One W&B run per run folder; its local files lie in the run folder, or in `$WANDB_DIR`.

    Args:
        where: PROJECT or ENTITY/PROJECT; by default `$WANDB_PROJECT`, or robustbench-ext.
        rows: "headline" or "all".
    """

    name = "wandb"
    allowed = "_"  # in its queries a dot leads into an object

    def __init__(self, where: str = "", rows: str = "headline") -> None:
        super().__init__(where, rows)
        try:
            import wandb
        except ImportError:
            raise MissingExtraError("tracker wandb: pip install 'robustbench-ext[wandb]'") from None
        self._wandb = wandb
        self._run: Any = None
        self._families: set[str] = set()

    def _open(
        self, known: str | None, folder: Path, told: Mapping[str, str | int], made_with: Mapping[str, str]
    ) -> str:
        entity, _, project = self._where.rpartition("/")
        name = known or uuid4().hex[:8]
        self._run = self._wandb.init(
            entity=entity or None,
            project=project or os.environ.get("WANDB_PROJECT") or PROJECT,
            id=name,
            resume="allow",
            reinit="create_new",  # a run of the caller's own stays what it is
            name=folder.resolve().name,
            dir=os.environ.get("WANDB_DIR") or str(folder),
            job_type="evaluation",
        )
        self._run.config.update({**told, **made_with}, allow_val_change=True)
        self._families.clear()
        return name

    def _point(self, family: str, values: Mapping[str, float], step: int) -> None:
        axis = f"{family}/step"
        if family not in self._families:
            # A step of its own: W&B's is one for all curves, and never goes back.
            self._families.add(family)
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{family}/*", step_metric=axis)
        self._run.log({**{f"{family}/{name}": value for name, value in values.items()}, axis: step})

    def _results(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def _tag(self, tags: Mapping[str, str]) -> None:
        self._run.summary.update(dict(tags))

    def _keep(self, files: Sequence[Path]) -> None:
        for file in files:
            artifact = self._wandb.Artifact(
                f"{self._run.id}-{file.name}", type="report" if file.stem == "report" else "results"
            )
            artifact.add_file(str(file))
            self._run.log_artifact(artifact)
            if file.suffix == ".html":
                self._run.log({file.stem: self._wandb.Html(str(file), inject=False)})

    def _close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
