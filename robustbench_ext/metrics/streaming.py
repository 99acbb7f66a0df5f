"""Expected calibration error of any number of samples in memory that holds only the bins.

The same bins and the same value as `calibration.ece`, without its bootstrap: counts, confidences and hits of each bin are
all that is kept, so evaluations of millions of samples, or on several machines, add up.
"""

from __future__ import annotations

import numpy as np

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.calibration import BINS
from robustbench_ext.metrics.estimate import require

_CHUNK = 1 << 16  # samples at a time: what stays in the cache


class StreamingCalibration:
    """Adds up (confidence, correct) batches; `ece` and `mce` at any time.

    Args:
        bins: equal-width, right-closed: (0, 1/M], (1/M, 2/M], ...; 0 belongs to the first, 1 to the last.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 1:
            raise DataError(f"calibration: bins = {bins}, expected at least 1")
        self.bins = bins
        self.count = np.zeros(bins)
        self.confidence = np.zeros(bins)
        self.hits = np.zeros(bins)
        self._upper = np.append(np.linspace(0, 1, bins + 1)[1:-1], np.inf)
        self._lower = np.append(-np.inf, self._upper[:-1])

    def update(self, confidence: np.ndarray, correct: np.ndarray) -> StreamingCalibration:
        """Add confidences (n,) in [0, 1] and whether their predictions were correct, bool (n,)."""
        require("streaming calibration", confidence=confidence, correct=correct)
        low, high = float(confidence.min()), float(confidence.max())
        if low < 0 or high > 1:
            raise DataError(f"confidences span [{low:.3g}, {high:.3g}], expected [0, 1]")
        for start in range(0, len(confidence), _CHUNK):
            c = np.asarray(confidence[start : start + _CHUNK], dtype=np.float64)
            hit = np.asarray(correct[start : start + _CHUNK], dtype=bool)
            index = self._bins(c)
            self.count += np.bincount(index, minlength=self.bins)
            self.confidence += np.bincount(index, weights=c, minlength=self.bins)
            self.hits += np.bincount(index[hit], minlength=self.bins)
        return self

    def _bins(self, confidence: np.ndarray) -> np.ndarray:
        """The bin of each confidence: by arithmetic, put right where that rounds across an edge."""
        index = np.minimum((confidence * self.bins).astype(np.intp), self.bins - 1)
        index -= confidence <= self._lower[index]
        index += confidence > self._upper[index]
        return index

    def merge(self, other: StreamingCalibration) -> StreamingCalibration:
        """Add what another one has seen, with the same bins."""
        if other.bins != self.bins:
            raise DataError(f"calibration: {other.bins} bins cannot be added to {self.bins}")
        self.count += other.count
        self.confidence += other.confidence
        self.hits += other.hits
        return self

    def _gaps(self) -> np.ndarray:
        if not self.count.sum():
            raise DataError("streaming calibration: nothing was added yet")
        return np.abs(self.hits - self.confidence)

    def ece(self) -> float:
        """sum_b n_b/N |accuracy_b - confidence_b|."""
        return float(self._gaps().sum() / self.count.sum())

    def mce(self) -> float:
        """max_b |accuracy_b - confidence_b| over bins that hold samples."""
        there = self.count > 0
        return float((self._gaps()[there] / self.count[there]).max())
