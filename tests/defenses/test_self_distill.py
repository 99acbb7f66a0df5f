"""Self-distillation: kernel ridge regression exactly, the weight of the labels, the loss of networks, chains in a suite."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from defenses import Batch, SelfDistill, Task
from defenses.self_distill import KernelDistillation, Teacher, best_alpha
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models import load_model
from robustbench_ext.suite import load_suite

# Published: eleven points of a noisy sine, a narrow kernel.
X = np.arange(11) / 10
Y = np.array(
    [0.384766, 1.233397, 1.332322, 0.692016, -0.297561, -0.241893, -0.796449, -0.961648, -0.496725, -0.346907, 0.558951]
)
GRID = np.arange(101) / 100
SINE = np.sin(2 * np.pi * GRID)
LAM = 0.2


def rbf(a, b):
    return np.exp(-80 * (a[:, None] - b[None]) ** 2)


@pytest.fixture
def sine():
    return KernelDistillation(rbf(X, X), LAM)


@pytest.mark.parametrize(
    ("alpha", "steps", "limit"),
    [
        (0.0, [0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
        # The published table heads this row 0.25.
        (0.35, [0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
        (0.25, [0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011], 0.15250),
    ],
)
def test_published_errors(sine, alpha, steps, limit):
    cross = rbf(GRID, X)
    found = ((sine.predict(cross, Y, alpha, 6) - SINE) ** 2).mean(axis=1)
    # Five decimals, and targets of six: half a unit of the fifth, and what 5e-7 in each target can add to a mean square of
    # residuals below 1, about 1e-6.
    np.testing.assert_allclose(found, steps, rtol=0, atol=6e-6)
    assert ((sine.limit(cross, Y, alpha) - SINE) ** 2).mean() == pytest.approx(limit, abs=6e-6)


def test_labels_alone_make_every_step_the_first(sine):
    every = sine.predict(rbf(GRID, X), Y, 1.0, 5)
    assert (every == every[0]).all()  # the very same targets


def test_the_limit_is_ridge_regression_with_a_larger_penalty_and_zero_without_labels(sine):
    cross = rbf(GRID, X)
    for alpha in (0.1, 0.35, 0.8):
        last = sine.predict(cross, Y, alpha, 400)[-1]  # eigenvalues of (1 - alpha) S are below 0.9: 0.9^400 < 1e-18
        ridge = KernelDistillation(sine.kernel, LAM / alpha).predict(cross, Y, 1.0, 1)[0]
        np.testing.assert_allclose(last, sine.limit(cross, Y, alpha), rtol=0, atol=1e-10)
        np.testing.assert_allclose(ridge, sine.limit(cross, Y, alpha), rtol=0, atol=1e-12)
    assert not sine.limit(cross, Y, 0.0).any()
    largest = np.linalg.eigvalsh(sine.smoother).max()
    assert largest < 0.91
    assert np.abs(sine.predict(cross, Y, 0.0, 400)[-1]).max() < 1e-12  # 0.91^400 < 1e-16, of targets below 2


def test_eigenvalues_of_the_smoother(sine):
    k = np.linalg.eigvalsh(sine.kernel)
    s = np.sort(np.linalg.eigvalsh(sine.smoother))
    np.testing.assert_allclose(s, k / (k + LAM), rtol=0, atol=1e-12)
    for alpha in (0.2, 0.6):
        np.testing.assert_allclose(alpha * s / (1 - (1 - alpha) * s), k / (k + LAM / alpha), rtol=0, atol=1e-12)


def test_without_labels_every_step_is_smaller(sine):
    norms = np.linalg.norm(sine.predict(sine.kernel, Y, 0.0, 30), axis=1)
    assert (np.diff(norms) < 0).all()


def test_the_best_alpha_is_that_of_a_fine_grid(sine):
    cross, grid = rbf(GRID, X), np.linspace(0, 1, 2001)
    errors = [((sine.predict(cross, Y, alpha, 2)[1] - SINE) ** 2).mean() for alpha in grid]
    best = sine.best_alpha(cross, Y, SINE, clip=False)
    # The error is a parabola in alpha, so the nearest point of the grid is the best one.
    nearest = grid[np.argmin(errors)] if 0 <= best <= 1 else np.clip(best, 0, 1)
    assert np.clip(best, 0, 1) == pytest.approx(nearest, abs=0.00025 + 1e-9)
    inside = 0.3 * SINE + 0.1  # targets whose best alpha lies inside: any of them will do
    errors = [((sine.predict(cross, Y, alpha, 2)[1] - inside) ** 2).mean() for alpha in grid]
    between = best_alpha(inside, *sine.predict(cross, Y, 0.0, 2)[::-1], clip=False)
    wanted = grid[np.argmin(errors)]
    assert np.clip(between, 0, 1) == pytest.approx(wanted, abs=0.00025 + 1e-9)


def test_best_alpha_recovers_the_mixture_and_is_clipped():
    rng = np.random.default_rng(0)
    f, g = rng.normal(size=(2, 40, 3))
    assert best_alpha(0.3 * f + 0.7 * g, g, f) == pytest.approx(0.3, abs=1e-12)
    assert best_alpha(1.5 * f - 0.5 * g, g, f, clip=False) == pytest.approx(1.5, abs=1e-12)
    assert best_alpha(1.5 * f - 0.5 * g, g, f) == 1.0
    assert best_alpha(-0.5 * f + 1.5 * g, g, f) == 0.0
    with pytest.raises(DataError, match="every alpha gives the same"):
        best_alpha(f, g, g)
    with pytest.raises(DataError, match="equal shapes"):
        best_alpha(f[:, 0], g, f)


@pytest.mark.parametrize(("kernel", "lam"), [(np.ones((2, 3)), 1.0), (np.array([[1.0, 0.5], [0.1, 1.0]]), 1.0)])
def test_what_is_no_kernel_is_refused(kernel, lam):
    with pytest.raises(DataError, match="symmetric"):
        KernelDistillation(kernel, lam)
    with pytest.raises(ConfigError, match="lam = 0"):
        KernelDistillation(np.eye(2), 0)


# Networks ------------------------------------------------------------------------------------------------------------


def linear(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()


@pytest.fixture
def batch():
    torch.manual_seed(0)
    x = torch.rand(12, 1, 8, 8, dtype=torch.float64)
    return Batch(x, torch.arange(12) % 4, x)


def test_the_loss_by_hand_and_alpha_is_the_weight_of_the_labels(batch):
    student, teacher = linear(0), linear(1)
    p, q = student(batch.x).softmax(1), teacher(batch.x).softmax(1)
    onehot = torch.eye(4, dtype=torch.float64)[batch.y]
    labels, taught = ((p - onehot) ** 2).mean(), ((p - q) ** 2).mean()
    state = Teacher(teacher)
    for alpha in (0.0, 0.3, 1.0):
        loss = SelfDistill(alpha=alpha).loss(student, batch, state)
        torch.testing.assert_close(loss.value, alpha * labels + (1 - alpha) * taught, rtol=1e-12, atol=0)
    assert loss.logs["labels"] == labels.detach() and loss.logs["teacher"] == taught.detach()
    # The first step: labels alone, whatever alpha.
    assert torch.equal(SelfDistill(alpha=0.3).loss(student, batch).value, F.mse_loss(p, onehot))
    soft = Batch(batch.x, batch.y, batch.x, targets=q.detach())
    assert torch.equal(SelfDistill().loss(student, soft).value, F.mse_loss(p, q))


def test_the_teacher_is_neither_trained_nor_written_down_and_moves_along(batch):
    student, teacher = linear(0), linear(1).train()
    state = Teacher(teacher)
    assert not list(state.parameters()) and not state.state_dict()
    assert not teacher.training
    SelfDistill(alpha=0.5).loss(student, batch, state).value.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    state.float()
    assert next(teacher.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"), [({"alpha": 1.5}, "alpha = 1.5"), ({"alpha": "half"}, "alpha"), ({"alpha": -0.1}, "share")]
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        SelfDistill(**options)


def test_a_teacher_that_is_not_there(batch):
    task = Task(np.ones(4, dtype=int), (1, 8, 8), 1)
    with pytest.raises(ConfigError, match="no folder of a trained model"):
        SelfDistill(teacher="runs/nowhere").state(linear(0), task)


def test_the_key_holds_the_teacher_and_no_alpha_that_changes_nothing(tmp_path):
    folder = tmp_path / "k1"
    before = SelfDistill(teacher=str(folder)).spec()
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps({"key": "k1"}))
    assert SelfDistill(teacher=str(folder)).spec() == before  # named by its key before it is there
    assert before["teacher"] == "k1"
    other = folder.rename(tmp_path / "mine")  # as `rbx train --out` may call it
    assert SelfDistill(teacher=str(other)).spec() == before
    assert SelfDistill(alpha=0.2).spec() == SelfDistill(alpha=0.9).spec()
    assert SelfDistill(alpha=0.2, teacher="a").spec() != SelfDistill(alpha=0.9, teacher="a").spec()


@pytest.fixture
def chain(tiny_suite):
    quick = {"epochs": 1, "eps": 0.1, "validation_n": 20, "validation_steps": 1, "energy_n": 0}

    def step(**options):
        return {"defense": {"name": "self-distill", **options}, "seeds": 2, "recipe": quick}

    tiny_suite["models"] = [
        {"name": "step 1", "train": step()},
        {"name": "step 2", "train": step(alpha=0.4, teacher="step 1")},
    ]
    tiny_suite["conditions"], tiny_suite["detectors"], tiny_suite["uq"] = [{"attack": "fgsm", "eps": 0.1}], [], []
    return {**tiny_suite, "n": 40}


def test_a_chain_in_a_suite(tmp_path, chain):
    suite = load_suite(chain)
    assert [m.needs for m in suite.models] == [(), (), ("step 1 seed 0",), ("step 1 seed 1",)]
    summary = run_suite(suite, tmp_path / "run")
    assert not summary.failures and summary.trained == 4
    for name in ("step 1", "step 2"):  # every step is reported like any model
        assert [r.n for r in summary.results.replicates if r.model == name and r.metric == "ece"] == [2, 2]
        assert [r.n for r in summary.results.find(model=f"{name} seed 0", metric="robust_accuracy", group=None)][
            0
        ] == 40
    told = {m["name"]: m["training"] for m in summary.results.models}
    folders = {f.name: json.loads((f / "model.json").read_text()) for f in (tmp_path / "run" / "models").iterdir()}
    for seed in (0, 1):  # each has the teacher of its own seed
        teacher = folders[told[f"step 2 seed {seed}"]["defense"]["teacher"]]
        assert (teacher["seed"], teacher["defense"]["teacher"]) == (seed, None)
    row = told["step 2 seed 0"]["curve"][0]
    assert row["loss"] == pytest.approx(0.4 * row["labels"] + 0.6 * row["teacher"], rel=1e-6)
    again = run_suite(suite, tmp_path / "run")
    assert (again.trained, again.computed) == (0, 0)
    # Another first step is another teacher: what stands on it is trained anew.
    chain["models"][0]["train"]["recipe"] = {**chain["models"][0]["train"]["recipe"], "lr": 0.05}
    assert run_suite(chain, tmp_path / "run").trained == 4


def test_a_teacher_must_come_before(chain):
    chain["models"].reverse()
    with pytest.raises(ConfigError, match="write 'step 1.*before it|Did you mean"):
        load_suite(chain)


def test_interrupted_distillation_ends_at_the_same_weights(tmp_path, digits):
    from defenses.trainer import Architecture, Recipe, train

    recipe = Recipe(epochs=2, eps=0.1, validation_n=20, validation_steps=1, energy_n=0, batch_size=200)
    network = Architecture("small-cnn", digits.shape, 10)
    teacher = train(SelfDistill(), network, digits, recipe, tmp_path / "teacher")
    student = SelfDistill(alpha=0.4, teacher=str(teacher))
    whole = train(student, network, digits, recipe, tmp_path / "whole")

    def stop(epoch, batch, batches):
        if (epoch, batch) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(student, network, digits, recipe, tmp_path / "cut", on_batch=stop, checkpoint_seconds=0)
    train(student, network, digits, recipe, tmp_path / "cut")
    states = [load_model(str(folder)).module.state_dict() for folder in (whole, tmp_path / "cut", teacher)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["fc1.weight"], states[2]["fc1.weight"])
