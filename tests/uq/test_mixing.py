"""Mixing two estimators: the invariants of the optimal weight, and a simulation with a known truth.

Identities are of float64 numbers of size 1 to 100: 1e-10 leaves five digits for their sums. Monte-Carlo tolerances are
multiples of the standard error that the test computes.
"""

import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from robustbench_ext.errors import ConfigError, DataError
from uq.mixing import Moments, Ratio, Replicates, against, james_stein, mix, second_moments, simplex_weights


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def drawn(g, d=4):
    """Biases, and the joint covariance (2d, 2d) of t and e, with its factor."""
    b_t, b_e = torch.randn(2, d, generator=g, dtype=torch.float64)
    factor = torch.randn(2 * d, 2 * d, generator=g, dtype=torch.float64) / 2
    joint = factor @ factor.T
    return b_t, b_e, joint, factor


def moments(b_t, b_e, joint):
    d = len(b_t)
    return Moments.of(b_t, b_e, joint[:d, :d], joint[d:, d:], joint[:d, d:])


def test_the_parabola_and_its_minimum(g):
    for _ in range(50):
        found = moments(*drawn(g)[:3])
        best = found.ratio().weight(clamp=False)
        low, width = found.mse(best), found.ratio().denominator
        for a in (-0.7, 0.0, 0.3, 1.0, 2.0):
            assert float(found.mse(a)) == pytest.approx(float(low + width * (a - best) ** 2), rel=1e-10)
        assert float(minimize_scalar(lambda a, f=found: float(f.mse(a))).x) == pytest.approx(float(best), abs=1e-6)
        ends = float(torch.minimum(found.mse(0), found.mse(1)))
        clamped = found.ratio().weight()
        assert float(found.mse(clamped)) <= ends + 1e-12
        if 0 < clamped < 1:
            assert float(found.mse(clamped)) < ends


def scalars(**values):
    zero = dict.fromkeys(("bias_t", "bias_e", "bias_te", "var_t", "var_e", "cov"), 0.0)
    return Moments(**{k: torch.tensor(v, dtype=torch.float64) for k, v in (zero | values).items()})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"var_t": 3.0, "var_e": 1.0}, 0.25),  # no bias: by inverse variance
        ({"var_t": 1e12, "bias_e": 1.0}, 1e-12),
        ({"bias_e": 1.0, "var_e": 2.0}, 1.0),  # t is perfect
        ({"bias_t": 1.0, "var_t": 2.0}, 0.0),  # e is
        ({"var_t": 2.0, "var_e": 2.0}, 0.5),
        ({}, 0.5),  # both are: any weight is as good
        ({"bias_t": 1.0, "bias_e": 1.0, "bias_te": 1.0, "var_t": 1.0, "var_e": 1.0, "cov": 1.0}, 0.5),  # t = e
    ],
)
def test_limits(values, expected):
    assert float(scalars(**values).ratio().weight()) == pytest.approx(expected, rel=1e-9)


def test_swap_shift_rotation_scale(g):
    b_t, b_e, joint, _ = drawn(g)
    d = len(b_t)
    best = float(moments(b_t, b_e, joint).ratio().weight(clamp=False))
    order = [*range(d, 2 * d), *range(d)]
    swapped = moments(b_e, b_t, joint[order][:, order])
    assert float(swapped.ratio().weight(clamp=False)) == pytest.approx(1 - best, abs=1e-12)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    both = torch.block_diag(q, q)
    turned = moments(q @ b_t, q @ b_e, both @ joint @ both.T)
    assert float(turned.ratio().weight(clamp=False)) == pytest.approx(best, abs=1e-10)
    # The same of the sample formula, where a constant added to t, e and the target matters too.
    mu, t, e = torch.randn(3, 7, d, generator=g, dtype=torch.float64)
    weight = float(against(mu, t, e).pooled().weight(clamp=False))
    for change in (lambda v: v + 3.0, lambda v: v @ q, lambda v: -2.5 * v):
        assert float(against(change(mu), change(t), change(e)).pooled().weight(clamp=False)) == pytest.approx(
            weight, abs=1e-10
        )


def test_smaller_steps_weigh_bias_more():
    found = scalars(bias_e=1.0, var_t=4.0)  # t noisy, e biased
    assert [float(found.ratio(step).weight()) for step in (1.0, 0.5, 0.1)] == pytest.approx([1 / 5, 1 / 3, 1 / 1.4])
    b_t, b_e, joint, _ = drawn(torch.Generator().manual_seed(3))
    known = moments(b_t, b_e, joint)
    step = 0.3

    def bound(a):
        bias = (a * b_t + (1 - a) * b_e).square().sum()
        return float(bias + step * (known.mse(a) - bias))

    expected = minimize_scalar(bound).x
    assert float(known.ratio(step).weight(clamp=False)) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ConfigError, match="eta L"):
        found.ratio(0)


def test_gaussian_draws_recover_the_weight_and_the_error(g):
    b_t, b_e, joint, factor = drawn(g)
    d, n = len(b_t), 100_000
    mu = torch.arange(d, dtype=torch.float64)
    noise = torch.randn(n, 2 * d, generator=g, dtype=torch.float64) @ factor.T
    t, e = mu + b_t + noise[:, :d], mu + b_e + noise[:, d:]
    known = moments(b_t, b_e, joint)
    best = known.ratio().weight(clamp=False)
    found = against(mu, t, e).pooled()
    # Delta method: the residuals of the ratio, over n draws.
    residual = ((e - mu) * (e - t)).sum(1) - best * (t - e).square().sum(1)
    error = float(residual.std() / (t - e).square().sum(1).mean() / n**0.5)
    assert float(found.weight(clamp=False)) == pytest.approx(float(best), abs=4 * error)
    mixed = best * t + (1 - best) * e
    assert float((mixed - mu).square().sum(1).mean()) == pytest.approx(float(known.mse(best)), rel=0.01)
    # With an independent unbiased reference in the target's place; its noise only adds to the error.
    reference = mu + torch.randn(n, d, generator=g, dtype=torch.float64)
    assert float(against(reference, t, e).pooled().weight(clamp=False)) == pytest.approx(float(best), abs=0.01)


@pytest.mark.parametrize("paired", [False, True])
def test_the_bias_distance_is_unbiased(g, paired):
    b_t, b_e, _, factor = drawn(g, d=3)
    repeats, k = 10_000, 3
    noise = torch.randn(k, repeats, 6, generator=g, dtype=torch.float64) @ factor.T
    t, e = b_t + noise[..., :3], b_e + noise[..., 3:]
    if not paired:
        e = e[:, torch.randperm(repeats, generator=g)]
    rows = torch.arange(repeats)[:, None].expand(repeats, 3)
    found = Replicates.of(t, e, paired).pooled(rows).bias_distance()
    error = float(found.std() / repeats**0.5)
    assert float(found.mean()) == pytest.approx(float((b_t - b_e).square().sum()), abs=4 * error)
    plain = float((t.mean(0) - e.mean(0)).square().sum(1).mean())
    assert plain - float((b_t - b_e).square().sum()) > 10 * error  # what taking no noise off would give


def test_replicates_recover_the_weight_of_an_unbiased_t(g):
    b_t, b_e, joint, factor = drawn(g, d=5)
    b_t = torch.zeros_like(b_t)
    n, k = 20_000, 4
    noise = torch.randn(k, n, 10, generator=g, dtype=torch.float64) @ factor.T
    pairs = Replicates.of(noise[..., :5], b_e + noise[..., 5:], paired=True).pooled()
    for draws in (1, k, 50):
        share = moments(b_t, b_e, joint / draws)
        # 20,000 inputs of 5 coordinates: the pooled ratio is good to about a percent.
        assert float(pairs.ratio(draws).weight()) == pytest.approx(float(share.ratio().weight()), abs=0.02)
    assert torch.equal(pairs.ratio().numerator, pairs.ratio(k).numerator)


def test_a_constant_e_is_the_plug_in_of_james_and_stein(g):
    t, e = torch.randn(4, 6, generator=g, dtype=torch.float64), torch.full((1, 6), 0.9, dtype=torch.float64)
    found = Replicates.of(t, e).pooled()
    squared = float((t.mean(0) - e[0]).square().sum())
    noise = float(t.var(0).sum()) / 4
    assert noise < squared
    assert float(found.ratio().weight()) == pytest.approx(1 - noise / squared, rel=1e-12)
    # Nearer than its noise: nothing of t is left.
    near = t.mean(0)[None] + 0.999 * (noise / 6) ** 0.5
    assert float(Replicates.of(t, near).pooled().ratio().weight()) == 0.0
    assert james_stein(noise, float(t.var(0).mean()), 6, 4, 18) > 0  # its factor is smaller
    shrinkage = 4 * float(t.var(0).mean()) * 18 / 20 / 4
    assert james_stein(0.999 * shrinkage, float(t.var(0).mean()), 6, 4, 18) == 0.0
    assert james_stein(2 * shrinkage, float(t.var(0).mean()), 6, 4, 18) == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(("d", "distance"), [(3, 0), (3, 3), (4, 3), (10, 3)])
def test_james_stein_never_loses_and_the_plug_in_does(d, distance):
    """20,000 repeats of the benchmark's simulation (benchmarks/uq/mixing.py has 200,000); the expected error of t is d / 4."""
    g = torch.Generator().manual_seed(d)
    k, n = 4, 20_000
    t = torch.randn(k, n, d, generator=g, dtype=torch.float64)
    e = torch.zeros(n, d, dtype=torch.float64)
    e[:, 0] = distance
    found = Replicates.of(t, e[None]).pooled(torch.arange(n)[:, None].expand(n, d))
    weights = [
        james_stein(q, v / d, d, k, d * (k - 1))
        for q, v in zip(found.squared.tolist(), found.var_t.tolist(), strict=True)
    ]
    plain = t.mean(0).square().sum(1)

    def lost(alpha):
        """How much more than the mean of t, paired, in standard errors."""
        more = mix(t.mean(0), e, alpha[:, None]).square().sum(1) - plain
        return float(more.mean() / (more.std() / n**0.5))

    assert lost(torch.tensor(weights).double()) < 0
    plug_in = lost(found.ratio().weight())
    assert plug_in > 4 if d <= 4 and distance == 3 else plug_in < -4


def test_least_squares_is_best_on_its_own_sample_and_pools(g):
    t, e = torch.randn(2, 200, 5, generator=g, dtype=torch.float64).softmax(2)
    y = torch.nn.functional.one_hot(torch.randint(0, 5, (200,), generator=g), 5).double()
    ratio = against(y, t, e)
    alpha = float(ratio.pooled().weight())

    def brier(a):
        return float((mix(t, e, a) - y).square().sum(1).mean())

    assert brier(alpha) <= min(brier(0.0), brier(1.0)) + 1e-15
    assert all(brier(alpha) <= brier(a) + 1e-15 for a in (alpha - 1e-3, alpha + 1e-3))
    columns = torch.arange(5).expand(200, 5).contiguous()
    each = ratio.pooled(columns)
    for k in range(5):
        alone = against(y[:, k], t[:, k], e[:, k]).pooled()
        assert float(each.weight()[k]) == pytest.approx(float(alone.weight()), rel=1e-12)
    assert float(each.pooled().weight()) == pytest.approx(alpha, rel=1e-12)
    with pytest.raises(DataError, match="a group for each entry"):
        ratio.pooled(torch.zeros(200, dtype=torch.int64))


def test_the_ends_are_the_inputs_bit_for_bit(g):
    t, e = torch.randn(2, 50, 4, generator=g).softmax(2)
    t[0], e[1] = torch.inf, torch.nan  # an unused estimator must not leak
    assert torch.equal(mix(t, e, 1.0), t)
    assert torch.equal(mix(t, e, 0).nan_to_num(7), e.nan_to_num(7))
    each = mix(t, e, torch.tensor([1.0, 0.0] * 25)[:, None])
    assert torch.equal(each[2::2], t[2::2]) and torch.equal(each[3::2], e[3::2])
    p = mix(t[2:], e[2:], 0.37)
    assert (p >= 0).all() and torch.allclose(p.sum(1), torch.ones(48), atol=1e-6)


def test_shrinkage_to_a_prior_and_moving_averages():
    one = torch.tensor(1.0, dtype=torch.float64)
    ratio = Ratio(3 * one, 4 * one)
    assert float(ratio.weight(prior=0.25, mass=4.0)) == 0.5
    assert float(Ratio(-one, one).weight(prior=0.5, mass=1.0)) == 0.0  # clamped last: (-1 + 0.5) / 2
    assert float(Ratio(0 * one, 0 * one).weight(prior=0.3)) == pytest.approx(0.3)
    moved = ratio.towards(Ratio(one, 2 * one), 0.5)
    assert (float(moved.numerator), float(moved.denominator)) == (2.0, 3.0)
    added = ratio + Ratio(one, one)
    assert float(added.weight()) == pytest.approx(4 / 5)


def test_two_of_several_are_the_same_weight_and_the_simplex_is_kept(g):
    b_t, b_e, joint, _ = drawn(g)
    known = moments(b_t, b_e, joint)
    cross = known.bias_te + known.cov
    a = torch.stack([torch.stack([known.mse(1), cross]), torch.stack([cross, known.mse(0)])])
    weights = simplex_weights(a)
    assert float(weights[0]) == pytest.approx(float(known.ratio().weight()), abs=1e-10)
    for _ in range(20):
        errors = torch.randn(5, 4, 2, generator=g, dtype=torch.float64)
        errors = errors + errors[0] * torch.rand(5, 1, 1, generator=g, dtype=torch.float64) * 2
        a = second_moments(errors, torch.zeros(4, 2))
        w = simplex_weights(a)
        assert (w >= 0).all() and float(w.sum()) == pytest.approx(1, abs=1e-12)
        # Optimality on the simplex (Karush, Kuhn, Tucker): equal gradient where w > 0, none smaller elsewhere.
        slope = a @ w
        level = float(w @ slope)
        assert torch.allclose(slope[w > 1e-9], slope.new_tensor(level), rtol=1e-6)
        assert float(slope.min()) >= level * (1 - 1e-6)
    other = minimize(
        lambda v: float(torch.tensor(v) @ a @ torch.tensor(v)),
        [0.2] * 5,
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda v: sum(v) - 1},
        options={"ftol": 1e-14},
    )
    assert float(w @ a @ w) <= other.fun + 1e-9


def test_faults():
    with pytest.raises(DataError, match="K >= 2 for t"):
        Replicates.of(torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(DataError, match="in pairs"):
        Replicates.of(torch.zeros(3, 3), torch.zeros(2, 3), paired=True)
    with pytest.raises(ConfigError, match="at least 3 coordinates"):
        james_stein(1.0, 1.0, 2, 4, 6)
    with pytest.raises(DataError, match="eigenvalue"):
        simplex_weights(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert torch.equal(simplex_weights(torch.zeros(4, 4)), torch.full((4,), 0.25, dtype=torch.float64))
