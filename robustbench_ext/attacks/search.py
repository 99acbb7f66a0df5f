"""The bookkeeping that every attack shares: passes, verdicts, the best input so far, early retirement.

An attack sees only the samples that still stand. It asks for logits or gradients at candidate inputs, submits the
candidates with their logits, and gets back its own state without the samples that have just been broken. So no
attack repeats a forward pass to find out what it achieved, and no pass is spent on a sample that is done. Elsewhere than on
the CPU a sample that is done may stay for a few passes, since asking who is done means to wait (`Search.due`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from robustbench_ext.attacks.losses import Loss, cross_entropy, get_loss, get_targeted_loss
from robustbench_ext.attacks.threat import Threat, flat_norm, per_sample
from robustbench_ext.device import float32
from robustbench_ext.models.contract import check_logits
from robustbench_ext.models.gradients import InputGradients
from robustbench_ext.models.inference import Inference, inference
from robustbench_ext.randomness import SampleRandom

Stop = Literal["broken", "never"]
Keep = Literal["loss", "norm"]


def patience(device: torch.device) -> int:
    """Submissions, at most, between two looks at which samples are broken.

    On the CPU every one is followed by a look: it costs nothing. Elsewhere a look waits for the device, and a broken sample
    that stays for some steps costs passes; see `Search.due`.
    """
    return 1 if device.type == "cpu" else 8


class Search:
    """One batch under attack.

    Attributes (of the samples still standing, n of N):
        x, y: clean inputs (n, C, H, W) and labels (n,).
        target: the class that each is to become, (n,); None for an untargeted attack.
        random: their random stream.
        threat: the threat model.
    Attributes (of all N samples):
        best, best_logits: the best candidate submitted so far, and its logits. One that reaches the goal (the target;
            untargeted: any mistake) beats one that does not, then a misclassified one beats a correct one. Among equals
            the higher loss wins, or with keep="norm" the smaller perturbation.
        broken, reached: bool (N,), misclassified at `best`; the goal is reached at `best`.
        wrong_clean: bool (N,), misclassified without an attack.
        clean_logits, labels: (N, K) and (N,).
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
        *,
        target: Tensor | None = None,
        keep: Keep = "loss",
        draws: int = 1,
        precision: str = "float32",
    ) -> None:
        self.model, self.threat, self.stop = model, threat, stop
        self.clean_logits, self.labels = clean_logits, y
        self._all = (x, y, random, target)
        self._keep, self._draws = keep, draws
        self._precision, self._rough = precision, precision != "float32"
        # Submissions since the last look, until the next one, and at most until one.
        self._since, self._wait, self._longest = 0, 1, 1 if self._looks_twice else patience(x.device)
        self.best, self.best_logits = x.clone(), clean_logits.clone()
        # Misclassified without an attack: nothing to break, whatever `stop` says.
        self.wrong_clean = clean_logits.argmax(dim=1) != y
        self._rank = self._ranks(clean_logits, y, target)
        self._start_loss = self._loss(clean_logits, y, target)
        self._score = self._start_loss.clone() if keep == "loss" else torch.full_like(self._start_loss, -torch.inf)
        self._late = self._start_loss.clone()
        self._marked = torch.full_like(self._start_loss, torch.nan)
        self._forwards = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        self._backwards = torch.zeros_like(self._forwards)
        # Passes of all that stand, not yet written down: one number instead of an indexed addition a pass.
        self._open = [0, 0]
        self._inference: Inference | None = None
        self._index = torch.zeros(0, dtype=torch.int64, device=x.device)
        self.restart()

    @staticmethod
    def _ranks(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        """0: correct; 1: a mistake, but not the one that is wanted; 2: the goal."""
        found = logits.argmax(dim=1)
        if target is None:
            return 2 * (found != y).to(torch.int8)
        return (found != y).to(torch.int8) + ((found == target) & (found != y)).to(torch.int8)

    @staticmethod
    def _loss(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        return cross_entropy(logits, y) if target is None else -cross_entropy(logits, target)

    @property
    def broken(self) -> Tensor:
        """Whether the best candidate is misclassified, bool (N,)."""
        return self._rank > 0

    @property
    def reached(self) -> Tensor:
        """Whether the best candidate is what the attack wants, bool (N,)."""
        return self._rank > 1

    @property
    def forwards(self) -> Tensor:
        """Forward passes spent on each sample, int32 (N,)."""
        self._settle()
        return self._forwards

    @property
    def backwards(self) -> Tensor:
        """Backward passes spent on each sample, int32 (N,)."""
        self._settle()
        return self._backwards

    def _count(self, rows: Tensor | None, backwards: int) -> None:
        if rows is None:
            self._open[0] += self._draws
            self._open[1] += backwards
        else:
            index = self._index[rows]
            self._forwards[index] += self._draws
            self._backwards[index] += backwards

    def _settle(self) -> None:
        if self._open != [0, 0]:
            self._forwards[self._index] += self._open[0]
            self._backwards[self._index] += self._open[1]
            self._open = [0, 0]

    def restart(self) -> None:
        """Take up again every sample that is not done: those not broken, or with stop="never" all but the clean errors."""
        done = self.wrong_clean.clone()
        if self.stop == "broken":
            done |= self.reached
        target = self._all[3]
        if target is not None:
            done |= target == self.labels  # nothing to reach
        self._activate((~done).nonzero()[:, 0])

    def _activate(self, index: Tensor) -> None:
        x, y, random, target = self._all
        self._settle()
        self._index = index
        self.x, self.y, self.random = x[index], y[index], random.select(index)
        self.target = None if target is None else target[index]

    @property
    def index(self) -> Tensor:
        """Positions of the standing samples in the batch, int64 (n,)."""
        return self._index

    @property
    def done(self) -> bool:
        """Whether no sample is left to attack."""
        return len(self._index) == 0

    def objective(self, name: str) -> Loss:
        """The loss of that name, to be maximised: towards any mistake, or towards the target where there is one.

        It belongs to the samples that stand at the moment.
        """
        target = self.target
        if target is None:
            return get_loss(name)
        towards = get_targeted_loss(name)
        return lambda logits, labels: towards(logits, labels, target)

    def logits(self, candidates: Tensor, rows: Tensor | None = None) -> Tensor:
        """A forward pass of the standing samples, or of those of them that `rows` (n,) bool chooses.

        For a randomised model: the logarithm of the probabilities' mean over `draws` passes.
        """
        self._count(rows, 0)
        with torch.no_grad():
            return mean_logits(self.model, candidates, self._draws)

    def scores(self, candidates: Tensor) -> Tensor:
        """Logits of the standing samples that may be off by rounding, faster than `logits`: to search with.

        What looks broken by them is to be confirmed: see `confirm`.
        """
        if self._inference is None:
            return self.logits(candidates)
        self._count(None, 0)
        return self._inference(candidates)

    def search_fused(self) -> None:
        """Let `scores` use a fused copy of the model from now on: worth it for hundreds of passes."""
        if self._draws == 1 and not self.done:
            self._inference = inference(self.model, self.x)

    def confirm(
        self, rows: Tensor, candidates: Tensor, logits: Tensor, *state: Tensor, look: bool | None = None
    ) -> tuple[Tensor, ...]:
        """Submit those candidates that `rows` (n,) bool chooses, after a pass of the model itself if need be.

        Args:
            candidates: (n, C, H, W); logits: (n, K), from `scores`. The model's own are written into the chosen rows.
            look: as of `submit`.
        Returns `state` without the samples that are now done.
        """
        # Where looks are rare, this question would be one; what changes nothing may as well be submitted.
        if self._longest == 1 and not bool(rows.any()):
            return state
        index = self._index
        if self._inference is not None and self._inference.fused:
            logits[rows] = self.logits(candidates[rows], rows)
        # Inputs that are not chosen are replaced by what changes nothing: the best so far, with its own logits.
        candidates = torch.where(per_sample(rows, candidates), candidates, self.best[index])
        return self.submit(candidates, torch.where(rows[:, None], logits, self.best_logits[index]), *state, look=look)

    def gradient(self, candidates: Tensor, loss: Loss, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A forward and a backward pass: logits (n, K), losses (n,), gradient of each sample's loss (n, C, H, W).

        With `rows` (n,) bool, of those standing samples only. For a randomised model losses and gradients are means over
        `draws` passes (expectation over transformations, Athalye et al. 2018, arXiv 1802.00420).
        """
        labels = self.y if rows is None else self.y[rows]

        def evaluate(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.model(at)
            losses = loss(check_logits(logits, len(at)), labels)
            return logits, losses, losses

        return self.gradient_of(candidates, evaluate, rows)

    def gradient_of(
        self,
        candidates: Tensor,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like `gradient`, for whatever can be computed in one pass of the model.

        Args:
            evaluate: maps candidates to logits (n, K), the quantity (n,) whose gradient is wanted, and one to return (n,).
        """
        self._count(rows, self._draws)
        candidates = candidates.detach().requires_grad_(True)
        device = candidates.device.type
        found = []
        for _ in range(self._draws):
            with torch.enable_grad(), InputGradients(), self._roughly(device):
                logits, objective, value = evaluate(candidates)
                (gradient,) = torch.autograd.grad(objective.float().sum(), candidates)
            logits = check_logits(logits.detach(), len(candidates))
            found.append((logits, value.detach().float(), gradient))
        if self._draws == 1:
            return found[0]
        each, values, gradient = (torch.stack(parts) for parts in zip(*found, strict=True))
        return average_prediction(each), values.mean(dim=0), gradient.mean(dim=0)

    @contextmanager
    def _roughly(self, device: str) -> Iterator[None]:
        """A pass at the precision that gradients are taken at."""
        if self._precision == "tf32":
            with float32(tf32=True):
                yield
        elif self._rough:
            with torch.autocast(device, torch.bfloat16):
                yield
        else:
            yield

    def submit(
        self, candidates: Tensor, logits: Tensor, *state: Tensor, value: Tensor | None = None, look: bool | None = None
    ) -> tuple[Tensor, ...]:
        """Record candidates with their logits; return `state`, each (n, ...), without the samples that are now done.

        Args:
            value: (n,), replaces the loss as what is highest in the best of several candidates of equal rank.
            look: whether samples that are done leave now; by default where it is `due`. Until then they stay as they are.
        """
        index = self._index
        rank = self._ranks(logits, self.y, self.target)
        if self._looks_twice and bool((rank > 0).any()):
            # One lucky draw breaks nothing: fresh draws must agree, or the best of many looks would be chance. And what a
            # pass at lower precision says, the model itself must confirm.
            again = rank > 0
            logits = logits.clone()
            logits[again] = self.logits(candidates[again], again)
            rank[again] = torch.minimum(rank[again], self._ranks(logits, self.y, self.target)[again])
        loss = self._loss(logits, self.y, self.target)
        before = self._rank[index]
        if value is not None:
            score = torch.where(rank > 1, value.to(loss.dtype), -torch.inf)
        else:
            score = loss if self._keep == "loss" else -flat_norm(candidates - self.x, self.threat.norm)
        better = (rank > before) | ((rank == before) & (score > self._score[index]))
        if self._keep == "norm":
            better &= rank > 1
        if self.stop == "broken":
            # What has been reached before and not retired yet stays as it was found, however long a look takes to come.
            open_ = before < 2
            better &= open_
            loss = torch.where(open_, loss, -torch.inf)
        self._write(self.best, index, better, candidates.detach())
        self._write(self.best_logits, index, better, logits)
        self._write(self._score, index, better, score)
        self._write(self._rank, index, better, rank)
        self._late[index] = torch.maximum(self._late[index], loss)
        if self.stop == "broken" and (self.due() if look is None else look):
            reached = self._rank[index] > 1
            if bool(reached.any()):
                self._wait = 1
                return self._retire(reached, *state)
            self._wait = min(2 * self._wait, self._longest)
        return state

    @staticmethod
    def _write(to: Tensor, index: Tensor, chosen: Tensor, values: Tensor) -> None:
        """to[index[chosen]] = values[chosen]. How many are chosen is asked on the CPU only."""
        if to.device.type == "cpu":
            to[index[chosen]] = values[chosen]
        else:
            to[index] = torch.where(per_sample(chosen, values), values, to[index])

    @property
    def _looks_twice(self) -> bool:
        """Whether what looks broken needs a second look: the model is randomised, or the pass was at lower precision."""
        return self._draws > 1 or self._rough

    @property
    def gathers(self) -> bool:
        """Whether an attack of many cheap queries may gather what it breaks until a look is `due`, and submit it then."""
        return self._longest > 1 and self.stop == "broken"

    def due(self) -> bool:
        """Whether it is time for a look at which samples are broken, to be called once for each submission.

        On the CPU always, and where apparent breaks are asked about anyway (lower precision, several draws). Elsewhere after 1,
        2, 4 and then every 8 submissions, and from the start again where one has found something: while samples break, those
        that are done are worth a wait.
        """
        self._since += 1
        if self._since < self._wait:
            return False
        self._since = 0
        return True

    def judge(self, candidates: Tensor, logits: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Like `submit`, for candidates that may lie outside the ball (minimum-norm attacks): those do not count."""
        inside = flat_norm(candidates - self.x, self.threat.norm) <= self.threat.eps
        return self.confirm(inside & self._promising(logits), candidates, logits, *state)

    def _promising(self, logits: Tensor) -> Tensor:
        """Candidates that could change anything: all, unless the search ends with the first mistake."""
        if self.stop == "never" and self._keep == "loss":
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return self._ranks(logits, self.y, self.target) > 0

    def mark(self) -> None:
        """To be called when nine tenths of a run's iterations are done: what comes after is the late gain."""
        late = self._late[self._index]
        if self.stop == "broken":  # those that are done and not retired yet were done before
            late = torch.where(self._rank[self._index] > 1, torch.nan, late)
        self._marked[self._index] = late

    def late_gain(self) -> Tensor:
        """The share of each sample's gain in loss that came after `mark`, in [0, 1], (N,).

        Where it is large, the attack was still climbing when it stopped. NaN for samples that were done before, and for
        attacks that do not call `mark`.
        """
        gain = self._late - self._start_loss
        share: Tensor = (self._late - self._marked) / gain.clamp_min(1e-6)
        return torch.where(gain > 1e-6, share, self._marked * 0.0)

    def _retire(self, gone: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        keep = (~gone).nonzero()[:, 0]
        self._settle()
        self._index = self._index[keep]
        self.x, self.y, self.random = self.x[keep], self.y[keep], self.random.select(keep)
        self.target = None if self.target is None else self.target[keep]
        return tuple(tensor[keep] for tensor in state)


def average_prediction(logits: Tensor) -> Tensor:
    """Logits (draws, n, K) of a randomised model as one, (n, K): their softmax is the mean of the draws' probabilities.

    Softmax leaves a constant free: it is the mean of the draws' logsumexp, so that draws that agree give themselves.
    """
    normaliser = torch.logsumexp(logits, dim=2, keepdim=True)
    mean: Tensor = torch.logsumexp(logits - normaliser, dim=0) - math.log(len(logits)) + normaliser.mean(dim=0)
    return mean


def mean_logits(model: nn.Module, x: Tensor, draws: int = 1) -> Tensor:
    """One pass over x; or the average prediction of several, for a model that is randomised."""
    found = [check_logits(model(x), len(x)) for _ in range(draws)]
    return found[0] if draws == 1 else average_prediction(torch.stack(found))
