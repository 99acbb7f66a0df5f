"""Suites: which models meet which conditions, and what is read off them. Written in YAML, validated on reading."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from robustbench_ext.errors import ConfigError, unknown_name
from robustbench_ext.named_code import split_named, split_source
from robustbench_ext.numbers import parse_number

SUITES = Path(__file__).parent / "suites"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _numbers(value: Any) -> Any:
    if value is None:
        return None
    return tuple(parse_number(v, "mean/std") for v in (value if isinstance(value, (list, tuple)) else [value]))


def _epochs(value: Any) -> Any:
    if value == "all":
        return value
    if not isinstance(value, (list, tuple)) or any(not isinstance(e, int) or e < 1 for e in value):
        raise ValueError(f"{value!r}, expected epochs from 1, such as [2, 4], or all")
    return tuple(sorted(set(value)))


class Training(_Strict):
    """A model that the run trains for itself, once, and keeps under its content key.

    Attributes:
        defense: a name, or a mapping {name: trades, beta: 6}. An option `teacher` names another model of the suite. Regressors
            have defenses of their own (`rbx list regression-defenses`), least squares by default.
        network: any model specification; reference networks are built to the data. By default that of a named recipe,
            a small CNN, or for regression an MLP; `sklearn:MODULE.CLASS` is fitted.
        kwargs: of the network.
        seed: of the weights, the data order and the attack's starts.
        seeds: instead of `seed`, several: a number k, for 0 to k - 1, or a list. The entry NAME becomes one model per seed,
            `NAME seed 0` and so on, and the results also say what they have in common: mean and interval over seeds.
        start: another model of the suite, whose trained weights this one starts from (fine-tuning); its network is taken too.
            Of a start or a teacher with the same `seeds`, each seed has the model of its own seed.
        data: a dataset specification whose train split takes the place of the suite's, such as "mnist5k@balanced:exp:100"; of
            classifiers. It must have the same classes and shape, and no sample of the suite's test and calibration splits.
        recipe: the name of a bundled recipe (`rbx list recipes`), or options of `defenses.recipe.Recipe`, such as
            epochs, lr, eps, attack_steps, in which `name` may name one to start from. Of regressors, options of
            `models.tabular.RegressorRecipe`.
        keep: epochs after which the weights are kept beside the model, such as [2, 4], or `all`; of classifiers. The model
            does not depend on it: one that is trained already is trained again up to the last epoch that it lacks.
    """

    defense: str | dict[str, Any] | None = None
    network: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    start: str | None = None
    data: str | None = None
    seed: int = 0
    recipe: str | dict[str, Any] = Field(default_factory=dict)
    keep: Literal["all"] | tuple[int, ...] = ()

    _keep_names_epochs = field_validator("keep", mode="before")(_epochs)

    def defense_name(self) -> str:
        """The defense's registered name."""
        if isinstance(self.defense, dict):
            return str(self.defense.get("name"))
        return self.defense or ""

    def defense_options(self) -> dict[str, Any]:
        """The defense's options."""
        return {k: v for k, v in self.defense.items() if k != "name"} if isinstance(self.defense, dict) else {}

    @property
    def teacher(self) -> str | None:
        """The model of the suite that the defense learns from, if any."""
        told = self.defense_options().get("teacher")
        return None if told is None else str(told)


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
        others = () if self.train is None else (self.train.start, self.train.teacher)
        return tuple(name for name in others if name is not None)


OVER_EPOCHS = ("forgetting", "vog")  # difficulty scores that are read off a whole training


class Difficulty(_Strict):
    """How hard each clean test sample is, by what other networks of the suite make of it, and results by slices of equal size.

    Attributes:
        score: `el2n` (length of the probabilities' error), `margin` (of the most probable wrong class over the right one),
            `forgetting` (how often a sample went from right to wrong during the training), `vog` (how much the gradient of the
            right class's logit moved during the training).
        models: the entries whose models give the scores, mostly with `evaluate: false`; an entry with `seeds` stands for all
            of its models, and the scores are means over models. They should be others than those that are judged.
        epoch: of `el2n` and `margin`: the epoch of their trainings, from 1, after which they are asked; by default the weights
            as they are published.
        epochs: of `forgetting` and `vog`: these epochs, or `all`; by default those that the entries `keep`.
        bins: slices.
        hardest: samples that the report lists.
    """

    score: Literal["el2n", "margin", "forgetting", "vog"] = "el2n"
    models: tuple[str, ...] = Field(min_length=1)
    epoch: int | None = Field(None, ge=1)
    epochs: Literal["all"] | tuple[int, ...] = ()
    bins: int = Field(10, ge=2)
    hardest: int = Field(12, ge=0)

    _epochs_are_epochs = field_validator("epochs", mode="before")(_epochs)

    @model_validator(mode="after")
    def _epochs_fit_the_score(self) -> Difficulty:
        several = self.score in OVER_EPOCHS
        if several and self.epoch is not None:
            raise ValueError(f"{self.score} is read off several epochs: give epochs: [...] instead of epoch")
        if not several and self.epochs:
            raise ValueError(f"{self.score} is read off one epoch: give epoch: NUMBER instead of epochs")
        if several and self.epochs != "all" and len(self.epochs) == 1:
            raise ValueError(f"{self.score} needs two epochs at least, got {self.epochs[0]} alone")
        return self

    @property
    def wanted(self) -> Literal["all"] | tuple[int, ...]:
        """The epochs that it names; none where the published weights, or what is kept anyhow, will do."""
        return self.epochs if self.epoch is None else (self.epoch,)


class Relative(_Strict):
    """What the accuracy of a model that was trained on long-tailed data is relative to: the better of two that were trained
    on balanced data of similar size, A_r = A_model / max(A_plain, A_same). An entry with `seeds` stands for all of its models,
    pair by pair.

    Attributes:
        model: trained on the suite's data.
        plain: plain cross-entropy (of robust methods: plain adversarial training), trained on balanced data.
        same: the method of `model`, trained on balanced data; `plain` itself where that is the method.
    """

    model: str
    plain: str
    same: str


class Shots(_Strict):
    """Where classes are cut into groups by their training samples: more than `many`, fewer than `few`, and between."""

    many: int = Field(100, ge=1)
    few: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Shots:
        if self.few > self.many:
            raise ValueError(f"shots: few = {self.few} is more than many = {self.many}")
        return self


class Landscapes(_Strict):
    """What lies round networks and between them, on training images (`robustbench_ext.landscape`). What costs: `iterations`
    and `probes` a forward and two backward passes of n samples each for every network and loss; `points` one forward pass of n
    (attacked: `steps` more, with a backward pass each) and of statistics_n for every pair and loss.

    Attributes:
        models: two or more, of one architecture; every pair makes a card. An entry with `seeds` stands for all of its models.
        loss: `clean`, or {attack: pgd, eps: 8/255, norm: Linf, steps: 10}, or a list of these.
        n: training samples, a stratified prefix.
        points: of the line between two networks, both ends among them.
        statistics_n: training samples on which batch norms are measured again at every point.
        iterations, tolerance: of Lanczos: at most so many products, ended where the residual is within that share.
        probes: of the trace.
        phases: cut-offs between phases, all of {loss: ..., sharpness: ..., connectivity: ..., cka: ...}; no phase without.
    """

    models: tuple[str, ...] = Field(min_length=2)
    loss: str | dict[str, Any] | tuple[str | dict[str, Any], ...] = "clean"
    n: int = Field(500, ge=2)
    points: int = Field(11, ge=3)
    statistics_n: int = Field(2000, ge=2)
    iterations: int = Field(50, ge=1)
    tolerance: float = Field(1e-3, gt=0)
    probes: int = Field(20, ge=2)
    phases: dict[str, Any] | None = None

    @property
    def losses(self) -> tuple[str | dict[str, Any], ...]:
        """One or several."""
        return self.loss if isinstance(self.loss, tuple) else (self.loss,)


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
        difficulty: how hard each test sample is, and results by difficulty.
        baseline: the model whose errors the mean corruption error of the others is taken relative to.
        relative: models whose accuracies are also taken relative to those of models that were trained on balanced data.
        shots: where many, medium and few shot classes are cut; more than 100 and fewer than 20 training samples by default.
        landscape: networks whose loss landscapes are looked at, alone and in pairs.
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
    difficulty: Difficulty | None = None
    baseline: str | None = None
    relative: tuple[Relative, ...] = ()
    shots: Shots | None = None
    landscape: tuple[Landscapes, ...] = ()
    batch_size: int = Field(250, ge=1)
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    chunk_size: int = Field(1000, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _one_model_per_seed(cls, content: Any) -> Any:
        return _with_kept(_with_seeds(content)) if isinstance(content, Mapping) else content

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [model.name for model in self.models]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise ValueError(f"model names must differ; used twice: {', '.join(sorted(doubled))}")
        self._order(names)
        if self.baseline is not None and self.baseline not in [m.name for m in self.models if m.evaluate]:
            raise ValueError(f"baseline '{self.baseline}' is none of the models that are evaluated: {', '.join(names)}")
        evaluated = [m.name for m in self.models if m.evaluate]
        for entry in self.relative:
            for name in (entry.model, entry.plain, entry.same):
                if name not in evaluated:
                    raise ValueError(f"relative: {unknown_name('model that is evaluated', name, evaluated)}")
            if entry.model in (entry.plain, entry.same):
                raise ValueError(
                    f"relative: '{entry.model}' is relative to itself; expected models that were trained on balanced data"
                )
        if not any(model.evaluate for model in self.models):
            raise ValueError("every model has evaluate: false, so there is nothing to do")
        if self.difficulty is not None:
            self._scorers(self.difficulty, names)
        return self

    def _scorers(self, asked: Difficulty, names: Sequence[str]) -> None:
        """The models that difficulty scores are asked of can give them."""
        for name in asked.models:
            if name not in names:
                raise ValueError(f"difficulty: {unknown_name('model', name, names)}")
            train = self.models[names.index(name)].train
            if train is None and (asked.wanted or asked.score in OVER_EPOCHS):
                raise ValueError(
                    f"difficulty: model '{name}' is not trained by the run, so there are no epochs of it to ask: name one with "
                    f"train, or take score: el2n without an epoch"
                )
            if train is not None and asked.score in OVER_EPOCHS and train.keep != "all" and len(train.keep) < 2:
                raise ValueError(
                    f"difficulty: {asked.score} is read off several epochs of a training: say which, epochs: [1, 2, 4] or "
                    f"epochs: all"
                )

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
            models.append(
                {**entry, "name": label, "train": {**_of_seed(rest, seed, made), "seed": seed}, "replicate_of": name}
            )
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
        own: dict[str, Any] = {"of": [m for name in make["of"] for m in made.get(name, [name])]}
        if isinstance(make.get("families"), Mapping):  # of an ensemble
            own["families"] = {k: _each_seed(names, made) for k, names in make["families"].items()}
        return {**entry, "make": {**make, **own}}

    parts: dict[str, Any] = {
        k: [named(part) for part in content[k]] for k in ("conditions", "detectors", "uq") if content.get(k)
    }
    if isinstance(content.get("relative"), (list, tuple)):
        parts["relative"] = [one for entry in content["relative"] for one in _relative(entry, made)]
    if isinstance(content.get("landscape"), (list, tuple)):
        parts["landscape"] = [
            {**e, "models": _each_seed(e["models"], made)} if isinstance(e, Mapping) and "models" in e else e
            for e in content["landscape"]
        ]
    asked = content.get("difficulty")
    if isinstance(asked, Mapping) and isinstance(asked.get("models"), (list, tuple)):
        parts["difficulty"] = {**asked, "models": [m for name in asked["models"] for m in made.get(str(name), [name])]}
    return {**content, **parts, "models": [of(entry) for entry in models]}


def _each_seed(names: Any, made: Mapping[str, list[str]]) -> Any:
    """A list of models with every entry of several seeds replaced by its models; what is no list stays for others to refuse."""
    return [m for name in names for m in made.get(str(name), [name])] if isinstance(names, (list, tuple)) else names


def _with_kept(content: dict[str, Any]) -> dict[str, Any]:
    """Trainings that difficulty scores are read off keep the epochs that are named there."""
    asked = content.get("difficulty")
    if not isinstance(asked, Mapping) or not isinstance(asked.get("models"), (list, tuple)):
        return content
    wanted = asked.get("epochs") if asked.get("epoch") is None else [asked["epoch"]]

    def keeping(entry: Any) -> Any:
        train = entry.get("train") if isinstance(entry, Mapping) else None
        if not wanted or not isinstance(train, Mapping) or entry.get("name") not in asked["models"]:
            return entry
        kept = train.get("keep") or []
        if "all" in (kept, wanted):
            return {**entry, "train": {**train, "keep": "all"}}
        if not all(isinstance(e, int) and e >= 1 for e in (*_listed(kept), *_listed(wanted))):
            return entry  # validation says what is wrong with it
        return {**entry, "train": {**train, "keep": sorted({*kept, *wanted})}}

    return {**content, "models": [keeping(entry) for entry in content.get("models", ())]}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [None]


def _of_seed(train: Mapping[str, Any], seed: int, made: Mapping[str, list[str]]) -> dict[str, Any]:
    """A training whose start and teacher, where they have this seed too, are those of this seed."""

    def twin(name: Any) -> Any:
        return f"{name} seed {seed}" if f"{name} seed {seed}" in made.get(str(name), ()) else name

    defense = train.get("defense")
    own = {"start": twin(train["start"])} if "start" in train else {}
    if isinstance(defense, Mapping) and "teacher" in defense:
        own["defense"] = {**defense, "teacher": twin(defense["teacher"])}
    return {**train, **own}


def _relative(entry: Any, made: Mapping[str, list[str]]) -> list[Any]:
    """An entry of `relative`, seed by seed: a model of one seed goes with every one of another."""
    if not isinstance(entry, Mapping):
        return [entry]
    members = {k: made.get(name, [name]) if isinstance(name, str) else [name] for k, name in entry.items()}
    most = max((len(names) for names in members.values()), default=1)
    if any(len(names) not in (1, most) for names in members.values()):
        counts = ", ".join(f"{entry[k]} has {len(names)}" for k, names in members.items())
        raise ValueError(f"relative: {counts}; expected as many seeds each, or one")
    return [{k: names[i % len(names)] for k, names in members.items()} for i in range(most)]


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
        elif len(first["loc"]) > 1:
            parts: dict[Any, type[_Strict]] = {
                "relative": Relative,
                "shots": Shots,
                "landscape": Landscapes,
                "difficulty": Difficulty,
            }
            owner = parts.get(first["loc"][0], Suite)
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
    source, rest = split_source(first)
    last = re.split(r"[\\/]", first.rstrip("\\/"))[-1]
    if source in SOURCES and not re.search(r"[\\/]", rest):
        return first
    return split_named(last)[1] or last


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
