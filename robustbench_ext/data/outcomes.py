"""Outcomes that are drawn with known probabilities, each behind a small picture that says how likely it is.

    u ~ uniform(0, 1)  ->  picture of u            what a model sees
                       ->  p = psi(u)              what it should say
                           y ~ Bernoulli(p)        what it is trained on

as in *Deep Probability Estimation* (Liu et al., ICML 2022, arXiv 2111.10734), where u is an age and the picture a face:

    linear    psi(u) = u
    sigmoid   psi(u) = 1 / (1 + exp(-25 (u - 0.29))); direction=falling gives 1 minus that. The paper's text has the rising
              one, its code the falling one
    skewed    psi(u) = u / 2.5
    centred   psi(u) = u / 3 + 0.35
    discrete  psi(u) = 0.1, 0.3, 0.5, 0.7, 0.9 on the fifths [k/5, (k+1)/5) of u, the last one closed (edges go down in the
              paper's text and up in its code; u hits them with probability 0)

Here u is the size of a bright disc of random place and contrast on a random background, with noise on every pixel: generated,
so that nothing is downloaded and no u is mislabelled. The noise is small enough for the picture to give u away (to about 0.003
with the defaults, by the Fisher information of the radius alone), and a small CNN learns to read it in seconds. So the
probability given the picture is that given u, and a model's distance from it is the model's.

The truth belongs to the sample. Corrupted or attacked, a picture of the same disc has the same outcome, with the same
probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, ndtri

from robustbench_ext.data.base import ArraySplit, ClassTruth, Dataset, Split, stratified_order
from robustbench_ext.data.dials import Dial, read_dials
from robustbench_ext.data.tabular import _unit
from robustbench_ext.errors import ConfigError, DataError, unknown_name

STEEPNESS, MIDDLE = 25.0, 0.29
STEPS = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
CLASSES = ("no", "yes")
DIRECTIONS = ("rising", "falling")
_DIALS: dict[str, Dial] = {
    "n": 3000,  # training samples
    "calibration": 1000,
    "test": 2000,
    "noise": 0.03,  # standard deviation on every pixel
    "side": 16,  # pixels
    "direction": "rising",  # of sigmoid
    "seed": 0,  # other pictures and outcomes
}

PSI: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda u: u,
    "sigmoid": lambda u: np.asarray(expit(STEEPNESS * (u - MIDDLE))),
    "skewed": lambda u: u / 2.5,
    "centred": lambda u: u / 3 + 0.35,
    "discrete": lambda u: STEPS[np.minimum((5 * u).astype(np.int64), 4)],
}


def outcome_probability(u: np.ndarray, scenario: str, direction: str = "rising") -> np.ndarray:
    """psi(u), float64 (N,), of u (N,) in [0, 1].

    Raises:
        ConfigError: an unknown scenario or direction, or a direction of a scenario that has none.
    """
    if scenario not in PSI:
        raise ConfigError(unknown_name("scenario", scenario, PSI))
    if direction not in DIRECTIONS:
        raise ConfigError(unknown_name("direction", direction, DIRECTIONS))
    if direction == "falling" and scenario != "sigmoid":
        raise ConfigError(f"direction = falling is of scenario sigmoid alone, got {scenario}")
    p = PSI[scenario](np.asarray(u, dtype=np.float64))
    return 1 - p if direction == "falling" else p


@dataclass(frozen=True)
class KnownProbabilities(ClassTruth):
    """A table: ids (M,) in ascending order, and the probabilities float64 (M, K) of their samples."""

    ids: np.ndarray
    table: np.ndarray

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        strange = self.ids[at] != ids
        if strange.any():
            raise DataError(
                f"'{ids[strange][0]}' is none of the {len(self.ids)} samples whose probabilities are known (such as "
                f"'{self.ids[0]}'); {int(strange.sum())} of {len(ids)} ids are strange"
            )
        return np.asarray(self.table[at])


def outcomes(argument: str = "linear") -> Dataset:
    """`outcomes:SCENARIO#option=value,...`: images (1, side, side) in [0, 1], classes no and yes, `class_truth`.

    Scenarios: linear, sigmoid, skewed, centred, discrete. Options: n (training samples, 3000), calibration (1000), test (2000),
    noise (on every pixel, 0.03), side (16), direction (of sigmoid: rising or falling), seed (0). The three splits are drawn
    each on its own, so no split's outcomes depend on another's; pictures are the same in all scenarios.

    Raises:
        ConfigError: an unknown scenario or option, or a value out of range.
    """
    scenario, dials = read_dials("outcomes", argument, _DIALS)
    side, noise, seed = int(dials["side"]), float(dials["noise"]), int(dials["seed"])
    sizes = {"train": int(dials["n"]), "calibration": int(dials["calibration"]), "test": int(dials["test"])}
    if min(sizes.values()) < 10 or not 8 <= side <= 64 or not 0 <= noise <= 1:
        raise ConfigError(
            f"data 'outcomes:{argument}': expected 10 samples or more in each split, side from 8 to 64, noise in [0, 1]"
        )
    splits: dict[str, Split] = {}
    known: dict[str, np.ndarray] = {}
    try:
        for split, size in sizes.items():
            ids = np.array([f"outcomes:{seed}:{split}:{i:06d}" for i in range(size)])
            u = _unit(ids.tolist(), 1, "latent")[:, 0]
            p = outcome_probability(u, scenario, str(dials["direction"]))
            y = (_unit(ids.tolist(), 1, f"outcome/{scenario}")[:, 0] < p).astype(np.int64)
            order = stratified_order(y, ids)
            splits[split] = ArraySplit(pictures(u, ids, side, noise)[order], y[order], ids[order])
            known |= dict(zip(ids.tolist(), p, strict=True))
    except ConfigError as error:
        raise ConfigError(f"data 'outcomes:{argument}': {error}") from None
    names = np.array(sorted(known))
    p = np.array([known[name] for name in names.tolist()])
    return Dataset(
        f"outcomes:{argument}",
        splits,
        CLASSES,
        (1, side, side),
        f"synthetic: outcomes of known probability ({scenario}), each behind a picture of a disc",
        class_truth=KnownProbabilities(names, np.stack([1 - p, p], axis=1)),
    )


def pictures(u: np.ndarray, ids: np.ndarray, side: int, noise: float) -> np.ndarray:
    """Discs of radius (1.5 + 4.5 u) side / 16 with soft edges, uint8 (N, 1, side, side).

    The centre is within side / 10 of the middle, background in [0.1, 0.35], contrast in [0.35, 0.6]: functions of the ids.
    """
    names = ids.tolist()
    x, y, background, contrast = _unit(names, 4, "nuisance").T[:, :, None, None]
    unit = side / 16
    across, down = (np.arange(side) + 0.5 - side / 2)[None, None, :], (np.arange(side) + 0.5 - side / 2)[None, :, None]
    distance = np.hypot(across - 3.2 * unit * (x - 0.5), down - 3.2 * unit * (y - 0.5))
    disc = np.clip((1.5 + 4.5 * u[:, None, None]) * unit - distance + 0.5, 0, 1)
    clean = 0.1 + 0.25 * background + (0.35 + 0.25 * contrast) * disc
    grain = ndtri(_unit(names, side * side, "grain")).reshape(-1, side, side) if noise else np.zeros(1)
    # Eight bits, as of a file: the last bit of a machine's arithmetic changes nothing.
    return np.asarray(np.rint(255 * np.clip(clean + noise * grain, 0, 1)).astype(np.uint8)[:, None])
