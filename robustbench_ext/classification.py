"""Images and classes: what the engine does with classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.checks import Check
from robustbench_ext.conditions import Condition, parse_conditions
from robustbench_ext.data import load_dataset
from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.data.exchange import with_train_of
from robustbench_ext.device import settled
from robustbench_ext.errors import ConfigError, DataError, RobustBenchExtError
from robustbench_ext.models import LoadedModel, Observations, Taps, fingerprint_module, load_model, observe, wrap
from robustbench_ext.preflight import PREFLIGHT_VERSION, SAMPLES, preflight
from robustbench_ext.probes import EstimatorProbe
from robustbench_ext.suite import ModelEntry
from robustbench_ext.task import Columns, Task, Training

if TYPE_CHECKING:
    from robustbench_ext.own_metrics import OwnMetric


class Classification(Task):
    """Records hold `label` (int64), `logits` (n, K) and `features/NAME`."""

    estimator: ClassVar[type[EstimatorProbe]] = EstimatorProbe
    preflight_version: ClassVar[int] = PREFLIGHT_VERSION
    preflight_n: ClassVar[int] = SAMPLES

    def conditions(self, entries: Sequence[str | Mapping[str, Any]]) -> list[Condition]:
        return parse_conditions(entries)

    def metrics(self, specs: Sequence[str]) -> list[OwnMetric]:
        from robustbench_ext.own_metrics import own_metrics

        return own_metrics(specs, len(self.data.classes))

    # Models ----------------------------------------------------------------------------------------------------------

    def training(self, entry: ModelEntry, models: Path, others: Mapping[str, Training]) -> Training:
        from defenses.recipes import plan
        from defenses.trainer import Architecture, train, training_key

        told = entry.train
        if told is None:
            return self._making(entry, models, others)
        if not told.defense:
            raise ConfigError(f"model '{entry.name}': train: missing defense, for example defense: standard")
        try:
            taught = {} if told.teacher is None else {"teacher": str(others[told.teacher].folder)}
            options = {**told.defense_options(), **taught}
            made = plan(told.defense_name(), told.recipe, options, told.network, told.kwargs)
        except ConfigError as error:
            raise ConfigError(f"model '{entry.name}': {error}") from None
        start = None if told.start is None else others[told.start]
        if start is not None and told.network not in (None, start.spec):
            raise ConfigError(
                f"model '{entry.name}': it starts from '{told.start}', whose network is {start.spec}; leave out network"
            )
        kwargs = dict(made.kwargs) or None
        classes = len(self.data.classes)
        architecture = Architecture(made.network, self.data.shape, classes, entry.mean, entry.std, kwargs)
        if start is not None:
            architecture = replace(start.architecture, start=str(start.folder))
        data = self._trained_on(told.data, entry.name)
        key = training_key(made.defense, architecture, data, made.recipe, told.seed)
        folder, epochs = models / key, made.recipe.epochs
        keep = tuple(range(1, epochs + 1)) if told.keep == "all" else tuple(told.keep)
        if keep and max(keep) > epochs:
            raise ConfigError(f"model '{entry.name}': keep: {max(keep)}, but its training has {epochs} epochs")

        def run(on_epoch: Callable[[dict[str, Any]], None]) -> None:
            with settled() as device:
                train(
                    made.defense,
                    architecture,
                    data,
                    made.recipe,
                    folder,
                    told.seed,
                    on_epoch,
                    device=str(device),
                    keep=keep,
                )

        fresh = start.fresh if start is not None else lambda: architecture.build(0)
        return Training(architecture.spec, folder, epochs, fresh, run, entry.needs, architecture, keep, data)

    def _trained_on(self, spec: str | None, model: str) -> Dataset:
        """The suite's data, with the train split of another one where a model names it."""
        if spec is None:
            return self.data
        try:
            return with_train_of(self.data, load_dataset(spec))
        except RobustBenchExtError as error:
            raise ConfigError(f"model '{model}': train: {error}") from None

    def _making(self, entry: ModelEntry, models: Path, others: Mapping[str, Training]) -> Training:
        from defenses.making import make, make_key
        from defenses.trainer import Architecture
        from robustbench_ext.attacks.base import build
        from robustbench_ext.catalog import MAKERS

        told = entry.make
        assert told is not None  # noqa: S101 - an entry has a spec, train or make
        if entry.mean is not None or entry.std is not None:
            raise ConfigError(f"model '{entry.name}': it is made of {', '.join(told.of)} and normalises as they do")
        maker = build(MAKERS.load(told.name), told.name, told.options())
        members = [others[name] for name in told.of]
        data = members[0].data
        if len({m.data["train"].fingerprint() for m in members if "train" in m.data.splits}) > 1:
            raise ConfigError(
                f"model '{entry.name}': it is made of models that were trained on different data, so it is not known whose "
                f"class frequencies and images count; name models of one train: data"
            )
        folder = models / make_key(maker, [m.folder for m in members], data, told.seed)

        def run(on_epoch: Callable[[dict[str, Any]], None]) -> None:
            make(maker, dict(zip(told.of, (m.folder for m in members), strict=True)), data, folder, told.seed)

        first = members[0]
        if maker.alike:
            return Training(first.spec, folder, 0, first.fresh, run, told.of, first.architecture, data=data)
        described = {name: m.architecture.described() for name, m in zip(told.of, members, strict=True)}
        architecture = Architecture(**maker.architecture(described))
        spec, fresh = architecture.spec, lambda: architecture.build(0)
        return Training(spec, folder, 0, fresh, run, told.of, architecture, data=data)

    def load(self, entry: ModelEntry) -> LoadedModel:
        return load_model(
            str(entry.spec),
            shape=self.data.shape,
            num_classes=len(self.data.classes),
            mean=entry.mean,
            std=entry.std,
            weights=entry.weights,
            kwargs=entry.kwargs,
            data=self.data,
        )

    def adopt(self, module: nn.Module, entry: ModelEntry) -> LoadedModel:
        wrapped = wrap(module, entry.mean, entry.std)
        return LoadedModel(str(entry.spec), wrapped, fingerprint_module(wrapped, {}))

    def load_other(self, spec: str) -> LoadedModel:
        return load_model(spec, shape=self.data.shape, num_classes=len(self.data.classes), data=self.data)

    def preflight(self, model: nn.Module, seed: int, n: int) -> list[Check]:
        return preflight(model, self.data["test"], n, seed)

    # Cells -----------------------------------------------------------------------------------------------------------

    def targets(self, samples: Split, rows: slice) -> np.ndarray:
        return samples.labels[rows]

    def inputs(self, samples: Split, rows: slice) -> Tensor:
        return samples.images(rows)

    def clean_outputs(self, columns: Sequence[Columns]) -> Tensor:
        return torch.cat([torch.from_numpy(c["logits"]) for c in columns])

    def reader(self, model: nn.Module, taps: Sequence[str]) -> Taps:
        return Taps(model, taps)

    def observe(self, reader: Taps, x: Tensor, targets: np.ndarray, batch_size: int) -> Columns:
        seen = observe(reader.model, x, torch.from_numpy(targets), reader, batch_size)
        columns = {"label": targets, "logits": seen.logits.numpy()}
        return columns | {f"features/{name}": value.numpy() for name, value in seen.features.items()}

    def check_clean(self, model: str, columns: Columns) -> None:
        labels, outputs = columns["label"], columns["logits"].shape[1]
        if labels.max() >= outputs:
            raise DataError(
                f"labels reach {labels.max()}, but model '{model}' has {outputs} outputs. "
                f"Use data and a model with the same classes."
            )

    def preview(self, x: Tensor) -> Columns:
        return {"preview": (x.clamp(0, 1) * 255).round().to(torch.uint8).numpy()}

    def seen(self, columns: Sequence[Columns]) -> Observations:
        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([c[name] for c in columns]))

        taps = [name for name in columns[0] if name.startswith("features/")]
        features = {name.partition("/")[2]: joined(name) for name in taps}
        return Observations(joined("logits"), joined("label"), features)

    def progress(self, columns: Columns) -> dict[str, Any]:
        """Correct samples: by the attack's verdict where there was one; None for outliers."""
        if "broken" in columns:
            return {"correct": int((~columns["broken"]).sum())}
        if (columns["label"] < 0).any():
            return {"correct": None}
        return {"correct": int((columns["logits"].argmax(1) == columns["label"]).sum())}
