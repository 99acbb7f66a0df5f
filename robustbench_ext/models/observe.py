"""What the model says of some inputs: logits, and named features in the same forward pass.

Everything that only reads logits or features - metrics, most detectors, most estimators - works on `Observations`,
so they all share one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.errors import ModelError, unknown_name
from robustbench_ext.models.contract import check_images, check_logits, finite_later, frozen_eval

PENULTIMATE = "penultimate"
_LOGITS = "__logits__"


@dataclass(frozen=True)
class Observations:
    """Logits float32 (N, K), labels int64 (N,), features by tap name, each float32 (N, d)."""

    logits: Tensor
    labels: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logits)


class Taps:
    """Reads named features of a module in the same pass as its logits.

    A tap is a module name, `penultimate` (the input of the last linear layer that runs), or, for what happens between
    modules, a node name of torchvision's feature extraction (`get_graph_node_names`). Feature maps (N, F, H, W) are
    averaged over space; anything else is flattened.

    Module names and `penultimate` are read with forward hooks on the very model that is evaluated. Graph nodes need a
    copy traced by torch.fx; its logits are compared with the model's own on the first batch, since tracing ignores
    hooks on the model and patched methods.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        modules = dict(model.named_modules())
        self._hooked_names = [n for n in self.names if n == PENULTIMATE or n in modules]
        self._nodes = [n for n in self.names if n not in self._hooked_names]
        self._extractor = self._trace() if self._nodes else None
        self._compared = False

    def _trace(self) -> nn.Module:
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        try:
            with frozen_eval(self.model):
                _, nodes = get_graph_node_names(self.model)
        except Exception as error:  # torch.fx raises whatever the model's own control flow raises on a proxy
            known = unknown_name("feature tap", self._nodes[0], (m for m, _ in self.model.named_modules() if m))
            raise ModelError(
                f"{known} Only modules can be named: torch.fx cannot trace this model ({error})."
            ) from error
        for name in self._nodes:
            if name not in nodes:
                names = [*nodes, *(m for m, _ in self.model.named_modules() if m)]
                raise ModelError(unknown_name("feature tap", name, names))
        wanted = {name: name for name in self._nodes} | {nodes[-1]: _LOGITS}
        with frozen_eval(self.model):
            extractor: nn.Module = create_feature_extractor(self.model, return_nodes=wanted)
        return extractor

    def __call__(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, K) and the pooled features (N, d) of one batch, in one forward pass.

        They come back to where x is, also with their gradients: what reads them need not know where the model is.
        """
        there = devices.of(self.model, x.device)
        logits, features = self._on_device(x.to(there))
        return logits.to(x.device), {name: feature.to(x.device) for name, feature in features.items()}

    def _on_device(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self._extractor is None:
            return self._read(self.model, x)
        if self._hooked_names:
            # Hooks of modules fire inside the traced copy as well: it calls the same modules.
            logits, found = self._read(self._extractor, x)
        else:
            out = self._extractor.eval()(x)
            logits, found = out[_LOGITS], {n: pooled(out[n]) for n in self._nodes}
        logits = check_logits(logits, len(x))
        if not self._compared:
            own = check_logits(self.model(x), len(x))
            if not torch.allclose(own, logits, rtol=1e-3, atol=1e-4):
                raise ModelError(
                    f"torch.fx traced a model with other outputs than the one to evaluate, so the taps {self._nodes} cannot "
                    f"be read (hooks on the model, or a patched forward?). Name modules instead of graph nodes."
                )
            self._compared = True
        return logits, found

    def _read(self, model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One pass of `model` with hooks on the original's modules."""
        caught: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())
        handles = []

        def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught[PENULTIMATE] = inputs[0]  # the last linear layer to run wins

        for name in self._hooked_names:
            if name == PENULTIMATE:
                linear = (m for m in modules.values() if isinstance(m, nn.Linear))
                handles += [m.register_forward_pre_hook(keep_input) for m in linear]
            else:

                def keep_output(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                    caught[name] = output

                handles.append(modules[name].register_forward_hook(keep_output))
        try:
            out = model(x)
        finally:
            for handle in handles:
                handle.remove()
        logits = check_logits(out[_LOGITS] if isinstance(out, dict) and _LOGITS in out else out, len(x))
        missing = [name for name in self._hooked_names if name not in caught]
        if missing:
            raise ModelError(
                f"feature taps {', '.join(missing)} were not reached by a forward pass. 'penultimate' needs a linear "
                f"last layer; otherwise name a module of the model."
            )
        found = {name: pooled(caught[name]) for name in self._hooked_names}
        return logits, found | {n: pooled(out[n]) for n in self._nodes}


def pooled(feature: Tensor) -> Tensor:
    """A feature as (N, d): the spatial mean of a map (N, F, H, W) (Lee et al. 2018), otherwise flattened."""
    return feature.mean(dim=(2, 3)) if feature.ndim == 4 else feature.flatten(1)


def observe(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    taps: Iterable[str] | Taps = (),
    batch_size: int = 250,
    device: torch.device | str | None = None,
) -> Observations:
    """Read logits and features of all inputs in evaluation mode, batch by batch, without gradients; they lie on the CPU.

    Args:
        model: takes raw images in [0, 1], returns logits.
        x: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,); -1 for outliers.
        taps: names of features, or ready-made `Taps`.
        batch_size: inputs per forward pass; changes speed and memory, not the result beyond rounding.
        device: where the model is; asked of the model by default.
    """
    check_images(x)
    reader = taps if isinstance(taps, Taps) else Taps(model, tuple(taps))
    there = devices.of(model, x.device) if device is None else torch.device(device)
    logits, features = [], {name: [] for name in reader.names}  # type: ignore[var-annotated]
    with torch.no_grad(), frozen_eval(model), devices.float32(), finite_later():
        for start in range(0, len(x), batch_size):
            out, found = reader(devices.send(x[start : start + batch_size], there, copy=True))
            logits.append(out.cpu())
            for name, feature in found.items():
                features[name].append(feature.float().cpu())
    return Observations(torch.cat(logits), labels, {name: torch.cat(parts) for name, parts in features.items()})
