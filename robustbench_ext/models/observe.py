"""What the model says of some inputs: logits, and named features in the same forward pass.

Everything that only reads logits or features - metrics, most detectors, most estimators - works on `Observations`,
so they all share one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ModelError, unknown_name
from robustbench_ext.models.contract import check_images, check_logits, frozen_eval

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

    A tap is a node name of torchvision's feature extraction (`get_graph_node_names`), a module name, or
    `penultimate`: the input of the last linear layer. Feature maps (N, F, H, W) are averaged over space; anything
    else is flattened. Models that torch.fx cannot trace are read with forward hooks, where only module names and
    `penultimate` exist.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self._extractor: nn.Module | None = None
        if self.names:
            self._extractor = self._trace()

    def _trace(self) -> nn.Module | None:
        from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

        try:
            with frozen_eval(self.model):
                tracer = NodePathTracer()
                graph = tracer.trace(self.model)
                paths: dict[str, str] = {node.name: path for node, path in tracer.node_to_qualname.items()}
        except Exception:  # torch.fx raises whatever the model's own control flow raises on a proxy
            return None
        output = next(node for node in graph.nodes if node.op == "output")
        if len(output.all_input_nodes) != 1:
            return None
        wanted: dict[str, str] = {paths[output.all_input_nodes[0].name]: _LOGITS}
        for name in self.names:
            if name == PENULTIMATE:
                modules = dict(self.model.named_modules())
                linear = [
                    n
                    for n in graph.nodes
                    if n.op == "call_module" and isinstance(modules.get(str(n.target)), nn.Linear)
                ]
                if not linear:
                    return None
                source = linear[-1].all_input_nodes[0]
                if source.op == "placeholder":
                    raise ModelError(
                        "the model has no layer before its last linear layer, hence no 'penultimate' features. "
                        "Leave out detectors that need them, or name a tap."
                    )
                wanted[paths[source.name]] = name
            else:
                matches = [path for path in paths.values() if path == name or path.startswith(f"{name}.")]
                if not matches:
                    raise ModelError(unknown_name("feature tap", name, paths.values()))
                wanted[matches[-1]] = name
        if len(wanted) != len(self.names) + 1:
            return None  # two taps on one node: the extractor's keys would collide, hooks do not
        with frozen_eval(self.model):
            extractor: nn.Module = create_feature_extractor(self.model, return_nodes=wanted)
        return extractor

    def __call__(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (N, K) and the pooled features (N, d) of one batch, in one forward pass."""
        if not self.names:
            return check_logits(self.model(x), len(x)), {}
        if self._extractor is not None:
            out = self._extractor.eval()(x)
            return check_logits(out[_LOGITS], len(x)), {name: pooled(out[name]) for name in self.names}
        return self._hooked(x)

    def _hooked(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        caught: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())
        handles = []

        def keep_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught[PENULTIMATE] = inputs[0]  # the last linear layer to run wins

        for name in self.names:
            if name == PENULTIMATE:
                for module in modules.values():
                    if isinstance(module, nn.Linear):
                        handles.append(module.register_forward_pre_hook(keep_input))
            elif name in modules:

                def keep_output(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                    caught[name] = output

                handles.append(modules[name].register_forward_hook(keep_output))
            else:
                raise ModelError(unknown_name("feature tap", name, (m for m in modules if m)))
        try:
            logits = check_logits(self.model(x), len(x))
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.names if name not in caught]
        if missing:
            raise ModelError(
                f"feature taps {', '.join(missing)} were not reached by a forward pass. 'penultimate' needs a linear "
                f"last layer; otherwise name a module of the model."
            )
        return logits, {name: pooled(caught[name]) for name in self.names}


def pooled(feature: Tensor) -> Tensor:
    """A feature as (N, d): the spatial mean of a map (N, F, H, W) (Lee et al. 2018), otherwise flattened."""
    return feature.mean(dim=(2, 3)) if feature.ndim == 4 else feature.flatten(1)


def observe(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    taps: Iterable[str] | Taps = (),
    batch_size: int = 250,
    device: torch.device | str = "cpu",
) -> Observations:
    """Read logits and features of all inputs in evaluation mode, batch by batch, without gradients.

    Args:
        model: takes raw images in [0, 1], returns logits.
        x: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,); -1 for outliers.
        taps: names of features, or ready-made `Taps`.
        batch_size: inputs per forward pass; changes speed and memory, not the result beyond rounding.
    """
    check_images(x)
    reader = taps if isinstance(taps, Taps) else Taps(model, tuple(taps))
    logits, features = [], {name: [] for name in reader.names}  # type: ignore[var-annotated]
    with torch.no_grad(), frozen_eval(model):
        for start in range(0, len(x), batch_size):
            out, found = reader(x[start : start + batch_size].to(device))
            logits.append(out.cpu())
            for name, feature in found.items():
                features[name].append(feature.float().cpu())
    return Observations(torch.cat(logits), labels, {name: torch.cat(parts) for name, parts in features.items()})
