"""Methods of a user's own by name: what they become, how they enter keys, and what is said where one is wrong."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from robustbench_ext.attacks.base import build_attack
from robustbench_ext.catalog import ATTACKS, CORRUPTIONS, DEFENSES, DETECTORS, ESTIMATORS
from robustbench_ext.compare import compare_runs
from robustbench_ext.conditions import parse_conditions
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.own import is_own
from robustbench_ext.probes import parse_probes
from robustbench_ext.randomness import SampleRandom
from robustbench_ext.testing import check_methods

ATTACK = '''
from dataclasses import dataclass
from typing import ClassVar
from robustbench_ext.attacks.base import Attack

@dataclass(frozen=True, kw_only=True)
class Mine(Attack):
    """Adds a constant."""
    size: float = 1.0
    name: ClassVar[str] = "mine"

    def _run(self, search):
        x = search.threat.project(search.x + self.size * self.eps, search.x)
        search.submit(x, search.logits(x))
'''
LEAVES = ATTACK.replace("search.threat.project(search.x + self.size * self.eps, search.x)", "search.x * 0.5 + 0.4")
DETECTOR = '''
from detectors.base import Detector

class Mine(Detector):
    """Minus the largest logit."""
    def _score(self, seen):
        return -seen.logits.amax(dim=1)
'''
ESTIMATOR = '''
from uq.base import Estimator

class Half(Estimator):
    """Half the logits."""
    name = "half"
    def _fit(self, held_out, model):
        pass
    def _calibrate(self, seen):
        return seen.logits.double() / 2
'''
DEFENSE = '''
from dataclasses import dataclass
from typing import ClassVar
from defenses.base import Loss, cross_entropy
from defenses.standard import Standard

@dataclass(frozen=True, kw_only=True)
class Doubled(Standard):
    """Twice the cross-entropy."""
    factor: float = 2.0
    name: ClassVar[str] = "doubled"

    def loss(self, model, batch, state=None):
        return Loss(self.factor * cross_entropy(model(batch.x), batch).mean())
'''
CORRUPTION = '''
import torch

def grain(x, severity, random):
    """Uniform noise."""
    return x + 0.05 * severity * (random.uniform(tuple(x.shape[1:])) - 0.5)

def smaller(x, severity, random):
    return x[:, :, ::2]
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory with one file of each kind."""
    monkeypatch.chdir(tmp_path)
    files = {
        "attack": ATTACK,
        "detector": DETECTOR,
        "estimator": ESTIMATOR,
        "defense": DEFENSE,
        "corruption": CORRUPTION,
    }
    for name, text in files.items():
        (tmp_path / f"my_{name}.py").write_text(text)
    return tmp_path


def suite(**more):
    train = {
        "defense": {"name": "my_defense.py:Doubled", "factor": 3},
        "recipe": {"epochs": 1, "eps": 0.1, "validation_n": 20},
    }
    return {
        "schema": 1,
        "name": "own",
        "data": "digits",
        "n": 30,
        "models": [{"name": "net", "train": train}],
        "conditions": [
            {"attack": "my_attack.py:Mine", "eps": [0.1, 0.2]},
            {"corruption": "my_corruption.py:grain", "severity": 2},
        ],
        "detectors": ["my_detector.py:Mine"],
        "uq": ["my_estimator.py:Half"],
        **more,
    }


# Names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("a/b.py:Mine", True),
        ("pkg.module:Mine", True),
        ("my_attack:Mine", True),
        ("pgd", False),
        ("torchattack:CW", False),
        ("a.py", False),
        ("npz:data/x.npz", False),
        ("a b:c", False),
        (":c", False),
    ],
)
def test_which_names_are_own(name, own):
    assert is_own(name) == own


def test_registered_names_come_first(here):
    (here / "torchattacks.py").write_text("CW = 1")
    assert ATTACKS.split("torchattacks:CW") == ("torchattacks", "CW")
    assert ATTACKS.split("my_attack.py:Mine") == ("my_attack.py:Mine", "")
    assert ATTACKS.label("pgd") == "pgd"
    assert ATTACKS.label("torchattacks:CW") == "torchattacks:CW"
    assert ATTACKS.label("my_attack.py:Mine") == "mine"


def test_by_file_and_by_module():
    for name in ("my_attack.py:Mine", "my_attack:Mine", str(Path("my_attack.py").resolve()) + ":Mine"):
        attack = build_attack(name, eps="8/255", size=2)
        assert (attack.name, attack.eps, attack.size) == ("mine", 8 / 255, 2)
        assert attack.spec()["version"].startswith("1+")


def test_a_name_that_is_inherited_is_not_taken_over(here):
    (here / "mine.py").write_text("from robustbench_ext.attacks.pgd import PGD\nclass Better(PGD):\n    'x'\n")
    assert ATTACKS.label("mine.py:Better") == "Better"


# Keys -------------------------------------------------------------------------------------------------------------------


def test_the_source_is_in_every_specification(here):
    def specs():
        conditions = parse_conditions(suite()["conditions"])
        probes = parse_probes(suite()["detectors"], suite()["uq"])
        return (
            [c.spec() for c in conditions[1:]]
            + [p.spec() for p in probes]
            + [DEFENSES.load("my_defense.py:Doubled")().spec()]
        )

    before, again = specs(), specs()
    assert before == again
    for file in here.glob("my_*.py"):
        file.write_text(file.read_text() + "\n# edited\n")
    after = specs()
    assert len(before) == 6
    for one, other in zip(before, after, strict=True):
        assert one != other
        assert {k: v for k, v in one.items() if k != "version"} == {k: v for k, v in other.items() if k != "version"}


def test_a_base_in_another_file_is_part_of_it(here, monkeypatch):
    """It lies beside the file that needs it, and so is found."""
    base = ATTACK.replace("Mine", "Base")
    (here / "mine.py").write_text("from my_base import Base\nclass Derived(Base):\n    name = 'derived'\n")

    def version(text, first=None):
        """As a new process would see it."""
        (here / "my_base.py").write_text(text)
        for name in [n for n in sys.modules if n == "my_base" or n.startswith("_rbx_")]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        if first is not None:
            ATTACKS.load(first)
        return ATTACKS.load("mine.py:Derived").version

    one, other = version(base), version(base + "# edited\n")
    assert one != other
    assert version(base) == one
    assert version(base, first="my_base:Base") == one  # used by itself before, which must not matter


def test_two_files_of_one_class_are_told_apart(here):
    (here / "other.py").write_text(ATTACK.replace("a constant", "another"))
    entries = [{"attack": f"{file}:Mine", "eps": 0.1} for file in ("my_attack.py", "other.py")]
    conditions = parse_conditions(entries)
    assert [c.label for c in conditions[1:]] == ["mine Linf 0.1", "mine Linf 0.1 (other.py:Mine)"]
    assert conditions[1].spec() != conditions[2].spec()
    assert [c.facts()["origin"] for c in conditions[1:]] == ["my_attack.py:Mine", "other.py:Mine"]
    with pytest.raises(ConfigError, match="detector 'Mine' is listed twice; give one of them a label"):
        (here / "second.py").write_text(DETECTOR)
        parse_probes(["my_detector.py:Mine", "second.py:Mine"], [])


# Runs -------------------------------------------------------------------------------------------------------------------


def test_a_suite_of_own_methods(here):
    done = run_suite(suite(), "run")
    assert not done.failures
    assert [c["label"] for c in done.results.conditions] == [
        "clean",
        "mine Linf 0.1",
        "mine Linf 0.2",
        "grain 2",
        "worst case Linf 0.1",
        "worst case Linf 0.2",
    ]
    assert {p["label"] for p in done.results.probes} == {"Mine", "half"}
    assert done.results.models[0]["training"]["defense"]["factor"] == 3
    assert done.results.find(probe="half", condition="mine Linf 0.1", metric="ece")
    (here / "my_attack.py").write_text(ATTACK.replace("constant", "number"))
    again = run_suite(suite(), "run")
    assert (again.trained, again.computed) == (0, 2)  # both budgets of the attack, and nothing else
    assert again.results.results == done.results.results


def test_an_attack_that_leaves_its_ball_is_named(here):
    (here / "leaves.py").write_text(LEAVES)
    done = run_suite(suite(conditions=[{"attack": "leaves.py:Mine", "eps": 0.1}], detectors=[], uq=[]), "run")
    (failure,) = done.failures
    assert failure.what == "net · mine Linf 0.1"
    assert "ThreatModelError: leaves.py:Mine: mine: returned inputs leave the threat model" in failure.error
    checks = check_methods(["leaves.py:Mine"], [])
    assert {c.status for c in checks if "specification" not in c.name} == {"fail"}
    assert "leave the threat model" in checks[0].message


@pytest.mark.slow  # starts processes
def test_workers_find_them_too(here):
    serial, local = run_suite(suite(), "serial"), run_suite(suite(), "local", executor="local", workers=2)
    assert not local.failures
    assert (here / "local" / "results.json").read_bytes() == (here / "serial" / "results.json").read_bytes()
    assert serial.results == local.results


def test_a_corruption_is_seeded_by_sample_and_checked():
    grain = CORRUPTIONS.load("my_corruption.py:grain")
    ids = [f"s{i}" for i in range(6)]
    x = SampleRandom.of(0, ids, "x").uniform((1, 8, 8))
    random = SampleRandom.of(3, ids, "corruption/grain")
    whole = grain(x, 5, random)
    assert torch.equal(grain(x[2:4], 5, SampleRandom.of(3, ids[2:4], "corruption/grain")), whole[2:4])
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    assert not torch.equal(whole, x)
    with pytest.raises(DataError, match=r"smaller \(my_corruption.py:smaller\) gave shape \(6, 1, 4, 8\)"):
        CORRUPTIONS.load("my_corruption.py:smaller")(x, 1, random)


# Metrics ----------------------------------------------------------------------------------------------------------------

METRIC = '''
import torch

def margin(logits, labels):
    """The label's logit minus the largest of the others.

    More text.
    """
    mine = logits.gather(1, labels[:, None])[:, 0]
    return mine - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)

def right(logits, labels):
    """The label is predicted."""
    return logits.argmax(dim=1) == labels

right.higher_is_better = True

def undocumented(logits, labels):
    return labels.float()

def mean(logits, labels):
    """Not per sample."""
    return logits.mean()

def fails(logits, labels):
    """It divides."""
    return labels / 0 if len(labels) > 4 else 1 / 0

def late(logits, labels):
    """It raises on more than four samples."""
    if len(labels) > 4:
        raise KeyError("x")
    return labels

def ece(logits, labels):
    """A name that is taken."""
    return labels
'''


def test_metrics_of_ones_own(here):
    (here / "m.py").write_text(METRIC)
    named = suite(metrics=["m.py:right", "m.py:margin", "m.py:late"], detectors=[], uq=[])
    done = run_suite(named, "run")
    find = done.results.find
    for condition, of in (("clean", "accuracy"), ("grain 2", "accuracy"), ("mine Linf 0.1", "robust_accuracy")):
        (own,) = find(metric="right", condition=condition)
        (ours,) = find(metric=of, condition=condition, group=None)
        assert (own.value, own.ci_low, own.ci_high, own.n, own.ci_method) == (
            ours.value,
            ours.ci_low,
            ours.ci_high,
            ours.n,
            ours.ci_method,
        )
    (margin,) = find(metric="margin", condition="clean")
    (right,) = find(metric="right", condition="clean")
    assert margin.ci_low < margin.value < margin.ci_high
    assert (margin.value > 0) == (right.value > 0.5)
    assert {
        k: done.results.metrics["margin"][k] for k in ("title", "definition", "higher_is_better", "percent", "origin")
    } == {
        "title": "margin",
        "definition": "The label's logit minus the largest of the others.",
        "higher_is_better": None,
        "percent": False,
        "origin": "m.py:margin",
    }
    assert done.results.metrics["right"]["percent"]
    assert "metric 'm.py:late' raised KeyError: 'x'" in find(metric="late", condition="clean")[0].reason
    # An edited metric is measured again, from the records that are there.
    (here / "m.py").write_text(METRIC.replace("return mine - logits", "return 100 + mine - logits"))
    again = run_suite(named, "run")
    assert (again.computed, again.trained) == (0, 0)
    assert again.results.find(metric="margin", condition="clean")[0].value == pytest.approx(
        margin.value + 100, abs=1e-4
    )


def test_models_are_compared_in_metrics_of_ones_own(here):
    (here / "m.py").write_text(METRIC)
    trained = [
        {"name": name, "train": {"defense": "standard", "recipe": {"epochs": epochs, "eps": 0.1, "validation_n": 20}}}
        for name, epochs in (("short", 1), ("long", 3))
    ]
    told = suite(models=trained, metrics=["m.py:right", "m.py:margin", "m.py:late"], detectors=[], uq=[], conditions=[])
    done = run_suite({**told, "conditions": [{"corruption": "contrast", "severity": 5}]}, "run")
    compared = {c.metric: c for c in done.results.comparisons if c.condition == "clean"}
    right, accuracy, margin = compared["right"], compared["accuracy"], compared["margin"]
    # A metric of one's own that says the same as one of ours is tested as that one is.
    for field in ("model", "against", "value", "ci_low", "ci_high", "p_value", "test", "n", "outcome"):
        assert getattr(right, field) == getattr(accuracy, field)
    values = [done.results.find(model=m, metric="margin", condition="clean")[0].value for m in ("long", "short")]
    assert margin.value == pytest.approx(values[0] - values[1], abs=1e-9)  # sums of 30 float64 terms in another order
    assert "late" not in compared  # it raised, so there is nothing to compare
    # Of finished runs: from what was kept, running none of this code.
    (here / "m.py").write_text("raise SystemExit('it ran')\n")
    found = compare_runs([here / "run"], everything=True)
    again = {(c.metric, c.condition): c for c in found.comparisons}
    # There the first model is what others are compared with, and the pair is long - short as above.
    assert again["margin", "clean"].value == margin.value
    assert ("margin", "contrast 5") in again
    # Another source is another metric.
    (here / "m.py").write_text(METRIC.replace("return mine - logits", "return 100 + mine - logits"))
    run_suite(told, "other")
    found = compare_runs([here / "run", here / "other"], common=True)
    assert "margin" not in {c.metric for c in found.comparisons}
    assert "right" not in {c.metric for c in found.comparisons}  # of the same file
    assert any("metric margin, not compared: other has it with another source" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m.py:undocumented", "has no docstring"),
        ("m.py:mean", r"values of shape \(\) for 4 samples, expected one finite number, or one bool, per sample"),
        ("m.py:fails", "metric 'm.py:fails' raised ZeroDivisionError"),
        ("m.py:ece", "the name 'ece' is taken"),
        ("m.py:METRIC", "unknown name in m.py 'METRIC'"),
        ("ece", "metrics that come with the package are all computed, without being named"),
        ("my_attack.py:Mine", "expected a function of logits and labels"),
    ],
)
def test_wrong_metrics_are_refused_before_the_run(here, name, said):
    (here / "m.py").write_text(METRIC)
    with pytest.raises(ConfigError, match=said):
        run_suite(suite(metrics=[name]), "run")
    assert not (here / "run").exists()


def test_metrics_of_ones_own_are_of_classifiers(here):
    (here / "m.py").write_text(METRIC)
    regression = {
        "schema": 1,
        "name": "r",
        "data": "diabetes",
        "models": [{"name": "m", "train": {}}],
        "metrics": ["m.py:right"],
    }
    with pytest.raises(
        ConfigError, match="functions of logits and labels, and this suite has data of a regression task"
    ):
        run_suite(regression, "run")


# What can be wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registry", "name", "said"),
    [
        (
            ATTACKS,
            "nowhere.py:Mine",
            "attack 'nowhere.py:Mine': there is no file .*nowhere.py. Relative paths begin where",
        ),
        (ATTACKS, "my_attack.py:Mien", "unknown name in my_attack.py 'Mien'. Did you mean 'Mine'"),
        (
            ATTACKS,
            "my_detector.py:Mine",
            "is the class Mine, expected a class that derives from robustbench_ext.attacks.base.Attack",
        ),
        (ATTACKS, "my_corruption.py:grain", "is a function, expected a class"),
        (ATTACKS, "pkg.nowhere:Mine", "importing pkg.nowhere failed with ModuleNotFoundError"),
        (ATTACKS, "pdg:x", "unknown attack 'pdg:x'"),
        (DETECTORS, "robustbench_ext.attacks.pgd:PGD", "expected a class that derives from detectors.base.Detector"),
        (ESTIMATORS, "my_estimator.py:Half2", "Did you mean 'Half'"),
        (CORRUPTIONS, "my_attack.py:Mine", "is the class Mine, expected a function"),
        (ATTACKS, "wrong.py:Mine", r"importing wrong.py failed with SyntaxError: .*\(wrong.py, line 2\)"),
        (ATTACKS, "raises.py:Mine", "importing raises.py failed with ZeroDivisionError: division by zero"),
        (ATTACKS, "half.py:Mine", "does not define _run"),
        (ATTACKS, "taken.py:Mine", "calls itself 'pgd', the name of a registered attack"),
    ],
)
def test_what_is_said(here, registry, name, said):
    (here / "wrong.py").write_text("x = 1\nclass Mine(:\n")
    (here / "raises.py").write_text("1 / 0\n")
    (here / "half.py").write_text(ATTACK.replace("_run", "run"))
    (here / "taken.py").write_text(ATTACK.replace('"mine"', '"pgd"'))
    for _ in range(2):  # what failed once is not half there the second time
        with pytest.raises(ConfigError, match=said):
            registry.load(name)


def test_a_file_that_was_mended_is_read_again(here):
    (here / "wrong.py").write_text("class Mine(:\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        ATTACKS.load("wrong.py:Mine")
    (here / "wrong.py").write_text(ATTACK)
    assert ATTACKS.load("wrong.py:Mine").name == "mine"


def test_unknown_parameters_of_own_methods():
    with pytest.raises(ConfigError, match="unknown parameter 'siez'. Did you mean 'size'"):
        build_attack("my_attack.py:Mine", eps=0.1, siez=2)


def test_code_that_raises_is_a_failed_check(here):
    (here / "raises.py").write_text(ATTACK.replace("x = search", "x = 1 / 0 + search"))
    checks = check_methods(["raises.py:Mine"], [])
    assert "ZeroDivisionError: division by zero (raises.py, line" in checks[0].message
