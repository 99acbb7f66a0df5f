"""Recipes by name: published hyper-parameters of each method, and tuned ones for small data. One YAML file each.

    title, source       what the file is, where its numbers come from
    network, kwargs     the network that they belong to
    recipe              options of `defenses.recipe.Recipe` that all methods share
    methods             for each method, its `defense` options, `recipe` options that differ, and a `note`

What a caller gives by hand wins over the method's options, and those over the shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from defenses.base import Defense
from defenses.recipe import Recipe
from robustbench_ext.attacks.base import build
from robustbench_ext.catalog import DEFENSES, RECIPES
from robustbench_ext.errors import ConfigError, unknown_name

DEFAULT_NETWORK = "small-cnn"


@dataclass(frozen=True)
class Preset:
    """A named recipe's part for one method.

    Attributes:
        network, kwargs: the network that it was made for.
        defense, recipe: options.
    """

    network: str = DEFAULT_NETWORK
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    defense: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def recipe_names() -> list[str]:
    """All bundled recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The content of a recipe's file.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in recipe_names():
        raise ConfigError(unknown_name("recipe", name, recipe_names()))
    content: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return content


def preset(name: str, defense: str) -> Preset:
    """A recipe's options for one method.

    Raises:
        ConfigError: the recipe does not know the method; the message names those that it knows.
    """
    content = read_recipe(name)
    methods = content["methods"]
    if defense not in methods:
        raise ConfigError(f"recipe '{name}': " + unknown_name("method", defense, methods))
    own = methods[defense] or {}
    return Preset(
        content["network"],
        content.get("kwargs") or {},
        own.get("defense") or {},
        {**content["recipe"], **(own.get("recipe") or {})},
    )


@dataclass(frozen=True)
class Plan:
    """What is to be trained: objective, recipe, network with its options."""

    defense: Defense
    recipe: Recipe
    network: str
    kwargs: Mapping[str, Any]


def plan(
    defense: str,
    recipe: str | Mapping[str, Any] = "",
    options: Mapping[str, Any] | None = None,
    network: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """Put a named recipe and what is given by hand together.

    Args:
        defense: the method's name.
        recipe: a recipe's name, or options of `Recipe` in which `name` may name one to start from.
        options: of the defense.
        network, kwargs: the recipe's own, or a small CNN, by default.

    Raises:
        ConfigError: an unknown name or option.
    """
    own: dict[str, Any] = {"name": recipe} if isinstance(recipe, str) else dict(recipe)
    name = own.pop("name", None)
    found = preset(str(name), defense) if name else Preset()
    if isinstance(own.get("augmentation"), Mapping) and isinstance(found.recipe.get("augmentation"), Mapping):
        own["augmentation"] = {**found.recipe["augmentation"], **own["augmentation"]}
    return Plan(
        build(DEFENSES.load(defense), defense, {**found.defense, **(options or {})}),
        build(Recipe, "recipe", {**found.recipe, **own}),
        network or found.network,
        {**(found.kwargs if network in (None, found.network) else {}), **(kwargs or {})},
    )
