"""Regressors of tabular data: the contract, loading by name, and training that takes seconds.

    mlp                                  a multilayer perceptron (fresh weights; `train_regressor` trains it)
    sklearn:ensemble.RandomForestRegressor  a regressor of scikit-learn, fitted to the train split where it is loaded
    runs/x/models/KEY                    what `train_regressor` left (a folder)
    pkg.module:factory, file.py:factory  your own: a torch.nn.Module, or anything with a method `predict`

A regressor takes float32 (N, d) in raw units and returns (N,) or (N, 1) in units of the target; scaling happens inside it.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustbench_ext.catalog import REGRESSORS
from robustbench_ext.data.base import REGRESSION, Dataset
from robustbench_ext.data.columns import Columns
from robustbench_ext.errors import ConfigError, DataError, ModelError, RobustBenchExtError, unknown_name
from robustbench_ext.files import seal, write_atomically
from robustbench_ext.fingerprint import hash_arrays, key_of
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.fingerprints import fingerprint_module
from robustbench_ext.models.imports import made_by
from robustbench_ext.models.loading import RECIPE_FILE, WEIGHTS_FILE, LoadedModel
from robustbench_ext.models.mlp import Standardized
from robustbench_ext.models.objective import LeastSquares, Objective
from robustbench_ext.models.observe_regressor import check_predictions, check_table, observe_regressor, predictions_of
from robustbench_ext.models.predictor import SKLEARN, Predictor, SklearnRegressor
from robustbench_ext.models.sources.base import seeded
from robustbench_ext.models.weights import load_weights
from robustbench_ext.named_code import split_named
from robustbench_ext.numbers import read_numbers
from robustbench_ext.randomness import SampleRandom

__all__ = [
    "RegressorRecipe",
    "check_predictions",
    "check_table",
    "load_regressor",
    "observe_regressor",
    "predictions_of",
    "regressor_key",
    "train_regressor",
]

TRAINER_VERSION = 1

# Loading -------------------------------------------------------------------------------------------------------------


def load_regressor(
    spec: str,
    data: Dataset,
    *,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LoadedModel:
    """Load a regressor by its specification (see the module's docstring).

    Args:
        spec: a name, a factory, or a folder that `train_regressor` wrote. `mlp + weights.safetensors` is understood too.
        data: what it is to predict; standardisation and scikit-learn's fit use the train split.
        kwargs: of the network, the scikit-learn class or the factory.
        weights: a safetensors file.
        seed: of fresh weights and of scikit-learn's fit.

    Raises:
        ModelError: nothing of that name, a fit or a factory that fails, or one that does not predict (N,) from (N, d).
        DataError: the data is no regression data.
    """
    _check_data(data, spec)
    name, plus, file = (part.strip() for part in spec.partition("+"))
    weights, options = (file if plus else weights), dict(kwargs or {})
    folder = Path(name)
    module = _trained(folder, data) if (folder / RECIPE_FILE).is_file() else _build(name, data, options, seed)
    if weights is not None:
        load_weights(module, Path(weights))
    return adopt_regressor(module.to(device), data, spec, options)


def adopt_regressor(
    module: nn.Module, data: Dataset, spec: str, kwargs: Mapping[str, Any] | None = None
) -> LoadedModel:
    """A module that predicts (N,) from (N, d), with its fingerprint; see `load_regressor` for what it raises."""
    _check_data(data, spec)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    probe = data[next(iter(data.splits))].inputs(slice(0, 256)).to(device)
    with torch.no_grad(), frozen_eval(module):
        predicted = predictions_of(module, probe)
    fingerprint = _fingerprint(module, kwargs or {}, predicted)
    return LoadedModel(spec, module, fingerprint, tuple(getattr(module, "notes", ())))


def _check_data(data: Dataset, spec: str) -> None:
    if data.task != REGRESSION:
        raise DataError(
            f"model '{spec}' is a regressor, and '{data.name}' is data for {data.task}. Give regression data, such as diabetes "
            f"or csv:PATH#target=COLUMN."
        )


def _build(name: str, data: Dataset, kwargs: Mapping[str, Any], seed: int) -> nn.Module:
    if name.startswith(SKLEARN):
        return SklearnRegressor(name, kwargs, data, seed)
    if name in REGRESSORS:
        with seeded(seed):
            try:
                network = REGRESSORS.load(name)(data.shape[0], **kwargs)
            except TypeError as error:
                raise ModelError(f"model '{name}': {error}") from error
        wrapped = Standardized(network, data.shape[0])
        return wrapped.learn(Columns.of(data), data["train"].labels) if "train" in data.splits else wrapped
    if split_named(name)[1]:
        with seeded(0):  # a factory that does not seed itself must still give the same weights in every process
            made = made_by(name, kwargs, _predicts, "a torch.nn.Module or a method `predict`")
        return made if isinstance(made, nn.Module) else Predictor(made, type(made).__qualname__)
    if name.endswith(".py"):
        raise ModelError(f"model '{name}': name the factory in the file, such as {name}:build")
    raise ModelError(
        unknown_name("regressor", name, REGRESSORS.names())
        + " Or give sklearn:MODULE.CLASS, pkg.module:factory, file.py:factory or a folder that training wrote."
    )


def _predicts(thing: Any) -> bool:
    """Whether a thing is a regressor, and not what makes one."""
    return isinstance(thing, nn.Module) or (callable(getattr(thing, "predict", None)) and not inspect.isclass(thing))


def _fingerprint(module: nn.Module, kwargs: Mapping[str, Any], predicted: Tensor) -> str:
    """As of other models; of what keeps its state outside tensors, its predictions and its library stand for it."""
    if not isinstance(module, Predictor):
        return fingerprint_module(module, dict(kwargs))
    cls = type(module.estimator)
    try:
        source = hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (TypeError, OSError):  # a class without a file, such as one of a compiled module
        source = cls.__module__
    said = {
        "kwargs": dict(kwargs),
        "class": cls.__qualname__,
        "source": source,
        "predictions": hash_arrays({"predicted": predicted.cpu().numpy()}),
    }
    return fingerprint_module(module, said)


# Training ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RegressorRecipe:
    """How a network is trained on standardised targets, best epoch by squared error on a held-out part of the train split.

    Attributes:
        epochs: at most so many.
        batch_size: samples of a step.
        lr: learning rate.
        weight_decay: decoupled from the gradient (AdamW); 0 is Adam.
        held_out: fraction of the train split that chooses the epoch and is not trained on; 0: all epochs, the last weights.
        patience: epochs without a better held-out error before training ends.
    """

    epochs: int = 300
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-4
    held_out: float = 0.15
    patience: int = 30

    def __post_init__(self) -> None:
        read_numbers(self, "recipe")
        positive = min(self.epochs, self.batch_size, self.patience) >= 1 and self.lr > 0 and self.weight_decay >= 0
        if not positive or not 0 <= self.held_out <= 0.5:
            raise ConfigError(
                f"recipe: {asdict(self)}: expected epochs, batch_size and patience >= 1, lr > 0, weight_decay >= 0 and "
                f"held_out in [0, 0.5]"
            )


def regressor_key(
    spec: str,
    data: Dataset,
    recipe: RegressorRecipe,
    kwargs: Mapping[str, Any],
    seed: int,
    objective: Objective | None = None,
) -> str:
    """The content key of the weights that this training gives."""
    _check_data(data, spec)
    said: dict[str, Any] = {
        "kind": "regressor",
        "version": TRAINER_VERSION,
        "spec": spec,
        "kwargs": dict(kwargs),
        "train": data["train"].fingerprint(),
        "seed": seed,
    }
    if spec.startswith(SKLEARN):
        return key_of(said | {"library": _sklearn_version()})
    if objective is not None and not isinstance(objective, LeastSquares):
        said["objective"] = objective.spec()
    return key_of(said | {"recipe": asdict(recipe), "weights": fingerprint_module(_network(spec, data, kwargs, seed))})


def train_regressor(
    spec: str,
    data: Dataset,
    folder: Path,
    *,
    seed: int = 0,
    recipe: RegressorRecipe | None = None,
    kwargs: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train, and write `model.safetensors` and `model.json` (recipe and curve) into the folder; at once if that is done.

    Only the train split is looked at. Order and dropout are functions of (seed, epoch, batch), so a run gives the same bits on
    the same machine and number of threads. A scikit-learn regressor leaves its specification alone, and is fitted again,
    deterministically, where it is loaded: no pickles.

    Args:
        spec: `mlp`, `sklearn:MODULE.CLASS`, or a factory of a network (which is then put behind standardised inputs and
            targets, and trained).
        data: regression data.
        seed: of the weights, the order and scikit-learn's random_state.
        recipe: of networks; scikit-learn's parameters are kwargs.
        kwargs: of the network or class.
        objective: of networks: what is made small, least squares by default.
        on_epoch: called with the epoch's row of the curve: epoch, epochs, loss, held_out (mean squared errors over the
            variance of the target); of other objectives also what they log.

    Raises:
        ConfigError: the folder holds another training, or the objective cannot train the network.
        ModelError, DataError: as of `load_regressor`.
        RobustBenchExtError: the loss became NaN or infinite.
    """
    recipe, kwargs = recipe or RegressorRecipe(), dict(kwargs or {})
    objective = objective or LeastSquares()
    key = regressor_key(spec, data, recipe, kwargs, seed, objective)
    finished = folder / RECIPE_FILE
    if finished.is_file():
        if json.loads(finished.read_text(encoding="utf-8")).get("key") != key:
            raise ConfigError(
                f"{folder} holds a model of another training run (other recipe, data, network or seed). Give another folder, "
                f"or remove this one."
            )
        return folder
    said: dict[str, Any] = {
        "key": key,
        "regressor": {"spec": spec, "kwargs": kwargs, "seed": seed},
        "data": data.describe(),
        "seed": seed,
    }
    if not isinstance(objective, LeastSquares):
        said["defense"] = objective.spec()
    if spec.startswith(SKLEARN):
        module: nn.Module = SklearnRegressor(spec, kwargs, data, seed)
        said |= {"library": _sklearn_version(), "predictions": _first_predictions(module, data)}
    else:
        network = _network(spec, data, kwargs, seed)
        objective.check(network)
        curve, best = _fit(network, data, recipe, objective, seed, on_epoch)
        _save(network, folder / WEIGHTS_FILE)
        said |= {"recipe": asdict(recipe), "selected": {"epoch": best, "by": "held_out", "on": "train"}, "curve": curve}
        said["weights"] = {"file": WEIGHTS_FILE, **seal(folder / WEIGHTS_FILE)}
    text = json.dumps(said, indent=1)
    write_atomically(finished, lambda file: file.write_text(text, encoding="utf-8"))  # last: it marks the folder
    return folder


def _network(spec: str, data: Dataset, kwargs: Mapping[str, Any], seed: int) -> Standardized:
    """The network to train, behind standardised inputs and targets."""
    module = _build(spec, data, kwargs, seed)
    if isinstance(module, Predictor) or not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(f"model '{spec}' has no parameters to train: give it as it is, without training")
    if isinstance(module, Standardized):
        return module
    return Standardized(module, data.shape[0]).learn(Columns.of(data), data["train"].labels)


def _fit(
    network: Standardized,
    data: Dataset,
    recipe: RegressorRecipe,
    objective: Objective,
    seed: int,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> tuple[list[dict[str, float]], int]:
    """Train in place; the network ends at its best weights. Returns the curve and the best epoch (1, 2, ...)."""
    split = data["train"]
    # The order of a split is stratified, so its last part is a fair sample of it.
    kept = len(split) - round(recipe.held_out * len(split))
    x, ids = split.inputs(slice(None)), split.ids[:kept]
    y = ((torch.from_numpy(split.labels) - network.target_mean) / network.target_std).float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    batches = np.array_split(np.arange(kept), math.ceil(kept / recipe.batch_size))
    order_of, dice_of = SampleRandom.of(seed, ids, "epoch-order"), SampleRandom.of(seed, range(len(batches)), "global")
    curve: list[dict[str, float]] = []
    best, best_epoch, weights = math.inf, 0, copy.deepcopy(network.state_dict())
    for epoch in range(recipe.epochs):
        draws = order_of.bits(1, step=epoch)[:, 0].numpy()
        order = torch.from_numpy(np.lexsort((ids, draws)))
        dice = dice_of.bits(1, step=epoch)[:, 0].tolist()
        sums: dict[str, float] = {}
        network.train()
        for batch, die in zip(batches, dice, strict=True):
            rows = order[torch.from_numpy(batch)]
            with seeded(die):  # for dropout
                loss, logs = objective.loss(network, x[rows], y[rows])
            if not bool(torch.isfinite(loss)):
                raise RobustBenchExtError(f"the training loss became {float(loss)} in epoch {epoch + 1}. Lower lr.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for name, value in logs.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * len(rows)
        network.eval()
        means = {name: total / kept for name, total in sums.items()}
        row = {"epoch": epoch + 1, "loss": means.pop("squared_error"), **means}
        if kept < len(split):
            with torch.no_grad():
                row["held_out"] = float(F.mse_loss(network.scaled(x[kept:]).double(), y[kept:].double()))
        curve.append(row)
        if row.get("held_out", -epoch) < best:
            best, best_epoch, weights = row.get("held_out", -epoch), epoch + 1, copy.deepcopy(network.state_dict())
        if on_epoch is not None:
            on_epoch({**row, "epochs": recipe.epochs})
        if epoch + 1 - best_epoch >= recipe.patience:
            break
    network.load_state_dict(weights)
    return curve, best_epoch


def _save(network: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    state = {name: value.cpu().contiguous().clone() for name, value in network.state_dict().items()}
    write_atomically(file, lambda temporary: save_file(state, str(temporary)))


def _trained(folder: Path, data: Dataset) -> nn.Module:
    """What `train_regressor` left in a folder."""
    said = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    if "regressor" not in said:
        raise ModelError(f"model '{folder}' is no regressor: rbx train wrote a classifier there")
    made = said["regressor"]
    if not made["spec"].startswith(SKLEARN):
        trained_on = len(said["data"]["features"])
        if data.shape != (trained_on,):
            raise ModelError(
                f"model '{folder}' was trained on {said['data']['name']} with {trained_on} columns, and {data.name} has "
                f"{data.shape[0]}"
            )
        network = _network(made["spec"], data, made["kwargs"], made["seed"])
        load_weights(network, folder / WEIGHTS_FILE)
        return network
    if data["train"].fingerprint() != said["data"]["splits"]["train"]["fingerprint"]:
        raise ModelError(
            f"model '{folder}': {made['spec']} is fitted again where it is loaded, and the train split of {data.name} is not "
            f"the one of {said['data']['name']} that it was fitted to. Load it with that data."
        )
    module = SklearnRegressor(made["spec"], made["kwargs"], data, made["seed"])
    if _first_predictions(module, data) != said["predictions"]:
        module.notes += (
            f"fitted again with scikit-learn {_sklearn_version()}, it predicts otherwise than when it was trained with "
            f"{said['library']}",
        )
    return module


def _first_predictions(module: nn.Module, data: Dataset) -> str:
    predicted = predictions_of(module, data["train"].inputs(slice(0, 256)))
    return hash_arrays({"predicted": predicted.numpy()})


def _sklearn_version() -> str:
    import sklearn

    return str(sklearn.__version__)
