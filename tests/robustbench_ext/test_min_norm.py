"""Minimum-norm attacks: closed forms, verdicts, torchattacks' own, the curve that one run gives."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from reports import figures, tables
from reports.html import render_html
from reports.markdown import render_markdown
from robustbench_ext.attacks import CW, DDN, FMN, PGD, DeepFool, build_attack
from robustbench_ext.attacks.threat import flat_norm
from robustbench_ext.conditions import parse_conditions
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError
from robustbench_ext.metrics.distance import median_distance, robust_accuracy_curve
from robustbench_ext.results import RunResults

QUICK = [
    DeepFool(),
    DeepFool(norm="Linf"),
    CW(steps=30, rounds=3, step_size=0.1),
    DDN(steps=40),
    FMN(steps=40),
    FMN(norm="Linf", steps=40),
]


def label(attack):
    return f"{attack.name}-{attack.norm}"


def distances(result):
    """The norms of what was broken; infinite elsewhere. Clean errors are left out."""
    mine = (result.norms > 0) | ~result.broken
    return torch.where(result.reached, result.norms, torch.inf)[mine]


class Watch(nn.Module):
    """Remembers what the model was shown and said."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, z):
        logits = self.inner(z)
        self.seen.append((z.detach().clone(), logits.detach().clone()))
        return logits


@pytest.mark.parametrize(
    ("attack", "classes", "slack"),
    [
        (DeepFool(overshoot=1e-3), 5, 2e-3),
        (DeepFool(norm="Linf", overshoot=1e-3), 5, 2e-3),
        # The others follow the gradient to a boundary near by, which with more than one need not be the nearest.
        (CW(steps=100, rounds=6, step_size=0.01), 2, 0.04),
        (DDN(steps=100), 2, 0.02),
        (FMN(steps=100), 2, 1e-3),
        (FMN(norm="Linf", steps=100), 2, 1e-3),
    ],
    ids=lambda v: "" if isinstance(v, (int, float)) else label(v),
)
def test_linear_classifiers_have_known_distances(attack, classes, slack):
    """To the boundary with class k it is |w.x + b| / ||w||_q, w the difference of weights, where no pixel meets the box."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    x = 0.35 + 0.3 * torch.rand(120, 1, 8, 8)
    with torch.no_grad():
        logits = model(x)
        y = logits.argmax(1)
        gaps = logits.gather(1, y[:, None]) - logits
        w = model[1].weight[y][:, None] - model[1].weight[None]
        size = w.norm(dim=2) if attack.norm == "L2" else w.abs().sum(dim=2)
        exact = (gaps / size).scatter(1, y[:, None], torch.inf).amin(dim=1)
    far = exact > (0.1 if attack.norm == "L2" else 0.01)  # a step is small against the way
    result = attack(model, x[far], y[far])
    assert result.broken.all()
    ratio = result.norms / exact[far]
    assert float(ratio.min()) >= 1 - 1e-4
    assert float(ratio.max()) <= 1 + slack


@pytest.mark.parametrize("attack", QUICK, ids=label)
def test_what_comes_back_is_misclassified_and_the_smallest_that_was_seen(attack, digits_model, digits_test):
    x, y, ids = (v[:6] for v in digits_test)
    for i in range(len(x)):
        model = Watch(digits_model)
        result = attack(model, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1])
        seen, logits = (torch.cat(parts) for parts in zip(*model.seen, strict=True))
        wrong = logits.argmax(1) != y[i]
        assert wrong.any()
        smallest = flat_norm(seen - x[i], attack.norm)[wrong].min()
        assert float(result.norms) == pytest.approx(float(smallest), abs=1e-6)
        with torch.no_grad():
            assert int(digits_model(result.x_adv).argmax(1)) != int(y[i])


@pytest.mark.parametrize("attack", QUICK, ids=label)
def test_neither_chance_nor_the_batch_matters(attack, digits_model, digits_test):
    x, y, ids = (v[:24] for v in digits_test)
    whole, again = (attack(digits_model, x, y, ids=ids) for _ in range(2))
    assert torch.equal(whole.x_adv, again.x_adv)
    parts = attack(digits_model, x, y, ids=ids, batch_size=5)
    assert torch.equal(parts.broken, whole.broken)
    # Rounding differs between batch sizes, and a path near a boundary follows it: nearly all distances agree.
    close = (parts.norms - whole.norms).abs() <= 0.02 * whole.norms
    assert int(close.sum()) >= len(x) - 2


def test_more_effort_never_gives_a_larger_perturbation(digits_model, digits_test):
    x, y, ids = (v[:24] for v in digits_test)
    for few, many in (
        (CW(steps=40, rounds=2, step_size=0.1), CW(steps=40, rounds=4, step_size=0.1)),
        (DeepFool(steps=2), DeepFool(steps=10)),
    ):
        before, after = (attack(digits_model, x, y, ids=ids) for attack in (few, many))
        assert not (before.reached & ~after.reached).any()
        assert (after.norms <= before.norms + 1e-6)[before.reached].all(), few.name
    # The schedules of these two depend on the number of steps, so it holds on the whole and not sample by sample.
    for attack in (DDN, FMN):
        medians = [distances(attack(steps=s)(digits_model, x, y, ids=ids)).median() for s in (10, 30, 90)]
        assert medians[0] >= 0.99 * medians[1] >= 0.98 * medians[2], attack.name


def test_a_budget_only_counts_what_is_within(digits_model, digits_test):
    x, y, ids = (v[:30] for v in digits_test)
    free = DDN(steps=40)(digits_model, x, y, ids=ids)
    eps = float(free.norms[free.norms > 0].median())
    for stop in ("never", "broken"):
        bound = DDN(steps=40, eps=eps, stop=stop)(digits_model, x, y, ids=ids)
        assert torch.equal(bound.broken, free.norms <= eps)
        assert float(bound.norms.max()) <= eps + 1e-6
        if stop == "broken":
            assert int(bound.forwards.sum()) < int(free.forwards.sum())


def test_no_weaker_than_torchattacks(mnist_model, mnist_test):
    """Median L2 distances: DeepFool and C&W at most 5 % above torchattacks', DDN and FMN at most 10 % above our C&W's."""
    torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks")
    x, y, ids = (v[:10] for v in mnist_test)

    def theirs(attack):
        x_adv = attack(x, y)
        with torch.no_grad():
            broken = mnist_model(x_adv).argmax(1) != y
        size = torch.where(broken, flat_norm(x_adv - x, "L2"), torch.inf)
        with torch.no_grad():
            return float(size[mnist_model(x).argmax(1) == y].median())

    ours = {
        attack.name: float(distances(attack(mnist_model, x, y, ids=ids)).median())
        for attack in (DeepFool(steps=6), CW(steps=100, rounds=4, step_size=0.1), DDN(), FMN())
    }
    assert ours["deepfool"] <= 1.05 * theirs(torchattacks.DeepFool(mnist_model, steps=6))
    assert ours["cw"] <= 1.05 * theirs(torchattacks.CW(mnist_model, c=10, steps=100, lr=0.1))
    assert ours["ddn"] <= 1.1 * ours["cw"]
    assert ours["fmn"] <= 1.1 * ours["cw"]
    assert ours["ddn"] <= ours["deepfool"]


def test_confidence_is_kept(digits_model, digits_test):
    x, y, ids = (v[:10] for v in digits_test)
    sure = CW(steps=60, rounds=3, step_size=0.1, kappa=1.0)(digits_model, x, y, ids=ids)
    rest = sure.logits.scatter(1, y[:, None], -torch.inf).amax(1) - sure.logits.gather(1, y[:, None])[:, 0]
    hit = sure.reached & (sure.norms > 0)
    assert hit.any()
    assert float(rest[hit].min()) >= 1.0 - 1e-4
    plain = CW(steps=60, rounds=3, step_size=0.1)(digits_model, x, y, ids=ids)
    assert float(plain.norms[hit].mean()) < float(sure.norms[hit].mean())


def test_a_run_without_a_budget_agrees_with_pgd_at_every_budget(mnist_model, mnist_test):
    x, y, ids = (v[:60] for v in mnist_test)
    for norm, budgets in (("Linf", (0.06, 0.1)), ("L2", (0.8, 1.3))):
        found = FMN(norm=norm)(mnist_model, x, y, ids=ids)
        size = torch.where(found.broken, found.norms, torch.inf)
        for eps in budgets:
            robust = int((~PGD(norm=norm, eps=eps, steps=20)(mnist_model, x, y, ids=ids).broken).sum())
            assert int((size > eps).sum()) <= robust + 2, (norm, eps)


@pytest.mark.parametrize("attack", ["deepfool", "cw", "ddn", "fmn"])
def test_targets_are_reached(attack, digits_model, digits_test):
    x, y, ids = (v[:30] for v in digits_test)
    options = {"cw": {"steps": 60, "rounds": 3, "step_size": 0.1}}.get(attack, {})
    result = build_attack(attack, target=3, **options)(digits_model, x, y, ids=ids)
    with torch.no_grad():
        found, clean = (digits_model(z).argmax(1) for z in (result.x_adv, x))
    todo = (clean == y) & (y != 3)
    assert float(result.reached[todo].float().mean()) > 0.9
    assert torch.equal(found[result.reached & todo], torch.full_like(y, 3)[result.reached & todo])
    assert torch.equal(result.x_adv[y == 3], x[y == 3])
    assert torch.equal(result.broken, found != y)
    plain = build_attack(attack, **options)(digits_model, x, y, ids=ids)
    assert float(plain.norms[todo].mean()) < float(result.norms[todo].mean())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddn", {"norm": "Linf"}, "norm 'Linf'"),
        ("cw", {"rounds": 0}, "at least 1"),
        ("cw", {"kappa": -1}, "kappa >= 0"),
        ("fmn", {"gamma": 2}, "gamma < 1"),
        ("ddn", {"radius": 0}, "radius > 0"),
        ("deepfool", {"candidates": 0}, "at least 1"),
        ("deepfool", {"target": "nearest"}, "target = 'nearest'"),
    ],
)
def test_wrong_parameters_are_explained(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_attack(name, **options)


def test_conditions_without_a_budget_are_json():
    free, bound = parse_conditions([{"attack": "ddn"}, {"attack": "ddn", "eps": 1}])[1:]
    assert (free.label, bound.label) == ("ddn L2", "ddn L2 1")
    assert free.facts()["eps"] is None
    assert free.facts()["minimum_norm"]
    assert not bound.facts()["minimum_norm"]
    json.dumps(free.spec(), allow_nan=False)


# Metrics ------------------------------------------------------------------------------------------------------------


def test_curve_and_median_golden_values():
    found = np.array([0.0, 1.0, 2.0, 4.0, np.inf])
    curve = robust_accuracy_curve(found)
    assert curve["eps"][[0, -1]].tolist() == [0.0, 4.0]
    assert curve["value"][[0, -1]].tolist() == [0.8, 0.2]
    assert curve["value"][25] == 0.4  # eps = 2: a sample at 2 is broken within it
    half = math.sqrt(math.log(40) / 10)
    assert curve["high"][-1] == pytest.approx(0.2 + half)
    assert curve["low"][0] == pytest.approx(max(0.0, 0.8 - half))
    assert robust_accuracy_curve(np.array([0.0, np.inf])) == {}
    assert median_distance(np.arange(1.0, 6.0)).value == 3.0
    assert "too few" in median_distance(np.arange(1.0, 6.0)).reason
    ten = median_distance(np.arange(1.0, 11.0))
    assert (ten.value, ten.ci_low, ten.ci_high) == (5.5, 2.0, 9.0)  # P(B < 2) = 0.011, P(B < 3) = 0.055
    never = median_distance(np.array([1.0, 2.0, np.inf, np.inf]))
    assert math.isnan(never.value)
    assert "never broke 2 of 4" in never.reason
    half_open = median_distance(np.array([*range(1, 13), *[np.inf] * 8], dtype=float))
    assert half_open.value == 10.5
    assert math.isnan(half_open.ci_high)
    assert "no upper end" in half_open.reason
    assert math.isnan(median_distance(np.zeros(0)).value)


def test_band_and_interval_hold_as_often_as_they_say():
    rng = np.random.default_rng(0)
    inside = covered = 0
    for _ in range(400):
        sample = rng.exponential(size=60)
        curve = robust_accuracy_curve(sample)
        truth = np.exp(-curve["eps"])
        inside += bool(((curve["low"] <= truth) & (truth <= curve["high"])).all())
        estimate = median_distance(sample)
        covered += estimate.ci_low <= math.log(2) <= estimate.ci_high
    assert inside >= 0.95 * 400 - 9  # two standard errors
    assert covered >= 0.95 * 400 - 9


# A whole run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_distances(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distances")
    suite = {
        "schema": 1,
        "name": "distances",
        "data": "digits",
        "n": 60,
        "models": [{"name": "plain", "train": {"defense": "standard", "recipe": {"epochs": 6, "validation_n": 50}}}],
        "conditions": [
            {"attack": "ddn", "steps": 30},
            {"attack": "fmn", "norm": "Linf", "steps": 30},
            {"attack": "ddn", "steps": 30, "target": 3, "label": "to three"},
            {"attack": "pgd", "norm": "L2", "eps": 0.5, "steps": 10, "target": "least-likely"},
            {"attack": "pgd", "norm": "L2", "eps": 0.5, "steps": 10, "label": "pgd"},
            {"attack": "spatial", "tries": 4},
        ],
        "uq": ["temperature"],
    }
    run_suite(suite, folder)
    return folder


def test_a_run_says_the_distance_and_the_curve(finished_distances):
    results = RunResults.read(finished_distances / "results.json")
    assert not results.failures
    rows = results.find(condition="ddn L2")
    assert {r.metric for r in rows} == {"median_norm", "mean_norm"}  # neither accuracy nor calibration without a budget
    median = results.find(condition="ddn L2", metric="median_norm")[0]
    assert 0 < median.ci_low <= median.value <= median.ci_high
    (curve,) = [c for c in results.curves if c.kind == "robust-accuracy" and c.condition == "ddn L2"]
    assert {len(v) for v in curve.data.values()} == {51}
    assert curve.data["value"] == sorted(curve.data["value"], reverse=True)
    clean = results.find(condition="clean", metric="accuracy", probe="classifier", group=None)[0]
    assert curve.data["value"][0] == pytest.approx(clean.value)
    assert all(lo <= v <= hi for lo, v, hi in zip(*(curve.data[k] for k in ("low", "value", "high")), strict=True))
    pgd = results.find(condition="pgd", metric="robust_accuracy", group=None)[0]
    at = np.interp(0.5, curve.data["eps"], curve.data["value"])
    assert at <= pgd.value + 0.05
    # To a target it is farther, and the curve of robust accuracy is not the target's to draw.
    assert results.find(condition="to three", metric="median_norm")[0].value > median.value
    assert not [c for c in results.curves if c.condition == "to three"]


def test_a_run_says_how_often_targets_were_reached(finished_distances):
    results = RunResults.read(finished_distances / "results.json")
    assert {r.condition for r in results.find(metric="targeted_success")} == {"to three", "pgd L2 0.5"}
    three = results.find(condition="to three", metric="targeted_success")[0]
    clean = results.find(condition="clean", metric="accuracy", probe="classifier", group=None)[0]
    assert three.n < round(clean.value * clean.n)  # without the threes
    assert three.value > 0.9
    assert three.ci_method == "Wilson"
    # The targeted attack counts as an attack: what it breaks is broken.
    assert "worst case L2 0.5" in {c["label"] for c in results.conditions}
    spatial = results.find(condition="spatial", metric="robust_accuracy", group=None)[0]
    assert spatial.value is not None
    assert spatial.value < clean.value


def test_reports_show_the_curve(finished_distances):
    results = RunResults.read(finished_distances / "results.json")
    html = render_html(results, None, [])
    assert "Distance to the nearest mistake" in html
    assert "Targets reached" in html
    markdown = render_markdown(results)
    assert "## Distances" in markdown
    assert "| plain · ddn L2 |" in markdown
    assert "| ddn L2 |" not in markdown  # no verdict without a budget
    assert "| spatial |" in markdown
    titles = [column.title for column in tables.headline(results).columns]
    assert titles[:2] == ["clean accuracy, % ↑", "robust L2 0.5, % ↑"]
    curves = [c for c in results.curves if c.kind == "robust-accuracy"]
    axes = figures.distance_curves(curves, "L2")
    assert len(axes.lines) == 2
    only = results.model_copy(
        update={"conditions": [c for c in results.conditions if c["label"] in ("clean", "ddn L2")]}
    )
    assert len(tables.headline(only).columns) == 2  # clean accuracy and ECE
