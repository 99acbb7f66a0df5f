"""LAC, APS and RAPS: scores by hand, coverage by simulation, MAPIE's sets, what tuning may see."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.metrics import conformal
from robustbench_ext.models import Observations
from robustbench_ext.randomness import SampleRandom
from uq import APS, LAC, RAPS
from uq.aps import cumulative_scores
from uq.prediction_sets import tuning_rows
from uq.raps import PENALTIES
from uq.temperature import optimal_temperature


def draw(n, k=6, seed=0, sharpness=1.5):
    """Observations of an over-confident classifier whose labels follow softmax(logits / sharpness)."""
    g = torch.Generator().manual_seed(seed)
    truth = 1.5 * torch.randn(n, k, generator=g, dtype=torch.float64)
    y = torch.multinomial(truth.softmax(1), 1, generator=g)[:, 0]
    return Observations(sharpness * truth, y)


def read_drawn(estimator, seen, ids, seed=0):
    """A randomised reading; the inputs are not looked at."""
    x = torch.zeros(len(seen), 1, 1, 1)
    return estimator.read_inputs(nn.Identity(), x, ids=ids, seed=seed, seen=seen)


METHODS = {
    "lac": lambda **o: LAC(**o),
    "aps": lambda **o: APS(**o),
    "raps": lambda **o: RAPS(k_reg=2, penalty=0.05, **o),
    "raps, tuned": lambda **o: RAPS(temperature=True, **o),
}
KINDS = [(method, drawn) for method in METHODS for drawn in (False, True) if method != "lac" or not drawn]


def test_scores_by_hand():
    p = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], dtype=torch.float64)
    u = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.8, 0, 0.5], [0, 0.9, 0.7]]).double()
    torch.testing.assert_close(cumulative_scores(p), expected, rtol=0, atol=1e-7)
    expected = torch.tensor([[0.9, 0.25, 0.65], [0.7, 1.0, 0.9]]).double()
    torch.testing.assert_close(cumulative_scores(p, u), expected, rtol=0, atol=1e-7)
    expected = torch.tensor([[1.0, 0, 0.6], [0, 1.1, 0.8]]).double()
    torch.testing.assert_close(cumulative_scores(p, None, 0.1, 1), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("method", "randomised"), KINDS)
def test_coverage(method, randomised):
    """200 calibration sets of 99 samples, 100 test samples each."""
    repeats, n, m, alpha = 200, 99, 100, 0.1
    kept, sizes = [], []
    for repeat in range(repeats):
        seen = draw(n + m, seed=repeat)
        held, test = (Observations(seen.logits[part], seen.labels[part]) for part in (slice(n), slice(n, None)))
        options = {"alpha": alpha} | ({"randomised": True} if randomised else {})
        estimator = METHODS[method](**options).fit_observations(held)
        reading = read_drawn(estimator, test, [f"{repeat}/{i}" for i in range(m)]) if randomised else None
        sets = (reading or estimator.read(test)).sets
        kept.append(float(sets.gather(1, test.labels[:, None]).double().mean()))
        sizes.append(float(sets.sum(1).double().mean()))
    # Coverage given the calibration set is a beta variable about 0.9 with variance 0.09 / (n + 2), the test adds 0.09 / m;
    # the spread that was observed holds both.
    error = 4 * np.std(kept) / repeats**0.5
    assert np.mean(kept) >= 1 - alpha - error
    left = n if "," not in method else n - math.floor(0.2 * n)
    # The accuracy is below 0.9, so sets without draws have no ties either.
    assert np.mean(kept) <= 1 - alpha + 1 / (left + 1) + error
    assert 1 < np.mean(sizes) < 6


@pytest.mark.parametrize("method", METHODS)
def test_with_too_few_samples_all_classes_belong(method):
    few = draw(8, seed=1)
    estimator = METHODS[method](alpha=0.1).fit_observations(few)
    assert estimator.read(draw(20)).sets.all()
    assert "too few" in estimator.warnings()[0]
    assert "threshold" not in estimator.summary()
    if "," not in method:  # with 9, the largest score is the threshold: ceil(10 x 0.9) = 9
        assert math.isfinite(METHODS[method](alpha=0.1).fit_observations(draw(9, seed=1)).threshold)


@pytest.mark.parametrize(("method", "randomised"), [kind for kind in KINDS if "," not in kind[0]])
def test_sets_are_nested_in_alpha(method, randomised):
    held, test = draw(200), draw(300, seed=1)
    options = {"randomised": True} if randomised else {}
    inner = torch.zeros(300, 6, dtype=torch.bool)
    for alpha in (0.5, 0.3, 0.2, 0.1, 0.05, 0.01):
        estimator = METHODS[method](alpha=alpha, **options).fit_observations(held)
        sets = read_drawn(estimator, test, range(300)).sets if randomised else estimator.read(test).sets
        assert sets.dtype == torch.bool
        assert sets.shape == (300, 6)
        assert (sets | ~inner).all()
        assert (sets != inner).any()
        inner = sets


def test_without_draws_sets_are_the_most_probable_classes_and_never_empty():
    held, test = draw(200), draw(300, seed=1)
    ranks = (-test.logits).argsort(1).argsort(1)
    for method in ("aps", "raps"):
        sets = METHODS[method]().fit_observations(held).read(test).sets
        assert (sets == (ranks < sets.sum(1, keepdim=True))).all()
        assert sets.any(1).all()
    assert not LAC(alpha=0.5).fit_observations(held).read(test).sets.any(1).all()
    drawn = read_drawn(APS(alpha=0.5, randomised=True).fit_observations(held), test, range(300)).sets
    assert not drawn.any(1).all()


def test_raps_without_penalty_is_aps():
    held, test = draw(200), draw(300, seed=1)
    aps = APS().fit_observations(held).read(test).sets
    assert torch.equal(RAPS(k_reg=0, penalty=0).fit_observations(held).read(test).sets, aps)
    assert torch.equal(RAPS(k_reg=6, penalty=0.5).fit_observations(held).read(test).sets, aps)
    assert not torch.equal(RAPS(k_reg=1, penalty=0.5).fit_observations(held).read(test).sets, aps)


def test_a_classifier_that_is_right_often_enough_leaves_its_predictions():
    z = 10 * torch.eye(3).repeat(20, 1) + torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    seen = Observations(z, torch.arange(3).repeat(20))
    estimator = APS().fit_observations(seen)
    assert estimator.threshold == 0
    assert "the predictions" in estimator.warnings()[0]
    assert torch.equal(estimator.read(seen).sets, nn.functional.one_hot(z.argmax(1), 3).bool())


# MAPIE -----------------------------------------------------------------------------------------------------------------


class Draws(np.random.RandomState):
    """A generator that gives the numbers it was made with, one call after the other."""

    def __init__(self, *draws):
        super().__init__(0)
        self.draws = list(draws)

    def uniform(self, size=None):
        found = self.draws.pop(0) if len(self.draws) > 1 else self.draws[0]
        return np.broadcast_to(found, size).copy() if np.ndim(found) == 0 else found.reshape(size)


class Softmax:
    """A fitted scikit-learn classifier that takes logits as inputs."""

    _estimator_type = "classifier"

    def __init__(self, k=6):
        self.classes_ = np.arange(k)

    def fit(self, x, y):
        return self

    def predict_proba(self, x):
        return torch.from_numpy(x).softmax(1).numpy()

    def predict(self, x):
        return x.argmax(1)

    def __sklearn_is_fitted__(self):
        return True

    def __sklearn_tags__(self):
        from sklearn.base import BaseEstimator, ClassifierMixin

        class Tagged(ClassifierMixin, BaseEstimator):
            pass

        return Tagged().__sklearn_tags__()


def mapie(score, held, test, alpha, draws=None, **options):
    classification = pytest.importorskip("mapie.classification")
    theirs = classification.SplitConformalClassifier(
        Softmax(), confidence_level=1 - alpha, prefit=True, conformity_score=score, random_state=draws
    )
    theirs.conformalize(held.logits.numpy(), held.labels.numpy())
    _, sets = theirs.predict_set(test.logits.numpy(), conformity_score_params=options)
    return torch.from_numpy(sets[:, :, 0]), theirs._mapie_classifier


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [0.3, 0.1, 0.05])
def test_sets_are_those_of_mapie(alpha):
    held, test = draw(200), draw(400, seed=1)
    theirs, _ = mapie("lac", held, test, alpha)
    assert torch.equal(LAC(alpha).fit_observations(held).read(test).sets, theirs)
    # Their score is the mass up to and including y, minus u p_y, so u = 1 there is u = 0 here.
    theirs, _ = mapie("aps", held, test, alpha, Draws(1.0), include_last_label="randomized")
    assert torch.equal(APS(alpha).fit_observations(held).read(test).sets, theirs)
    # And with the same draws.
    u = SampleRandom.of(0, range(200), "uq/aps/fit").uniform((1,)).double().numpy()
    v = SampleRandom.of(5, [str(i) for i in range(400)], "uq/aps").uniform((1,)).double().numpy()
    theirs, _ = mapie("aps", held, test, alpha, Draws(1 - u, 1 - v), include_last_label="randomized")
    ours = read_drawn(APS(alpha, randomised=True).fit_observations(held), test, [str(i) for i in range(400)], 5)
    assert torch.equal(ours.sets, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [0.3, 0.1, 0.05])
def test_raps_scores_are_those_of_mapie(alpha):
    """Their sets without draws have u = 1 here, and at least the first class; k_reg and penalty are as they choose them."""
    scores = pytest.importorskip("mapie.conformity_scores")
    held, test = draw(400), draw(400, seed=1)
    theirs, fitted = mapie(
        scores.RAPSConformityScore(size_raps=0.3), held, test, alpha, Draws(0.0), include_last_label=False
    )
    score = fitted.conformity_score_function_
    k_reg, penalty = int(score.k_star[0]), float(score.lambda_star)
    tuned = {tuple(row) for row in score.X_raps.tolist()}
    rows = torch.tensor([tuple(row) not in tuned for row in held.logits.tolist()])
    one = torch.ones(1, 1, dtype=torch.float64)
    known = cumulative_scores(held.logits[rows].softmax(1), one, penalty, k_reg)
    q = conformal.threshold(known.gather(1, held.labels[rows][:, None])[:, 0].numpy(), alpha)
    p = test.logits.softmax(1)
    ours = (cumulative_scores(p, one, penalty, k_reg) <= q) | (p == p.amax(1, keepdim=True))
    assert penalty > 0
    assert torch.equal(ours, theirs)
    # Their k_reg is ours too, from the same tuning samples.
    ranks = (-score.X_raps).argsort(1).argsort(1)[np.arange(len(score.X_raps)), score.y_raps] + 1
    assert k_reg == min(conformal.threshold(ranks.astype(float), alpha), 6)


# Tuning ----------------------------------------------------------------------------------------------------------------


def test_tuning_rows_are_spread_evenly():
    assert tuning_rows(10, 0.2).nonzero()[:, 0].tolist() == [4, 9]
    for n in (1, 4, 7, 99, 1000):
        for share in (0.1, 0.2, 1 / 3, 0.9):
            assert int(tuning_rows(n, share).sum()) == math.floor(n * share + 1e-9)


def test_what_is_tuned_is_tuned_on_other_samples_than_the_threshold():
    held = draw(300)
    rows = tuning_rows(300, 0.2)
    fitted = RAPS(temperature=True).fit_observations(held)
    assert fitted.summary()["calibration samples"] == 240
    assert fitted.summary()["temperature"] == optimal_temperature(held.logits[rows], held.labels[rows])
    other = held.labels.clone()
    other[~rows] = (other[~rows] + 1) % 6
    spoiled = RAPS(temperature=True).fit_observations(Observations(held.logits, other))
    for what in ("temperature", "k_reg", "penalty"):
        assert spoiled.summary()[what] == fitted.summary()[what]
    assert spoiled.threshold > fitted.threshold
    # Without anything to tune, all samples count.
    assert RAPS(k_reg=2, penalty=0.1).fit_observations(held).summary()["calibration samples"] == 300


def test_the_penalty_makes_the_smallest_sets_on_the_tuning_samples():
    held = draw(500, k=30)
    rows = tuning_rows(500, 0.2)
    p, y = held.logits[rows].softmax(1).numpy(), held.labels[rows].numpy()
    fitted = RAPS().fit_observations(held)
    order = np.argsort(-p, axis=1)
    ranks = np.array([1 + list(order[i]).index(y[i]) for i in range(len(y))])
    k = math.ceil(101 * 0.9)
    k_reg = np.sort(ranks)[k - 1]

    def score(i, position, penalty):
        return p[i, order[i, :position]].sum() + penalty * max(0, position + 1 - k_reg)

    sizes = []
    for penalty in PENALTIES:
        q = sorted(score(i, ranks[i] - 1, penalty) for i in range(len(y)))[k - 1]
        # The true class at the threshold is compared with itself, in another order of summation.
        sizes.append(np.mean([sum(score(i, j, penalty) <= q + 1e-12 for j in range(30)) for i in range(len(y))]))
    assert fitted.summary()["k_reg"] == k_reg
    assert fitted.summary()["penalty"] == PENALTIES[int(np.argmin(sizes))]


def test_logits_pass_through():
    held, test = draw(300), draw(50, seed=1)
    for estimator in (LAC(), APS(), RAPS()):
        assert torch.equal(estimator.fit_observations(held).read(test).logits, test.logits)
    scaled = APS(temperature=True).fit_observations(held)
    assert torch.equal(scaled.read(test).logits, test.logits / scaled.summary()["temperature"])


def test_draws_depend_on_the_sample_alone():
    held, test = draw(200), draw(300, seed=1)
    estimator = APS(randomised=True).fit_observations(held)
    ids = [f"s{i}" for i in range(300)]
    whole = read_drawn(estimator, test, ids).sets
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:120]
    some = read_drawn(estimator, Observations(test.logits[order], test.labels[order]), [ids[i] for i in order.tolist()])
    assert torch.equal(some.sets, whole[order])
    assert not torch.equal(read_drawn(estimator, test, ids, seed=1).sets, whole)
    with pytest.raises(ConfigError, match="needs the inputs"):
        estimator.read(test)


def test_many_classes_take_little_memory():
    """(N, K, K) of 20,000 classes would be 160 GB."""
    seen = draw(50, k=20_000)
    for estimator in (LAC(), APS(), RAPS()):
        assert estimator.fit_observations(seen).read(seen).sets.shape == (50, 20_000)


def test_faults():
    with pytest.raises(DataError, match="at least 5"):
        RAPS().fit_observations(draw(4))
    for wrong in ({"alpha": 0}, {"alpha": 1}, {"tune": 1}, {"temperature": "yes"}, {"randomised": 1}):
        with pytest.raises(ConfigError):
            APS(**wrong)
    for wrong in ({"k_reg": 1.5}, {"k_reg": -1}, {"penalty": -0.1}):
        with pytest.raises(ConfigError):
            RAPS(**wrong)
    assert RAPS(alpha="0.05").spec() == {
        "uq": "raps",
        "version": 1,
        "alpha": 0.05,
        "temperature": False,
        "tune": 0.2,
        "randomised": False,
        "k_reg": None,
        "penalty": None,
    }
