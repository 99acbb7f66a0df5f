"""The standard ensemble and its members: verdicts, accounting, the projection FAB rests on, few classes."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import nn

from robustbench_ext.attacks import APGDCE, APGDT, FABT, PGD, Square, Standard
from robustbench_ext.attacks.losses import dlr, dlr_targeted, margin, rivals
from robustbench_ext.attacks.projections import to_hyperplane
from robustbench_ext.attacks.square import _bump, _cone, square_share

QUICK = {"steps": 20, "targets": 9, "queries": 300}


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.08), ("L2", 0.9)])
def test_worst_case_is_at_least_as_strong_as_every_member(norm, eps, mnist_model, mnist_test):
    x, y, ids = (v[:120] for v in mnist_test)
    attack = Standard(eps=eps, norm=norm, **QUICK)
    whole = attack(mnist_model, x, y, ids=ids)
    assert attack.members == ("apgd-ce", "apgd-t", "fab-t", "square")
    first = attack.attacks[0](mnist_model, x, y, ids=ids)
    assert torch.equal(first.broken & ~whole.broken, torch.zeros(120, dtype=torch.bool))
    with torch.no_grad():
        wrong = mnist_model(x).argmax(1) != y
    # Who broke what: the first member's samples are exactly those that it breaks alone; nobody is credited twice.
    assert torch.equal(whole.broken_by == 0, first.broken & ~wrong)
    assert torch.equal(whole.broken_by >= 0, whole.broken & ~wrong)
    assert (whole.broken_by[wrong] == -1).all()
    for member in attack.attacks[1:]:
        alone = member(mnist_model, x, y, ids=ids)
        assert int((alone.broken & ~whole.broken).sum()) <= 1  # another batch composition may flip a sample by rounding
    pgd = PGD(eps=eps, norm=norm, steps=20)(mnist_model, x, y, ids=ids)
    assert int(whole.broken.sum()) >= int(pgd.broken.sum())


def test_ensemble_does_not_depend_on_batch_size(digits_model, digits_test):
    x, y, ids = (v[:100] for v in digits_test)
    attack = Standard(eps=0.1, steps=10, targets=3, queries=100)
    results = [attack(digits_model, x, y, ids=ids, batch_size=size).broken for size in (13, 250)]
    assert int((results[0] != results[1]).sum()) <= 1


def test_passes_are_the_protocol_s_and_no_more(digits_model, digits_test):
    x, y, ids = (v[:60] for v in digits_test)
    steps, targets, queries = 8, 3, 40
    result = Standard(eps=0.02, steps=steps, targets=targets, queries=queries)(digits_model, x, y, ids=ids)
    robust = ~result.broken
    assert robust.any()
    spent = result.forwards[robust].double(), result.backwards[robust].double()
    gradient = (1 + targets) * (steps + 1)  # APGD-CE and APGD-T; one clean pass, shared
    fab_least, fab_most = targets * (steps + 1), targets * (2 * steps + 1)
    assert spent[0].min() >= 1 + gradient + fab_least + queries
    assert spent[0].max() <= 1 + gradient + 1.5 * fab_most + queries + 1
    assert spent[1].min() >= (1 + targets) * steps + targets * steps


def test_square_costs_its_queries(digits_model, digits_test):
    x, y, ids = (v[:40] for v in digits_test)
    for norm, eps in (("Linf", 0.01), ("L2", 0.05)):
        result = Square(eps=eps, norm=norm, queries=130)(digits_model, x, y, ids=ids)
        assert set(result.forwards[~result.broken].tolist()) == {131}  # 130 queries and the clean pass
        assert (result.backwards == 0).all()


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_few_classes(classes, norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes))
    x = torch.rand(40, 1, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    eps = 0.1 if norm == "Linf" else 0.6
    result = Standard(eps=eps, norm=norm, steps=20, queries=100)(model, x, y)
    assert int(result.broken.sum()) > 0
    targeted = APGDT(eps=eps, norm=norm, steps=20)(model, x, y)
    assert int(targeted.broken.sum()) >= int(PGD(eps=eps, norm=norm, steps=20)(model, x, y).broken.sum()) - 1


def test_fab_finds_the_nearest_point_of_a_linear_boundary():
    """Two classes, linear: the least perturbation is known, so FAB must break exactly the samples within the budget."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = 0.3 + 0.4 * torch.rand(150, 1, 8, 8)
    with torch.no_grad():
        y, gap = model(x).argmax(1), -margin(model(x), model(x).argmax(1))
    w = (model[1].weight[0] - model[1].weight[1]).detach()
    for norm, reach in (("Linf", w.abs().sum()), ("L2", w.norm())):
        distance = gap / reach
        eps = float(distance.median())
        # eta = 1.05 overshoots the plane by 5 %, and beta = 0.9 pulls back: the search ends within 5 % of the distance.
        sure = (distance / eps - 1).abs() > 0.05
        broken = FABT(eps=eps, norm=norm, steps=30)(model, x, y).broken
        assert torch.equal(broken[sure], (distance < eps)[sure])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_projection_equals_an_independent_solver(norm):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 20, generator=generator, dtype=torch.float64)
    w = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    b = (w * torch.rand(12, 20, generator=generator, dtype=torch.float64)).sum(1)
    d = to_hyperplane(x, w, b, norm)
    assert float((x + d).min()) >= 0
    assert float((x + d).max()) <= 1
    assert torch.allclose((w * (x + d)).sum(1), b, atol=1e-5)
    for i in range(12):
        bounds = [(-float(v), 1 - float(v)) for v in x[i]]
        right = float(b[i] - w[i] @ x[i])
        if norm == "Linf":
            eye, one = np.eye(20), np.ones((20, 1))
            best = linprog(
                np.r_[np.zeros(20), 1],
                A_ub=np.block([[eye, -one], [-eye, -one]]),
                b_ub=np.zeros(40),
                A_eq=np.r_[w[i].numpy(), 0][None],
                b_eq=[right],
                bounds=[*bounds, (0, None)],
            ).fun
            assert float(d[i].abs().max()) == pytest.approx(best, abs=1e-6)
        else:
            plane = {"type": "eq", "fun": lambda z, i=i, right=right: w[i].numpy() @ z - right}
            best = minimize(
                lambda z: z @ z, np.zeros(20), jac=lambda z: 2 * z, method="SLSQP", constraints=plane, bounds=bounds
            )
            assert float(d[i].norm()) == pytest.approx(np.sqrt(best.fun), abs=1e-5)


def test_projection_goes_as_far_as_the_box_where_the_plane_is_out_of_reach():
    x, w = torch.full((1, 4), 0.5), torch.ones(1, 4)
    d = to_hyperplane(x, w, torch.tensor([10.0]), "Linf")
    assert torch.allclose(d, torch.full((1, 4), 0.5))


def test_dlr_losses():
    torch.manual_seed(0)
    z, y = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 6
    target = rivals(z, y, 3)[:, 1]
    for loss in (lambda v: dlr(v, y), lambda v: dlr_targeted(v, y, target)):
        assert torch.allclose(loss(z), loss(3 * z + 5), atol=1e-10)  # blind to shift and scale
    assert ((dlr(z, y) > 0) == (z.argmax(1) != y)).all()
    top = z.sort(dim=1, descending=True).values
    expected = (z.gather(1, target[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]) / (
        top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    )
    assert torch.allclose(dlr_targeted(z, y, target), expected, atol=1e-12)
    # Too few classes for the ratios: plain differences, with a gradient.
    few = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        dlr_targeted(few, torch.zeros(5, dtype=torch.int64), torch.full((5,), 2)).sum(), few
    )
    assert (gradient.abs().sum(1) > 0).all()
    assert rivals(z, y, 99).shape == (30, 5)
    assert not (rivals(z, y, 99) == y[:, None]).any()


def test_square_s_shapes_and_schedule():
    shares = [square_share(q, 5000, 0.8) for q in range(5000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 0.8
    assert shares[-1] == 0.8 / 512
    for side in (3, 5, 7):
        assert float(_cone(side, side, torch.zeros(1)).norm()) == pytest.approx(1.0, abs=1e-6)
        assert float(_bump(side, torch.zeros(1)).norm()) == pytest.approx(1.0, abs=1e-6)
        assert float(_bump(side, torch.zeros(1)).sum()) != pytest.approx(0.0, abs=1e-3) or side % 2 == 0
    middle = _cone(5, 5, torch.zeros(1))
    assert middle.argmax() == 12
    assert torch.equal(middle, middle.T)


def test_apgd_t_beats_apgd_ce_on_a_saturated_model(mnist_model, mnist_test):
    """Logits times 1,000: cross-entropy's gradient vanishes in float32, the DLR loss does not notice."""

    class Saturated(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 1000.0 * self.inner(x)

    x, y, ids = (v[:100] for v in mnist_test)
    plain, masked = mnist_model, Saturated(mnist_model)
    ce, dlr_ = APGDCE(eps=0.1, steps=20), APGDT(eps=0.1, steps=20, targets=3)
    assert int(dlr_(masked, x, y, ids=ids).broken.sum()) >= int(dlr_(plain, x, y, ids=ids).broken.sum()) - 2
    assert int(ce(masked, x, y, ids=ids).broken.sum()) < int(ce(plain, x, y, ids=ids).broken.sum()) - 20
