"""The embedded domains: classes, sizes, no leak between domains that share digits, balance of joined ones."""

import numpy as np
import pytest
import torch

from robustbench_ext.data import load_dataset
from robustbench_ext.data.base import Dataset, split_dataset
from robustbench_ext.data.digits_dg import DOMAINS, chosen_domains, joined
from robustbench_ext.errors import ConfigError


@pytest.fixture(scope="module")
def domains():
    return {name: make() for name, make in DOMAINS.items()}


def test_every_domain_has_the_same_classes_and_size(domains):
    assert list(domains) == ["mnist", "mnist-m", "optical", "fonts"]
    for name, data in domains.items():
        assert data.shape == (3, 32, 32) and data.classes == tuple("0123456789"), name
        for split in data.splits.values():
            x = split.images(slice(0, 40))
            assert x.shape[1:] == (3, 32, 32) and float(x.min()) >= 0 and float(x.max()) <= 1
            # Multiples of 1/255 (divided in float32): the bytes are the same on every machine.
            assert float((x * 255 - (x * 255).round()).abs().max()) < 1e-4
            share = np.bincount(split.labels, minlength=10) / len(split)
            assert abs(share - 0.1).max() < 0.02
    assert [len(d["test"]) for d in domains.values()] == [1000, 1000, 360, 800]


def test_shared_digits_are_in_the_same_split(domains):
    for split in ("train", "calibration", "test"):
        assert set(domains["mnist"][split].ids) == set(domains["mnist-m"][split].ids)
    one, other = (domains[d]["test"].images(slice(0, 1)) for d in ("mnist", "mnist-m"))
    # Where the digit is black the patch shows, where it is white its complement: given the digit, the patch is known.
    patch = torch.where(one > 0.5, 1 - other, other)
    assert float((patch - one).abs().sub(other).abs()[(one == 0) | (one == 1)].max()) < 1e-6


def test_a_sample_is_a_function_of_its_id(domains):
    from robustbench_ext.data.digits_dg import _eight_bit, _rendered

    test = domains["fonts"]["test"]
    again = _eight_bit(_rendered(test.labels[5:8], test.ids[5:8].tolist()))
    assert torch.equal(again, test.images(slice(5, 8)))


def test_joined_domains_are_balanced_and_keep_their_samples(domains):
    data = load_dataset("digits-dg:without-fonts")
    train = data["train"]
    assert len(train) == 3000 + 3000 + 1078
    head = train.domains[:2000]
    for name, n in (("mnist", 3000), ("mnist-m", 3000), ("optical", 1078)):
        assert abs(np.mean(head == name) - n / len(train)) < 0.01
    row = int(np.flatnonzero(train.domains == "optical")[3])
    name = train.ids[row].partition("/")[2]
    original = domains["optical"]["train"]
    same = int(np.flatnonzero(original.ids == name)[0])
    assert torch.equal(train.images(slice(row, row + 1)), original.images(slice(same, same + 1)))
    assert train.labels[row] == original.labels[same]
    assert torch.equal(train.images(np.array([row, 0, row]))[0], train.images(slice(row, row + 1))[0])
    assert train.take(10).fingerprint() != train.take(11).fingerprint()
    assert load_dataset("digits-dg:mnist+optical")["test"].fingerprint() != data["test"].fingerprint()


def test_unknown_domains_and_unequal_ones_are_errors():
    with pytest.raises(ConfigError, match="mnist-m"):
        load_dataset("digits-dg:mnistm")
    with pytest.raises(ConfigError, match="no domain is left"):
        chosen_domains("without-a+b", ("a", "b"), "x")
    with pytest.raises(ConfigError, match="expected digits-dg:DOMAIN"):
        load_dataset("digits-dg")
    rng = np.random.default_rng(0)
    ids = [f"i{i}" for i in range(40)]
    splits = split_dataset(rng.random((40, 1, 8, 8), dtype=np.float32), np.arange(40) % 2, ids)
    small = Dataset("small", splits, ("a", "b"), (1, 8, 8))
    with pytest.raises(ConfigError, match="share classes and size"):
        joined("x", {"one": load_dataset("digits-dg:optical"), "two": small})
