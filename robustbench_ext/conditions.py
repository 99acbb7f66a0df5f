"""Conditions: which inputs the model meets. Clean, attacked, corrupted, or from outside the classes altogether.

Only attacks need the model. A condition knows its label (what reports call it) and its spec (all that its inputs
depend on, for the key).
"""

from __future__ import annotations

import importlib.util
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from robustbench_ext.attacks.adaptive import Adaptive, Scorer
from robustbench_ext.attacks.base import Attack, Passes, build_attack
from robustbench_ext.catalog import ATTACKS, CORRUPTIONS, OUTLIERS
from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.corruptions.levels import EXTRA, FIFTEEN, LEVELS
from robustbench_ext.data.loading import load_dataset
from robustbench_ext.data.outliers import DISTANCE, from_dataset
from robustbench_ext.doubts import access_of
from robustbench_ext.errors import ConfigError, DataError, ThreatModelError, unknown_name
from robustbench_ext.named_data import names_dataset
from robustbench_ext.numbers import format_number, parse_number
from robustbench_ext.own import ORIGIN
from robustbench_ext.probes import CLASSIFIER
from robustbench_ext.randomness import SampleRandom


@dataclass(frozen=True)
class Inputs:
    """What a condition made of a batch: inputs (n, C, H, W) and per-sample columns for the record."""

    x: Tensor
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class Condition(ABC):
    """A condition with its label.

    Attributes:
        only: the models that it is for; all of them where it is empty.
    """

    label: str
    only: tuple[str, ...] = field(default=(), kw_only=True)
    kind: ClassVar[str]

    def samples(self, data: Dataset, split: str, n: int | None, seed: int = 0) -> Split:
        """The samples that this condition shows to the model."""
        return data[split].take(n)

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """All that the inputs depend on, besides the samples, the model and the seed."""

    @abstractmethod
    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        """Make the inputs of some samples; `clean` holds the model's logits at x where they are known."""

    def cost(self, outputs: int) -> Passes | None:
        """Passes per sample that making the inputs takes at most, of a model with so many outputs; None where unknown."""
        return Passes(0, 0)

    def facts(self) -> dict[str, Any]:
        """What results say of the condition, beside its label and kind."""
        return {}

    @property
    def own_samples(self) -> bool:
        """Whether it shows other samples than the split's first n."""
        return False

    @property
    def needs_gradient(self) -> bool:
        """Whether its inputs are made by following gradients of the model."""
        return False

    @property
    def against(self) -> str | None:
        """The label of the probe that its inputs are made against, if any."""
        return None

    @property
    def whole(self) -> bool:
        """Whether it needs all samples at once, so that they are one chunk."""
        return False

    @property
    def batch_dependent(self) -> bool:
        """Whether the inputs depend on how samples are batched, so that the key must name the batch size."""
        return False


@dataclass(frozen=True)
class Clean(Condition):
    """The samples as they are."""

    kind: ClassVar[str] = "clean"

    def spec(self) -> dict[str, Any]:
        return {"condition": "clean"}

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        return Inputs(x, {})


@dataclass(frozen=True)
class UnderAttack(Condition):
    """The samples under an attack on the model itself."""

    attack: Attack
    kind: ClassVar[str] = "attack"

    def spec(self) -> dict[str, Any]:
        return {"condition": "attack", **self.attack.spec()}

    def cost(self, outputs: int) -> Passes | None:
        return self.attack.cost(outputs)

    def facts(self) -> dict[str, Any]:
        spec = self.attack.spec()
        name = f"{self.attack.name}:{spec['attack']}" if spec["attack"] != self.attack.name else self.attack.name
        known = {"norm", "eps", "attack", "version"}
        return {
            "attack": name,
            **({"origin": self._origin} if self._origin else {}),
            "norm": spec["norm"],
            "eps": spec["eps"],
            "members": list(self.attack.members),
            "minimum_norm": self.attack.keep == "norm" and spec["eps"] is None,
            "parameters": {k: v for k, v in spec.items() if k not in known},
        }

    @property
    def _origin(self) -> str:
        """The file and class of an attack of the user's own; empty of ours."""
        return str(getattr(self.attack, ORIGIN, ""))

    @property
    def needs_gradient(self) -> bool:
        return "white" in access_of(self.attack)

    @property
    def batch_dependent(self) -> bool:
        return not self.attack.per_sample_draws

    @property
    def whole(self) -> bool:
        return self.attack.whole

    @property
    def against(self) -> str | None:
        against = getattr(self.attack, "against", None)
        return None if against == CLASSIFIER else against

    def bind(self, scorer: Scorer) -> UnderAttack:
        """The condition with the probe that it is to evade."""
        return replace(self, attack=replace(self.attack, scorer=scorer))  # type: ignore[call-arg]

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        try:
            result = self.attack(model, x, y, ids=ids, seed=seed, clean_logits=clean, batch_size=batch_size)
        except ThreatModelError as error:
            raise ThreatModelError(f"{self._origin}: {error}" if self._origin else str(error)) from error
        columns = {
            "broken": result.broken.cpu().numpy(),
            "norm": result.norms.cpu().numpy(),
            "forwards": result.forwards.cpu().numpy(),
            "backwards": result.backwards.cpu().numpy(),
            "broken_by": result.broken_by.cpu().numpy(),
            "reached": result.reached.cpu().numpy(),
            "late_gain": result.late_gain.cpu().numpy(),
            **{name: column.cpu().numpy() for name, column in result.extra.items()},
        }
        return Inputs(result.x_adv.cpu(), columns)


@dataclass(frozen=True)
class Corrupted(Condition):
    """The samples under a corruption.

    `levels` says whose severities, "imagenet-c" or "cifar-c"; None decides by the images' size, which the samples fix.
    """

    name: str
    severity: int
    levels: str | None = None
    kind: ClassVar[str] = "corruption"

    def spec(self) -> dict[str, Any]:
        version = CORRUPTIONS.load(self.name).version
        return {
            "condition": "corruption",
            "name": CORRUPTIONS.label(self.name),
            "severity": self.severity,
            "levels": self.levels or "by size",
            "version": version,
        }

    def facts(self) -> dict[str, Any]:
        shown = CORRUPTIONS.label(self.name)
        origin = {"origin": self.name} if shown != self.name else {}
        return {"corruption": shown, "severity": self.severity, "levels": self.levels or "by size", **origin}

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        random = SampleRandom.of(seed, ids, f"corruption/{CORRUPTIONS.label(self.name)}")
        return Inputs(CORRUPTIONS.load(self.name)(x, self.severity, random, self.levels), {})


@dataclass(frozen=True)
class PublishedCorruption(Condition):
    """The corrupted images of a published benchmark, from its folder in $RBX_DATA: nothing is made, all is read.

    `source` is "cifar-c" (CIFAR-10-C or CIFAR-100-C, whichever the suite's data is) or "imagenet-c".
    """

    source: str
    name: str
    severity: int
    kind: ClassVar[str] = "corruption"

    @property
    def own_samples(self) -> bool:
        return True

    def samples(self, data: Dataset, split: str, n: int | None, seed: int = 0) -> Split:
        from robustbench_ext.data.published import cifar_c, imagenet_c

        if self.source == "cifar-c":
            return cifar_c(data["test"].take(n), self.name, self.severity)
        return imagenet_c(self.name, self.severity, classes=data.classes, clean=data["test"]).take(n)

    def spec(self) -> dict[str, Any]:
        return {"condition": "published corruption", "of": self.source, "name": self.name, "severity": self.severity}

    def facts(self) -> dict[str, Any]:
        return {"corruption": self.name, "severity": self.severity, "levels": f"{self.source}, as published"}

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        return Inputs(x, {})


@dataclass(frozen=True)
class OfDomain(Condition):
    """Samples of the same classes from elsewhere: the test split of another dataset, such as digits-dg:fonts.

    `n` cuts it; None takes as many as the suite takes of its own.
    """

    name: str
    n: int | None = None
    kind: ClassVar[str] = "domain"

    @property
    def own_samples(self) -> bool:
        return True

    def samples(self, data: Dataset, split: str, n: int | None, seed: int = 0) -> Split:
        other = load_dataset(self.name)
        if other.classes != data.classes or tuple(other.shape) != tuple(data.shape):
            raise ConfigError(
                f"condition '{self.label}': {self.name} has {len(other.classes)} classes at {tuple(other.shape)}, the suite's "
                f"data {len(data.classes)} at {tuple(data.shape)}. A domain has the same classes in the same order, and the "
                f"same size; for inputs of other classes take outliers."
            )
        return other["test"].take(self.n if self.n is not None else n)

    def spec(self) -> dict[str, Any]:
        return {"condition": "domain", "name": self.name}

    def facts(self) -> dict[str, Any]:
        return {"domain": self.name}

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        return Inputs(x, {})


@dataclass(frozen=True)
class Outliers(Condition):
    """Inputs of no class: a bundled set, the test split of another dataset, such as torchvision:SVHN, or what a function of the
    user's own gives, `file.py:make_inputs`.

    `distance` says whether they are near the data or far from it, where that is known; reports keep the two apart.
    """

    name: str
    n: int
    distance: str | None = None
    kind: ClassVar[str] = "outliers"

    @property
    def own_samples(self) -> bool:
        return True

    def samples(self, data: Dataset, split: str, n: int | None, seed: int = 0) -> Split:
        if names_dataset(self.name):
            return from_dataset(self.name, self.n, data.shape)
        outliers: Split = OUTLIERS.load(self.name)(self.n, data.shape)
        return outliers

    def spec(self) -> dict[str, Any]:
        return {"condition": "outliers", "name": self.name}

    def facts(self) -> dict[str, Any]:
        own = not names_dataset(self.name) and OUTLIERS.label(self.name) != self.name
        origin = {"origin": self.name} if own else {}
        return {"outliers": OUTLIERS.label(self.name) if own else self.name, "distance": self.distance, **origin}

    def apply(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, seed: int, clean: Tensor | None, batch_size: int
    ) -> Inputs:
        return Inputs(x, {})


Maker = Callable[[Any, Mapping[str, Any]], list[Condition]]


def parse_conditions(
    entries: Sequence[str | Mapping[str, Any]],
    makers: Mapping[str, Maker] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> list[Condition]:
    """The conditions of a suite: each entry is `clean`, or a mapping with one of `attack`, `corruption`, `domain`,
    `outliers`.

    `only` names the models that it is for. A list given for `eps`, `against`, `severity`, `corruption`, `domain` or `outliers`
    makes one condition for each of its values. `clean` always comes first, whether it is listed or not: everything else is
    compared with it.

    Args:
        makers: what makes the conditions of an entry with that key, from its value and the other keys; of images by default.
        elsewhere: keys that make sense for other data, and what to do instead.

    Raises:
        ConfigError: an unknown name or parameter, or the same condition twice.
    """
    makers = MAKERS if makers is None else makers
    elsewhere = {"shift": "shifts change tables; for images take a corruption"} if elsewhere is None else elsewhere
    conditions: list[Condition] = [Clean("clean")]
    for entry in entries:
        if entry == "clean":
            continue
        if not isinstance(entry, Mapping):
            raise ConfigError(f"condition {entry!r}: expected 'clean' or a mapping such as {{attack: pgd, eps: 8/255}}")
        for key, advice in elsewhere.items():
            if key in entry:
                raise ConfigError(f"condition {{{key}: {entry[key]}}} does not fit this data: {advice}")
        kinds = [kind for kind in makers if kind in entry]
        if len(kinds) != 1:
            given = ", ".join(map(str, entry)) or "nothing"
            raise ConfigError(f"condition with {given}: expected exactly one of the keys {', '.join(makers)}")
        rest = {k: v for k, v in entry.items() if k not in (kinds[0], "label", "optional", "only")}
        made = makers[kinds[0]](entry[kinds[0]], rest)
        if "only" in entry:
            names = tuple(str(name) for name in listed_values(entry["only"], f"condition {made[0].label}: only"))
            made = [replace(condition, only=names) for condition in made]
        if entry.get("label"):
            made = [_relabel(c, str(entry["label"]) + c.label[len(made[0].label) :] * (len(made) > 1)) for c in made]
        conditions.extend(made)
    return _distinct(conditions)


def is_available(entry: str | Mapping[str, Any]) -> bool:
    """False for an entry marked `optional: true` whose package is not installed, or whose data is not there."""
    if not isinstance(entry, Mapping) or not entry.get("optional"):
        return True
    if str(entry.get("attack", "")).startswith("torchattacks"):
        return importlib.util.find_spec("torchattacks") is not None  # imports nothing
    try:
        for name in listed_values(entry.get("outliers", "letters"), "outliers"):
            if names_dataset(str(name)):
                load_dataset(str(name))
    except DataError:
        return False
    return True


def listed_values(value: Any, what: str) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ConfigError(f"{what}: the list is empty, so there would be no condition; give at least one value")
    return values


def _attacks(name: Any, rest: Mapping[str, Any]) -> list[Condition]:
    # Lists of these make one condition for each value (and for each pair, where both are lists).
    listed = {key: listed_values(rest[key], f"{name}: {key}") for key in ("eps", "against") if key in rest}
    made: list[Condition] = []
    shown = ATTACKS.label(str(name))
    for values in itertools.product(*listed.values()):
        attack = build_attack(str(name), **{**rest, **dict(zip(listed, values, strict=True))})
        budget = "" if attack.eps == float("inf") else f" {format_number(attack.eps)}"
        against = f" against {attack.against}" if isinstance(attack, Adaptive) else ""
        norm = "" if attack.norm == name else f" {attack.norm}"  # "spatial" says it all
        made.append(UnderAttack(f"{shown}{norm}{budget}{against}", attack))
    return made


def _corruptions(names: Any, rest: Mapping[str, Any]) -> list[Condition]:
    only(rest, ("severity", "levels"), f"corruption {names}")
    levels = rest.get("levels")
    if levels is not None and levels not in LEVELS:
        raise ConfigError(f"corruption {names}: levels = {levels!r}, expected one of {', '.join(LEVELS)}")
    made: list[Condition] = []
    for given in listed_values(names, "corruption"):
        source, colon, which = str(given).rpartition(":")
        if source not in PUBLISHED and not CORRUPTIONS.split(str(given))[1]:
            source, colon, which = "", "", str(given)  # a registered one, or one of the user's own
        if colon and source not in PUBLISHED:
            raise ConfigError(f"corruption {given}: {unknown_name('published benchmark', source, PUBLISHED)}")
        for name in SETS.get(which, (which,)):
            label = CORRUPTIONS.label(CORRUPTIONS.get(name).name)
            for severity in listed_values(rest.get("severity", [1, 2, 3, 4, 5]), f"{name}: severity"):
                if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
                    raise ConfigError(f"corruption {name}: severity = {severity!r}, expected 1, 2, 3, 4 or 5")
                if source:
                    made.append(PublishedCorruption(f"{label} {severity}", PUBLISHED[source], name, int(severity)))
                else:
                    made.append(Corrupted(f"{label} {severity}", name, int(severity), levels))
    return made


def _domains(names: Any, rest: Mapping[str, Any]) -> list[Condition]:
    only(rest, ("n",), "domain")
    n = int(parse_number(rest["n"], "domain: n")) if "n" in rest else None
    return [OfDomain(f"domain {name}", str(name), n) for name in listed_values(names, "domain")]


def _outliers(names: Any, rest: Mapping[str, Any]) -> list[Condition]:
    only(rest, ("n", "distance"), "outliers")
    n = int(parse_number(rest.get("n", 500), "outliers: n"))
    if n < 2:
        raise ConfigError(f"outliers: n = {n}, expected at least 2")
    distance = rest.get("distance")
    if distance not in (None, "near", "far"):
        raise ConfigError(f"outliers: distance = {distance!r}, expected near or far")
    made: list[Condition] = []
    for name in map(str, listed_values(names, "outliers")):
        label = name if names_dataset(name) else OUTLIERS.label(OUTLIERS.get(name).name)
        made.append(Outliers(f"outliers {label}", name, n, distance or DISTANCE.get(name)))
    return made


MAKERS: Mapping[str, Maker] = {
    "attack": _attacks,
    "corruption": _corruptions,
    "domain": _domains,
    "outliers": _outliers,
}
# Names that stand for several corruptions.
PUBLISHED = {"cifar10c": "cifar-c", "cifar100c": "cifar-c", "imagenet-c": "imagenet-c"}
SETS = {"fifteen": FIFTEEN, "extra": EXTRA, "all": (*FIFTEEN, *EXTRA)}


def only(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{what}: " + unknown_name("parameter", str(key), known))


def _relabel(condition: Condition, label: str) -> Condition:
    return replace(condition, label=label)


def _distinct(conditions: list[Condition]) -> list[Condition]:
    """Tell equal labels apart by the attacks' other parameters; refuse a condition that is there twice."""
    seen: dict[str, Condition] = {}
    out = []
    for condition in conditions[1:]:
        if condition.label == "clean" or condition.label.startswith("worst case "):
            raise ConfigError(
                f"label '{condition.label}': 'clean' and 'worst case ...' are the report's own; choose another"
            )
    for condition in conditions:
        label = condition.label
        if label in seen:
            if condition.spec() == seen[label].spec():
                raise ConfigError(f"condition '{label}' is listed twice")
            mine, theirs = condition.facts().get("parameters", {}), seen[label].facts().get("parameters", {})
            differing = [f"{k}={v}" for k, v in mine.items() if theirs.get(k) != v]
            label = f"{label} ({', '.join(differing) or condition.facts().get('origin') or 'variant'})"
            if label in seen:
                raise ConfigError(f"conditions share the label '{label}'; give one of them a label: of its own")
            condition = _relabel(condition, label)
        seen[label] = condition
        out.append(condition)
    return out
