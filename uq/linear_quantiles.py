"""Linear quantile regression at many levels at once, to a duality gap, by an interior-point method.

Koenker and Bassett, Econometrica 1978; the method follows Portnoy and Koenker, Statistical Science 1997, with Mehrotra's
predictor and corrector. The dual of min_b sum_i psi_tau(y_i - x_i b) is the linear programme

    max y'a   subject to   X'a = (1 - tau) X'1,   0 <= a <= 1,

and b are the multipliers of its equations. With s = 1 - a and multipliers z, w >= 0 of the two bounds, the optimum has
x_i b - y_i = z_i - w_i, z_i a_i = 0 and w_i s_i = 0. All levels go together; a step solves one d x d system per level.
"""

from __future__ import annotations

import numpy as np

_DAMP = 0.99995  # of the way to the boundary
_STEPS = 100  # 10 to 25 are usual


def linear_quantiles(design: np.ndarray, y: np.ndarray, levels: np.ndarray, tolerance: float = 1e-10) -> np.ndarray:
    """Coefficients (m, d) that minimise the pinball loss of y (n,) on the design (n, d) at the levels (m,).

    A constant column is the caller's. Columns may depend on each other: then the coefficients of least norm (in the
    singular vectors' sense) are given. `tolerance` bounds the duality gap per sample, in standard deviations of y.
    """
    left, singular, right = np.linalg.svd(design, full_matrices=False)
    kept = singular > singular[0] * 1e-10
    root = np.sqrt(len(y))
    scale = float(y.std()) or 1.0
    found = _interior(left[:, kept] * root, y / scale, levels, tolerance)  # columns of unit mean square
    return np.asarray((found * scale * root / singular[kept]) @ right[kept])


def _interior(x: np.ndarray, y: np.ndarray, levels: np.ndarray, tolerance: float) -> np.ndarray:
    n, m = len(y), len(levels)
    b = np.repeat(np.linalg.lstsq(x, y, rcond=None)[0][None], m, axis=0)
    residual = y - b @ x.T
    a = np.repeat(1 - levels[:, None], n, axis=1)
    # Strictly inside: both multipliers positive, their difference the residual.
    state = [a, 1 - a, np.maximum(-residual, 0.0) + 1e-3, np.maximum(residual, 0.0) + 1e-3]
    target = (1 - levels)[:, None] * x.sum(0)
    going = np.arange(m)
    for _ in range(_STEPS):
        a, s, z, w = (part[going] for part in state)
        primal, dual = target[going] - a @ x, z - w + y - b[going] @ x.T  # both end at zero
        open_ = ((z * a + w * s).sum(1) > tolerance * n) | (np.abs(dual).max(1) > 1e-9)
        if not open_.any():
            break
        going = going[open_]
        a, s, z, w, primal, dual = (part[open_] for part in (a, s, z, w, primal, dual))
        system = _System(x, a, s, z, w, primal, dual)
        da, _, dz, dw = system.solve(-z * a, -w * s)
        p, q = _step(a, da, s, -da), _step(z, dz, w, dw)
        now = (z * a + w * s).sum(1)
        ahead = ((z + q * dz) * (a + p * da) + (w + q * dw) * (s - p * da)).sum(1)
        mu = ((ahead / now) ** 3 * now / (2 * n))[:, None]
        da, db, dz, dw = system.solve(mu - z * a - da * dz, mu - w * s + da * dw)
        p, q = _step(a, da, s, -da), _step(z, dz, w, dw)
        for part, moved in zip(state, (a + p * da, s - p * da, z + q * dz, w + q * dw), strict=True):
            part[going] = moved
        b[going] += q * db
    return b


class _System:
    """Newton's equations at one point, (g, ...) for g levels, ready for several right-hand sides."""

    def __init__(self, x: np.ndarray, *point: np.ndarray) -> None:
        self.x = x
        self.a, self.s, self.z, self.w, self.primal, self.dual = point
        self.weight = 1 / (self.z / self.a + self.w / self.s)
        self.normal = np.stack([(x * d[:, None]).T @ x for d in self.weight])

    def solve(self, on_a: np.ndarray, on_s: np.ndarray) -> tuple[np.ndarray, ...]:
        """Steps (da, db, dz, dw) that change the products z a by `on_a` and w s by `on_s` to first order."""
        h = self.dual + on_a / self.a - on_s / self.s
        db = _solved(self.normal, ((self.weight * h) @ self.x - self.primal)[..., None])[..., 0]
        da = self.weight * (h - db @ self.x.T)
        return da, db, (on_a - self.z * da) / self.a, (on_s + self.w * da) / self.s


def _solved(normal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solutions (g, d, 1) of g systems. Where a system has run out of digits, which happens near the optimum when many samples
    lie on it (tied targets), a ridge of rounding size is added: a step in nearly the same direction, and the next one mends it.
    """
    try:
        return np.asarray(np.linalg.solve(normal, right))
    except np.linalg.LinAlgError:
        size = np.trace(normal, axis1=1, axis2=2) / normal.shape[1]
        ridge = (1e-12 * size + np.finfo(np.float64).tiny)[:, None, None] * np.eye(normal.shape[1])
        return np.asarray(np.linalg.solve(normal + ridge, right))


def _step(u: np.ndarray, du: np.ndarray, v: np.ndarray, dv: np.ndarray) -> np.ndarray:
    """The largest step <= 1 that keeps u and v positive, (g, 1)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.minimum(np.where(du < 0, -u / du, np.inf).min(1), np.where(dv < 0, -v / dv, np.inf).min(1))
    return np.asarray(np.minimum(1.0, _DAMP * room)[:, None])
