"""The estimator: the same layer as the pure function, with a gradient, whatever classes have samples."""

import numpy as np
import pytest
import torch

from detectors.gaussian_probe import naive_bayes
from robustbench_ext.attacks.adaptive import Adaptive
from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics import calibration as cal
from robustbench_ext.models import Observations, observe
from robustbench_ext.probes import scorer
from uq.naive_bayes_probe import NaiveBayesProbe


@pytest.fixture(scope="module")
def seen(digits_model, digits):
    def of(split):
        part = digits[split]
        return observe(digits_model, part.images(slice(None)), torch.from_numpy(part.labels), ["penultimate", "conv3"])

    return of("train"), of("test")


def test_its_logits_are_those_of_the_layer(seen):
    train, test = seen
    probe = NaiveBayesProbe().fit_observations(train)
    head = naive_bayes(train.features["penultimate"], train.labels, 10)
    assert torch.equal(probe.read(test).logits, head(test.features["penultimate"]))
    accuracy = float((probe.read(test).logits.argmax(1) == test.labels).double().mean())
    assert accuracy > 0.9  # the features were trained to be told apart
    other = NaiveBayesProbe(layer="conv3").fit_observations(train)
    assert not torch.equal(other.read(test).logits, probe.read(test).logits)
    assert probe.spec() != other.spec() != NaiveBayesProbe(layer="conv3", epsilon=1e-3).spec()
    assert probe.summary()["samples of the smallest class"] == float(torch.bincount(train.labels).min())
    assert probe.warnings() == []


def test_classes_without_samples_are_told_and_never_predicted(seen):
    train, test = seen
    some = train.labels < 7
    part = Observations(train.logits[some], train.labels[some], {k: v[some] for k, v in train.features.items()})
    probe = NaiveBayesProbe().fit_observations(part)
    assert probe.warnings() == ["3 of 10 classes have no training samples, so they are never predicted"]
    logits, y = probe.read(test).logits.numpy(), test.labels.numpy()
    assert logits.argmax(1).max() == 6
    confidence, right = cal.confidence_and_correctness(logits, y)
    assert np.isfinite(confidence).all()
    assert right[y >= 7].sum() == 0
    assert np.isfinite(cal.brier(logits, y).value)
    assert cal.nll(logits, y).value == np.inf  # probability 0 for what happens


def test_an_attacker_can_follow_it(seen, digits_model, digits_test):
    train, _ = seen
    x, y, ids = (v[:30] for v in digits_test)
    probe = NaiveBayesProbe().fit_observations(train)
    found = Adaptive(eps=0.2, steps=20, scorer=scorer(probe))(digits_model, x, y, ids=ids)
    wrong = found.broken & (found.norms > 0)
    assert int(wrong.sum()) > 10
    plain = Adaptive(eps=0.2, steps=20)(digits_model, x, y, ids=ids)  # the classifier's own confidence instead

    def confidence(inputs):
        reading = probe.read(observe(digits_model, inputs, y, ["penultimate"])).logits
        return reading.log_softmax(1).amax(1)

    both = wrong & plain.broken & (plain.norms > 0)
    assert float(confidence(found.x_adv)[both].mean()) >= float(confidence(plain.x_adv)[both].mean())


def test_options():
    for epsilon in (0, -1, float("inf")):
        with pytest.raises(ConfigError, match="> 0|finite"):
            NaiveBayesProbe(epsilon=epsilon)
    assert NaiveBayesProbe(epsilon="1e-6").parameters() == {"layer": "penultimate", "epsilon": 1e-6}
