"""May this number be trusted? Checks of a model and its data that take seconds and come with a verdict.

Each check is pass, doubt or fail, with the evidence and a hint. A failed check marks every result of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from scipy.special import bdtrc
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.attacks.base import Attack
from robustbench_ext.attacks.noise import RandomNoise
from robustbench_ext.attacks.pgd import PGD
from robustbench_ext.checks import Check, Status, verdict
from robustbench_ext.data.base import Split
from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.gradient_checks import check_gradients, check_huge_budget, check_layers, graph_nodes
from robustbench_ext.models.black_box import CLIP, FLAT, is_black_box
from robustbench_ext.models.contract import (
    check_images,
    check_labels,
    check_logits,
    frozen_eval,
    looks_like_probabilities,
)
from robustbench_ext.models.wrap import Normalized

PREFLIGHT_VERSION = 6
SAMPLES = 64
CHANCE = 0.01  # level of the test against guessing: so often a model that guesses is taken for one that does not
# That a model has no gradients is no defect of it, and yet what its numbers must be read with.
_BLACK_BOX = Check(
    "gradients",
    "doubt",
    "none: the model gives scores alone (differentiable = False), so attacks that follow gradients are left out for it",
    "Black-box attacks (square, random-noise, spatial) bound its robustness from above only, and loosely: a stronger attack "
    "may break much more.",
)


def preflight(model: nn.Module, split: Split, n: int = SAMPLES, seed: int = 0) -> list[Check]:
    """Check a model against the first n samples of a split.

    Order matters: once the data or the outputs break the contract, the checks that need them are left out.

    Cost: about twenty forward passes and two backward passes of n samples; at most 42 and 40 of 16 samples.

    Raises:
        torch.OutOfMemoryError: n samples do not fit, which is not the model's fault; or what else `device.is_out_of_memory`
            knows.
    """
    x, y = split.images(slice(0, n)), torch.from_numpy(split.labels[:n])
    checks: list[Check] = []

    def attempt(name: str, hint: str, check: Callable[[], Check]) -> bool:
        try:
            checks.append(check())
        except RobustBenchExtError as error:
            checks.append(Check(name, "fail", str(error), hint))
        except (
            Exception,
            SystemExit,
        ) as error:  # the model is foreign code: whatever it raises is a finding, not a crash
            if devices.is_out_of_memory(error):
                raise
            checks.append(Check(name, "fail", f"the model raised {type(error).__name__}: {error}", hint))
        return checks[-1].status != "fail"

    if not attempt("input range", "", lambda: _range(x)):
        return checks
    there = devices.of(model, x.device)
    x, y = x.to(there), y.to(there)
    checks.append(_mode(model))
    blind = is_black_box(model)
    with frozen_eval(model):
        if not attempt("forward pass", _shapes(x), lambda: _forward(model, x)):
            return checks
        if not attempt("in-place changes", "", lambda: _in_place(model, x)):
            return checks
        with torch.no_grad():
            logits = check_logits(model(x), len(x))
        if not attempt("labels", "", lambda: _labels(y, logits)):
            return checks
        attempt("logits", "", lambda: _logits(logits, blind))
        attempt("determinism", "", lambda: _determinism(model, x, logits))
        attempt("batch independence", "", lambda: _batches(model, x, logits))
        attempt("accuracy", "", lambda: _accuracy(logits, y))
        attempt("normalisation", "", lambda: _normalisation(model, x, y, logits))
        nodes: set[str] = set()
        if blind:
            checks.append(_BLACK_BOX)
        else:
            attempt("gradients", "", lambda: check_gradients(model, x, y))
            try:
                nodes = graph_nodes(model, x)
            except (Exception, SystemExit) as error:  # where there is no graph, the gradients' check has said so
                if devices.is_out_of_memory(error):
                    raise
            attempt("layers", "", lambda: check_layers(model, nodes))
    if not any(c.name == "logits" and c.status == "fail" for c in checks):
        ids, classes = split.ids[:n], logits.shape[1]
        if nodes:
            attempt("huge budget", "", lambda: check_huge_budget(model, x, y, ids, classes, seed))
        nothing = RandomNoise(eps=0.0) if blind else PGD(eps=0.0, steps=1)
        attempt("eps = 0", "", lambda: _identity(nothing, model, x, y, ids, seed))
    return checks


# Without these the rest would be nonsense, or every attack would raise: such a model is not evaluated at all.
_REFUSE = ("input range", "forward pass", "labels", "logits", "in-place changes")


def refused(checks: list[Check]) -> bool:
    """Whether a check failed that makes evaluating the model pointless."""
    return any(check.status == "fail" and check.name in _REFUSE for check in checks)


def _range(x: Tensor) -> Check:
    check_images(x)
    low, high = (float(v) for v in torch.aminmax(x))
    if high <= 0.05 or high - low < 0.05:
        return Check(
            "input range",
            "doubt",
            f"inputs span only [{low:.3g}, {high:.3g}]",
            "They look scaled down, for example divided by 255 twice. Budgets assume images that use [0, 1].",
        )
    return Check("input range", "pass", f"float32 in [{low:.3g}, {high:.3g}], shape {tuple(x.shape[1:])}")


def _mode(model: nn.Module) -> Check:
    training = sum(m.training for m in model.modules())
    if training:
        return Check("mode", "pass", "handed over in training mode; evaluated in eval mode and handed back as it was")
    return Check("mode", "pass", "eval mode")


def _shapes(x: Tensor) -> str:
    channels, height, width = x.shape[1:]
    return (
        f"The model must take (N, {channels}, {height}, {width}) and return (N, K). Made for another size or for colour? "
        f"Behind a name such as timm:NAME, #resize=SIDE resizes and #channels=3 repeats the grey channel inside the model; a "
        f"factory of your own can do the same."
    )


def _forward(model: nn.Module, x: Tensor) -> Check:
    with torch.no_grad():
        logits = check_logits(model(x.clone()), len(x))  # what it does to its input is the next question
    return Check("forward pass", "pass", f"finite outputs, {logits.shape[1]} classes")


def _in_place(model: nn.Module, x: Tensor) -> Check:
    given = x.clone()
    with torch.no_grad():
        model(given)
    if not torch.equal(given, x):
        return Check(
            "in-place changes",
            "fail",
            "the model changes its input in place",
            "Attacks would judge other inputs than they return. Work on a copy: x = x.clamp(0, 1) instead of x.clamp_(0, 1).",
        )
    return Check("in-place changes", "pass", "the input is left as it is")


USUAL_NORMALISATIONS = {  # normalisations that people train with
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "MNIST": ((0.1307,), (0.3081,)),
    "Fashion-MNIST": ((0.2860,), (0.3530,)),
    "mean 0.5, std 0.5": ((0.5,), (0.5,)),
}


def _normalisation(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor) -> Check:
    """Compare with other normalisations, and look for two of them."""
    channels = x.shape[1]
    own = x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3)).clamp_min(1e-3)
    candidates: dict[str, Tensor] = {
        "these inputs' own mean and std": (x - own[0].view(1, -1, 1, 1)) / own[1].view(1, -1, 1, 1)
    }
    for name, (mean, std) in USUAL_NORMALISATIONS.items():
        if len(mean) in (1, channels):
            m, s = (torch.tensor(v).view(1, -1, 1, 1).to(x.device) for v in (mean, std))
            candidates[name] = (x - m) / s
    inner = model
    if isinstance(model, Normalized):
        inner = model.inner
        candidates = {"none (mean= and std= left out)": x}
        layers = [
            type(m).__name__
            for m in inner.modules()
            if re.fullmatch(r"Normali[sz](e|ed|er|ation)\w*", type(m).__name__)
        ]
        if layers:
            return Check(
                "normalisation",
                "doubt",
                f"mean and std were given, and the model has a layer {layers[0]} of its own: normalised twice?",
                "If the model normalises its inputs itself, leave out mean= and std=.",
            )
    right = logits.argmax(1) == y
    for name, changed in candidates.items():
        with torch.no_grad():
            other = check_logits(inner(changed), len(x)).argmax(1) == y
        gained, lost = int((other & ~right).sum()), int((right & ~other).sum())
        # McNemar's exact test, one-sided, at a level that allows for all candidates.
        if gained > lost and bdtrc(gained - 1, gained + lost, 0.5) < 0.01 / len(candidates):
            return Check(
                "normalisation",
                "doubt",
                f"with the normalisation '{name}', {int(other.sum())} of {len(y)} samples are correct, not {int(right.sum())}",
                "Check the mean and std that the model was trained with: wrap(model, mean=, std=), or --mean and --std.",
            )
    return Check("normalisation", "pass", f"no other of {len(candidates)} normalisations does better")


def _labels(y: Tensor, logits: Tensor) -> Check:
    check_labels(y, logits.shape[1], len(y))
    top, outputs = int(y.max()) + 1, logits.shape[1]
    if outputs > 2 * max(top, 2) and len(y) >= 2 * top:
        return Check(
            "labels",
            "doubt",
            f"the model has {outputs} outputs, the labels seen end at {top - 1}",
            "Is this the right head, or the right data?",
        )
    return Check("labels", "pass", f"0..{top - 1} of {outputs} outputs")


def _logits(logits: Tensor, blind: bool) -> Check:
    if looks_like_probabilities(logits):
        return Check(
            "logits",
            "fail",
            "the model returns probabilities: every row lies in [0, 1] and sums to 1",
            "Return the logarithm of the probabilities (onnx:FILE#probabilities=true): scores and calibration need logits."
            if blind
            else "Remove the last softmax: it hides gradients from attacks, and energies and calibration need logits.",
        )
    normaliser = torch.logsumexp(logits.double(), dim=1)
    if float(normaliser.abs().max()) < max(FLAT, logits.shape[1] * CLIP):
        remedy = "Take msp or entropy to detect with." if blind else "Return the raw logits."
        return Check(
            "logits",
            "doubt",
            "the model returns log-probabilities: logsumexp is 0 for every input",
            f"Attacks and calibration are right, but energy scores say nothing. {remedy}",
        )
    spread = float((logits.amax(1) - logits.amin(1)).median())
    if spread > 1e3:
        return Check(
            "logits",
            "doubt",
            f"the median spread of the logits is {spread:.3g}",
            "A softmax this saturated has vanishing gradients in float32; look for a temperature in the last layer.",
        )
    return Check("logits", "pass", f"median spread {spread:.3g}")


def _determinism(model: nn.Module, x: Tensor, logits: Tensor) -> Check:
    with torch.no_grad():
        again = check_logits(model(x), len(x))
    gap = float((again - logits).abs().max())
    if gap > 1e-4 * max(1.0, float(logits.abs().max())):
        return Check(
            "determinism",
            "fail",
            f"two passes over the same batch differ by {gap:.3g} in eval mode",
            "The model is randomised (dropout called by hand, random layers), and a plain attack overstates its robustness. "
            "Use the attack `rand` (expectation over transformations), or give other attacks draws: 20.",
        )
    return Check("determinism", "pass", "two passes agree")


def _batches(model: nn.Module, x: Tensor, logits: Tensor) -> Check:
    with torch.no_grad():
        alone = torch.cat([check_logits(model(x[i : i + 1]), 1) for i in range(min(4, len(x)))])
    gap = float((alone - logits[: len(alone)]).abs().max())
    if gap > 1e-3 * max(1.0, float(logits.abs().max())):
        return Check(
            "batch independence",
            "fail",
            f"a sample's logits change by {gap:.3g} with its batch",
            "Some layer uses batch statistics in eval mode (track_running_stats=False?): one sample's attack would "
            "change another's verdict.",
        )
    return Check("batch independence", "pass", "a sample's logits do not depend on its batch")


def _accuracy(logits: Tensor, y: Tensor) -> Check:
    """Exact binomial test, one-sided, against answers that have nothing to do with the labels.

    Those would be right with probability sum_k (share answered k) (share labelled k), as in Cohen's kappa: for a model that
    always answers the same, the share of that class. So a good model of imbalanced classes is not held against the most
    frequent one.
    """
    said, n, k = logits.argmax(1), len(y), logits.shape[1]
    right = int((said == y).sum())
    message = f"{right} of {n} samples correct"
    answered, labelled = (torch.bincount(v.cpu(), minlength=k).double() / n for v in (said, y))
    agreement = float((answered * labelled).sum())
    if int((labelled > 0).sum()) == 1:  # of one class alone a constant answer says nothing
        agreement = 0.0
    chance = max(1 / k, agreement)
    if chance**n >= CHANCE:
        return Check("accuracy", "pass", f"{message}, too few to tell a model from a guess")
    p = float(bdtrc(right - 1, n, chance))
    if p >= CHANCE:
        guess = "any class" if agreement < 1 / k else "as often as it answers each class"
        guess = f"always class {int(said[0])}" if agreement >= 1 / k and float(answered.max()) == 1 else guess
        return Check(
            "accuracy",
            "doubt",
            f"{message}: no better than guessing {guess} ({100 * chance:.3g} % right; exact binomial test, p = {p:.2g}, "
            f"level {CHANCE:g})",
            "Untrained weights, a wrong normalisation (mean, std), a wrong class order or a wrong channel order?",
        )
    return Check("accuracy", "pass", message)


def _identity(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int) -> Check:
    result = attack(model, x, y, ids=ids, seed=seed)
    moved = float((result.x_adv - x).abs().max())
    with torch.no_grad(), frozen_eval(model):
        clean = check_logits(model(x), len(x)).argmax(1) != y
    if moved > 0 or not torch.equal(clean.cpu(), result.broken.cpu()):
        return Check("eps = 0", "fail", "an attack of budget 0 changes verdicts", "Mode or state leaks between passes.")
    return Check("eps = 0", "pass", "an attack of budget 0 is the identity")


__all__ = ["PREFLIGHT_VERSION", "Check", "Status", "preflight", "refused", "verdict"]
