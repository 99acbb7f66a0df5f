"""Quantile aggregation (Fakoor, Kim, Mueller, Smola, Tibshirani, JMLR 24, 2023, arXiv 2103.00083).

1. Stacking. The training part is cut into folds by sample id; every base model is fitted without a fold and predicts it. The
   aggregator learns from these out-of-fold quantiles alone.
2. A fifth of the rows says when to stop, by WIS after the Post operator; then the aggregator is fitted again, on all
   rows, for as many steps.
3. For new samples the base models are fitted on the whole training part. Their quantiles are a little better than those the
   weights were learnt on; that is stacking's price.
4. The Post operator (sorting) makes the quantiles monotone; by option, the calibration split then calibrates every interval.

The paper keeps a separate validation part, whose base quantiles come from models of the whole training part:
`validation="held-out"` does so, and no model then sees those rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from uq.aggregator import Aggregator, Objective, Rows, Shape, fit_aggregator
from uq.conformal import thresholds, widened
from uq.fitting import Fit, Scaling, folds
from uq.isotonic import OPERATORS, operator
from uq.quantile_models import QuantileModel, make_model
from uq.regression import LEVELS, Prediction, RegressionEstimator, Samples, from_quantiles

ModelSpec = str | Mapping[str, Any]

QUICK: tuple[ModelSpec, ...] = ("linear", "forest", "knn", "boosting")
PAPER: tuple[ModelSpec, ...] = ("gaussian", "single-quantile", "multi-quantile", "forest", "extra-trees", "lightgbm")

# The grids of the paper's code; a random search draws from them.
_SEARCH: dict[str, tuple[Any, ...]] = {
    "width": (64, 128),
    "layers": (2, 3),
    "dropout": (0.0, 0.05, 0.1),
    "lr": (1e-3, 5e-4),
    "margin_weight": (0.5, 1.0, 2.0, 5.0, 10.0),
    "margins": (
        *((True, m) for m in (1e-1, 1e-2, 1e-3, 1e-4)),
        *((False, m) for m in (1e-4, 1e-3, 5e-3, 7.5e-3, 9.9e-3)),
    ),
}


@dataclass(frozen=True)
class Settings:
    """One setting of the aggregator."""

    shape: Shape
    objective: Objective
    fit: Fit

    def drawn(self, random: np.random.Generator) -> Settings:
        """A setting of the search grid; what the grid does not name stays."""
        pick = {name: values[int(random.integers(len(values)))] for name, values in _SEARCH.items()}
        adaptive, margin = pick["margins"]
        return Settings(
            replace(self.shape, width=pick["width"], layers=pick["layers"], dropout=pick["dropout"]),
            replace(self.objective, margin_weight=pick["margin_weight"], margin=margin, adaptive=adaptive),
            replace(self.fit, lr=pick["lr"]),
        )


def out_of_fold(
    models: Sequence[ModelSpec], x: np.ndarray, y: np.ndarray, levels: np.ndarray, fold: np.ndarray, seed: int
) -> np.ndarray:
    """Quantiles (n, p, m) of every row by models of that spec that were fitted without the row's fold (n,)."""
    out = np.empty((len(y), len(models), len(levels)))
    for k in np.unique(fold):
        away = fold == k
        for j, spec in enumerate(models):
            out[away, j] = make_model(spec).fit(x[~away], y[~away], levels, seed).quantiles(x[away])
    return out


class QuantileAggregation(RegressionEstimator):
    """Several quantile models, weighted by a network of x. It does not look at the regressor's prediction.

    Args:
        models: names of `uq.quantile_models.MODELS` or mappings {"name": ..., options}. The default `QUICK` is chosen for
            speed: seconds to half a minute for up to some thousand samples. `PAPER` are the six of the paper.
        resolution, local: which weights, see `uq.aggregator.Shape`; "fine" and local is deep quantile aggregation.
        width, layers, dropout, diagonal: further options of `Shape`.
        margin_weight, margin, adaptive, inside: of `uq.aggregator.Objective`.
        lr, weight_decay, steps, batch, patience: of `uq.fitting.Fit`.
        stacking: "out-of-fold"; or "in-sample", which fits the weights on what the models say of their own training samples:
            a fault, kept to show what it does.
        folds: of the stacking.
        validation: "out-of-fold" or "held-out", see above.
        search: random settings tried beside the given one, the best by validation WIS is kept; the paper's code tries 20.
        post: operator on the aggregate; one of `uq.isotonic.OPERATORS`.
        levels: levels beside LEVELS that the models and the aggregate work at, such as 0.01 .. 0.99 in the paper.
        conformal: calibrate every interval on the calibration split, which is not looked at otherwise.

    Raises:
        ConfigError: an option is unknown, or there is no model.
    """

    name: ClassVar[str] = "quantile-aggregation"
    version: ClassVar[int] = 2
    reference: ClassVar[str] = "arXiv 2103.00083"

    def __init__(
        self,
        models: Sequence[ModelSpec] = QUICK,
        resolution: str = "fine",
        local: bool = True,
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
        diagonal: float = 4.0,
        margin_weight: float = 1.0,
        margin: float = 1e-3,
        adaptive: bool = False,
        inside: str = "none",
        lr: float = 1e-3,
        weight_decay: float = 1e-7,
        steps: int = 3000,
        batch: int | None = None,
        patience: int = 500,
        stacking: str = "out-of-fold",
        folds: int = 5,
        validation: str = "out-of-fold",
        search: int = 0,
        post: str = "sort",
        levels: Sequence[float] = (),
        conformal: bool = False,
    ) -> None:
        self.models = [spec if isinstance(spec, str) else dict(spec) for spec in models]
        if not self.models:
            raise ConfigError("quantile-aggregation: name at least one model, such as models=['linear', 'forest']")
        for spec in self.models:
            make_model(spec)  # a wrong name or option fails here, not in the run
        for what, value, known in (
            ("stacking", stacking, ("out-of-fold", "in-sample")),
            ("validation", validation, ("out-of-fold", "held-out")),
            ("post", post, OPERATORS),
        ):
            if value not in known:
                raise ConfigError(f"quantile-aggregation: {what} must be one of {', '.join(known)}, got {value!r}")
        self.settings = Settings(
            Shape(resolution, local, width, layers, dropout, diagonal),
            Objective(margin_weight, margin, adaptive, inside),
            Fit(lr, weight_decay, steps, batch, patience=patience),
        )
        self.stacking, self.folds, self.validation, self.search = stacking, folds, validation, search
        self.post, self.further, self.conformal = post, [float(level) for level in levels], conformal
        self.levels = np.array(sorted({*LEVELS, *(round(level, 6) for level in self.further)}))

    def parameters(self) -> dict[str, Any]:
        settings = {**asdict(self.settings.shape), **asdict(self.settings.objective), **asdict(self.settings.fit)}
        own = ("models", "stacking", "folds", "validation", "search", "post", "conformal")
        return {**settings, **{name: getattr(self, name) for name in own}, "levels": self.further}

    # Fitting ---------------------------------------------------------------------------------------------------------

    def _fit(self, train: Samples, calibration: Samples, model: nn.Module | None, seed: int) -> None:
        assert train.y is not None and calibration.y is not None  # noqa: S101 - checked by fit
        held = folds(len(train), 5, seed, train.ids, "aggregation-validation") == 0
        part = train.take(~held) if self.validation == "held-out" else train
        assert part.y is not None  # noqa: S101 - train has targets
        self._x, self._y = Scaling(part.x), Scaling(part.y)
        self._base: list[QuantileModel] = [make_model(s).fit(part.x, part.y, self.levels, seed) for s in self.models]
        if self.stacking == "in-sample":
            base = self._quantiles(part.x)
        else:
            base = out_of_fold(
                self.models, part.x, part.y, self.levels, folds(len(part), self.folds, seed, part.ids), seed
            )
        rows = self._rows(part.x, part.y, base)
        if self.validation == "held-out":
            away = train.take(held)
            assert away.y is not None  # noqa: S101 - train has targets
            validation = self._rows(away.x, away.y, self._quantiles(away.x))
            self._weights, self.best_steps, self.validation_wis = self._searched(rows, validation, seed)[:3]
        else:
            mask = torch.from_numpy(held)
            found = self._searched(rows[~mask], rows[mask], seed)
            _, self.best_steps, self.validation_wis, settings = found
            again = replace(settings.fit, steps=self.best_steps)
            self._weights = fit_aggregator(
                rows, self._tensor_levels(), settings.shape, settings.objective, again, seed
            )[0]
        self._weights = self._weights.double()
        self._model_weights = self._shares(torch.from_numpy(self._x.to(train.x)))
        self._moves: np.ndarray | None = None
        if self.conformal:
            quantiles = self._predict(calibration, None, seed).quantiles
            assert quantiles is not None  # noqa: S101 - from_quantiles makes them
            self._moves = thresholds(calibration.y, quantiles)

    def _searched(self, rows: Rows, validation: Rows, seed: int) -> tuple[Aggregator, int, float, Settings]:
        """The best of the given setting and of `search` random ones, by validation WIS; the first of equals."""
        random = np.random.default_rng(seed)
        tried = [self.settings, *(self.settings.drawn(random) for _ in range(self.search))]
        best: tuple[Aggregator, int, float, Settings] | None = None
        for s in tried:
            made = fit_aggregator(
                rows, self._tensor_levels(), s.shape, s.objective, s.fit, seed, validation=validation, post=self.post
            )
            if best is None or made[2] < best[2]:
                best = (*made, s)
        assert best is not None  # noqa: S101 - the given setting was tried
        return best

    def _tensor_levels(self) -> Tensor:
        return torch.as_tensor(self.levels, dtype=torch.float32)

    def _quantiles(self, x: np.ndarray) -> np.ndarray:
        return np.stack([model.quantiles(x) for model in self._base], axis=1)

    def _rows(self, x: np.ndarray, y: np.ndarray, base: np.ndarray) -> Rows:
        parts = (self._x.to(x), self._y.to(y), self._y.to(base))
        return Rows(*(torch.as_tensor(part, dtype=torch.float32) for part in parts))

    # Predicting ------------------------------------------------------------------------------------------------------

    def _predict(self, samples: Samples, model: nn.Module | None, seed: int) -> Prediction:
        x, base = torch.from_numpy(self._x.to(samples.x)), torch.from_numpy(self._quantiles(samples.x))
        raw = self._weights.predict(x, base)
        made = from_quantiles(operator(self.post, torch.from_numpy(self.levels))(raw).numpy()[:, self._columns()])
        if self._moves is not None and made.quantiles is not None:
            made = widened(made.quantiles, self._moves)
        given = raw[:, self._columns()]  # crossing is told of LEVELS, whatever levels stand between them
        return replace(made, crossed=(given.diff(dim=1) < 0).sum(1).numpy())

    def _columns(self) -> np.ndarray:
        return np.searchsorted(self.levels, LEVELS)

    def _shares(self, x: Tensor) -> np.ndarray:
        """Mean share of every base model (p,), over samples x (N, d) and levels."""
        with torch.no_grad():
            w = torch.cat([self._weights.weights(part).flatten(1).mean(0, keepdim=True) for part in x.split(512)])
        p, form = len(self.models), self._weights.form
        w = w.mean(0).view(form)
        share = w if w.ndim == 1 else w.sum(-1) if w.ndim == 2 else w.sum((0, 2))
        return np.asarray((share / share.sum()).numpy()).reshape(p)

    def warnings(self) -> list[str]:
        found = []
        if self.stacking == "in-sample":
            found.append(
                "weights were fitted on in-sample predictions: they favour whichever model remembers its data best"
            )
        if self._moves is not None and not np.isfinite(self._moves).all():
            found.append("the calibration split is too small for every nominal coverage: some intervals are infinite")
        return found

    def summary(self) -> dict[str, float]:
        names = [spec if isinstance(spec, str) else str(spec["name"]) for spec in self.models]
        shares = {f"weight of {name} ({j + 1})": float(self._model_weights[j]) for j, name in enumerate(names)}
        return {"steps": float(self.best_steps), "validation WIS, standard units": self.validation_wis, **shares}
