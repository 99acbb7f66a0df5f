"""RiFT from a named model to a folder that `load_model` reads: weights, their origin, what was found.

model.safetensors, model.json   the network, as the trainer writes it
rift.json                       criticality of the modules, curve of the fine-tuning, interpolation
criticality.json                modules that are done, so that an interrupted run does not compute them again
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defenses.criticality import AdversarialSet, ModuleCriticality, adversarial_set, candidates, exact_name
from defenses.rift import ARGMIN, RIFT_VERSION, RiFTRecipe, State, Watcher, rift, state_of
from defenses.trainer import Architecture
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.files import write_atomically
from robustbench_ext.fingerprint import key_of
from robustbench_ext.models.contract import check_logits, frozen_eval
from robustbench_ext.models.loading import RECIPE_FILE, WEIGHTS_FILE, fingerprint_module, load_model
from robustbench_ext.models.wrap import Normalized

RIFT_FILE, MODULES_FILE = "rift.json", "criticality.json"


@dataclass(frozen=True)
class Base:
    """The network that RiFT starts from.

    Attributes:
        module: with its weights.
        architecture: what rebuilds it without them; its weights then come from the folder that is written.
        spec: how the user named it, for the record.
        key: of the training that made it, where that is known.
        fingerprint: as `load_model` gives it; computed where it is not given.
    """

    module: nn.Module
    architecture: Architecture
    spec: str = ""
    key: str | None = None
    fingerprint: str | None = None

    def describe(self) -> dict[str, Any]:
        """For model.json."""
        return {"spec": self.spec, "key": self.key, "fingerprint": self.fingerprint or fingerprint_module(self.module)}


def base_model(
    spec: str,
    data: Dataset,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Base:
    """Load a model by its specification (all that `load_model` understands) and find out how to rebuild it.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: arguments for a folder, which has them already.
    """
    loaded = load_model(
        spec,
        shape=data.shape,
        num_classes=len(data.classes),
        mean=mean,
        std=std,
        weights=weights,
        kwargs=kwargs,
        device=device,
    )
    name = spec.partition("+")[0].strip()
    folder, key = Path(name), None
    plain = mean is None and std is None
    architecture = None
    if (folder / RECIPE_FILE).is_file():
        if kwargs:
            raise ConfigError(
                f"{name} is a folder that names its network's arguments itself: leave {', '.join(kwargs)} out"
            )
        described = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
        key = described.get("key") if name == spec.strip() and weights is None else None
        if plain:  # the folder's own architecture: the new folder does not depend on the old one
            architecture = _architecture(described["architecture"])
    if architecture is None:
        module = loaded.module
        if plain and name.startswith("torchvision:") and isinstance(module, Normalized):
            # Published weights brought their normalisation along; without them it must be declared.
            mean, std = module.mean.flatten().tolist(), module.std.flatten().tolist()
        architecture = Architecture(
            name,
            data.shape,
            _outputs(module, data, device),
            tuple(mean) if mean is not None else None,
            tuple(std) if std is not None else None,
            dict(kwargs) if kwargs else None,
        )
    return Base(loaded.module, architecture, spec, key, loaded.fingerprint)


def _architecture(described: Mapping[str, Any]) -> Architecture:
    channels, height, width = described["shape"]
    mean, std = (tuple(v) if (v := described.get(k)) is not None else None for k in ("mean", "std"))
    shape = (channels, height, width)
    return Architecture(described["spec"], shape, described["num_classes"], mean, std, described.get("kwargs"))


def _outputs(module: nn.Module, data: Dataset, device: torch.device | str) -> int:
    """K, as the model has it."""
    with torch.no_grad(), frozen_eval(module):
        x = data["train"].images(slice(0, 2))
        return check_logits(module(x.to(device)), len(x)).shape[1]


def _check_rebuilds(base: Base) -> None:
    """Before hours are spent: what will be written must fit into what the name gives."""
    own = {k: v.shape for k, v in state_of(base.module).items()}
    built = {k: v.shape for k, v in base.architecture.build(0).state_dict().items() if hasattr(v, "shape")}
    if own != built:
        odd = sorted(k for k in own.keys() | built.keys() if own.get(k) != built.get(k))
        raise ModelError(
            f"'{base.architecture.spec}' rebuilds another network than was given: {len(odd)} tensors differ in name or shape "
            f"({', '.join(odd[:3])}). The result could not be loaded again; give the factory's arguments, or a factory that "
            f"builds the network as it is."
        )


def rift_key(base: Base, data: Dataset, recipe: RiFTRecipe, seed: int) -> str:
    """The content key of the weights that this RiFT gives."""
    return key_of(
        {
            "kind": "rift",
            "version": RIFT_VERSION,
            "recipe": recipe.spec(),
            "weights": fingerprint_module(base.module),
            "train": data["train"].fingerprint(),
            "calibration": data["calibration"].fingerprint(),
            "seed": seed,
        }
    )


def rift_checkpoint(
    base: Base,
    data: Dataset,
    recipe: RiFTRecipe | None = None,
    out: Path | str = "rift",
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Path:
    """Run RiFT and write its folder. Interrupted and started again, it goes on with the next module; done, it is not repeated.

    Raises:
        ConfigError: the folder holds another model.
        ModelError: `base.architecture` gives a network whose tensors differ in name or shape.
    """
    recipe, watcher, out = recipe or RiFTRecipe(), watcher or Watcher(), Path(out)
    key = rift_key(base, data, recipe, seed)
    if (out / RECIPE_FILE).is_file():
        if json.loads((out / RECIPE_FILE).read_text(encoding="utf-8"))["key"] != key:
            raise ConfigError(
                f"{out} holds another model (other options, base, data or seed). Give another --out, or remove the folder. "
                f"Copy its {MODULES_FILE} into the new one to keep the criticality of its modules, where nothing that it "
                f"depends on has changed."
            )
        return out
    _check_rebuilds(base)
    if recipe.module != ARGMIN:
        exact_name(recipe.module, candidates(base.module)[0])  # an unknown name is told before the attack runs
    out.mkdir(parents=True, exist_ok=True)
    inputs = adversarial_set(base.module, data, recipe, seed)
    watcher.inputs(inputs)
    kept = _Kept(out / MODULES_FILE, _criticality_key(base, recipe, inputs, seed), watcher)
    state, result = rift(base.module, data, recipe, seed, inputs=inputs, finished=kept.modules, watcher=kept)
    description = {
        "key": key,
        "defense": recipe.spec(),
        "base": base.describe(),
        "architecture": asdict(base.architecture),
        "data": data.describe(),
        "seed": seed,
        "selected": {
            "epoch": result.epoch,
            "by": "clean",
            "on": "calibration",
            "module": result.module,
            "alpha": result.alpha,
        },
        "curve": list(result.curve),
    }
    found = {"key": key, "base": base.describe(), "recipe": recipe.spec(), **result.to_json()}
    _write_json(out / RIFT_FILE, found)
    _publish(out, state, description)
    return out


def _criticality_key(base: Base, recipe: RiFTRecipe, inputs: AdversarialSet, seed: int) -> str:
    return key_of(
        {
            "kind": "criticality",
            "recipe": recipe.criticality_spec(),
            "weights": fingerprint_module(base.module),
            "inputs": inputs.checksum,
            "seed": seed,
        }
    )


class _Kept(Watcher):
    """Passes on what it is told, and keeps every finished module in a file."""

    def __init__(self, file: Path, key: str, told: Watcher) -> None:
        self._file, self._key, self._told = file, key, told
        self.modules: dict[str, ModuleCriticality] = {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["key"] == key:
                rows = [ModuleCriticality(**row) for row in content["modules"]]
                self.modules = {m.name: replace(m, shape=tuple(m.shape), losses=tuple(m.losses)) for m in rows}
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: everything is computed
            self.modules = {}
        self.ascent, self.chosen, self.alpha = told.ascent, told.chosen, told.alpha  # type: ignore[method-assign]
        self.batch, self.epoch = told.batch, told.epoch  # type: ignore[method-assign]

    def module(self, found: ModuleCriticality) -> None:
        self.modules[found.name] = found
        _write_json(self._file, {"key": self._key, "modules": [asdict(m) for m in self.modules.values()]})
        self._told.module(found)


def _write_json(file: Path, content: Any) -> None:
    write_atomically(file, lambda f: f.write_text(json.dumps(content, indent=1), encoding="utf-8"))


def _publish(out: Path, state: State, description: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    # safetensors refuses other memory formats, and tensors that share memory (in a state every name has its own).
    weights = {name: value.cpu().contiguous() for name, value in state.items()}
    write_atomically(out / WEIGHTS_FILE, lambda file: save_file(weights, str(file)))
    # model.json is what marks the folder as finished, so it is written last.
    _write_json(out / RECIPE_FILE, description)
