"""One trainer for every defense: data order, augmentation, inner attack, schedule, validation, checkpoints.

All randomness is counter-based - the order of an epoch, augmentations and the attack's starts are functions of (seed,
epoch, sample id), and the global generator, which dropout uses, is seeded anew for every step - so a checkpoint needs no
generator states: a run that is killed in the middle of an epoch and is started again ends at the same weights, bit for
bit on the CPU, as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.averaging import Average
from defenses.base import Batch, Crafter, Defense, Task
from defenses.recipe import Recipe
from defenses.runtime import Runtime
from defenses.validation import Alarm, measure_energies, validate
from robustbench_ext.data.base import Dataset, Split
from robustbench_ext.device import float32
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.files import seal, write_atomically
from robustbench_ext.fingerprint import key_of
from robustbench_ext.models import checkpoints
from robustbench_ext.models.contract import check_images
from robustbench_ext.models.loading import RECIPE_FILE, WEIGHTS_FILE, fingerprint_module, load_model
from robustbench_ext.randomness import SampleRandom, sample_keys

__all__ = ["Architecture", "Recipe", "train", "training_key"]

CHECKPOINT_FILE = "checkpoint.pt"
TRAINER_VERSION = 2
CORRUPTING = ("corruptions", "severity", "corruption_prob")


@dataclass(frozen=True)
class Architecture:
    """The network to train, by its specification; `mean` and `std` are applied inside it.

    Attributes:
        start: the folder of a trained model of the same network, whose weights training starts from.
    """

    spec: str
    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    kwargs: dict[str, Any] | None = None
    start: str | None = None

    def build(self, seed: int) -> nn.Module:
        """The network; reference networks get other weights for another seed, given weights and factories stay."""
        if self.start is not None:
            return load_model(self.start).module
        return load_model(
            self.spec,
            shape=self.shape,
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
            kwargs=self.kwargs,
            seed=seed,
        ).module

    def described(self) -> dict[str, Any]:
        """As it stands in keys and in model.json: where a start lies is no part of it, which one it is is another entry."""
        return {name: value for name, value in asdict(self).items() if name != "start"}

    def weights(self, seed: int) -> str:
        """A key of the weights before training. A start's folder is called by its content key, so it need not be there yet."""
        return fingerprint_module(self.build(seed)) if self.start is None else f"start {Path(self.start).name}"


def training_key(
    defense: Defense, architecture: Architecture, data: Dataset, recipe: Recipe, seed: int, processes: int = 1
) -> str:
    """The content key of the weights that this training gives."""
    # Batch norm on CPUs, AWP and CutMix see their own process's part of a batch.
    return key_of(
        ({"processes": processes} if processes > 1 else {})
        | {
            "kind": "training",
            "version": TRAINER_VERSION,
            "defense": defense.spec(),
            "architecture": architecture.described(),
            "weights": architecture.weights(seed),
            "recipe": _recipe_key(recipe),
            "train": data["train"].fingerprint(),
            "calibration": data["calibration"].fingerprint(),
            "seed": seed,
        }
    )


def _recipe_key(recipe: Recipe) -> dict[str, Any]:
    """All options that the weights depend on; those of corruptions and of gradient noise only where there are any."""
    told = asdict(recipe)
    if recipe.grad_noise is None:
        del told["grad_noise"]
    if not recipe.augmentation.corruptions:
        told["augmentation"] = {k: v for k, v in told["augmentation"].items() if k not in CORRUPTING}
    return told


def train(
    defense: Defense,
    architecture: Architecture,
    data: Dataset,
    recipe: Recipe,
    out: Path,
    seed: int = 0,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_batch: Callable[[int, int, int], None] | None = None,
    device: str = "cpu",
    checkpoint_seconds: float = 60.0,
    keep: Collection[int] | Literal["all"] = (),
) -> Path:
    """Train, keep the best epoch, write `model.safetensors`, `model.json` and the curve into the folder `out`.

    Training that was interrupted goes on at the last checkpoint; training that is done already is not repeated. Under
    accelerate's launcher every process calls this with the same arguments; one of them writes.

    Where a training that is done lacks a checkpoint to `keep`, it is done again up to that epoch; its model stays as it is. On
    the CPU that gives the same weights bit for bit; where it does not (another machine, a GPU), model.json says of these
    checkpoints that they are `another` training's.

    Args:
        defense: the objective.
        data: trained on `train`; the best epoch is chosen on `calibration`, by the accuracy that `defense.select_by`
            names (ties go to the other one). `test` is never touched.
        on_epoch: called with the epoch's row of the curve.
        on_batch: called with (epoch, batch, batches).
        device: "cpu", "cuda", "auto"; see `defenses.runtime`.
        checkpoint_seconds: at least so long between checkpoints within an epoch; every epoch ends with one. On several
            processes there are none within an epoch.
        keep: epochs, from 1, after which the weights are kept as well (`robustbench_ext.models.checkpoints`), as they would
            have been published then; an epoch that the training does not come to is left out. Nothing else depends on it.

    Raises:
        ConfigError: `out` holds another training run, finished or not, or the recipe asks for what the defense cannot do.
        RobustBenchExtError: the loss became NaN or infinite.
    """
    if not defense.soft_targets and (recipe.label_smoothing or recipe.augmentation.cutmix):
        raise ConfigError(
            f"{defense.name} is defined for labels, not for probabilities: leave out label_smoothing and cutmix"
        )
    runtime = Runtime(device, recipe.precision)
    if recipe.batch_size < 2 * runtime.world:
        raise ConfigError(
            f"recipe: batch_size = {recipe.batch_size} for {runtime.world} processes, expected 2 for each"
        )
    key = training_key(defense, architecture, data, recipe, seed, runtime.world)
    out.mkdir(parents=True, exist_ok=True)
    finished = out / RECIPE_FILE
    is_finished = finished.is_file()
    if is_finished and json.loads(finished.read_text(encoding="utf-8"))["key"] != key:
        raise ConfigError(
            f"{out} holds a model of another training run (other recipe, data, network or seed). "
            f"Give another --out, or remove the folder."
        )
    wanted = _wanted(keep, recipe.epochs)

    def run(kept: Collection[int], until: int | None = None) -> None:
        training = _Training(
            defense, architecture, data, recipe, seed, runtime, key, out, checkpoint_seconds, kept, until
        )
        training.resume()
        while not training.is_over:
            row = training.epoch(on_batch)
            if on_epoch is not None and runtime.is_main:
                on_epoch(row)
        if runtime.is_main:
            training.publish()
        runtime.close()

    # One key, one kind of numbers: on a GPU PyTorch's own default would train with TF32 convolutions.
    with float32(), _determinism(recipe.deterministic):
        if not is_finished:
            run(wanted)
        if wanted and (lacking := runtime.from_main(lambda: checkpoints.missing(out, wanted))):
            run(lacking, max(lacking))
    return out


def _wanted(keep: Collection[int] | Literal["all"], epochs: int) -> list[int]:
    """The epochs to keep."""
    if keep == "all":
        return list(range(1, epochs + 1))
    wanted = sorted(set(keep))
    if any(not isinstance(epoch, int) or not 1 <= epoch <= epochs for epoch in wanted):
        raise ConfigError(f"keep = {keep!r}, expected epochs from 1 to {epochs}, the last one of this recipe, or 'all'")
    return wanted


@dataclass
class _Progress:
    """Where a training stands: what is done, the curve, the best weights so far. A checkpoint holds all of it."""

    epoch: int = 0
    batch: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: tuple[float, float] = (-1.0, -1.0)
    best_epoch: int = 0
    alarm: int | None = None
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)


class _Training:
    """One run: what is fixed for its length, and its progress.

    Args:
        keep: epochs whose weights are kept.
        until: where it does again what is finished already: the epoch that it ends with.
    """

    def __init__(
        self,
        defense: Defense,
        architecture: Architecture,
        data: Dataset,
        recipe: Recipe,
        seed: int,
        runtime: Runtime,
        key: str,
        out: Path,
        checkpoint_seconds: float,
        keep: Collection[int] = (),
        until: int | None = None,
    ) -> None:
        self.defense, self.architecture, self.data, self.recipe = defense, architecture, data, recipe
        self.seed, self.runtime, self.key, self.out = seed, runtime, key, out
        self.keep, self.until = keep, until
        self.split = data["train"]
        check_images(self.split.images(slice(0, min(len(self.split), 256))), f"{data.name}/train")
        self.batches = _batches(len(self.split), recipe.batch_size)
        if not self.batches:
            raise ConfigError(f"{data.name}/train has {len(self.split)} samples: too few to train on")
        self.num_classes = architecture.num_classes
        self.bare = architecture.build(seed).to(runtime.device)
        self.model = runtime.wrap(self.bare)
        counts = np.bincount(self.split.labels, minlength=self.num_classes)
        torch.manual_seed(seed)
        self.state = defense.state(self.bare, Task(counts, architecture.shape, recipe.epochs)).to(runtime.device)
        self.optimizer = _optimizer([*self.bare.parameters(), *self.state.parameters()], recipe)
        self.attack = _attack(defense, recipe)
        self.average = Average() if recipe.average != "none" else None
        self.progress = _Progress()
        self.labels = torch.from_numpy(self.split.labels)
        self.keys = sample_keys(self.split.ids)
        self._checkpoint_seconds, self._saved_at = checkpoint_seconds, time.monotonic()
        if recipe.precision != "float32":
            # Losses are computed in float32 from what lower precision gives.
            self.bare.register_forward_hook(lambda _, __, output: output.float())

    # Steps -----------------------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train."""
        p, recipe = self.progress, self.recipe
        patience = recipe.patience is not None and p.epoch - p.best_epoch >= recipe.patience
        last = recipe.epochs if self.until is None else self.until
        return p.epoch >= last or patience or (recipe.stop_on_alarm and p.alarm is not None)

    def epoch(self, on_batch: Callable[[int, int, int], None] | None) -> dict[str, Any]:
        """The rest of the current epoch, its validation and its checkpoint; returns its row of the curve."""
        started = time.perf_counter()
        p = self.progress
        order, dice = _order(self.split, self.seed, p.epoch), self._dice(p.epoch)
        self.model.train()
        while p.batch < len(self.batches):
            self.step(np.sort(order[self.batches[p.batch]]), dice[p.batch])
            p.batch += 1
            if on_batch is not None and self.runtime.is_main:
                on_batch(p.epoch, p.batch, len(self.batches))
            # Several processes differ within an epoch (batch-norm statistics, sums of logs) and agree at its end only.
            due = self.runtime.world == 1 and time.monotonic() - self._saved_at >= self._checkpoint_seconds
            if due and p.batch < len(self.batches):
                self.save()
        if self.average is not None and self.recipe.average == "swa" and self._averages_now():
            self.runtime.average_buffers(self.bare.buffers())
            self.average.update(self.bare, None)
        row = self._finish_epoch()
        self.save()
        seconds = time.perf_counter() - started
        return {**row, "seconds": seconds, "epochs": self.recipe.epochs, "alarm": self.progress.alarm}

    def step(self, index: np.ndarray, dice: int) -> None:
        """One step on the samples of one global batch."""
        p, recipe, runtime = self.progress, self.recipe, self.runtime
        number = p.epoch * len(self.batches) + p.batch
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.factor(number, recipe.epochs * len(self.batches))
        torch.manual_seed(dice)  # for layers that draw from the global generator, such as dropout
        part = runtime.part(index)
        batch = self._batch(part)
        with ExitStack() as perturbed:
            with runtime.precise():
                perturbed.enter_context(self.defense.perturb(self.model, batch, self.state))
                loss = self.defense.loss(self.model, batch, self.state)
            self._check(loss.value)
            self.optimizer.zero_grad(set_to_none=True)
            (loss.value * runtime.scale(len(part), len(index))).backward()  # type: ignore[no-untyped-call]
        runtime.average_gradients(self.state)
        if recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_([*self.bare.parameters(), *self.state.parameters()], recipe.clip_grad)
        if recipe.grad_noise is not None:
            named = [*self.bare.named_parameters(), *self.state.named_parameters(prefix="state of the defense")]
            recipe.grad_noise.add(named, self.seed, number)
        self.optimizer.step()
        if self.average is not None and recipe.average == "ema":
            self.average.update(self.bare, recipe.average_decay)
        for name, value in {"loss": loss.value.detach(), **loss.logs}.items():
            p.sums[name] = p.sums.get(name, 0.0) + value.double() * len(part)

    def _batch(self, part: np.ndarray) -> Batch:
        """The samples, augmented and attacked."""
        recipe, device, epoch = self.recipe, self.runtime.device, self.progress.epoch
        rows = torch.from_numpy(part)
        x, y = self.split.images(part).to(device), self.labels[rows].to(device)
        keys = self.keys[rows].to(device)
        mixed: Tensor | None = None
        random = SampleRandom(self.seed, keys, "augmentation")
        x = recipe.augmentation.augment(x, random, epoch)
        if recipe.augmentation.cutmix:
            x, mixed = recipe.augmentation.mix(x, y, self.num_classes, random, epoch)
        x_adv, steps_correct = x, None
        if self.attack is not None:
            starts = SampleRandom(self.seed, keys, "inner-attack")
            with self.runtime.precise():
                crafted = self.attack.craft(self.bare, x, y, starts, epoch, mixed)
            x_adv, steps_correct = crafted.x_adv, crafted.steps_correct
        targets = mixed
        if recipe.label_smoothing:
            hard = F.one_hot(y, self.num_classes).float() if mixed is None else mixed
            targets = hard * (1 - recipe.label_smoothing) + recipe.label_smoothing / self.num_classes
        return Batch(
            x=x,
            y=y,
            x_adv=x_adv,
            eps=recipe.eps,
            epoch=epoch,
            epochs=recipe.epochs,
            targets=targets,
            steps_correct=steps_correct,
            attack_steps=recipe.attack_steps,
        )

    def _check(self, loss: Tensor) -> None:
        if self.runtime.any(not bool(torch.isfinite(loss))):
            raise RobustBenchExtError(
                f"the training loss became {float(loss.detach())} in epoch {self.progress.epoch + 1}. Lower lr, or check the "
                f"data for NaN; the last checkpoint is kept."
            )

    def _dice(self, epoch: int) -> list[int]:
        """A seed for the global generator before each step of an epoch; another one on each process."""
        names = [
            f"{number}/{self.runtime.rank}" if self.runtime.rank else number for number in range(len(self.batches))
        ]
        return SampleRandom.of(self.seed, names, "global").bits(1, step=epoch)[:, 0].tolist()

    def _averages_now(self) -> bool:
        return (self.progress.epoch + 1) / self.recipe.epochs > self.recipe.swa_start

    # Epoch's end -----------------------------------------------------------------------------------------------------

    def _finish_epoch(self) -> dict[str, Any]:
        p = self.progress
        self.runtime.average_buffers(self.bare.buffers())
        if self.average is not None and self.recipe.average == "ema":
            self.runtime.average_buffers(
                v for k, v in self.average.values.items() if k in dict(self.bare.named_buffers())
            )
        sums = {name: float(self.runtime.total(value)) for name, value in p.sums.items()}
        measured = self.runtime.from_main(self._measure)
        row = {"epoch": p.epoch + 1, **{name: total / len(self.split) for name, total in sums.items()}, **measured}
        p.curve.append(row)
        p.epoch, p.batch, p.sums = p.epoch + 1, 0, {}
        if p.alarm is None:
            p.alarm = Alarm().epoch(p.curve)
        by = self.defense.select_by
        other = "clean" if by == "robust" else "robust"
        score = (row[f"{by}_accuracy"], row[f"{other}_accuracy"])
        if score > p.best_score:
            p.best_score, p.best_epoch = score, p.epoch
            with self._averaged():
                p.best = {name: value.detach().cpu().clone() for name, value in self.bare.state_dict().items()}
        if p.epoch in self.keep and self.runtime.is_main:
            with self._averaged():
                p.kept[str(p.epoch)] = self._written(checkpoints.file_of(p.epoch), self.bare.state_dict())
        return row

    @contextmanager
    def _averaged(self) -> Any:
        """The weights that would be published now."""
        if self.average is None:
            yield
        else:
            with self.average.applied(self.bare):
                yield

    def _measure(self) -> dict[str, float]:
        device = self.runtime.device
        with self._averaged():
            found = validate(self.bare, self.data["calibration"], self.recipe, self.seed, device=device)
            row = {"clean_accuracy": found.clean, "robust_accuracy": found.robust}
            if self.recipe.energy_n:
                for name, split in (("train", self.split), ("calibration", self.data["calibration"])):
                    energies = measure_energies(self.bare, split, self.recipe, self.seed, device)
                    row |= {f"{key}_{name}": value for key, value in energies.items()}
        return row

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, as a whole or not at all."""
        self._saved_at = time.monotonic()
        if not self.runtime.is_main:
            return
        p = self.progress
        content = {
            "key": self.key,
            "model": self.bare.state_dict(),
            "state": self.state.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": {**vars(p), "best_score": list(p.best_score)},
        }
        write_atomically(self.out / CHECKPOINT_FILE, lambda file: torch.save(content, file))

    def resume(self) -> None:
        """Go on from the checkpoint of this very training, if there is one."""
        file = self.out / CHECKPOINT_FILE
        if not file.is_file():
            return
        try:
            content = torch.load(file, weights_only=True, map_location=self.runtime.device)
        except Exception:  # a damaged file raises whatever its bytes happen to trip; it counts as missing
            return
        if content.get("key") != self.key:
            raise ConfigError(
                f"{self.out} holds an unfinished training of another kind (other recipe, data, network, seed or number of "
                f"processes). Give another --out, or remove the folder."
            )
        if self._passed_by(content["progress"]):
            return
        self.bare.load_state_dict(content["model"])
        self.state.load_state_dict(content["state"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        found = content["progress"]
        first, second = found.pop("best_score")
        self.progress = _Progress(**found, best_score=(first, second))

    def _passed_by(self, progress: dict[str, Any]) -> bool:
        """Whether a checkpoint of what is done again is of no use: it is past an epoch that is wanted and was not kept."""
        kept = progress.get("kept", {})
        return self.until is not None and any(e <= progress["epoch"] and str(e) not in kept for e in self.keep)

    def _written(self, name: str, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Write weights; returns the file's name and seal."""
        from safetensors.torch import save_file

        # Cloned: safetensors refuses tensors that share memory, such as tied weights.
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
        write_atomically(self.out / name, lambda file: save_file(tensors, str(file)))
        return {"file": name, **seal(self.out / name)}

    def publish(self) -> None:
        """Write weights, curve and recipe; model.json marks the folder as finished, so it is written last."""
        if self.until is not None:
            self._publish_kept()
            return
        p = self.progress
        weights = self._written(WEIGHTS_FILE, p.best)
        description = {
            "key": self.key,
            "defense": self.defense.spec(),
            "architecture": self.architecture.described(),
            "recipe": asdict(self.recipe),
            "data": self.data.describe(),
            "seed": self.seed,
            "selected": {"epoch": p.best_epoch, "by": self.defense.select_by, "on": "calibration"},
            "alarm": p.alarm,
            "curve": p.curve,
            "weights": weights,
        }
        self._describe(description | ({"kept": p.kept} if p.kept else {}))

    def _publish_kept(self) -> None:
        """Add what was kept to a finished model, and say where it is another training's."""
        described = json.loads((self.out / RECIPE_FILE).read_text(encoding="utf-8"))
        p = self.progress
        same = p.curve == described["curve"][: len(p.curve)]
        added = {epoch: {**note, **({} if same else {"another": True})} for epoch, note in p.kept.items()}
        self._describe({**described, "kept": {**described.get("kept", {}), **added}})

    def _describe(self, description: dict[str, Any]) -> None:
        text = json.dumps(description, indent=1)
        write_atomically(self.out / RECIPE_FILE, lambda file: file.write_text(text, encoding="utf-8"))
        (self.out / CHECKPOINT_FILE).unlink(missing_ok=True)


def _batches(samples: int, batch_size: int) -> list[np.ndarray]:
    """Positions of an epoch, cut into equal batches; batch norm needs two samples in each."""
    return [b for b in np.array_split(np.arange(samples), math.ceil(samples / batch_size)) if len(b) > 1]


def _order(split: Split, seed: int, epoch: int) -> np.ndarray:
    draws = SampleRandom.of(seed, split.ids, "epoch-order").bits(1, step=epoch)[:, 0].numpy()
    return np.lexsort((np.arange(len(draws)), draws))


def _attack(defense: Defense, recipe: Recipe) -> Crafter | None:
    attack = defense.attack(recipe.threat(), recipe.attack_steps, recipe.step_size)
    if attack is None or recipe.attack_mode == "method":
        return attack
    changed: Crafter = replace(attack, mode=recipe.attack_mode)  # type: ignore[type-var]
    return changed


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


@contextmanager
def _determinism(wanted: bool) -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
