"""Model soups: one network whose weights are the average of several that were fine-tuned from one start.

Wortsman et al., *Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time*, ICML 2022, arXiv 2203.05482. What judges a greedy soup is here a choice: clean accuracy as in the paper, robust accuracy
under a stated attack, or a mixture of both. Averages of networks from different starts are no soups: their weights are not
connected, and the average is usually no better than chance.

Batch norms have to be measured again after averaging, on inputs such as the members were trained on. A network that was trained
against attacks has seen attacked images. With statistics of clean ones alone a soup of such networks keeps its clean accuracy
and loses much of its robust accuracy, 11 to 56 points in three seeds of `benchmarks/beyond/soups.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from defenses.base import at_least, one_of, share
from defenses.making import (
    Made,
    Maker,
    State,
    attacked_batches_of,
    batches_of,
    has_batch_statistics,
    recompute_statistics,
    with_state,
)
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError
from robustbench_ext.models.contract import frozen_eval, logits_of
from robustbench_ext.numbers import parse_number

Judge = Callable[[nn.Module], float]


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> State:
    """The weighted mean of states, in float64 and rounded once; equal weights by default.

    Tensors that are no floating-point numbers (a batch norm's count of batches) are the first one's.
    """
    if weights is None:
        weights = [1.0 / len(states)] * len(states)
    mean: State = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            total = sum(w * state[name].double() for w, state in zip(weights, states, strict=True))
            mean[name] = torch.as_tensor(total).to(first.dtype)
        else:
            mean[name] = first.clone()
    return mean


@dataclass(frozen=True, kw_only=True)
class Soup(Maker):
    """The average of its members' weights.

    Args:
        how: "uniform": of all of them. "greedy": members are sorted by the judge, best first; each is stirred in if the judge
            does not think less of the soup with it.
        strict: greedy: only if the judge thinks better of it. The paper accepts equal scores, its released code does not.
        clean: greedy: the weight of clean accuracy in the judge's score; the rest is robust accuracy. 1 is the paper's.
        eps, norm, steps: of the PGD attack of robust accuracy, needed where clean < 1, and of the images that batch norms are
            measured on.
        judge_n: calibration samples that the judge sees (the first, a stratified sample); None for all.
        statistics: what batch norms are measured on again, for every soup that is judged: "clean" training images, "attacked"
            ones (by this attack on the soup with its members' mean statistics), or nothing: "mean" averages the members'.
            By default attacked where `eps` is given, else clean.
        statistics_n: training samples for it.
        batch_size: of both.

    Where the judge chooses, its scores are too good: what counts is measured on the test split.
    """

    name: ClassVar[str] = "soup"
    version: ClassVar[int] = 2  # 2: statistics of attacked images
    least: ClassVar[int] = 1
    reference: ClassVar[str] = "arXiv 2203.05482"

    how: Literal["uniform", "greedy"] = "uniform"
    strict: bool = False
    clean: float = 1.0
    eps: float | None = None
    norm: str = "Linf"
    steps: int = 10
    judge_n: int | None = None
    statistics: Literal["clean", "attacked", "mean"] | None = None
    statistics_n: int = 2000
    batch_size: int = 250

    def __post_init__(self) -> None:
        one_of(self.how, ("uniform", "greedy"), "soup: how")
        object.__setattr__(self, "clean", parse_number(self.clean, "soup: clean"))
        if self.eps is not None:
            object.__setattr__(self, "eps", parse_number(self.eps, "soup: eps"))
        share(self.clean, "soup: clean")
        for name in ("steps", "batch_size", "statistics_n"):
            at_least(getattr(self, name), 1, f"soup: {name}")
        if self.statistics is None:
            object.__setattr__(self, "statistics", "clean" if self.eps is None else "attacked")
        one_of(str(self.statistics), ("clean", "attacked", "mean"), "soup: statistics")
        if self.statistics == "attacked" and self.eps is None:
            raise ConfigError("soup: statistics of attacked images need a threat: eps: 8/255")
        if self.judge_n is not None:
            at_least(self.judge_n, 1, "soup: judge_n")
        if self.how == "greedy" and self.clean < 1 and self.eps is None:
            raise ConfigError(
                f"soup: clean = {self.clean} leaves {1 - self.clean:.3g} to robust accuracy, which needs a threat: eps: 8/255"
            )

    def make(self, members: Mapping[str, nn.Module], data: Dataset, seed: int) -> Made:
        if self.how == "uniform":
            return Made(self._cook(members, list(members), data, seed), {"ingredients": list(members)})
        if "calibration" not in data.splits:
            raise ConfigError(f"soup: a greedy one is judged on the calibration split, which {data.name} lacks")
        return self.greedy(members, data, self._judge(data, seed), seed)

    def greedy(self, members: Mapping[str, nn.Module], data: Dataset, judge: Judge, seed: int = 0) -> Made:
        """The greedy recipe with any judge: maps a network to a score, higher is better."""
        scores = {name: judge(module) for name, module in members.items()}
        order = sorted(members, key=lambda name: -scores[name])  # equal ones in the order given
        chosen, best = [order[0]], scores[order[0]]
        state: State = {k: v.clone() for k, v in members[order[0]].state_dict().items()}
        path = [{"model": order[0], "alone": best, "soup": best, "kept": True}]
        for name in order[1:]:
            candidate = self._cook(members, [*chosen, name], data, seed)
            score = judge(with_state(members[name], candidate))
            kept = score > best if self.strict else score >= best
            path.append({"model": name, "alone": scores[name], "soup": score, "kept": kept})
            if kept:
                chosen, best, state = [*chosen, name], score, candidate
        return Made(state, {"ingredients": chosen, "score": best, "path": path})

    def _cook(self, members: Mapping[str, nn.Module], names: Sequence[str], data: Dataset, seed: int) -> State:
        """The average of some members, with statistics of its own."""
        state = average([members[name].state_dict() for name in names])
        first = members[names[0]]
        if len(names) == 1 or self.statistics == "mean" or not has_batch_statistics(first):
            return state
        if "train" not in data.splits:
            raise ConfigError(
                f"soup: batch norms are measured again on the train split, which {data.name} lacks; statistics: mean averages "
                f"the members' statistics instead"
            )
        network = with_state(first, state)
        if self.statistics == "attacked":
            assert self.eps is not None  # noqa: S101 - refused above
            attack = PGD(eps=self.eps, norm=self.norm, steps=self.steps, stop="never")
            batches = attacked_batches_of(data, self.statistics_n, self.batch_size, network, attack, seed)
        else:
            batches = batches_of(data, self.statistics_n, self.batch_size)
        recompute_statistics(network, batches)
        return {name: value.clone() for name, value in network.state_dict().items()}

    def _judge(self, data: Dataset, seed: int) -> Judge:
        split = data["calibration"].take(self.judge_n)
        x, y, ids = split.images(slice(None)), torch.from_numpy(split.labels), split.ids

        def judge(model: nn.Module) -> float:
            clean = robust = 0.0
            if self.clean > 0:
                with torch.no_grad(), frozen_eval(model):
                    right = [logits_of(model, part).argmax(1) for part in x.split(self.batch_size)]
                clean = float((torch.cat(right) == y).double().mean())
            if self.clean < 1:
                assert self.eps is not None  # noqa: S101 - refused above
                attack = PGD(eps=self.eps, norm=self.norm, steps=self.steps)
                broken = [
                    attack(
                        model, part, labels, ids=ids[i * self.batch_size : (i + 1) * self.batch_size], seed=seed
                    ).broken
                    for i, (part, labels) in enumerate(
                        zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
                    )
                ]
                robust = float((~torch.cat(broken)).double().mean())
            return self.clean * clean + (1 - self.clean) * robust

        return judge
