"""What happens in a run, told to whoever wants to follow it: experiment trackers, chat bots, dashboards of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_ext.engine import RunSummary
    from robustbench_ext.suite import Suite


class Callback:
    """Follows a run; override what is of interest. Hooks are called in the run's own process, in the order of events.

    An exception in a hook ends neither the run nor the other callbacks: it is said once, and that callback hears no more.
    """

    name = "callback"

    def on_run_start(self, suite: Suite, folder: Path) -> None:
        """The suite is resolved and valid, the folder is there; nothing has been computed."""

    def on_cell(self, done: int, total: int, what: str, facts: Mapping[str, Any]) -> None:
        """A training run, a preflight or a cell is done.

        Args:
            done, total: of this wave of jobs (training first, then everything else).
            what: the job's title, such as `trades · pgd 8/255`.
            facts: what the progress line says: `correct` and `n`, `rmse`, `epochs`, `seconds`; `error` where it failed.
        """

    def on_epoch(self, model: str, row: Mapping[str, Any]) -> None:
        """A model in training has finished another epoch; `row` is that of its curve."""

    def on_run_end(self, summary: RunSummary) -> None:
        """All results are computed and written to `summary.folder`."""

    def on_report(self, files: Mapping[str, Path]) -> None:
        """The report's files are written, by kind: `html`, `markdown`. Only the command line writes a report by itself."""

    def close(self) -> None:
        """The run is over, however it ended; called once, also after an error or an interruption."""


class Callbacks(Callback):
    """Several callbacks as one. One that raises is said and left out from then on."""

    def __init__(self, callbacks: Sequence[Callback], say: Callable[[str], None]) -> None:
        self._callbacks, self._say = list(callbacks), say

    def _tell(self, hook: str, *args: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, hook)(*args)
            except Exception as error:  # foreign code: a tracker that is down must not cost a night of attacks
                self._callbacks.remove(callback)
                if hook != "close":
                    with suppress(Exception):  # it has said what was wrong already
                        callback.close()
                self._say(
                    f"{callback.name}: {hook} raised {type(error).__name__}: {error}. The run goes on without {callback.name}."
                )

    def on_run_start(self, suite: Suite, folder: Path) -> None:
        self._tell("on_run_start", suite, folder)

    def on_cell(self, done: int, total: int, what: str, facts: Mapping[str, Any]) -> None:
        self._tell("on_cell", done, total, what, facts)

    def on_epoch(self, model: str, row: Mapping[str, Any]) -> None:
        self._tell("on_epoch", model, row)

    def on_run_end(self, summary: RunSummary) -> None:
        self._tell("on_run_end", summary)

    def on_report(self, files: Mapping[str, Path]) -> None:
        self._tell("on_report", files)

    def close(self) -> None:
        self._tell("close")
