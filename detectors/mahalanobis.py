"""Mahalanobis distance to the nearest class mean (Lee, Lee, Lee, Shin, NeurIPS 2018, arXiv 1807.03888).

Class-conditional Gaussians with one tied covariance per layer (`detectors.gaussian`, `detectors.distances`), and
d_l(x) = min_c d_{l,c}(x). The input may first be moved down its own distance, separately for each layer, and layers are
combined into one score:

    x_l = x - eps sign(grad_x d_{l, nearest}(x)),   score = sum_l alpha_l d_l(x_l) + b.

The published confidence is -d (its code multiplies by another 1/2, and counts a gradient of zero as +1); rankings are the
same up to that. Two relatives read the same Gaussians: the relative distance min_c d_c - d_0 (Ren et al. 2021, arXiv
2106.09022), d_0 the distance under one Gaussian for all classes together, and the marginal one, d_0 itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detectors.base import Detector
from detectors.distances import PRECISIONS, ClassDistances, Distances
from detectors.gaussian import INVERSES, TiedGaussian, whiten
from detectors.layers import Combination, logistic
from detectors.selection import needs_choice, numbers, separation
from detectors.validation import Validation
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.observe import PENULTIMATE, Observations, Taps
from robustbench_ext.numbers import parse_number

EPS_GRID = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01)  # the published one, in units of [0, 1] pixels


class Mahalanobis(Detector):
    """score = sum_l alpha_l min_c d_{l,c}(x_l) + b.

    Args:
        layers: taps (see `Taps`); one layer's score is the distance itself.
        inverse, shrinkage, tolerance: what to do about a singular covariance, the normal case; see `gaussian.whiten`.
            "pseudo" ignores directions that training data never use, "shrinkage" punishes movement there: not the same.
        precision: "auto", "float32" or "float64"; see `distances.ClassDistances`.
        eps: input pre-processing, 0 for none; a list is a grid to choose from. It costs one backward and one forward pass a
            layer, and a detector with it cannot be attacked by gradient.
        clip: keep moved inputs in [0, 1]; the published code does not.
        weights: alpha, one for each layer. Default: the mean of d_l over the layers' ranks, so that each counts alike.
        validate: fit alpha and b by logistic regression, and choose eps: {attack: fgsm, eps: 0.1} for adversarial inputs
            only, {outliers: symbols} for unknown ones. With a grid, half of them choose (see `detectors.validation`).
    After fitting, `ranks` are the directions in use of each layer.
    """

    name: ClassVar[str] = "mahalanobis"
    version: ClassVar[int] = 2
    taps: tuple[str, ...] = (PENULTIMATE,)
    needs_fit = True
    reference: ClassVar[str] = "arXiv 1807.03888"

    def __init__(
        self,
        layers: str | Sequence[str] = PENULTIMATE,
        inverse: str = "pseudo",
        shrinkage: float = 1e-3,
        tolerance: float = 1e-10,
        precision: str = "auto",
        eps: float | Sequence[float] = 0.0,
        clip: bool = False,
        weights: Sequence[float] | None = None,
        validate: Mapping[str, Any] | None = None,
    ) -> None:
        self.taps = (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.taps or len(set(self.taps)) < len(self.taps):
            raise ConfigError(f"{self.name}: layers = {layers!r}, expected one or more different feature taps")
        for what, value, known in (("inverse", inverse, INVERSES), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise ConfigError(f"{self.name}: {what} = {value!r}, expected one of {', '.join(known)}")
        self.inverse, self.precision, self.clip = inverse, precision, bool(clip)
        self.shrinkage = parse_number(shrinkage, f"{self.name}: shrinkage")
        self.tolerance = parse_number(tolerance, f"{self.name}: tolerance")
        if not 0 < self.shrinkage <= 1 or not 0 < self.tolerance < 1:
            raise ConfigError(
                f"{self.name}: shrinkage = {self.shrinkage}, tolerance = {self.tolerance}; expected numbers between 0 and 1"
            )
        self.grid = numbers(eps, f"{self.name}: eps")
        self.eps = self.grid[0]
        self.weights = None if weights is None else tuple(parse_number(w, f"{self.name}: weights") for w in weights)
        if self.weights is not None and (len(self.weights) != len(self.taps) or validate is not None):
            raise ConfigError(
                f"{self.name}: {len(self.weights)} weights for {len(self.taps)} layers; expected one for each, and no validate"
            )
        self.validate = None if validate is None else dict(validate)
        needs_choice(self.name, validate, eps=self.grid)
        self.reads_inputs = any(self.grid)
        self.differentiable = not self.reads_inputs
        self.ranks: dict[str, int] = {}
        self._notes: list[str] = []

    @property
    def rank(self) -> int:
        """Directions in use, over all layers."""
        return sum(self.ranks.values())

    def parameters(self) -> dict[str, Any]:
        used = {"shrinkage": self.shrinkage} if self.inverse == "shrinkage" else {"tolerance": self.tolerance}
        weights = None if self.weights is None else list(self.weights)
        found = {"layers": list(self.taps), "inverse": self.inverse, **used, "precision": self.precision}
        return found | {"eps": list(self.grid), "clip": self.clip, "weights": weights, "validate": self.validate}

    # Fitting ---------------------------------------------------------------------------------------------------------

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        if len(train) < 2:
            raise DataError(f"{self.name}: fitting needs at least two labelled samples, got {len(train)}")
        self.ranks, self._notes, self._layers = {}, [], {}
        for tap in self.taps:
            try:
                self._layers[tap] = self._layer(tap, train)
            except DataError as error:
                raise DataError(f"{self.name}: layer '{tap}': {error}") from None
        if self.weights is not None:
            self._combine = Combination(torch.tensor(self.weights, dtype=torch.float64))
        else:
            shares = [1.0 / (len(self.taps) * max(1, self.ranks[tap])) for tap in self.taps]
            self._combine = Combination(torch.tensor(shares if len(shares) > 1 else [1.0], dtype=torch.float64))

    def _layer(self, tap: str, train: Observations) -> tuple[Distances, ...]:
        """What `_distance` needs of one layer's features."""
        gaussian = TiedGaussian(train.logits.shape[1])
        gaussian.update(train.features[tap], train.labels)
        return self._gaussians(gaussian, tap)

    def _gaussians(self, gaussian: TiedGaussian, tap: str) -> tuple[Distances, ...]:
        """Distances under fitted Gaussians: here the class-conditional ones."""
        moments = gaussian.finish()
        options = {"inverse": self.inverse, "shrinkage": self.shrinkage, "tolerance": self.tolerance}
        whitening = whiten(moments.covariance, moments.noise, **options)  # type: ignore[arg-type]
        self._note(tap, whitening.rank, len(moments.covariance))
        return (ClassDistances(moments.present(), whitening, self.precision),)

    def _note(self, tap: str, rank: int, d: int) -> None:
        self.ranks[tap] = rank
        if rank < d:
            self._notes.append(
                f"the covariance of layer '{tap}' is singular: {rank} of {d} directions vary in training, and movement along "
                f"the others is not seen (inverse: shrinkage would punish it)"
            )

    def _tune(self, reader: Taps, validation: Validation) -> None:
        """Fit the regression for every eps of the grid; with more than one, half of the data chooses."""
        first, second = validation.halves() if len(self.grid) > 1 else (validation, validation)
        found = []
        for eps in self.grid:
            known, unknown = (self._batched(reader, x, eps) for x in (first.known, first.unknown))
            combine = logistic(known, unknown)
            if second is not first:
                known, unknown = (self._batched(reader, x, eps) for x in (second.known, second.unknown))
            found.append((separation(combine(known), combine(unknown), validation.criterion), eps, combine))
        top = max(range(len(found)), key=lambda i: found[i][0])
        _, self.eps, self._combine = found[top]
        self._notes.append(f"fitted on {validation.source}: it knows such inputs, and may do worse on others")
        if len(self.grid) > 1 and second is first:
            self._notes.append(
                f"only {len(validation.unknown)} unknown inputs to choose eps on, so it was chosen on those that the weights "
                f"were fitted on, which favours large steps"
            )

    def warnings(self) -> list[str]:
        return list(self._notes)

    def summary(self) -> dict[str, float]:
        found: dict[str, float] = {f"rank {tap}": rank for tap, rank in self.ranks.items()}
        if self.reads_inputs:
            found["eps"] = self.eps
        if self.validate is not None:
            found |= {f"weight {t}": float(w) for t, w in zip(self.taps, self._combine.weights, strict=True)}
        return found

    # Scoring ---------------------------------------------------------------------------------------------------------

    def _distance(self, tap: str, features: Tensor) -> Tensor:
        """One layer's score (n,)."""
        return self._layers[tap][0].nearest(features)

    def distances(self, features: Tensor, tap: str | None = None) -> Tensor:
        """d_c to every class that has training samples, (N, K'), float64, >= 0; of one layer, the first by default."""
        return self._layers[tap or self.taps[0]][0].all(features)

    def layer_scores(self, seen: Observations) -> Tensor:
        """One score per layer, (N, L), float64, without pre-processing."""
        return torch.stack([self._distance(tap, seen.features[tap]).double() for tap in self.taps], dim=1)

    def _score(self, seen: Observations) -> Tensor:
        return self._combine(self.layer_scores(seen))

    def _score_inputs(self, reader: Taps, x: Tensor) -> Tensor:
        return self._combine(self._moved(reader, x, self.eps))

    def _batched(self, reader: Taps, x: Tensor, eps: float, batch_size: int = 250) -> Tensor:
        return torch.cat([self._moved(reader, x[i : i + batch_size], eps) for i in range(0, len(x), batch_size)])

    def _moved(self, reader: Taps, x: Tensor, eps: float) -> Tensor:
        """Layer scores (n, L) after a step of eps down each layer's own distance."""
        leaf = x.detach().requires_grad_(eps > 0)
        with torch.set_grad_enabled(eps > 0):
            _, features = reader(leaf)
            plain = [self._distance(tap, features[tap]) for tap in self.taps]
        if eps == 0:
            return torch.stack([d.double() for d in plain], dim=1)
        scores = []
        for number, (tap, distance) in enumerate(zip(self.taps, plain, strict=True)):
            (gradient,) = torch.autograd.grad(distance.sum(), leaf, retain_graph=number + 1 < len(plain))
            moved = x - eps * gradient.sign()
            with torch.no_grad():
                _, after = reader(moved.clamp(0, 1) if self.clip else moved)
                scores.append(self._distance(tap, after[tap]).double())
        return torch.stack(scores, dim=1)
