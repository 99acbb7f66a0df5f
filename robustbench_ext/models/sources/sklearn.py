"""`sklearn:MODULE.CLASS`: a classifier of scikit-learn, fitted to the train split of the data where it is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

from robustbench_ext.errors import ModelError
from robustbench_ext.models.black_box import CLIP, BlackBox, log_probabilities, one_thread
from robustbench_ext.models.predictor import SKLEARN, fitted, sklearn_estimator
from robustbench_ext.models.sources.base import Found, Wanted


class SklearnClassifier(BlackBox):
    """A fitted classifier. Images are flattened to (n, C H W), float64.

    Logits are log(max(p, 1e-6)) of `predict_proba`; where it has none, the values of its `decision_function`, of two classes
    [-z, z] / 2.

    Args:
        estimator: fitted to labels 0..K-1; num_classes: K. A class that it has not seen has probability 0.
        said: see `BlackBox`.

    Raises:
        ModelError: it has neither method, or no probabilities and fewer classes than the data.
    """

    def __init__(self, estimator: Any, num_classes: int, said: str) -> None:
        super().__init__(said)
        self.estimator, self.num_classes = estimator, num_classes
        self.by_probabilities = hasattr(estimator, "predict_proba")
        if not self.by_probabilities and not hasattr(estimator, "decision_function"):
            raise ModelError(f"{said}: it has neither predict_proba nor decision_function, so it gives no scores")
        if not self.by_probabilities and len(estimator.classes_) < num_classes:
            raise ModelError(
                f"{said}: the train split holds {len(estimator.classes_)} of {num_classes} classes, and it has no predict_proba"
            )

    def scores(self, x: np.ndarray) -> np.ndarray:
        flat = x.reshape(len(x), -1).astype(np.float64)
        with one_thread():
            if not self.by_probabilities:
                z = np.asarray(self.estimator.decision_function(flat), dtype=np.float64)
                return np.stack([-z, z], axis=1) / 2 if z.ndim == 1 else z
            seen = np.asarray(self.estimator.predict_proba(flat), dtype=np.float64)
        p = np.zeros((len(x), self.num_classes))
        p[:, np.asarray(self.estimator.classes_, dtype=np.int64)] = seen
        return log_probabilities(p, len(x), self.said)


def load(wanted: Wanted) -> Found:
    """A classifier of scikit-learn, fitted: `random_state` is the seed, one thread, the whole train split. Never pickled.

    Every process fits it again, and gets the same one; parameters of the class are `kwargs`.

    Raises:
        ModelError: no such class or parameter, no data to fit to, or a fit that fails.
    """
    import sklearn

    spec = SKLEARN + wanted.name
    if wanted.data is None or "train" not in wanted.data.splits:
        raise ModelError(f"model '{spec}' is fitted to the train split of the data, and there is none")
    if wanted.weights is not None:
        raise ModelError(f"model '{spec}' is fitted where it is loaded; leave out weights {wanted.weights}")
    if tuple(wanted.data.shape) != wanted.shape:
        raise ModelError(f"model '{spec}' is fitted to the images as they are; leave out resize and channels")
    estimator, train = sklearn_estimator(spec, wanted.kwargs, wanted.seed, "classifier"), wanted.data["train"]
    x = train.images(slice(None)).flatten(1).double().numpy()
    notes = [*fitted(estimator, spec, x, train.labels), f"fitted to the {len(train)} samples of the train split"]
    said = (
        f"{spec}, {wanted.kwargs}, seed={wanted.seed}, train={train.fingerprint()}, scikit-learn {sklearn.__version__}"
    )
    module = SklearnClassifier(estimator, wanted.num_classes, said)
    scores = f"log(max(p, {CLIP:g})) of its probabilities" if module.by_probabilities else "its decision function"
    return Found(module, notes=[*notes, f"no gradients; its logits are {scores}"])
