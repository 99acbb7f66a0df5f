"""Detectors of the pytorch-ood package (Kirchheim, Filax, Ortmeier, CVPRW 2022) by name, as `pytorch-ood:NAME`.

What a detector of theirs asks for is filled in from the model: its logits, the penultimate features, the last layer's
weights; their score is taken as it is (higher = more unknown, as here). Left out is what needs a model cut into pieces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from detectors.base import Detector
from detectors.head import head_of
from robustbench_ext import device as devices
from robustbench_ext.errors import ConfigError, MissingExtraError, unknown_name
from robustbench_ext.models.observe import PENULTIMATE, Observations, Taps

INSTALL = "pip install pytorch-ood"
LEFT_OUT = {
    "Gram": "it needs the model cut into a chain of modules",
    "MultiMahalanobis": "it needs the model cut into a chain of modules; use mahalanobis with layers",
    "MCD": "it draws from the global generator, so its scores would depend on the batch",
    "MCM": "it needs text embeddings",
    "NACUE": "it is fitted with gradients of training inputs",
    "RankFeat": "it needs feature maps, not pooled features",
}
_FAMILIES = ("LogitsDetector", "FeaturesDetector", "FeatureMapsDetector", "GradientDetector")


def available() -> list[str]:
    """The detectors that can be called by name; empty where pytorch-ood is not installed."""
    try:
        import pytorch_ood.detector as theirs
    except ImportError:
        return []
    classes = {n: getattr(theirs, n) for n in theirs.__all__}
    return sorted(n for n, c in classes.items() if inspect.isclass(c) and n not in LEFT_OUT)


class PytorchOOD(Detector):
    """`pytorch-ood:NAME`.

    Args:
        detector: the class name, such as "KNN" or "ViM".
        options: further arguments of the class, such as {"k": 20}; lists become tensors where it wants `weights`.
    """

    name: ClassVar[str] = "pytorch-ood"
    taps = (PENULTIMATE,)
    needs_fit = True
    needs_model = True
    differentiable = False  # most of theirs switch gradients off
    reference: ClassVar[str] = "Kirchheim et al., CVPRW 2022"

    def __init__(self, detector: str, options: Mapping[str, Any] | None = None) -> None:
        known = available()
        if not known:
            raise MissingExtraError(f"pytorch-ood:{detector} needs the package pytorch-ood: {INSTALL}")
        if detector in LEFT_OUT:
            raise ConfigError(f"pytorch-ood:{detector} cannot be called by name: {LEFT_OUT[detector]}")
        if detector not in known:
            raise ConfigError(unknown_name("detector of pytorch-ood", detector, known))
        import pytorch_ood.detector as theirs

        self.detector, self.options = detector, dict(options or {})
        self._class: Any = getattr(theirs, detector)
        self._family = next(c.__name__ for c in self._class.__mro__ if c.__name__ in _FAMILIES)
        self.reads_inputs = self._family == "GradientDetector"
        self._arguments = inspect.signature(self._class).parameters
        free = [a for a in self._arguments if a not in _GIVEN]
        for given in self.options:
            if given not in free and not any(p.kind is p.VAR_KEYWORD for p in self._arguments.values()):
                raise ConfigError(f"pytorch-ood:{detector}: " + unknown_name("option", given, free))
        missing = [a for a in free if self._arguments[a].default is inspect.Parameter.empty and a not in self.options]
        missing = [a for a in missing if self._arguments[a].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if missing:
            raise ConfigError(f"pytorch-ood:{detector}: options lack {', '.join(missing)}")

    def parameters(self) -> dict[str, Any]:
        return {"class": self.detector, "options": self.options, "package": version("pytorch-ood")}

    def _fit(self, train: Observations, model: nn.Module | None) -> None:
        given = {a: make(model, train) for a, make in _GIVEN.items() if a in self._arguments}
        if self._family != "GradientDetector":
            given |= {a: None for a in ("model", "encoder", "backbone") if a in given}
        options = {k: torch.tensor(v) if k == "weights" else v for k, v in self.options.items()}
        self._theirs = self._class(**given, **options)
        features = train.features[PENULTIMATE]
        with torch.no_grad():
            if not self._class.requires_fit:
                return
            if self._family == "LogitsDetector":
                self._theirs.fit_logits(train.logits, train.labels)
            elif self._family == "FeatureMapsDetector":
                self._theirs.fit_feature_maps(features[:, :, None, None], train.labels)
            else:
                self._theirs.fit_features(features, train.labels)

    def _score(self, seen: Observations) -> Tensor:
        features = seen.features[PENULTIMATE]
        with torch.no_grad():
            if self._family == "LogitsDetector":
                scores = self._theirs.predict_logits(seen.logits)
            elif self._family == "FeatureMapsDetector":
                scores = self._theirs.predict_feature_maps(features[:, :, None, None])
            else:
                scores = self._theirs.predict_features(features)
        return torch.as_tensor(scores).detach().cpu()

    def _score_inputs(self, reader: Taps, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.as_tensor(self._theirs.predict(x.to(devices.of(reader.model, x.device)))).detach().cpu()


class _LastLayer(nn.Linear):
    """The last layer as a module that also takes pooled feature maps (n, d, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def _last_layer(model: nn.Module | None, train: Observations) -> nn.Module:
    head = head_of(model, train, "pytorch-ood")
    layer = _LastLayer(head.weight.shape[1], head.weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)
    return layer.requires_grad_(False)


def _encoder(model: nn.Module) -> Callable[[Tensor], Tensor]:
    reader = Taps(model, (PENULTIMATE,))
    return lambda x: reader(x)[1][PENULTIMATE]


# Arguments that are made from the model, by name.
_GIVEN: dict[str, Callable[[Any, Observations], Any]] = {
    "model": lambda model, train: model,
    "encoder": lambda model, train: _encoder(model),
    "backbone": lambda model, train: None,
    "head": _last_layer,
    "w": lambda model, train: head_of(model, train, "pytorch-ood").weight.float(),
    "b": lambda model, train: head_of(model, train, "pytorch-ood").bias.float(),
}
