"""Regression data: tables that come with an installed package, synthetic targets of known distribution, CSV files.

Inputs are float32 (N, d) in raw units (a model standardises inside itself), targets float64. A column is a number or, where
the table holds a category, a group of 0/1 indicators. Splits are 60/20/20, disjoint, decided by the ids, stratified by
deciles of the target, and every prefix of a split holds the deciles in their proportions.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from robustbench_ext.data.base import (
    FRACTIONS,
    REGRESSION,
    SPLITS,
    Dataset,
    Feature,
    Split,
    TableSplit,
    Truth,
    rank_of,
    stratified_order,
)
from robustbench_ext.data.files import _SPLIT_NAMES, _complete
from robustbench_ext.errors import ConfigError, DataError, MissingExtraError, unknown_name
from robustbench_ext.randomness import SampleRandom

_MOST_CATEGORIES = 50
_CSV_OPTIONS = ("target", "missing", "drop")

# Splits --------------------------------------------------------------------------------------------------------------


def target_strata(targets: np.ndarray) -> np.ndarray:
    """The decile of each target, int64 (N,) in 0..9; fewer strata where there are fewer than 50 samples (at least 5 in each).

    Equal targets share a stratum, so a target of few different values has fewer strata.
    """
    count = max(1, min(10, len(targets) // 5))
    if count == 1:
        return np.zeros(len(targets), dtype=np.int64)
    edges = np.quantile(targets, np.arange(1, count) / count, method="lower")
    return np.searchsorted(edges, targets, side="left").astype(np.int64)


def ordered_table(x: np.ndarray, targets: np.ndarray, ids: Sequence[str] | np.ndarray) -> TableSplit:
    """One split in the order in which every prefix holds the deciles of the target in their proportions."""
    names = np.asarray(ids, dtype=np.str_)
    order = stratified_order(target_strata(targets), names)
    return TableSplit(x[order], targets[order], names[order])


def split_table(
    x: np.ndarray, targets: np.ndarray, ids: Sequence[str], together: Sequence[str] | None = None
) -> dict[str, Split]:
    """Cut a table into train (60 %), calibration (20 %) and test (20 %): disjoint, stratified, fixed by the ids.

    Args:
        x: (N, d).
        targets: (N,).
        ids: unique strings.
        together: one string per row; rows of the same string and target land in the same split (identical rows in train and
            in test would measure memory). The ids by default.
    """
    names = np.asarray(ids, dtype=np.str_)
    keys = names if together is None else np.asarray(together, dtype=np.str_)
    if not len(x) == len(targets) == len(names) == len(keys):
        raise DataError(f"{len(x)} inputs, {len(targets)} targets and {len(names)} ids do not match")
    ranks = np.array([rank_of(f"split|{key}") for key in keys.tolist()], dtype=np.uint64)
    strata = target_strata(targets)
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        members = members[np.lexsort((names[members], targets[members], ranks[members]))]
        first = round(FRACTIONS["train"] * len(members))
        second = first + round(FRACTIONS["calibration"] * len(members))
        cuts = [_behind_equals(cut, ranks[members], targets[members]) for cut in (first, second)]
        for name, part in zip(SPLITS, np.split(members, cuts), strict=True):
            parts[name].extend(part.tolist())
    return {name: ordered_table(x[part], targets[part], names[part]) for name, part in parts.items()}


def _behind_equals(cut: int, ranks: np.ndarray, targets: np.ndarray) -> int:
    """The cut, moved behind the rows that equal the one in front of it."""
    while 0 < cut < len(ranks) and (ranks[cut], targets[cut]) == (ranks[cut - 1], targets[cut - 1]):
        cut += 1
    return cut


# Tables --------------------------------------------------------------------------------------------------------------


def encode(
    frame: pd.DataFrame, categorical: Sequence[str] = (), what: str = "table"
) -> tuple[np.ndarray, list[Feature]]:
    """Columns of a table as numbers, float64 (N, d), and what each is.

    Numbers stay as they are. A column of text, or one named in `categorical`, becomes one 0/1 indicator per category, in
    the order of their names; of two categories only the second gets one. A column that holds nothing but 0 and 1 is an
    indicator already.

    Raises:
        DataError: a column of mostly numbers with text in it, infinite numbers, or a text column of more than 50 categories.
    """
    columns: list[np.ndarray] = []
    features: list[Feature] = []
    for name in frame.columns:
        series = frame[name]
        numbers = None if name in categorical else _as_numbers(series, f"{what}: column '{name}'")
        if numbers is not None:
            columns.append(numbers)
            features.append(Feature(str(name), str(name) if set(np.unique(numbers)) <= {0.0, 1.0} else None))
            continue
        values = series.map(_spelling)
        categories = sorted(values.unique())
        if len(categories) > _MOST_CATEGORIES:
            raise DataError(
                f"{what}: column '{name}' is text with {len(categories)} different values, more than {_MOST_CATEGORIES}. Leave "
                f"it out (csv:PATH#drop={name}), or turn it into numbers first."
            )
        for category in categories[1:] if len(categories) == 2 else categories:
            columns.append((values == category).to_numpy(dtype=np.float64))
            features.append(Feature(f"{name}={category}", str(name)))
    if not columns:
        raise DataError(f"{what}: there are no columns left to predict from")
    return np.stack(columns, axis=1), features


def _spelling(value: Any) -> str:
    """A category's name: 2.0 is the category 2."""
    return f"{value:g}" if isinstance(value, (int, float, np.number)) else str(value).strip()


def _as_numbers(series: pd.Series, what: str) -> np.ndarray | None:
    """float64 (N,), or None where the column is text."""
    numbers = pd.to_numeric(series, errors="coerce").to_numpy(dtype=np.float64)
    text = np.isnan(numbers)
    if text.any():
        if text.mean() > 0.1:
            return None
        rows = np.flatnonzero(text)
        shown = ", ".join(f"'{series.iloc[i]}' (row {_line(series.index[i])})" for i in rows[:3])
        raise DataError(
            f"{what} holds numbers, but also text: {shown}{', ...' if len(rows) > 3 else ''}. Repair these cells."
        )
    if not np.isfinite(numbers).all():
        rows = np.flatnonzero(~np.isfinite(numbers))
        raise DataError(f"{what} is infinite in row {_line(series.index[rows[0]])}. Repair or remove it.")
    return numbers


def _line(index: Any) -> int:
    """The line of a CSV file that a row of the table came from: the header is line 1."""
    return int(index) + 2


def _regression(
    name: str,
    splits: Mapping[str, Split],
    features: Sequence[Feature],
    target: str,
    source: str,
    truth: Truth | None = None,
) -> Dataset:
    return Dataset(name, splits, (), (len(features),), source, REGRESSION, tuple(features), target, truth)


def diabetes() -> Dataset:
    """scikit-learn's diabetes data in raw units: 442 patients, 10 columns (Efron, Hastie, Johnstone, Tibshirani 2004)."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    x, features = encode(pd.DataFrame(bunch.data, columns=bunch.feature_names), ("sex",), "diabetes")
    splits = split_table(x, bunch.target, [f"diabetes:{i:04d}" for i in range(len(x))])
    target = "disease progression (score, one year after baseline)"
    return _regression("diabetes", splits, features, target, "scikit-learn load_diabetes, not scaled")


def autompg() -> Dataset:
    """mlxtend's Auto MPG: 392 cars, 6 numbers and the origin, fuel consumption as target (UCI, Quinlan 1993).

    The package's eighth column (the car's name) is empty, and left out; the cylinders (3, 4, 5, 6, 8) stay a number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlxtend.data import autompg_data

        table, target = autompg_data()
    names = ["cylinders", "displacement", "horsepower", "weight", "acceleration", "model-year", "origin"]
    x, features = encode(
        pd.DataFrame(np.asarray(table, dtype=np.float64)[:, :7], columns=names), ("origin",), "autompg"
    )
    splits = split_table(x, np.asarray(target, dtype=np.float64), [f"autompg:{i:04d}" for i in range(len(x))])
    return _regression("autompg", splits, features, "mpg (miles per US gallon)", "mlxtend autompg_data")


# Synthetic targets ---------------------------------------------------------------------------------------------------

_SIGMA = 1.0  # of the lognormal law's logarithm


def _gaussian(u: np.ndarray) -> np.ndarray:
    return np.asarray(ndtri(u))


def _lognormal(u: np.ndarray) -> np.ndarray:
    growth = np.exp(_SIGMA**2)
    return np.asarray((np.exp(_SIGMA * ndtri(u)) - np.sqrt(growth)) / np.sqrt((growth - 1) * growth))


def _triangular(u: np.ndarray) -> np.ndarray:
    return np.asarray((1 - np.sqrt(1 - u) - 1 / 3) * np.sqrt(18))


# Quantile functions of mean 0 and standard deviation 1. Uniform draws go through them, so the truth is exact.
NOISES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lognormal": _lognormal,  # exp(N(0, 1)), skewed to the right
    "gaussian": _gaussian,
    "triangular": _triangular,  # density falling in a straight line from the left end of its support
}


@dataclass(frozen=True)
class LocationScale(Truth):
    """Y = location(x) + scale(x) E with E of mean 0 and standard deviation 1.

    Attributes:
        location, scale: (N, d) to (N,).
        noise: the quantile function of E.
        support: (N, d) to bool (N,), where the training inputs come from.
    """

    location: Callable[[np.ndarray], np.ndarray]
    scale: Callable[[np.ndarray], np.ndarray]
    noise: Callable[[np.ndarray], np.ndarray]
    support: Callable[[np.ndarray], np.ndarray]

    def mean(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.location(np.asarray(x, dtype=np.float64)))

    def std(self, x: np.ndarray) -> np.ndarray:
        return self.scale(np.asarray(x, dtype=np.float64))

    def quantile(self, x: np.ndarray, level: float) -> np.ndarray:
        if not 0 < level < 1:
            raise DataError(f"quantile level = {level}, expected a number between 0 and 1")
        return np.asarray(self.mean(x) + self.std(x) * self.noise(np.float64(level)))

    def cdf(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return level_of(self.noise, (np.asarray(y, dtype=np.float64) - self.mean(x)) / self.std(x))

    def inside(self, x: np.ndarray) -> np.ndarray:
        return self.support(np.asarray(x, dtype=np.float64))

    def draw(self, x: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Targets of x (N, d), one per id; rounded to 1e-6, so that the last bit of a machine's exp does not change them."""
        return np.asarray(np.round(self.mean(x) + self.std(x) * self.noise(_unit(ids, 1, "noise")[:, 0]), 6))


def level_of(noise: Callable[[np.ndarray], np.ndarray], e: np.ndarray) -> np.ndarray:
    """The level in [0, 1] of values e (N,) under a quantile function, by bisection to 2^-52; 0 and 1 beyond the support."""
    low, high = np.zeros(len(e)), np.ones(len(e))
    for _ in range(52):
        middle = (low + high) / 2
        above = noise(middle) > e
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.asarray(np.where(np.isposinf(e), 1.0, np.where(np.isneginf(e), 0.0, (low + high) / 2)))


def _unit(ids: Sequence[str], count: int, purpose: str) -> np.ndarray:
    """Uniform draws in (0, 1) of 53 bits, float64 (N, count), a function of the ids."""
    words = SampleRandom.of(0, ids, f"data/{purpose}").bits(2 * count).numpy()
    return np.asarray(((words[:, 0::2] >> 5) * 2.0**26 + (words[:, 1::2] >> 6) + 0.5) * 2.0**-53)


def friedman() -> Dataset:
    """Friedman's first function with noise whose size depends on an input that the mean does not: 4,000 rows, 10 columns.

        Y = 10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5 + (1/2 + 3/2 x6) E,   x uniform in [0, 1]^10, E ~ N(0, 1)

    (Friedman 1991, Annals of Statistics 19; there the noise is N(0, 1) everywhere.) x7 to x10 mean nothing.
    """

    def location(x: np.ndarray) -> np.ndarray:
        value = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
        return np.asarray(value)

    truth = LocationScale(
        location,
        lambda x: 0.5 + 1.5 * np.clip(x[:, 5], 0.0, None),
        _gaussian,
        lambda x: np.asarray(((x >= 0) & (x <= 1)).all(axis=1)),
    )
    ids = [f"friedman:{i:04d}" for i in range(4000)]
    x = _unit(ids, 10, "inputs").astype(np.float32)
    splits = split_table(x, truth.draw(x, ids), ids)
    features = [Feature(f"x{j + 1}") for j in range(10)]
    return _regression("friedman", splits, features, "y", "synthetic: Friedman #1, noise growing with x6", truth)


def _line_toy(
    name: str, truth: LocationScale, regions: Mapping[str, tuple[int, Sequence[tuple[float, float]]]], source: str
) -> Dataset:
    """One input, uniform on a union of intervals per split: {split: (samples, intervals)}."""
    splits: dict[str, Split] = {}
    for split, (n, intervals) in regions.items():
        ids = [f"{name}:{split}:{i:05d}" for i in range(n)]
        lengths = np.array([high - low for low, high in intervals])
        ends = np.concatenate([[0.0], np.cumsum(lengths)])
        along = _unit(ids, 1, "inputs")[:, 0] * ends[-1]
        which = np.searchsorted(ends[1:-1], along, side="right")
        x = (np.array([low for low, _ in intervals])[which] + along - ends[which]).astype(np.float32)[:, None]
        splits[split] = ordered_table(x, truth.draw(x, ids), ids)
    return _regression(name, splits, [Feature("x")], "y", source, truth)


def toy_heteroscedastic() -> Dataset:
    """One input, noise that grows with it, a gap in the training inputs: what is noise, what is want of data?

        Y = sin(x) + 0.3 x + 0.1 exp(x / 5) E,   E ~ N(0, 1)

    Train (1,500) and calibration (500) are uniform on [0, 4] and [6, 10]; test (1,000) is uniform on [-2, 12], so it meets
    the gap and what lies beyond both ends. `truth.inside` says which test inputs are like the training inputs.
    """
    known = ((0.0, 4.0), (6.0, 10.0))
    truth = LocationScale(
        lambda x: np.sin(x[:, 0]) + 0.3 * x[:, 0],
        lambda x: 0.1 * np.exp(x[:, 0] / 5),
        _gaussian,
        lambda x: np.asarray(np.any([(x[:, 0] >= low) & (x[:, 0] <= high) for low, high in known], axis=0)),
    )
    regions = {"train": (1500, known), "calibration": (500, known), "test": (1000, ((-2.0, 12.0),))}
    return _line_toy("toy-heteroscedastic", truth, regions, "synthetic: noise growing with x, a gap in training")


_CUBIC_STD = {
    "lognormal": math.sqrt((math.e - 1) * math.e) * math.exp(1.5),  # exp(N(1.5, 1)), centred: 9.69
    "gaussian": 8.0,
    "triangular": 8.0,
}


def toy_cubic(noise: str = "lognormal") -> Dataset:
    """`toy-cubic:NOISE`: Y = x^3 + noise of the same law everywhere; x in [-4, 4] in training, in [-6, 6] in the test.

    The toy of SPC-UQ (split-point self-consistency), 2,000 training and 1,000 test samples, and 1,000 calibration samples
    like the training's. Its noises, centred: lognormal(1.5, 1) (the default), gaussian (standard deviation 8), triangular.
    The corners of the triangular law are not published; here it falls from its left end and has a standard deviation of 8.
    """
    if noise not in NOISES:
        raise ConfigError(f"data 'toy-cubic:{noise}': " + unknown_name("noise", noise, NOISES))
    size, known = _CUBIC_STD[noise], ((-4.0, 4.0),)
    truth = LocationScale(
        lambda x: x[:, 0] ** 3,
        lambda x: np.full(len(x), size),
        NOISES[noise],
        lambda x: np.abs(x[:, 0]) <= 4.0,
    )
    regions = {"train": (2000, known), "calibration": (1000, known), "test": (1000, ((-6.0, 6.0),))}
    return _line_toy(f"toy-cubic:{noise}", truth, regions, f"synthetic: cubic with {noise} noise, centred")


# CSV -----------------------------------------------------------------------------------------------------------------


def csv_options(argument: str) -> tuple[Path, dict[str, str]]:
    """`PATH#target=COLUMN#missing=drop#drop=COLUMN,COLUMN` as a path and its options. A # in the name of a file that exists
    belongs to the path.

    Raises:
        ConfigError: an unknown option, or one without a value.
    """
    whole = Path(argument).expanduser()
    if whole.is_file():
        return whole, {}
    path, *parts = argument.split("#")
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in _CSV_OPTIONS:
            raise ConfigError(f"data 'csv:{argument}': " + unknown_name("option", key, _CSV_OPTIONS))
        if not equals or not value:
            raise ConfigError(f"data 'csv:{argument}': the option '{key}' needs a value, as in #target=COLUMN")
        options[key] = value
    if options.get("missing", "drop") != "drop":
        raise ConfigError(f"data 'csv:{argument}': missing={options['missing']}, expected missing=drop or nothing")
    return Path(path).expanduser(), options


def load_csv(argument: str) -> Dataset:
    """`csv:PATH`, a table with a line of column names; the last column is the target, or `csv:PATH#target=COLUMN`.

    Columns of text become indicators of their categories. Cells that are empty, `?`, `NA` or `NaN` are missing: an error, or
    `#missing=drop` leaves out their rows. `#drop=A,B` leaves out columns. Commas separate, or semicolons or tabs where the
    first line has no comma. A column named `split` says for each row train, calibration (or val) or test; without it the
    rows are cut 60/20/20 by a hash of their own text, so the order of the file does not matter and identical rows stay
    together.

    Raises:
        ConfigError: an unknown option or column.
        DataError: no such file, missing or infinite values, a target that is no number.
    """
    file, options = csv_options(argument)
    what = f"csv:{argument}"
    frame = _read(file, what)
    known = [c for c in frame.columns if c != "split"]
    dropped = [c.strip() for c in options["drop"].split(",")] if "drop" in options else []
    for column in [*dropped, *([options["target"]] if "target" in options else [])]:
        if column not in known:
            raise ConfigError(f"data '{what}': " + unknown_name("column", column, known))
    known = [c for c in known if c not in dropped]
    target = options.get("target", known[-1] if known else "")
    if target not in known or len(known) < 2:
        raise ConfigError(f"data '{what}': expected a target and at least one other column; got {', '.join(known)}")
    frame = frame[[*known, *(["split"] if "split" in frame.columns else [])]]
    frame, note = _without_missing(frame, options, what)
    y = _as_numbers(frame[target], f"{what}: the target '{target}'")
    if y is None:
        raise DataError(f"{what}: the target '{target}' is text. Name a column of numbers: csv:PATH#target=COLUMN")
    x, features = encode(frame[[c for c in known if c != target]], (), what)
    keys = [_key(file.stem, row) for row in frame[known].itertuples(index=False)]
    splits = _named_splits(frame, x, y, _unique(keys), what) if "split" in frame.columns else None
    splits = splits or split_table(x, y, _unique(keys), keys)
    return _regression(what, splits, features, target, f"{file}{note}")


def _read(file: Path, what: str) -> pd.DataFrame:
    if not file.is_file():
        raise DataError(f"{what}: there is no file {file.name} in {file.resolve().parent}")
    try:
        first = file.read_text(encoding="utf-8-sig").partition("\n")[0]
        mark = next((c for c in ",;\t" if c in first), ",")
        frame = pd.read_csv(file, sep=mark, dtype=str, na_values=["?"], skipinitialspace=True, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserError) as error:  # UnicodeDecodeError and EmptyDataError are ValueErrors
        raise DataError(f"{what}: cannot be read as a table ({error})") from error
    frame.columns = pd.Index([str(c).strip() for c in frame.columns])
    if frame.columns.duplicated().any() or not len(frame):
        raise DataError(
            f"{what}: expected columns of different names and at least one row; got {', '.join(frame.columns)}"
        )
    if pd.to_numeric(pd.Series(list(frame.columns)), errors="coerce").notna().all():
        raise DataError(
            f"{what}: the first line holds numbers; put a line with the names of the columns in front of it"
        )
    return frame


def _without_missing(frame: pd.DataFrame, options: Mapping[str, str], what: str) -> tuple[pd.DataFrame, str]:
    missing = frame.isna()
    if not missing.to_numpy().any():
        return frame, ""
    rows = missing.any(axis=1)
    if options.get("missing") == "drop":
        if rows.all():
            raise DataError(
                f"{what}: every row has a missing value, so none is left. Leave out columns with #drop=COLUMN"
            )
        return frame[~rows], f" ({int(rows.sum())} of {len(frame)} rows with missing values left out)"
    told = []
    for column in frame.columns[missing.any(axis=0)]:
        lines = [_line(i) for i in frame.index[missing[column]]]
        told.append(
            f"'{column}' in line {', '.join(map(str, lines[:5]))}{f' and {len(lines) - 5} more' if lines[5:] else ''}"
        )
    raise DataError(
        f"{what}: values are missing: {'; '.join(told)}. Fill them in, leave out these {int(rows.sum())} of {len(frame)} rows "
        f"with #missing=drop, or columns with #drop=COLUMN."
    )


def _key(stem: str, row: Sequence[object]) -> str:
    text = "\x1f".join(map(str, row))
    return f"{stem}:{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _unique(keys: Sequence[str]) -> list[str]:
    """The keys, with /2, /3 behind those that were there before."""
    seen: dict[str, int] = {}
    out = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        out.append(key if seen[key] == 1 else f"{key}/{seen[key]}")
    return out


def _named_splits(frame: pd.DataFrame, x: np.ndarray, y: np.ndarray, ids: list[str], what: str) -> dict[str, Split]:
    """The splits that a column `split` names; a missing one is cut out of train."""
    names = frame["split"].str.strip().str.lower()
    aliases = {alias: split for split, others in _SPLIT_NAMES.items() for alias in others}
    for name in names.unique():
        if name not in aliases:
            raise DataError(f"{what}: column 'split': " + unknown_name("split", name, aliases))
    chosen = names.map(aliases).to_numpy()
    splits: dict[str, Split] = {
        split: ordered_table(x[chosen == split], y[chosen == split], np.array(ids)[chosen == split])
        for split in SPLITS
        if (chosen == split).any()
    }
    return _complete(splits, what)


def load_statsmodels(name: str) -> Dataset:
    """`statsmodels:NAME`: a regression data set that is packaged with statsmodels, its `exog` and its one `endog`.

    Raises:
        MissingExtraError: statsmodels is not installed.
        DataError: no such data set, or no regression: time series without inputs, several targets, fewer than 8 different ones.
    """
    from importlib import import_module
    from pkgutil import iter_modules

    try:
        import statsmodels.datasets as packaged
    except ImportError:
        raise MissingExtraError("statsmodels:NAME needs statsmodels: pip install statsmodels") from None
    known = [m.name for m in iter_modules(packaged.__path__) if m.ispkg and m.name != "tests"]
    if name not in known:
        raise DataError(unknown_name("statsmodels data set", name, known))
    data = import_module(f"statsmodels.datasets.{name}").load_pandas()
    target, inputs = getattr(data, "endog", None), getattr(data, "exog", None)
    if inputs is None or target is None or getattr(target, "ndim", 2) != 1 or target.nunique() < 8:
        raise DataError(
            f"statsmodels:{name} is no regression data set: expected inputs `exog` and one target `endog` of 8 or more "
            f"different values, such as statsmodels:engel, statsmodels:fair or statsmodels:randhie"
        )
    x, features = encode(pd.DataFrame(inputs), (), f"statsmodels:{name}")
    y = target.to_numpy(dtype=np.float64)
    splits = split_table(x, y, [f"statsmodels:{name}:{i:05d}" for i in range(len(y))])
    return _regression(f"statsmodels:{name}", splits, features, str(target.name), f"statsmodels.datasets.{name}")
