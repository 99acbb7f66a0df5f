"""Calibrated targets, and fine-tuning on them."""

import numpy as np
import pytest
import torch
from torch import nn

from defenses.cape import CaPE
from robustbench_ext.data import load_dataset
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models import load_model
from uq.cape import binned_targets, kernel_targets

RNG = np.random.default_rng(0)
P = RNG.uniform(size=300)
Y = (RNG.uniform(size=300) < P).astype(np.int64)


class TestTargets:
    @pytest.mark.parametrize("bins", [1, 2, 7, 10, 300])
    def test_their_mean_is_that_of_the_outcomes(self, bins):
        targets = binned_targets(P, Y, bins)
        assert targets.mean() == pytest.approx(Y.mean())
        assert len(np.unique(targets)) <= bins

    def test_one_bin_gives_the_base_rate_and_n_bins_the_outcomes(self):
        assert binned_targets(P, Y, 1) == pytest.approx(np.full(300, Y.mean()))
        assert np.array_equal(binned_targets(P, Y, 300), Y)

    def test_bins_are_of_equal_mass_along_the_prediction(self):
        order = np.argsort(P)
        targets = binned_targets(P, Y, 10)[order].reshape(10, 30)
        assert (targets == targets[:, :1]).all()
        assert targets[:, 0] == pytest.approx(Y[order].reshape(10, 30).mean(axis=1))

    def test_the_kernel_is_a_weighted_mean_of_neighbours(self):
        i = 17
        order = np.argsort(P)
        rank = np.empty(300, dtype=int)
        rank[order] = np.arange(300)
        near = np.abs(rank - rank[i]) <= 40
        weight = np.exp(-((P - P[i]) ** 2) / (2 * 0.05**2)) * near
        assert kernel_targets(P, Y, 0.05, 40)[i] == pytest.approx(weight @ Y / weight.sum())
        assert np.array_equal(kernel_targets(P, Y, 0.05, 0), Y)
        # A kernel without end over all samples gives the base rate.
        assert kernel_targets(P, Y, 1e9, 300) == pytest.approx(np.full(300, Y.mean()))

    def test_they_are_nearer_to_the_truth_than_the_outcomes_are(self):
        for targets in (binned_targets(P, Y, 10), kernel_targets(P, Y)):
            assert ((targets - P) ** 2).mean() < 0.1 * ((Y - P) ** 2).mean()

    def test_what_is_no_outcome_is_refused(self):
        with pytest.raises(DataError, match="outcomes of 0 and 1"):
            binned_targets(P, Y + 1)
        with pytest.raises(ConfigError, match="301 bins of 300"):
            binned_targets(P, Y, 301)
        with pytest.raises(ConfigError, match="sigma > 0"):
            kernel_targets(P, Y, 0.0)


@pytest.fixture(scope="module")
def data():
    return load_dataset("outcomes:linear#n=300,calibration=100,test=50,side=8")


@pytest.fixture(scope="module")
def network():
    return load_model("small-cnn", shape=(1, 8, 8), num_classes=2, kwargs={"width": 2}).module


class TestTuning:
    def test_the_epoch_of_least_log_loss_is_kept_and_the_start_is_left_as_it_was(self, data, network):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        made = CaPE(epochs=7, lr=1e-2, batch_size=64).make({"net": network}, data, seed=0)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        losses = made.report["log_losses"]
        assert len(losses) == 8 and made.report["log_loss"] == min(losses) == losses[made.report["epoch"]]
        tuned = load_model("small-cnn", shape=(1, 8, 8), num_classes=2, kwargs={"width": 2}).module
        tuned.load_state_dict(made.state)
        split = data["calibration"]
        tuned.eval()
        with torch.no_grad():
            logits = tuned(split.images(slice(None))).double()
        found = nn.functional.cross_entropy(logits, torch.from_numpy(split.labels))
        # The batches of a pass differ from those in training by nothing but the order of sums in float32.
        assert float(found) == pytest.approx(made.report["log_loss"], abs=1e-5)

    def test_a_start_that_is_not_improved_is_given_back(self, data, network):
        made = CaPE(epochs=2, lr=10.0).make({"net": network}, data, seed=0)
        assert made.report["epoch"] == 0
        assert all(torch.equal(made.state[name], value) for name, value in network.state_dict().items())

    def test_the_same_seed_gives_the_same_bits_and_targets_matter(self, data, network):
        def tuned(**options):
            return (
                CaPE(epochs=3, lr=1e-2, batch_size=64, **options)
                .make({"net": network}, data, seed=1)
                .report["log_losses"]
            )

        assert tuned() == tuned()
        assert tuned() != tuned(bins=300)  # the outcomes themselves
        assert tuned()[1] != tuned(targets="kernel")[1]

    def test_calibrated_targets_come_first_and_then_raw_ones(self, data, network, monkeypatch):
        seen = []

        def epoch(self, model, x, targets, order, optimizer):
            seen.append(len(np.unique(targets)) > 2)

        monkeypatch.setattr(CaPE, "_epoch", epoch)
        CaPE(epochs=8).make({"net": network}, data, seed=0)
        assert seen == [True] + [False] * 5 + [True, False]

    def test_what_it_cannot_be_made_of(self, data, network):
        with pytest.raises(ConfigError, match="expected one model"):
            CaPE().make({"a": network, "b": network}, data, seed=0)
        with pytest.raises(ConfigError, match="has 10 classes"):
            CaPE().make({"a": network}, load_dataset("digits"), seed=0)
        with pytest.raises(ConfigError, match="expected one of bins, kernel"):
            CaPE(targets="bin")
        with pytest.raises(ConfigError, match="cape: lr"):
            CaPE(lr=0)
