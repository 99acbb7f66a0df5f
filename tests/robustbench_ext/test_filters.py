"""Filter quality: the specification's invariants and numbers."""

import json
import math

import pytest
import torch
from torch import nn

from robustbench_ext.filters import filter_quality, filter_rows, layer_quality, random_entropy, variance_entropy


def weight(out=16, inner=8, seed=0):
    return torch.randn(out, inner, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_scale_changes_nothing_and_a_common_filter_changes_no_entropy():
    w = weight()
    w[3] *= 1e-4
    one = layer_quality("a", w)
    for factor in (-3.0, 1e-3, 1e4):
        other = layer_quality("a", factor * w)
        assert other.sparsity == one.sparsity > 0
        for name in ("entropy", "normalised", "clean_entropy", "orthogonality"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5), name
    shifted = w + torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    assert variance_entropy(shifted.reshape(-1, 9)) == pytest.approx(one.entropy, rel=1e-5)
    assert one.clean_entropy == variance_entropy(torch.cat([w[:3], w[4:]]).reshape(-1, 9)) != one.entropy


def test_filters_of_one_direction_have_no_entropy_and_nothing_gives_nan():
    direction = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    assert variance_entropy(torch.randn(40, 1) @ direction) == pytest.approx(0.0, abs=1e-5)
    assert variance_entropy(direction.repeat(40, 1)) == 0.0
    zero = layer_quality("z", torch.zeros(4, 4, 3, 3))
    assert (zero.entropy, zero.clean_entropy, zero.sparsity, zero.normalised) == (0.0, 0.0, 1.0, 0.0)
    assert zero.orthogonality == 1.0


def test_the_entropy_of_nine_equal_variances_is_the_largest():
    assert variance_entropy(torch.cat([torch.eye(9), -torch.eye(9)])) == pytest.approx(math.log10(9), abs=1e-9)


@pytest.mark.parametrize(("n", "expected"), [(64, 0.9056), (4096, 0.9511), (16, 0.7221)])
def test_the_fitted_entropy_of_random_filters(n, expected):
    assert random_entropy(n) == pytest.approx(expected, abs=5e-5)  # four digits are given


@pytest.mark.parametrize(("n", "expected", "tolerance"), [(64, 1.0, 0.02), (1024, 1.0, 0.02), (16, 1.13, 0.02)])
def test_random_filters_are_near_one_where_the_fit_holds(n, expected, tolerance):
    values = [layer_quality("g", weight(n // 4, 4, seed)).normalised for seed in range(40)]
    assert sum(values) / len(values) == pytest.approx(expected, abs=tolerance)


def test_orthogonality():
    rows = torch.eye(18)[:5].reshape(5, 2, 3, 3)
    assert layer_quality("o", rows).orthogonality == pytest.approx(1.0)
    assert layer_quality("o", rows[:1].repeat(5, 1, 1, 1)).orthogonality == pytest.approx(0.0, abs=1e-9)
    assert layer_quality("o", rows[:1]).orthogonality is None


def test_of_a_network(digits_model):
    found = filter_quality(digits_model)
    assert [f.layer for f in found] == [
        n for n, m in digits_model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert filter_quality(nn.Linear(3, 3)) == []
    assert layer_quality("few", weight(1, 4)).normalised is None


@pytest.mark.parametrize("n", [5, 64, 3000])
def test_the_products_of_columns_have_the_singular_values(n):
    """Nine columns of very different sizes: shares of variance down to 1e-12."""
    filters = torch.randn(n, 9, generator=torch.Generator().manual_seed(n)).double() * torch.logspace(0, -6, 9).double()
    values = torch.linalg.svdvals(filters - filters.mean(0)).square()
    share = values / values.sum()
    share = share[share > 0]
    # Shares are off by 1e-15, and -v log v by that times log10 of the share, 12 here.
    assert variance_entropy(filters) == pytest.approx(float(-(share * share.log10()).sum()), abs=1e-13)


def test_weights_that_are_not_finite_are_told_and_stop_nothing():
    w = weight()
    w[0, 0, 0, 0] = float("nan")
    network = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 1))
    with torch.no_grad():
        network[0].weight.copy_(w)
    first, second = filter_rows(network)
    assert first == {"layer": "0", "n": 128} | dict.fromkeys(
        ("sparsity", "entropy", "normalised", "clean_entropy", "orthogonality")
    )
    assert second["n"] == 128
    assert 0 < second["entropy"] <= 0.955
    json.dumps([first, second], allow_nan=False)


def test_rows_are_told_to_six_digits(digits_model):
    for row, exact in zip(filter_rows(digits_model), filter_quality(digits_model), strict=True):
        assert row["entropy"] == float(f"{exact.entropy:.6g}")
        assert row["layer"] == exact.layer


def test_a_section_of_the_report():
    from reports.filters import filters, layers, strips, summary
    from tests.reports.synthetic import synthetic

    made = synthetic(["a", "b"])
    for i, model in enumerate(made.models):
        model["filters"] = filter_rows(nn.Sequential(*(nn.Conv2d(4, 4 + i, 3) for _ in range(6)), nn.Conv2d(1, 2, 3)))
    section = filters(made)
    assert len(section.figures) == 1
    assert [name for name, _ in section.tables[0].rows] == [m["name"] for m in made.models]
    first = made.models[0]["filters"]
    assert first[-1]["normalised"] is None  # two filters
    told = [layer["normalised"] for layer in first[:-1]]
    row = summary(made).rows[0][1]
    assert [cell.value for cell in row[:3]] == [7, min(told), pytest.approx(sum(sorted(told)[2:4]) / 2)]
    assert row[3].text == first[told.index(min(told))]["layer"]
    assert layers(made.models[0]).rows[-1][1][1].text == "–"
    grid = strips(made.models).images[0].get_array()
    assert grid.shape == (len(made.models), 7)
    del made.models[0]["filters"]
    assert len(summary(made).rows) == len(made.models) - 1
    for model in made.models:
        model.pop("filters", None)
    assert not filters(made)
