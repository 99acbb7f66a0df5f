"""Regression data, shifts of tables, regressors and attacks on them."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.datasets import make_friedman1
from sklearn.decomposition import PCA
from torch import nn

from robustbench_ext.attacks.base import Passes
from robustbench_ext.attacks.regression import RegressionAttack, RegressionPGD, RegressionRandomSearch, TableBudget
from robustbench_ext.data import TableSplit, load_dataset
from robustbench_ext.data.columns import Columns
from robustbench_ext.data.shift import covariate_shift, feature_noise, missing_features
from robustbench_ext.data.tabular import NOISES, split_table, target_strata
from robustbench_ext.errors import ConfigError, DataError, ModelError, ThreatModelError
from robustbench_ext.models.mlp import Standardized, mlp
from robustbench_ext.models.tabular import (
    RegressorRecipe,
    check_predictions,
    load_regressor,
    observe_regressor,
    predictions_of,
    train_regressor,
)
from robustbench_ext.randomness import SampleRandom

# Sizes and fingerprints of the test splits: if one changes, every stored key changes with it.
BUNDLED = {
    "diabetes": ((265, 89, 88), "342ac50b4de67a81f86e"),
    "autompg": ((235, 78, 79), "7179f98a4d529c21c1cb"),
    "friedman": ((2400, 800, 800), "655df6f2936e9abe0234"),
    "toy-heteroscedastic": ((1500, 500, 1000), "90049ed5ccff7bc00471"),
    "toy-cubic": ((2000, 1000, 1000), "9187f2d6e39cca9c0686"),
    "toy-cubic:gaussian": ((2000, 1000, 1000), "9e531005c8127cb02c12"),
    "toy-cubic:triangular": ((2000, 1000, 1000), "8ceb586182bf98a60765"),
}
SHORT = RegressorRecipe(epochs=6, patience=6)
FOREST = "sklearn:ensemble.RandomForestRegressor"


@pytest.fixture(scope="module")
def autompg():
    return load_dataset("autompg")


@pytest.fixture(scope="module")
def cars(autompg):
    """Some test inputs, their targets, ids, and the columns of the training data."""
    split = autompg["test"].take(30)
    return split.inputs(slice(None)), torch.from_numpy(split.labels), split.ids, Columns.of(autompg)


@pytest.fixture(scope="module")
def network(autompg, tmp_path_factory):
    folder = train_regressor("mlp", autompg, tmp_path_factory.mktemp("mlp"), recipe=SHORT, kwargs={"hidden": [16]})
    return load_regressor(str(folder), autompg).module


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_regression_data(name):
    data = load_dataset(name)
    sizes, fingerprint = BUNDLED[name]
    assert tuple(map(len, data.splits.values())) == sizes
    assert data["test"].fingerprint() == fingerprint
    assert len(set.union(*(set(s.ids.tolist()) for s in data.splits.values()))) == sum(sizes)
    assert (data.task, data.classes, data.shape) == ("regression", (), (len(data.features),))
    assert data.describe()["task"] == "regression"
    for split in data.splits.values():
        x = split.inputs(slice(None))
        assert (x.dtype, split.labels.dtype, x.shape) == (torch.float32, np.float64, (len(split), *data.shape))
        index = np.array([3, 0, 2])
        assert torch.equal(split.take(5).inputs(index), x[index])
        x[:] = 0  # a copy: a model that works in place does not change the data
        assert not torch.equal(split.inputs(slice(None)), x)
        strata = target_strata(split.labels)
        sizes_of = np.bincount(strata)
        for n in (20, 57):
            # The k-th of m samples stands at (k + 1/2) / m, so a prefix holds m t within 1/2 of each stratum; t is n / N within
            # half of the ten strata over N, which is another 1/2 of a sample where m is N / 10, and 0.7 for m up to 0.14 N.
            counts = np.bincount(strata[:n], minlength=len(sizes_of))
            assert abs(counts - n * sizes_of / len(split)).max() <= 1.2
    with pytest.raises(DataError, match="rows of a table"):
        data["test"].images(slice(None))


def test_classification_data_says_what_it_said():
    assert set(load_dataset("digits").describe()) == {"name", "source", "shape", "classes", "splits"}
    assert torch.equal(load_dataset("digits")["test"].inputs(slice(2)), load_dataset("digits")["test"].images(slice(2)))
    with pytest.raises(ConfigError, match="regression data"):
        load_dataset("autompg@exp:10")


def test_splits_of_a_table_follow_ids_and_the_target():
    rng = np.random.default_rng(0)
    x, y, ids = rng.normal(size=(203, 3)), rng.normal(size=203), [f"r{i}" for i in range(203)]
    order = rng.permutation(203)
    first, second = split_table(x, y, ids), split_table(x[order], y[order], [ids[i] for i in order])
    edges = np.quantile(y, np.arange(1, 10) / 10)
    for name, split in first.items():
        assert split.fingerprint() == second[name].fingerprint()
        share = np.bincount(np.searchsorted(edges, split.labels), minlength=10) / len(split)
        assert abs(share - 0.1).max() < 0.04  # strata of 20 or 21 are cut at 12 and 16: shares 0.1 within one sample
    tiny = split_table(x[:5], y[:5], ids[:5])
    assert [len(s) for s in tiny.values()] == [3, 1, 1]
    with pytest.raises(DataError, match="NaN"):
        TableSplit(np.full((2, 2), np.nan), np.zeros(2), ["a", "b"])


@pytest.mark.parametrize(
    ("noise", "law"), [("lognormal", stats.lognorm(1)), ("gaussian", stats.norm()), ("triangular", stats.triang(0))]
)
def test_noises_are_the_standardised_laws(noise, law):
    levels = np.linspace(0.001, 0.999, 500)
    expected = (law.ppf(levels) - law.mean()) / law.std()
    np.testing.assert_allclose(NOISES[noise](levels), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["friedman", "toy-heteroscedastic", "toy-cubic", "toy-cubic:triangular"])
def test_targets_follow_the_truth(name):
    data = load_dataset(name)
    x = np.concatenate([split.inputs(slice(None)).numpy() for split in data.splits.values()])
    y = np.concatenate([split.labels for split in data.splits.values()])
    error = (y - data.truth.mean(x)) / data.truth.std(x)
    # The probability integral transform is uniform. The data is fixed: this passes or fails for good.
    law = {"toy-cubic": stats.lognorm(1), "toy-cubic:triangular": stats.triang(0)}.get(name, stats.norm())
    assert stats.kstest(law.cdf(error * law.std() + law.mean()), "uniform").pvalue > 0.01
    assert abs(np.mean(y < data.truth.quantile(x, 0.8)) - 0.8) < 3 * np.sqrt(0.8 * 0.2 / len(y))
    assert data.truth.inside(data["train"].inputs(slice(None)).numpy()).all()
    inside = data.truth.inside(data["test"].inputs(slice(None)).numpy()).mean()
    # Friedman's test inputs are like the training inputs; of the toys 8 / 14 and 8 / 12, within three standard errors.
    expected = {"friedman": 1.0, "toy-heteroscedastic": 8 / 14}.get(name, 2 / 3)
    assert abs(inside - expected) <= 3 * np.sqrt(expected * (1 - expected) / 1000)
    with pytest.raises(DataError, match="between 0 and 1"):
        data.truth.quantile(np.zeros((1, 10)), 1.0)


def test_friedman_is_friedman():
    x, y = make_friedman1(200, noise=0.0, random_state=0)
    np.testing.assert_allclose(load_dataset("friedman").truth.mean(x), y, rtol=1e-12)


def test_categories_of_bundled_data(autompg):
    x = autompg["train"].inputs(slice(None)).numpy()
    origin = [j for j, f in enumerate(autompg.features) if f.group == "origin"]
    assert (x[:, origin].sum(axis=1) == 1).all()
    assert [f.name for f in autompg.features][-3:] == ["origin=1", "origin=2", "origin=3"]
    sex = next(f for f in load_dataset("diabetes").features if f.group == "sex")
    assert sex.name == "sex=2"
    assert sum(f.group is not None for f in load_dataset("diabetes").features) == 1


@pytest.fixture
def table(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"size": rng.normal(size=60).round(3), "town": rng.choice(["A", "B", "C"], 60), "new": rng.integers(0, 2, 60)}
    )
    frame["price"] = (frame["size"] * 2 + 5).round(3)
    file = tmp_path / "homes.csv"
    frame.to_csv(file, index=False)
    return file, frame


def test_csv(table):
    file, frame = table
    data = load_dataset(f"csv:{file}")
    assert [(f.name, f.group) for f in data.features] == [
        ("size", None),
        *((f"town={t}", "town") for t in "ABC"),
        ("new", "new"),
    ]
    assert data.target == "price"
    everything = np.concatenate([s.labels for s in data.splits.values()])
    assert sorted(everything) == sorted(frame["price"])
    other = load_dataset(f"csv:{file}#target=size#drop=town,new")
    assert [f.name for f in other.features] == ["price"]
    frame.iloc[::-1].to_csv(file, index=False)  # a loaded file that is edited is read again; the order does not matter
    assert load_dataset(f"csv:{file}")["test"].fingerprint() == data["test"].fingerprint()
    frame.iloc[:50].to_csv(file, index=False, sep=";")
    assert sum(map(len, load_dataset(f"csv:{file}").splits.values())) == 50


def test_csv_with_identical_rows_and_named_splits(table):
    file, frame = table
    pd.concat([frame] * 3).to_csv(file, index=False)
    data = load_dataset(f"csv:{file}")
    rows = [{i.split("/")[0] for i in s.ids.tolist()} for s in data.splits.values()]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 60  # three of each, and none in two splits
    frame["split"] = ["train"] * 40 + ["val"] * 8 + ["test"] * 12
    frame.to_csv(file, index=False)
    data = load_dataset(f"csv:{file}")
    assert {name: len(s) for name, s in data.splits.items()} == {"train": 40, "calibration": 8, "test": 12}
    assert sorted(data["test"].labels) == sorted(frame["price"][48:])
    assert "split" not in [f.name for f in data.features]


def test_csv_with_missing_values(table):
    file, frame = table
    frame.loc[[4, 9], "size"] = None
    frame["town"] = frame["town"].astype(object)
    frame.loc[7, "town"] = "?"
    frame.to_csv(file, index=False)
    with pytest.raises(DataError, match=r"'size' in line 6, 11; 'town' in line 9.*#missing=drop"):
        load_dataset(f"csv:{file}")
    assert sum(map(len, load_dataset(f"csv:{file}#missing=drop").splits.values())) == 57
    assert sum(map(len, load_dataset(f"csv:{file}#drop=size,town").splits.values())) == 60


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("a,b\n" + "1,2\n" * 9, "#taget=b", ConfigError, "Did you mean 'target'"),
        ("a,b\n" + "1,2\n" * 9, "#target=c", ConfigError, "unknown column 'c'"),
        ("a,b\n" + "1,2\n" * 9, "#target", ConfigError, "needs a value"),
        ("a,b\n" + "1,2\n" * 9, "#missing=mean", ConfigError, "missing=drop"),
        ("1,2\n" + "1,2\n" * 9, "", DataError, "names of the columns"),
        ("a,b\n" + "1,x\n" * 9, "", DataError, "the target 'b' is text"),
        ("a,b\n" + "1,2\n" * 20 + "1.o,3\n", "", DataError, r"'1.o' \(row 22\)"),
        ("a,b\n" + "1,2\n" * 9 + "inf,3\n", "", DataError, "infinite in row 11"),
        ("a,b\n" + "".join(f"n{i},{i}\n" for i in range(60)), "", DataError, "60 different values"),
        ("b\n1\n2\n", "", ConfigError, "at least one other column"),
        ("a,b\n1,2\n3,4\n", "", DataError, "5 rows"),
        ("a,b,split\n" + "1,2,trian\n" * 9, "", DataError, "Did you mean 'train'"),
    ],
)
def test_csv_errors(tmp_path, text, options, error, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(error, match=message):
        load_dataset(f"csv:{tmp_path / 't.csv'}{options}")


def test_names_of_data():
    with pytest.raises(DataError, match=r"no file nothing\.csv"):
        load_dataset("csv:nothing.csv")
    with pytest.raises(ConfigError, match="Did you mean 'gaussian'"):
        load_dataset("toy-cubic:gausian")
    with pytest.raises(ConfigError, match="takes no argument"):
        load_dataset("autompg:1")
    with pytest.raises(ConfigError, match="expected csv:PATH"):
        load_dataset("csv:")


def test_statsmodels_data():
    pytest.importorskip("statsmodels")
    data = load_dataset("statsmodels:fair")
    assert (sum(map(len, data.splits.values())), data.target) == (6366, "affairs")
    with pytest.raises(DataError, match="no regression data set"):
        load_dataset("statsmodels:spector")
    with pytest.raises(DataError, match="Did you mean 'longley'"):
        load_dataset("statsmodels:longly")


# Shifts --------------------------------------------------------------------------------------------------------------


def _random(ids, seed=0):
    return SampleRandom.of(seed, ids, "shift")


@pytest.mark.parametrize(
    "shift", [lambda *a: feature_noise(a[0], 0.5, *a[1:], flip=0.5), lambda *a: missing_features(a[0], 0.4, *a[1:])]
)
def test_shifts_of_inputs_belong_to_samples(cars, shift):
    x, _, ids, columns = cars
    whole, part = shift(x, columns, _random(ids)), shift(x[7:9], columns, _random(ids[7:9]))
    assert torch.equal(whole[7:9], part)
    assert not torch.equal(whole, shift(x, columns, _random(ids, seed=1)))


def test_feature_noise(cars):
    x, _, _, columns = cars
    x = x[:1].repeat(4000, 1)
    noisy = feature_noise(x, 0.5, columns, _random(range(4000)))
    change = ((noisy - x).double().numpy() / np.where(columns.std > 0, columns.std, 1))[:, columns.numeric]
    # The standard error of a standard deviation of n normal draws is sd / sqrt(2 n).
    assert abs(change.std(axis=0) - 0.5).max() < 4 * 0.5 / np.sqrt(2 * 4000)
    assert torch.equal(noisy[:, ~columns.numeric], x[:, ~columns.numeric])
    assert torch.equal(feature_noise(x, 0.0, columns, _random(range(4000))), x)
    flipped = feature_noise(x, 0.0, columns, _random(range(4000)), flip=0.3)[:, ~columns.numeric]
    assert (flipped.sum(dim=1) == 1).all()
    was = int(x[0, ~columns.numeric].argmax())
    share = flipped.mean(dim=0).double()
    for k in range(3):
        p = 0.7 if k == was else 0.15
        assert abs(float(share[k]) - p) < 4 * np.sqrt(p * (1 - p) / 4000)
    with pytest.raises(ConfigError, match="size >= 0"):
        feature_noise(x, -1.0, columns, _random(range(4000)))


def test_a_single_indicator_flips():
    columns = Columns.of(load_dataset("diabetes"))
    x = load_dataset("diabetes")["test"].inputs(slice(20))
    flipped = feature_noise(x, 0.0, columns, _random(range(20)), flip=1.0)
    j = columns.names.index("sex=2")
    assert torch.equal(flipped[:, j], 1 - x[:, j])


def test_missing_features(cars):
    x, _, ids, columns = cars
    assert len(columns.parts) == 7  # six numbers and the origin
    assert torch.equal(missing_features(x, 0.0, columns, _random(ids)), x)
    typical = torch.as_tensor(columns.typical, dtype=torch.float32)
    assert torch.equal(missing_features(x, 1.0, columns, _random(ids)), typical.expand_as(x))
    assert typical[-3:].tolist() == [1.0, 0.0, 0.0]  # most cars come from origin 1
    marked = torch.full((3000, 9), -1.0)
    lost = {f: missing_features(marked, f, columns, _random(range(3000))) != -1 for f in (0.3, 0.5)}
    assert (lost[0.5] | ~lost[0.3]).all()  # a superset
    assert (lost[0.3][:, 6:].sum(dim=1) % 3 == 0).all()  # a category as a whole
    count = lost[0.3][:, :7].sum(dim=1).double()  # the first indicator stands for the origin
    assert set(count.tolist()) == {2.0, 3.0}
    assert abs(float(count.mean()) - 2.1) < 4 * np.sqrt(0.1 * 0.9 / 3000)


@pytest.mark.parametrize("name", ["autompg", "diabetes", "friedman"])
def test_the_axis_of_a_shift_is_the_first_principal_component(name):
    data, columns = load_dataset(name), Columns.of(load_dataset(name))
    x = data["train"].inputs(slice(None)).numpy().astype(np.float64)[:, columns.numeric]
    fitted = PCA(1).fit((x - x.mean(axis=0)) / x.std(axis=0))
    axis = columns.axis[columns.numeric]
    np.testing.assert_allclose(axis * np.sign(axis @ fitted.components_[0]), fitted.components_[0], atol=1e-8)
    assert axis[np.abs(axis).argmax()] > 0
    assert (columns.axis[~columns.numeric] == 0).all()
    # scikit-learn divides by N - 1.
    assert columns.spread**2 * len(x) / (len(x) - 1) == pytest.approx(fitted.explained_variance_[0], rel=1e-9)


def test_covariate_shift(autompg):
    split, columns = autompg["train"], Columns.of(autompg)
    x, ids = split.inputs(slice(None)), split.ids
    found = {s: covariate_shift(x, _random(ids), s, columns) for s in (-2.0, 0.0, 1.0, 2.0)}
    assert all(len(f.index) == 118 and f.kept == 118 / 235 for f in found.values())
    after = [f.after for f in found.values()]
    assert after == sorted(after)
    assert abs(found[0.0].after) < 3 / np.sqrt(118)  # a random subset; z has unit variance over the training inputs
    assert abs(found[1.0].before) < 1e-6
    order = np.random.default_rng(0).permutation(len(x))
    again = covariate_shift(x[order], _random(ids[order]), 1.0, columns)
    assert set(ids[order][again.index]) == set(ids[found[1.0].index])
    assert (np.diff(found[1.0].index) > 0).all()
    assert covariate_shift(x, _random(ids), 3.0, columns, keep=1.0).index.tolist() == list(range(235))
    heavy = covariate_shift(x, _random(ids), 3.0, columns, along="weight").index
    assert float(x[heavy, 3].mean()) > float(x[:, 3].mean()) + 0.5 * columns.std[3]
    with pytest.raises(ConfigError, match="Did you mean 'weight'"):
        covariate_shift(x, _random(ids), 1.0, columns, along="wieght")
    with pytest.raises(ConfigError, match="0 < keep <= 1"):
        covariate_shift(x, _random(ids), 1.0, columns, keep=0.0)


def test_covariate_shift_draws_by_weight(autompg):
    """Of four samples one is kept, with probability exp(s z_i) / sum: the Gumbel-max identity."""
    columns = Columns.of(autompg)
    x = autompg["train"].inputs(slice(4))
    z = (x[:, 3].double().numpy() - columns.mean[3]) / columns.std[3]
    p = np.exp(1.5 * z) / np.exp(1.5 * z).sum()
    picks = [
        covariate_shift(x, _random("abcd", s), 1.5, columns, keep=0.25, along="weight").index[0] for s in range(1000)
    ]
    assert stats.chisquare(np.bincount(picks, minlength=4), 1000 * p).pvalue > 0.01  # fixed seeds


# Regressors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(4, 2), r"expected \(4,\) or \(4, 1\)"),
        (torch.zeros(3), r"for 4 inputs"),
        (torch.tensor([0.0, torch.nan, 0.0, torch.inf]), r"2 of 4 inputs \(first: row 1\)"),
        ("x", "expected a tensor"),
    ],
)
def test_predictions_are_checked(returned, message):
    with pytest.raises(ModelError, match=message):
        check_predictions(returned, 4)


def test_predictions_keep_their_gradient():
    x = torch.ones(3, 1, requires_grad=True)
    out = check_predictions(2 * x, 3)
    assert (out.shape, out.dtype) == ((3,), torch.float64)
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [[2.0]] * 3


def test_scaling_is_inside_and_the_penultimate_layer_is_found(autompg, cars):
    x, _, _, columns = cars
    torch.manual_seed(0)
    inner = mlp(9, [5, 4], "tanh", dropout=0.5)
    model = Standardized(inner, 9).learn(columns, autompg["train"].labels)
    seen = observe_regressor(model, x, ["penultimate", "inner.0"], batch_size=7)
    y = autompg["train"].labels
    with torch.no_grad():
        z = (x.double() - torch.from_numpy(np.where(columns.numeric, columns.mean, 0))) / torch.from_numpy(
            columns.scale
        )
        inner.double().eval()
        expected = y.mean() + y.std() * inner(z)[:, 0]
        hidden = inner[:-1](z)
    # Rounding of a few float32 operations on values of unit size, scaled by the target's standard deviation (8).
    torch.testing.assert_close(seen.predictions, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.features["penultimate"].double(), hidden, rtol=0, atol=1e-5)
    assert {k: tuple(v.shape) for k, v in seen.features.items()} == {"penultimate": (30, 4), "inner.0": (30, 5)}
    with pytest.raises(ModelError, match="Did you mean 'inner"):
        observe_regressor(model, x, ["inner.9"])


class _Sealed(TableSplit):
    """A split that must not be looked at."""

    def __init__(self, split):
        super().__init__(split.inputs(slice(None)).numpy(), split.labels, split.ids)
        self.sealed = True

    def inputs(self, index):
        raise AssertionError("training looked at a split that is not its own")


def test_training_is_repeatable_and_looks_at_train_alone(autompg, tmp_path):
    sealed = {name: _Sealed(autompg[name]) for name in ("calibration", "test")}
    data = replace(autompg, splits={"train": autompg["train"], **sealed})
    kwargs, recipe = {"hidden": [8], "dropout": 0.2}, RegressorRecipe(epochs=100, patience=1, lr=0.03)
    rows = []
    first = train_regressor("mlp", data, tmp_path / "a", recipe=recipe, kwargs=kwargs, on_epoch=rows.append)
    before = torch.random.get_rng_state()
    second = train_regressor("mlp", data, tmp_path / "b", recipe=recipe, kwargs=kwargs)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [(f / "model.safetensors").read_bytes() for f in (first, second)]
    assert weights[0] == weights[1]
    other = train_regressor("mlp", data, tmp_path / "c", recipe=recipe, kwargs=kwargs, seed=1)
    assert (other / "model.safetensors").read_bytes() != weights[0]
    loaded = load_regressor(str(first), autompg)
    assert loaded.fingerprint == load_regressor(str(second), autompg).fingerprint
    assert loaded.fingerprint != load_regressor(str(other), autompg).fingerprint
    assert train_regressor("mlp", data, first, recipe=recipe, kwargs=kwargs) == first
    with pytest.raises(ConfigError, match="another training run"):
        train_regressor("mlp", data, first, recipe=recipe, kwargs=kwargs, seed=3)
    # The published weights are the best epoch's; with a patience of 1 the last epoch is another.
    said = json.loads((first / "model.json").read_text())
    assert said["selected"]["epoch"] == len(said["curve"]) - 1 < 99
    held = said["curve"][said["selected"]["epoch"] - 1]["held_out"]
    assert held == min(row["held_out"] for row in said["curve"])
    split = autompg["train"]
    kept = len(split) - round(0.15 * len(split))
    predicted = observe_regressor(loaded.module, split.inputs(slice(kept, None))).predictions.numpy()
    measured = ((predicted - split.labels[kept:]) ** 2).mean() / split.labels.var()
    assert measured == pytest.approx(held, rel=1e-4)
    assert [row["epoch"] for row in rows] == list(range(1, len(said["curve"]) + 1))


def test_held_out_samples_are_not_trained_on(autompg, tmp_path, monkeypatch):
    seen = []
    scaled = Standardized.scaled

    def spy(self, x):
        if self.training:
            seen.append(x)
        return scaled(self, x)

    monkeypatch.setattr(Standardized, "scaled", spy)
    train_regressor("mlp", autompg, tmp_path, recipe=replace(SHORT, epochs=2), kwargs={"hidden": [4]})
    x = autompg["train"].inputs(slice(None)).tolist()
    counts = {tuple(row): 0 for row in x}
    for row in torch.cat(seen).tolist():
        counts[tuple(row)] += 1
    kept = len(x) - round(0.15 * len(x))
    assert all(counts[tuple(row)] == 2 for row in x[:kept])
    assert all(counts[tuple(row)] == 0 for row in x[kept:])


def test_forests_are_fitted_again(autompg, tmp_path):
    kwargs = {"n_estimators": 10}
    folder = train_regressor(FOREST, autompg, tmp_path / "f", kwargs=kwargs, seed=3)
    assert [f.name for f in folder.iterdir()] == ["model.json"]
    loaded, direct = load_regressor(str(folder), autompg), load_regressor(FOREST, autompg, kwargs=kwargs, seed=3)
    x = autompg["test"].inputs(slice(None))
    assert torch.equal(predictions_of(loaded.module, x), predictions_of(direct.module, x))
    assert not loaded.module.differentiable
    assert loaded.notes == ()
    others = [
        load_regressor(FOREST, autompg, kwargs=kwargs).fingerprint,
        load_regressor(FOREST, load_dataset("diabetes"), seed=3).fingerprint,
    ]
    assert len({direct.fingerprint, *others}) == 3
    with pytest.raises(ModelError, match="fitted again"):
        load_regressor(str(folder), load_dataset("diabetes"))
    said = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(said | {"library": "0.1", "predictions": "?"}))
    assert "predicts otherwise" in load_regressor(str(folder), autompg).notes[0]
    with pytest.raises(ModelError, match="no linear layer"):
        observe_regressor(loaded.module, x, ["penultimate"])


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("sklearn:ensemble.RandomForestRegresor", {}, "Did you mean 'ensemble.RandomForestRegressor'"),
        ("sklearn:ensemble.RandomForestClassifier", {}, "unknown regressor of scikit-learn"),
        ("sklearn:utils._testing.SkipTest", {}, "unknown regressor"),
        ("sklearn:.os.System", {}, "unknown regressor"),
        (FOREST, {"n_estimatrs": 3}, "Did you mean 'n_estimators'"),
        (FOREST, {"n_estimators": -3}, "fitting failed"),
        ("mpl", {}, "Did you mean 'mlp'"),
        ("mlp", {"hiden": [3]}, "hiden"),
        ("nowhere.py:build", {}, "there is no file"),
    ],
)
def test_names_of_regressors(autompg, spec, kwargs, message):
    with pytest.raises(ModelError, match=message):
        load_regressor(spec, autompg, kwargs=kwargs)


def test_regressors_need_regression_data():
    with pytest.raises(DataError, match="is data for classification"):
        load_regressor("mlp", load_dataset("digits"))


def test_regressors_of_the_users_own(autompg, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom sklearn.linear_model import Ridge\n"
        "class Mean:\n    def __init__(self, value=3.0):\n        self.value = value\n"
        "    def predict(self, x):\n        return x[:, 0] * 0 + self.value\n"
        "def network(width=4):\n    return torch.nn.Sequential(torch.nn.Linear(9, width), torch.nn.Linear(width, 1))\n"
        "def wide():\n    return torch.nn.Linear(9, 2)\n"
        "def nothing():\n    return 3\n"
    )
    x = autompg["test"].inputs(slice(None))
    mean = load_regressor(f"{file}:Mean", autompg)
    assert predictions_of(mean.module, x).tolist() == [3.0] * len(x)
    assert mean.fingerprint == load_regressor(f"{file}:Mean", autompg).fingerprint
    assert mean.fingerprint != load_regressor(f"{file}:Mean", autompg, kwargs={"value": 4.0}).fingerprint
    network = load_regressor(f"{file}:network", autompg)
    assert observe_regressor(network.module, x, ["penultimate"]).features["penultimate"].shape == (len(x), 4)
    trained = train_regressor(f"{file}:network", autompg, tmp_path / "t", recipe=SHORT)
    assert isinstance(load_regressor(str(trained), autompg).module, Standardized)
    for name, message in (
        ("wide", r"expected \(79,\)|expected \(235,\)"),
        ("nothing", "a method `predict`"),
        ("Maen", "Mean"),
    ):
        with pytest.raises(ModelError, match=message):
            load_regressor(f"{file}:{name}", autompg)


# Attacks -------------------------------------------------------------------------------------------------------------

ATTACKS = [RegressionPGD(eps=0.2, steps=8), RegressionRandomSearch(eps=0.2, queries=60)]


@pytest.fixture(params=ATTACKS, ids=lambda a: a.name)
def attack(request):
    return request.param


@pytest.fixture(scope="module")
def budget(autompg):
    return TableBudget.of(autompg)


def test_attacks_keep_their_promises(attack, network, cars, budget):
    x, y, ids, columns = cars
    network.train()
    result = attack(network, x, y, budget, ids=ids)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    change = (result.x_adv.double() - x.double()).abs().numpy()
    assert (change <= 0.2 * budget.scale).all()  # exactly: bounds are rounded inwards
    low, high = np.minimum(budget.low, x.double().numpy()), np.maximum(budget.high, x.double().numpy())
    assert ((result.x_adv.double().numpy() >= low) & (result.x_adv.double().numpy() <= high)).all()
    assert torch.equal(result.x_adv[:, ~columns.numeric], x[:, ~columns.numeric])
    assert (result.error_after >= result.error_before).all()
    assert float((result.error_after - result.error_before).mean()) > 0.1  # miles per gallon: it does something
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(predictions_of(network, result.x_adv), result.prediction, rtol=1e-6, atol=0)
        torch.testing.assert_close(result.error_before, (predictions_of(network, x) - y).abs(), rtol=0, atol=1e-5)
    cost = attack.cost() + Passes(1, 0)
    assert (result.forwards == cost.forwards).all()
    assert (result.backwards == cost.backwards).all()


def test_no_budget_no_change(attack, network, cars, budget):
    x, y, ids, _ = cars
    result = replace(attack, eps=0.0)(network, x, y, budget, ids=ids)
    assert torch.equal(result.x_adv, x)
    assert torch.equal(result.error_after, result.error_before)
    assert (int(result.forwards.max()), int(result.backwards.max())) == (1, 0)


def test_attacks_do_not_depend_on_the_batch(attack, network, cars, budget):
    x, y, ids, _ = cars
    whole = attack(network, x, y, budget, ids=ids)
    parts = attack(network, x, y, budget, ids=ids, batch_size=7)
    order = torch.randperm(len(x))
    shuffled = attack(network, x[order], y[order], budget, ids=ids[order.numpy()])
    # A matrix product of another batch size rounds otherwise, so the last bits of the predictions may differ.
    torch.testing.assert_close(parts.error_after, whole.error_after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shuffled.error_after, whole.error_after[order], rtol=1e-4, atol=1e-4)


def test_a_forest_is_attacked_alike_in_any_batch(autompg, cars, budget):
    x, y, ids, _ = cars
    forest = load_regressor(FOREST, autompg, kwargs={"n_estimators": 5}).module
    attack = RegressionRandomSearch(eps=0.3, queries=20)
    whole, parts = attack(forest, x, y, budget, ids=ids), attack(forest, x, y, budget, ids=ids, batch_size=11)
    assert torch.equal(whole.x_adv, parts.x_adv)
    assert (whole.error_after > whole.error_before).any()
    assert not torch.equal(whole.x_adv, attack(forest, x, y, budget, ids=ids, seed=1).x_adv)
    with pytest.raises(ModelError, match="random-search"):
        RegressionPGD(eps=0.1)(forest, x, y, budget)


def _linear(weights):
    model = nn.Linear(len(weights), 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weights]))
        model.bias.fill_(0.5)
    return model


@pytest.mark.parametrize("objective", ["error", "up", "down"])
@pytest.mark.parametrize(
    "attack", [RegressionPGD(eps=0.5, steps=5), RegressionRandomSearch(eps=0.5, queries=300)], ids=lambda a: a.name
)
def test_a_linear_regressor_is_attacked_to_its_optimum(attack, objective):
    """The optimum is a corner of what is admissible: for each column the end that its weight asks for."""
    rng = np.random.default_rng(0)
    weights = [2.0, -1.0, 0.5, 3.0]
    x = torch.from_numpy(rng.uniform(-1, 1, (25, 4)).astype(np.float32))
    y = torch.from_numpy(rng.normal(size=25))
    y[0] = (
        float(x[0].double() @ torch.tensor(weights).double()) + 0.5
    )  # predicted right: the error's gradient is 0 there
    budget = TableBudget(np.array([1.0, 2.0, 0.3, 0.0]), np.full(4, -1.0), np.array([1.0, 1.0, 1.0, 0.0]))
    x[1, 3] = 0.9  # outside the box already, in the column that may not move
    x[2, 0] = 1.4  # outside the box: it may come back, not go further
    x[3, 1] = -1.3
    lower = np.maximum(x.double().numpy() - 0.5 * budget.scale, np.minimum(budget.low, x.double().numpy()))
    upper = np.minimum(x.double().numpy() + 0.5 * budget.scale, np.maximum(budget.high, x.double().numpy()))
    w = np.array(weights)
    top = np.where(w > 0, upper, lower) @ w + 0.5
    bottom = np.where(w > 0, lower, upper) @ w + 0.5
    error = np.maximum(abs(top - y.numpy()), abs(bottom - y.numpy()))
    result = replace(attack, objective=objective)(_linear(weights), x, y, budget)
    # Bounds rounded to float32, and a float32 product of four terms of size 6: 6 * 2^-23 * a few.
    best = {"error": (result.error_after, error), "up": (result.prediction, top), "down": (result.prediction, bottom)}
    np.testing.assert_allclose(best[objective][0].numpy(), best[objective][1], rtol=0, atol=5e-6)


def test_pgd_beats_random_points(network, cars, budget):
    x, y, ids, _ = cars
    result = RegressionPGD(eps=0.3)(network, x, y, budget, ids=ids)
    lower, upper = budget.bounds(x, 0.3)
    draws = SampleRandom.of(0, ids, "control")
    with torch.no_grad():
        worst = torch.stack(
            [
                (predictions_of(network, (lower + (upper - lower) * draws.uniform((9,), step=k)).float()) - y).abs()
                for k in range(85)
            ]
        ).amax(dim=0)
    assert (result.error_after >= worst - 1e-4).all()


@dataclass(frozen=True, kw_only=True)
class Cheat(RegressionAttack):
    name: ClassVar[str] = "cheat"

    def cost(self):
        return Passes(1, 0)

    def _run(self, search):
        search.submit(search.x + 3 * (search.upper - search.x))


def test_a_cheat_is_caught(network, cars, budget):
    x, y, _, _ = cars
    with pytest.raises(ThreatModelError, match="leave the budget"):
        Cheat(eps=0.1)(network, x, y, budget)


def test_attack_parameters(network, cars, budget):
    x, y, ids, _ = cars
    assert RegressionPGD(eps="1/10").eps == 0.1
    assert RegressionPGD(eps=0.1).spec() == {
        "attack": "pgd", "version": 1, "eps": 0.1, "objective": "error", "steps": 20, "restarts": 2, "step_size": 1.0
    }  # fmt: skip
    for wrong in ({"eps": -1}, {"eps": 0.1, "objective": "worst"}, {"eps": 0.1, "steps": 0}):
        with pytest.raises(ConfigError, match="expected"):
            RegressionPGD(**wrong)
    with pytest.raises(DataError, match="expected finite"):
        RegressionPGD(eps=0.1)(network, x, y[:3], budget)
    with pytest.raises(DataError, match="ids"):
        RegressionPGD(eps=0.1)(network, x, y, budget, ids=ids[:3])
    with pytest.raises(DataError, match="scale >= 0"):
        TableBudget(np.array([-1.0]), np.zeros(1), np.ones(1))
    with pytest.raises(DataError, match="is no table"):
        TableBudget.of(load_dataset("digits"))
