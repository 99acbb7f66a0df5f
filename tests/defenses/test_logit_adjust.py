"""Post-hoc logit adjustment: exactly z - tau log pi, as a network like any other."""

import numpy as np
import pytest
import torch
from torch import nn

from defenses.head_align import WeightAlign
from defenses.logit_adjust import LogitAdjust
from robustbench_ext.data import load_dataset
from robustbench_ext.errors import ConfigError
from robustbench_ext.models import load_model


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


@pytest.fixture(scope="module")
def tailed():
    return load_dataset("digits@exp:10")


def logits(network, state, x):
    with torch.no_grad():
        before = network(x)
        network.load_state_dict(state)
        return before, network(x)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_logits_less_the_log_prior(network, tailed, digits_test, tau):
    made = LogitAdjust(tau=tau).make({"net": network}, tailed, 0)
    counts = np.bincount(tailed["train"].labels)
    before, after = logits(network, made.state, digits_test[0])
    expected = before - tau * torch.from_numpy(np.log(counts / counts.sum())).float()
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    assert made.report["head"] == "3"


def test_equal_priors_and_tau_0_change_no_decision(network, digits_test):
    x = digits_test[0]
    for data, tau in (("digits@balanced:500", 1.0), ("digits@exp:10", 0.0)):
        made = LogitAdjust(tau=tau).make({"net": network}, load_dataset(data), 0)
        before, after = logits(network, made.state, x)
        assert torch.equal(before.argmax(1), after.argmax(1))


def test_what_cannot_be_adjusted(network, tailed):
    with pytest.raises(ConfigError, match="expected one model"):
        LogitAdjust().make({"a": network, "b": network}, tailed, 0)
    with pytest.raises(ConfigError, match="tau = -1"):
        LogitAdjust(tau=-1)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    with pytest.raises(ConfigError, match="has no bias"):
        LogitAdjust().make({"a": bare}, tailed, 0)


@pytest.mark.parametrize("maker", [LogitAdjust(), WeightAlign()])
def test_a_head_whose_outputs_are_not_the_logits_is_refused(maker, tailed):
    """Cosines do not change when the rows of the layer do: correcting it would silently do nothing."""
    cosine = load_model("small-cnn", shape=(1, 8, 8), num_classes=10, kwargs={"cosine_head": True}).module
    with pytest.raises(ConfigError, match="not its logits yet"):
        maker.make({"a": cosine}, tailed, 0)
