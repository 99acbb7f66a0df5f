"""Aggregation: the families contain each other, outputs stay in the hull, weights come from honest predictions."""

import numpy as np
import pytest
import torch

from robustbench_ext.errors import ConfigError
from uq import LEVELS, QuantileAggregation, QuantileRegression, Samples
from uq import quantile_aggregation as module
from uq.aggregator import (
    RESOLUTIONS,
    Aggregator,
    Objective,
    Rows,
    Shape,
    aggregate,
    fit_aggregator,
    margins,
    normalised,
)
from uq.fitting import Fit, folds
from uq.quantile_aggregation import PAPER, QUICK, out_of_fold
from uq.quantile_models import QuantileModel

N, D, P, M = 40, 3, 4, 5
FORM = {"coarse": (P,), "medium": (P, M), "fine": (M, P, M)}


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = tensor(N, P, M)


def draw(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.random((n, 4))
    y = 3 * np.sin(4 * x[:, 0]) + x[:, 1] + (0.2 + x[:, 2]) * rng.normal(size=n)
    return Samples(x, np.zeros(n), y, ids=np.array([f"{seed}-{i}" for i in range(n)]))


def wis(made, y):
    u, q = y[:, None] - made.quantiles, np.array(LEVELS)
    return 2 * np.maximum(q * u, (q - 1) * u).sum(1).mean()


# Families ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_weights_are_on_the_simplex(resolution):
    w = normalised(3 * tensor(7, *FORM[resolution]), resolution)
    total = {"coarse": (-1,), "medium": (-2,), "fine": (-2, -1)}[resolution]
    assert (w > 0).all()
    torch.testing.assert_close(w.sum(total), torch.ones_like(w.sum(total)), rtol=0, atol=1e-14)


def test_one_hot_and_uniform():
    for j in range(P):
        coarse = torch.eye(P, dtype=torch.float64)[j]
        assert torch.equal(aggregate(coarse, BASE, "coarse"), BASE[:, j])
        assert torch.equal(aggregate(coarse[:, None].expand(P, M), BASE, "medium"), BASE[:, j])
    made = aggregate(torch.full((P,), 1 / P, dtype=torch.float64), BASE, "coarse")
    torch.testing.assert_close(made, BASE.mean(1), rtol=0, atol=1e-15)


def test_the_families_contain_each_other():
    medium = normalised(tensor(P, M), "medium")
    fine = medium.permute(1, 0)[:, :, None] * torch.eye(M, dtype=torch.float64)[:, None, :]  # all mass on nu = tau
    expected = aggregate(medium, BASE, "medium")
    torch.testing.assert_close(aggregate(fine, BASE, "fine"), expected, rtol=0, atol=1e-14)
    coarse = normalised(tensor(P), "coarse")
    constant = aggregate(coarse[:, None].expand(P, M), BASE, "medium")
    torch.testing.assert_close(constant, aggregate(coarse, BASE, "coarse"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_local_starts_as_global_uniform_and_stays_in_the_hull(resolution):
    x = tensor(N, D, seed=1)
    local = Aggregator(Shape(resolution, local=True, diagonal=4.0), D, P, M).double()
    everywhere = Aggregator(Shape(resolution, local=False, diagonal=4.0), D, P, M).double()
    torch.testing.assert_close(local.predict(x, BASE), everywhere.predict(x, BASE), rtol=0, atol=1e-14)
    if resolution != "fine":
        torch.testing.assert_close(local.predict(x, BASE), BASE.mean(1), rtol=0, atol=1e-14)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.copy_(tensor(*parameter.shape, seed=parameter.numel()))
    made = local.predict(x, BASE)
    axes = (1, 2) if resolution == "fine" else (1,)
    low, high = BASE.amin(axes), BASE.amax(axes)
    if resolution == "fine":
        low, high = low[:, None], high[:, None]
    assert (made >= low - 1e-12).all() and (made <= high + 1e-12).all()
    assert not torch.allclose(made, everywhere.predict(x, BASE), atol=1e-3)


def test_coarse_weights_of_sorted_quantiles_never_cross_and_others_do():
    base = BASE.sort(dim=2).values
    x = tensor(N, D, seed=1)
    for resolution in RESOLUTIONS:
        net = Aggregator(Shape(resolution, local=True), D, P, M).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(2 * tensor(*parameter.shape, seed=parameter.numel()))
        crossed = (net.predict(x, base).diff(dim=1) < -1e-12).any()
        assert bool(crossed) == (resolution != "coarse")


def test_fine_weights_start_on_the_diagonal():
    w = Aggregator(Shape("fine", local=False), D, P, M).weights(torch.zeros(1, D))[0]
    on = w.diagonal(dim1=0, dim2=2).sum(0)  # over models, per level
    expected = P * np.exp(4) / (P * np.exp(4) + P * (M - 1))
    torch.testing.assert_close(on, torch.full((M,), expected, dtype=on.dtype), rtol=1e-5, atol=0)


def test_one_model_with_global_coarse_weights_is_that_model():
    train, test = draw(120), draw(50, 1)
    one = QuantileAggregation(models=["linear"], resolution="coarse", local=False, steps=50).fit(train, train)
    plain = QuantileRegression("linear").fit(train, train)
    np.testing.assert_array_equal(one.predict(test).quantiles, plain.predict(test).quantiles)


def test_margins():
    levels = torch.tensor([0.1, 0.5, 0.9])
    base = torch.zeros(101, 2, 3)
    y = torch.linspace(-1, 1, 101)
    assert torch.equal(margins(Objective(margin=0.02), y, base, levels), torch.full((3, 3), 0.02))
    made = margins(Objective(margin=0.1, adaptive=True), y, base, levels)
    assert float(made[0, 2]) == pytest.approx(0.1 * 1.6, rel=1e-5)


@pytest.mark.parametrize("inside", ["none", "sort", "pava", "min-max"])
def test_isotonisation_inside_training(inside):
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    y = tensor(200, seed=4).float()
    rows = Rows(tensor(200, D, seed=1).float(), y, (tensor(200, P, M, seed=2) + y[:, None, None]).float())
    objective = Objective(inside=inside)
    net, steps, _ = fit_aggregator(rows, levels, Shape("medium", local=False), objective, Fit(lr=0.01, steps=150), 0)
    assert steps == 150
    start = aggregate(normalised(torch.zeros(P, M), "medium"), rows.base, "medium")

    def pinball(q):
        u = y[:, None] - q.sort(dim=1).values
        return torch.maximum(levels * u, (levels - 1) * u).sum(1).mean()

    assert pinball(net.predict(rows.x, rows.base)) < pinball(start)


# Stacking ------------------------------------------------------------------------------------------------------------


class Recorder(QuantileModel):
    """Remembers what it was fitted to and asked about; predicts the mean of its training targets."""

    log: list = []

    def _fit(self, x, y, seed):
        self.seen, self.mean = {tuple(row) for row in x}, y.mean()

    def quantiles(self, x):
        self.log.append((self.seen, {tuple(row) for row in x}))
        return np.full((len(x), len(self.levels)), self.mean)


def test_out_of_fold_predictions_come_from_models_that_did_not_see_the_row(monkeypatch):
    Recorder.log = []
    monkeypatch.setattr(module, "make_model", lambda spec: Recorder())
    data = draw(53)
    fold = folds(53, 5, 0, data.ids)
    made = out_of_fold(["any", "any"], data.x, data.y, np.array(LEVELS), fold, 0)
    assert made.shape == (53, 2, len(LEVELS))
    assert len(Recorder.log) == 10
    for seen, asked in Recorder.log:
        assert not seen & asked and len(seen | asked) == 53
    for k in range(5):
        assert np.allclose(made[fold == k], data.y[fold != k].mean())


def test_a_model_that_memorises_gets_all_weight_only_in_sample():
    """1-NN is perfect on its own training data and poor on others: the leak that stacking is for."""
    train, test = draw(300), draw(800, 1)
    models = [{"name": "knn", "k": 1}, "linear", {"name": "forest", "trees": 30}]
    options = {"resolution": "coarse", "local": False, "lr": 0.05, "steps": 400}
    share, score = {}, {}
    for stacking in ("out-of-fold", "in-sample"):
        made = QuantileAggregation(models, stacking=stacking, **options).fit(train, train)
        share[stacking], score[stacking] = made._model_weights[0], wis(made.predict(test), test.y)
        assert bool(made.warnings()) == (stacking == "in-sample")
    assert share["in-sample"] > 0.95
    assert share["out-of-fold"] < 0.3
    assert score["out-of-fold"] < 0.8 * score["in-sample"]


def test_neither_test_targets_nor_the_calibration_split_matter():
    train, test = draw(150), draw(60, 1)
    make = lambda: QuantileAggregation(["linear", "knn"], steps=100)  # noqa: E731
    made = make().fit(train, draw(40, 2)).predict(test)
    again = make().fit(train, draw(30, 3)).predict(Samples(test.x, test.prediction + 9, None))
    np.testing.assert_array_equal(made.quantiles, again.quantiles)
    other = make().fit(train, draw(40, 2), seed=1).predict(test)
    assert (made.quantiles != other.quantiles).any()


def test_samples_of_the_prediction_do_not_see_each_other():
    train, test = draw(150), draw(60, 1)
    test = Samples(test.x.astype(np.float32), test.prediction)  # as records keep inputs
    fitted = QuantileAggregation(["linear", "knn"], steps=100).fit(train, train)
    whole, part = fitted.predict(test).quantiles, fitted.predict(test.take(slice(10, 20))).quantiles
    np.testing.assert_allclose(part, whole[10:20], rtol=1e-12)  # sums of matrix products may be ordered otherwise


@pytest.mark.parametrize("validation", ["out-of-fold", pytest.param("held-out", marks=pytest.mark.slow)])
def test_it_beats_its_models_and_the_equal_average(validation):
    """Local fine weights on a target whose noise and curvature no single model has whole."""
    train, test = draw(700), draw(2000, 1)
    models = ["linear", {"name": "knn", "k": 30}, {"name": "extra-trees", "trees": 30}]
    made = QuantileAggregation(models, validation=validation, steps=1000).fit(train, train)
    single = [wis(QuantileRegression(m).fit(train, train).predict(test), test.y) for m in models]
    equal = QuantileAggregation(models, resolution="coarse", local=False, steps=0).fit(train, train)
    prediction = made.predict(test)
    assert wis(prediction, test.y) < min(*single, wis(equal.predict(test), test.y))
    assert (np.diff(prediction.quantiles, axis=1) >= 0).all()
    assert np.array_equal(equal._model_weights.round(6), np.full(3, 1 / 3).round(6))


def test_held_out_rows_are_never_fitted(monkeypatch):
    Recorder.log = []
    monkeypatch.setattr(module, "make_model", lambda spec: Recorder())
    data = draw(100)
    QuantileAggregation(["any"], validation="held-out", steps=5).fit(data, data)
    held = {tuple(row) for row in data.x[folds(100, 5, 0, data.ids, "aggregation-validation") == 0]}
    assert len(held) == 20
    assert all(not seen & held for seen, _ in Recorder.log)
    assert any(asked == held for _, asked in Recorder.log)


def test_conformal_calibration_mends_coverage():
    """Bases that overfit give intervals that are too narrow; 300 calibration samples put that right."""
    train, calibration, test = draw(150), draw(300, 1), draw(3000, 2)
    models = [{"name": "knn", "k": 3}, {"name": "knn", "k": 5}]
    covered = {}
    for conformal in (False, True):
        made = QuantileAggregation(models, conformal=conformal, steps=200).fit(train, calibration).predict(test)
        covered[conformal] = ((made.low <= test.y[:, None]) & (test.y[:, None] <= made.high)).mean(0)[2]
        assert (np.diff(made.quantiles, axis=1) >= 0).all()
    # Three standard errors of one calibration set of 300 and a test set of 3,000 at 90 %: 5.4 points.
    assert covered[True] == pytest.approx(0.9, abs=0.054)
    assert covered[False] < 0.8


def test_search_further_levels_and_operators():
    train, test = draw(120), draw(30, 1)
    made = QuantileAggregation(
        ["linear", "knn"], search=2, steps=100, levels=[0.01, 0.4, 0.99], post="pava", adaptive=True, margin=0.01
    ).fit(train, train)
    assert len(made.levels) == len(LEVELS) + 3
    assert made.predict(test).quantiles.shape == (30, len(LEVELS))
    options = {k: v for k, v in made.parameters().items() if k != "every"}  # the only setting without an argument
    assert QuantileAggregation(**options).spec() == made.spec()


def test_crossing_is_counted_between_the_levels_that_are_given(monkeypatch):
    """Further levels are the aggregate's own business: the crossing rate divides by the pairs of LEVELS."""

    class Reversed(QuantileModel):
        def _fit(self, x, y, seed):
            pass

        def quantiles(self, x):
            return np.tile(-self.levels, (len(x), 1))

    monkeypatch.setattr(module, "make_model", lambda spec: Reversed())
    data = draw(40)
    made = QuantileAggregation(["any"], "coarse", False, steps=0, levels=np.linspace(0.01, 0.99, 99))
    assert (made.fit(data, data).predict(data).crossed == len(LEVELS) - 1).all()


def test_faults():
    for wrong in (
        {"models": []},
        {"models": ["no-such"]},
        {"resolution": "finest"},
        {"post": "soft-sort"},
        {"inside": "soft-sort"},
        {"stacking": "none"},
        {"validation": "test"},
        {"margin": -1.0},
    ):
        with pytest.raises(ConfigError):
            QuantileAggregation(**wrong)
    assert len(QUICK) == 4 and len(PAPER) == 6
