"""Data that knows the law of its outcomes, and predictions held against it: the invariants of probability estimation and of
Bayesian linear regression. Simulated tolerances are given in standard errors, so that chance is allowed what it takes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax

from robustbench_ext.data import load_dataset
from robustbench_ext.data.bayes_linear import KnownNoise, NormalInverseGamma
from robustbench_ext.data.dials import read_dials
from robustbench_ext.data.outcomes import PSI, STEPS, outcome_probability, pictures
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.metrics import binned, truth
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.metrics import regression as reg
from uq.oracles import BayesLinear
from uq.regression import LEVELS, NOMINAL, Samples

SMALL = "n=60,calibration=40,test=80"


def logits_of(q):
    """Logits (N, 2) of probabilities q (N,) of the second class."""
    with np.errstate(divide="ignore"):
        return np.log(np.stack([1 - q, q], axis=1))


def two(p):
    return np.stack([1 - p, p], axis=1)


# Outcomes ------------------------------------------------------------------------------------------------------------


class TestScenarios:
    def test_the_five_laws(self):
        u = np.array([0.0, 0.29, 0.5, 1.0])
        assert outcome_probability(u, "linear").tolist() == u.tolist()
        assert outcome_probability(u, "skewed") == pytest.approx(u / 2.5)
        assert outcome_probability(u, "centred") == pytest.approx([0.35, 0.35 + 0.29 / 3, 0.35 + 1 / 6, 0.35 + 1 / 3])
        assert outcome_probability(u, "sigmoid") == pytest.approx(1 / (1 + np.exp(-25 * (u - 0.29))))

    def test_the_sigmoid_rises_unless_it_is_told_to_fall(self):
        # The paper's text has the one, its code the other.
        u = np.linspace(0, 1, 11)
        rising, falling = (outcome_probability(u, "sigmoid", d) for d in ("rising", "falling"))
        assert (np.diff(rising) > 0).all()
        assert rising + falling == pytest.approx(np.ones(11))
        with pytest.raises(ConfigError, match="sigmoid alone"):
            outcome_probability(u, "linear", "falling")

    def test_the_steps_are_closed_on_the_left(self):
        assert outcome_probability(np.arange(5) / 5, "discrete").tolist() == STEPS.tolist()
        assert outcome_probability(np.nextafter(np.arange(1, 5) / 5, 0), "discrete").tolist() == STEPS[:4].tolist()
        assert outcome_probability(np.array([1.0]), "discrete") == [0.9]

    @pytest.mark.parametrize("scenario", PSI)
    def test_outcomes_come_with_the_probabilities_that_are_told(self, scenario):
        data = load_dataset(f"outcomes:{scenario}#n=4000,calibration=10,test=10")
        split = data["train"]
        p = data.class_truth.probabilities(split.ids)[:, 1]
        residual = split.labels - p
        # Four standard errors, of the sum and of the covariance with p: both are 0 where p is the probability.
        assert abs(residual.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
        assert abs((residual * (p - p.mean())).sum()) < 4 * np.sqrt((p * (1 - p) * (p - p.mean()) ** 2).sum())

    def test_the_truth_belongs_to_the_sample(self):
        data = load_dataset(f"outcomes:linear#{SMALL}")
        known = data.class_truth.probabilities(data["test"].ids)
        order = np.random.default_rng(0).permutation(80)
        assert np.array_equal(data.class_truth.probabilities(data["test"].ids[order]), known[order])
        assert known.sum(axis=1) == pytest.approx(np.ones(80))
        with pytest.raises(DataError, match="'photos:0' is none of the 180 samples"):
            data.class_truth.probabilities(np.array([data["test"].ids[0], "photos:0"]))

    def test_pictures_are_the_same_in_all_scenarios_and_other_for_another_seed(self):
        linear, skewed, other = (
            load_dataset(f"outcomes:{name}{SMALL}") for name in ("linear#", "skewed#", "linear#seed=1,")
        )

        def by_id(data):
            split = data["test"]
            order = np.argsort(split.ids)
            return split.images(order), split.labels[order]

        assert torch.equal(by_id(linear)[0], by_id(skewed)[0])
        assert not np.array_equal(by_id(linear)[1], by_id(skewed)[1])
        assert not torch.equal(by_id(linear)[0], by_id(other)[0])

    def test_the_picture_gives_u_away(self):
        # The sum of the pixels above the background, over the contrast, is the disc's area: a reader that knows where
        # the disc is finds u to about 0.003, so this crude one, which knows nothing but extremes, must come within 0.1.
        ids = np.array([f"x{i}" for i in range(200)])
        u = np.linspace(0, 1, 200)
        x = pictures(u, ids, 16, 0.0)[:, 0] / 255.0
        low, high = x.min(axis=(1, 2)), x.max(axis=(1, 2))
        area = ((x - low[:, None, None]) / (high - low)[:, None, None]).sum(axis=(1, 2))
        assert np.abs((np.sqrt(area / np.pi) - 1.5) / 4.5 - u).max() < 0.1
        assert np.abs(pictures(u, ids, 16, 0.03) / 255.0 - pictures(u, ids, 16, 0.0) / 255.0).mean() == pytest.approx(
            0.03 * np.sqrt(2 / np.pi), rel=0.05
        )

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("outcomes:lineal", "Did you mean 'linear'"),
            ("outcomes:linear#m=3", "unknown option 'm'"),
            ("outcomes:linear#n=2.5", "expected a whole number"),
            ("outcomes:linear#n=20,n=30", "each option once"),
            ("outcomes:linear#n=5", "10 samples or more"),
            ("outcomes:linear#direction=falling", "sigmoid alone"),
            ("outcomes:sigmoid#direction=up", "unknown direction 'up'"),
            ("bayes-linear:known", "unknown kind 'known'"),
            ("bayes-linear:known-noise#a0=2", "a0 is no option of known-noise"),
            ("bayes-linear:normal-inverse-gamma#noise=2", "noise is no option"),
            ("bayes-linear:known-noise#prior=0", "above 0"),
        ],
    )
    def test_a_wrong_option_is_told(self, spec, message):
        with pytest.raises(ConfigError, match=message):
            load_dataset(spec)

    def test_options(self):
        assert read_dials("d", "a#n=3#x=1/4", {"n": 1, "x": 0.0, "s": "t"}) == ("a", {"n": 3, "x": 0.25, "s": "t"})


# Probabilities against the truth -------------------------------------------------------------------------------------


class TestProbabilities:
    p = np.random.default_rng(0).uniform(0.02, 0.98, 20_000)
    q = np.clip(p + 0.1 * np.sin(7 * p), 0.01, 0.99)
    y = (np.random.default_rng(1).uniform(size=20_000) < p).astype(np.int64)

    def test_mse_is_of_either_probability(self):
        assert truth.probability_errors(two(self.p), logits_of(self.q)) == pytest.approx(
            (self.p - self.q) ** 2, abs=1e-12
        )

    def test_brier_is_mse_and_what_no_forecast_can_help(self):
        # E[Brier] = 2 (MSE_p + E[p(1-p)]) with the Brier score as the sum over classes; within three standard errors.
        terms = 2 * (self.q - self.y) ** 2
        expected = 2 * ((self.p - self.q) ** 2 + self.p * (1 - self.p))
        found = cal.brier(logits_of(self.q), self.y).value
        assert found == pytest.approx(terms.mean())
        assert abs(found - expected.mean()) < 3 * (terms - expected).std() / np.sqrt(len(terms))

    def test_kl_is_the_expected_excess_of_the_nll(self):
        kl = truth.divergences(two(self.p), logits_of(self.q))
        assert kl == pytest.approx(
            self.p * np.log(self.p / self.q) + (1 - self.p) * np.log((1 - self.p) / (1 - self.q))
        )
        excess = truth.excess_nll_terms(two(self.p), logits_of(self.q), self.y)
        assert abs((excess - kl).mean()) < 3 * (excess - kl).std() / np.sqrt(len(kl))
        nll = cal.nll(logits_of(self.q), self.y).value - cal.nll(logits_of(self.p), self.y).value
        assert excess.mean() == pytest.approx(nll)

    def test_kl_has_the_truth_in_the_numerator_and_no_epsilon(self):
        # KL(q || p) would be 0.1 log(0.1 / 0.5) + 0.9 log(0.9 / 0.5) = 0.368; an epsilon beside the ratio shifts both.
        found = truth.divergences(two(np.array([0.5])), logits_of(np.array([0.1])))
        assert found == pytest.approx([0.5 * np.log(25 / 9)])
        assert truth.divergences(two(self.p), logits_of(self.p)).max() < 1e-12

    def test_kl_of_what_cannot_be_and_of_what_was_excluded(self):
        p = np.array([[0.0, 1.0], [0.5, 0.5]])
        impossible = np.array([[0.0, 3.0], [-np.inf, 0.0]])
        found = truth.divergences(p, impossible)
        assert found[0] == pytest.approx(-log_softmax([0.0, 3.0])[1])
        assert found[1] == np.inf

    def test_a_base_rate_is_calibrated_and_far_from_the_truth(self):
        # What calibration does not see: MSE_p = Var(p), 1/12 for uniform p; ECE and KS are those of chance, about 1 /
        # sqrt(n).
        p = np.linspace(0.0, 1.0, 20_001)
        y = (np.random.default_rng(2).uniform(size=len(p)) < p).astype(np.int64)
        constant = np.full(len(p), 0.5)
        assert truth.probability_errors(two(p), logits_of(constant)).mean() == pytest.approx(1 / 12, abs=1e-4)
        assert truth.ks_value(constant, y) < 3 * 0.5 / np.sqrt(len(p))
        confidence, right = cal.confidence_and_correctness(logits_of(constant), y)
        assert cal.ece(confidence, right).value < 3 * 0.5 / np.sqrt(len(p))
        assert binned.ece_equal_mass(confidence, right).value < 3 * 0.5 / np.sqrt(len(p))

    def test_ks_does_not_know_the_order_of_ties(self):
        # As published, cumulative sums run through ties one by one: 0.25 where all outcomes of 1 stand first, 0.0005
        # where they alternate.
        q, first, mixed = np.full(1000, 0.5), np.repeat([1, 0], 500), np.tile([1, 0], 500)
        assert max(abs(np.cumsum(q - first))) / 1000 == 0.25
        assert truth.ks_value(q, first) == truth.ks_value(q, mixed) == 0.0
        tied = np.repeat([0.2, 0.6], 500)
        assert truth.ks_value(tied, first) == pytest.approx(0.4)

    def test_ks_is_in_0_1_and_0_for_a_seer(self):
        assert truth.ks_value(self.y.astype(float), self.y) == 0.0
        assert truth.ks_value(1.0 - self.y, self.y) == pytest.approx(
            self.y.mean()
        )  # all outcomes are in the first group
        assert truth.ks_value(np.ones(5), np.zeros(5)) == 1.0

    def test_the_interval_of_ks(self):
        calibrated, biased = (truth.ks_error(q[:3000], self.y[:3000]) for q in (self.p, np.clip(self.p + 0.1, 0, 1)))
        assert calibrated.ci_low == 0.0
        # A bias of b everywhere gives KS = b, 0.1 less what is clipped (0.08 to 0.1).
        assert 0.05 < biased.ci_low < biased.value < biased.ci_high < 0.14

    def test_sets_hold_the_label_as_often_as_their_classes_say(self):
        p = np.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
        sets = np.array([[False, True], [True, True], [False, False]])
        assert truth.set_probabilities(p, sets).tolist() == [0.8, 1.0, 0.0]

    def test_what_is_no_distribution_is_refused(self):
        with pytest.raises(DataError, match="adds up to 1"):
            truth.divergences(np.array([[0.5, 0.4]]), np.zeros((1, 2)))
        with pytest.raises(DataError, match="expected \\(N, K\\)"):
            truth.probability_errors(np.array([[0.5, 0.5]]), np.zeros((1, 3)))


class TestNormals:
    def test_divergence_and_spread(self):
        mean, std, point, spread = (np.array([v]) for v in (1.0, 2.0, 0.5, 3.0))
        x = stats.norm(1, 2).rvs(200_000, random_state=0)
        gaps = truth.gaussian_nll(x, point, spread) - truth.gaussian_nll(x, mean, std)
        found = truth.normal_divergences(mean, std, point, spread)[0]
        assert abs(gaps.mean() - found) < 4 * gaps.std() / np.sqrt(len(gaps))
        assert truth.normal_divergences(mean, std, mean, std)[0] == 0
        z = stats.norm.ppf((1 + np.array(NOMINAL)) / 2)
        assert truth.implied_std(-3 * z[None], 3 * z[None], NOMINAL) == pytest.approx([3.0])
        assert truth.log_variance_errors(std, spread) == pytest.approx([2 * np.log(1.5)])


# The law of a regression target --------------------------------------------------------------------------------------


class TestLaw:
    @pytest.mark.parametrize(
        "name",
        [
            "toy-cubic:lognormal",
            "toy-cubic:triangular",
            "toy-heteroscedastic",
            "bayes-linear",
            "bayes-linear:normal-inverse-gamma",
        ],
    )
    def test_cdf_and_quantile_are_inverse(self, name):
        data = load_dataset(name)
        x = data["test"].inputs(slice(0, 50)).numpy().astype(np.float64)
        for level in (0.025, 0.5, 0.9):
            assert data.truth.cdf(x, data.truth.quantile(x, level)) == pytest.approx(np.full(50, level), abs=1e-9)
        assert (data.truth.cdf(x, np.full(50, np.inf)) == 1).all()
        assert (data.truth.cdf(x, np.full(50, -np.inf)) == 0).all()

    def test_targets_follow_the_law(self):
        # Values of the true distribution function are uniform. Of bayes-linear data the posterior is wrong about the
        # weights, by what it says itself: with 1,000 training samples that is nothing beside 2,000 test samples.
        for name in ("friedman", "toy-cubic:triangular", "bayes-linear:known-noise#n=1000"):
            data = load_dataset(name)
            x = data["test"].inputs(slice(None)).numpy().astype(np.float64)
            assert stats.kstest(data.truth.cdf(x, data["test"].labels), "uniform").pvalue > 1e-3


def linear(n, d=4, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, x @ rng.normal(size=d) + noise * rng.normal(size=n), rng.normal(size=(7, d))


class TestPosterior:
    def test_without_samples_it_is_the_prior(self):
        x, y, new = linear(0)
        known, unknown = KnownNoise(x, y, 1.0, 0.5), NormalInverseGamma(x, y, 1.0, 3.0, 2.0)
        length = (new**2).sum(axis=1)
        assert not known.mean(new).any() and not unknown.mean(new).any()
        assert known.std(new) ** 2 == pytest.approx(length + 0.25)
        assert unknown.std(new) ** 2 == pytest.approx(2.0 / (3.0 - 1) * (1 + length))

    def test_it_is_the_formula(self):
        x, y, new = linear(12)
        s2 = 0.49
        sigma = np.linalg.inv(np.eye(4) + x.T @ x / s2)
        known = KnownNoise(x, y, 1.0, 0.7)
        assert known.mean(new) == pytest.approx(new @ sigma @ x.T @ y / s2)
        assert known.std(new) ** 2 == pytest.approx(np.einsum("ij,jk,ik->i", new, sigma, new) + s2)
        L = np.eye(4) + x.T @ x
        m = np.linalg.solve(L, x.T @ y)
        a, b = 3 + 12 / 2, 2 + (y @ y - m @ L @ m) / 2
        unknown = NormalInverseGamma(x, y, 1.0, 3.0, 2.0)
        assert unknown.mean(new) == pytest.approx(new @ m)
        spread = b / (a - 1) * (1 + np.einsum("ij,ij->i", new, np.linalg.solve(L, new.T).T))
        assert unknown.std(new) ** 2 == pytest.approx(spread)
        scale = np.sqrt(spread * (a - 1) / a)
        assert unknown.quantile(new, 0.9) == pytest.approx(stats.t(2 * a, new @ m, scale).ppf(0.9))

    def test_the_variance_has_two_parts(self):
        x, y, new = linear(12)
        for law in (KnownNoise(x, y, 1.0, 0.7), NormalInverseGamma(x, y)):
            assert law.aleatoric(new) ** 2 + law.epistemic(new) ** 2 == pytest.approx(law.std(new) ** 2)
            assert (law.epistemic(new) > 0).all() and (law.aleatoric(new) == law.aleatoric(new)[0]).all()

    def test_a_sample_more_never_raises_the_variance_and_the_noise_stays(self):
        x, y, new = linear(30)
        stds = np.array([KnownNoise(x[:n], y[:n], 1.0, 0.7).std(new) for n in range(31)])
        assert (np.diff(stds, axis=0) <= 1e-12).all()
        assert (stds >= 0.7).all()

    @pytest.mark.parametrize("kind", [KnownNoise, NormalInverseGamma])
    def test_neither_order_nor_rotation_matters(self, kind):
        x, y, new = linear(15)
        law, order = kind(x, y), np.random.default_rng(1).permutation(15)
        q, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
        for other, there in ((kind(x[order], y[order]), new), (kind(x @ q, y), new @ q)):
            assert other.mean(there) == pytest.approx(law.mean(new), abs=1e-10)
            assert other.std(there) == pytest.approx(law.std(new), abs=1e-10)

    @pytest.mark.parametrize("kind", [KnownNoise, NormalInverseGamma])
    def test_it_is_what_simulation_finds(self, kind):
        # Weights (and noise) from the prior, kept in proportion to the likelihood of 3 samples. 400,000 draws leave
        # about 0.5 %.
        x, y, new = linear(3, d=2, seed=3)
        rng, draws = np.random.default_rng(0), 400_000
        s = np.ones(draws) if kind is KnownNoise else np.sqrt(2 / rng.gamma(3.0, size=draws))
        w = rng.normal(size=(draws, 2)) * (1 if kind is KnownNoise else s[:, None])
        log_likelihood = stats.norm.logpdf(y, w @ x.T, s[:, None]).sum(axis=1)
        weight = np.exp(log_likelihood - log_likelihood.max())
        weight /= weight.sum()
        law = kind(x, y)
        for point, mean, std in zip(new[:, :2], law.mean(new[:, :2]), law.std(new[:, :2]), strict=True):
            values = w @ point
            found = weight @ values
            assert found == pytest.approx(mean, abs=0.01 * std)
            assert np.sqrt(weight @ ((values - found) ** 2 + s**2)) == pytest.approx(std, rel=0.01)

    def test_nobody_has_a_lower_nll_over_tasks(self):
        # 300 tasks of 6 samples, drawn from the prior; rivals are the oracle with a wrong noise, a wrong prior, one
        # part alone.
        rng = np.random.default_rng(0)
        gaps = {"noise": [], "prior": [], "aleatoric alone": [], "nothing learnt": []}
        for _ in range(300):
            x, w = rng.normal(size=(6, 4)), rng.normal(size=4)
            new = rng.normal(size=(20, 4))
            y, targets = x @ w + rng.normal(size=6), new @ w + rng.normal(size=20)
            law = KnownNoise(x, y)
            own = truth.gaussian_nll(targets, law.mean(new), law.std(new))
            wrong = {"noise": KnownNoise(x, y, 1.0, 1.5), "prior": KnownNoise(x, y, 2.0, 1.0)}
            wrong["nothing learnt"] = KnownNoise(x[:0], y[:0])
            for name, rival in wrong.items():
                gaps[name].append((truth.gaussian_nll(targets, rival.mean(new), rival.std(new)) - own).mean())
            alone = truth.gaussian_nll(targets, law.mean(new), law.aleatoric(new))
            gaps["aleatoric alone"].append((alone - own).mean())
        for name, gap in gaps.items():
            assert np.mean(gap) > 2 * np.std(gap) / np.sqrt(len(gap)), name

    def test_without_a_second_moment_there_is_no_variance(self):
        x, y, _ = linear(0)
        with pytest.raises(DataError, match="there is no variance"):
            NormalInverseGamma(x, y, 1.0, 1.0, 2.0)
        assert NormalInverseGamma(*linear(1)[:2], 1.0, 1.0, 2.0).a == 1.5

    @pytest.mark.parametrize("kind", ["known-noise", "normal-inverse-gamma"])
    def test_a_dataset_is_drawn_from_the_prior(self, kind):
        # Over 200 tasks with 5 samples each, targets fall into the 90 % interval in 90 % of the cases, if weights,
        # noise and targets are drawn as the posterior believes. Test samples of one task move together: a standard
        # error is over tasks.
        # With more columns than samples much of the variance is the weights', so that they have to be of the right size too.
        inside, wide = [], ",b0=50" if kind == "normal-inverse-gamma" else ""
        for seed in range(200):
            data = load_dataset(f"bayes-linear:{kind}#d=8,n=5,calibration=5,test=30,seed={seed}{wide}")
            x = data["test"].inputs(slice(None)).numpy().astype(np.float64)
            ends = [data.truth.quantile(x, level) for level in (0.05, 0.95)]
            inside.append(reg.covered(data["test"].labels, *ends).mean())
        assert abs(np.mean(inside) - 0.9) < 3.5 * np.std(inside) / np.sqrt(len(inside))


class TestEstimator:
    @pytest.mark.parametrize("kind", ["known-noise", "normal-inverse-gamma"])
    def test_on_its_own_data_it_is_the_truth(self, kind):
        data = load_dataset(f"bayes-linear:{kind}#n=40,test=50")

        def samples(split):
            x = data[split].inputs(slice(None)).numpy().astype(np.float64)
            return Samples(x, np.zeros(len(x)), data[split].labels)

        made = BayesLinear(kind=kind).fit(samples("train"), samples("calibration")).predict(samples("test"))
        x = samples("test").x
        assert made.point == pytest.approx(data.truth.mean(x))
        assert made.quantiles[:, LEVELS.index(0.95)] == pytest.approx(data.truth.quantile(x, 0.95))
        assert np.hypot(made.aleatoric, made.epistemic) == pytest.approx(data.truth.std(x))

    def test_it_looks_at_training_samples_alone(self):
        x, y, new = linear(20)
        some, asked = Samples(x[:10], np.zeros(10), y[:10]), Samples(new, np.zeros(7))
        a = BayesLinear().fit(some, Samples(x[10:], np.zeros(10), y[10:])).predict(asked)
        b = (
            BayesLinear()
            .fit(some, Samples(x[10:], np.ones(10), y[10:] + 5))
            .predict(replace(asked, prediction=np.ones(7)))
        )
        assert np.array_equal(a.low, b.low) and np.array_equal(a.point, b.point)

    def test_options_are_checked(self):
        with pytest.raises(ConfigError, match="expected known-noise or"):
            BayesLinear(kind="known")
        with pytest.raises(ConfigError, match="expected numbers > 0"):
            BayesLinear(prior=0)
