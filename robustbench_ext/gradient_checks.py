"""Do the gradients lead anywhere? Checks of a model that gradient attacks are about to trust, in a few passes.

Zero, exploding and misleading input gradients, layers that round, and an attack with a budget that allows any image.
The signs of masked gradients are those of Athalye et al. (ICML 2018, arXiv 1802.00420) and Carlini et al. (2019, arXiv
1902.06705).
"""

from __future__ import annotations

import re

import numpy as np
import torch
from scipy.special import bdtrc
from torch import Tensor, nn

from robustbench_ext.attacks.losses import margin
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.attacks.threat import flat_norm, per_sample
from robustbench_ext.checks import Check
from robustbench_ext.models.contract import check_logits

MANY, MOST = 0.1, 0.5  # shares of the samples from which on a defect is a doubt, and a failure
_STEPS = (1e-3, 1e-2)  # lengths (L2) of the finite differences; the first that rounding leaves readable counts
_READABLE = 3e-5  # of the largest logit: float32's rounding of a deep network is some 1e-6 of it
_EXPLODING = 1e4  # times the median norm; ordinary networks differ by less than 100 between samples
_SAMPLES = 16  # that the huge budget is tried on
_RARE = 0.01  # what chance alone may do before it counts as evidence

_MASKED = (
    "Gradient attacks see nothing, so their robust accuracy means nothing. Attack the model without that layer, or with "
    "a differentiable stand-in, and with black-box attacks (square)."
)
_SATURATED = (
    "A saturating softmax, often a large temperature on the logits: the cross-entropy is flat where the margin is not. "
    "Use a loss that is blind to scale (loss: margin or dlr, apgd-dlr, apgd-t, standard), or divide the logits."
)


def check_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    """Whether input gradients are finite, not zero, and predict what a small step does.

    Cost: one forward pass, two backward passes (cross-entropy and margin), two more forward passes for the finite
    differences.
    """
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(True)
        logits = check_logits(model(leaf), len(x))
        if not logits.requires_grad:
            return Check(
                "gradients",
                "fail",
                "the outputs do not depend on the inputs in a way that autograd sees",
                "Gradient attacks see nothing: look for .detach(), torch.no_grad(), numpy or a round() in forward.",
            )
        entropy = torch.nn.functional.cross_entropy(logits, y, reduction="sum")
        (of_entropy,) = torch.autograd.grad(entropy, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)
        (of_margin,) = torch.autograd.grad(margin(logits, y).sum(), leaf, allow_unused=True, materialize_grads=True)
    logits = logits.detach()
    if not bool(torch.isfinite(of_entropy).all() and torch.isfinite(of_margin).all()):
        return Check("gradients", "fail", "input gradients hold NaN or infinity", "Attacks cannot follow them.")
    blind, flat = _zero(of_margin), _zero(of_entropy)
    share, n = float(blind.float().mean()), len(x)
    if share > MANY:
        return Check(
            "gradients",
            "fail" if share > MOST else "doubt",
            f"the input gradient is exactly zero for {int(blind.sum())} of {n} samples, whatever the loss: a quantised or "
            f"non-differentiable layer",
            _MASKED,
        )
    saturated = flat & ~blind
    share = float(saturated.float().mean())
    if share > MANY:
        return Check(
            "gradients",
            "fail" if share > MOST else "doubt",
            f"the gradient of the cross-entropy is exactly zero for {int(saturated.sum())} of {n} samples, that of the margin "
            f"is not: the softmax saturates",
            _SATURATED,
        )
    lengths = flat_norm(of_margin, "L2")
    median, largest = float(lengths[~blind].median()), float(lengths.max())
    if largest > _EXPLODING * median:
        return Check(
            "gradients",
            "doubt",
            f"input gradients explode: the largest is {largest / median:.2g} times the median ({median:.2g})",
            "Steps of fixed length then follow noise. Look for a division by something near zero, or a steep function.",
        )
    judged, right = predicts(model, x[~blind], y[~blind], of_margin[~blind], logits[~blind])
    readable, agree = int(judged.sum()), int(right.sum())
    if readable < MOST * len(judged):
        return Check(
            "gradients",
            "doubt",
            f"input gradients vanish: for {len(judged) - readable} of {n} samples a step of length {_STEPS[-1]} along them "
            f"is predicted to change the logits by less than rounding does",
            "Look for saturated activations (sigmoid, tanh), and add black-box attacks (square).",
        )
    if agree < MOST * readable:
        return Check(
            "gradients",
            "doubt",
            f"gradients do not predict the loss: quantisation, straight-through rounding, or a random layer. A small step "
            f"along them changes the margin as predicted for {agree} of {readable} samples",
            _MASKED,
        )
    return Check(
        "gradients",
        "pass",
        f"finite, zero for {int((blind | flat).sum())} of {n} samples; they predict a small step for {agree} of {readable}",
    )


def predicts(model: nn.Module, x: Tensor, y: Tensor, gradient: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each sample's gradient of the margin can be judged, and predicts a small step: two bool (N,).

    The step goes along the gradient, inside the box (a model may clip), and is predicted if the margin changes by half
    to twice of what the gradient says. Cost: two forward passes.
    """
    start, scale = margin(logits, y).double(), logits.abs().amax(dim=1).double().clamp_min(1e-12)
    judged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    right = judged.clone()
    # By the largest entry first: squares of tiny gradients underflow.
    unit = gradient / per_sample(gradient.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo().tiny), gradient)
    unit = unit / per_sample(flat_norm(unit, "L2").clamp_min(1e-12), unit)
    for step in _STEPS:
        moved = (x + step * unit).clamp(0.0, 1.0)
        expected = ((moved.double() - x.double()) * gradient.double()).flatten(1).sum(dim=1)
        with torch.no_grad():
            change = margin(check_logits(model(moved), len(x)), y).double() - start
        fresh = ~judged & (expected > _READABLE * scale)
        right |= fresh & (change > 0.5 * expected) & (change < 2.0 * expected)
        judged |= fresh
    return judged, right


def _zero(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).abs().amax(dim=1) == 0


_QUANTISED_HOMES = ("torch.ao.quantization", "torch.quantization", "torch.ao.nn.", "torch.nn.quantized", "torchao.")
_QUANTISED_NAMES = re.compile(r"(?i)quanti[sz]|fakequant|binari[sz]|discreti[sz]|straightthrough|thermometer|jpeg")
_ROUNDING_NODES = re.compile(r"(Round|Floor|Ceil|Trunc|Sign|Heaviside|Frac)Backward\d*|.*(FakeQuant|Quanti[sz]e).*")
_QUANTISED_TYPES = (torch.int8, torch.qint8, torch.quint8, torch.qint32)


def graph_nodes(model: nn.Module, x: Tensor) -> set[str]:
    """The names of autograd's nodes between the inputs and the logits; empty where it sees no way.

    Cost: one forward pass of one sample.
    """
    with torch.enable_grad():
        logits = check_logits(model(x[:1].clone().requires_grad_(True)), 1)
    names: set[str] = set()
    seen: set[object] = set()
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    return names


def check_layers(model: nn.Module, nodes: set[str]) -> Check:
    """Layers that quantise or cannot be differentiated, by their types, their numbers and autograd's graph. No pass."""
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(_QUANTISED_HOMES) or _QUANTISED_NAMES.search(kind.__name__):
            found.append(f"{kind.__name__} ({name or 'the model itself'})")
    numbers = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found += [f"{v.dtype} numbers ({k})" for k, v in numbers.items() if v.dtype in _QUANTISED_TYPES]
    found += [f"a rounding step ({node})" for node in sorted(nodes) if _ROUNDING_NODES.fullmatch(node)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return Check("layers", "doubt", f"quantised or non-differentiable: {', '.join(found[:3])}{more}", _MASKED)
    return Check("layers", "pass", "none that quantises or rounds is to be seen")


def check_huge_budget(model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, classes: int, seed: int) -> Check:
    """Whether gradients lead from each image to a mistake when any image is allowed (Linf, eps = 1).

    From the image itself: noise would be misclassified without a gradient's help. Cost: on 16 samples, 20 steps on the
    cross-entropy and, for those that stand, 20 on the margin.
    """
    x, y, ids = x[:_SAMPLES], y[:_SAMPLES], ids[:_SAMPLES]
    standing = np.ones(len(x), dtype=bool)
    for loss in ("ce", "margin"):
        rows = torch.from_numpy(standing.nonzero()[0])
        if len(rows):
            attack = PGD(eps=1.0, steps=20, random_start=False, loss=loss)
            result = attack(model, x[rows], y[rows], ids=ids[rows.numpy()], seed=seed)
            standing[standing] = ~result.broken.cpu().numpy()
    left, n = int(standing.sum()), len(x)
    if above_chance(left, y.cpu().numpy(), classes):
        return Check(
            "huge budget",
            "doubt",
            f"accuracy stays at {left} of {n} under a budget that allows any image (PGD, Linf, eps = 1): gradients are masked",
            "An attack that cannot break a model without a bound says nothing at a small one. Look for layers that round, "
            "saturate or detach, and add black-box attacks (square).",
        )
    return Check("huge budget", "pass", f"{left} of {n} samples stand where any image is allowed (PGD, Linf, eps = 1)")


def above_chance(right: int, labels: np.ndarray, classes: int) -> bool:
    """Whether that many correct samples are more than a constant answer would get, by an exact one-sided test (1 %).

    A model that always gives the same answer cannot be broken on the samples whose label that is.
    """
    chance = max(1.0 / classes, float(np.bincount(labels).max()) / len(labels)) if len(labels) else 1.0
    return right > 0 and chance < 1.0 and float(bdtrc(right - 1, len(labels), chance)) < _RARE
