"""The contract between data and models, enforced: raw images in, finite logits out, mode and gradients ours.

Images are float32 (N, C, H, W) in [0, 1]; labels int64 (N,) in 0..K-1; logits (N, K), never probabilities. The
commonest wrong robustness numbers come from breaking one of these in silence, so here each is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustbench_ext.errors import DataError, ModelError

# Where normalised images end up: (0 - mean) / std and (1 - mean) / std of the usual constants.
_IMAGENET_LOW, _IMAGENET_HIGH = -2.118, 2.640


def check_images(x: Tensor, what: str = "inputs") -> None:
    """Raise DataError unless x is a finite float32 (N, C, H, W) tensor in [0, 1], with advice that fits the defect."""
    if not isinstance(x, Tensor):
        raise DataError(f"{what}: got {type(x).__name__}, expected a torch.Tensor of shape (N, C, H, W)")
    if x.ndim != 4:
        raise DataError(f"{what}: shape {tuple(x.shape)}, expected (N, C, H, W). Add the missing axis with x[None].")
    if x.dtype != torch.float32:
        fix = "divide by 255 and call .float()" if not x.is_floating_point() else "call .float()"
        raise DataError(f"{what}: dtype {x.dtype}, expected torch.float32: {fix}")
    if x.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(x))
    if low >= 0.0 and high <= 1.0:
        return
    span = f"{what} span [{low:.4g}, {high:.4g}], expected [0, 1]."
    if not (low == low and high == high):  # NaN compares unequal to itself
        raise DataError(f"{what} hold NaN, expected finite values in [0, 1]. Repair the data before evaluating on it.")
    if low < -0.01 and low >= 1.2 * _IMAGENET_LOW and high <= 1.2 * _IMAGENET_HIGH:
        kind = "ImageNet-normalised" if low < -1.5 or high > 2.0 else "normalised"
        raise DataError(
            f"{span} They look {kind}. Give raw images in [0, 1] and let the model normalise: "
            f"wrap(model, mean=..., std=...), or --mean and --std on the command line."
        )
    if low >= 0.0 and high <= 255.0:
        raise DataError(f"{span} They look like bytes: divide by 255.")
    raise DataError(f"{span} Rescale them, and put any normalisation into the model: wrap(model, mean=..., std=...).")


def check_labels(y: Tensor, num_classes: int, n: int) -> None:
    """Raise DataError unless y is int64 (n,) with values 0..num_classes-1."""
    if y.ndim != 1 or len(y) != n:
        raise DataError(f"labels: shape {tuple(y.shape)}, expected ({n},), one class index per input")
    if y.dtype != torch.int64:
        raise DataError(f"labels: dtype {y.dtype}, expected torch.int64: call .long()")
    if n and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        raise DataError(
            f"labels span {int(y.min())}..{int(y.max())}, but the model has {num_classes} outputs (0..{num_classes - 1}). "
            f"Renumber the labels from 0, or load a model with enough outputs."
        )


def check_logits(logits: object, n: int) -> Tensor:
    """Return logits as a float32 (n, K) tensor; raise ModelError where the model returned something else or NaN."""
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model returned {type(logits).__name__}, expected a tensor of logits (N, K). Wrap it in a module whose "
            f"forward returns only the logits."
        )
    if logits.ndim != 2 or logits.shape[0] != n:
        raise ModelError(f"the model returned shape {tuple(logits.shape)} for {n} inputs, expected ({n}, K)")
    if logits.shape[1] < 2:
        raise ModelError(
            f"the model returned {logits.shape[1]} output, expected K >= 2 logits. For a binary model with one logit z "
            f"return torch.cat([-z, z], dim=1) / 2."
        )
    if asked_later(logits):
        return logits.float()
    # A finite sum means finite terms, and is read faster; a sum that overflows is looked at again.
    bad = None if bool(torch.isfinite(logits.detach().sum())) else ~torch.isfinite(logits).all(dim=1)
    if bad is not None and bool(bad.any()):
        raise ModelError(
            f"the model returned NaN or infinite logits for {int(bad.sum())} of {n} inputs (first: row "
            f"{int(bad.nonzero()[0])}). Check its weights for NaN and its layers for a division by zero or an overflow."
        )
    return logits.float()


_LATER: dict[torch.device, Tensor] | None = None  # whether all outputs so far were finite, on each device


@contextmanager
def finite_later() -> Iterator[None]:
    """Inside the block outputs on a GPU are asked whether they are finite by `ask_if_finite` and at its end, not one by one.

    Every answer waits for the device, which then has nothing to do. On the CPU nothing changes.

    Raises:
        ModelError: at the end of the block, unless it is left by another error.
    """
    global _LATER
    outer = _LATER
    _LATER = {} if outer is None else outer
    try:
        yield
        ask_if_finite()
    finally:
        _LATER = outer


def asked_later(outputs: Tensor) -> bool:
    """Whether these outputs of a model are asked later; then they are remembered."""
    if _LATER is None or outputs.device.type == "cpu":
        return False
    finite = torch.isfinite(outputs.detach()).all()
    _LATER[outputs.device] = _LATER[outputs.device] & finite if outputs.device in _LATER else finite
    return True


def ask_if_finite() -> None:
    """Raise ModelError where outputs since the last time, inside `finite_later`, were not finite."""
    if not _LATER:
        return
    finite = all(bool(answer) for answer in _LATER.values())
    _LATER.clear()
    if not finite:
        raise ModelError(
            "the model returned NaN or infinite outputs for some inputs of a batch. Check its weights for NaN and its layers "
            "for a division by zero or an overflow."
        )


def refuse_probabilities(logits: Tensor) -> None:
    """Raise ModelError where every row is a probability vector: the model ends in a softmax or a sigmoid."""
    if looks_like_probabilities(logits):
        raise ModelError(
            f"the model returns probabilities: all {logits.numel()} outputs lie in [0, 1] and every row sums to 1. Attacks "
            f"and scores need logits; a softmax at the end hides gradients. Remove the last softmax, or return "
            f"torch.log(p) if only probabilities are to be had."
        )


def looks_like_probabilities(logits: Tensor) -> bool:
    """Whether every row lies in [0, 1] and sums to 1 within 1e-3."""
    if logits.numel() == 0:
        return False
    inside = bool((logits >= 0).all()) and bool((logits <= 1).all())
    return inside and bool(((logits.sum(dim=1) - 1).abs() < 1e-3).all())


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """One checked forward pass: finite float32 logits (N, K)."""
    return check_logits(model(x), len(x))


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode and frozen parameters inside the block; every module's own mode and every parameter's own
    `requires_grad` are restored on the way out, also after an error.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
