"""`predict_proba:FILE.py:FACTORY`, `predict_proba:pkg.module:factory`: any object with a method `predict_proba`.

Gradient-boosted trees, a pipeline, a client of a service: what gives probabilities can be asked for them. Naming it runs its
code.
"""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.fingerprint import hash_arrays
from robustbench_ext.models.black_box import CLIP, BlackBox, log_probabilities
from robustbench_ext.models.imports import made_by
from robustbench_ext.models.sources.base import Found, Wanted
from robustbench_ext.named_code import followed, split_named

LAYOUTS = ("flat", "images")
_PROBES = 64


class Probabilities(BlackBox):
    """Logits log(max(p, 1e-6)) of an object's `predict_proba`, which is given float32 in [0, 1].

    Args:
        classifier: with `predict_proba(x) -> (n, K)`, rows that sum to 1.
        inputs: "flat" for (n, C H W), as scikit-learn has it; "images" for (n, C, H, W).
        said: see `BlackBox`.
    """

    def __init__(self, classifier: Any, inputs: str, said: str) -> None:
        super().__init__(said)
        self.classifier, self.inputs = classifier, inputs

    def scores(self, x: np.ndarray) -> np.ndarray:
        given = x.reshape(len(x), -1) if self.inputs == "flat" else x
        # A copy: what works in place must not change the inputs.
        return log_probabilities(self.classifier.predict_proba(given.copy()), len(x), self.said)


def load(wanted: Wanted) -> Found:
    """An object with `predict_proba`, by its factory; option `inputs` ("flat", or "images"), the rest is the factory's.

    Its state is nobody's to see, so its fingerprint takes its outputs on 64 samples and 64 random inputs for it, beside the
    source of its class and of the factory's file.

    Raises:
        ModelError: it cannot be imported, or what it gives are no probabilities.
        ConfigError: another word for `inputs`.
    """
    kwargs = dict(wanted.kwargs)
    inputs = str(kwargs.pop("inputs", LAYOUTS[0]))
    if inputs not in LAYOUTS:
        raise ConfigError(f"model '{wanted.spec}': inputs = {inputs!r}, expected one of {', '.join(LAYOUTS)}")
    if wanted.weights is not None:
        raise ModelError(f"model '{wanted.spec}': its factory loads it; leave out weights {wanted.weights}")
    classifier = made_by(wanted.name, kwargs, _is_classifier, "an object with a method predict_proba")
    module = Probabilities(classifier, inputs, f"{wanted.name}, {type(classifier).__qualname__}, inputs={inputs}")
    outputs = {"random": module.scores(np.random.default_rng(0).random((_PROBES, *wanted.shape), dtype=np.float32))}
    if wanted.data is not None and tuple(wanted.data.shape) == wanted.shape:
        first = next(iter(wanted.data.splits.values()))
        outputs["samples"] = module.scores(first.images(slice(0, _PROBES)).numpy())
    module.said += f", code={_code(wanted.name, classifier)}, outputs={hash_arrays(outputs)}"
    return Found(
        module, notes=[f"no gradients; inputs are {inputs}, logits are log(max(p, {CLIP:g})) of its probabilities"]
    )


def _is_classifier(thing: Any) -> bool:
    return callable(getattr(thing, "predict_proba", None)) and not inspect.isclass(thing)


def _code(name: str, classifier: Any) -> str:
    """A key of the source that is named, of the object's class, and of what these import from beside themselves."""
    files = {split_named(name)[0]}
    try:
        files.add(str(inspect.getsourcefile(type(classifier))))
    except (TypeError, OSError):  # a class of a compiled module
        files.add(f"{type(classifier).__module__}.{type(classifier).__qualname__}")
    beside = {str(file) for file in followed(type(classifier))} - {
        str(Path(file).expanduser().resolve()) for file in files
    }
    digest = hashlib.sha256()
    for file in sorted(files | beside):
        digest.update(Path(file).read_bytes() if Path(file).is_file() else file.encode())
    return digest.hexdigest()[:20]
