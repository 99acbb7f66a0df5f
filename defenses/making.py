"""Models that are made of trained ones, without training: averaged, patched, corrected.

A maker takes networks, mostly of one architecture, and gives another. In a suite:

    models:
      - {name: base, train: {defense: standard}}
      - {name: fine, train: {defense: trades, start: base, seeds: 3, recipe: {epochs: 3, lr: 0.02}}}
      - {name: soup, make: {name: soup, of: [fine], how: greedy}}

What is made is a checkpoint like any other: its folder holds `model.safetensors` and `model.json`.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_ext.attacks.base import Attack
from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.files import seal, write_atomically
from robustbench_ext.fingerprint import key_of
from robustbench_ext.models.loading import RECIPE_FILE, WEIGHTS_FILE, load_model

MAKING_VERSION = 1
State = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """What a maker gives.

    Attributes:
        state: of the architecture that all members share.
        report: numbers and names that a reader wants to know, for `model.json` and the results.
    """

    state: State
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Maker(ABC):
    """Makes one model of others.

    Class attributes:
        least: how many it needs.
        alike: whether they, and what is made, are of one architecture; otherwise `architecture` says what is made.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # part of every key: raise it when weights change
    least: ClassVar[int] = 1
    alike: ClassVar[bool] = True
    reference: ClassVar[str] = ""

    def spec(self) -> dict[str, Any]:
        """All that the made weights depend on here."""
        return {"maker": self.name, "version": self.version, **asdict(self)}

    def architecture(self, members: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The architecture of what is made, as `trainer.Architecture.described` has it, from those of the members."""
        return next(iter(members.values()))

    @abstractmethod
    def make(self, members: Mapping[str, nn.Module], data: Dataset, seed: int) -> Made:
        """Make it.

        Args:
            members: networks by name, in the order given, of one architecture where `alike`; they must be left as they are.
            data: `train` and `calibration` may be looked at, `test` never.
            seed: of what is random.
        """


def make_key(maker: Maker, folders: Sequence[Path], data: Dataset, seed: int) -> str:
    """The content key of the weights that are made. Members' folders are called by theirs, so they need not be there yet.

    Raises:
        ConfigError: too few members.
    """
    if len(folders) < maker.least:
        raise ConfigError(f"{maker.name}: made of {len(folders)} models, expected at least {maker.least}")
    return key_of(
        {
            "kind": "making",
            "version": MAKING_VERSION,
            "maker": maker.spec(),
            "of": [folder.name for folder in folders],
            "train": data["train"].fingerprint() if "train" in data.splits else None,
            "calibration": data["calibration"].fingerprint() if "calibration" in data.splits else None,
            "seed": seed,
        }
    )


def make(maker: Maker, folders: Mapping[str, Path], data: Dataset, out: Path, seed: int = 0) -> Path:
    """Make a model of the checkpoints in `folders`, by name, into the folder `out`; one that is there is left as it is.

    Raises:
        ConfigError: too few members; `out` holds another model.
        ModelError: members of different architectures.
    """
    key = make_key(maker, list(folders.values()), data, seed)
    finished = out / RECIPE_FILE
    if finished.is_file():
        if json.loads(finished.read_text(encoding="utf-8")).get("key") != key:
            raise ConfigError(f"{out} holds another model. Give another folder, or remove this one.")
        return out
    members = {name: load_model(str(folder)).module for name, folder in folders.items()}
    described = {
        name: json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))["architecture"]
        for name, folder in folders.items()
    }
    if maker.alike:
        check_alike(members)
    made = maker.make(members, data, seed)
    from safetensors.torch import save_file

    weights = {name: value.detach().cpu().contiguous().clone() for name, value in made.state.items()}
    write_atomically(out / WEIGHTS_FILE, lambda file: save_file(weights, str(file)))
    description = {
        "key": key,
        "made": {**maker.spec(), "of": list(folders), "seed": seed, "report": made.report},
        "architecture": maker.architecture(described),
        "data": data.describe(),
        "weights": {"file": WEIGHTS_FILE, **seal(out / WEIGHTS_FILE)},
    }
    text = json.dumps(description, indent=1)
    write_atomically(finished, lambda file: file.write_text(text, encoding="utf-8"))  # last: it marks the folder
    return out


def check_alike(members: Mapping[str, nn.Module]) -> None:
    """Raise ModelError unless all have the same tensors, by name and shape."""
    shapes = {
        name: {k: (tuple(v.shape), v.dtype) for k, v in module.state_dict().items()} for name, module in members.items()
    }
    first = next(iter(shapes))
    for name, mine in shapes.items():
        for key in sorted({*mine, *shapes[first]}):
            if mine.get(key) != shapes[first].get(key):
                raise ModelError(
                    f"'{name}' and '{first}' differ at {key}: {mine.get(key, 'missing')} and "
                    f"{shapes[first].get(key, 'missing')}. Expected models of one architecture, trained from one start."
                )


def with_state(module: nn.Module, state: State) -> nn.Module:
    """A copy of a network with other weights."""
    changed = copy.deepcopy(module)
    changed.load_state_dict(state)
    return changed


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether some layer keeps statistics of its inputs."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in module.modules())


def batches_of(data: Dataset, n: int, batch_size: int) -> Iterator[Tensor]:
    """The first n training images, a stratified sample, in batches."""
    split = data["train"].take(n)
    for start in range(0, len(split), batch_size):
        yield split.images(slice(start, start + batch_size))


def attacked_batches_of(
    data: Dataset, n: int, batch_size: int, network: nn.Module, attack: Attack, seed: int
) -> Iterator[Tensor]:
    """The first training images as an attack on this network leaves them: those that are misclassified anyhow as they are.

    The network is attacked as it was when this was called, whatever happens to it while batches are taken.
    """
    target = copy.deepcopy(network)

    def made() -> Iterator[Tensor]:
        split = data["train"].take(n)
        for start in range(0, len(split), batch_size):
            part = slice(start, start + batch_size)
            labels = torch.from_numpy(split.labels[part])
            yield attack(target, split.images(part), labels, ids=split.ids[part], seed=seed).x_adv

    return made()


@torch.no_grad()
def recompute_statistics(module: nn.Module, batches: Iterator[Tensor]) -> None:
    """Set the running statistics of batch norms to those of the given batches: an average over batches, each with equal weight.

    After weights were changed by hand, the statistics that were learnt with the old ones belong to nobody (Izmailov et al.
    2018, arXiv 1803.05407, section 3.2). Layers before the last changed one see their inputs through statistics of the batch.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    modes = [(m, m.training) for m in module.modules()]
    momenta = [(m, m.momentum) for m in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    try:
        for batch in batches:
            module(batch)
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for part, mode in modes:
            part.training = mode
