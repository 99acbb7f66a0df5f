"""What a model cannot be asked, and what is said of it in the results.

A model that gives scores alone (`models.black_box`) has no gradients and no features. An attack that follows gradients would
find none, break nothing, and look like robustness; so it is left out for that model. An ensemble is left out as a whole: its
black-box members alone are another protocol than the one that it stands for. A network that does not end in a linear layer has
no `penultimate` features, and neither has an ensemble of networks: those of one member are not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from robustbench_ext.conditions import Condition, UnderAttack
from robustbench_ext.doubts import access_of
from robustbench_ext.models.black_box import is_black_box
from robustbench_ext.models.observe import PENULTIMATE
from robustbench_ext.probes import Probe
from robustbench_ext.validation import condition_of

GRADIENTS, FEATURES = "gradients", "features"
BLACK_BOX_ATTACKS = ("square", "random-noise", "spatial")  # of ours, to name instead


def lacks(model: nn.Module) -> frozenset[str]:
    """What cannot be had of a model: gradients, features, or the penultimate ones alone."""
    if is_black_box(model):
        return frozenset({GRADIENTS, FEATURES, PENULTIMATE})
    if any(getattr(module, "in_parts", False) for module in model.modules()):
        return frozenset({FEATURES, PENULTIMATE})
    linear = any(isinstance(module, nn.Linear) for module in model.modules())
    own = all(getattr(module, "has_penultimate", True) for module in model.modules())
    return frozenset() if linear and own else frozenset({PENULTIMATE})


def lacks_by_design(architecture: Any) -> frozenset[str]:
    """The same of a model that the run trains or makes, and that need not be there yet: only ensembles lack anything."""
    return frozenset({PENULTIMATE}) if getattr(architecture, "spec", None) == "ensemble" else frozenset()


def why_not(part: Condition | Probe, lacking: frozenset[str]) -> str:
    """Why a condition or a probe cannot be had of a model that lacks these; empty where it can."""
    if isinstance(part, Condition):
        return _why_no_attack(part) if part.needs_gradient and GRADIENTS in lacking else ""
    taps = part.taps()
    if PENULTIMATE in taps and PENULTIMATE in lacking:
        return "reads penultimate features"
    if taps and FEATURES in lacking:
        return "reads features"
    if part.needs_gradient and GRADIENTS in lacking:
        return "follows gradients"
    chosen_on = None if part.validate is None else condition_of(part.validate)
    return "chooses on inputs made by gradient" if chosen_on is not None and why_not(chosen_on, lacking) else ""


def note(model: str, lacking: frozenset[str], conditions: Sequence[Condition], probes: Sequence[Probe]) -> str:
    """What was left out for a model that lacks something, why, and which attacks remain; empty where nothing was left out."""
    left = [f"{c.label} ({why})" for c in conditions if (why := why_not(c, lacking))]
    left += [f"{p.kind} {p.label} ({why})" for p in probes if (why := why_not(p, lacking))]
    if GRADIENTS not in lacking:
        what = f"{model} has no last linear layer of its own, whose inputs are the penultimate features"
        return (
            f"{what}. Left out for it: {'; '.join(left)}. A probe that takes layers can read others by name"
            if left
            else ""
        )
    remain = [c.label for c in conditions if c.kind == "attack" and not why_not(c, lacking)]
    attacked = (
        f"Attacks that remain: {', '.join(remain)}; they bound its robustness from above only, and loosely"
        if remain
        else f"No attack remains, so nothing is said of its robustness to one: add {', '.join(BLACK_BOX_ATTACKS)}"
    )
    out = "; ".join(left) or "nothing"
    return f"{model} gives scores alone, no gradients and no features. Left out for it: {out}. {attacked}"


def _why_no_attack(condition: Condition) -> str:
    parts = getattr(condition.attack, "attacks", ()) if isinstance(condition, UnderAttack) else ()
    blind = [part.name for part in parts if "white" not in access_of(part)]
    if blind:
        return (
            f"{len(parts) - len(blind)} of its {len(parts)} members follow gradients, and {', '.join(blind)} alone is no "
            f"verdict of the ensemble: name the attack {blind[0]} for that"
        )
    return "follows gradients"
