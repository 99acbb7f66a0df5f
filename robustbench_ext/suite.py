"""Suites: which models meet which conditions, and what is read off them. Written in YAML, validated on reading."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.numbers import parse_number

SUITES = Path(__file__).parent / "suites"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _numbers(value: Any) -> Any:
    if value is None:
        return None
    return tuple(parse_number(v, "mean/std") for v in (value if isinstance(value, (list, tuple)) else [value]))


class Training(_Strict):
    """A model that the run trains for itself, once, and keeps under its content key.

    Attributes:
        defense: a name, or a mapping {name: trades, beta: 6}; of classifiers. Regressors are trained by least squares.
        network: any model specification; reference networks are built to the data. By default that of a named recipe,
            a small CNN, or for regression an MLP; `sklearn:MODULE.CLASS` is fitted.
        kwargs: of the network.
        seed: of the weights, the data order and the attack's starts.
        seeds: instead of `seed`, several: a number k, for 0 to k - 1, or a list. The entry NAME becomes one model per seed,
            `NAME seed 0` and so on, and the results also say what they have in common: mean and interval over seeds.
        start: another model of the suite, whose trained weights this one starts from (fine-tuning); its network is taken too.
        recipe: the name of a bundled recipe (`rbx list recipes`), or options of `defenses.recipe.Recipe`, such as
            epochs, lr, eps, attack_steps, in which `name` may name one to start from. Of regressors, options of
            `models.tabular.RegressorRecipe`.
    """

    defense: str | dict[str, Any] | None = None
    network: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    start: str | None = None
    seed: int = 0
    recipe: str | dict[str, Any] = Field(default_factory=dict)

    def defense_name(self) -> str:
        """The defense's registered name."""
        if isinstance(self.defense, dict):
            return str(self.defense.get("name"))
        return self.defense or ""

    def defense_options(self) -> dict[str, Any]:
        """The defense's options."""
        return {k: v for k, v in self.defense.items() if k != "name"} if isinstance(self.defense, dict) else {}


class Making(_Strict):
    """A model that the run makes out of others of the suite, without training: averaged, patched, corrected.

    Attributes:
        name: of the method, such as `soup` (`rbx list makers`).
        of: the models that it is made of; an entry with `seeds` stands for all of its models.
        seed: of what is random about it.
    All other keys are options of the method.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    of: tuple[str, ...] = Field(min_length=1)
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """The method's options."""
        return dict(self.model_extra or {})


class ModelEntry(_Strict):
    """One model of a suite: `spec` (it exists), `train` (the run trains it) or `make` (the run makes it of others).

    Attributes:
        evaluate: false for a model that only serves as a member of an ensemble.
        mean, std, weights, kwargs: of `spec`; see `robustbench_ext.models.load_model`.
        replicate_of: the entry that this is one training seed of; written by `seeds`.
    """

    name: str
    spec: str | None = None
    train: Training | None = None
    make: Making | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    weights: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    evaluate: bool = True
    replicate_of: str | None = None

    _read_numbers = field_validator("mean", "std", mode="before")(_numbers)

    @model_validator(mode="after")
    def _one_origin(self) -> ModelEntry:
        if sum(origin is not None for origin in (self.spec, self.train, self.make)) != 1:
            raise ValueError(f"model '{self.name}': expected one of 'spec', 'train' and 'make'")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """The models of the suite that must be there before this one."""
        if self.make is not None:
            return self.make.of
        return (self.train.start,) if self.train is not None and self.train.start is not None else ()


class Suite(_Strict):
    """A whole evaluation.

    Attributes:
        data: a dataset specification.
        n: test samples, a stratified prefix of the test split; all of them by default.
        seed: of attacks and corruptions.
        conditions: see `robustbench_ext.conditions.parse_conditions`, and for tables
            `robustbench_ext.regression_conditions.parse_regression_conditions`; `clean` is always there.
        detectors, uq: names or mappings with parameters.
        metrics: functions of your own, `file.py:function`, see `robustbench_ext.own_metrics`.
        baseline: the model whose errors the mean corruption error of the others is taken relative to.
        batch_size: inputs per forward pass; no result depends on it beyond rounding.
        precision: at which attacks on classifiers take gradients, unless they say themselves: "float32", "tf32", "bfloat16".
            Verdicts, and all that is observed of a model, are float32 always.
        chunk_size: samples per record; the unit of work and of resuming.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    name: str
    title: str = ""
    description: str = ""
    data: str
    n: int | None = Field(None, ge=1)
    seed: int = 0
    models: tuple[ModelEntry, ...] = Field(min_length=1)
    conditions: tuple[str | dict[str, Any], ...] = ()
    detectors: tuple[str | dict[str, Any], ...] = ()
    uq: tuple[str | dict[str, Any], ...] = ()
    metrics: tuple[str, ...] = ()
    baseline: str | None = None
    batch_size: int = Field(250, ge=1)
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    chunk_size: int = Field(1000, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_model_per_seed(cls, content: Any) -> Any:
        return _with_seeds(content) if isinstance(content, Mapping) else content

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [model.name for model in self.models]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"model names must differ; used twice: {', '.join(sorted(doubled))}")
        self._order(names)
        if self.baseline is not None and self.baseline not in [m.name for m in self.models if m.evaluate]:
            raise ValueError(f"baseline '{self.baseline}' is none of the models that are evaluated: {', '.join(names)}")
        if not any(model.evaluate for model in self.models):
            raise ValueError("every model has evaluate: false, so there is nothing to do")
        return self

    def _order(self, names: Sequence[str]) -> None:
        """Models that others are made of come first: then no circle is possible, and a reader sees what stands on what."""
        for i, model in enumerate(self.models):
            for needed in model.needs:
                if needed not in names:
                    raise ValueError(f"model '{model.name}': {unknown_name('model', needed, names)}")
                if needed not in names[:i]:
                    raise ValueError(f"model '{model.name}' needs '{needed}': write '{needed}' before it")
                if self.models[names.index(needed)].spec is not None:
                    raise ValueError(
                        f"model '{model.name}' needs '{needed}', which has a spec; expected one that the run trains or makes"
                    )


def _with_seeds(content: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with `seeds` as one entry per seed, here and where conditions and probes name them."""
    made: dict[str, list[str]] = {}
    models: list[Any] = []
    for entry in content.get("models", ()):
        train = entry.get("train") if isinstance(entry, Mapping) else None
        if not isinstance(train, Mapping) or "seeds" not in train:
            models.append(entry)
            continue
        told, name = train["seeds"], str(entry.get("name"))
        seeds = list(range(told)) if isinstance(told, int) else told
        good = (
            isinstance(seeds, (list, tuple)) and all(isinstance(s, int) for s in seeds) and len({*seeds}) == len(seeds)
        )
        if not good or not seeds or "seed" in train:
            raise ValueError(
                f"model '{name}': seeds = {told!r}, expected a number such as 3 or a list of different ones such as [0, 1, 2], "
                f"and no 'seed' beside it"
            )
        rest = {k: v for k, v in train.items() if k != "seeds"}
        made[name] = [f"{name} seed {seed}" for seed in seeds]
        for label, seed in zip(made[name], seeds, strict=True):
            models.append({**entry, "name": label, "train": {**rest, "seed": seed}, "replicate_of": name})
    if not made:
        return dict(content)

    def named(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        lists = {k: v for k, v in part.items() if k in ("only", "members") and isinstance(v, (list, tuple))}
        return {**part, **{k: [m for name in v for m in made.get(name, [name])] for k, v in lists.items()}}

    def of(entry: Any) -> Any:
        make = entry.get("make") if isinstance(entry, Mapping) else None
        if not isinstance(make, Mapping) or not isinstance(make.get("of"), (list, tuple)):
            return entry
        return {**entry, "make": {**make, "of": [m for name in make["of"] for m in made.get(name, [name])]}}

    parts = {k: [named(part) for part in content[k]] for k in ("conditions", "detectors", "uq") if content.get(k)}
    return {**content, **parts, "models": [of(entry) for entry in models]}


def bundled_suites() -> dict[str, Path]:
    """Suites that come with the package, by name."""
    return {file.stem: file for file in sorted(SUITES.glob("*.yaml"))}


def bundled_parts() -> dict[str, Path]:
    """Runs of several suites that come with the package, by name; see `robustbench_ext.parts`."""
    return {file.stem: file for file in sorted((SUITES / "parts").glob("*.yaml"))}


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a mapping with keys such as name, data, models, conditions")
    return content


def load_suite(
    source: str | Path | Mapping[str, Any],
    *,
    models: Sequence[str] = (),
    data: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    settings: Sequence[str] = (),
) -> Suite:
    """A validated suite.

    Args:
        source: a bundled name, a YAML file, or a mapping.
        models: specifications that replace the suite's models, optionally as NAME=SPEC; `mean` and `std` go with them.
        data: replaces the suite's data.
        settings: `key=value` with dotted keys (`models.0.train.recipe.epochs=5`); values are YAML.

    Raises:
        ConfigError: what is wrong, where, and the nearest known name.
    """
    if isinstance(source, Mapping):
        content, what = copy.deepcopy(dict(source)), "suite"  # settings go into nested parts
    else:
        file = bundled_suites().get(str(source)) or Path(source)
        if not file.is_file():
            if str(source) in bundled_parts():
                raise ConfigError(f"'{source}' is a run of several suites: rbx run {source}, or parts.run_parts")
            known = unknown_name("suite", str(source), bundled_suites() | bundled_parts())
            raise ConfigError(f"{known} A path to a YAML file will do too.")
        content, what = read_yaml(file), str(source)
        content.setdefault("name", file.stem)
    if models or data is not None:
        # The suite's own title and description are about its own models and data.
        content["title"] = f"{content.get('title') or content['name']}, on {data or content.get('data')}"
        content["description"] = ""
    if models:
        content["models"] = [_model_entry(spec, mean, std) for spec in models]
    if data is not None:
        content["data"] = data
    for setting in settings:
        _set(content, setting)
    return validate_suite(content, what)


def validate_suite(content: Mapping[str, Any], what: str = "suite") -> Suite:
    """A suite from a mapping; the first defect becomes a ConfigError that names the nearest known key."""
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{what}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    found = error.errors()
    # A misspelt key shows up as an unknown one and a missing one; the first says more.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        owner: type[_Strict] = Suite
        if first["loc"][0] == "models":
            owner = Training if "train" in first["loc"][:-1] else ModelEntry
        names = [field.alias or name for name, field in owner.model_fields.items()]
        return f"at {where}: " + unknown_name("key", str(first["loc"][-1]), names)
    if first["type"] == "value_error":  # our own: it names what was given, and the input may be the whole suite
        return f"{f'at {where}: ' if where else ''}{first['ctx']['error']}"
    given = "" if first["type"] == "missing" else f", got {first['input']!r}"
    return f"at {where or 'top level'}: {first['msg']}{given}"


def _model_entry(spec: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
    name, equals, rest = spec.partition("=")
    if not equals or "/" in name or ":" in name:
        name, rest = _default_name(spec), spec
    return {"name": name, "spec": rest, "mean": mean, "std": std}


def _default_name(spec: str) -> str:
    """`net.py:build` and `pkg.nets:build` are called build; a checkpoint folder and `onnx:made/net.onnx` by their last part."""
    from robustbench_ext.catalog import SOURCES

    first = spec.partition("+")[0].partition("#")[0].strip()
    source, _, rest = first.partition(":")
    if source in SOURCES:
        return first if "/" not in rest and "\\" not in rest else Path(rest).name.rpartition(":")[2] or Path(rest).name
    return first.rpartition(":")[2] if ":" in first else Path(first).name


def _set(content: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting}: expected key=value, for example n=200 or conditions.1.eps=[0.1, 0.2]")
    target: Any = content
    *parents, last = path.split(".")
    try:
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        if isinstance(target, list):
            target[int(last)] = yaml.safe_load(text)
        else:
            target[last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError):
        raise ConfigError(f"--set {setting}: there is no '{path}' in the suite") from None
