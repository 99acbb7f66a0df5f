"""TensorBoard: event files in the run folder, or in a folder of many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustbench_ext.errors import MissingExtraError
from robustbench_ext.trackers.base import Tracker


class TensorBoard(Tracker):
    """Curves and results as scalars, the report and the state of the run as text, parameters and results as hparams.

    Args:
        where: a folder that gets one sub-folder per run; by default `tensorboard` in the run folder itself.
        rows: "headline" or "all".
    """

    name = "tensorboard"

    def __init__(self, where: str = "", rows: str = "headline") -> None:
        super().__init__(where, rows)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError("tracker tensorboard: pip install 'robustbench-ext[tensorboard]'") from None
        self._make: Any = SummaryWriter
        self._writer: Any = None
        self._parameters: dict[str, str | int] = {}

    def _open(
        self, known: str | None, folder: Path, told: Mapping[str, str | int], made_with: Mapping[str, str]
    ) -> str:
        where = Path(known) if known is not None else self._free(folder)
        self._writer = self._make(str(where))
        self._parameters = dict(told)
        lines = [f"| {key} | {value} |" for key, value in {**told, **made_with}.items()]
        self._writer.add_text("parameters", "\n".join(["| | |", "| --- | --- |", *lines]))
        self._status("running")
        return str(where)

    def _free(self, folder: Path) -> Path:
        """A folder that no other run writes to: another suite in the same run folder, or another folder of that name."""
        first = Path(self._where).expanduser() / folder.resolve().name if self._where else folder / "tensorboard"
        found, number = first, 1
        while found.exists():
            number += 1
            found = first.with_name(f"{first.name}-{number}")
        return found.resolve()

    def _status(self, text: str) -> None:
        self._writer.add_text("status", text)
        self._writer.flush()

    def _point(self, family: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{family}/{name}", value, step)
        self._writer.flush()

    def _results(self, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        for name, value in values.items():
            self._writer.add_scalar(name, value, 0)
        # As `add_hparams` does, which would write the scalars once more, into a folder of their own.
        shown = {
            name: value for name, value in values.items() if name.startswith("results/") and name.endswith("/value")
        }
        for part in hparams(self._parameters, shown):
            self._writer.file_writer.add_summary(part)

    def _tag(self, tags: Mapping[str, str]) -> None:
        for name, text in tags.items():
            self._writer.add_text(name, text)

    def _keep(self, files: Sequence[Path]) -> None:
        """It holds no files: the report is shown as text, the others lie in the run folder."""
        for file in files:
            if file.suffix == ".md":
                self._writer.add_text(file.stem, file.read_text(encoding="utf-8"))

    def _close(self, finished: bool) -> None:
        self._status("finished" if finished else "interrupted")
        self._writer.close()
