"""Rank intervals: by hand, invariants, and that they hold all true ranks at once in simulation."""

import math
from itertools import combinations

import numpy as np
import pytest

from robustbench_ext.errors import DataError
from robustbench_ext.metrics.paired import compare_proportions, holm
from robustbench_ext.metrics.ranks import rank_intervals


def test_by_hand():
    assert rank_intervals(np.zeros((3, 3), dtype=bool)) == [(1, 3)] * 3
    order = np.triu(np.ones((4, 4), dtype=bool), 1)  # 0 beats all, 1 beats 2 and 3, ...
    assert rank_intervals(order) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    # Only the best and the worst of three are told apart.
    assert rank_intervals(np.array([[0, 0, 1], [0, 0, 0], [0, 0, 0]])) == [(1, 2), (1, 3), (2, 3)]
    assert rank_intervals(np.zeros((1, 1))) == [(1, 1)]


def test_faults():
    with pytest.raises(DataError, match="expected"):
        rank_intervals(np.zeros((2, 3)))
    with pytest.raises(DataError, match="each"):
        rank_intervals(np.ones((2, 2)))


def test_they_hold_all_true_ranks_at_once():
    """Models of which some are equally good. A model's true ranks run from 1 + (better ones) to M - (worse ones)."""
    rng = np.random.default_rng(0)
    truth, n, trials = np.array([0.85, 0.85, 0.80, 0.70, 0.70]), 300, 250
    m, held, widths = len(truth), 0, []
    best = 1 + (truth[None] > truth[:, None]).sum(axis=1)
    last = m - (truth[None] < truth[:, None]).sum(axis=1)
    pairs = list(combinations(range(m), 2))
    for _ in range(trials):
        hard = rng.random(n)[:, None]  # samples are easy or hard for all models alike
        right = np.where(rng.random((n, m)) < 0.5, hard, rng.random((n, m))) < truth
        compared = [compare_proportions(right[:, i], right[:, j]) for i, j in pairs]
        better = np.zeros((m, m), dtype=bool)
        for (i, j), found, p in zip(pairs, compared, holm([c.p_value for c in compared]), strict=True):
            better[i, j] = p < 0.05 and found.difference.value > 0
            better[j, i] = p < 0.05 and found.difference.value < 0
        intervals = np.array(rank_intervals(better))
        held += bool(((intervals[:, 0] <= best) & (last <= intervals[:, 1])).all())
        widths.append(np.ptp(intervals, axis=1).mean())
    # Family-wise error of at most 5 %, with the binomial error of 250 trials; and not by saying nothing.
    assert held / trials >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / trials)
    assert np.mean(widths) < m - 2
