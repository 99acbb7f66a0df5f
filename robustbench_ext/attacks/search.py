"""The bookkeeping that every attack shares: passes, verdicts, the best input so far, early retirement.

An attack sees only the samples that still stand. It asks for logits or gradients at candidate inputs, submits the
candidates with their logits, and gets back its own state without the samples that have just been broken. So no
attack repeats a forward pass to find out what it achieved, and no pass is spent on a sample that is done.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robustbench_ext.attacks.losses import Loss, cross_entropy
from robustbench_ext.attacks.threat import Threat, flat_norm, per_sample
from robustbench_ext.models.contract import check_logits
from robustbench_ext.randomness import SampleRandom

Stop = Literal["broken", "never"]


class Search:
    """One batch under attack.

    Attributes (of the samples still standing, n of N):
        x, y: clean inputs (n, C, H, W) and labels (n,).
        random: their random stream.
        threat: the threat model.
    Attributes (of all N samples):
        best, best_logits: the best candidate submitted so far, and its logits. A misclassified candidate beats any
            correctly classified one; among equals the higher cross-entropy wins.
        broken: bool (N,), misclassified at `best`.
        wrong_clean: bool (N,), misclassified without an attack.
        clean_logits, labels: (N, K) and (N,).
        forwards, backwards: passes spent, int32 (N,).
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        random: SampleRandom,
        stop: Stop,
        clean_logits: Tensor,
    ) -> None:
        self.model, self.threat, self.stop = model, threat, stop
        self.clean_logits, self.labels = clean_logits, y
        self._all = (x, y, random)
        self.best, self.best_logits = x.clone(), clean_logits.clone()
        self.broken = clean_logits.argmax(dim=1) != y
        self._best_loss = cross_entropy(clean_logits, y)
        self.forwards = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        self.backwards = torch.zeros_like(self.forwards)
        # Misclassified without an attack: nothing to break, whatever `stop` says.
        self.wrong_clean = self.broken.clone()
        self.restart()

    def restart(self) -> None:
        """Take up again every sample that is not done: those not broken, or with stop="never" all but the clean errors."""
        done = self.broken if self.stop == "broken" else self.wrong_clean
        self._activate((~done).nonzero()[:, 0])

    def _activate(self, index: Tensor) -> None:
        x, y, random = self._all
        self._index = index
        self.x, self.y, self.random = x[index], y[index], random.select(index)

    @property
    def index(self) -> Tensor:
        """Positions of the standing samples in the batch, int64 (n,)."""
        return self._index

    @property
    def done(self) -> bool:
        """Whether no sample is left to attack."""
        return len(self._index) == 0

    def logits(self, candidates: Tensor, rows: Tensor | None = None) -> Tensor:
        """A forward pass of the standing samples, or of those of them that `rows` (n,) bool chooses."""
        self.forwards[self._index if rows is None else self._index[rows]] += 1
        with torch.no_grad():
            return check_logits(self.model(candidates), len(candidates))

    def gradient(self, candidates: Tensor, loss: Loss, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A forward and a backward pass: logits (n, K), losses (n,), gradient of each sample's loss (n, C, H, W).

        With `rows` (n,) bool, of those standing samples only.
        """
        index = self._index if rows is None else self._index[rows]
        labels = self.y if rows is None else self.y[rows]
        self.forwards[index] += 1
        self.backwards[index] += 1
        candidates = candidates.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = check_logits(self.model(candidates), len(candidates))
            losses = loss(logits, labels)
            (gradient,) = torch.autograd.grad(losses.sum(), candidates)
        return logits.detach(), losses.detach(), gradient

    def submit(self, candidates: Tensor, logits: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Record candidates with their logits; return `state`, each (n, ...), without the samples that are now done."""
        index = self._index
        loss = cross_entropy(logits, self.y)
        wrong = logits.argmax(dim=1) != self.y
        was_broken = self.broken[index]
        better = (wrong & ~was_broken) | ((wrong == was_broken) & (loss > self._best_loss[index]))
        rows = index[better]
        self.best[rows] = candidates.detach()[better]
        self.best_logits[rows] = logits[better]
        self._best_loss[rows] = loss[better]
        self.broken[rows] = wrong[better]
        if self.stop == "broken" and bool(wrong.any()):
            return self._retire(wrong, *state)
        return state

    def judge(self, candidates: Tensor, logits: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Like `submit`, for candidates that may lie outside the ball (minimum-norm attacks): those do not count."""
        inside = flat_norm(candidates - self.x, self.threat.norm) <= self.threat.eps
        if not bool(inside.any()):
            return state
        # An input outside the ball is replaced by one that changes nothing: the best so far, with its own logits.
        index = self._index
        candidates = torch.where(per_sample(inside, candidates), candidates, self.best[index])
        return self.submit(candidates, torch.where(inside[:, None], logits, self.best_logits[index]), *state)

    def _retire(self, gone: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        keep = (~gone).nonzero()[:, 0]
        self._index = self._index[keep]
        self.x, self.y, self.random = self.x[keep], self.y[keep], self.random.select(keep)
        return tuple(tensor[keep] for tensor in state)
