"""MLflow: a server, a database, or a folder, which gets a SQLite database and the files beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustbench_ext.errors import MissingExtraError
from robustbench_ext.trackers.base import Tracker

MOST = 1000, 100  # metrics, and parameters or tags, that one request may hold


class MLflow(Tracker):
    """One MLflow run per run folder, in the experiment `$MLFLOW_EXPERIMENT_NAME`, or the one named as the suite.

    Args:
        where: a tracking URI (`http://...`, `sqlite:///...`, `databricks`), or a folder; by default `$MLFLOW_TRACKING_URI`, or
            MLflow's own default.
        rows: "headline" or "all".
    """

    name = "mlflow"

    def __init__(self, where: str = "", rows: str = "headline") -> None:
        super().__init__(where, rows)
        try:
            import mlflow
        except ImportError:
            raise MissingExtraError("tracker mlflow: pip install 'robustbench-ext[mlflow]'") from None
        self._mlflow = mlflow
        self._client: Any = None
        self._run = ""

    def _open(
        self, known: str | None, folder: Path, told: Mapping[str, str | int], made_with: Mapping[str, str]
    ) -> str:
        self._client, artifacts = self._connect()
        found = self._found(known)
        if found is None:
            run = self._client.create_run(
                self._experiment(str(told["suite"]), artifacts), run_name=folder.resolve().name
            )
            found = str(run.info.run_id)
        else:
            self._client.update_run(found, status="RUNNING")
        self._run = found
        entities = self._mlflow.entities
        self._send(params=[entities.Param(key, str(value)) for key, value in told.items()])
        self._tag({**made_with, "folder": str(folder)})
        return found

    def _connect(self) -> tuple[Any, str | None]:
        """A client, and where the files go; None leaves that to the server."""
        where = self._where
        if not where or "://" in where or where.startswith(("file:", "databricks", "uc")):
            return self._mlflow.MlflowClient(tracking_uri=where or None), None
        folder = Path(where).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        client = self._mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        return client, (folder / "artifacts").as_uri()

    def _found(self, known: str | None) -> str | None:
        """The run of that id, if the server still has it."""
        if known is None:
            return None
        try:
            run = self._client.get_run(known)
        except self._mlflow.MlflowException:
            return None
        return known if run.info.lifecycle_stage == "active" else None

    def _experiment(self, suite: str, artifacts: str | None) -> str:
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        name = MLFLOW_EXPERIMENT_NAME.get() or suite
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifacts))

    def _send(self, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        for kind, all_, most in (("metrics", metrics, MOST[0]), ("params", params, MOST[1]), ("tags", tags, MOST[1])):
            for start in range(0, len(all_), most):
                self._client.log_batch(self._run, **{kind: all_[start : start + most]})

    def _metrics(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._send(metrics=[self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()])

    def _point(self, family: str, values: Mapping[str, float], step: int) -> None:
        self._metrics({f"{family}/{name}": value for name, value in values.items()}, step)

    def _results(self, values: Mapping[str, float]) -> None:
        self._metrics(values, 0)

    def _tag(self, tags: Mapping[str, str]) -> None:
        self._send(tags=[self._mlflow.entities.RunTag(key, value) for key, value in tags.items()])

    def _keep(self, files: Sequence[Path]) -> None:
        for file in files:
            self._client.log_artifact(self._run, str(file))

    def _close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
