"""Base models: against independent implementations where there are any, on known distributions otherwise."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from robustbench_ext.catalog import REGRESSION_ESTIMATORS
from robustbench_ext.errors import ConfigError, DataError
from uq import LEVELS, NOMINAL, Heteroscedastic, QuantileForest, QuantileRegression, Samples
from uq.fitting import Fit, Scaling, folds, minimise, mlp
from uq.linear_quantiles import linear_quantiles
from uq.quantile_models import MODELS, make_model

Q = np.array(LEVELS)
QUICK = {"forest": {"trees": 10}, "extra-trees": {"trees": 10}, "boosting": {"rounds": 15}, "lightgbm": {"rounds": 15}}
QUICK |= {name: {"steps": 200} for name in ("multi-quantile", "single-quantile", "gaussian")}


def draw(n, seed=0):
    """y = 10 + 4 x_1 + (0.5 + x_2) e with e normal, and its quantiles at LEVELS; the third input says nothing."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, 3)) * [1, 1, 100] + [0, 0, 1000]
    mean, sigma = 10 + 4 * x[:, 0], 0.5 + x[:, 1]
    return x, mean + sigma * rng.normal(size=n), mean[:, None] + sigma[:, None] * norm.ppf(Q)


def loss(y, q, level):
    return np.maximum(level * (y - q), (level - 1) * (y - q)).sum()


# Linear --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_linear_quantiles_reach_the_optimum_of_a_linear_programme(seed):
    from sklearn.linear_model import QuantileRegressor

    rng = np.random.default_rng(seed)
    z = rng.normal(size=(120, 4))
    y = 50 + z @ [1, 2, 0, -3] + rng.standard_t(2, size=120) * (1 + abs(z[:, 0]))
    design = np.column_stack([np.ones(120), z])
    made = linear_quantiles(design, y, Q)
    for level, b in list(zip(Q, made, strict=True))[::2]:
        exact = QuantileRegressor(quantile=level, alpha=0, solver="highs").fit(z, y)
        best = loss(y, exact.predict(z), level)
        # The gap is at most 1e-10 standard deviations per sample; HiGHS itself is good to 1e-7 of its constraints.
        assert loss(y, design @ b, level) - best < 1e-10 * 120 * y.std() + 1e-6


def test_linear_quantiles_leave_their_share_of_residuals_below():
    x, y, _ = draw(400)
    design = np.column_stack([np.ones(400), Scaling(x).to(x)])
    residual = y[:, None] - design @ linear_quantiles(design, y, Q).T
    # At the optimum at most n tau lie strictly below and at least n tau at or below, d of them on the plane.
    assert ((residual < -1e-7).sum(0) <= 400 * Q + 1e-9).all()
    assert ((residual < 1e-7).sum(0) >= 400 * Q - 1e-9).all()


def test_a_system_without_digits_is_solved_with_a_ridge():
    from uq.linear_quantiles import _solved

    right = np.array([[[1.0], [1.0]], [[2.0], [0.0]]])
    normal = np.stack([np.ones((2, 2)), np.eye(2)])  # the first is singular
    made = _solved(normal, right)
    np.testing.assert_allclose(normal @ made, right, rtol=1e-6, atol=1e-6)


def test_linear_quantiles_in_degenerate_cases():
    a = np.arange(40) % 3.0
    twice = np.column_stack([np.ones(40), a, 2 * a])
    y = np.arange(40) % 5.0
    made, plain = linear_quantiles(twice, y, Q), linear_quantiles(twice[:, :2], y, Q)
    for level, b, c in zip(Q, made, plain, strict=True):
        assert loss(y, twice @ b, level) == pytest.approx(loss(y, twice[:, :2] @ c, level), abs=1e-7)
    np.testing.assert_allclose(twice @ linear_quantiles(twice, np.full(40, 3.0), Q).T, 3.0, rtol=0, atol=1e-8)
    few = np.random.default_rng(0).normal(size=(3, 5))  # more columns than rows: everything can be fitted
    np.testing.assert_allclose(few @ linear_quantiles(few, y[:3], Q).T, np.repeat(y[:3, None], 9, 1), atol=1e-6)


# Forests -------------------------------------------------------------------------------------------------------------


def test_forest_quantiles_by_their_definition():
    x, y, _ = draw(150)
    forest = make_model({"name": "forest", "trees": 7, "min_leaf": 5}).fit(x, y, LEVELS, 3)
    new = draw(20, 1)[0]
    inside, at = forest._forest.apply(x), forest._forest.apply(new)
    for row, q in zip(at, forest.quantiles(new), strict=True):
        same = inside == row
        weight = (same / same.sum(0)).mean(1)
        assert weight.sum() == pytest.approx(1.0)
        order = np.argsort(y, kind="stable")
        cumulated = np.cumsum(weight[order])
        for level, value in zip(LEVELS, q, strict=True):
            assert value == y[order][np.argmax(cumulated >= level - 1e-12)]


def test_extra_trees_agree_with_other_implementations():
    from sklearn.ensemble import ExtraTreesRegressor

    x, y, _ = draw(300)
    new = draw(50, 1)[0]
    ours = make_model({"name": "extra-trees", "trees": 30, "min_leaf": 8}).fit(x, y, LEVELS, 0)
    weights = (ours._leaves(new) @ ours._inside).toarray() / 30  # (50, 300), along sorted targets
    # Without a bootstrap the weighted mean of the targets is the forest's own prediction.
    plain = ExtraTreesRegressor(30, min_samples_leaf=8, random_state=0).fit(x, y)
    np.testing.assert_allclose(weights @ np.sort(y), plain.predict(new), rtol=1e-12)
    package = pytest.importorskip("quantile_forest")
    theirs = package.ExtraTreesQuantileRegressor(30, min_samples_leaf=8, random_state=0, max_samples_leaf=None)
    found = theirs.fit(x, y).predict(new, quantiles=list(LEVELS), interpolation="lower", weighted_leaves=True)
    # The package sets its quantiles by the middle of each weight's step, we by its end, so they may differ by a target or so:
    # but the cumulated weight at theirs must be the level, to the weight of two targets.
    at = np.searchsorted(np.sort(y), found, side="left")
    cumulated = np.take_along_axis(np.cumsum(weights, axis=1), at, axis=1)
    assert (np.abs(cumulated - Q) <= 2 * weights.max(axis=1, keepdims=True)).all()
    assert (ours.quantiles(new) == found).mean() > 0.8


def test_blocks_of_samples_change_nothing(monkeypatch):
    x, y, _ = draw(100)
    forest = make_model({"name": "forest", "trees": 5}).fit(x, y, LEVELS)
    whole = forest.quantiles(x)
    monkeypatch.setattr("uq.quantile_models._CELLS", 700)  # seven rows at a time
    assert (forest.quantiles(x) == whole).all()


def test_neighbours():
    x, y, _ = draw(200)
    nearest = make_model({"name": "knn", "k": 1}).fit(x, y, LEVELS)
    assert (nearest.quantiles(x) == y[:, None]).all()
    every = make_model({"name": "knn", "k": 500}).fit(x, y, LEVELS)
    np.testing.assert_allclose(every.quantiles(x[:3]), np.repeat(np.quantile(y, Q)[None], 3, 0), rtol=1e-12)


# All -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns_and_repeats_itself(name):
    if name == "lightgbm":
        pytest.importorskip("lightgbm")
    x, y, _ = draw(300)
    new, target, truth = draw(500, 1)
    make = lambda: make_model({"name": name, **QUICK.get(name, {})}).fit(x, y, LEVELS, seed=5)  # noqa: E731
    made = make().quantiles(new)
    assert made.shape == (500, len(LEVELS)) and made.dtype == np.float64
    assert (make().quantiles(new) == made).all()
    total = [sum(loss(target, q[:, k], level) for k, level in enumerate(Q)) for q in (made, truth)]
    flat = sum(loss(target, np.quantile(y, level), level) for level in Q)
    # Better than the marginal quantiles, by at least a fifth of what the truth gains on them.
    assert total[0] < flat - 0.2 * (flat - total[1])
    # Units do not matter: trees cut where they cut, networks and linear models standardise.
    scaled = make_model({"name": name, **QUICK.get(name, {})}).fit(x, 100 * y - 7, LEVELS, seed=5).quantiles(new)
    np.testing.assert_allclose(scaled, 100 * made - 7, rtol=1e-3, atol=1e-3 * 100 * y.std())


@pytest.mark.parametrize("name", ["single-quantile", "multi-quantile", "gaussian"])
def test_networks_follow_the_noise(name):
    x, y, _ = draw(1500)
    new, _, truth = draw(300, 1)
    made = make_model({"name": name, "steps": 1500}).fit(x, y, LEVELS, 0).quantiles(new)
    spread, true_spread = made[:, 7] - made[:, 1], truth[:, 7] - truth[:, 1]
    assert np.corrcoef(spread, true_spread)[0, 1] > 0.8
    # The level as a mere input bends a smooth network too little at its ends: its tails are too short.
    assert spread.mean() == pytest.approx(true_spread.mean(), rel=0.3 if name == "single-quantile" else 0.1)


def test_the_penalty_reduces_crossing():
    x, y, _ = draw(60)
    new = draw(500, 1)[0]
    crossed = {}
    for weight in (0.0, 50.0):
        net = make_model({"name": "multi-quantile", "steps": 600, "margin_weight": weight})
        crossed[weight] = (np.diff(net.fit(x, y, np.linspace(0.02, 0.98, 25)).quantiles(new)) < 0).mean()
    assert crossed[0.0] > 0.02
    assert crossed[50.0] < 0.5 * crossed[0.0]


def test_beta_nll_is_the_likelihood_at_zero_and_least_squares_at_one():
    x, y = torch.zeros(4, 1), torch.tensor([0.0, 1.0, 2.0, 5.0])

    def slope(beta):
        model = make_model({"name": "gaussian", "beta": beta})
        out = torch.tensor([[0.5, s] for s in (-2.0, -1.0, 0.0, 1.0)], requires_grad=True)
        model._loss(lambda _: out, x, y).backward()
        return out.grad, model.FLOOR + torch.nn.functional.softplus(out[:, 1]).detach(), out[:, 1].detach().sigmoid()

    for beta in (0.0, 0.5, 1.0):
        gradient, sigma, softplus_slope = slope(beta)
        weight = sigma ** (2 * beta) / 4  # held constant: it scales both gradients of the likelihood
        torch.testing.assert_close(gradient[:, 0], -weight * (y - 0.5) / sigma**2, rtol=1e-5, atol=1e-6)
        by_sigma = weight * (1 / sigma - (y - 0.5) ** 2 / sigma**3)
        torch.testing.assert_close(gradient[:, 1], by_sigma * softplus_slope, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="beta"):
        Heteroscedastic(beta=1.5)


# Estimators ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantile-regression", "quantile-forest", "heteroscedastic"])
def test_estimators(name):
    make = REGRESSION_ESTIMATORS.load(name)
    estimator = make(steps=300) if name == "heteroscedastic" else make()
    x, y, _ = draw(400)
    new, target, _ = draw(600, 1)
    train, test = Samples(x, np.zeros(400), y), Samples(new, np.zeros(600))
    made = estimator.fit(train, train, seed=1).predict(test)
    assert (np.diff(made.quantiles, axis=1) >= 0).all()
    for c, nominal in enumerate(NOMINAL):
        inside = ((made.low[:, c] <= target) & (target <= made.high[:, c])).mean()
        assert inside == pytest.approx(nominal, abs=0.09)
    assert make(**estimator.parameters()).spec() == estimator.spec()
    if name == "heteroscedastic":
        np.testing.assert_allclose((made.high - made.low)[:, 0] / 2 / norm.ppf(0.75), made.aleatoric, rtol=1e-6)
    if name == "quantile-forest":
        plain = QuantileRegression("forest").fit(train, train, seed=1).predict(test)
        assert (plain.quantiles == made.quantiles).all() and (made.crossed == 0).all()


def test_faults():
    x, y, _ = draw(20)
    for spec in ("no-such", {"k": 3}, {"name": "knn", "neighbours": 3}):
        with pytest.raises(ConfigError):
            make_model(spec)
    for levels in ([0.5, 0.4], [0.0, 0.5], [0.5, 0.5]):
        with pytest.raises(ConfigError, match="levels"):
            make_model("knn").fit(x, y, levels)
    with pytest.raises(DataError):
        make_model("knn").fit(x, y[:3], LEVELS)
    assert QuantileForest().spec()["uq"] == "quantile-forest"


# Fitting -------------------------------------------------------------------------------------------------------------


def test_folds_belong_to_ids():
    ids = np.array([f"s{i}" for i in range(103)])
    fold = folds(103, 5, 7, ids)
    assert sorted(np.bincount(fold)) == [20, 20, 21, 21, 21]
    order = np.random.default_rng(0).permutation(103)
    assert (folds(103, 5, 7, ids[order]) == fold[order]).all()
    assert (folds(103, 5, 8, ids) != fold).any()
    assert (folds(103, 5, 7, ids, "other") != fold).any()
    with pytest.raises(DataError, match="folds"):
        folds(4, 5, 0)


def test_minimise_keeps_the_best_and_leaves_the_global_generator_alone():
    x = torch.linspace(-1, 1, 50)[:, None]
    seen = []

    def validate(net):
        seen.append(float(((net(x) - x.square()) ** 2).mean()))
        return torch.tensor(seen[-1] if len(seen) < 4 else 9.0)  # from the fourth on it only gets worse

    torch.manual_seed(3)
    before = torch.get_rng_state()
    how = Fit(steps=1000, every=10, patience=30)
    net, steps, value = minimise(
        lambda: mlp(1, 1, dropout=0.1), lambda n, r: ((n(x[r]) - x[r].square()) ** 2).mean(), 50, how, 0, validate
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert steps == 20 and len(seen) == 6 and not net.training  # steps 0, 10, 20, then three without a better value
    assert value == seen[2] == pytest.approx(float(((net(x) - x.square()) ** 2).mean().detach()))
