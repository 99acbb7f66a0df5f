"""Two-phase sampling: exact intervals, coverage by simulation, breaks never hidden; the audited ensemble on a real model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, hypergeom

from robustbench_ext.attacks import build_attack
from robustbench_ext.attacks.audited import Audited
from robustbench_ext.attacks.ensemble import Standard
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.metrics import audit
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.randomness import SampleRandom

SAVED = Path(__file__).parents[2] / "benchmarks" / "attacks" / "results" / "audited-verdicts.npz"
REPEATS = 200


@pytest.mark.parametrize("population", [1, 7, 30])
def test_hypergeometric_interval_covers_for_every_truth(population):
    """Exactly, by summing the probabilities of the draws whose interval holds the truth."""
    for drawn in range(population + 1):
        intervals = [audit.hypergeometric_interval(b, drawn, population) for b in range(drawn + 1)]
        for truth in range(population + 1):
            low = max(0, drawn - (population - truth))
            inside = [b for b in range(low, min(drawn, truth) + 1) if intervals[b][0] <= truth <= intervals[b][1]]
            assert hypergeom.pmf(inside, population, truth, drawn).sum() >= 0.95 - 1e-9


def test_hypergeometric_interval_edges():
    assert audit.hypergeometric_interval(3, 3, 3) == (3, 3)
    assert audit.hypergeometric_interval(0, 0, 0) == (0, 0)
    with pytest.raises(DataError, match="expected 0 <= broken"):
        audit.hypergeometric_interval(4, 3, 10)


def test_an_audit_of_everyone_is_the_full_protocol():
    counts = audit.Audit(n=100, survivors=60, taken=20, taken_broken=5, drawn=40, drawn_broken=2)
    here, population = counts.here(), counts.population()
    assert (here.value, here.ci_low, here.ci_high) == pytest.approx((0.53, 0.53, 0.53))
    assert (population.ci_low, population.ci_high) == pytest.approx(wilson(53, 100))


def test_the_interval_of_the_population_is_never_narrower_than_the_full_protocols():
    for drawn, broken in ((10, 0), (10, 1), (30, 3)):
        counts = audit.Audit(n=100, survivors=60, taken=20, taken_broken=5, drawn=drawn, drawn_broken=broken)
        low, high = audit.wilson_share(counts.value(), 100)
        found = counts.population()
        assert found.ci_low <= low and found.ci_high >= high


def test_looks_share_the_error():
    for looks in range(1, 7):
        spent = sum(1 - audit.look_level(look, looks) for look in range(looks))
        assert spent == pytest.approx(0.05)
    assert audit.look_level(0, 1) == pytest.approx(0.95)
    assert audit.plan_looks(10, 10) == [10] and audit.plan_looks(0, 1) == [0]


def scenario(rate, seed=0, n=1200):
    """Verdicts of a made-up model: a share `rate` of the survivors breaks, those of small margin more often."""
    draw = np.random.default_rng(seed)
    standing = draw.random(n) < 0.7
    margins = draw.normal(size=n)
    broken = standing & (draw.random(n) < rate * (1 + (margins > 1.5)))
    return standing, margins, broken


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.2], ids=["healthy", "usual", "masked"])
@pytest.mark.parametrize(
    "budget",
    [audit.Budget(size=150), audit.Budget(widening=1.3), audit.Budget(width=0.07)],
    ids=["size", "widening", "width"],
)
def test_coverage_over_seeds(rate, budget):
    standing, margins, broken = scenario(rate)
    check_coverage(standing, margins, broken, [str(i) for i in range(len(standing))], budget)


def check_coverage(standing, margins, broken, ids, budget):
    truth = float((standing & ~broken).mean())
    covered = 0
    for seed in range(REPEATS):
        lots = SampleRandom.of(seed, ids, "audit").uniform(()).numpy()
        code, found, level = audit.conduct(standing, margins, lots, lambda rows: broken[rows], budget, 0.3)
        audited = np.isin(code, (audit.TAKEN, audit.DRAWN))
        assert np.array_equal(found[audited], broken[audited])  # a break that was audited is never hidden
        assert not found[~audited].any()
        counts = audit.count(code, ~standing | found, level)
        here = counts.here()
        covered += here.ci_low - 1e-9 <= truth <= here.ci_high + 1e-9
        if budget.width is not None or budget.widening is not None:
            assert budget.enough(counts) or not (code == audit.LEFT).any()
    # At least nominal within the binomial error of 200 repetitions.
    assert covered >= binom.ppf(0.001, REPEATS, 0.95)


@pytest.mark.parametrize("model", ["pgd-at", "quantised"])
@pytest.mark.parametrize(
    "budget",
    [audit.Budget(size=200), audit.Budget(widening=1.3), audit.Budget(width=0.05)],
    ids=["size", "widening", "width"],
)
def test_coverage_on_saved_verdicts(model, budget):
    """Fashion-MNIST, a robust model and one with masked gradients; see benchmarks/attacks/audited.py."""
    with np.load(SAVED) as saved:
        standing = ~saved[f"{model}/screen_broken"]
        broken, margins = saved[f"{model}/broken"] & standing, saved[f"{model}/margin"].astype(np.float64)
        ids = saved[f"{model}/ids"].tolist()
    check_coverage(standing, margins, broken, ids, budget)


def test_those_who_were_audited_stay_audited_as_the_audit_grows():
    standing, margins, broken = scenario(0.1)
    lots = np.random.default_rng(1).random(len(standing))
    seen = []
    for size in (50, 100, 200):
        code, _, _ = audit.conduct(standing, margins, lots, lambda rows: broken[rows], audit.Budget(size=size), 0.3)
        seen.append(set(np.flatnonzero(np.isin(code, (audit.TAKEN, audit.DRAWN)))))
        assert len(seen[-1]) == size
    # Lots are fixed, so whoever was drawn is drawn again, but for the few places that the certain part has displaced.
    assert seen[0] < seen[1] < seen[2]


SMALL = {"steps": 10, "targets": 3, "queries": 60, "screen_steps": 4, "screen_targets": 1}


def test_audited_agrees_with_standard_where_it_looks(digits_model, digits_test):
    x, y, ids = digits_test
    eps = 0.1
    result = Audited(eps=eps, **SMALL, passes=120)(digits_model, x, y, ids=ids)
    code = result.extra["audit"].numpy()
    full = Standard(eps=eps, steps=10, targets=3, queries=60)(digits_model, x, y, ids=ids)
    looked = np.isin(code, (audit.TAKEN, audit.DRAWN))
    assert 0 < looked.sum() < (code != audit.DECIDED).sum()
    assert np.array_equal(result.broken.numpy()[looked], full.broken.numpy()[looked])
    assert not result.broken.numpy()[code == audit.LEFT].any()
    spent = float((result.forwards + result.backwards).sum()) / len(x)
    assert spent <= 120 + 1  # and the clean pass


def test_audit_of_all_survivors_finds_what_standard_finds(digits_model, digits_test):
    x, y, ids = (v[:150] for v in digits_test)
    result = Audited(eps=0.1, **SMALL, width=1e-6)(digits_model, x, y, ids=ids)
    full = Standard(eps=0.1, steps=10, targets=3, queries=60)(digits_model, x, y, ids=ids)
    assert not np.isin(result.extra["audit"].numpy(), [audit.LEFT]).any()
    assert bool((result.broken >= full.broken).all())


def test_audited_is_reproducible_and_names_its_members(digits_model, digits_test):
    x, y, ids = (v[:150] for v in digits_test)
    attack = Audited(eps=0.1, **SMALL, passes=100)
    first, second = (attack(digits_model, x, y, ids=ids, seed=3) for _ in range(2))
    assert torch.equal(first.broken, second.broken) and torch.equal(first.extra["audit"], second.extra["audit"])
    assert attack.members == ("screen", "apgd-ce", "apgd-t", "fab-t", "square")
    assert int(first.broken_by.max()) < len(attack.members)
    assert bool(((first.broken_by >= 0) <= first.broken).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 100, "width": 0.1}, "passes and width are given"),
        ({"widening": 1.0}, "expected a number above 1"),
        ({"width": -1}, "expected a number above 0"),
        ({"certain": 1}, "expected a number in"),
    ],
)
def test_bad_budgets(options, message):
    with pytest.raises(ConfigError, match=message):
        build_attack("audited", eps=0.1, **options)
