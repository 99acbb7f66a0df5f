"""Ready-made conformance tests pass what is right and catch what is planted, as a package of one's own would use them."""

from dataclasses import dataclass

import pytest

from detectors import KNN, Energy
from detectors.base import Detector
from robustbench_ext.attacks import PGD
from robustbench_ext.attacks.ddn import DDN
from robustbench_ext.testing import (
    AttackConformance,
    DetectorConformance,
    attack_cases,
    attack_tests,
    check_attack_case,
    check_detector_case,
    detector_tests,
)

test_an_attack = attack_tests(PGD, steps=4, budgets={"Linf": 0.1})
test_a_detector = detector_tests(Energy)
test_a_fitted_detector = detector_tests(KNN, k=5)


class TestAttack(AttackConformance):
    make = PGD
    parameters = {"steps": 3}
    budgets = {"L2": 0.6}


class TestDetector(DetectorConformance):
    make = Energy


def test_cases_follow_what_an_attack_says_of_itself():
    pgd, ddn = attack_cases(PGD, {"Linf": 0.1, "L2": 0.5}), attack_cases(DDN, {"Linf": 0.1, "L2": 0.5}, steps=5)
    assert {norm for norm, _ in pgd} == {"Linf", "L2"} and {norm for norm, _ in ddn} == {"L2"}
    assert ("L2", "without a budget") in ddn and ("L2", "without a budget") not in pgd
    with pytest.raises(ValueError, match="budgets="):
        attack_tests(DDN, budgets={"Linf": 0.1})


@dataclass(frozen=True, kw_only=True)
class Secretive(PGD):
    """Its results depend on eps, and its specification does not say so."""

    def spec(self):
        return {**super().spec(), "eps": 0}


@dataclass(frozen=True, kw_only=True)
class Early(PGD):
    """Goes wrong only where it is to go on to the end."""

    def _run(self, search):
        if self.stop == "never":
            search.submit(search.x, -search.clean_logits[search.index])
        else:
            super()._run(search)


class Moody(Detector):
    """Gives other scores each time that it is fitted."""

    name = "moody"
    times = 0
    needs_fit = True

    def __init__(self, k=1):
        self.k = k

    def _fit(self, train, model):
        type(self).times += 1
        self.scale = float(type(self).times)

    def _score(self, seen):
        return self.scale * seen.logits[:, 0].double()


@pytest.mark.parametrize(
    ("check", "promise"),
    [
        (lambda: check_attack_case(Secretive, "Linf", "specification", 0.1), "taken for each other's"),
        (lambda: check_attack_case(Early, "Linf", "to the end", 0.1, steps=3), "belong to the returned inputs"),
        (lambda: check_detector_case(Moody, "order"), "fitting twice"),
        (lambda: check_detector_case(Moody, "specification", k=3), "k is not in it"),
    ],
)
def test_planted_defects_are_caught(check, promise):
    with pytest.raises(AssertionError, match=promise):
        check()


def test_in_a_package_of_ones_own(project):
    project.write(
        "test_mine.py",
        """
from robustbench_ext.attacks import PGD
from robustbench_ext.testing import attack_tests

test_mine = attack_tests(PGD, steps=3)
""",
    )
    result = project.run("-k", "Linf", "-v")
    result.assert_outcomes(passed=4, deselected=4)
    result.stdout.fnmatch_lines(["test_mine.py::test_mine[[]Linf-to the end] PASSED*"])
