"""Self-distillation: a network learns from labels and from what a network like it, trained before it, says of the same inputs.

Borup, Andersen: *Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation*,
NeurIPS 2021, arXiv 2102.13088. The weight alpha is that of the *labels*; common distillation gives the teacher a weight.

    loss = alpha MSE(softmax z, onehot y) + (1 - alpha) MSE(softmax z, softmax z_teacher)

The first step has no teacher and sees labels alone. Each later one has the step before it as its teacher:

    models:
      - {name: step 1, train: {defense: self-distill}}
      - {name: step 2, train: {defense: {name: self-distill, alpha: 0.6, teacher: step 1}}}
      - {name: step 3, train: {defense: {name: self-distill, alpha: 0.6, teacher: step 2}}}

For kernel ridge regression all of it is linear algebra (`KernelDistillation`): with S = K (K + lam I)^-1, step s fits the
targets t_1 = y, t_s = alpha y + (1 - alpha) S t_{s-1}. The limit is ridge regression with the penalty lam / alpha; without
labels, alpha = 0, it is 0. So distillation regularises, and labels bound by how much.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.base import Batch, Defense, Loss, Task, detached, share
from robustbench_ext.errors import ConfigError, DataError, ModelError
from robustbench_ext.models.loading import RECIPE_FILE, load_model
from robustbench_ext.numbers import read_numbers

# Networks ------------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A fixed network beside the one that is trained. No part of its weights is trained or written into checkpoints.

    Args:
        network: images to logits; it is put into evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = [network.eval()]  # in a list: a registered module's parameters would be trained

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        self._held[0]._apply(fn)  # it moves with its owner all the same
        super()._apply(fn, recurse)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (B, K)."""
        logits: Tensor = self._held[0](x)
        return logits.softmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class SelfDistill(Defense):
    """alpha MSE(softmax z, onehot y) + (1 - alpha) MSE(softmax z, softmax z_teacher) on clean inputs.

    Without a teacher it is the first step, which sees labels alone. MSE is the mean over samples and classes, as published: a
    K-th of the Brier score, so that the gradients of many classes are small. The published example trains five steps with
    alpha 0.6 and Adam at 1e-4. Its script chooses on the test data and penalises norms that are not squared; neither is done
    here.

    Args:
        alpha: the weight of the labels, in [0, 1]. 0: the teacher alone; 1: the teacher changes nothing. See `best_alpha`.
        teacher: another model of the suite, or the folder of a trained one; None for the first step. It sees the same
            augmented inputs, in evaluation mode, and costs one more forward pass a batch.
    """

    name: ClassVar[str] = "self-distill"
    select_by: ClassVar[str] = "clean"
    soft_targets: ClassVar[bool] = True
    reference: ClassVar[str] = "arXiv 2102.13088"

    alpha: float = 0.6
    teacher: str | None = None

    def __post_init__(self) -> None:
        read_numbers(self, self.name)
        share(self.alpha, f"{self.name}: alpha")

    def spec(self) -> dict[str, Any]:
        if self.teacher is None:  # then alpha changes nothing
            return {**super().spec(), "alpha": None}
        return {**super().spec(), "teacher": _key_of(Path(self.teacher))}

    def state(self, model: nn.Module, task: Task) -> nn.Module:
        if self.teacher is None:
            return nn.Module()
        if not (Path(self.teacher) / RECIPE_FILE).is_file():
            raise ConfigError(
                f"{self.name}: teacher '{self.teacher}' is no folder of a trained model. In a suite name a model before this "
                f"one; elsewhere give the folder that rbx train wrote."
            )
        network = load_model(self.teacher).module
        with torch.no_grad():
            device = next(model.parameters()).device
            outputs = network.to(device).eval()(torch.zeros(1, *task.shape, device=device)).shape[1]
        if outputs != task.num_classes:
            raise ModelError(f"{self.name}: the teacher has {outputs} outputs, the data {task.num_classes} classes")
        return Teacher(network)

    def loss(self, model: nn.Module, batch: Batch, state: nn.Module | None = None) -> Loss:
        p = model(batch.x).softmax(dim=1)
        hard = F.one_hot(batch.y, p.shape[1]).to(p.dtype) if batch.targets is None else batch.targets
        labels = F.mse_loss(p, hard)
        if not isinstance(state, Teacher):
            return Loss(labels, detached(labels=labels))
        taught = F.mse_loss(p, state(batch.x))
        return Loss(self.alpha * labels + (1 - self.alpha) * taught, detached(labels=labels, teacher=taught))


def _key_of(folder: Path) -> str:
    """What tells teachers apart: the content key of their training. In a suite the folder is called by it beforehand."""
    file = folder / RECIPE_FILE
    if not file.is_file():
        return folder.name
    return str(json.loads(file.read_text(encoding="utf-8"))["key"])


# The weight of the labels --------------------------------------------------------------------------------------------


def best_alpha(targets: np.ndarray, distilled: np.ndarray, trained: np.ndarray, clip: bool = True) -> float:
    """The alpha whose second step has the least squared error, in closed form: one more training in the place of a grid.

        alpha* = <y - g, f - g> / |f - g|^2

    A second step of kernel ridge regression is alpha f + (1 - alpha) g exactly; of networks that is an approximation.

    Args:
        targets: y, of validation samples: numbers (N,), or one-hot labels (N, K). Neither trained on nor tested on.
        distilled: g, predictions there of a second step trained with alpha = 0; of classifiers, probabilities.
        trained: f, predictions of its teacher, which was trained on labels.
        clip: to [0, 1], which `SelfDistill` takes. The closed form itself may lie outside.

    Raises:
        DataError: shapes differ, or f and g are equal, so that every alpha gives the same.
    """
    y, g, f = (np.asarray(v, dtype=np.float64) for v in (targets, distilled, trained))
    if not y.shape == g.shape == f.shape:
        raise DataError(f"best_alpha: targets {y.shape}, distilled {g.shape}, trained {f.shape}, expected equal shapes")
    apart = f - g
    scale = float((apart**2).sum())
    if not scale > 0:  # also catches NaN
        raise DataError("best_alpha: both predictions are equal (or not numbers): every alpha gives the same")
    alpha = float(((y - g) * apart).sum()) / scale
    return min(1.0, max(0.0, alpha)) if clip else alpha


# Kernel ridge regression ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelDistillation:
    """Self-distilled kernel ridge regression, exactly, in float64.

    Args:
        kernel: K (n, n) of the training points, symmetric, positive semi-definite.
        lam: the penalty, > 0.
    """

    kernel: np.ndarray
    lam: float

    def __post_init__(self) -> None:
        k = np.asarray(self.kernel, dtype=np.float64)
        object.__setattr__(self, "kernel", k)
        if k.ndim != 2 or k.shape[0] != k.shape[1] or not np.allclose(k, k.T):
            raise DataError(f"kernel: shape {k.shape}, expected a symmetric (n, n)")
        if not self.lam > 0:
            raise ConfigError(f"kernel distillation: lam = {self.lam}, expected a number > 0")

    @property
    def smoother(self) -> np.ndarray:
        """S = K (K + lam I)^-1, (n, n): from targets to fitted values."""
        return np.asarray(np.linalg.solve(self._ridge(self.lam), self.kernel).T)

    def targets(self, y: np.ndarray, alpha: float, steps: int) -> np.ndarray:
        """What each step is fitted to, (steps, n)."""
        share(alpha, "kernel distillation: alpha")
        smoother, found = self.smoother, [np.asarray(y, dtype=np.float64)]
        for _ in range(steps - 1):
            found.append(alpha * found[0] + (1 - alpha) * smoother @ found[-1])
        return np.stack(found)

    def predict(self, cross: np.ndarray, y: np.ndarray, alpha: float, steps: int) -> np.ndarray:
        """Each step's predictions, (steps, m).

        Args:
            cross: kernel (m, n) of the points to predict and the training points; K itself gives fitted values.
            y: (n,).
            alpha: the weight of y, in [0, 1].
        """
        weights = np.linalg.solve(self._ridge(self.lam), self.targets(y, alpha, steps).T)
        return np.asarray((cross @ weights).T)

    def limit(self, cross: np.ndarray, y: np.ndarray, alpha: float) -> np.ndarray:
        """What the steps tend to, (m,): ridge regression with the penalty lam / alpha; 0 for alpha = 0."""
        share(alpha, "kernel distillation: alpha")
        if alpha == 0:
            return np.zeros(len(cross))
        return np.asarray(cross @ np.linalg.solve(self._ridge(self.lam / alpha), np.asarray(y, dtype=np.float64)))

    def best_alpha(self, cross: np.ndarray, y: np.ndarray, targets: np.ndarray, clip: bool = True) -> float:
        """The alpha of the second step of least squared error at points with the given targets (m,); see `best_alpha`."""
        trained, distilled = self.predict(cross, y, 0.0, 2)
        return best_alpha(targets, distilled, trained, clip)

    def _ridge(self, penalty: float) -> np.ndarray:
        return np.asarray(self.kernel + penalty * np.eye(len(self.kernel)))
