"""Several networks as one: the logarithm of their weighted mean probability, with a gradient.

    log p(y | x) = log sum_i w_i softmax(z_i(x))_y,   w_i >= 0, sum_i w_i = 1

An attack on one member leaves the others untouched, so what remains of the ensemble's accuracy under it is no robustness of the
ensemble. As one network it is attacked as one network. Probabilities are averaged, not logits: a mean of logits is a product of
experts, in which one sure member outvotes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, ModelError, unknown_name

_TOLD = ("spec", "shape", "num_classes", "mean", "std", "kwargs")  # of a member's architecture


class Ensemble(nn.Module):
    """Logits log p (N, K): probabilities of the mixture, in logarithms, so that nothing is lost where they are small.

    Args:
        members: networks of the same inputs and classes; kept as they are.
        weights: one for each, >= 0, scaled to the sum 1; equal by default.

    Raises:
        ModelError: no members, or weights that are none.
    """

    weights: Tensor
    # Its last linear layer is that of its last member, whose features are not the ensemble's.
    has_penultimate: ClassVar[bool] = False

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        if not len(members):
            raise ModelError("ensemble: no members; expected at least one network")
        given = torch.ones(len(members)) if weights is None else torch.as_tensor(weights)
        told = given.detach().double().cpu()
        if told.shape != (len(members),) or not bool((told >= 0).all()) or not 0 < float(told.sum()) < float("inf"):
            raise ModelError(
                f"ensemble: weights = {told.tolist()} for {len(members)} members; expected one each, >= 0, and not all 0"
            )
        self.members = nn.ModuleList(members)
        self.register_buffer("weights", (told / told.sum()).float())

    def forward(self, x: Tensor) -> Tensor:
        log_p = torch.stack([member(x).log_softmax(dim=1) for member in self.members])  # (M, N, K)
        mixed: Tensor = (log_p + self.weights.log()[:, None, None]).logsumexp(dim=0)
        return mixed


def ensemble(
    in_channels: int,
    num_classes: int,
    image_size: int,
    members: Sequence[Mapping[str, Any]] = (),
    weights: Sequence[float] | None = None,
) -> nn.Module:
    """`ensemble`: see `Ensemble`. Weights of the members come with a checkpoint; fresh ones differ from member to member.

    Args:
        members: an architecture each: `spec`, and what of `kwargs`, `mean`, `std` it needs; `shape` and `num_classes` are the
            ensemble's.
        weights: of the mixture.
    """
    from robustbench_ext.models.loading import load_model

    if not members:
        raise ConfigError(
            "ensemble: members are missing: kwargs: {members: [{spec: small-cnn}, {spec: small-resnet}]}. A suite makes one of "
            "trained models: make: {name: ensemble, of: [a, b]}"
        )
    first = int(torch.randint(2**31, ()))  # of the seed that the caller has set
    built = []
    for number, member in enumerate(members):
        told = {"spec": member} if isinstance(member, str) else dict(member)
        for key in told:
            if key not in _TOLD:
                raise ConfigError(f"ensemble: member {number + 1}: {unknown_name('key', key, _TOLD)}")
        if "spec" not in told:
            raise ConfigError(f"ensemble: member {number + 1} = {told}: spec is missing, such as spec: small-cnn")
        shape = tuple(told.pop("shape", None) or (in_channels, image_size, image_size))
        classes = told.pop("num_classes", None) or num_classes
        spec = str(told.pop("spec"))
        built.append(load_model(spec, shape=shape, num_classes=classes, seed=first + number, **told).module)
    return Ensemble(built, weights)
