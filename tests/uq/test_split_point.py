"""Split-point self-consistency: the identities to float precision, the losses' gradients, heads that learn what they should.

Identities are sums and products of a few thousand terms of order 1 in float64: 1e-12 leaves room for 1e4 rounding errors.
"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import nn

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models import Observations
from uq.regression import NOMINAL, Samples
from uq.split_point import (
    SplitPointRegressor,
    attach,
    discrepancy,
    harmonic_mean,
    inflation,
    mean_absolute_residuals,
    samples_of,
    side_coverage,
    solve_side,
)
from uq.split_point_classifier import SplitPointClassifier, corrected, corrections
from uq.split_point_classifier import discrepancy as class_discrepancy
from uq.split_point_heads import Heads, Training, calibration_loss, fit_heads, pinball_loss

EXACT = 1e-12
FAST = {"steps": 60, "batch_size": 64, "width": 16}


def skewed(n=2001, seed=0):
    return np.random.default_rng(seed).lognormal(0, 1, n) - 1.3


# Regression: the mathematics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-0.7, 0.0, 0.4])
def test_identity_for_any_residuals(shift):
    m = mean_absolute_residuals(skewed() + shift)
    signed = 2 * m.upper * m.lower - m.total * (m.upper + m.lower)
    assert signed == pytest.approx(m.bias * (m.lower - m.upper), abs=EXACT)
    assert discrepancy(m.total, m.upper, m.lower) == pytest.approx(abs(m.bias) * abs(m.lower - m.upper), abs=EXACT)
    assert m.total == pytest.approx(m.share * m.upper + (1 - m.share) * m.lower, abs=EXACT)


def test_split_at_the_mean_is_harmonic_and_at_the_median_arithmetic():
    y = skewed(2000)
    mean = mean_absolute_residuals(y - y.mean())
    assert mean.total == pytest.approx(float(harmonic_mean(mean.upper, mean.lower)), abs=EXACT)
    assert mean.share == pytest.approx(mean.lower / (mean.upper + mean.lower), abs=EXACT)
    assert discrepancy(mean.total, mean.upper, mean.lower) == pytest.approx(0, abs=EXACT)
    median = mean_absolute_residuals(y - np.median(y))
    assert median.total == pytest.approx((median.upper + median.lower) / 2, abs=EXACT)
    assert discrepancy(median.total, median.upper, median.lower) > 0.05  # skewed, so the median is not the mean


def test_scale_and_reflection():
    r = skewed()
    m, big, mirrored = (mean_absolute_residuals(x) for x in (r, 3 * r, -r))
    assert [big.total, big.upper, big.lower] == pytest.approx([3 * m.total, 3 * m.upper, 3 * m.lower], rel=EXACT)
    sds = discrepancy(m.total, m.upper, m.lower)
    assert discrepancy(big.total, big.upper, big.lower) == pytest.approx(9 * sds, rel=1e-10)  # a difference of products
    assert discrepancy(big.total, big.upper, big.lower, root=True) == pytest.approx(3 * np.sqrt(sds), rel=1e-10)
    assert (mirrored.upper, mirrored.lower) == pytest.approx((m.lower, m.upper), rel=EXACT)
    assert discrepancy(mirrored.total, mirrored.upper, mirrored.lower) == pytest.approx(sds, rel=1e-10)


def test_bias_is_seen_where_residuals_are_skewed_and_not_where_they_are_symmetric():
    rng = np.random.default_rng(1)
    y = skewed()
    found = [mean_absolute_residuals(y - y.mean() - b) for b in (0.0, 0.1, 0.2)]
    scores = [float(discrepancy(m.total, m.upper, m.lower)) for m in found]
    assert scores[0] < EXACT < scores[1] < scores[2]
    coin = rng.permutation(np.repeat([-1.0, 1.0], 500))  # U = 1 - b and D = 1 + b, so SDS = 2 b^2 exactly
    m = mean_absolute_residuals(coin - 0.1)
    assert discrepancy(m.total, m.upper, m.lower) == pytest.approx(2 * 0.1**2, abs=EXACT)


def test_unit_gaussian_noise_with_a_small_bias():
    from scipy.stats import norm

    b = 1e-3  # r ~ N(b, 1); truncated means in closed form
    p, density = norm.cdf(b), norm.pdf(b)
    upper, lower = b + density / p, -b + density / (1 - p)
    sds = discrepancy(p * upper + (1 - p) * lower, upper, lower)
    # |b| |D - U|, and D - U = -2 (1 - 2/pi) b + O(b^3). Rounding: 1e-16 / sds = 1e-10.
    assert sds == pytest.approx(2 * (1 - 2 / np.pi) * b**2, rel=1e-5)


def test_inflation():
    upper, lower = np.array([1.0, 2.0, 0.5]), np.array([1.0, 0.7, 3.0])
    consistent = harmonic_mean(upper, lower)
    for factor in inflation(consistent, upper, lower):
        np.testing.assert_allclose(factor, 1, rtol=EXACT)
    np.testing.assert_allclose(solve_side(consistent, lower), upper, rtol=EXACT)
    totals = np.linspace(0.01, 8, 400)
    for u, d in zip(upper, lower, strict=True):
        for factor in inflation(totals, u, d, cap=10):
            assert (factor >= 1).all() and (factor <= 10).all() and (np.diff(factor) >= 0).all()
            assert factor[0] == 1 and factor[-1] == 10  # 2 D <= M is the most inconsistent, not the least
        above = totals > harmonic_mean(u, d)
        both = above & (totals < 2 * min(u, d))
        assert all(((factor > 1) == above)[both | ~above].all() for factor in inflation(totals, u, d))
        # Each factor makes its own side consistent with the other two.
        up, down = inflation(totals[both], u, d, cap=np.inf)
        np.testing.assert_allclose(harmonic_mean(up * u, d), totals[both], rtol=EXACT)
        np.testing.assert_allclose(harmonic_mean(u, down * d), totals[both], rtol=EXACT)


def test_coverage_is_the_weighted_mean_of_the_sides():
    r = skewed()
    up, down = np.full(len(r), 1.5), np.full(len(r), 0.9)
    above, below, total = side_coverage(r, up, down)
    p = (r > 0).mean()
    assert total == pytest.approx(p * above + (1 - p) * below, abs=EXACT)
    assert total == ((r <= up) & (r >= -down)).mean()
    assert np.isnan(side_coverage(np.abs(r), up, down)[1])


# Losses ----------------------------------------------------------------------------------------------------------------


def test_gradient_of_the_calibration_loss():
    distance = torch.arange(1.0, 11.0, dtype=torch.float64)
    tau = torch.tensor([0.8], dtype=torch.float64)
    for reach, covered in ((5.5, 5), (9.5, 9)):  # under-covered, over-covered
        q = torch.full((10, 1), reach, dtype=torch.float64, requires_grad=True)
        loss = calibration_loss(q, distance, tau)
        loss.sum().backward()
        miss = abs(0.8 - covered / 10)
        expected = np.zeros(10)
        if covered < 8:
            expected[covered:] = -miss / (10 - covered)
        else:
            expected[:covered] = miss / covered
        np.testing.assert_allclose(q.grad[:, 0], expected, rtol=EXACT, atol=EXACT)
        assert float(loss.detach()) > 0
    assert float(calibration_loss(torch.full((10, 1), 8.5, dtype=torch.float64), distance, tau)) == 0  # c = tau
    assert float(calibration_loss(distance[:, None], distance, tau)) == 0  # the side has no error
    for loss in (calibration_loss, pinball_loss):
        assert loss(torch.zeros(0, 1), torch.zeros(0), tau).tolist() == [0.0]


def test_pinball_loss_is_that_of_scikit_learn():
    from sklearn.metrics import mean_pinball_loss

    rng = np.random.default_rng(0)
    y, q = rng.random(50), rng.random((50, 2))
    found = pinball_loss(torch.from_numpy(q), torch.from_numpy(y), torch.tensor([0.8, 0.95], dtype=torch.float64))
    for i, tau in enumerate((0.8, 0.95)):
        assert float(found[i]) == pytest.approx(mean_pinball_loss(y, q[:, i], alpha=tau), abs=EXACT)


# Regression: the estimator ---------------------------------------------------------------------------------------------


def samples(n, seed, skew=True, shift=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 2))
    noise = rng.lognormal(0, 0.8, n) - np.exp(0.32) if skew else rng.normal(size=n)
    return Samples(x, np.zeros(n), scale * (noise + shift))


def test_heads_learn_both_sides():
    kind = SplitPointRegressor("inputs", steps=300, batch_size=128, width=16, learning_rate=5e-3)
    fit, test = samples(1500, 0), samples(4000, 1)
    kind.fit(fit, fit)
    found, r = kind.predict(test), test.y
    up, down = found.high - found.point[:, None], found.point[:, None] - found.low
    assert (np.diff(up, axis=1) >= 0).all() and (np.diff(down, axis=1) >= 0).all() and (down > 0).all()
    for i, tau in enumerate(NOMINAL):
        # Fitted to about 500 and 1,000 residuals a side: standard error of a coverage of 0.5 about 0.022; and heads overfit.
        np.testing.assert_allclose(side_coverage(r, up[:, i], down[:, i]), tau, atol=0.08)
    true = mean_absolute_residuals(r)
    assert found.aleatoric.mean() == pytest.approx(true.upper + true.lower, rel=0.1)
    assert up[:, 3].mean() > 2 * down[:, 3].mean()  # lognormal noise: the upper side is the wide one
    assert np.median(found.epistemic) < 0.2 * true.total**2


def test_units_do_not_matter():
    made = []
    for scale in (1.0, 1024.0, 3.0):
        fit = samples(200, 0, scale=scale)
        made.append((scale, SplitPointRegressor("inputs", **FAST).fit(fit, fit).predict(samples(50, 1, scale=scale))))
    base = made[0][1]
    for scale, other in made[1:]:
        # A power of two changes no bit. Otherwise each of 60 steps adds rounding of 1e-16 relative to its own size.
        tolerance = 0 if scale == 1024 else 1e-9
        for what, power in (("low", 1), ("high", 1), ("aleatoric", 1), ("epistemic", 2)):
            expected = getattr(base, what) * scale**power
            np.testing.assert_allclose(getattr(other, what), expected, rtol=tolerance, atol=tolerance * scale**power)


def test_what_calibrate_and_root_change():
    fit, test = samples(200, 0), samples(300, 1)
    kinds = [
        SplitPointRegressor("inputs", **FAST, **options).fit(fit, fit)
        for options in ({}, {"calibrate": True, "cap": 4}, {"root": True})
    ]
    plain, wide, root = (kind.predict(test) for kind in kinds)
    factors = inflation(*kinds[0]._read(test)[0].T, cap=4)  # 60 steps leave the heads positive and apart
    ends = ((plain.high, wide.high), (plain.low, wide.low))
    for factor, (before, after) in zip(factors, ends, strict=True):
        # The point is 0, so an end is its side's reach.
        np.testing.assert_allclose(after, factor[:, None] * before, rtol=1e-9)
        assert factor.max() > 1.001
    assert np.abs(factors[0] - factors[1]).max() > 0.1
    np.testing.assert_allclose(root.epistemic**2, plain.epistemic, rtol=1e-9, atol=EXACT)
    np.testing.assert_array_equal(wide.aleatoric, plain.aleatoric)


def test_which_residuals_are_learnt():
    train, calibration, test = samples(200, 0, scale=0.1), samples(200, 1), samples(20, 2)
    widths = {}
    for which in ("train", "calibration", "both"):
        made = SplitPointRegressor("inputs", residuals=which, **FAST).fit(train, calibration).predict(test)
        widths[which] = float((made.high - made.low).mean())
    assert 3 * widths["train"] < widths["both"] < widths["calibration"]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_side_without_residuals_has_no_width(sign):
    fit = samples(100, 0)
    fit = Samples(fit.x, fit.prediction, sign * np.abs(fit.y))
    kind = SplitPointRegressor("inputs", **FAST).fit(fit, fit)
    made = kind.predict(fit)
    empty, full = (made.low, made.high) if sign > 0 else (made.high, made.low)
    assert (empty == 0).all() and (np.abs(full) > 0).all() and (made.epistemic > 0).any()
    # p is 0 or 1, where the identity that the factors solve does not hold.
    wide = SplitPointRegressor("inputs", **FAST, calibrate=True).fit(fit, fit).predict(fit)
    np.testing.assert_array_equal(wide.high - wide.low, made.high - made.low)
    assert "no residual" in kind.warnings()[0] and "off by" in kind.warnings()[1]


def test_repeats_and_batches():
    fit, test = samples(150, 0), samples(40, 1)
    one, two, other = (
        SplitPointRegressor("inputs", **FAST, seed=seed, early_stopping=True).fit(fit, fit) for seed in (0, 0, 1)
    )
    whole = one.predict(test)
    np.testing.assert_array_equal(whole.high, two.predict(test).high)
    assert np.abs(whole.high - other.predict(test).high).max() > 0
    # Products of other shapes may be summed in another order.
    np.testing.assert_allclose(whole.epistemic[:7], one.predict(test.take(slice(7))).epistemic, rtol=1e-9, atol=EXACT)


def test_faults():
    for options in ({"residuals": "test"}, {"loss": "l1"}, {"batch_size": 32}, {"cap": 0.5}, {"steps": 0}):
        with pytest.raises(ConfigError):
            SplitPointRegressor("inputs", **options)
    zero = Samples(np.zeros((30, 1)), np.ones(30), np.ones(30))
    with pytest.raises(DataError, match="residuals are zero"):
        SplitPointRegressor("inputs", **FAST).fit(zero, zero)
    with pytest.raises(DataError, match="no features"):
        SplitPointRegressor(**FAST).fit(zero, zero)


def test_attach_to_models_as_they_are():
    data = samples(200, 0)
    linear = LinearRegression().fit(data.x, data.y)
    beside = attach(linear, data.x, data.y, **FAST)
    np.testing.assert_array_equal(beside.predict(data.x).point, linear.predict(data.x))

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 1)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    beside = attach(network, data.x, data.y, **FAST)
    made = beside.predict(data.x)
    assert network.training and all(torch.equal(before[n], v) for n, v in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network)
    seen = samples_of(network, data.x, tap="penultimate")
    with torch.no_grad():
        hidden = network[:2](torch.from_numpy(data.x).float())
    np.testing.assert_array_equal(seen.features["penultimate"], hidden.double())
    np.testing.assert_array_equal(made.point, seen.prediction)
    with pytest.raises(ConfigError, match="tap='inputs'"):
        samples_of(linear, data.x, tap="penultimate")


# Classification --------------------------------------------------------------------------------------------------------


def distributions(n=500, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    p, truth = (2 * torch.randn(2, n, k, generator=g, dtype=torch.float64)).softmax(dim=2)
    above, below = truth * (1 - p), (1 - truth) * p
    return p, truth, above + below, above, below


def test_discrepancy_of_probabilities():
    p, truth, total, _, _ = distributions()
    torch.testing.assert_close(
        class_discrepancy(p, total), ((p - truth) * (1 - 2 * p)).abs().sum(1), rtol=0, atol=EXACT
    )
    assert float(class_discrepancy(p, 2 * p * (1 - p)).abs().max()) < EXACT  # truth = p
    half, sure = torch.full((1, 2), 0.5).double(), torch.tensor([[0.9, 0.1]]).double()
    assert float(class_discrepancy(half, sure + half - 2 * sure * half)) < EXACT  # blind at 1/2


def test_corrections_of_exact_heads_agree_and_give_the_truth():
    p, truth, total, above, below = distributions()
    for estimate in corrections(total, above, below):
        torch.testing.assert_close(estimate, truth - p, rtol=0, atol=EXACT)
        assert float(estimate.sum(dim=1).abs().max()) < EXACT
    for correction in ("difference", "minimum"):
        # The floor of 1e-6 is reached by the smallest of 2,000 probabilities, and moves the others by no more than 4e-6.
        torch.testing.assert_close(corrected(p, total, above, below, correction, 0.05), truth, rtol=0, atol=5e-6)


def test_minimum_is_the_difference_less_the_heads_contradiction():
    _, _, total, above, below = distributions()
    total = total + 0.1 * torch.randn(total.shape, generator=torch.Generator().manual_seed(1)).double()
    three = torch.stack(corrections(total, above, below))
    torch.testing.assert_close(three.mean(dim=0), above - below, rtol=0, atol=EXACT)
    torch.testing.assert_close(three.amin(dim=0), above - below - (total - above - below).abs(), rtol=0, atol=EXACT)


def test_gate_and_floor():
    p = torch.tensor([[0.9, 0.1]]).double()
    above, below = torch.tensor([[0.0, 0.3]]).double(), torch.tensor([[0.95, 0.1]]).double()
    total = above + below + torch.tensor([[0.0, 0.06]]).double()
    free, gated = (corrected(p, total, above, below, gate=gate) for gate in (None, 0.05))
    torch.testing.assert_close(free, torch.tensor([[1e-6, 0.3]]).double() / 0.300001)
    torch.testing.assert_close(gated, torch.tensor([[1e-6, 0.1]]).double() / 0.100001)


def toy(n, seed):
    """Two normal inputs, three classes with known probabilities, logits twice as large as true."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g)
    truth = torch.stack([1.2 * x[:, 0], 1.2 * x[:, 1], 0.3 * x[:, 1] - x[:, 0]], dim=1)
    y = torch.multinomial(truth.softmax(dim=1), 1, generator=g)[:, 0]
    return Observations(2 * truth, y, {"penultimate": x}), truth.double().softmax(dim=1)


def test_correction_halves_the_error_of_overconfident_probabilities():
    kind = SplitPointClassifier(width=32, steps=400, learning_rate=5e-3).fit_observations(toy(2000, 0)[0])
    test, truth = toy(2000, 1)
    reading = kind.read(test)
    p = reading.logits.softmax(dim=1)
    before, after = ((q - truth).abs().mean() for q in (test.logits.double().softmax(dim=1), p))
    assert float(after) < 0.5 * float(before)  # 0.094 before; 0.026 to 0.033 are known with more samples and steps
    torch.testing.assert_close(reading.logits.exp().sum(dim=1), torch.ones(2000).double(), rtol=0, atol=EXACT)
    torch.testing.assert_close(reading.aleatoric, torch.distributions.Categorical(probs=p).entropy())
    q = test.logits.double().softmax(dim=1)
    exact = class_discrepancy(q, truth + q - 2 * truth * q)
    assert float(torch.corrcoef(torch.stack([reading.epistemic, exact]))[0, 1]) > 0.6
    torch.testing.assert_close(kind.calibrate(test), reading.logits)


def test_early_stopping_guards_a_small_calibration_set():
    small, (test, truth) = toy(60, 3)[0], toy(1000, 4)
    errors = []
    for early in (False, True):
        kind = SplitPointClassifier(width=32, steps=500, learning_rate=1e-2, early_stopping=early)
        kind.fit_observations(small)
        errors.append(float((kind.read(test).logits.exp() - truth).abs().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_gradient_reaches_logits_and_features():
    kind = SplitPointClassifier(width=4, steps=20).fit_observations(toy(100, 0)[0])
    seen, _ = toy(5, 1)
    logits, features = seen.logits.clone().requires_grad_(), seen.features["penultimate"].clone().requires_grad_()
    kind.calibrate(Observations(logits, seen.labels, {"penultimate": features}))[:, 0].sum().backward()
    assert logits.grad.abs().sum() > 0 and features.grad.abs().sum() > 0


def test_a_thousand_classes_in_blocks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    seen = Observations(
        torch.randn(300, 1000, generator=g), torch.arange(300), {"penultimate": torch.randn(300, 8, generator=g)}
    )
    kind = SplitPointClassifier(steps=3).fit_observations(seen)
    assert "700 of 1000 classes" in kind.warnings()[0]
    one = kind.read(seen)
    monkeypatch.setattr("uq.split_point_classifier._BLOCK", 7000)
    blocks = kind.read(seen)
    torch.testing.assert_close(one.logits, blocks.logits, rtol=0, atol=1e-5)  # float32 products of other shapes
    with pytest.raises(ConfigError, match="mean of the three"):
        SplitPointClassifier(correction="mean")


# Heads -----------------------------------------------------------------------------------------------------------------


def test_heads_are_separate_networks_on_standardised_features():
    features = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features[:, 1] = 5.0  # a dead unit
    heads = Heads(features, 4, torch.zeros(2, 3), torch.Generator().manual_seed(0))
    scaled = (features - features.mean(0)) / torch.where(
        torch.tensor([True, False, True]), features.std(0, correction=0), features.std(0, correction=0).max()
    )
    for b in range(2):
        part = slice(4 * b, 4 * b + 4)
        hidden = (scaled @ heads.hidden[:, part] + heads.offset[part]).relu()
        torch.testing.assert_close(heads(features)[b], hidden @ heads.weight[b] + heads.bias[b], rtol=0, atol=EXACT)


def test_fitting_leaves_the_global_generator_alone():
    features, state = torch.randn(40, 3), torch.get_rng_state()

    def loss(out, batch):
        return out.square().mean()

    with torch.no_grad():
        heads, steps = fit_heads(features, 4, torch.ones(1, 2), Training(40, 16, 0.05), loss, loss, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert steps == 40 and not heads.weight.requires_grad
    assert float(loss(heads(features), None)) < 0.2
