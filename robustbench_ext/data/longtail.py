"""Long-tailed versions of any dataset: the train split cut to an exponential or a step profile.

Cui, Jia, Lin, Song, Belongie (CVPR 2019, arXiv 1901.05555) and Cao, Wei, Gaidon, Arechiga, Ma (LDAM, NeurIPS 2019, arXiv
1906.07413). With K classes, n the samples of the largest class and R = n_0 / n_{K-1} the imbalance ratio,

    exp    n_c = floor(n R^(-c / (K - 1)) + 1e-9)
    step   n_c = n for c < floor(K / 2), floor(n / R + 1e-9) for the others (an odd class in the middle is cut)

The test split stays as it is: it says how every class is served, and a cut one would measure the rare classes on a
handful of samples. So does the calibration split, which stands for the test distribution: cut as well, it would choose
epochs and temperatures by the frequent classes and mix the imbalance of training with a shift between calibration and
test. Who has no balanced calibration data in real life can have it cut too (`+calibration`).

A balanced counterpart (`@balanced:exp:100`, or `@balanced:N`) has as many samples in all, the same number of every class: what
relative accuracies are relative to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from robustbench_ext.data.base import Dataset, Split, Subset, stratified_order
from robustbench_ext.errors import ConfigError, DataError, unknown_name
from robustbench_ext.numbers import parse_number

PROFILES = ("exp", "step")
CUT_TOO = ("calibration",)
BALANCED = "balanced"
_PATHS = ("npz", "folder")


def class_counts(profile: str, ratio: float, largest: int, num_classes: int) -> np.ndarray:
    """Samples of each class, int64 (K,), from `largest` down to floor(largest / ratio).

    Args:
        profile: "exp" or "step".
        ratio: R >= 1.
        largest: n, samples of class 0.
        num_classes: K >= 2.

    >>> class_counts("exp", 100, 5000, 10).tolist()
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    """
    _check(profile, ratio)
    if num_classes < 2:
        raise DataError(f"{num_classes} class: an imbalance needs at least 2")
    c = np.arange(num_classes)
    falls = c / (num_classes - 1) if profile == "exp" else (c >= num_classes // 2).astype(np.float64)
    # 1e-9: 5000 * 0.1 may come out just below 500.
    return np.floor(largest * ratio**-falls + 1e-9).astype(np.int64)


def _check(profile: str, ratio: float) -> None:
    if profile not in PROFILES:
        raise ConfigError(unknown_name("imbalance profile", profile, PROFILES))
    if not ratio >= 1:
        raise ConfigError(f"imbalance ratio = {ratio:g}, expected a number >= 1: the largest class over the smallest")


def imbalanced(dataset: Dataset, profile: str, ratio: float, splits: Sequence[str] = ("train",)) -> Dataset:
    """The dataset with some of its splits cut to a profile; class 0 is the most frequent one.

    Of every class the samples with the smallest hash of their id are kept. So the choice depends neither on the order of
    the files nor on a seed, and with a higher ratio (of the same profile) a subset of it is left. n is the smallest class
    of the split as it was, so that the profile is exact also where the data was not balanced; ratio 1 gives the balanced
    set of that size.

    Args:
        profile, ratio: as of `class_counts`.
        splits: those to cut.

    Raises:
        ConfigError: an unknown profile, or a ratio below 1.
        DataError: the split does not exist, or a class would be left without a sample.
    """
    changed, said = {}, []
    for name in splits:
        changed[name], text = _cut(dataset, name, profile, ratio)
        said.append(text)
    return replace(
        dataset,
        name=f"{dataset.name}@{profile}:{ratio:.10g}" + "".join(f"+{s}" for s in splits if s != "train"),
        splits={**dataset.splits, **changed},
        source="; ".join([dataset.source, *said]),
    )


def _cut(dataset: Dataset, name: str, profile: str, ratio: float) -> tuple[Split, str]:
    split, num_classes = dataset[name], len(dataset.classes)
    largest = int(np.bincount(split.labels, minlength=num_classes).min())
    if largest == 0:
        raise DataError(f"{dataset.name}: a class has no sample in the {name} split, so there is nothing to cut from")
    counts = class_counts(profile, ratio, largest, num_classes)
    if not counts.min():
        raise DataError(
            f"{dataset.name}: with {largest} samples in the smallest class of the {name} split, a ratio of {ratio:g} leaves "
            f"a class without any; a ratio of at most {largest} leaves one."
        )
    kept = _kept(split, counts)
    shape = "falling exponentially" if profile == "exp" else "in two steps"
    text = f"{name} cut to {len(kept)} of {len(split)} samples, {counts[0]} to {counts[-1]} a class {shape}"
    return Subset(split, kept), text


def _kept(split: Split, counts: np.ndarray) -> np.ndarray:
    """Positions of the first counts[k] samples of every class k by the hash of their ids, in a stratified order."""
    ranks = np.array([_rank(i) for i in split.ids.tolist()], dtype=np.uint64)
    members = [np.flatnonzero(split.labels == k) for k in range(len(counts))]
    kept = np.concatenate([m[np.lexsort((split.ids[m], ranks[m]))][:n] for m, n in zip(members, counts, strict=True)])
    return np.asarray(kept[stratified_order(split.labels[kept], split.ids[kept])])


def _rank(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"longtail|{name}".encode(), digest_size=8).digest(), "big")


def balanced(dataset: Dataset, total: int) -> Dataset:
    """The dataset with its train split cut to floor(total / K) samples of every class; test and calibration stay.

    Chosen by the same hashes as the cuts of `imbalanced`: the frequent classes' samples are among those of a long-tailed cut.

    Raises:
        DataError: a class has not as many samples, or none would be left.
    """
    split, num_classes = dataset["train"], len(dataset.classes)
    each, smallest = total // num_classes, int(np.bincount(split.labels, minlength=num_classes).min())
    if not 1 <= each <= smallest:
        raise DataError(
            f"{dataset.name}: {total} samples in all are {each} of each of the {num_classes} classes, and the smallest one has "
            f"{smallest} in the train split; expected {num_classes} to {num_classes * smallest}"
        )
    kept = _kept(split, np.full(num_classes, each))
    return replace(
        dataset,
        name=f"{dataset.name}@balanced:{total}",
        splits={**dataset.splits, "train": Subset(split, kept)},
        source=f"{dataset.source}; train cut to {len(kept)} of {len(split)} samples, {each} of every class",
    )


@dataclass(frozen=True)
class Imbalance:
    """What a data specification says behind its last @: `exp:100`, `step:10`, `exp:10+calibration`."""

    profile: str
    ratio: float
    splits: tuple[str, ...] = ("train",)

    def __post_init__(self) -> None:
        _check(self.profile, self.ratio)

    def of(self, dataset: Dataset) -> Dataset:
        """The dataset, cut."""
        return imbalanced(dataset, self.profile, self.ratio, self.splits)


@dataclass(frozen=True)
class Balance:
    """`balanced:1240`: so many training samples in all; `balanced:exp:100`: as many as that profile leaves."""

    total: int | None = None
    like: Imbalance | None = None

    def of(self, dataset: Dataset) -> Dataset:
        """The dataset, cut."""
        if self.like is None:
            return balanced(dataset, self.total or 0)
        smallest = int(np.bincount(dataset["train"].labels, minlength=len(dataset.classes)).min())
        counts = class_counts(self.like.profile, self.like.ratio, smallest, len(dataset.classes))
        cut = balanced(dataset, int(counts.sum()))
        return replace(cut, name=f"{dataset.name}@balanced:{self.like.profile}:{self.like.ratio:.10g}")


_EXPECTED = (
    "Expected NAME@PROFILE:RATIO with exp or step, such as mnist5k@exp:10 (+calibration cuts that split too), or its balanced "
    "counterpart NAME@balanced:PROFILE:RATIO, or NAME@balanced:TOTAL."
)


def split_spec(spec: str) -> tuple[str, Imbalance | Balance | None]:
    """A data specification without its cut to an imbalance, or to a balance, and the cut, if there is one.

    An @ in a path is part of the path: where a / or \\ follows it, or where the path with it exists.

    >>> split_spec("digits@step:10")
    ('digits', Imbalance(profile='step', ratio=10.0, splits=('train',)))
    >>> split_spec("npz:/home/me@work/d.npz")
    ('npz:/home/me@work/d.npz', None)

    Raises:
        ConfigError: what follows the @ is no imbalance.
    """
    base, at, tail = spec.rpartition("@")
    source, _, argument = spec.partition(":")
    path = argument if source in _PATHS else spec
    if not at or "/" in tail or "\\" in tail or Path(path).expanduser().exists():
        return spec, None
    first, *others = tail.split("+")
    profile, colon, ratio = first.partition(":")
    try:
        if not base:
            raise ConfigError("there is no name in front of the @")
        if not colon:
            missing = f", and there is no file {argument}" if source in _PATHS else ""
            lacks = {**dict.fromkeys(PROFILES, "ratio"), BALANCED: "total"}
            what = f"the {lacks[profile]} is missing" if profile in lacks else f"'@{tail}' is no imbalance{missing}"
            raise ConfigError(what)
        if unknown := [name for name in others if name not in CUT_TOO]:
            raise ConfigError(unknown_name("split to cut too", unknown[0], CUT_TOO))
        if split_spec(base)[1] is not None:
            raise ConfigError("only one imbalance can be given")
        found = _balance(ratio, others) if profile == BALANCED else _imbalance(profile, ratio, others)
    except ConfigError as error:
        raise ConfigError(f"data '{spec}': {str(error).removesuffix('.')}. {_EXPECTED}") from None
    return base, found


def _imbalance(profile: str, ratio: str, others: Sequence[str]) -> Imbalance:
    return Imbalance(profile, parse_number(ratio, "ratio"), ("train", *dict.fromkeys(others)))


def _balance(told: str, others: Sequence[str]) -> Balance:
    if others:
        raise ConfigError(f"+{others[0]} is for imbalances: a balanced set leaves the other splits alone")
    profile, colon, ratio = told.partition(":")
    if colon:
        return Balance(like=_imbalance(profile, ratio, ()))
    total = parse_number(told, "total")
    if total != int(total) or total < 1:
        raise ConfigError(f"total = {told}, expected a whole number of samples")
    return Balance(int(total))
