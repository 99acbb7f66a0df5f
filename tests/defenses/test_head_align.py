"""Weight aligning: equal lengths afterwards, nothing else changed."""

import pytest
import torch
from torch import nn

from defenses.head_align import WeightAlign, alignment, head_of
from robustbench_ext.data import load_dataset
from robustbench_ext.errors import ConfigError


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    with torch.no_grad():
        net[3].weight[:4] *= 3
    return net


FAVOURED = (0, 1, 2, 3)


@pytest.mark.parametrize("norm", [1, 2])
def test_both_groups_have_the_same_mean_length_and_doing_it_again_changes_nothing(network, norm, digits):
    made = WeightAlign(favoured=FAVOURED, norm=norm, cap=False).make({"net": network}, digits, 0)
    rows = made.state["3.weight"].norm(p=norm, dim=1)
    # Ten float32 sums of twelve squares: a few units of 2^-24 each.
    assert float(rows[:4].mean()) == pytest.approx(float(rows[4:].mean()), rel=1e-6)
    assert alignment(made.state["3.weight"], FAVOURED, norm, cap=False) == pytest.approx(1.0, rel=1e-6)


def test_other_logits_and_the_order_within_the_group_stay(network, digits, digits_test):
    x = digits_test[0]
    with torch.no_grad():
        before = network(x)
        made = WeightAlign(favoured=FAVOURED).make({"net": network}, digits, 0)
        assert torch.equal(network(x), before)  # the member itself is left as it is
        network.load_state_dict(made.state)
        after = network(x)
    assert made.report["gamma"] < 1
    assert torch.equal(after[:, 4:], before[:, 4:])
    assert torch.equal(after[:, :4].argsort(1), before[:, :4].argsort(1))
    # With the bias scaled too, the weights' gamma is the logits' gamma.
    torch.testing.assert_close(after[:, :4], made.report["gamma"] * before[:, :4], rtol=1e-5, atol=1e-5)


def test_the_bias_may_stay_and_then_logits_are_not_scaled(network, digits):
    made = WeightAlign(favoured=FAVOURED, bias=False).make({"net": network}, digits, 0)
    assert torch.equal(made.state["3.bias"], network[3].bias)
    assert not torch.equal(made.state["3.weight"][:4], network[3].weight[:4])


def test_gamma_is_one_where_lengths_agree_and_capped_where_the_favoured_are_shorter():
    weight = torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 5.0]])
    assert alignment(weight, (0,)) == 1.0
    assert alignment(weight, (0,), norm=1, cap=False) == pytest.approx(5 / 7)
    assert alignment(weight / torch.tensor([[2.0], [1.0], [1.0]]), (0,)) == 1.0
    assert alignment(weight / torch.tensor([[2.0], [1.0], [1.0]]), (0,), cap=False) == 2.0


def test_frequent_classes_are_favoured(network):
    data = load_dataset("digits@exp:10")
    made = WeightAlign().make({"net": network}, data, 0)
    assert made.report["favoured"] == list(data.classes[: len(made.report["favoured"])])
    assert 1 <= len(made.report["favoured"]) < 10


def test_what_cannot_be_aligned(network, digits):
    with pytest.raises(ConfigError, match="each group needs a class"):
        alignment(torch.ones(3, 2), (0, 1, 2))
    with pytest.raises(ConfigError, match="expected one model"):
        WeightAlign().make({"a": network, "b": network}, digits, 0)
    with pytest.raises(ConfigError, match="norm = 3"):
        WeightAlign(norm=3)
    with pytest.raises(ConfigError, match="no linear layer of 7 outputs"):
        head_of(network, 7)
