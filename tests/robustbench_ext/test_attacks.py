"""Every attack: in the ball, in the box, identity at 0, deterministic, model untouched; ours against torchattacks'."""

import numpy as np
import pytest
import torch
from torch import nn

from robustbench_ext.attacks import APGDCE, APGDT, FABT, FGSM, PGD, Attack, Square, Standard, build_attack
from robustbench_ext.attacks.apgd import checkpoints
from robustbench_ext.attacks.losses import margin
from robustbench_ext.attacks.threat import Threat, flat_norm
from robustbench_ext.errors import ConfigError, DataError, ModelError, ThreatModelError
from robustbench_ext.randomness import SampleRandom

torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks")

ATTACKS = [
    pytest.param("fgsm", {}, id="fgsm"),
    pytest.param("pgd", {"steps": 7, "restarts": 2}, id="pgd"),
    pytest.param("pgd", {"steps": 7, "loss": "margin", "random_start": False}, id="pgd-margin"),
    pytest.param("mi-fgsm", {"steps": 7}, id="mi-fgsm"),
    pytest.param("random-noise", {"tries": 150}, id="random-noise"),
    pytest.param("apgd-ce", {"steps": 12, "restarts": 2}, id="apgd-ce"),
    pytest.param("apgd-dlr", {"steps": 12}, id="apgd-dlr"),
    pytest.param("apgd-t", {"steps": 6, "targets": 3}, id="apgd-t"),
    pytest.param("fab-t", {"steps": 12, "targets": 3}, id="fab-t"),
    pytest.param("square", {"queries": 150}, id="square"),
    pytest.param("standard", {"steps": 5, "targets": 2, "queries": 50}, id="standard"),
    pytest.param("torchattacks:PGD", {"options": {"steps": 5, "alpha": 0.05}}, id="torchattacks"),
]
BUDGETS = [("Linf", 0.15), ("L2", 1.0)]


def make(name, norm, eps, options, **more):
    if name == "torchattacks:PGD" and norm == "L2":
        name = "torchattacks:PGDL2"
    return build_attack(name, norm=norm, eps=eps, **options, **more)


@pytest.mark.parametrize("stop", ["broken", "never"])
@pytest.mark.parametrize(("norm", "eps"), BUDGETS)
@pytest.mark.parametrize(("name", "options"), ATTACKS)
def test_results_keep_the_threat_model_and_the_model(name, options, norm, eps, stop, digits_model, digits_test):
    if name == "standard" and stop == "never":
        with pytest.raises(ConfigError, match="gives a verdict"):
            make(name, norm, eps, options, stop=stop)
        return
    x, y, ids = (v[:120] for v in digits_test)
    digits_model.train()
    before = {k: v.clone() for k, v in digits_model.state_dict().items()}
    try:
        result = make(name, norm, eps, options, stop=stop)(digits_model, x, y, ids=ids)
        assert digits_model.training
    finally:
        digits_model.eval()
    assert all(torch.equal(v, before[k]) for k, v in digits_model.state_dict().items())
    assert all(p.requires_grad for p in digits_model.parameters())
    assert all(p.grad is None for p in digits_model.parameters())
    assert float(flat_norm(result.x_adv - x, norm).max()) <= eps + 1e-6
    assert float(result.x_adv.min()) >= 0.0
    assert float(result.x_adv.max()) <= 1.0
    # Verdicts, logits and inputs belong together, and a clean error is left as it is.
    with torch.no_grad():
        again, clean = digits_model(result.x_adv), digits_model(x)
    assert torch.allclose(again, result.logits, atol=1e-4)
    assert torch.equal(result.broken, result.logits.argmax(1) != y)
    wrong = clean.argmax(1) != y
    assert torch.equal(result.x_adv[wrong], x[wrong])
    assert result.broken[wrong].all()
    assert int(result.broken.sum()) > int(wrong.sum())


@pytest.mark.parametrize(("name", "options"), ATTACKS)
def test_budget_zero_is_the_identity(name, options, digits_model, digits_test):
    x, y, _ = (v[:40] for v in digits_test)
    result = make(name, "Linf", 0.0, options)(digits_model, x, y)
    assert torch.equal(result.x_adv, x)
    with torch.no_grad():
        assert torch.equal(result.broken, digits_model(x).argmax(1) != y)


@pytest.mark.parametrize(("name", "options"), ATTACKS)
def test_same_seed_same_result(name, options, digits_model, digits_test):
    x, y, ids = (v[:60] for v in digits_test)
    attack = make(name, "Linf", 0.1, options)
    first, second = (attack(digits_model, x, y, ids=ids, seed=5) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv)


@pytest.mark.parametrize("attack", [PGD(eps=0.1, steps=10), APGDCE(eps=0.1, steps=15)], ids=lambda a: a.name)
def test_verdicts_do_not_depend_on_batch_size(attack, mnist_model, mnist_test):
    x, y, ids = (v[:500] for v in mnist_test)  # one may differ: rounding at the boundary
    results = [attack(mnist_model, x, y, ids=ids, batch_size=size) for size in (1, 7, 250)]
    for result in results[1:]:
        assert int((result.broken != results[0].broken).sum()) <= 0.002 * len(x)


def test_random_starts_do_not_depend_on_batch_size(digits_test):
    """The draws themselves are bit-equal: an attack that submits only its random start shows them."""
    x, y, ids = (v[:50] for v in digits_test)
    starts = []

    class Start(PGD):
        def _run(self, search):
            candidates = search.threat.random_point(search.x, search.random)
            search.submit(candidates, search.logits(candidates))

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for norm in ("Linf", "L2"):
        attack = Start(eps=0.3, norm=norm, stop="never")
        starts = [attack(model, x, y, ids=ids, batch_size=size).x_adv for size in (1, 7, 250)]
        assert torch.equal(starts[0], starts[1])
        assert torch.equal(starts[0], starts[2])


def test_pgd_agrees_with_torchattacks(mnist_model, mnist_test):
    """Same steps, same model, 1,000 samples: robust accuracies within one standard error, ours no weaker beyond it."""
    x, y, ids = mnist_test
    for eps in (0.05, 0.1):
        ours = PGD(eps=eps, steps=20, step_size=eps / 8)(mnist_model, x, y, ids=ids)
        theirs = torchattacks.PGD(mnist_model, eps=eps, alpha=eps / 8, steps=20)
        torch.manual_seed(0)
        x_adv = theirs(x, y)
        with torch.no_grad():
            broken = mnist_model(x_adv).argmax(1) != y
        robust, reference = (float((~b).float().mean()) for b in (ours.broken, broken))
        standard_error = np.sqrt(reference * (1 - reference) / len(x))
        assert abs(robust - reference) <= standard_error
        assert mnist_model.training is False


def test_apgd_is_at_least_as_strong_as_pgd_and_fgsm(mnist_model, mnist_test):
    x, y, ids = (v[:300] for v in mnist_test)
    robust = {
        name: int((~attack(mnist_model, x, y, ids=ids).broken).sum())
        for name, attack in {
            "fgsm": FGSM(eps=0.1),
            "pgd": PGD(eps=0.1, steps=20),
            "apgd": APGDCE(eps=0.1, steps=50),
        }.items()
    }
    assert robust["apgd"] <= robust["pgd"] + 3 <= robust["fgsm"] + 3


def test_more_restarts_and_more_budget_never_save_a_sample(mnist_model, mnist_test):
    x, y, ids = (v[:200] for v in mnist_test)
    few, many = (PGD(eps=0.08, steps=5, restarts=r)(mnist_model, x, y, ids=ids).broken for r in (1, 3))
    assert not (few & ~many).any()
    counts = [int(PGD(eps=e, steps=20)(mnist_model, x, y, ids=ids).broken.sum()) for e in (0.02, 0.05, 0.1, 0.2, 0.5)]
    assert counts == sorted(counts)
    assert counts[-1] == len(x)  # a uniformly grey image is in reach at 0.5


def test_early_retirement_saves_passes_and_no_verdict(mnist_model, mnist_test):
    x, y, ids = (v[:200] for v in mnist_test)
    early, late = (PGD(eps=0.1, steps=10, stop=s)(mnist_model, x, y, ids=ids) for s in ("broken", "never"))
    assert int((early.broken != late.broken).sum()) <= 1
    assert int(early.forwards.sum()) < int(late.forwards.sum())
    # An unbroken sample pays steps + 1 forwards and steps backwards, plus the shared clean pass.
    assert set(early.forwards[~early.broken].tolist()) == {12}
    assert set(early.backwards[~early.broken].tolist()) == {10}
    loss = nn.functional.cross_entropy
    assert float(loss(late.logits, y)) > float(loss(early.logits, y))


def test_clean_logits_are_shared(digits_model, digits_test):
    x, y, ids = (v[:30] for v in digits_test)
    with torch.no_grad():
        clean = digits_model(x)
    paid, free = (PGD(eps=0.1, steps=3)(digits_model, x, y, ids=ids, clean_logits=c) for c in (None, clean))
    assert torch.equal(paid.x_adv, free.x_adv)
    assert torch.equal(paid.forwards, free.forwards + 1)


def test_an_all_misclassified_batch_and_two_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = torch.rand(20, 1, 8, 8)
    y = 1 - model(x).argmax(1)
    quick = {"steps": 10, "targets": 9}
    for attack in (
        FGSM(eps=0.1),
        PGD(eps=0.1),
        APGDCE(eps=0.1),
        APGDT(eps=0.1, **quick),
        FABT(eps=0.1, **quick),
        Square(eps=0.1, queries=30),
        Standard(eps=0.1, queries=30, **quick),
        Standard(eps=0.5, norm="L2", queries=30, **quick),
    ):
        result = attack(model, x, y)
        assert result.broken.all()
        assert torch.equal(result.x_adv, x)
        assert (result.backwards == 0).all()
        right = attack(model, x, 1 - y)
        assert right.x_adv.shape == x.shape


def test_linear_model_is_attacked_optimally():
    """For a linear two-class model the best perturbation is known in closed form, for both norms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = 0.3 + 0.4 * torch.rand(200, 1, 8, 8)  # away from the box, so that only the ball binds
    with torch.no_grad():
        y = model(x).argmax(1)
        gap = -margin(model(x), y)
        w = (model[1].weight[0] - model[1].weight[1]).abs()
    for norm, eps, reach in (("Linf", 0.02, w.sum()), ("L2", 0.15, w.norm())):
        expected = gap < eps * reach
        for attack in (
            FGSM(eps=eps, norm=norm),
            PGD(eps=eps, norm=norm, steps=40),
            APGDCE(eps=eps, norm=norm, steps=40),
        ):
            # L2 PGD turns towards the optimum slowly: ln tan(angle / 2) falls by 2.5 in all, so from a random start (up to
            # 115 degrees away in 64 dimensions) it ends within 0.26 rad, whose cosine is 3.4 % short of 1.
            slack = 0.034 if (attack.name, norm) == ("pgd", "L2") else 1e-3
            sure = (gap - eps * reach).abs() > slack * eps * reach
            broken = attack(model, x, y).broken
            assert torch.equal(broken[sure], expected[sure]), (attack.name, norm)


def test_projection_and_steepest_ascent():
    torch.manual_seed(0)
    x, z = torch.rand(30, 3, 5, 5), torch.rand(30, 3, 5, 5) * 4 - 2
    for norm, eps in BUDGETS:
        threat = Threat(norm, eps)
        inside = threat.project(z, x)
        assert max(threat.excess(inside, x)) <= 1e-6
        assert torch.allclose(threat.project(inside, x), inside, atol=1e-6)
        unit = threat.steepest(z * 1e-25)  # squares of such gradients underflow in float32
        assert torch.allclose(flat_norm(unit, norm), torch.ones(30), atol=1e-4)
        start = threat.random_point(x, SampleRandom.of(0, range(30), "s"))
        assert max(threat.excess(start, x)) <= 1e-6


def test_apgd_checkpoints_follow_the_paper():
    # p_j: 0, .22, .41, .57, .70, .80, .87, .93, .99 of 100 steps (Croce and Hein, section 3.2)
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_an_attack_that_cheats_is_caught(digits_model, digits_test):
    x, y, _ = (v[:10] for v in digits_test)

    class Cheat(PGD):
        def _run(self, search):
            candidates = search.x + 2 * self.eps
            search.submit(candidates, search.logits(candidates))

    with pytest.raises(ThreatModelError, match="leave the threat model Linf 0.1"):
        Cheat(eps=0.1, stop="never")(digits_model, x, y)


def test_contract_violations_are_refused_before_anything_is_spent(digits_model, digits_test):
    x, y, _ = (v[:10] for v in digits_test)
    attack = PGD(eps=0.1)
    with pytest.raises(DataError, match="ImageNet-normalised"):
        attack(digits_model, (x - 0.45) / 0.22, y)
    with pytest.raises(DataError, match="labels span"):
        attack(digits_model, x, y + 10)
    with pytest.raises(ModelError, match="probabilities"):
        attack(nn.Sequential(digits_model, nn.Softmax(1)), x, y)
    with pytest.raises(ModelError, match="NaN"):
        attack(nn.Sequential(digits_model, nn.Threshold(1e9, float("nan"))), x, y)
    with pytest.raises(DataError, match="3 ids for 10 inputs"):
        attack(digits_model, x, y, ids=["a", "b", "c"])
    with pytest.raises(DataError, match="at least one sample"):
        attack(digits_model, x[:0], y[:0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pdg", {"eps": 0.1}, "Did you mean 'pgd'"),
        ("pgd", {"eps": 0.1, "step": 3}, "Did you mean 'steps'"),
        ("pgd", {}, "missing eps"),
        ("pgd", {"eps": "8/0"}, "expected a number"),
        ("pgd", {"eps": -1}, "eps"),
        ("pgd", {"eps": 0.1, "norm": "L7"}, "norm 'L7'"),
        ("pgd", {"eps": 0.1, "stop": "soon"}, "'broken' or 'never'"),
        ("pgd", {"eps": 0.1, "loss": "cee"}, "Did you mean 'ce'"),
        ("apgd-ce", {"eps": 0.1, "steps": 0}, "at least 1"),
    ],
)
def test_wrong_parameters_are_explained(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_attack(name, **options)


def test_minimum_norm_attacks_of_torchattacks(digits_model, digits_test):
    x, y, _ = (v[:40] for v in digits_test)
    free = build_attack("torchattacks:CW", options={"steps": 30})(digits_model, x, y)
    assert free.broken.any()
    eps = float(free.norms[free.broken & (free.norms > 0)].median())
    bound = build_attack("torchattacks:CW", eps=eps, options={"steps": 30})(digits_model, x, y)
    # Given a budget, what lies outside does not count.
    assert float(bound.norms.max()) <= eps + 1e-6
    assert 0 < int(bound.broken.sum()) < int(free.broken.sum())
    with pytest.raises(ConfigError, match="Did you mean 'PGD'"):
        build_attack("torchattacks:PGDD", eps=0.1)(digits_model, x, y)
    with pytest.raises(ConfigError, match="Did you mean 'steps'"):
        build_attack("torchattacks:PGD", eps=0.1, options={"stepz": 3})(digits_model, x, y)


def test_adapter_leaves_global_generators_alone(digits_model, digits_test):
    x, y, _ = (v[:8] for v in digits_test)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    build_attack("torchattacks:PGD", eps=0.1, options={"steps": 2})(digits_model, x, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_attack_is_abstract():
    with pytest.raises(TypeError):
        Attack(eps=0.1)


@pytest.mark.parametrize("eps", [0.5, 3.0, 30.0])
def test_l2_at_the_size_of_imagenet(eps):
    """150,000 pixels: rounding must not push a perturbation out of its ball."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * 14 * 14, 5))
    x = torch.rand(4, 3, 224, 224) * 0.3 + 0.35
    with torch.no_grad():
        y = model(x).argmax(1)
    for attack in (FGSM(eps=eps, norm="L2"), PGD(eps=eps, norm="L2", steps=3), APGDCE(eps=eps, norm="L2", steps=3)):
        result = attack(model, x, y)
        exact = (result.x_adv.double() - x.double()).flatten(1).norm(dim=1)
        assert float(exact.max()) <= eps + 1e-6
    adapted = build_attack("torchattacks:PGDL2", eps=eps, options={"steps": 3, "alpha": eps / 2})(model, x, y)
    theirs = torchattacks.PGDL2(model, eps=eps, alpha=eps / 2, steps=3)(x, y)
    with torch.no_grad():
        expected = int((model(theirs).argmax(1) != y).sum())
    assert int(adapted.broken.sum()) == expected  # a near miss by rounding is projected, not thrown away


def test_budgets_in_bytes_and_norms_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="did you mean 8/255"):
        PGD(eps=8)
    with pytest.raises(ConfigError, match="measures its perturbation in Linf, not L2"):
        build_attack("torchattacks:PGD", eps=1.0, norm="L2")
    with pytest.raises(ConfigError, match="changes few pixels"):
        build_attack("torchattacks:OnePixel", eps=0.1)
    assert PGD(eps=0.1, steps="1e1").steps == 10
    with pytest.raises(ConfigError, match="whole number"):
        PGD(eps=0.1, steps=2.5)


def test_inputs_of_the_caller_are_never_changed(digits_model, digits_test):
    class InPlace(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x if x.requires_grad else x.mul_(1.0).clamp_(0.1, 0.9))

    x, y, _ = (v[:20] for v in digits_test)
    before = x.clone()
    PGD(eps=0.1, steps=2)(InPlace(digits_model), x, y)
    assert torch.equal(x, before)
    with pytest.raises(DataError, match="20 inputs"):
        PGD(eps=0.1)(digits_model, x, torch.cat([y, y]))


def test_seeds_and_restarts_start_elsewhere(digits_model, digits_test):
    x, y, ids = (v[:30] for v in digits_test)
    attack = PGD(eps=0.05, steps=1, step_size=0, stop="never")
    a, b = (attack(digits_model, x, y, ids=ids, seed=s).x_adv for s in (0, 1))
    assert not torch.equal(a, b)
    starts = []

    class Watch(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            starts.append(z.detach().clone())
            return self.inner(z)

    PGD(eps=0.05, steps=1, step_size=0, restarts=2, stop="never")(Watch(digits_model), x, y, ids=ids)
    clean, first, again, second = starts[:4]
    assert torch.equal(clean, x)
    assert torch.allclose(first, again, atol=1e-7)  # a step of size 0
    assert not torch.allclose(again[:5], second[:5], atol=1e-3)


def test_l2_random_points_are_uniform_in_the_ball():
    x = torch.full((3000, 1, 2, 3), 0.5)
    threat = Threat("L2", 0.3)
    random = SampleRandom.of(0, range(3000), "u")
    radius = flat_norm(threat.random_point(x, random) - x, "L2") / 0.3
    from scipy import stats

    assert stats.kstest(radius.double().numpy() ** 6, "uniform").pvalue > 1e-3


def plain_apgd(model, x, y, eps, start, steps, rho=0.75, alpha=0.75):
    """APGD for Linf as the paper writes it down (Algorithm 1), one sample at a time: returns every iterate."""

    def look(z):
        z = z.clone().requires_grad_(True)
        value = nn.functional.cross_entropy(model(z), y)
        return float(value.detach()), torch.autograd.grad(value, z)[0]

    def project(z):
        return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)

    marks, size = checkpoints(steps), 2 * eps
    points, values = [start], [look(start)[0]]
    best, best_value, gradient = start, values[0], look(start)[1]
    now, before = start, start
    mark_before, best_before, halved_before = 0, best_value, True
    for k in range(steps):
        z = project(now + size * gradient.sign())
        following = project(now + alpha * (z - now) + (1 - alpha) * (now - before)) if k else z
        before, now = now, following
        value, gradient = look(now)
        points.append(now)
        values.append(value)
        if value > best_value:
            best, best_value = now, value
        if k + 1 in marks:
            rises = sum(values[i + 1] > values[i] for i in range(mark_before, k + 1))
            condition_1 = rises <= rho * (k + 1 - mark_before)
            condition_2 = not halved_before and best_before >= best_value
            halved_before = condition_1 or condition_2
            mark_before, best_before = k + 1, best_value
            if halved_before:
                size, now = size / 2, best
                gradient = look(best)[1]
                # "rises" compares successive losses of the path; after going back the path goes on from the best point,
                # but its last loss stays the one that was measured last.
    return points


def test_apgd_follows_the_algorithm_step_by_step(digits_test):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10)).double().eval()

    class Float(nn.Module):
        """float32 outside, float64 inside: comparisons of losses do not hang on rounding."""

        def __init__(self):
            super().__init__()
            self.inner, self.seen = model, []

        def forward(self, z):
            self.seen.append(z.detach().clone())
            return 4.0 * self.inner(z.double())

    x, _, ids = (v[:6] for v in digits_test)
    with torch.no_grad():
        y = Float()(x).argmax(1)
    eps, steps = 0.3, 40
    for i in range(len(x)):
        watched = Float()
        APGDCE(eps=eps, steps=steps, stop="never")(watched, x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1])
        path = watched.seen[1:]  # without the clean pass
        expected = plain_apgd(Float(), x[i : i + 1], y[i : i + 1], eps, path[0], steps)
        assert len(path) == len(expected)
        for k, (found, wanted) in enumerate(zip(path, expected, strict=True)):
            assert torch.allclose(found, wanted, atol=1e-6), f"sample {i}, iterate {k}"


def test_mi_fgsm_equals_torchattacks(mnist_model, mnist_test):
    """Both are deterministic: the same iterates, so the same verdicts but for rounding at the boundary."""
    x, y, ids = (v[:300] for v in mnist_test)
    ours = build_attack("mi-fgsm", eps=0.1, steps=10, step_size=0.02, stop="never")(mnist_model, x, y, ids=ids)
    options = {"steps": 10, "alpha": 0.02}
    theirs = build_attack("torchattacks:MIFGSM", eps=0.1, options=options)(mnist_model, x, y, ids=ids)
    assert 30 < int(ours.broken.sum()) < 290
    assert int((theirs.broken & ~ours.broken).sum()) <= 1  # ours also counts iterates before the last
    assert int((ours.broken & ~theirs.broken).sum()) <= 5


TARGETED = [
    pytest.param("fgsm", {}, id="fgsm"),
    pytest.param("pgd", {"steps": 20}, id="pgd"),
    pytest.param("mi-fgsm", {"steps": 20}, id="mi-fgsm"),
    pytest.param("pgd", {"steps": 20, "loss": "margin", "norm": "L2"}, id="pgd-margin-L2"),
]


@pytest.mark.parametrize(("name", "options"), TARGETED)
def test_targets_are_reached(name, options, digits_model, digits_test):
    x, y, ids = (v[:120] for v in digits_test)
    eps = 2.5 if options.get("norm") == "L2" else 0.35
    result = build_attack(name, eps=eps, target=3, **options)(digits_model, x, y, ids=ids)
    with torch.no_grad():
        found, clean = (digits_model(z).argmax(1) for z in (result.x_adv, x))
    todo = (clean == y) & (y != 3)
    assert torch.equal(result.x_adv[y == 3], x[y == 3])
    assert torch.equal(result.reached[todo], found[todo] == 3)
    assert torch.equal(result.broken, found != y)  # any mistake, the target or not
    share = float(result.reached[todo].float().mean())
    assert share > (0.1 if name == "fgsm" else 0.8)
    # An untargeted attack of the same budget reaches this target less often.
    plain = build_attack(name, eps=eps, **options)(digits_model, x, y, ids=ids)
    with torch.no_grad():
        assert int((digits_model(plain.x_adv).argmax(1) == 3)[todo].sum()) < int(result.reached[todo].sum())


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mi-fgsm"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "margin", "joint-energy", "marginal-energy"])
def test_losses_with_and_without_a_target(name, loss, digits_model, digits_test):
    x, y, ids = (v[:60] for v in digits_test)
    steps = {} if name == "fgsm" else {"steps": 5}
    with torch.no_grad():
        wrong = digits_model(x).argmax(1) != y
    plain = build_attack(name, eps=0.2, loss=loss, **steps)(digits_model, x, y, ids=ids)
    assert plain.broken.sum() > wrong.sum()
    assert torch.equal(plain.reached, plain.broken)
    if loss == "marginal-energy":
        with pytest.raises(ConfigError, match="a targeted attack has no loss 'marginal-energy'"):
            build_attack(name, eps=0.2, loss=loss, target="next", **steps)
        return
    towards = build_attack(name, eps=0.2, loss=loss, target="most-likely", **steps)(digits_model, x, y, ids=ids)
    assert towards.reached[~wrong].any()


@pytest.mark.parametrize("attack", ["pgd", "mi-fgsm"])
def test_the_late_gain_tells_a_climb_from_a_plateau(attack, digits_model, digits_test):
    x, y, ids = (v[:60] for v in digits_test)
    gain = {}
    for size in (0.1 / 20, 0.05):
        options = {"eps": 0.1, "steps": 20, "step_size": size, "stop": "never"}
        late = build_attack(attack, **options)(digits_model, x, y, ids=ids).late_gain
        assert bool(((late >= 0) & (late <= 1))[~late.isnan()].all())
        gain[size] = float(late.nanmean())
    assert gain[0.05] < gain[0.1 / 20]  # short steps are still on their way at the end
