"""VoG, the variance of gradients (Agarwal, D'souza, Hooker, CVPR 2022, arXiv 2008.11600): how much what a network looks at in
an input moves during its training.

    S_t(x) = d z_y(x) / d x at checkpoint t, averaged over channels; z_y the logit of the class y, before any softmax
    VoG(x) = mean over pixels of sqrt(1/T sum_t (S_t - mean_t S_t)^2)

Despite its name it averages standard deviations. y is the label, or, where there is none, the class that is predicted.
Comparisons between samples of different classes need each class's own mean and spread taken off (`class_normalised`). Only the
checkpoints that are given count: early, late or all of a training, as you choose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from detectors.base import Detector
from robustbench_ext import device as devices
from robustbench_ext.errors import ConfigError, DataError, NotFittedError
from robustbench_ext.models.contract import check_images, check_labels, frozen_eval
from robustbench_ext.models.observe import Observations, Taps


def vog(checkpoints: Sequence[nn.Module], x: Tensor, labels: Tensor | None = None, batch_size: int = 250) -> Tensor:
    """VoG of each input, float64 (N,), at least 0; 0 for one checkpoint, and for checkpoints whose gradients are the same.

    Args:
        checkpoints: the network after several epochs, in any order but for the last, whose prediction stands for labels.
        x: images float32 (N, C, H, W) in [0, 1]; or any other float inputs (N, d) or (N, L, d), such as embeddings, which have
            no channels to be averaged over.
        labels: int64 (N,); None where they are not known.
    """
    if not checkpoints:
        raise DataError("vog: there are no checkpoints; give at least two")
    if x.ndim == 4:
        check_images(x.detach())
    elif not x.is_floating_point() or x.ndim < 2:
        raise DataError(f"vog: inputs of shape {tuple(x.shape)} and dtype {x.dtype}, expected floats (N, ...)")
    readers = [Taps(model, ()) for model in checkpoints]
    parts = [torch.empty(0, dtype=torch.float64)]
    with ExitStack() as frozen:
        for model in checkpoints:
            frozen.enter_context(frozen_eval(model))
        frozen.enter_context(devices.float32())
        if labels is not None and len(x):
            with torch.no_grad():
                check_labels(labels, readers[-1](x[:1])[0].shape[1], len(x))
        for start in range(0, len(x), batch_size):
            batch = x[start : start + batch_size]
            classes = _predicted(readers[-1], batch) if labels is None else labels[start : start + batch_size]
            parts.append(_of_batch(readers, batch, classes))
    return torch.cat(parts)


def _predicted(reader: Taps, x: Tensor) -> Tensor:
    with torch.no_grad():
        return reader(x.clone())[0].argmax(dim=1)


def _of_batch(readers: Sequence[Taps], x: Tensor, classes: Tensor) -> Tensor:
    """Welford's sums in float64: no cancellation, exactly 0 for equal gradients, two maps in memory however many readers."""
    mean, squares = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t, reader in enumerate(readers, start=1):
        off = saliency(reader, x, classes) - mean
        mean = mean + off / t
        squares = squares + off * off * ((t - 1) / t)
    return (squares / len(readers)).sqrt().flatten(1).mean(dim=1)


def saliency(reader: Taps, x: Tensor, classes: Tensor) -> Tensor:
    """d z_class / d x of one batch, averaged over the channels of images, float64 on the CPU."""
    # A leaf of its own: gradients of one pass must not add up with those of another.
    leaf = x.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits, _ = reader(leaf)
        # In evaluation mode no sample sees another, so that the gradient of the sum is every sample's own.
        (gradient,) = torch.autograd.grad(logits.gather(1, classes.to(logits.device)[:, None]).sum(), leaf)
    gradient = gradient.detach().cpu().double()
    return gradient.mean(dim=1) if gradient.ndim == 4 else gradient


def class_normalised(scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Scores (N,) less their class's mean, over its standard deviation (divisor n); 0 in a class without spread, float64.

    Args:
        classes: int (N,), labels or predictions, as the scores were taken for.
    """
    scores, classes = np.asarray(scores, dtype=np.float64), np.asarray(classes)
    if scores.shape != classes.shape or scores.ndim != 1 or not np.isfinite(scores).all():
        raise DataError(f"vog: scores {scores.shape} and classes {classes.shape}, expected finite (N,) and (N,)")
    found = np.zeros(len(scores))
    for k in np.unique(classes):
        mine = classes == k
        spread = scores[mine].std()
        # Equal scores may differ by rounding from their own mean.
        if spread > 1e-12 * np.abs(scores[mine]).max():
            found[mine] = (scores[mine] - scores[mine].mean()) / spread
    return found


class VoG(Detector):
    """score = VoG(x) of the predicted class over checkpoints of the model's own training; raw, not normalised by class.

    Normalised scores would depend on the other inputs of a batch, or need VoG of all training inputs.

    Args:
        epochs: whose weights are looked at: "all" that the training kept, or a list. In a suite the model needs `keep` in its
            `train`; in Python give the networks to `with_checkpoints`.
    Cost: a forward and a backward pass per checkpoint, and a forward pass of the model.
    """

    name: ClassVar[str] = "vog"
    reads_inputs = True
    differentiable = False
    needs_gradient = True
    reference: ClassVar[str] = "arXiv 2008.11600"

    def __init__(self, epochs: str | int | Sequence[int] = "all") -> None:
        told = [epochs] if isinstance(epochs, int) else epochs
        if told != "all" and (isinstance(told, str) or len({*told}) < 2 or not all(int(e) >= 1 for e in told)):
            raise ConfigError(f"vog: epochs = {epochs!r}, expected all, or a list of two epochs from 1 or more")
        self.epochs: str | tuple[int, ...] = "all" if told == "all" else tuple(sorted({int(e) for e in told}))
        self.checkpoints_after = self.epochs
        self._checkpoints: list[nn.Module] = []

    def parameters(self) -> dict[str, Any]:
        return {"epochs": self.epochs if self.epochs == "all" else list(self.epochs)}

    def with_checkpoints(self, checkpoints: Sequence[nn.Module]) -> VoG:
        """This detector, looking at these networks.

        Raises:
            ConfigError: fewer than two: then nothing moves, and every score is 0.
        """
        if len(checkpoints) < 2:
            raise ConfigError(f"vog: {len(checkpoints)} checkpoints, expected two or more of the model's training")
        self._checkpoints = list(checkpoints)
        return self

    def summary(self) -> dict[str, float]:
        return {"checkpoints": float(len(self._checkpoints))}

    def _score_inputs(self, reader: Taps, x: Tensor) -> Tensor:
        if not self._checkpoints:
            raise NotFittedError("vog: give it checkpoints of the model's training: VoG().with_checkpoints([...])")
        return vog(self._checkpoints, x, _predicted(reader, x), len(x))

    def _score(self, seen: Observations) -> Tensor:
        raise NotImplementedError
