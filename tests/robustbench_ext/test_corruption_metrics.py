"""Mean error, mCE and relative mCE: golden values, the baseline against itself, what is missing, joint resampling."""

import numpy as np
import pytest

from robustbench_ext.data.corruptions import EXTRA
from robustbench_ext.data.corruptions import FIFTEEN as DATA_FIFTEEN
from robustbench_ext.errors import DataError
from robustbench_ext.metrics import METRICS
from robustbench_ext.metrics.corruption import (
    ALEXNET,
    FIFTEEN,
    Baseline,
    accuracy_drop,
    mce,
    mce_of_errors,
    mean_error,
    relative_mce,
    relative_mce_of_errors,
)

N = 200


def verdicts(rate, n=N, seed=0):
    """Of each corruption and severity, exactly round(n rate(c, s)) mistakes, at random samples."""
    rng = np.random.default_rng(seed)
    made = {}
    for c, name in enumerate(FIFTEEN):
        for s in range(1, 6):
            made[name, s] = np.ones(n, dtype=bool)
            made[name, s][rng.permutation(n)[: round(n * rate(c, s))]] = False
    return made


def test_the_fifteen_are_the_data_packages():
    assert FIFTEEN == DATA_FIFTEEN
    assert {"mean_corruption_error", "accuracy_drop", "corruption_mce", "corruption_relative_mce"} <= set(METRICS)


def test_alexnet_against_itself_is_exactly_one():
    assert mce_of_errors(ALEXNET.errors) == 1.0
    assert relative_mce_of_errors(ALEXNET.errors, ALEXNET.clean) == 1.0
    # Computed from the published list with another program, as are the golden values below.
    assert sum(ALEXNET.errors.values()) / 15 == pytest.approx(0.788993067, abs=1e-9)
    model = verdicts(lambda c, s: 0.1 * s)
    clean = np.arange(N) % 20 > 0
    assert mce(model, model).value == 1.0
    assert relative_mce(model, clean, model, clean).value == 1.0
    # Every resample of a model against itself is 1 as well: they are drawn jointly.
    assert mce(model, model).reason == "no resample differs"


def test_golden_values():
    # Errors of 0.1, 0.2, ..., 0.5 by severity: 0.3 on average, whatever the corruption.
    model, clean = verdicts(lambda c, s: 0.1 * s), np.arange(N) % 20 > 0  # clean error 0.05
    alexnet = np.array(list(ALEXNET.errors.values()))
    assert mean_error(model).value == pytest.approx(0.3, abs=1e-12)
    assert mce(model).value == pytest.approx(np.mean(0.3 / alexnet), abs=1e-12)
    assert mce(model).value == pytest.approx(0.388035438, abs=1e-9)
    assert relative_mce(model, clean).value == pytest.approx(np.mean(0.25 / (alexnet - 0.43478)), abs=1e-12)
    assert relative_mce(model, clean).value == pytest.approx(0.813977798, abs=1e-9)
    assert mce_of_errors(dict.fromkeys(FIFTEEN, 0.3)) == pytest.approx(mce(model).value, abs=1e-12)
    assert relative_mce_of_errors(dict.fromkeys(FIFTEEN, 0.3), 0.05) == pytest.approx(relative_mce(model, clean).value)
    # A model that is right more often under corruption than without has a negative relative mCE.
    assert relative_mce(verdicts(lambda c, s: 0.01), clean).value < 0


def test_it_is_the_ratio_of_sums():
    model, other = verdicts(lambda c, s: 0.1 * s), verdicts(lambda c, s: 0.5 if s == 5 else 0.05, seed=1)
    ratio_of_sums, mean_of_ratios = 1.5 / 0.7, np.mean([2, 4, 6, 8, 1])
    assert mce(model, other).value == pytest.approx(ratio_of_sums, abs=1e-12) != pytest.approx(mean_of_ratios)
    known = Baseline("known", dict.fromkeys(FIFTEEN, 0.14), 0.05)
    assert mce(model, known).value == pytest.approx(ratio_of_sums, abs=1e-12)


def test_the_drop_is_paired():
    model, clean = verdicts(lambda c, s: 0.1 * s), np.arange(N) % 20 > 0  # clean error 0.05
    drop = accuracy_drop(model, clean)
    assert drop.value == pytest.approx(0.3 - 0.05, abs=1e-12)
    assert drop.value == pytest.approx(mean_error(model).value - (1 - clean.mean()), abs=1e-12)
    # Half of the samples are wrong with and without corruption: that half does not vary in the drop.
    hard, hit = np.arange(N) % 2 == 0, np.arange(N) % 20 == 1
    shared = {(name, s): ~(hard | hit) for name in FIFTEEN for s in range(1, 6)}
    paired = accuracy_drop(shared, ~hard)
    half = 1.959964 * (0.05 * 0.95 / N) ** 0.5
    assert paired.value == pytest.approx(0.05) and (paired.ci_high - paired.ci_low) / 2 == pytest.approx(half, rel=0.15)
    none = accuracy_drop(dict.fromkeys(model, clean), clean)
    assert none.value == 0 and np.isnan(none.ci_low) and none.reason == "no resample differs"
    with pytest.raises(DataError, match="lengths differ"):
        accuracy_drop(model, clean[:3])


def test_extra_corruptions_stay_out():
    model = verdicts(lambda c, s: 0.1 * s)
    more = {**model, **{(name, s): np.zeros(N, dtype=bool) for name in EXTRA for s in range(1, 6)}}
    assert mean_error(more) == mean_error(model) and mce(more) == mce(model)


def test_what_is_missing_is_an_error():
    model, clean = verdicts(lambda c, s: 0.1 * s), np.ones(N, dtype=bool)
    without = {key: value for key, value in model.items() if key[0] != "frost"}
    for call in (
        mean_error,
        mce,
        lambda m: relative_mce(m, clean),
        lambda m: accuracy_drop(m, clean),
        lambda m: mce(model, m),
    ):
        with pytest.raises(DataError, match="frost at severity 1"):
            call(without)
    with pytest.raises(DataError, match="fog at severity 4"):
        mce({key: value for key, value in model.items() if key != ("fog", 4)})
    with pytest.raises(DataError, match="lengths differ"):
        mean_error({**model, ("fog", 4): np.ones(3, dtype=bool)})
    with pytest.raises(DataError, match="lengths differ"):
        relative_mce(model, clean[:3])
    with pytest.raises(DataError, match="lengths differ"):
        mce(model, verdicts(lambda c, s: 0.5, n=50))
    with pytest.raises(DataError, match="baseline_clean"):
        relative_mce(model, clean, model)
    with pytest.raises(DataError, match="no error for snow"):
        mce_of_errors({k: v for k, v in ALEXNET.errors.items() if k != "snow"})


def test_a_baseline_without_errors_gives_no_ratio():
    model, perfect = verdicts(lambda c, s: 0.1 * s), verdicts(lambda c, s: 0.0 if c == 3 else 0.2)
    assert "defocus-blur" in mce(model, perfect).reason and np.isnan(mce(model, perfect).value)
    none = verdicts(lambda c, s: 0.0)
    found = mean_error(none)
    # All right: Wilson's [0, z^2 / (n + z^2)].
    assert (found.value, found.ci_low) == (0, 0) and found.ci_high == pytest.approx(1.959964**2 / (N + 1.959964**2))
    assert mean_error(verdicts(lambda c, s: 1.0)).ci_high == 1


def test_samples_are_resampled_with_all_their_verdicts():
    # Half of the samples are always wrong, the others always right: as uncertain as one proportion of N, not of 75 N.
    hard = np.arange(N) % 2 == 0
    joint = mean_error({(name, s): ~hard for name in FIFTEEN for s in range(1, 6)})
    half = 1.959964 * 0.5 / N**0.5
    assert (joint.ci_high - joint.ci_low) / 2 == pytest.approx(half, rel=0.1)
    apart = mean_error(verdicts(lambda c, s: 0.5))
    assert (apart.ci_high - apart.ci_low) / 2 == pytest.approx(half / 75**0.5, rel=0.25)
    assert mean_error(verdicts(lambda c, s: 0.5)) == apart


def test_paired_models_cancel_what_they_share():
    hard = np.random.default_rng(1).random(N)
    model, other = (
        {(name, s): hard > shift + 0.1 * s for name in FIFTEEN for s in range(1, 6)} for shift in (0.0, 0.02)
    )
    width = [
        e.ci_high - e.ci_low
        for e in (
            mce(model, other),
            mce(
                model,
                Baseline("b", {name: float(np.mean([~other[name, s] for s in range(1, 6)])) for name in FIFTEEN}, 0.0),
            ),
        )
    ]
    assert width[0] < 0.5 * width[1]
