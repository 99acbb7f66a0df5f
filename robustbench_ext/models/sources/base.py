"""What every source of models is asked, what it answers, and how it says no."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_ext.data.base import Dataset
from robustbench_ext.errors import ConfigError, MissingExtraError, ModelError
from robustbench_ext.settings import UNSAFE

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # how files of weights end


@dataclass(frozen=True)
class Wanted:
    """A model that somebody names.

    Attributes:
        spec: as it was given; source, name: before and behind its first colon.
        shape: (C, H, W) of the data; num_classes: K.
        weights: a file, or the name of published weights.
        kwargs: what else was said; of the source, or of the network.
        seed: of fresh weights, and of what is fitted.
        data: the data, where it is known; only what is fitted needs it.
    """

    spec: str
    name: str
    shape: tuple[int, int, int]
    num_classes: int
    source: str = ""
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    data: Dataset | None = None

    @property
    def weights_file(self) -> bool:
        """Whether `weights` is a file."""
        return self.weights is not None and self.weights.endswith(WEIGHT_FILES)


@dataclass
class Found:
    """A model as its source gives it.

    Attributes:
        module: (N, C, H, W) in, (N, K) logits out.
        mean, std: normalisation of [0, 1] images that it expects and does not apply itself; None where nothing is known.
        size: (C, H, W) that it was made for, where that is known.
        notes: what was read, and from where.
        weights: a file that is still to be loaded into the module.
    """

    module: nn.Module
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: tuple[int, int, int] | None = None
    notes: list[str] = field(default_factory=list)
    weights: str | None = None


def package(name: str, extra: str, wanted: Wanted) -> Any:
    """An optional package.

    Raises:
        MissingExtraError: it is not installed; the message holds the line that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        raise MissingExtraError(
            f"model '{wanted.spec}' needs the package {missing}: pip install 'robustbench-ext[{extra}]'"
        ) from error


def existing_file(wanted: Wanted) -> Path:
    """The file that is named.

    Raises:
        ModelError: it does not exist, or weights were given for a file that holds its own.
    """
    file = Path(wanted.name)
    if not file.is_file():
        raise ModelError(f"model '{wanted.spec}': there is no file {file.resolve()}")
    if wanted.weights is not None:
        raise ModelError(
            f"model '{wanted.spec}': {file.name} holds its own weights; leave out weights {wanted.weights}"
        )
    return file


def unsafe_allowed() -> bool:
    """Whether the user allows files that can run code when they are loaded."""
    return os.environ.get(UNSAFE) == "1"


def refuse_unsafe(spec: str, risk: str, instead: str) -> None:
    """Raise unless the user allows files that can run code.

    Raises:
        ModelError: what the risk is, what to do instead, and how to allow it.
    """
    if not unsafe_allowed():
        raise ModelError(
            f"model '{spec}': {risk}, so loading it would run whatever its author put in. {instead} If you trust where the "
            f"file comes from, allow it: --allow-unsafe-load on the command line, or {UNSAFE}=1."
        )


def options(wanted: Wanted, **defaults: Any) -> dict[str, Any]:
    """The options of a source that takes no others.

    Raises:
        ConfigError: an option that it does not have.
    """
    from robustbench_ext.errors import unknown_name

    for given in wanted.kwargs:
        if given not in defaults:
            raise ConfigError(f"model '{wanted.spec}': {unknown_name('option', given, defaults)}")
    return {**defaults, **wanted.kwargs}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator set to `seed` inside the block, and as it was after it."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        yield


def in_batches(call: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """`call` on as many inputs at a time as it was made for (0: any number); the last batch is filled up."""
    if size < 1 or len(x) == size:
        return call(x)
    parts = []
    for part in x.split(size):
        filled = part if len(part) == size else torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
        parts.append(call(filled)[: len(part)])
    return torch.cat(parts)
