"""Before anything is measured: is this the model that the test is about? Beyond the preflight, what only a test can know.

A module that is handed over says in which mode it is; and a model that does better on inputs that undo a normalisation is
normalised twice, in its loader or in itself.
"""

from __future__ import annotations

import re

import torch
from scipy.special import bdtrc
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.checks import Check
from robustbench_ext.data.base import CLASSIFICATION, Dataset
from robustbench_ext.models.contract import check_logits, frozen_eval
from robustbench_ext.preflight import USUAL_NORMALISATIONS

SAMPLES = 64
LEVEL = 0.001  # of the one-sided test, for all candidates together
_NORMALISING = re.compile(r"(?i)^(input_?)?normali[sz]\w*$")
_MODAL = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def check_mode(model: nn.Module) -> Check:
    """A module in training mode is not the model that will be deployed; it is evaluated in eval mode, which may hide that.

    Below the module itself only those count that behave otherwise in training: of torch's own that are batch norm, dropout and
    the like. A head that was replaced by `nn.Identity()` after `eval()` does no harm.
    """
    if model.training:
        found = ["the model itself"]
    else:
        modal = [(name, m) for name, m in model.named_modules() if m.training]
        found = [n for n, m in modal if isinstance(m, _MODAL) or not type(m).__module__.startswith("torch.nn.")]
    if not found:
        return Check("mode", "pass", "eval mode")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return Check(
        "mode",
        "fail",
        f"the model was handed over in training mode ({', '.join(found[:3])}{more})",
        "Call model.eval() before handing it over: batch norm and dropout would behave otherwise in use than here.",
    )


def check_normalised_once(model: nn.Module, data: Dataset) -> Check | None:
    """Whether the model does significantly better where one normalisation is undone: x std + mean instead of x.

    Candidates are the usual constants and those that the model's own normalising layers keep as `mean` and `std`. None where
    the data are no images.
    """
    if data.task != CLASSIFICATION:
        return None
    split = data["test"].take(SAMPLES)
    x, y = split.images(slice(None)), torch.from_numpy(split.labels)
    candidates = _candidates(model, x.shape[1])
    with torch.no_grad(), frozen_eval(model):
        right = check_logits(devices.call(model, x), len(x)).argmax(1) == y
        for name, (mean, std) in candidates.items():
            other = check_logits(devices.call(model, x * std + mean), len(x)).argmax(1) == y
            gained, lost = int((other & ~right).sum()), int((right & ~other).sum())
            if gained > lost and bdtrc(gained - 1, gained + lost, 0.5) < LEVEL / len(candidates):
                return Check(
                    "normalisation",
                    "fail",
                    f"normalised twice: with one normalisation undone ({name}), {int(other.sum())} of {len(y)} samples are "
                    f"correct, not {int(right.sum())}",
                    "Inputs are normalised once, inside the model: give images in [0, 1], and leave out one of the layers, or "
                    "mean= and std=.",
                )
    return Check("normalisation", "pass", f"undoing any of {len(candidates)} normalisations does not help")


def _candidates(model: nn.Module, channels: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of mean and std, each (1, C, 1, 1) or (1, 1, 1, 1), by name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (mean, std) in USUAL_NORMALISATIONS.items():
        if len(mean) in (1, channels):
            found[f"{name}"] = (torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1))
    for name, module in model.named_modules():
        pair = [torch.as_tensor(v).detach().flatten() for v in _constants(module)]
        if _NORMALISING.match(type(module).__name__) and len(pair) == 2 and {p.numel() for p in pair} <= {1, channels}:
            found[f"that of {name or 'the model'}"] = (pair[0].view(1, -1, 1, 1), pair[1].view(1, -1, 1, 1))
    return found


def _constants(module: nn.Module) -> list[Tensor]:
    values = [getattr(module, name, None) for name in ("mean", "std")]
    try:
        return [torch.as_tensor(v, dtype=torch.float32, device="cpu") for v in values if v is not None]
    except (TypeError, ValueError, RuntimeError):
        return []
