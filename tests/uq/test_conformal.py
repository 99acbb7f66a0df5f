"""Conformal thresholds, coverage by simulation, agreement with MAPIE."""

import math

import numpy as np
import pytest

from robustbench_ext.errors import ConfigError, DataError
from uq import CQR, LEVELS, NOMINAL, QuantileRegression, Samples, SplitConformal
from uq.conformal import (
    cv_min_max,
    cv_plus,
    cv_plus_slack,
    interval_scores,
    nested,
    rank,
    threshold,
    thresholds,
    widened,
)
from uq.fitting import folds
from uq.quantile_models import make_model

I90 = NOMINAL.index(0.9)


def draw(n, seed=0, d=3, skew=False):
    """y = x_1 + (0.2 + x_2) e, e normal or exponential; a regressor that knows the mean."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, d))
    e = rng.exponential(size=n) - 1 if skew else rng.normal(size=n)
    return Samples(x, x[:, 0].copy(), x[:, 0] + (0.2 + x[:, 1]) * e, ids=np.array([f"{seed}-{i}" for i in range(n)]))


def covered(made, y, nominal=0.9):
    c = NOMINAL.index(nominal)
    return (made.low[:, c] <= y) & (y <= made.high[:, c])


def test_rank_and_threshold():
    scores = np.array([3.0, 1, 4, 1.5, 9, 2, 6, 5, 3.5])
    assert rank(9, 0.1) == 9
    assert threshold(scores, 0.1) == 9.0  # the ninth smallest of nine
    assert threshold(scores[:8], 0.1) == math.inf
    assert threshold(scores, 0.5) == 3.5  # the fifth
    assert rank(99, 0.05) == 95  # 0.95 * 100 is 95 in real numbers; floating point must not make it 96
    with pytest.raises(ConfigError, match="alpha"):
        threshold(scores, 0.0)
    with pytest.raises(DataError, match="finite"):
        threshold(np.array([1.0, np.nan]), 0.1)


def test_coverage_of_the_threshold():
    """2,000 exchangeable repeats with n = 19 scores: the chance is exactly k / (n + 1) without ties."""
    rng = np.random.default_rng(0)
    for alpha, k in ((0.1, 18), (0.5, 10), (0.33, 14)):
        draws = rng.normal(size=(2000, 20))
        hits = np.mean([d[19] <= threshold(d[:19], alpha) for d in draws])
        chance = k / 20
        assert 1 - alpha <= chance <= 1 - alpha + 1 / 20
        assert abs(hits - chance) < 3 * math.sqrt(chance * (1 - chance) / 2000)


@pytest.mark.parametrize(
    "make",
    [
        SplitConformal,
        pytest.param(lambda: SplitConformal("local"), marks=pytest.mark.slow),  # 300 forests
        lambda: CQR("linear"),
        lambda: CQR("linear", sides="each"),
    ],
)
def test_coverage_of_the_estimators(make):
    """300 fits with 40 calibration samples each (half of them for the local scale)."""
    hits = []
    for seed in range(300):
        train, calibration, test = (draw(n, 3 * seed + i, skew=True) for i, n in enumerate((60, 40, 50)))
        estimator = make().fit(train, calibration, seed=seed)
        hits.append(covered(estimator.predict(test), test.y).mean())
    n = estimator.n
    chance = (
        rank(n, 0.1) / (n + 1) if getattr(estimator, "sides", "both") == "both" else 2 * rank(n, 0.05) / (n + 1) - 1
    )
    # Fits are independent, so the spread of their coverages gives the mean's standard error. Nesting only widens, and rarely.
    error = 3 * np.std(hits) / math.sqrt(len(hits))
    assert chance - error < np.mean(hits) < chance + error


def test_units_leave_every_verdict_alone_and_a_monotone_map_the_chance():
    train, calibration, test = draw(100, 1), draw(80, 2), draw(200, 3)
    q = QuantileRegression().fit(train, calibration)
    levels_cal, levels_test = q.predict(calibration).quantiles, q.predict(test).quantiles
    plain = covered(widened(levels_test, thresholds(calibration.y, levels_cal)), test.y)
    for a, b in ((3.0, 0.0), (1.0, 5.0), (0.1, -2.0)):
        mapped = widened(a * levels_test + b, thresholds(a * calibration.y + b, a * levels_cal + b))
        assert (covered(mapped, a * test.y + b) == plain).all()
    # Scores are differences, so a bent map reorders them and other samples are covered; the chance stays k / (n + 1) = 36/40.
    hits = []
    for seed in range(400):
        calibration, test = draw(39, 2 * seed), draw(25, 2 * seed + 1)
        cal, new = (np.exp(q.predict(part).quantiles) for part in (calibration, test))
        hits.append(covered(widened(new, thresholds(np.exp(calibration.y), cal)), np.exp(test.y)).mean())
    assert abs(np.mean(hits) - 0.9) < 3 * np.std(hits) / math.sqrt(len(hits))


def test_widened_intervals_are_nested_and_hold_the_median():
    rng = np.random.default_rng(0)
    q = np.sort(rng.normal(size=(200, len(LEVELS))), axis=1)
    made = widened(q, np.array([[0.9, 0.9], [-0.8, -0.8], [-2.0, -2.0], [0.1, np.inf]]))
    assert (np.diff(made.quantiles, axis=1) >= 0).all()
    assert (np.diff(made.low, axis=1) <= 0).all() and (np.diff(made.high, axis=1) >= 0).all()
    assert (made.low[:, 0] <= made.point).all() and (made.point <= made.high[:, 0]).all()
    assert np.isinf(made.high[:, -1]).all()
    low, high = nested(np.zeros(1), np.array([[1.0, -2, -1]]), np.array([[2.0, 1, 3]]))
    assert low.tolist() == [[0, -2, -2]] and high.tolist() == [[2, 2, 3]]


def test_too_few_calibration_samples_give_infinite_intervals():
    for estimator in (SplitConformal(), CQR("linear")):
        made = estimator.fit(draw(60), draw(18, 1)).predict(draw(5, 2))
        assert np.isinf(made.low[:, NOMINAL.index(0.95)]).all()  # needs 19
        assert np.isfinite(made.low[:, I90]).all()  # needs 9
        assert "too few" in estimator.warnings()[0]


def test_each_side_gets_its_own_share():
    """A model that is right on one side only: one threshold for both ends leaves the tails uneven, two do not."""
    train, calibration, test = draw(400, 1, skew=True), draw(800, 2, skew=True), draw(4000, 3, skew=True)
    wrong = {}
    for sides in ("both", "each"):
        made = CQR({"name": "gaussian", "steps": 100}, sides=sides).fit(train, calibration).predict(test)
        wrong[sides] = (np.mean(test.y < made.low[:, I90]), np.mean(test.y > made.high[:, I90]))
    # 800 calibration and 4,000 test samples: a tail of 5 % is known to 0.85 points (one standard error).
    assert max(abs(np.array(wrong["each"]) - 0.05)) < 0.026
    assert max(abs(np.array(wrong["both"]) - 0.05)) > 0.026


def test_local_scale_follows_the_noise():
    calibration, test = draw(600, 1), draw(500, 2)
    made = SplitConformal("local").fit(draw(10), calibration).predict(test)
    width = made.high[:, I90] - made.low[:, I90]
    assert np.corrcoef(width, 0.2 + test.x[:, 1])[0, 1] > 0.7
    flat = SplitConformal().fit(draw(10), calibration).predict(test)
    assert np.ptp(flat.high[:, I90] - flat.low[:, I90]) < 1e-12
    assert flat.quantiles is None


# Cross-validation ----------------------------------------------------------------------------------------------------


def test_cv_plus_by_its_definition():
    rng = np.random.default_rng(0)
    fold, scores = folds(23, 4, 0), rng.normal(size=23)
    low, high = np.sort(rng.normal(size=(2, 7, 4)), axis=0)
    for alpha in (0.1, 0.2, 0.37):
        made_low, made_high = cv_plus(low, high, fold, scores, alpha)
        for i in range(7):
            below = sorted(low[i, fold[j]] - scores[j] for j in range(23))
            above = sorted(high[i, fold[j]] + scores[j] for j in range(23))
            ends = below[math.floor(alpha * 24 + 1e-9) - 1], above[math.ceil((1 - alpha) * 24 - 1e-9) - 1]
            assert (made_low[i], made_high[i]) == (min(ends), max(ends))
    assert np.isinf(cv_plus(low, high, fold, scores, 0.01)).all()


def test_cv_bounds_of_one_model_for_all_are_split_conformal():
    scores = np.abs(np.random.default_rng(1).normal(size=40))
    v = np.linspace(0, 1, 5)[:, None]
    t = threshold(scores, 0.1)
    for made in (cv_plus(v, v, np.zeros(40, dtype=int), scores, 0.1), cv_min_max(v, v, scores, 0.1)):
        np.testing.assert_allclose(made, (v[:, 0] - t, v[:, 0] + t), rtol=0, atol=1e-15)


def test_cv_plus_slack():
    assert cv_plus_slack(100, 100) == 0.0  # jackknife+
    assert cv_plus_slack(100, 10) == pytest.approx(min(2 * 0.9 / 11, 0.9 / 11))
    assert all(cv_plus_slack(n, k) <= math.sqrt(2 / n) for n in range(2, 200) for k in range(2, n + 1))


def test_cv_plus_scores_samples_by_models_that_did_not_see_them():
    made = CQR({"name": "knn", "k": 1}, method="cv+").fit(draw(60), draw(40, 1))
    assert (made._scores > 0).all()  # a nearest neighbour that is the sample itself would be right every time


def test_cqr_by_cv_plus_covers():
    hits = []
    for seed in range(200):
        both, test = draw(80, 2 * seed), draw(25, 2 * seed + 1)
        made = (
            CQR("linear", method="cv+").fit(both.take(slice(0, 50)), both.take(slice(50, 80)), seed=seed).predict(test)
        )
        hits.append(covered(made, test.y).mean())
    assert np.mean(hits) > 1 - 2 * 0.1 - cv_plus_slack(80, 5)  # the promise
    assert abs(np.mean(hits) - 0.9) < 0.04  # the practice


# MAPIE ---------------------------------------------------------------------------------------------------------------


class _Linear:
    """A fitted scikit-learn-like regressor that returns one column of a quantile model."""

    def __new__(cls, model, column):
        from sklearn.base import BaseEstimator, RegressorMixin

        class Wrapped(RegressorMixin, BaseEstimator):
            def fit(self, x, y):
                return self

            def predict(self, x):
                return np.sort(model.quantiles(x), axis=1)[:, column]

            def __sklearn_is_fitted__(self):
                return True

        return Wrapped()


def test_split_conformal_equals_mapie():
    mapie = pytest.importorskip("mapie.regression")
    train, calibration, test = draw(50), draw(150, 1), draw(60, 2)
    linear = make_model("linear").fit(train.x, train.y, LEVELS)
    regressor = _Linear(linear, LEVELS.index(0.5))
    theirs = mapie.SplitConformalRegressor(regressor, confidence_level=list(NOMINAL), prefit=True)
    _, intervals = theirs.conformalize(calibration.x, calibration.y).predict_interval(test.x)
    at = [Samples(s.x, regressor.predict(s.x), s.y, ids=s.ids) for s in (train, calibration, test)]
    ours = SplitConformal().fit(at[0], at[1]).predict(at[2])
    np.testing.assert_allclose(np.stack([ours.low, ours.high], 1), intervals, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sides", ["both", "each"])
def test_cqr_equals_mapie(sides):
    mapie = pytest.importorskip("mapie.regression")
    train, calibration, test = draw(100), draw(150, 1), draw(60, 2)
    ours = CQR("linear", sides=sides).fit(train, calibration)
    made, linear = ours.predict(test), make_model("linear").fit(train.x, train.y, LEVELS)
    for nominal in (0.8, 0.9):
        i, j = LEVELS.index(round((1 - nominal) / 2, 6)), LEVELS.index(round((1 + nominal) / 2, 6))
        parts = [_Linear(linear, c) for c in (i, j, LEVELS.index(0.5))]
        theirs = mapie.ConformalizedQuantileRegressor(parts, confidence_level=nominal, prefit=True)
        theirs.conformalize(calibration.x, calibration.y)
        _, intervals = theirs.predict_interval(test.x, symmetric_correction=sides == "both")
        column = NOMINAL.index(nominal)
        np.testing.assert_allclose(made.low[:, column], intervals[:, 0, 0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(made.high[:, column], intervals[:, 1, 0], rtol=0, atol=1e-12)


def test_cv_plus_equals_mapie():
    mapie = pytest.importorskip("mapie.regression")
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import KFold

    data, test = draw(60), draw(30, 1)
    splits = KFold(5)
    theirs = mapie.CrossConformalRegressor(LinearRegression(), confidence_level=0.8, method="plus", cv=splits)
    _, intervals = theirs.fit_conformalize(data.x, data.y).predict_interval(test.x)
    fold, scores, columns = np.empty(60, dtype=int), np.empty(60), []
    for k, (rest, away) in enumerate(splits.split(data.x)):
        model = LinearRegression().fit(data.x[rest], data.y[rest])
        fold[away], scores[away] = k, np.abs(data.y[away] - model.predict(data.x[away]))
        columns.append(model.predict(test.x))
    v = np.stack(columns, axis=1)
    low, high = cv_plus(v, v, fold, scores, 0.2)
    np.testing.assert_allclose(low, intervals[:, 0, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(high, intervals[:, 1, 0], rtol=0, atol=1e-12)


def test_faults():
    assert (interval_scores(np.array([0.0, 3]), np.array([1.0, 1]), np.array([2.0, 2])) == 1).all()
    for wrong in (lambda: SplitConformal("global"), lambda: CQR(sides="left"), lambda: CQR("no-such-model")):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="cv\\+"):
        CQR(sides="each", method="cv+")
