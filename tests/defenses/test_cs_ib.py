"""CS-IB: the published formulas term by term, what they promise and what they do not, training, and a suite under attack."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from defenses.cs_ib import CSIB, divergence, information, normalised_information
from robustbench_ext.data import TableSplit, load_dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.mlp import Standardized, mlp
from robustbench_ext.models.objective import LeastSquares
from robustbench_ext.models.tabular import RegressorRecipe, load_regressor, regressor_key, train_regressor

ONE = {"sigma_x": 1.0, "sigma_y": 1.0}
INFO = {"sigma_x": 1.0, "sigma_t": 1.0}


def draw(seed, n=40, d=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x[:, :1].sin() + 0.3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    t = torch.tanh(x @ torch.randn(d, 5, generator=generator, dtype=torch.float64))
    return x, y, t


def gram(a, b, sigma=1.0):
    """Entry by entry."""
    return np.array([[math.exp(-float(((p - q) ** 2).sum()) / (2 * sigma**2)) for q in b] for p in a])


def test_the_formulas_entry_by_entry():
    x, y, t = draw(0, n=15)
    f = y + 0.5
    k, q = gram(x, x, 1.5), gram(t, t, 0.7)
    l1, l2, l21 = gram(y, y, 0.8), gram(f, f, 0.8), gram(f, y, 0.8)
    for density in (False, True):
        below = k.sum(1) ** 2 if density else (k**2).sum(1)

        def total(a, below=below):
            return ((k * a).sum(1) / below).sum()

        expected = math.log(total(l1)) + math.log(total(l2)) - 2 * math.log(total(l21))
        found = divergence(x, y, f, sigma_x=1.5, sigma_y=0.8, density=density)
        assert float(found) == pytest.approx(expected, abs=1e-12)
    n, one = len(x), np.ones(len(x))
    expected = (
        math.log(np.trace(k @ q) / n**2)
        + math.log((one @ k @ one) * (one @ q @ one) / n**4)
        - 2 * math.log(one @ k @ q @ one / n**3)
    )
    assert float(information(x, t, sigma_x=1.5, sigma_t=0.7)) == pytest.approx(expected, abs=1e-12)


def test_the_divergence_is_zero_at_the_targets_and_grows_with_an_offset():
    x, y, _ = draw(1)
    assert float(divergence(x, y, y.clone(), **ONE)) == pytest.approx(0.0, abs=1e-12)
    values = [float(divergence(x, y, y + c, **ONE)) for c in (0.0, 0.1, 0.5, 1.0, 2.0, 3.0)]
    assert values == sorted(values)
    assert values[2] > 0.05


def test_the_divergence_is_neither_symmetric_nor_quite_positive():
    values, gaps = [], []
    for seed in range(60):
        x, y, _ = draw(seed, n=64)
        near = y + 0.05 * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values.append(float(divergence(x, y, near, **ONE)))
        far = y.roll(1, dims=0)
        gaps.append(abs(float(divergence(x, y, far, **ONE) - divergence(x, far, y, **ONE))))
    assert min(values) > -0.02
    assert max(gaps) > 1e-3


def test_information_is_not_negative_and_zero_of_constants():
    for seed in range(30):
        x, _, t = draw(seed, n=20)
        assert float(information(x, t, **INFO)) >= -1e-12
    for constant in (0.0, 7.5):
        assert float(information(x, torch.full_like(t, constant), **INFO)) == pytest.approx(0.0, abs=1e-12)
    assert float(information(x, t, **INFO)) > 0.1


def test_normalised_information():
    x, _, t = draw(2)
    assert float(normalised_information(x, x, **INFO)) == pytest.approx(1.0, abs=1e-12)
    own = [float(information(v, v, sigma_x=s, sigma_t=s)) for v, s in ((x, 2.0), (t, 0.5))]
    mixed = float(information(x, t, sigma_x=2.0, sigma_t=0.5)) / math.sqrt(own[0] * own[1])
    assert float(normalised_information(x, t, sigma_x=2.0, sigma_t=0.5)) == pytest.approx(mixed, abs=1e-12)
    with pytest.raises(DataError, match="t is constant"):
        normalised_information(x, torch.ones_like(t), **INFO)


def test_the_order_of_samples_does_not_matter():
    x, y, t = draw(3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    f = y.roll(1, dims=0)
    # 40 x 40 float64 terms in another order.
    assert float(divergence(x[order], y[order], f[order], **ONE)) == pytest.approx(
        float(divergence(x, y, f, **ONE)), abs=1e-12
    )
    assert float(information(x[order], t[order], **INFO)) == pytest.approx(float(information(x, t, **INFO)), abs=1e-12)


def test_gradients():
    x, y, t = draw(4, n=6)
    f = (y + 0.3).requires_grad_(True)
    t = t.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda f: divergence(x, y, f, **ONE), (f,))
    assert torch.autograd.gradcheck(lambda t: information(x, t, **INFO), (t,))


def test_targets_are_columns_and_a_batch_has_two_samples():
    x, y, t = draw(5)
    for f, g in ((y[:, 0], y), (y, y[:, 0]), (y[:, 0], y[:, 0])):
        with pytest.raises(DataError, match=r"\(N, 1\)"):
            divergence(x, f, g, **ONE)
    with pytest.raises(DataError, match="at least 2"):
        divergence(x[:1], y[:1], y[:1], **ONE)
    with pytest.raises(DataError, match="at least 2"):
        information(x[:1], t[:1], **INFO)
    with pytest.raises(DataError, match="equal shapes"):
        divergence(x, y, torch.cat([y, y], dim=1), **ONE)


def test_what_the_published_helper_makes_of_flat_targets_is_a_sum_of_squared_errors():
    """Why (N,) is refused: |a|^2 + |b|^2 - 2 ab' is one number then, the squared distance of whole batches."""
    x, y, _ = draw(6)
    y, f = y[:, 0], y[:, 0] + 0.1

    def flat(a, b):
        return torch.exp(-((a * a).sum() + (b * b).sum() - 2 * (a @ b)) / 2) * torch.ones(len(a), len(a), dtype=a.dtype)

    k = torch.from_numpy(gram(x, x))
    total = [((k * a).sum(1) / (k**2).sum(1)).sum() for a in (flat(y, y), flat(f, f), flat(f, y))]
    mistaken = total[0].log2() + total[1].log2() - 2 * total[2].log2()
    assert float(mistaken) == pytest.approx(float(((y - f) ** 2).sum()) / math.log(2), abs=1e-9)
    ours = float(divergence(x, y[:, None], f[:, None], **ONE)) / math.log(2)  # of base 2, as theirs
    assert abs(ours - float(mistaken)) > 0.1


def test_far_predictions_have_a_gradient_in_single_precision():
    x, y, _ = (part.float() for part in draw(7))
    f = (y + 50).requires_grad_(True)  # kernels of exp(-1250) are 0 in float32, and so is their sum
    assert float(torch.exp(-((f - y) ** 2) / 2).detach().sum()) == 0
    value = divergence(x, y, f, **ONE)
    (gradient,) = torch.autograd.grad(value, f)
    assert 1000 < float(value.detach()) < math.inf
    assert torch.isfinite(gradient).all() and (gradient > 0).any()


# Training ------------------------------------------------------------------------------------------------------------


def network(d=3):
    torch.manual_seed(0)
    return Standardized(mlp(d, (8, 6)), d).double()


def test_the_objective_reads_the_last_layer_and_leaves_no_hook():
    x, y, _ = draw(8, n=20)
    net = network()
    value, logs = CSIB(beta=0.5, sigma_x=2.0).loss(net, x, y[:, 0])
    t = net.inner[:-1](x)
    f = net.scaled(x)[:, None]
    d, i = divergence(x, y, f, sigma_x=2.0, sigma_y=1.0), information(x, t, sigma_x=2.0, sigma_t=1.0)
    torch.testing.assert_close(value, d + 0.5 * i, rtol=1e-12, atol=0)
    torch.testing.assert_close(logs["squared_error"], ((f - y) ** 2).mean(), rtol=1e-12, atol=0)
    assert not any(m._forward_pre_hooks for m in net.modules())
    plain, _ = CSIB(beta=0, sigma_x=2.0).loss(net, x, y[:, 0])
    torch.testing.assert_close(plain, d, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "beta"),
        ({"sigma_y": 0}, "sigma_y"),
        ({"density": "yes"}, "true or false"),
        ({"beta": "x"}, "beta"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        CSIB(**options)


def test_a_network_without_a_linear_layer_is_refused():
    with pytest.raises(ConfigError, match="no linear layer"):
        CSIB().check(Standardized(nn.Conv1d(1, 1, 1), 3))


SHORT = RegressorRecipe(epochs=3, batch_size=64, held_out=0.2)
HIDDEN = {"hidden": [16, 16]}


@pytest.fixture(scope="module")
def cars():
    return load_dataset("autompg")


def trained(data, folder, objective, recipe=SHORT):
    return train_regressor("mlp", data, folder, recipe=recipe, kwargs=HIDDEN, objective=objective)


def test_training_keeps_by_held_out_error_and_never_looks_at_the_test_split(tmp_path, cars):
    recipe = RegressorRecipe(epochs=12, batch_size=64, held_out=0.2, lr=0.01)
    first = trained(cars, tmp_path / "a", CSIB(sigma_x=3.0), recipe)
    told = json.loads((first / "model.json").read_text())
    held_out = [row["held_out"] for row in told["curve"]]
    assert told["selected"] == {"epoch": int(np.argmin(held_out)) + 1, "by": "held_out", "on": "train"}
    assert held_out[told["selected"]["epoch"] - 1] < 0.5 * held_out[0]  # it learns: by squared error
    row = told["curve"][0]
    assert row["objective"] == pytest.approx(row["d_cs"] + 0.01 * row["i_cs"], rel=1e-5)
    # The same train split beside test samples that are turned over: the same weights, bit for bit.
    test = cars["test"]
    other = TableSplit(test.inputs(slice(None)).numpy() * 0 + 1, -test.labels, test.ids)
    changed = replace(cars, splits={**cars.splits, "test": other})
    second = trained(changed, tmp_path / "b", CSIB(sigma_x=3.0), recipe)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_keys_tell_objectives_apart_and_least_squares_keeps_its_old_one(cars):
    def key(objective):
        return regressor_key("mlp", cars, SHORT, HIDDEN, 0, objective)

    keys = [key(o) for o in (None, CSIB(), CSIB(beta=0.1), CSIB(sigma_x=2))]
    assert len({*keys}) == 4
    assert key(LeastSquares()) == keys[0]


def test_least_squares_is_what_it_was(tmp_path, cars):
    plain = trained(cars, tmp_path / "plain", None)
    told = json.loads((plain / "model.json").read_text())
    assert "defense" not in told
    assert set(told["curve"][0]) == {"epoch", "loss", "held_out"}


def test_a_batch_of_one_cannot_be_trained_on(tmp_path, cars):
    with pytest.raises(DataError, match="at least 2"):
        trained(cars, tmp_path / "one", CSIB(), RegressorRecipe(epochs=1, batch_size=1))


@pytest.fixture
def suite():
    recipe = {"epochs": 3, "held_out": 0.2}
    return {
        "schema": 1,
        "name": "cs-ib",
        "data": "autompg",
        "n": 30,
        "models": [
            {"name": "least squares", "train": {"recipe": recipe, "kwargs": HIDDEN}},
            {
                "name": "cs-ib",
                "train": {
                    "defense": {"name": "cs-ib", "beta": "1e-2", "sigma_x": 3},
                    "recipe": recipe,
                    "kwargs": HIDDEN,
                },
            },
        ],
        "conditions": [
            {"attack": "pgd", "eps": 0.3, "steps": 1, "restarts": 1, "label": "fgsm"},
            {"attack": "pgd", "eps": 0.3, "steps": 5, "restarts": 1},
        ],
    }


def test_a_suite_trains_and_attacks_it(tmp_path, suite):
    summary = run_suite(suite, tmp_path / "run")
    assert not summary.failures and summary.trained == 2
    for model in ("least squares", "cs-ib"):
        values = {r.condition: r.value for r in summary.results.find(model=model, metric="rmse")}
        # Both directions are tried and the worse kept, and a step of PGD with more of them is kept where it is worse.
        assert values["clean"] < values["fgsm"] and values["clean"] < values["pgd 0.3"]
    told = {m["name"]: m["training"] for m in summary.results.models}
    assert told["cs-ib"]["defense"]["beta"] == 0.01
    assert "defense" not in told["least squares"]
    assert run_suite(suite, tmp_path / "run").trained == 0
    folder = next(f for f in (tmp_path / "run" / "models").iterdir() if "cs-ib" in (f / "model.json").read_text())
    assert load_regressor(str(folder), load_dataset("autompg")).module is not None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"defense": "trades"}, "trains classifiers; of regressors there are standard, cs-ib"),
        ({"defense": "cs-ibb"}, "Did you mean 'cs-ib'"),
        ({"defense": {"name": "cs-ib", "betta": 1}}, "Did you mean 'beta'"),
        ({"defense": "cs-ib", "network": "sklearn:ensemble.RandomForestRegressor"}, "is for networks"),
    ],
)
def test_wrong_entries_are_refused_before_anything_runs(tmp_path, suite, train, message):
    suite["models"] = [{"name": "m", "train": train}]
    with pytest.raises(ConfigError, match=message):
        run_suite(suite, tmp_path / "run")
