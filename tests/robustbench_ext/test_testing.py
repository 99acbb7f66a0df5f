"""The conformance suite passes what is right and catches what is planted."""

from dataclasses import dataclass

import pytest
import torch

from detectors import MSP, Detector, Energy, Mahalanobis
from robustbench_ext.attacks import PGD, Attack, Passes, build_attack
from robustbench_ext.catalog import ATTACKS
from robustbench_ext.testing import check_attack, check_detector

QUICK = {
    "standard": {"steps": 5, "queries": 40},
    "apgd-t": {"steps": 8},
    "fab-t": {"steps": 8},
    "square": {"queries": 60},
    "rand": {"steps": 5, "draws": 3},
    "audited": {"steps": 5, "targets": 2, "queries": 40, "screen_steps": 3, "passes": 80},
    "adaptive": {"steps": 10},
    "apgd-ce": {"steps": 25},
    "apgd-dlr": {"steps": 25},
    "cw": {"steps": 30, "rounds": 3},
    "ddn": {"steps": 20},
    "fmn": {"steps": 20},
    "spatial": {"tries": 5, "pixels": 1.5},
}
BUDGETS = {"Linf": 0.1, "L2": 0.6, "spatial": float("inf")}


CASES = [(e.name, norm) for e in ATTACKS for norm in e.facts["norms"] if e.name != "torchattacks"]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_attack_conforms(name, norm):
    check_attack(build_attack(name, norm=norm, eps=BUDGETS[norm], **QUICK.get(name, {})))


@pytest.mark.parametrize(("name", "norm"), [(n, m) for n, m in CASES if ATTACKS.get(n).facts["minimum_norm"]])
def test_minimum_norm_attacks_conform_without_a_budget(name, norm):
    check_attack(build_attack(name, norm=norm, **QUICK.get(name, {})))


@pytest.mark.parametrize(("name", "norm"), [(n, m) for n, m in CASES if ATTACKS.get(n).facts["targeted"]])
def test_targeted_attacks_conform(name, norm):
    check_attack(build_attack(name, norm=norm, eps=BUDGETS[norm], target="random", **QUICK.get(name, {})))


@pytest.mark.parametrize(
    "detector", [MSP(), Energy(), Mahalanobis(), Mahalanobis(inverse="shrinkage")], ids=lambda d: d.name
)
def test_every_detector_conforms(detector):
    check_detector(detector)


@dataclass(frozen=True, kw_only=True)
class GlobalDraws(PGD):
    """Draws from the global generator: a sample's draws depend on its batch."""

    def _run(self, search):
        x = search.threat.project(search.x + self.eps * torch.randn_like(search.x), search.x)
        search.submit(x, search.logits(x))


@dataclass(frozen=True, kw_only=True)
class Talkative(PGD):
    """Spends more than it says."""

    def cost(self, num_classes):
        return Passes(1, 1)


@dataclass(frozen=True, kw_only=True)
class Batchy(PGD):
    """Moves every sample along the mean gradient of its batch."""

    def _run(self, search):
        _, _, gradient = search.gradient(
            search.x, lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none")
        )
        x = search.threat.project(search.x + self.eps * gradient.mean(0, keepdim=True).sign(), search.x)
        search.submit(x, search.logits(x))


@dataclass(frozen=True, kw_only=True)
class Liar(PGD):
    """Submits logits that belong to another input."""

    def _run(self, search):
        search.submit(search.x, -search.clean_logits[search.index])


@pytest.mark.parametrize(
    ("attack", "promise"),
    [
        (GlobalDraws(eps=0.2), "search.random"),
        (Talkative(eps=0.05, steps=5), "cost\\(\\) says"),
        (Batchy(eps=0.3), "batch size"),
        (Liar(eps=0.1), "belong to the returned inputs"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Attack) else "",
)
def test_planted_defects_of_attacks_are_caught(attack, promise):
    with pytest.raises(AssertionError, match=promise):
        check_attack(attack)


class Ranking(Detector):
    """Scores by the position in the batch."""

    name = "ranking"

    def _score(self, seen):
        return seen.logits[:, 0].argsort().argsort().double()


def test_planted_defect_of_a_detector_is_caught():
    with pytest.raises(AssertionError, match="must not depend on its batch"):
        check_detector(Ranking())
