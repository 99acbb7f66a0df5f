"""Attacks that know more: on detectors, on confidence, on randomised models; and what a search keeps."""

import numpy as np
import pytest
import torch
from torch import nn

from detectors import MSP, Detector, Energy, Mahalanobis
from robustbench_ext.attacks import build_attack
from robustbench_ext.attacks.adaptive import Adaptive
from robustbench_ext.attacks.search import Search, average_prediction
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics.detection import auroc
from robustbench_ext.models import observe
from robustbench_ext.probes import scorer
from robustbench_ext.randomness import SampleRandom
from uq import TemperatureScaling


def fitted(detector, model, mnist):
    train = mnist["train"]
    return detector.fit(model, train.images(slice(0, 1000)), torch.from_numpy(train.labels[:1000]))


@pytest.mark.parametrize("detector", [MSP, Energy, Mahalanobis], ids=lambda d: d.name)
def test_the_adaptive_attack_blinds_the_detector_that_it_knows(detector, mnist_model, mnist, mnist_test):
    """On the same samples, both attacks breaking nearly all: AUROC well below the plain attack's."""
    x, y, ids = (v[:120] for v in mnist_test)
    seen = fitted(detector(), mnist_model, mnist)
    plain = build_attack("pgd", eps=0.25, steps=40, stop="never")(mnist_model, x, y, ids=ids)
    knowing = Adaptive(eps=0.25, steps=60, scorer=scorer(seen))(mnist_model, x, y, ids=ids)
    assert float(knowing.broken.float().mean()) >= float(plain.broken.float().mean()) - 0.02
    right = (mnist_model(x).argmax(1) == y).detach()
    both = right & plain.broken & knowing.broken
    clean = seen.score(x).numpy()
    values = [auroc(clean, seen.score(r.x_adv[both]).numpy()).value for r in (plain, knowing)]
    assert values[1] < values[0] - 0.1
    # Sample by sample, too: the one that knows finds a lower score nearly everywhere.
    lower = seen.score(knowing.x_adv[both]) <= seen.score(plain.x_adv[both]) + 1e-9
    assert float(lower.float().mean()) > 0.8


def test_inflating_confidence(mnist_model, mnist, mnist_test):
    x, y, ids = (v[:80] for v in mnist_test)
    calibration = mnist["calibration"]
    images, labels = calibration.images(slice(None)), torch.from_numpy(calibration.labels)
    estimator = TemperatureScaling().fit_observations(observe(mnist_model, images, labels))
    first = build_attack("pgd", eps=0.25, steps=40)(mnist_model, x, y, ids=ids)  # stops at the first mistake
    sure = Adaptive(eps=0.25, steps=40, scorer=scorer(estimator))(mnist_model, x, y, ids=ids)
    default = Adaptive(eps=0.25, steps=40)(mnist_model, x, y, ids=ids)
    both = first.broken & sure.broken & default.broken & (first.norms > 0)
    confidence = [r.logits[both].softmax(1).amax(1).median() for r in (first, sure, default)]
    assert confidence[1] > confidence[0] + 0.1 and confidence[2] > confidence[0] + 0.1


def test_more_steps_of_the_adaptive_attack_evade_better(mnist_model, mnist, mnist_test):
    x, y, ids = (v[:60] for v in mnist_test)
    seen = fitted(Energy(), mnist_model, mnist)
    scores = [
        seen.score(Adaptive(eps=0.25, steps=steps, scorer=scorer(seen))(mnist_model, x, y, ids=ids).x_adv).mean()
        for steps in (5, 60)
    ]
    assert scores[1] < scores[0]


class Flat(Detector):
    """A score that is no function of the input."""

    name = "flat"

    def _score(self, seen):
        return torch.zeros(len(seen))


def test_adaptive_says_what_it_cannot_do(digits_model, digits_test):
    x, y, ids = (v[:8] for v in digits_test)
    with pytest.raises(ConfigError, match="has no gradient"):
        Adaptive(eps=0.1, scorer=scorer(Flat()))(digits_model, x, y, ids=ids)
    with pytest.raises(ConfigError, match="in Python give scorer="):
        Adaptive(eps=0.1, against="energy")(digits_model, x, y, ids=ids)
    with pytest.raises(ConfigError, match="stop must be 'never'"):
        Adaptive(eps=0.1, stop="broken")


def test_adaptive_conditions_of_a_suite(tiny_suite, tmp_path):
    tiny_suite["models"] = tiny_suite["models"][:1]
    tiny_suite["conditions"] = [
        {"attack": "pgd", "eps": 0.1, "steps": 10, "stop": "never"},
        {"attack": "adaptive", "eps": 0.1, "steps": 20, "against": ["energy", "mahalanobis"]},
        {"attack": "audited", "eps": 0.1, "steps": 5, "targets": 2, "queries": 30, "screen_steps": 3, "passes": 60},
    ]
    tiny_suite["detectors"], tiny_suite["uq"] = ["energy", "mahalanobis"], []
    summary = run_suite(tiny_suite, tmp_path)
    assert not summary.failures
    for name in ("energy", "mahalanobis"):
        (plain,) = summary.results.find(condition="pgd Linf 0.1", probe=name, metric="auroc")
        (knowing,) = summary.results.find(condition=f"adaptive Linf 0.1 against {name}", probe=name, metric="auroc")
        assert knowing.value < plain.value
    # The audited ensemble needs all samples at once, whatever the chunk size; its rows say how they were made.
    (robust,) = summary.results.find(condition="audited Linf 0.1", metric="robust_accuracy", group=None)
    assert robust.n == 120 and robust.ci_method == "audit + Wilson"
    assert summary.results.find(condition="audited Linf 0.1", metric="audited_share")[0].value > 0
    assert any("survived the screen" in note for note in summary.results.notes)
    again = run_suite(tiny_suite, tmp_path)
    assert again.computed == 0 and again.reused == summary.computed
    tiny_suite["conditions"][1]["against"] = "enrgy"
    with pytest.raises(ConfigError, match="Did you mean 'energy'"):
        run_suite(tiny_suite, tmp_path / "other")


class Noisy(nn.Module):
    """A model behind random noise: its prediction is what it says on average."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x):
        return self.inner((x + self.scale * torch.randn_like(x)).clamp(0, 1))


def test_expectation_over_transformations(digits_model, digits_test):
    """Means over draws break more than single draws do, as fresh draws confirm, and runs are reproducible."""
    x, y, ids = (v[:100] for v in digits_test)
    model = Noisy(digits_model, 0.1).eval()
    rand = build_attack("rand", eps=0.1, steps=15, draws=20)
    result = rand(model, x, y, ids=ids, seed=1)
    again = rand(model, x, y, ids=ids, seed=1)
    assert torch.equal(result.x_adv, again.x_adv)
    assert rand.members == ("apgd-ce", "apgd-dlr")

    def wrong(inputs):
        torch.manual_seed(7)
        with torch.no_grad():
            return average_prediction(torch.stack([model(inputs) for _ in range(200)])).argmax(1) != y

    # What it calls broken is broken on average over many fresh draws, up to samples on the boundary.
    assert float(wrong(result.x_adv)[result.broken].float().mean()) > 0.85
    single = build_attack("apgd-ce", eps=0.1, steps=15)(model, x, y, ids=ids, seed=1)
    assert float(wrong(single.x_adv)[single.broken].float().mean()) < float(
        wrong(result.x_adv)[result.broken].float().mean()
    )


def test_draws_that_agree_are_no_different_from_one():
    logits = torch.randn(6, 4)
    assert torch.allclose(average_prediction(logits.expand(5, 6, 4)), logits, atol=1e-5)
    two = torch.stack([logits, torch.randn(6, 4)])
    assert torch.allclose(average_prediction(two).softmax(1), two.softmax(2).mean(0), atol=1e-6)


def search_on(points, stop="never", target=None, keep="loss"):
    """A search on one sample at 0.5 of a linear two-class model: z = (0, 10 (x - 0.6))."""

    class Line(nn.Module):
        def forward(self, x):
            z = 10 * (x.flatten(1)[:, :1] - 0.6)
            return torch.cat([torch.zeros_like(z), z], dim=1)

    x, y = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64)
    model = Line()
    random = SampleRandom(0, torch.zeros(1, dtype=torch.int64), "test")
    search = Search(model, x, y, Threat("Linf", 0.5), random, stop, model(x), target=target, keep=keep)
    for point in points:
        candidate = torch.full((1, 1, 1, 1), point)
        search.submit(candidate, search.logits(candidate))
    return search


def test_a_search_keeps_the_strongest_or_the_nearest():
    points = [0.55, 0.9, 0.7, 0.3]
    assert search_on(points).best.item() == pytest.approx(0.9)
    assert search_on(points, keep="norm").best.item() == pytest.approx(0.7)
    assert search_on([0.55, 0.3]).best.item() == pytest.approx(0.55)  # nothing broke: the highest loss
    assert search_on([0.55, 0.3], keep="norm").best.item() == pytest.approx(0.5)  # nothing broke: the input itself
    assert search_on(points).forwards.tolist() == [4]


def test_a_search_keeps_what_is_asked_for_by_value():
    search = search_on([])
    for point, value in ((0.9, -3.0), (0.7, -1.0), (0.8, -2.0), (0.5, 9.0)):
        candidate = torch.full((1, 1, 1, 1), point)
        search.submit(candidate, search.logits(candidate), value=torch.tensor([value]))
    assert search.best.item() == pytest.approx(0.7)


def test_late_gain_is_the_share_of_the_loss_after_the_mark():
    search = search_on([0.52, 0.54])
    search.mark()
    before = search.late_gain()
    assert before.item() == 0
    candidate = torch.full((1, 1, 1, 1), 0.59)
    search.submit(candidate, search.logits(candidate))

    def loss(x):
        return np.log1p(np.exp(10 * (x - 0.6)))

    expected = (loss(0.59) - loss(0.54)) / (loss(0.59) - loss(0.5))
    assert search.late_gain().item() == pytest.approx(expected, rel=1e-4)
