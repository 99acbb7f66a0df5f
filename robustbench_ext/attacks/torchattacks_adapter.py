"""Any attack of the torchattacks package (Kim, arXiv 2010.01950), called by name and verified like ours.

Two things differ from our own attacks. Its random draws come from the global generator, so they are reproducible
for one batch composition but not sample by sample. And some of its attacks minimise the perturbation instead of
obeying a budget: given an `eps`, what they find outside the ball does not count.
"""

from __future__ import annotations

import inspect
import random as python_random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.attacks.base import Attack
from robustbench_ext.attacks.search import Search
from robustbench_ext.attacks.threat import flat_norm, per_sample
from robustbench_ext.errors import ConfigError, MissingExtraError, unknown_name
from robustbench_ext.models.contract import check_logits

INSTALL = "pip install --no-deps torchattacks"
# The norm in which each attack measures its perturbation, where that is not Linf or the user's choice.
_L2 = {"CW", "DeepFool", "EADEN", "EADL1", "PGDL2", "PGDRSL2", "SparseFool"}
_CHOICE = {"APGD", "APGDT", "AutoAttack", "FAB", "Square"}
_FEW_PIXELS = {"JSMA", "OnePixel", "Pixle"}  # bound the number of changed pixels; neither norm is theirs
_NOT_ATTACKS = {"MultiAttack", "VANILA", "LGV"}  # combinations and training recipes: they take more than a model


class _Counted(nn.Module):
    """The model with its passes counted, in eval mode whatever an attack tells it: the mode is the harness's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.forwards = self.backwards = 0
        self.training = False

    def train(self, mode: bool = True) -> _Counted:
        return self

    def forward(self, x: Tensor) -> Tensor:
        logits = check_logits(self.inner(x), len(x))
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random inside the block; restore all three."""
    states = (np.random.get_state(), python_random.getstate())  # noqa: NPY002 - it is the global state that matters
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        python_random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(states[0])  # noqa: NPY002
            python_random.setstate(states[1])


def available() -> list[str]:
    """The attacks that can be called by name; empty where torchattacks is not installed."""
    try:
        import torchattacks
    except ImportError:
        return []
    found = {n for n, c in vars(torchattacks).items() if inspect.isclass(c) and hasattr(c, "set_mode_default")}
    return sorted(found - _NOT_ATTACKS - {"Attack"})


@dataclass(frozen=True, kw_only=True)
class TorchAttacks(Attack):
    """`torchattacks:NAME`.

    Args:
        attack: the class name, such as "CW" or "PGDL2".
        eps: budget; passed on where the attack takes one. Left out, a minimum-norm attack counts at any size.
        norm: by default L2 for the attacks that are made for it, otherwise Linf.
        options: further arguments of the class, such as {"steps": 50}.
    """

    attack: str
    eps: float = float("inf")
    norm: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    name: ClassVar[str] = "torchattacks"
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    access: ClassVar[str] = "various"
    stochastic: ClassVar[bool] = True
    per_sample_draws: ClassVar[bool] = False
    reference: ClassVar[str] = "arXiv 2010.01950"

    def __post_init__(self) -> None:
        own = "L2" if self.attack in _L2 else "Linf"
        if self.norm == "auto":
            object.__setattr__(self, "norm", own)
        if self.norm != own and self.attack not in _CHOICE | _FEW_PIXELS:
            raise ConfigError(
                f"torchattacks:{self.attack} measures its perturbation in {own}, not {self.norm}: with another norm nearly all "
                f"that it finds would lie outside the ball. Use norm: {own}, or another attack."
            )
        if self.attack in _FEW_PIXELS and self.eps != float("inf"):
            raise ConfigError(
                f"torchattacks:{self.attack} changes few pixels by any amount, so no {self.norm} budget is its own. Leave out "
                f"eps, and bound the number of pixels in options."
            )
        if available():
            self._class()
        if self.eps == float("inf"):
            self.threat()
        else:
            super().__post_init__()

    def spec(self) -> dict[str, Any]:
        import importlib.metadata

        values = super().spec()
        if self.eps == float("inf"):
            values["eps"] = None
        try:
            values["torchattacks"] = importlib.metadata.version("torchattacks")
        except importlib.metadata.PackageNotFoundError:
            values["torchattacks"] = None
        return values

    def _class(self) -> Any:
        """The attack's class; a name or an option that does not exist is an error, before anything runs."""
        try:
            import torchattacks
        except ImportError as error:
            raise MissingExtraError(f"torchattacks:{self.attack} needs the package torchattacks: {INSTALL}") from error
        if self.attack not in available():
            raise ConfigError(unknown_name("torchattacks attack", self.attack, available()))
        cls = getattr(torchattacks, self.attack)
        known = inspect.signature(cls).parameters
        for option in self.options:
            if option not in known:
                raise ConfigError(f"torchattacks:{self.attack}: " + unknown_name("option", option, known))
        return cls

    def _make(self, model: nn.Module) -> Any:
        cls = self._class()
        known = inspect.signature(cls).parameters
        options = dict(self.options)
        if "eps" in known and self.eps != float("inf"):
            options["eps"] = self.eps
        if "norm" in known:
            options.setdefault("norm", self.norm)
        return cls(model, **options)

    def _run(self, search: Search) -> None:
        model = _Counted(search.model)
        seed = int(search.random.bits(1)[:, 0].sum()) % 2**31
        with _seeded(seed), torch.enable_grad():
            found = self._make(model)(search.x.clone(), search.y.clone())
        n = len(search.x)
        # Passes are shared out evenly: torchattacks does not say on which sample it spent them.
        search.forwards[search.index] += round(model.forwards / n)
        search.backwards[search.index] += round(model.backwards / n)
        found = torch.nan_to_num(found.detach().float(), nan=-1.0)
        # What misses the ball by rounding is projected; what misses it by more does not count.
        length = flat_norm(found - search.x, self.norm)
        in_box = ((found >= -1e-6) & (found <= 1 + 1e-6)).flatten(1).all(1)
        inside = (length <= self.eps * (1 + 1e-4) + 1e-6) & in_box
        found = torch.where(per_sample(inside, found), search.threat.project(found, search.x), search.x)
        search.submit(found, search.logits(found))
