"""Energies: the identities in float64, one definition, hand-made means, intervals, and which conditions have them."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from detectors import Energy
from robustbench_ext.attacks.losses import get_loss, get_targeted_loss
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import DataError
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.metrics import calibration
from robustbench_ext.metrics import energy as metrics
from robustbench_ext.models import Observations
from robustbench_ext.models.energy import energies, joint_energy, marginal_energy
from robustbench_ext.suite import validate_suite


def batch(n=64, classes=7, scale=5.0, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, classes, generator=g, dtype=dtype)
    other = z + torch.randn(n, classes, generator=g, dtype=dtype)
    return z, other, torch.randint(0, classes, (n,), generator=g)


# Identities ----------------------------------------------------------------------------------------------------------


def test_i1_cross_entropy_is_joint_minus_marginal():
    z, _, y = batch()
    found = energies(z, y)
    assert (F.cross_entropy(z, y, reduction="none") - (found.joint - found.marginal)).abs().max() < 1e-12
    log_p = z.log_softmax(1)
    for k in range(7):
        assert (log_p[:, k] - (marginal_energy(z) - joint_energy(z, torch.full_like(y, k)))).abs().max() < 1e-12


def test_i2_trades_kl_is_a_conditional_and_a_marginal_term():
    z, other, _ = batch()
    kl = F.kl_div(other.log_softmax(1), z.log_softmax(1), reduction="none", log_target=True).sum(1)
    every = torch.arange(7)

    def joint(logits):
        return torch.stack([joint_energy(logits, k.expand(len(logits))) for k in every], dim=1)

    conditional = (z.softmax(1) * (joint(other) - joint(z))).sum(1)
    assert (kl - (conditional + marginal_energy(z) - marginal_energy(other))).abs().max() < 1e-12
    assert float(conditional.min()) < 0  # only the sum is never negative
    # Equal up to a constant: no divergence, and yet the energies differ by it.
    shift = torch.full((len(z),), 3.0, dtype=torch.float64)
    assert (marginal_energy(z) - marginal_energy(z + 3.0) - shift).abs().max() < 1e-12


def test_hand_made_energies():
    z = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    assert torch.allclose(
        marginal_energy(z), torch.tensor([-math.log(2), -math.log(4)], dtype=torch.float64), atol=1e-15
    )
    assert torch.equal(joint_energy(z, y), torch.tensor([0.0, -math.log(3.0)], dtype=torch.float64))
    assert torch.allclose(marginal_energy(z, 2.0), 2 * marginal_energy(z / 2), atol=1e-15)


def test_gradients_are_those_of_the_formulas():
    z, _, y = batch()
    z.requires_grad_(True)
    (gradient,) = torch.autograd.grad(marginal_energy(z).sum(), z, retain_graph=True)
    assert torch.allclose(gradient, -z.softmax(1), atol=1e-12)
    (gradient,) = torch.autograd.grad(joint_energy(z, y).sum(), z)
    assert torch.equal(gradient, -F.one_hot(y, 7).double())
    assert torch.autograd.gradcheck(lambda v: energies(v, y), (z,))


def test_precision_in_and_out():
    for dtype, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        z, _, y = batch(dtype=torch.float64)
        found = energies(z.to(dtype), y)
        assert found.marginal.dtype == found.joint.dtype == wanted
        exact = energies(z.to(dtype).double(), y)
        assert torch.allclose(found.marginal.double(), exact.marginal, atol=1e-5)
        assert torch.equal(found.joint.double(), exact.joint)
    # Half precision cannot hold the sum: ten terms of 65,504 have a logsumexp beyond its range.
    assert torch.isfinite(marginal_energy(torch.full((1, 10), 65504.0, dtype=torch.float16))).all()
    assert torch.isfinite(marginal_energy(torch.tensor([[-1e4, -2e4]]))).all()


def test_detectors_attacks_and_metrics_share_the_definition():
    z, _, y = batch()
    scores = Energy(temperature=2.0).score_observations(Observations(z.float(), y))
    assert torch.equal(scores, marginal_energy(z.float().double(), 2.0))
    assert torch.equal(get_loss("marginal-energy")(z, y), marginal_energy(z))
    assert torch.equal(get_loss("joint-energy")(z, y), joint_energy(z, y))
    assert torch.equal(get_targeted_loss("joint-energy")(z, y, (y + 1) % 7), -joint_energy(z, (y + 1) % 7))
    found = metrics.sample_energies(z.float().numpy(), y.numpy())
    assert found.marginal.dtype == found.joint.dtype == np.float64
    assert np.array_equal(found.marginal, marginal_energy(z.float().double()).numpy())
    assert np.array_equal(found.joint, joint_energy(z.float().double(), y).numpy())


# Metrics -------------------------------------------------------------------------------------------------------------


def test_hand_made_metrics():
    natural = metrics.sample_energies(np.log(np.array([[1.0, 1.0], [3.0, 1.0], [1.0, 7.0]])), np.array([0, 0, 1]))
    attacked = metrics.sample_energies(np.log(np.array([[1.0, 3.0], [1.0, 1.0], [1.0, 7.0]])), np.array([0, 0, 1]))
    found = {name: e.value for name, e in metrics.attack_metrics(natural, attacked).items()}
    two, four, eight = math.log(2), math.log(4), math.log(8)
    assert found["energy_marginal"] == pytest.approx(-(four + two + eight) / 3, abs=1e-12)
    assert found["delta_energy"] == pytest.approx(0.0, abs=1e-12)  # up by log 2, down by log 2, untouched
    assert found["abs_delta_energy"] == pytest.approx(2 * two / 3, abs=1e-12)
    assert found["energy_joint"] == pytest.approx(-math.log(7) / 3, abs=1e-12)
    assert found["delta_energy_joint"] == pytest.approx(-math.log(3) / 3, abs=1e-12)
    # Attacked inputs of lower energy, more like the training data, give a positive difference.
    lower = metrics.SampleEnergies(natural.marginal - 1.0, natural.joint)
    assert metrics.attack_metrics(natural, lower)["delta_energy"].value == pytest.approx(1.0)


def test_identities_of_the_metrics():
    z, other, y = batch(n=200)
    natural = metrics.sample_energies(z.numpy(), y.numpy())
    attacked = metrics.sample_energies(other.numpy(), y.numpy())
    clean, under = metrics.clean_metrics(natural), metrics.attack_metrics(natural, attacked)
    loss = clean["energy_joint"].value - clean["energy_marginal"].value
    assert loss == pytest.approx(calibration.nll(z.numpy(), y.numpy()).value, abs=1e-12)
    assert under["delta_energy"].value == pytest.approx(
        clean["energy_marginal"].value - under["energy_marginal"].value, abs=1e-12
    )
    assert under["delta_energy_joint"].value == pytest.approx(
        clean["energy_joint"].value - under["energy_joint"].value, abs=1e-12
    )
    assert abs(under["delta_energy"].value) <= under["abs_delta_energy"].value
    same = metrics.attack_metrics(natural, natural)["delta_energy"]
    assert (same.value, same.ci_low, same.ci_high) == (0.0, 0.0, 0.0)
    # Paired: an offset of all logits is in both and moves nothing; and the interval is that of the differences.
    moved = [metrics.sample_energies(v.numpy() + 40.0, y.numpy()) for v in (z, other)]
    assert metrics.attack_metrics(*moved)["delta_energy"].value == pytest.approx(under["delta_energy"].value, abs=1e-9)
    width = under["delta_energy"].ci_high - under["delta_energy"].ci_low
    assert width < 0.5 * (clean["energy_marginal"].ci_high - clean["energy_marginal"].ci_low)


def test_the_interval_is_students():
    values = np.random.default_rng(0).normal(3.0, 2.0, 30)
    found = metrics.mean_energy(values)
    expected = stats.t.interval(0.95, 29, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(30))
    assert (found.ci_low, found.ci_high) == pytest.approx(expected, abs=1e-12)
    assert found.n == 30


def test_the_interval_covers():
    """Of means of normal values and of skewed ones (|N(0, 1)|, as |dE| is where dE is around 0): 95 %, less four standard
    errors of 4,000 simulations (1.4 points) and, for the skewed, what skewness costs at n = 100 (below one point).
    """
    rng = np.random.default_rng(0)
    for draw, truth, n, slack in (
        (lambda size: rng.normal(1.0, 3.0, size), 1.0, 20, 0.014),
        (lambda size: np.abs(rng.normal(0.0, 1.0, size)), math.sqrt(2 / math.pi), 100, 0.024),
    ):
        hits = 0
        for _ in range(4000):
            found = metrics.mean_energy(draw(n))
            hits += found.ci_low <= truth <= found.ci_high
        assert hits / 4000 >= 0.95 - slack


def test_few_or_no_samples():
    one = metrics.mean_energy(np.array([-3.0]))
    assert (one.value, one.n) == (-3.0, 1)
    assert math.isnan(one.ci_low)
    assert "one sample" in one.reason
    none = metrics.mean_energy(np.array([]))
    assert math.isnan(none.value)
    assert "classified correctly clean" in none.reason
    with pytest.raises(DataError, match="NaN"):
        metrics.mean_energy(np.array([1.0, math.nan]))
    two, three = (metrics.sample_energies(np.zeros((n, 4)), np.zeros(n, dtype=int)) for n in (2, 3))
    with pytest.raises(DataError, match="cannot be paired"):
        metrics.attack_metrics(two, three)


def test_histograms_are_shares_over_common_bins():
    z, other, y = batch(n=300)
    groups = [metrics.sample_energies(v.numpy(), y.numpy()) for v in (z, other)]
    found = metrics.energy_histograms(*groups)
    assert set(found) == {"edges", "natural", "attacked", "natural_joint", "attacked_joint"}
    assert {len(v) for v in found.values()} == {metrics.BINS + 1}
    assert (np.diff(found["edges"]) > 0).all()
    for name in ("natural", "attacked", "natural_joint", "attacked_joint"):
        assert found[name][:-1].sum() == pytest.approx(1.0)
        assert found[name][-1] == found[name][-2]
    centres = (found["edges"][1:] + found["edges"][:-1]) / 2
    step = np.diff(found["edges"])[0]
    # Binning moves a value by at most half a bin; clipping at the 0.5 % points by little more.
    assert found["natural"][:-1] @ centres == pytest.approx(groups[0].marginal.mean(), abs=step)
    constant = metrics.SampleEnergies(np.full(5, -2.0), np.full(5, -2.0))
    assert metrics.energy_histograms(constant, constant)["natural"][:-1].max() == 1.0


# In a run ------------------------------------------------------------------------------------------------------------

SUITE = {
    "schema": 1,
    "name": "energies",
    "data": "digits",
    "n": 120,
    "chunk_size": 70,
    "models": [
        {"name": "plain", "train": {"defense": "standard", "recipe": {"epochs": 3, "eps": 0.1, "validation_n": 50}}}
    ],
    "conditions": [
        {"attack": "pgd", "eps": 0.1, "steps": 5, "stop": "never"},
        {"attack": "pgd", "eps": 0.1, "steps": 5, "stop": "never", "target": 3, "label": "to three"},
        {"attack": "pgd", "eps": 0.1, "steps": 5, "label": "stops"},
        {"attack": "fmn", "eps": 0.3, "steps": 5, "norm": "Linf", "label": "nearest"},
        {"corruption": "gaussian-noise", "severity": [3]},
        {"outliers": ["letters"], "n": 20},
    ],
}
NAMES = {"energy_marginal", "energy_joint", "delta_energy", "abs_delta_energy", "delta_energy_joint"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("energies")
    return folder, run_suite(SUITE, folder).results


def test_only_attacks_that_go_on_to_the_end_have_energies(run):
    _, results = run
    found = {c["label"]: {r.metric for r in results.find(condition=c["label"])} & NAMES for c in results.conditions}
    assert found.pop("clean") == {"energy_marginal", "energy_joint"}
    assert {label for label, names in found.items() if names} == {"pgd Linf 0.1", "to three"}
    assert found["pgd Linf 0.1"] == found["to three"] == NAMES
    assert [c.condition for c in results.curves if c.kind == "energies"] == ["pgd Linf 0.1", "to three"]
    for name in NAMES:
        assert results.metrics[name]["higher_is_better"] is None
        assert not results.metrics[name]["percent"]


def test_energies_of_a_run_are_those_of_its_records(run):
    folder, results = run
    context = Context(validate_suite(SUITE), folder)

    def load(label):
        parts = [context.store.load(context.observation_key(Cell("plain", label, "test", c))) for c in range(2)]
        return {name: np.concatenate([p[name] for p in parts]) for name in ("logits", "label")}

    def value(label, metric, group=None):
        (row,) = results.find(condition=label, metric=metric, group=group)
        assert row.ci_low <= row.value <= row.ci_high
        return row.value, row.n

    clean = load("clean")
    y, right = clean["label"], clean["logits"].argmax(1) == clean["label"]

    def marginal(columns):
        return -np.log(np.exp(columns["logits"].astype(np.float64)).sum(axis=1))

    assert value("clean", "energy_marginal") == (pytest.approx(marginal(clean).mean(), abs=1e-9), 120)
    group = "classified correctly"
    assert value("clean", "energy_marginal", group) == (pytest.approx(marginal(clean)[right].mean()), right.sum())
    for label, mine in (("pgd Linf 0.1", right), ("to three", right & (y != 3))):
        attacked = load(label)
        delta = (marginal(clean) - marginal(attacked))[mine]
        assert value(label, "delta_energy") == (pytest.approx(delta.mean(), abs=1e-9), mine.sum())
        assert value(label, "abs_delta_energy")[0] == pytest.approx(np.abs(delta).mean(), abs=1e-9)
        joint = -attacked["logits"][np.arange(120), y].astype(np.float64)
        assert value(label, "energy_joint")[0] == pytest.approx(joint[mine].mean(), abs=1e-9)
        # An untargeted and a targeted attack both bring down the true class: its joint energy goes up.
        assert value(label, "delta_energy_joint")[0] < 0
