"""Monte-Carlo passes: masks per sample, what the spread says, and the estimators that are made of it.

Outputs of another batch size differ by the rounding of float32 matrix products (about 1e-6 of logits of size 10); masks do not
differ at all.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError, DataError, ModelError
from robustbench_ext.models import Observations, observe
from robustbench_ext.randomness import SampleRandom
from uq import LEVELS, NOMINAL, Samples
from uq.bias_variance_mix import BiasVarianceMix, BiasVarianceMixRegressor, mixing_ratio, read_mixture, shrunk
from uq.deep_ensemble import DeepEnsemble, DeepEnsembleRegressor
from uq.mc_dropout import MCDropout, MCDropoutRegressor
from uq.monte_carlo import (
    AugmentedPasses,
    DropoutPasses,
    MemberPasses,
    drop,
    entropy,
    read_passes,
    sample_logits,
    sample_outputs,
    sampled_dropout,
    total_variance,
)
from uq.monte_carlo_regression import Mixture


def random(n, seed=0, purpose="t"):
    return SampleRandom.of(seed, range(n), purpose)


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(6 * 36, 16), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(16, 4))
    model(torch.rand(64, 1, 8, 8))  # batch-norm statistics that are not the initial ones
    return model.eval()


@pytest.fixture
def x():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dropout(0.3), (16,)),
        (nn.Dropout1d(0.3), (8, 3)),
        (nn.Dropout2d(0.3), (8, 2, 2)),
        (nn.Dropout3d(0.3), (8, 2, 1, 2)),
        (nn.AlphaDropout(0.3), (16,)),
        (nn.FeatureAlphaDropout(0.3), (8, 2, 2)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_each_kind_drops_what_pytorch_drops(layer, shape):
    torch.manual_seed(0)
    n = 4000
    values = torch.rand(n, *shape) + 0.5
    out, theirs = drop(layer, values, random(n), 0), layer.train()(values)
    # Kept values are an affine function of the input, dropped ones a constant: two levels, the same in both.
    spread = {}
    for name, made in (("ours", out), ("theirs", theirs)):
        scale = made.amax() / values[made == made.amax()].amax() if not isinstance(layer, (nn.AlphaDropout,)) else 1
        spread[name] = (made.min(), made.max(), made.mean(), made.std(), scale)
    for ours, other in zip(spread["ours"], spread["theirs"], strict=True):
        # Shares of 4,000 x 8 or more draws of p = 0.3: standard error 0.003 at most, of values about 1.
        assert float(ours) == pytest.approx(float(other), abs=0.04)
    dropped = (out == out.min()).flatten(2) if out.ndim > 2 else out == out.min()
    if out.ndim > 2:
        assert torch.equal(dropped.all(2), dropped.any(2))  # whole channels
        dropped = dropped[:, :, 0]
    share = float(dropped.double().mean())
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / dropped.numel()))


def test_alpha_dropout_keeps_mean_and_variance():
    values = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    out = drop(nn.AlphaDropout(0.4), values, random(4000), 0)
    # n = 128,000: standard errors 0.003 and 0.004.
    assert float(out.mean()) == pytest.approx(0, abs=0.015) and float(out.var()) == pytest.approx(1, abs=0.03)


def test_masks_depend_on_sample_pass_layer_and_call_alone():
    ones = torch.ones(6, 50)
    layer, stream = nn.Dropout(0.5), random(6)
    first = drop(layer, ones, stream, 0)
    part = torch.tensor([4, 1])
    assert torch.equal(drop(layer, ones[part], stream.select(part), 0), first[part])
    assert not torch.equal(drop(layer, ones, stream, 1), first)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, v):
            self.seen = [self.a(v), self.a(v), self.b(v)]
            return self.seen[0]

    model = Twice().eval()
    with sampled_dropout(model, stream, 0):
        model(ones)
    a, b, c = model.seen
    assert not torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(b, c)
    model(ones)
    assert torch.equal(model.seen[0], ones)  # off again outside


def test_results_do_not_depend_on_the_batch(net, x):
    estimator = MCDropout(passes=4).fit(net, x, torch.zeros(40, dtype=torch.int64))
    ids = [f"s{i}" for i in range(40)]
    whole = estimator.predict(x, ids=ids)
    torch.manual_seed(123)  # the global generator plays no part
    small = estimator.predict(x, ids=ids, batch_size=7)
    back = torch.arange(39, -1, -1)
    turned = estimator.predict(x[back], ids=[ids[i] for i in back])
    for other in (small.logits, turned.logits[back]):
        assert torch.allclose(whole.logits, other, atol=1e-5)
    assert torch.allclose(whole.epistemic, small.epistemic, atol=1e-5)
    assert torch.equal(estimator.predict(x, ids=ids).logits, whole.logits)
    assert not torch.allclose(estimator.predict(x, ids=ids, seed=1).logits, whole.logits, atol=1e-2)


def test_the_network_is_left_as_it_was(net, x):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    sample_logits(DropoutPasses(), net, x, random(40), 2)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())  # batch norm did not learn
    assert net.training and all(not m._forward_hooks for m in net.modules())
    net.eval()
    with pytest.raises(RuntimeError), sampled_dropout(net, random(40), 0):
        net(torch.rand(40, 3, 8, 8))
    assert all(not m._forward_hooks for m in net.modules())


def test_the_mean_of_passes_has_mean_dropout_and_converges_at_one_over_s(net, x):
    p = sample_logits(DropoutPasses(), net, x, random(40), 320).exp()
    limit = p.mean(0)
    errors = []
    for s in (2, 8, 32):
        groups = p.reshape(320 // s, s, 40, 4).mean(1)
        errors.append(float((groups - limit).square().sum(2).mean()) / (1 - s / 320))
    # 10 groups of 32 passes or more, each an average over 40 inputs and 4 classes.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15) and errors[1] / errors[2] == pytest.approx(4, rel=0.3)
    # PyTorch's own dropout, in training mode with batch norm kept in evaluation mode, has the same limit.
    torch.manual_seed(0)
    for module in net:
        module.train(not isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        theirs = torch.stack([net(x).double().softmax(1) for _ in range(320)])
    error = (p.var(0) + theirs.var(0)).div(320).sqrt()
    assert float(((limit - theirs.mean(0)) / error).square().mean()) == pytest.approx(1, abs=0.6)


def test_networks_that_cannot_be_sampled(x):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Dropout(0.0))
    with pytest.raises(ConfigError, match="no dropout layer.*deep-ensemble"):
        MCDropout().fit(plain, x, torch.zeros(40, dtype=torch.int64)).predict(x)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(64, 4), nn.Dropout(0.5)

        def forward(self, v):
            return self.linear(v.flatten(1))

    with pytest.raises(ConfigError, match="none of them ran"):
        sample_logits(DropoutPasses(), Unused(), x, random(40), 1)
    folded = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 8)), nn.Dropout(0.5))
    with pytest.raises(ModelError, match="one row a sample"):
        sample_outputs(DropoutPasses(), folded, x, random(40), 1)


def test_entropies_by_hand():
    log_p = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]], dtype=torch.float64).log()
    reading = read_passes(log_p)
    total = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(reading.aleatoric) == pytest.approx(math.log(2) / 2, rel=1e-12)
    assert float(reading.epistemic) == pytest.approx(total - math.log(2) / 2, rel=1e-12)
    assert torch.allclose(reading.logits.exp(), torch.tensor([[0.75, 0.25]]).double(), atol=1e-15)
    corrected = read_passes(log_p, correct=True)
    # Both classes have variance 1/8 over the two passes.
    assert float(corrected.epistemic - reading.epistemic) == pytest.approx((1 / 8 / 0.75 + 1 / 8 / 0.25) / 4)
    assert float(read_passes(log_p[:1]).epistemic) == 0.0
    with pytest.raises(ConfigError, match="at least 2"):
        read_passes(log_p[:1], correct=True)


def test_the_correction_takes_most_of_the_bias_off():
    """Dirichlet probabilities about (0.5, 0.3, 0.2); the limit from 400,000 of them."""
    g = np.random.default_rng(0)
    p = torch.from_numpy(g.dirichlet([10, 6, 4], size=(5, 40_000))).log()
    many = torch.from_numpy(g.dirichlet([10, 6, 4], size=(400_000, 1))).log()
    limit = float(read_passes(many).epistemic)
    plain, corrected = (read_passes(p, correct).epistemic for correct in (False, True))
    error = float(plain.std() / 200)
    assert limit - float(plain.mean()) > 20 * error
    assert abs(float(corrected.mean()) - limit) < 0.1 * (limit - float(plain.mean()))


def test_law_of_total_variance():
    g = torch.Generator().manual_seed(0)
    means, variances = torch.randn(5, 3, generator=g).double(), torch.rand(5, 3, generator=g).double()
    mean, aleatoric, epistemic = total_variance(means, variances)
    draws = means[:, None] + variances.sqrt()[:, None] * torch.randn(5, 200_000, 3, generator=g).double()
    between = epistemic * 4 / 5  # of these very five: divisor 5
    assert torch.allclose(draws.flatten(0, 1).var(0), aleatoric + between, rtol=0.01)
    assert torch.allclose(mean, means.mean(0))
    with pytest.raises(ConfigError, match="at least 2"):
        total_variance(means[:1])


def test_augmentations():
    images = torch.arange(2 * 16, dtype=torch.float32).reshape(2, 1, 4, 4) / 32
    padded = F.pad(images, (1, 1, 1, 1))
    stream = random(2)
    seen = set()
    for step in range(60):
        made = AugmentedPasses(shift=1).augmented(images, stream, step)
        found = [(i, j) for i in range(3) for j in range(3) if torch.equal(made[0], padded[0, :, i : i + 4, j : j + 4])]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 9
    flips = [AugmentedPasses(shift=0, flip=True).augmented(images, stream, s)[0] for s in range(20)]
    assert any(torch.equal(f, images[0].flip(2)) for f in flips) and any(torch.equal(f, images[0]) for f in flips)
    noisy = AugmentedPasses(shift=0, noise=0.5).augmented(images, stream, 0)
    assert noisy.min() >= 0 and noisy.max() <= 1 and not torch.equal(noisy, images)
    part = AugmentedPasses(shift=1, flip=True, noise=0.1)
    assert torch.equal(
        part.augmented(images, stream, 3)[1:], part.augmented(images[1:], stream.select(torch.tensor([1])), 3)
    )
    with pytest.raises(ConfigError, match="passes would be equal"):
        AugmentedPasses(shift=0)


# Ensembles and mixing ------------------------------------------------------------------------------------------------


def linear(seed, k=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, k))


def test_deep_ensemble_is_the_mean_of_all(x):
    model, *others = (linear(s) for s in range(3))
    ensemble = DeepEnsemble(["b", "c"]).with_members(others).fit(model, x, torch.zeros(40, dtype=torch.int64))
    with torch.no_grad():
        p = torch.stack([m(x).double().softmax(1) for m in (model, *others)])
    reading = ensemble.predict(x)
    assert torch.allclose(reading.logits.exp(), p.mean(0), atol=1e-6)
    assert torch.allclose(reading.epistemic, entropy(p.mean(0).log()) - entropy(p.log()).mean(0), atol=1e-6)
    same = DeepEnsemble(["b"]).with_members([model]).fit(model, x, torch.zeros(40, dtype=torch.int64)).predict(x)
    assert float(same.epistemic.max()) < 1e-12
    assert ensemble.parameters() == {"members": ["b", "c"]}
    with pytest.raises(ConfigError, match="call with_members"):
        DeepEnsemble(["b"]).fit(model, x, torch.zeros(40, dtype=torch.int64)).predict(x)
    with pytest.raises(ConfigError, match="expected a list"):
        DeepEnsemble("b")
    with pytest.raises(ConfigError, match="2 networks for the members b"):
        DeepEnsemble(["b"]).with_members(others)
    with pytest.raises(ConfigError, match="3 classes"):
        DeepEnsemble(["b"]).with_members([linear(1, 3)]).fit(model, x, torch.zeros(40).long()).predict(x)


def mixed(net, x, y, **options):
    return BiasVarianceMix(**options).with_inputs(x).fit(net, x, y)


def test_the_mix_between_its_ends(net, x):
    y = torch.zeros(40, dtype=torch.int64)
    readings = {a: mixed(net, x, y, weight=a, passes=3).predict(x) for a in (0, 0.3, 1)}
    single = observe(net, x, y).logits.double().log_softmax(1)
    assert torch.equal(readings[0].logits, single)
    passes = sample_logits(DropoutPasses(), net, x, random(40, purpose="uq/bias-variance-mix"), 3)
    assert torch.equal(readings[1].logits, read_passes(passes).logits)
    expected = 0.3 * readings[1].logits.exp() + 0.7 * single.exp()
    assert torch.allclose(readings[0.3].logits.exp(), expected, atol=1e-12)
    assert torch.allclose(readings[0.3].logits.exp().sum(1), torch.ones(40).double(), atol=1e-12)
    # The entropies are those of the mixture of four predictions, by weight.
    parts = torch.cat([passes, single[None]])
    weights = torch.tensor([0.1, 0.1, 0.1, 0.7]).double()
    aleatoric = (weights[:, None] * entropy(parts)).sum(0)
    reading = read_mixture(passes, single, 0.3)
    assert torch.allclose(reading.aleatoric, aleatoric, atol=1e-12)
    assert torch.allclose(reading.aleatoric + reading.epistemic, entropy(expected.log()), atol=1e-9)
    assert float(readings[0].epistemic.max()) == 0


def test_the_fitted_weight(net, x):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        net[-1].weight *= 8  # confident logits: softmax bends, so the mean over passes is not the single pass
    p = sample_logits(DropoutPasses(), net, x, random(40), 200).exp()
    single = observe(net, x, torch.zeros(40).long()).logits.double().softmax(1)
    bias, variance = (p.mean(0) - single).square().sum(), p.var(0).sum()
    for s in (1, 5, 50):
        found = float(mixing_ratio(p[:20], single, s).weight())
        assert found == pytest.approx(float(bias / (bias + variance / s)), abs=0.1)
    weights = [float(mixing_ratio(p, single, s).weight()) for s in (1, 2, 5, 20)]
    assert weights == sorted(weights)
    # Towards the truth: with S = R passes exactly least squares, the least Brier score on its own sample.
    y = torch.multinomial(p.mean(0), 1, generator=g)[:, 0]
    truth = F.one_hot(y, 4).double()
    alpha = float(mixing_ratio(p[:5], single, 5, truth).weight(clamp=False))

    def brier(a):
        return float((a * p[:5].mean(0) + (1 - a) * single - truth).square().sum())

    assert brier(alpha) <= min(brier(alpha + h) for h in (-1e-3, 1e-3))
    ratio = mixing_ratio(p[:5], single, 5, truth)
    assert shrunk(ratio, 40, 0.0, 0.0) == float(ratio.weight())
    assert shrunk(ratio, 40, 0.25, 1e12) == pytest.approx(0.25)
    plain = float(ratio.weight(clamp=False))
    assert shrunk(ratio, 40, 0.5, 40) == pytest.approx(min(1, max(0, (plain + 0.5) / 2)))


def test_mixing_estimator_fits_by_each_source(net, x):
    y = torch.arange(40) % 4
    for options in ({}, {"weight": "passes"}, {"source": "augment"}, {"source": "members", "members": ["a", "b"]}):
        made = BiasVarianceMix(**options)  # `fit` hands the inputs over
        if "members" in options:
            made = made.with_members([linear(1), linear(2)])
        reading = made.fit(net, x, y).predict(x)
        assert 0 <= made.summary()["alpha"] <= 1 and torch.isfinite(reading.logits).all()
    with pytest.raises(ConfigError, match=r"call with_inputs\(x, ids\)"):
        BiasVarianceMix().fit_observations(observe(net, x, y), model=net)
    with pytest.raises(DataError, match="39 inputs for 40"):
        BiasVarianceMix().with_inputs(x[1:]).fit(net, x, y)
    unlabelled = Observations(observe(net, x, y).logits, torch.full((40,), -1))
    BiasVarianceMix(weight=0.5).fit_observations(unlabelled)
    BiasVarianceMix(weight="passes").with_inputs(x).fit_observations(unlabelled, model=net)
    for options, message in (
        ({"weight": 1.5}, "number in"),
        ({"weight": "best"}, "weight"),
        ({"source": "noise"}, "dropout, augment, members"),
        ({"members": ["a"]}, "give source: members"),
        ({"source": "members", "members": ["a"]}, "two or more"),
        ({"prior": 2}, "prior"),
        ({"passes": 0}, "whole number >= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            BiasVarianceMix(**options)


# Regressors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def regression():
    """A fixed random function with dropout, and targets about its dropout mean with noise of standard deviation 0.5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1)).eval()
    g = np.random.default_rng(0)

    def draw(n, prefix):
        x = g.normal(size=(n, 3)).astype(np.float32).astype(np.float64)
        with torch.no_grad():
            prediction = model(torch.from_numpy(x).float())[:, 0].double().numpy()
        return Samples(
            x, prediction, prediction + 0.5 * g.normal(size=n), ids=np.array([f"{prefix}{i}" for i in range(n)])
        )

    return model, draw(300, "c"), draw(2000, "t")


@pytest.mark.parametrize("intervals", ["conformal", "gaussian"])
def test_regression_by_dropout(regression, intervals):
    model, calibration, test = regression
    estimator = MCDropoutRegressor(passes=30, intervals=intervals).fit(calibration, calibration, model=model)
    made = estimator.predict(test, model=model)
    for c, covered in zip(
        NOMINAL, ((made.low <= test.y[:, None]) & (test.y[:, None] <= made.high)).mean(0), strict=True
    ):
        # 150 or 300 calibration and 2,000 test samples: standard error of coverage at most 0.045.
        assert covered == pytest.approx(c, abs=0.12)
    shifted = test.take(slice(100, 150))
    part = estimator.predict(shifted, model=model)
    assert np.allclose(part.low, made.low[100:150], atol=1e-5)
    # 0.25 of noise, and the error of 30 passes; 150 squared residuals are good to 12 %.
    assert made.aleatoric[0] + made.epistemic.mean() == pytest.approx(0.25, rel=0.35)
    if intervals == "gaussian":
        assert made.quantiles.shape == (2000, len(LEVELS)) and (np.diff(made.quantiles, axis=1) > 0).all()
        assert np.allclose(made.quantiles[:, [0, -1]], np.stack([made.low[:, -1], made.high[:, -1]], 1))


def test_conformal_intervals_of_few_samples_are_infinite(regression):
    model, calibration, test = regression
    estimator = MCDropoutRegressor(passes=3).fit(calibration, calibration.take(slice(0, 36)), model=model)
    # 18 scores: rank ceil(19 c) = 10, 16, 18, 19.
    assert np.isinf(estimator.z).tolist() == [False, False, False, True]
    assert "infinite" in estimator.warnings()[0] and np.isinf(estimator.predict(test, model=model).high[:, 3]).all()
    with pytest.raises(DataError, match="at least 2"):
        MCDropoutRegressor().fit(calibration, calibration.take(slice(0, 1)), model=model)


def test_regression_mixes(regression):
    model, calibration, test = regression
    mixture = Mixture(torch.tensor([[1.0], [3.0]]).double(), torch.tensor([6.0]).double(), 0.5)
    point, spread = mixture.moments()
    assert (point[0], spread[0]) == (4.0, 0.5 * 2 + 0.25 * 16)
    # y lies about the single pass: least squares finds that out, and the ends are what they should be.
    fitted = BiasVarianceMixRegressor(strength=0).fit(calibration, calibration, model=model)
    assert fitted.alpha < 0.5
    ends = {a: BiasVarianceMixRegressor(weight=a).fit(calibration, calibration, model=model) for a in (0, 1)}
    assert np.array_equal(ends[0].predict(test, model=model).point, test.prediction)
    passes = ends[1]._passes(test, model, 0).passes
    assert np.array_equal(ends[1].predict(test, model=model).point, passes.mean(0).numpy())
    again = fitted.alpha
    assert fitted.fit(calibration, calibration, model=model).alpha == again  # a second fit starts afresh


def test_regression_ensemble(regression):
    model, calibration, test = regression
    torch.manual_seed(1)
    others = [nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2)]
    ensemble = DeepEnsembleRegressor(["b", "c"]).with_members(others).fit(calibration, calibration, model=model)
    made = ensemble.predict(test, model=model)
    with torch.no_grad():
        all_three = torch.stack([m(torch.from_numpy(test.x).float())[:, 0].double() for m in (model, *others)])
    assert np.allclose(made.point, all_three.mean(0).numpy(), atol=1e-6)
    assert np.allclose(made.epistemic, all_three.var(0).numpy(), atol=1e-6)
    classes = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ModelError, match="one number"):
        DeepEnsembleRegressor(["b"]).with_members([classes]).fit(calibration, calibration, model=model)


def test_members_are_frozen_too(x):
    class Noticing(nn.Module):
        def forward(self, v):
            self.was_training = self.training
            return v.flatten(1)[:, :4]

    member = Noticing().train()
    sample_logits(MemberPasses((member,)), linear(0), x, random(40), 1)
    assert not member.was_training and member.training
