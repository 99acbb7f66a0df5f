"""Models of scores alone: what they say, what they are spared, and that nobody takes that for robustness."""

import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.svm import LinearSVC
from torch import nn
from typer.testing import CliRunner

from robustbench_ext.attacks import Square
from robustbench_ext.cli.main import app
from robustbench_ext.data import ArraySplit, Dataset
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.evaluate import Context
from robustbench_ext.models import load_model
from robustbench_ext.models.black_box import BlackBox, is_black_box, log_probabilities
from robustbench_ext.models.inference import Inference
from robustbench_ext.plan import plan
from robustbench_ext.preflight import preflight, verdict
from robustbench_ext.suite import validate_suite

FOREST = "sklearn:ensemble.RandomForestClassifier"
FEW = {"n_estimators": 8, "max_depth": 8}
SUITE = {
    "schema": 1,
    "name": "blind",
    "data": "digits",
    "n": 40,
    "models": [{"name": "forest", "spec": FOREST, "kwargs": FEW}, {"name": "net", "spec": "small-cnn"}],
    "conditions": [
        {"attack": "pgd", "eps": 0.1, "steps": 2},
        {"attack": "standard", "eps": 0.1, "steps": 2, "targets": 1, "queries": 3},
        {"attack": "audited", "eps": 0.1, "steps": 2, "targets": 1, "queries": 3, "screen_steps": 1},
        {"attack": "adaptive", "eps": 0.1, "steps": 2, "against": "msp"},
        {"attack": "square", "eps": 0.1, "queries": 30},
        {"attack": "random-noise", "eps": 0.1, "draws": 1},
        {"corruption": "gaussian-noise", "severity": 3},
        {"outliers": "uniform-noise", "n": 20},
    ],
    "detectors": ["msp", "mahalanobis", "odin", {"name": "energy", "reading": "delta", "label": "delta"}],
    "uq": ["temperature"],
}
LEFT_OUT = ("pgd Linf 0.1", "standard Linf 0.1", "audited Linf 0.1", "adaptive Linf 0.1 against msp")


# Scores ----------------------------------------------------------------------------------------------------------------


def test_scikit_learn_is_fitted_to_the_train_split_and_says_what_it_would(digits):
    loaded = load_model(FOREST, shape=digits.shape, kwargs=FEW, data=digits)
    assert is_black_box(loaded.module)
    train, test = digits["train"], digits["test"]
    theirs = RandomForestClassifier(**FEW, random_state=0, n_jobs=1)
    theirs.fit(train.images(slice(None)).flatten(1).double().numpy(), train.labels)
    x = test.images(slice(0, 50))
    p = theirs.predict_proba(x.flatten(1).double().numpy())
    assert torch.allclose(loaded.module(x), torch.from_numpy(np.log(np.maximum(p, 1e-6))).float(), atol=1e-6)
    again, other = (load_model(FOREST, shape=digits.shape, kwargs=FEW, data=digits, seed=s) for s in (0, 1))
    assert again.fingerprint == loaded.fingerprint != other.fingerprint
    assert any("fitted to the 1078 samples" in note for note in loaded.notes)


def test_classifiers_without_probabilities_give_their_decision_function(digits):
    loaded = load_model("sklearn:svm.LinearSVC", shape=digits.shape, data=digits)
    x = digits["test"].images(slice(0, 40))
    train = digits["train"]
    theirs = LinearSVC(random_state=0).fit(train.images(slice(None)).flatten(1).double().numpy(), train.labels)
    expected = theirs.decision_function(x.flatten(1).double().numpy())
    assert torch.allclose(loaded.module(x), torch.from_numpy(expected).float(), atol=1e-5)
    two = np.flatnonzero(train.labels < 2)[:60]
    split = ArraySplit(train.images(two), train.labels[two], train.ids[two])
    binary = Dataset("two", {"train": split, "test": split}, ("0", "1"), digits.shape)
    logits = load_model("sklearn:svm.LinearSVC", shape=digits.shape, num_classes=2, data=binary).module(
        split.images(slice(None))
    )
    assert torch.equal(logits[:, 0], -logits[:, 1]) and float((logits.argmax(1).numpy() == split.labels).mean()) > 0.9
    # A class that the train split lacks has probability 0, and its column is there.
    three = Dataset("three", {"train": split, "test": split}, ("0", "1", "2"), digits.shape)
    forest = load_model(FOREST, shape=digits.shape, num_classes=3, kwargs=FEW, data=three).module(
        split.images(slice(0, 5))
    )
    assert forest.shape == (5, 3) and torch.allclose(forest[:, 2], torch.tensor(1e-6).log())
    with pytest.raises(ModelError, match="holds 2 of 3 classes"):
        load_model("sklearn:svm.LinearSVC", shape=digits.shape, num_classes=3, data=three)


@pytest.mark.parametrize(
    ("spec", "kwargs", "message"),
    [
        ("sklearn:ensemble.RandomForestClasifier", {}, "Did you mean 'ensemble.RandomForestClassifier'"),
        ("sklearn:ensemble.RandomForestRegressor", {}, "classifier of scikit-learn"),
        ("sklearn:os.PathLike", {}, "unknown classifier of scikit-learn"),
        (FOREST, {"trees": 3}, "unknown parameter 'trees'"),
        (FOREST, {"n_estimators": -1}, "fitting failed"),
        (FOREST, {"resize": 16}, "leave out resize"),
    ],
)
def test_names_of_classifiers(digits, spec, kwargs, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec, shape=digits.shape, kwargs=kwargs, data=digits)


def test_a_fit_needs_data():
    with pytest.raises(ModelError, match="train split"):
        load_model(FOREST)


OBJECT = """
import numpy as np
class Mean:
    def __init__(self, sharp=1.0, wrong=False):
        self.sharp, self.wrong = sharp, wrong
    def predict_proba(self, x):
        assert x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1
        shape, z = x.shape, self.sharp * x.reshape(len(x), -1)[:, :4].astype(float)
        x[:] = 7  # what works in place must not reach the inputs
        p = np.exp(z) * (1 if not self.wrong else 2)
        p = p / p.sum(1, keepdims=True)
        return p * 3 if self.wrong else p[:, ::-1] if len(shape) == 4 else p
ready = Mean()
"""


def test_anything_with_predict_proba(tmp_path):
    (tmp_path / "mean.py").write_text(OBJECT)
    spec = f"predict_proba:{tmp_path / 'mean.py'}"
    x = torch.rand(6, 1, 2, 2)
    kept = x.clone()
    flat = load_model(f"{spec}:Mean", shape=(1, 2, 2))
    assert torch.allclose(flat.module(x), x.flatten(1).log_softmax(1), atol=1e-6) and torch.equal(x, kept)
    images = load_model(f"{spec}:Mean#inputs=images", shape=(1, 2, 2))
    assert torch.allclose(images.module(x), x.flatten(1).log_softmax(1).flip(1), atol=1e-6)
    sharp = load_model(f"{spec}:Mean#sharp=3", shape=(1, 2, 2))  # the same code, other state
    assert len({m.fingerprint for m in (flat, images, sharp)}) == 3
    assert load_model(f"{spec}:Mean", shape=(1, 2, 2)).fingerprint == flat.fingerprint
    assert torch.equal(load_model(f"{spec}:ready", shape=(1, 2, 2)).module(x), flat.module(x))
    with pytest.raises(ModelError, match="no probabilities"):
        load_model(f"{spec}:Mean#wrong=true", shape=(1, 2, 2))
    with pytest.raises(ModelError, match="expected an object with a method predict_proba"):
        load_model("predict_proba:json:JSONDecoder")
    with pytest.raises(ConfigError, match="inputs = 'rows'"):
        load_model(f"{spec}:Mean#inputs=rows", shape=(1, 2, 2))


def test_log_probabilities():
    p = np.array([[1.0, 0.0], [0.25, 0.75]])
    assert np.allclose(log_probabilities(p, 2, "it"), np.log([[1.0, 1e-6], [0.25, 0.75]]))
    for wrong in (p[:1], p[0], p[:, :1], 2 * p, np.full((2, 2), np.nan), np.array([[1.5, -0.5]] * 2)):
        with pytest.raises(ModelError, match="predict_proba gave"):
            log_probabilities(wrong, 2, "it")


# What they are spared --------------------------------------------------------------------------------------------------


class Constant(BlackBox):
    """The same for every input, until an input's first pixel is black."""

    def scores(self, x):
        z = np.zeros((len(x), 2))
        z[:, 0] = 2
        z[x[:, 0, 0, 0] <= 0.05] = (0, 2)
        return z


def test_no_fused_copy_is_made_of_what_a_trace_cannot_see():
    """A trace would record one batch's scores as constants, and agree with a model that says the same of all of them."""
    model = Constant("constant")
    x = torch.full((2, 1, 4, 4), 0.2)
    assert not Inference(model, x).fused
    result = Square(eps=0.2, queries=600)(model, x, torch.zeros(2, dtype=torch.int64))
    assert result.broken.all()


def test_the_preflight_says_what_no_gradients_mean(digits):
    loaded = load_model(FOREST, shape=digits.shape, kwargs=FEW, data=digits)
    checks = {c.name: c for c in preflight(loaded.module, digits["test"])}
    assert checks["gradients"].status == "doubt" and "bound its robustness from above only" in checks["gradients"].hint
    assert checks["eps = 0"].status == "pass"
    assert not {"layers", "huge budget"} & set(checks)
    assert verdict(checks.values()) == "doubt"
    assert "msp" in checks["logits"].hint
    # The same without the word is a defect, as before.
    honest = preflight(_Detached(loaded.module), digits["test"])
    assert {c.name: c.status for c in honest}["gradients"] == "fail"


class _Detached(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.call = inner.forward

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("change", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.Linear(7, 7)])
def test_a_model_of_another_shape_fails_the_forward_pass(digits, change):
    checks = {c.name: c for c in preflight(nn.Sequential(change(), nn.Flatten()), digits["test"])}
    assert checks["forward pass"].status == "fail" and "in-place changes" not in checks
    assert "(N, 1, 8, 8)" in checks["forward pass"].hint and "#channels=3" in checks["forward pass"].hint


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blind")
    return folder, run_suite(SUITE, folder)


def test_what_needs_gradients_or_features_is_left_out_with_a_note(blind):
    _, done = blind
    assert not done.failures
    results = done.results
    mine = {row.condition for row in results.find(model="forest")}
    theirs = {row.condition for row in results.find(model="net")}
    assert set(LEFT_OUT) <= theirs and not set(LEFT_OUT) & mine
    assert {"square Linf 0.1", "random-noise Linf 0.1", "gaussian-noise 3", "uniform-noise"} <= {
        m.removeprefix("outliers ") for m in mine
    }
    probes = {row.probe for row in results.find(model="forest")}
    assert {"msp", "temperature"} <= probes and not {"mahalanobis", "odin", "delta"} & probes
    (note,) = (n for n in results.notes if n.startswith("forest gives scores alone"))
    assert all(label in note for label in (*LEFT_OUT, "mahalanobis", "odin", "delta"))
    assert "square alone is no verdict of the ensemble: name the attack square" in note
    assert "Attacks that remain: square Linf 0.1, random-noise Linf 0.1" in note
    assert not any(n.startswith("net ") for n in results.notes)


def test_a_worst_case_over_what_remains_is_not_given(blind):
    """Next to a network's worst case over all attacks, one over the weakest would look like robustness."""
    results = blind[1].results
    (row,) = results.find(model="forest", condition="worst case Linf 0.1", metric="robust_accuracy", group=None)
    assert row.value is None and "pgd Linf 0.1" in row.reason
    (row,) = results.find(model="net", condition="worst case Linf 0.1", metric="robust_accuracy", group=None)
    assert row.value is not None
    labels = [c["label"] for c in results.conditions]
    assert len(labels) == len(set(labels))
    (square,) = results.find(model="forest", condition="square Linf 0.1", metric="robust_accuracy", group=None)
    assert (
        square.value is not None
        and square.value < results.find(model="forest", metric="accuracy", condition="clean")[0].value
    )


def test_a_second_run_computes_nothing(blind):
    again = run_suite(SUITE, blind[0])
    assert again.computed == 0 and not again.failures


def test_a_plan_counts_what_will_run(tmp_path):
    cells = plan(Context(validate_suite(SUITE), tmp_path))
    assert not {c.condition for c in cells if c.model == "forest"} & set(LEFT_OUT)
    assert set(LEFT_OUT) <= {c.condition for c in cells if c.model == "net"}


def test_a_test_that_asks_for_a_gradient_attack_does_not_go_on_without_it(tmp_path):
    from robustbench_ext.gate.run import MODEL, measure

    suite = {**SUITE, "models": [{**SUITE["models"][0], "name": MODEL}], "detectors": [], "uq": []}
    with pytest.raises(ConfigError, match="pgd Linf 0.1 .follows gradients.*Attacks that remain: square"):
        measure(Context(validate_suite({**suite, "conditions": [SUITE["conditions"][i] for i in (0, 4)]}), tmp_path))
    done = measure(Context(validate_suite({**suite, "conditions": SUITE["conditions"][4:5]}), tmp_path))
    assert done.results.find(condition="square Linf 0.1", metric="robust_accuracy")


def test_a_suite_of_gradient_attacks_says_that_none_remains(tmp_path):
    suite = {**SUITE, "models": SUITE["models"][:1], "conditions": SUITE["conditions"][:1], "detectors": [], "uq": []}
    done = run_suite(suite, tmp_path)
    assert not done.failures
    assert any("No attack remains" in n and "square, random-noise, spatial" in n for n in done.results.notes)


def test_a_network_without_a_linear_layer_keeps_the_rest_of_the_suite(tmp_path):
    """`penultimate` features are the inputs of a linear layer: where there is none, detectors on them go, others stay."""
    (tmp_path / "conv.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Conv2d(1, 10, 8), torch.nn.Flatten())\n"
    )
    suite = {
        **SUITE,
        "models": [{"name": "conv", "spec": f"{tmp_path / 'conv.py'}:build"}],
        "conditions": SUITE["conditions"][:1],
    }
    done = run_suite({**suite, "detectors": ["msp", "mahalanobis"]}, tmp_path / "run")
    assert not done.failures
    assert done.results.find(condition="pgd Linf 0.1", metric="robust_accuracy")
    assert any("no last linear layer" in n and "mahalanobis" in n for n in done.results.notes)


def test_check_from_the_shell():
    done = CliRunner().invoke(app, ["check", "--model", FOREST, "--data", "digits", "--n", "32", "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said["verdict"] == "doubt"
    assert any("no gradients" in note for note in said["notes"])
