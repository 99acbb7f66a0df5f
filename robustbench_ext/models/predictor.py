"""Regressors that are no networks: scikit-learn's, and anything with a method `predict`; and how estimators of scikit-learn are
called by name, for classifiers too.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ModelError, unknown_name
from robustbench_ext.models.black_box import one_thread

SKLEARN = "sklearn:"


class Predictor(nn.Module):
    """Anything with `predict((N, d) array) -> (N,)` as a module; float64 (N,), no gradient, one thread."""

    differentiable: ClassVar[bool] = False

    def __init__(self, estimator: Any, said: str) -> None:
        super().__init__()
        self.estimator = estimator
        self.said = said

    def extra_repr(self) -> str:
        return self.said

    def forward(self, x: Tensor) -> Tensor:
        with one_thread():
            out = np.asarray(self.estimator.predict(x.detach().cpu().double().numpy()), dtype=np.float64)
        return torch.from_numpy(np.ascontiguousarray(out)).to(x.device)


class SklearnRegressor(Predictor):
    """A scikit-learn regressor, fitted to a train split: deterministic (random_state = seed, one thread), never pickled.

    Args:
        spec: such as `sklearn:ensemble.RandomForestRegressor`.
        kwargs: of the class; `n_jobs` and `random_state` are set here.
        data: fitted to its train split.
        seed: random_state of the class, if it has one.
    """

    def __init__(self, spec: str, kwargs: Mapping[str, Any], data: Dataset, seed: int) -> None:
        estimator, train = sklearn_estimator(spec, kwargs, seed), data["train"]
        notes = fitted(estimator, spec, train.inputs(slice(None)).double().numpy(), train.labels)
        super().__init__(estimator, f"{spec}, {dict(kwargs)}, seed={seed}, train={train.fingerprint()}")
        self.notes = notes


def sklearn_estimator(spec: str, kwargs: Mapping[str, Any], seed: int, kind: str = "regressor") -> Any:
    """An unfitted estimator of scikit-learn: one thread, `random_state` = seed where it has one.

    Args:
        spec: `sklearn:MODULE.CLASS`; kind: "regressor" or "classifier".

    Raises:
        ModelError: no such class, or no such parameter.
    """
    cls = _sklearn_class(spec, kind)
    try:
        estimator = cls(**kwargs)
    except TypeError as error:
        known = [p for p in inspect.signature(cls).parameters if p not in ("n_jobs", "random_state")]
        given = next((k for k in kwargs if k not in known), None)
        reason = str(error) if given is None else unknown_name("parameter", given, known)
        raise ModelError(f"model '{spec}': {reason}") from error
    fixed = {"random_state": seed, "n_jobs": 1}
    return estimator.set_params(**{k: v for k, v in fixed.items() if k in estimator.get_params(deep=False)})


def fitted(estimator: Any, spec: str, x: np.ndarray, y: np.ndarray) -> tuple[str, ...]:
    """Fit an estimator with one thread; returns its warnings that it has not converged.

    Raises:
        ModelError: fitting failed.
    """
    with one_thread(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            estimator.fit(x, y)
        except Exception as error:  # scikit-learn checks its arguments while it fits
            raise ModelError(f"model '{spec}': fitting failed with {type(error).__name__}: {error}") from error
    return tuple(dict.fromkeys(f"{spec}: {w.message}" for w in caught if "Convergence" in w.category.__name__))


def _sklearn_class(spec: str, kind: str) -> Any:
    """A class of scikit-learn's public modules, and nothing else."""
    path = spec.removeprefix(SKLEARN)
    if re.fullmatch(r"([a-z][a-z0-9_]*\.)+[A-Z]\w*", path):
        module, _, name = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(f"sklearn.{module}"), name, None)
        except ImportError:
            found = None
        # Its home must be scikit-learn, not a module that scikit-learn happens to import.
        if inspect.isclass(found) and found.__module__.startswith("sklearn.") and _is_kind(found, kind):
            return found
    from sklearn.utils import all_estimators

    classes = [cls for _, cls in all_estimators(type_filter=kind)]
    public = [".".join([p for p in c.__module__.split(".")[1:] if p[0] != "_"] + [c.__name__]) for c in classes]
    raise ModelError(f"model '{spec}': " + unknown_name(f"{kind} of scikit-learn", path, public))


def _is_kind(cls: type, kind: str) -> bool:
    from sklearn.base import ClassifierMixin, RegressorMixin

    return issubclass(cls, RegressorMixin if kind == "regressor" else ClassifierMixin) and hasattr(cls, "predict")
