"""Forward passes without gradients, through a fused copy of a frozen model. On the CPU it is two to three times as fast.

Score-based attacks ask for thousands of forward passes of the same frozen network. TorchScript can fold batch norms into
convolutions, keep activations in the layout that oneDNN likes and pack the weights once. Its outputs differ from the
model's by rounding, and tracing takes a model at its word: branches that depend on the input are recorded as they went.
So the copy is used to search only. It must agree with the model on other inputs than it was traced with, and on those of
every later `check`; where it once does not, or fails, the model itself is used from then on. Verdicts are the model's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustbench_ext.models.contract import check_logits

_COPIES: dict[int, Inference] | None = None
RTOL = 1e-3  # of the largest logit: far above rounding, far below what a wrong branch does


class Inference:
    """Logits of a frozen model in evaluation mode, for searching.

    Args:
        model: in evaluation mode, its parameters frozen.
        x: inputs (n, C, H, W) to trace it with and to compare on; more than one, so that no size of 1 is taken for granted.
    Attributes:
        fused: whether the copy is in use.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        self._copy = self._make(model, x)
        # Other inputs than it was traced with: numbers that pass through Python are frozen into a trace as they were.
        self.check(0.9 * x.flip(0) + 0.05)

    @property
    def fused(self) -> bool:
        """Whether the fused copy is in use."""
        return self._copy is not None

    @staticmethod
    def _make(model: nn.Module, x: Tensor) -> torch.nn.Module | None:
        if x.device.type != "cpu" or len(x) < 2:
            return None
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                traced = torch.jit.trace(model, x, check_trace=False)
                copy: torch.nn.Module = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        except Exception:  # whatever tracing trips over, the model itself still works
            return None
        return copy

    def check(self, x: Tensor) -> None:
        """Compare the copy with the model on x, and give it up where they differ."""
        if self._copy is None:
            return
        with torch.no_grad():
            own = check_logits(self.model(x), len(x))
        found = self(x)
        if self._copy is not None and float((found - own).abs().max()) > RTOL * float(own.abs().max().clamp_min(1.0)):
            self._copy = None

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (n, K), within rounding of the model's own."""
        with torch.no_grad():
            if self._copy is not None:
                try:
                    return check_logits(self._copy(x), len(x))
                except Exception:  # a batch size that the trace took for granted, say
                    self._copy = None
            return check_logits(self.model(x), len(x))


@contextmanager
def shared_copies() -> Iterator[None]:
    """Inside the block every model gets one copy, whoever asks for it; its weights must not change meanwhile."""
    global _COPIES
    outer = _COPIES
    _COPIES = {} if outer is None else outer
    try:
        yield
    finally:
        _COPIES = outer


def inference(model: nn.Module, x: Tensor) -> Inference:
    """The copy of `model`, compared with it on x; made now if there is none yet."""
    known = (_COPIES or {}).get(id(model))
    if known is not None and known.model is model:
        known.check(x)
        return known
    made = Inference(model, x)
    if _COPIES is not None:
        _COPIES[id(model)] = made
    return made
