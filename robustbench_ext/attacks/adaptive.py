"""An adaptive attack on a probe: break the prediction and stay undetected, or be wrong with confidence.

A detector that was never attacked says little about attackers who know of it. This attack follows the gradient of
the classifier until the sample is misclassified, and from then on that of the detector's score, going back whenever the
mistake is lost: the selective form of Bryniarski, Hingun, Pachuca, Wang and Carlini, ICLR 2022 (arXiv 2106.15023). So
neither objective drowns the other, and no weight between them needs tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from robustbench_ext.attacks.base import Attack, Passes
from robustbench_ext.attacks.losses import margin
from robustbench_ext.attacks.search import Search
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.observe import Observations, Taps


class Scorer(Protocol):
    """What the attack is to bring down: a differentiable function of logits and features.

    `robustbench_ext.probes.scorer` makes one of a fitted detector (its score) or estimator (minus its log-confidence).
    """

    taps: tuple[str, ...]

    def __call__(self, seen: Observations) -> Tensor:
        """Scores (N,), lower = less suspicious, or more confident."""


@dataclass(frozen=True, kw_only=True)
class Adaptive(Attack):
    """Among misclassified inputs of the threat model, one of lowest score.

    x <- P(x + a d), d the steepest direction of the margin where the sample is classified correctly (or wrong by less than
    `slack`), and of minus the score elsewhere; a falls from eps / 2 to eps / 100 along a cosine, so that first the ball is
    crossed and then the two are balanced. Of all iterates that are misclassified the one of lowest score is returned.

    Args:
        against: in a suite, the label of the detector or estimator to evade, or "classifier" for its own confidence.
        scorer: in Python, the function itself; see `Scorer`.
        steps: of one run.
        restarts: runs from different random points.
        slack: margin in logits from which on the score is followed.
    Cost: steps + 1 forward and backward passes a restart.
    """

    stop: str = "never"  # type: ignore[assignment]  # the first mistake is where the work begins
    against: str = "classifier"
    scorer: Any = field(default=None, compare=False, repr=False)
    steps: int = 100
    restarts: int = 1
    slack: float = 0.1

    name: ClassVar[str] = "adaptive"
    stochastic: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2106.15023"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop != "never":
            raise ConfigError("adaptive: stop must be 'never': the first mistake is where evading begins")
        if self.steps < 1 or self.restarts < 1:
            raise ConfigError(
                f"adaptive: steps = {self.steps}, restarts = {self.restarts}; expected at least 1 of each"
            )
        if self.slack < 0:
            raise ConfigError(f"adaptive: slack = {self.slack}, expected a number >= 0")

    def spec(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scorer"}
        return {"attack": self.name, "version": self.version, **values}

    def cost(self, num_classes: int) -> Passes:
        passes = self.draws * self.restarts
        return Passes(passes * (self.steps + 1) * (1 if self.draws == 1 else 2), passes * (self.steps + 1))

    def _run(self, search: Search) -> None:
        scorer = self.scorer if self.scorer is not None else Confidence()
        if self.scorer is None and self.against != "classifier":
            raise ConfigError(
                f"adaptive: against = '{self.against}' is resolved by a suite that lists it; in Python give scorer= "
                f"robustbench_ext.probes.scorer(fitted detector or estimator)"
            )
        reader = Taps(search.model, scorer.taps)
        threat = search.threat
        for restart in range(self.restarts):
            search.restart()
            if search.done:
                return
            x = threat.random_point(search.x, search.random, step=restart)
            for step in range(self.steps + 1):
                logits, score, gradient = search.gradient_of(x, lambda at: self._objective(search, reader, scorer, at))
                x, gradient = search.submit(x, logits, x, gradient, value=-score)
                if step == self.steps:
                    break
                size = self.eps * (0.01 + 0.49 * (1 + math.cos(math.pi * step / self.steps)) / 2)
                x = threat.project(x + size * threat.steepest(gradient), search.x)

    def _objective(self, search: Search, reader: Taps, scorer: Scorer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, what to climb, and the scores."""
        logits, features = reader(x)
        score = scorer(Observations(logits, search.y, features))
        if not score.requires_grad:
            raise ConfigError(
                f"adaptive: '{self.against}' has no gradient with respect to its inputs, so it cannot be attacked this way"
            )
        lead = margin(logits, search.y)
        # Where one is followed the other's gradient is zero, so one backward pass does for both.
        climb = torch.where(lead > self.slack, -score.to(lead.dtype), lead)
        return logits, climb, score.to(lead.dtype)


class Confidence:
    """Minus the log of the largest probability: brought down, the classifier is confident."""

    taps: tuple[str, ...] = ()

    def __call__(self, seen: Observations) -> Tensor:
        return -torch.log_softmax(seen.logits, dim=1).amax(dim=1)
