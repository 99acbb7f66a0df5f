"""The baselines against pytorch-ood and against their formulas; detectors that read inputs; the adapter."""

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch.nn import functional as F

from detectors import ASH, DICE, KNN, ODIN, Energy, FeatureSqueezing, GradNorm, KLMatching, ReAct, Validation, ViM
from detectors.ash import shaped
from detectors.energy_finetune import FineTuning, energy_bound, energy_bounded_loss, fine_tune, margins
from detectors.feature_squeezing import fewer_bits, median, non_local_means
from detectors.gradnorm import gradient_norm
from detectors.head import head_of
from detectors.knn import kth_distance, unit
from detectors.pytorch_ood_adapter import LEFT_OUT, PytorchOOD, available
from detectors.validation import with_attack, with_outliers
from robustbench_ext.attacks import build_attack
from robustbench_ext.data.outliers import letters
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models import observe
from robustbench_ext.models.energy import marginal_energy

theirs = pytest.importorskip("pytorch_ood.detector")
TAP = "penultimate"


@pytest.fixture(scope="module")
def observed(digits_model, digits):
    """Observations of digits' training data, and of its test data with noise."""
    train, test = digits["train"], digits["test"]
    noise = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([test.images(slice(0, 200)), noise])
    y = torch.cat([torch.from_numpy(test.labels[:200]), torch.full((100,), -1)])
    fit = observe(digits_model, train.images(slice(None)), torch.from_numpy(train.labels), (TAP,))
    return fit, observe(digits_model, x, y, (TAP,)), x


def close(ours, reference, rtol=1e-4, atol=0.0):
    np.testing.assert_allclose(ours.numpy(), np.asarray(reference, dtype=np.float64), rtol=rtol, atol=atol)


def test_scores_equal_those_of_pytorch_ood(observed, digits_model):
    train, seen, _ = observed
    f, z, y = train.features[TAP], seen.features[TAP], train.labels
    head = head_of(digits_model, train, "test")
    w, b = head.weight.float(), head.bias.float()
    layer = torch.nn.Linear(*reversed(w.shape))
    layer.weight.data, layer.bias.data = w, b

    def ours(detector):
        return detector.fit_observations(train, model=digits_model).score_observations(seen)

    close(ours(Energy(temperature=2)), theirs.EnergyBased(None, 2.0).predict_logits(seen.logits))
    close(ours(KNN(k=7)), theirs.KNN(None, 7).fit_features(f, y).predict_features(z))
    close(ours(KNN(k=7, normalize=False)), theirs.KNN(None, 7, normalize=False).fit_features(f, y).predict_features(z))
    # float32 eigenvectors of theirs: residuals of a few per cent of the features carry some 1e-6 of them.
    close(ours(ViM(dim=16)), theirs.ViM(None, 16, w, b).fit_features(f, y).predict_features(z), rtol=1e-4, atol=1e-3)
    close(
        ours(KLMatching()), theirs.KLMatching(None).fit_logits(train.logits, y).predict_logits(seen.logits), atol=1e-5
    )
    dice = theirs.DICE(None, w, b, 0.7).fit_features(f, y)
    close(ours(DICE(sparsity=0.7)), dice.predict_features(z).detach())
    maps, new = f[:, :, None, None], z[:, :, None, None]

    def last(m):
        return layer(m.flatten(1))

    react = theirs.ReAct(None, last, percentile=0.9).fit_feature_maps(maps, y)
    close(ours(ReAct(quantile=0.9)), react.predict_feature_maps(new).detach())
    for variant in ("s", "p", "b"):
        ash = theirs.ASH(lambda x: x, last, variant=f"ash-{variant}", percentile=0.65)
        close(ours(ASH(quantile=0.65, variant=variant)), ash.predict_feature_maps(new).detach())


def test_odin_equals_pytorch_ood(observed, digits_model):
    x = observed[2][:64]
    for temperature, eps in ((1000.0, 0.0014), (10.0, 0.02)):
        peer = theirs.ODIN(digits_model, eps=eps, temperature=temperature).predict(x).detach().double()
        mine = ODIN(temperature=temperature, eps=eps).score_inputs(digits_model, x)
        # Theirs is minus the maximum probability; a gradient of exactly 0 in float32 is none in both.
        assert torch.allclose(mine - 1, peer, rtol=1e-4)


def test_knn_streams_without_changing_a_distance(monkeypatch):
    g = torch.Generator().manual_seed(0)
    bank, z = unit(torch.randn(103, 5, generator=g)), unit(torch.randn(31, 5, generator=g))
    expected = torch.cdist(z, bank).sort(dim=1).values
    for k in (1, 4, 103):
        assert torch.allclose(kth_distance(z, bank, k), expected[:, k - 1], atol=1e-12)
        with monkeypatch.context() as small:
            small.setattr("detectors.knn.QUERIES", 7)
            small.setattr("detectors.knn.BANK", 10)
            assert torch.allclose(kth_distance(z, bank, k), expected[:, k - 1], atol=1e-12)
    assert float(kth_distance(bank, bank, 1).max()) == 0.0  # no cancellation


def test_gradnorm_is_the_norm_of_the_gradient(observed, digits_model):
    _, seen, x = observed
    head = digits_model
    weight = [p for n, p in head.named_parameters() if n.endswith("fc2.weight")][0]
    for temperature in (1.0, 3.0):
        found = gradient_norm(seen.features[TAP], seen.logits, temperature)
        for i in (0, 5, 250):
            logits = digits_model(x[i : i + 1]) / temperature
            uniform = torch.full_like(logits, 1 / logits.shape[1])
            loss = F.kl_div(F.log_softmax(logits, 1), uniform, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, weight)
            assert float(found[i]) == pytest.approx(float(gradient.abs().sum()), rel=1e-3)
    assert torch.equal(GradNorm().score_observations(seen), -gradient_norm(seen.features[TAP], seen.logits))


def test_vim_residual_and_scale(observed, digits_model):
    """alpha matches the training data's mean virtual logit with their mean maximum logit."""
    train, _, _ = observed
    detector = ViM(dim=20).fit_observations(train, model=digits_model)
    virtual = detector.score_observations(train) + torch.logsumexp(train.logits.double(), 1)
    assert float(virtual.mean()) == pytest.approx(float(train.logits.amax(1).mean()), rel=1e-5)


def test_ash_keeps_what_it_says():
    f = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)).double()
    for variant in ("s", "p", "b"):
        out = shaped(f, 0.65, variant)
        assert ((out > 0).sum(1) == 14).all()
        kept = torch.where(out > 0, f, 0.0)
        if variant == "p":
            assert torch.equal(out, kept)
        if variant == "b":
            assert torch.allclose(out.sum(1), f.sum(1))
        if variant == "s":
            assert torch.allclose(out, kept * torch.exp(f.sum(1, keepdim=True) / kept.sum(1, keepdim=True)))
    assert torch.equal(shaped(torch.zeros(2, 8), 0.5), torch.zeros(2, 8))
    with pytest.raises(ConfigError, match="leaves none"):
        shaped(f, 0.999)


# Inputs --------------------------------------------------------------------------------------------------------------


def test_squeezers():
    x = torch.rand(5, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    for size in (2, 3):
        expected = median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
        np.testing.assert_array_equal(median(x, size).numpy(), expected)
    assert set(fewer_bits(x, 1).unique().tolist()) == {0.0, 1.0}
    assert float((fewer_bits(x, 8) - x).abs().max()) <= 0.5 / 255 + 1e-7
    flat = torch.full((1, 1, 8, 8), 0.3)
    assert torch.allclose(non_local_means(flat), flat)
    noisy = (flat + 0.02 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert float(non_local_means(noisy, strength=0.1).std()) < 0.5 * float(noisy.std())
    edge = torch.zeros(1, 1, 12, 12)
    edge[..., 6:] = 1
    assert torch.allclose(non_local_means(edge), edge, atol=1e-6)  # edges stay
    large = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(2))
    moved = torch.roll(non_local_means(large, strength=0.3), (1, 2), (2, 3))
    inner = slice(8, 13)  # away from the borders: windows reach 5 and patches 1 further
    also = non_local_means(torch.roll(large, (1, 2), (2, 3)), strength=0.3)
    assert torch.allclose(moved[..., inner, inner], also[..., inner, inner], atol=1e-6)


def test_feature_squeezing_is_the_largest_change(digits_model, digits):
    x = digits["test"].images(slice(0, 40))
    with torch.no_grad():
        p = digits_model(x).double().softmax(1)
        parts = [(digits_model(q).double().softmax(1) - p).abs().sum(1) for q in (fewer_bits(x, 2), median(x, 3))]
    found = FeatureSqueezing(bits=2, window=3).score_inputs(digits_model, x)
    assert torch.allclose(found, torch.maximum(*parts), atol=1e-6)
    assert torch.allclose(FeatureSqueezing(bits=2, window=0).score_inputs(digits_model, x), parts[0], atol=1e-6)


def test_delta_energy_is_a_difference_of_energies(digits_model, digits):
    x = digits["test"].images(slice(0, 60))
    found = Energy(reading="delta", eps=0.1, steps=5).score_inputs(digits_model, x)
    with torch.no_grad():
        before = marginal_energy(digits_model(x).double())
    # One step by hand: the first signed gradient of the prediction's own loss.
    one = Energy(reading="delta", eps=0.04, steps=1).score_inputs(digits_model, x)
    leaf = x.clone().requires_grad_(True)
    logits = digits_model(leaf)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1), reduction="sum"), leaf)
    with torch.no_grad():
        after = marginal_energy(digits_model((x + 0.04 * gradient.sign()).clamp(0, 1)).double())
    assert torch.allclose(one, before - after, atol=1e-4)
    assert found.shape == (60,) and not torch.equal(found, one)


def test_parameters_are_chosen_on_validation_data(digits_model, digits):
    known = digits["calibration"].images(slice(0, 150))
    unknown = letters(150, (1, 8, 8)).images(slice(None))
    grid = ODIN(temperature=[1, 1000], eps=[0.0, 0.01, 0.05], validate={"outliers": "letters"})
    grid.fit_observations(None, model=digits_model, validation=with_outliers(known, unknown))

    def tnr(t, e):
        detector = ODIN(temperature=t, eps=e)
        scores = [detector.score_inputs(digits_model, x).numpy() for x in (known, unknown)]
        return float((scores[1] > np.sort(scores[0])[int(np.ceil(0.95 * 150)) - 1]).mean())

    values = {(float(t), e): tnr(t, e) for t in (1, 1000) for e in (0.0, 0.01, 0.05)}
    assert values[grid.chosen] == max(values.values()) > min(values.values())
    test = Energy(temperature=[0.1, 1, 20], suspect="low", validate={"attack": "pgd"})
    test.fit_observations(None, model=digits_model, validation=Validation(known, unknown, "auroc"))
    assert test.temperature in (0.1, 1.0, 20.0)
    assert test.summary() == {"temperature": test.temperature}


def test_validation_with_an_attack_keeps_triples(digits_model, digits):
    split = digits["calibration"]
    x, y, ids = split.images(slice(0, 200)), torch.from_numpy(split.labels[:200]), split.ids[:200]
    made = with_attack(digits_model, x, y, build_attack("fgsm", eps=0.15), ids)
    m = len(made.unknown)
    assert m % 2 == 0 and len(made.known) == 2 * m and made.criterion == "auroc"
    clean, noisy = made.known[:m], made.known[m:]
    with torch.no_grad():
        labels = digits_model(clean).argmax(1)
        assert torch.equal(digits_model(noisy).argmax(1), labels)  # right both ways
        assert (digits_model(made.unknown).argmax(1) != labels).all()
    # Noise as large as the perturbation, but for what [0, 1] cuts off.
    sizes = [(v - clean).flatten(1).norm(dim=1) for v in (noisy, made.unknown)]
    assert (sizes[0] <= sizes[1] * (1 + 1e-5)).all() and float((sizes[0] / sizes[1]).mean()) > 0.5
    first, second = made.halves()
    assert torch.equal(first.known[: m // 2], clean[0::2]) and torch.equal(first.known[m // 2 :], noisy[0::2])
    assert torch.equal(second.unknown, made.unknown[1::2])
    few = Validation(made.known[:38], made.unknown[:19])  # a half would have nine
    assert few.halves() == (few, few)
    plain = with_attack(digits_model, x, y, build_attack("fgsm", eps=0.15), ids, noise=False)
    assert len(plain.known) == len(plain.unknown)
    with pytest.raises(DataError, match="attack that succeeds more often"):
        with_attack(digits_model, x, y, build_attack("fgsm", eps=0.0), ids)


# Energy-bounded fine-tuning ------------------------------------------------------------------------------------------


def test_energy_bound_invariants():
    inside, outside = torch.tensor([-9.0, -8.0]), torch.tensor([-3.0, -2.0, -1.0])
    assert energy_bound(inside, outside, -8.0, -3.0) == 0
    assert energy_bound(torch.tensor([-7.0, -9.0]), outside, -8.0, -3.0) == pytest.approx(0.5)  # 1 / B
    assert energy_bound(inside, torch.tensor([]), -8.0, -3.0) == 0  # an empty group is 0, not NaN
    leaf = torch.tensor([-7.0, -8.5, -6.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(energy_bound(leaf, outside, -8.0, -3.0), leaf)
    assert torch.allclose(gradient, 2 * torch.tensor([1.0, 0.0, 2.0]) / 3)
    logits, y, out = torch.randn(6, 4), torch.arange(6) % 4, torch.randn(3, 4)
    value = energy_bounded_loss(logits, y, out, -5.0, -1.0, 0.1)
    by_hand = F.cross_entropy(logits, y) + 0.1 * energy_bound(marginal_energy(logits), marginal_energy(out), -5.0, -1.0)
    assert torch.allclose(value, by_hand)


def test_fine_tuning_moves_energies_apart(digits_model, digits):
    import copy

    model = copy.deepcopy(digits_model).train()
    train = digits["train"]
    x, y = train.images(slice(None)), torch.from_numpy(train.labels)
    noise = torch.rand(len(x), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fresh = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def gap():
        model.eval()
        with torch.no_grad():
            found = [float(marginal_energy(model(v)).mean()) for v in (fresh, digits["test"].images(slice(None)))]
        model.train()
        return found[0] - found[1]

    with torch.no_grad():
        m_in, m_out = margins(model.eval()(x[:200]), model(noise[:200]), slack=2.0)
    model.train()
    before = gap()
    batches = [(x[i : i + 64], y[i : i + 64], noise[i : i + 128]) for i in range(0, 960, 64)] * 4
    losses = fine_tune(model, batches, FineTuning(m_in, m_out, lr=1e-2), steps=50)
    assert len(losses) == 50 and np.isfinite(losses).all()
    assert gap() > before + 1
    assert model.training
    with torch.no_grad():
        right = model.eval()(digits["test"].images(slice(None))).argmax(1) == torch.from_numpy(digits["test"].labels)
    assert float(right.float().mean()) > 0.85
    with pytest.raises(DataError, match="ended after 3 of 4"):
        fine_tune(model, batches[:3], FineTuning(-9, -3), steps=4)
    with pytest.raises(ConfigError, match="m_in < m_out"):
        FineTuning(-3, -9)
    with pytest.raises(DataError, match="not below"):
        margins(torch.zeros(4, 3), torch.full((4, 3), 50.0))


# The adapter ---------------------------------------------------------------------------------------------------------

OPTIONS = {"ViM": {"d": 16}, "DICE": {"p": 0.7}, "KNN": {"k": 7}, "WeightedEBO": {"weights": [1.0] * 10}}


@pytest.mark.parametrize("name", available())
def test_every_detector_of_pytorch_ood_by_name(name, digits_model, digits):
    train, test = digits["train"], digits["test"]
    detector = PytorchOOD(name, OPTIONS.get(name))
    detector.fit(digits_model, train.images(slice(None)), torch.from_numpy(train.labels))
    scores = detector.score(test.images(slice(0, 60)))
    assert scores.shape == (60,) and scores.dtype == torch.float64
    assert bool(torch.isfinite(scores).all())
    assert float(scores.std()) > 0
    assert detector.spec()["package"]


def test_the_adapter_covers_the_package():
    classes = {n for n in theirs.__all__ if isinstance(getattr(theirs, n), type)}
    assert classes == set(available()) | set(LEFT_OUT)


def test_the_adapter_says_what_is_missing(monkeypatch):
    with pytest.raises(ConfigError, match="Did you mean 'KNN'"):
        PytorchOOD("KNNN")
    with pytest.raises(ConfigError, match="options lack d"):
        PytorchOOD("ViM")
    with pytest.raises(ConfigError, match="unknown option 'kk'"):
        PytorchOOD("DICE", {"kk": 3})
    with pytest.raises(ConfigError, match="chain of modules"):
        PytorchOOD("Gram")
    monkeypatch.setattr("detectors.pytorch_ood_adapter.available", list)
    with pytest.raises(Exception, match="pip install pytorch-ood"):
        PytorchOOD("KNN")
