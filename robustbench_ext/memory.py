"""Batch sizes that turned out to be too large, remembered, so that a run meets each of them once."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from robustbench_ext.device import empty_cache, is_out_of_memory
from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.files import write_atomically

FOLDER = "batch_sizes"
T = TypeVar("T")


class BatchSizes:
    """How many inputs at a time fit, by model and device, of one run folder; several processes may share it.

    Args:
        wanted: the suite's batch size, with which everything starts.
    """

    def __init__(self, folder: Path, wanted: int) -> None:
        self.folder, self.wanted = folder / FOLDER, wanted

    def of(self, who: str) -> int:
        """The largest batch size that is worth trying."""
        try:
            return max(1, min(self.wanted, int(json.loads(self._path(who).read_text(encoding="utf-8"))["fits"])))
        except (OSError, ValueError, KeyError, TypeError):
            return self.wanted

    def _path(self, who: str) -> Path:
        return self.folder / f"{hashlib.sha256(who.encode()).hexdigest()[:24]}.json"

    def fitting(self, who: str, compute: Callable[[int], T], may_halve: bool = True) -> tuple[T, int | None]:
        """`compute(batch size)`, with half as many inputs at a time whenever memory runs out.

        Args:
            may_halve: false where the result depends on the composition of the batches.

        Returns:
            What it gives, and the batch size it was halved to; None where it fitted at once.

        Raises:
            RobustBenchExtError: a single input does not fit, or the batch size may not be changed.
        """
        size = self.of(who)
        found, fits = fitting(compute, size, may_halve, lambda smaller: self.note(who, smaller))
        return found, None if fits == size else fits

    def note(self, who: str, size: int) -> None:
        """Remember that no more than `size` inputs fit, where that is news."""
        if size < self.of(who):
            text = json.dumps({"who": who, "fits": size, "wanted": self.wanted})
            write_atomically(self._path(who), lambda file: file.write_text(text, encoding="utf-8"))


def fitting(
    compute: Callable[[int], T], size: int, may_halve: bool = True, halved: Callable[[int], None] = lambda size: None
) -> tuple[T, int]:
    """`compute(size)`, with half the size whenever memory runs out; what it gives, and the size that fitted.

    Args:
        may_halve: see `BatchSizes.fitting`, also for what is raised.
        halved: told each smaller size before it is tried.
    """
    while True:
        failed = _try(compute, size)
        if not isinstance(failed, _Short):
            return failed, size
        # The exception is gone by now, and with it the frames that held on to the memory.
        gc.collect()
        empty_cache()
        if not may_halve:
            raise RobustBenchExtError(
                f"out of memory with {size} inputs at a time ({failed.message}), and this condition's results depend on "
                f"the composition of its batches. Give the suite a smaller batch_size: --set batch_size={max(1, size // 2)}"
            )
        if size == 1:
            raise RobustBenchExtError(
                f"out of memory with a single input: {failed.message}. Use a device with more memory."
            )
        size //= 2
        halved(size)


class _Short:
    def __init__(self, message: str) -> None:
        self.message = message


def _try(compute: Callable[[int], Any], size: int) -> Any:
    try:
        return compute(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _Short(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no memory'}")
