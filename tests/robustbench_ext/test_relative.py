"""Balanced counterparts, training on other data, relative accuracy: its number, its interval, a whole run; harmonic means."""

import itertools

import numpy as np
import pytest
import yaml

from reports import longtail
from reports.html import render_html
from reports.markdown import render_markdown
from robustbench_ext import measure_relative
from robustbench_ext.data import load_dataset
from robustbench_ext.data.exchange import with_train_of
from robustbench_ext.data.longtail import Balance, Imbalance, split_spec
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.measure import metric_table
from robustbench_ext.metrics import tails
from robustbench_ext.metrics.intervals import resamples, wilson
from robustbench_ext.metrics.paired import newcombe_paired
from robustbench_ext.metrics.relative import ratio_interval, relative_accuracy
from robustbench_ext.suite import Shots, validate_suite

# Balanced counterparts -----------------------------------------------------------------------------------------------


def counts_of(split, classes=10):
    return np.bincount(split.labels, minlength=classes).tolist()


@pytest.mark.parametrize("profile", ["exp:100", "exp:10", "step:10", "exp:1"])
def test_a_balanced_counterpart_has_the_same_total_and_equal_classes(profile):
    tailed, even, plain = (load_dataset(f"mnist5k{tail}") for tail in (f"@{profile}", f"@balanced:{profile}", ""))
    counts = counts_of(even["train"])
    assert len(set(counts)) == 1
    assert 0 <= len(tailed["train"]) - len(even["train"]) < 10  # rounded down to whole classes
    assert set(even["train"].ids) <= set(plain["train"].ids)
    for split in ("calibration", "test"):
        assert even[split].fingerprint() == plain[split].fingerprint()
    assert even.name == f"mnist5k@balanced:{profile}"


def test_balanced_cuts_are_nested_and_share_the_frequent_classes_samples():
    ids = [set(load_dataset(f"digits@balanced:{n}")["train"].ids.tolist()) for n in (1000, 500, 123, 10)]
    assert [len(i) for i in ids] == [1000, 500, 120, 10]
    for larger, smaller in itertools.pairwise(ids):
        assert smaller < larger
    tailed = load_dataset("digits@exp:10")["train"]
    even = load_dataset("digits@balanced:exp:10")["train"]
    frequent = {i for i, y in zip(even.ids.tolist(), even.labels, strict=True) if y == 0}
    assert frequent <= set(tailed.ids.tolist())


def test_names_of_balanced_cuts():
    assert split_spec("digits@balanced:500") == ("digits", Balance(total=500))
    assert split_spec("digits@balanced:exp:1e2") == ("digits", Balance(like=Imbalance("exp", 100.0)))
    for spec, says in {
        "digits@balanced": "the total is missing",
        "digits@balanced:1.5": "expected a whole number",
        "digits@balanced:0": "expected a whole number",
        "digits@balanced:pareto:10": "imbalance profile",
        "digits@balanced:500+calibration": "leaves the other splits alone",
    }.items():
        with pytest.raises(ConfigError, match=says):
            load_dataset(spec)
    for spec in ("digits@balanced:9", "digits@balanced:2000"):
        with pytest.raises(DataError, match="expected 10 to 1040"):
            load_dataset(spec)


def test_a_train_split_from_elsewhere():
    tailed, even = load_dataset("digits@exp:10"), load_dataset("digits@balanced:exp:10")
    joined = with_train_of(tailed, even)
    assert joined["train"].fingerprint() == even["train"].fingerprint()
    for split in ("calibration", "test"):
        assert joined[split].fingerprint() == tailed[split].fingerprint()
    with pytest.raises(ConfigError, match="10 classes .* of shape"):
        with_train_of(tailed, load_dataset("mnist5k"))
    with pytest.raises(ConfigError, match="only classifiers"):
        with_train_of(tailed, load_dataset("diabetes"))


@pytest.mark.parametrize("split", ["test", "calibration"])
def test_training_on_what_is_judged_on_is_refused(split, digits):
    from dataclasses import replace

    cheating = replace(digits, name="cheating", splits={**digits.splits, "train": digits[split]})
    with pytest.raises(ConfigError, match=f"{len(digits[split])} of its training samples are in the {split} split"):
        with_train_of(digits, cheating)


# Relative accuracy ---------------------------------------------------------------------------------------------------


def answers(*shares, n=200):
    return [np.arange(n) < round(share * n) for share in shares]


def test_by_hand():
    a_t, a_v, a_b = answers(0.468, 0.578, 0.55, n=1000)
    found = relative_accuracy(a_t, a_v, a_b)
    assert found.value == pytest.approx(0.468 / 0.578, abs=1e-15)
    assert f"{100 * found.value:.1f}" == "81.0"  # the survey's softmax row: 46.8 / 57.8
    assert relative_accuracy(a_t, a_b, a_v).value == found.value  # the larger counts, whichever it is
    assert relative_accuracy(*answers(0.6, 0.6, 0.5)).value == 1.0
    assert relative_accuracy(*answers(0.8, 0.6, 0.4)).value == pytest.approx(4 / 3)  # never clipped
    low, high = ratio_interval(*answers(0.8, 0.6))
    assert low < 4 / 3 < high


def test_undefined_without_a_base_and_zero_where_nothing_is_right():
    nothing, some = answers(0, 0.5)
    assert "A_u = 0" in relative_accuracy(some, nothing, nothing).reason
    assert np.isnan(relative_accuracy(nothing, nothing, nothing).value)
    zero = relative_accuracy(nothing, some, some)
    assert zero.value == zero.ci_low == 0
    assert 0.01 < zero.ci_high < 0.1  # Wilson's 1.9 % of 200 over 50 %, and not the single point that resamples show
    one_sided = relative_accuracy(some, some, nothing)
    assert one_sided.value == 1.0
    with pytest.raises(DataError, match="lengths differ"):
        relative_accuracy(some, some[:-1], some)


def test_the_interval_holds_the_value_and_does_not_collapse():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.random(3)
        found = relative_accuracy(*(rng.random((3, 50)) < p[:, None]))
        if found.reason:
            continue
        assert found.ci_low <= found.value + 1e-12
        assert found.ci_high >= found.value - 1e-12
        assert found.ci_high - found.ci_low > 1e-3


def test_ends_solve_the_equation_that_defines_them():
    """At each end the interval of the difference p_a - theta p_b touches 0; with theta = 1 that is Newcombe's."""
    rng = np.random.default_rng(1)
    skill = rng.random(400)
    a, b = skill < 0.6, skill + rng.normal(0, 0.2, 400) < 0.6
    low, high = ratio_interval(a, b)
    n, k_a, k_b = 400, int(a.sum()), int(b.sum())
    table = [int(v.sum()) for v in (a & b, a & ~b, ~a & b, ~a & ~b)]
    (l_a, u_a), (l_b, u_b) = wilson(k_a, n), wilson(k_b, n)
    excess = max(0, table[0] * table[3] - table[1] * table[2] - n / 2)
    phi = excess / np.sqrt(k_a * (n - k_a) * k_b * (n - k_b))
    for theta, x, y, sign in ((low, k_a / n - l_a, u_b - k_b / n, -1), (high, u_a - k_a / n, k_b / n - l_b, 1)):
        half = np.sqrt(x**2 - 2 * phi * theta * x * y + (theta * y) ** 2)
        assert k_a / n - theta * k_b / n + sign * half == pytest.approx(0, abs=1e-12)
    below, above = newcombe_paired(*table)
    assert (below <= 0 <= above) == (low <= 1 <= high)


@pytest.mark.parametrize("case", ["alike", "apart", "above"])
def test_agrees_with_a_paired_bootstrap_where_there_are_many_answers(case):
    """n = 2,000: percentiles of 1,000 paired resamples are good to about 0.3 of a tenth of the width; a tenth is allowed."""
    rng = np.random.default_rng(2)
    skill = rng.random(2000)
    p = {"alike": (0.5, 0.55), "apart": (0.3, 0.8), "above": (0.85, 0.6)}[case]
    a, b = (skill + rng.normal(0, 0.15, 2000) < level for level in p)
    drawn = np.concatenate([(w @ a) / (w @ b) for (w,) in resamples((2000,))])
    low, high = np.quantile(drawn, [0.025, 0.975])
    mine = ratio_interval(a, b)
    width = high - low
    assert abs(mine[0] - low) < 0.1 * width
    assert abs(mine[1] - high) < 0.1 * width


def misses(p, n, noise, repeats, seed=3):
    """Below and above: share of simulated test sets whose interval does not hold A_t / max(A_v, A_b)."""
    rng = np.random.default_rng(seed)
    truth = p[0] / max(p[1], p[2])
    below = above = 0
    for _ in range(repeats):
        # Common difficulty, ranks of which are uniform again: shares are p exactly, answers correlated.
        common = rng.normal(size=n)
        own = rng.normal(size=(3, n))
        score = np.sqrt(1 - noise) * common + np.sqrt(noise) * own
        right = score < np.array([normal_quantile(v) for v in p])[:, None]
        found = relative_accuracy(*right)
        if found.reason:
            continue
        below += truth < found.ci_low - 1e-12
        above += truth > found.ci_high + 1e-12
    return below / repeats, above / repeats


def normal_quantile(p):
    from scipy.special import ndtri

    return float(ndtri(p))


CASES = [(0.5, 0.7, 0.7), (0.5, 0.7, 0.6), (0.9, 0.95, 0.95), (0.08, 0.2, 0.2), (0.6, 0.5, 0.5), (0.97, 0.97, 0.97)]


@pytest.mark.parametrize("p", CASES[:2])
def test_the_interval_covers_what_it_is_of_although_the_larger_is_chosen(p):
    """At most 2.5 % miss on either side, plus four standard errors of 400 simulations (3.1 points)."""
    below, above = misses(p, 200, 0.3, 400)
    assert below <= 0.025 + 0.031
    assert above <= 0.025 + 0.031


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.2, 0.9])
@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("p", CASES)
def test_the_interval_covers(p, n, noise):
    """At most 2.5 % on either side, plus four standard errors of 1,000 simulations (2.0 points)."""
    below, above = misses(p, n, noise, 1000)
    assert below <= 0.025 + 0.02
    assert above <= 0.025 + 0.02


@pytest.mark.slow
def test_without_the_allowance_for_the_choice_the_upper_end_would_miss():
    """Both bases alike and independent: the plug-in ratio's own interval is too low on its upper side."""
    rng = np.random.default_rng(4)
    truth, above = 0.5 / 0.7, 0
    for _ in range(2000):
        t, v, b = rng.random((3, 200)) < np.array([0.5, 0.7, 0.7])[:, None]
        above += truth > ratio_interval(t, v if v.sum() >= b.sum() else b)[1]
    assert above / 2000 > 0.035  # 2.5 % plus three standard errors


# Harmonic mean and shots ---------------------------------------------------------------------------------------------


def outcomes(right, total):
    labels = np.repeat(np.arange(len(total)), total)
    return np.concatenate([np.arange(n) < k for k, n in zip(right, total, strict=True)]), labels


@pytest.mark.parametrize(
    ("right", "samples"), [([0, 1, 1], [1, 1, 2]), ([0, 1, 0], [1, 1, 2]), ([0], [1]), ([0, 0], [1, 1])]
)
def test_a_harmonic_mean_of_a_few_samples(right, samples):
    found = tails.harmonic_accuracy(*outcomes(right, samples), len(right))  # its effective n would be below 1
    assert found.value == found.ci_low == 0
    assert 0.5 < found.ci_high <= 1


def test_harmonic_means_by_hand():
    found = tails.harmonic_accuracy(*outcomes([50, 25, 40], [100, 50, 50]), 3)
    assert found.value == pytest.approx(3 / (2 + 2 + 1.25))
    assert found.n == 200
    assert tails.harmonic_accuracy(*outcomes([30] * 5, [50] * 5), 5).value == pytest.approx(0.6)
    zero = tails.harmonic_accuracy(*outcomes([100, 0], [100, 100]), 2)
    assert zero.value == zero.ci_low == 0
    assert 0.02 < zero.ci_high < 0.12  # one class may be right up to 3 in 100 times
    perfect = tails.harmonic_accuracy(*outcomes([20] * 4, [20] * 4), 4)
    assert (perfect.value, perfect.ci_high) == (1.0, 1.0)
    assert perfect.ci_low < 0.98
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(0, 10, 300)
        correct = rng.random(300) < rng.random(10)[labels]
        harmonic, mean = tails.harmonic_accuracy(correct, labels, 10), tails.balanced_accuracy(correct, labels, 10)
        assert harmonic.ci_low <= harmonic.value <= harmonic.ci_high
        assert harmonic.value <= mean.value + 1e-12
    missing = tails.harmonic_accuracy(*outcomes([3, 0, 6], [10, 0, 10]), 3)
    assert missing.value == pytest.approx(2 / (10 / 3 + 10 / 6))
    assert missing.reason == "1 of 3 classes have no test samples"


def harmonic_misses(p, n, repeats):
    rng = np.random.default_rng(5)
    labels, truth = np.repeat(np.arange(len(p)), n), len(p) / (1 / p).sum()
    out = 0
    for _ in range(repeats):
        found = tails.harmonic_accuracy(rng.random(len(labels)) < p[labels], labels, len(p))
        out += not found.ci_low - 1e-12 <= truth <= found.ci_high + 1e-12
    return out / repeats


HARMONIC = {
    "equal": np.full(10, 0.9),
    "spread": np.linspace(0.2, 0.9, 10),
    "step": np.repeat([0.8, 0.35], 5),
    "one low": np.repeat([0.9, 0.1], [9, 1]),
    "tail": np.repeat([0.95, 0.05], [7, 3]),
    "near the top": np.full(10, 0.99),
    "all low": np.full(10, 0.3),
    "two": np.array([0.9, 0.3]),
    "a hundred": np.linspace(0.1, 0.95, 100),
}


@pytest.mark.parametrize("case", ["tail", "a hundred"])
def test_the_harmonic_interval_covers(case):
    """At most 5 % miss, plus four standard errors of 200 simulations (6.2 points)."""
    assert harmonic_misses(HARMONIC[case], 30, 200) <= 0.05 + 0.062


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 30, 100])
@pytest.mark.parametrize("case", HARMONIC)
def test_the_harmonic_interval_covers_in_many_cases(case, n):
    """At most 5 % miss, plus four standard errors of 400 simulations (4.4 points)."""
    assert harmonic_misses(HARMONIC[case], n, 400) <= 0.05 + 0.044


@pytest.mark.slow
def test_bootstrap_percentiles_of_the_harmonic_mean_would_miss():
    """What the interval is for: at three classes of 5 % and 30 samples each, one is often never right in the sample."""
    rng = np.random.default_rng(6)
    p, n, out = HARMONIC["tail"], 30, 0
    truth = len(p) / (1 / p).sum()
    for _ in range(200):
        drawn = rng.binomial(n, rng.binomial(n, p) / n, size=(500, 10)) / n
        with np.errstate(divide="ignore"):
            low, high = np.quantile(10 / (1 / drawn).sum(axis=1), [0.025, 0.975])
        out += not low <= truth <= high
    assert out / 200 > 0.2


def test_shots_may_be_cut_elsewhere_and_results_say_where():
    default, cut = metric_table(), metric_table(Shots(many=50, few=10))
    assert {m: default[m]["definition"] for m in tails.shot_definitions()} == tails.shot_definitions()
    assert (
        cut["many_shot_accuracy"]["definition"]
        == "The mean accuracy of the classes with more than 50 training samples."
    )
    assert cut["accuracy"] == default["accuracy"]
    assert (Shots().many, Shots().few) == (tails.MANY, tails.FEW)
    with pytest.raises(ConfigError, match="few = 9 is more than many = 3"):
        validate_suite({**SUITE, "shots": {"many": 3, "few": 9}})
    with pytest.raises(ConfigError, match="Did you mean 'few'"):
        validate_suite({**SUITE, "shots": {"fev": 9}})


# A whole run ---------------------------------------------------------------------------------------------------------

RECIPE = {"epochs": 3, "lr": 0.05, "eps": 0.1, "validation_n": 40, "validation_steps": 1, "energy_n": 0}
BALANCED = "digits@balanced:exp:20"


def trained(method, **options):
    return {"defense": {"name": "class-prior", "method": method}, "recipe": RECIPE, **options}


SUITE = {
    "schema": 1,
    "name": "relative",
    "data": "digits@exp:20",
    "n": 200,
    "shots": {"many": 60, "few": 15},
    "models": [
        {"name": "ce", "train": {"defense": "standard", "recipe": RECIPE, "seeds": 2}},
        {"name": "bs", "train": trained("balanced-softmax")},
        {"name": "adjusted", "make": {"name": "logit-adjust", "of": ["ce seed 0"]}},
        {"name": "ce even", "train": {"defense": "standard", "recipe": RECIPE, "data": BALANCED}},
        {"name": "bs even", "train": {**trained("balanced-softmax", data=BALANCED), "recipe": {**RECIPE, "epochs": 5}}},
        {"name": "adjusted even", "make": {"name": "logit-adjust", "of": ["ce even"]}},
    ],
    "relative": [
        {"model": "ce", "plain": "ce even", "same": "ce even"},
        {"model": "bs", "plain": "ce even", "same": "bs even"},
        {"model": "adjusted", "plain": "ce even", "same": "adjusted even"},
        {"model": "ce even", "plain": "ce seed 0", "same": "bs even"},
    ],
    "conditions": [
        {"attack": "pgd", "eps": 0.1, "steps": 3, "stop": "never"},
        {"attack": "fgsm", "eps": 0.05, "only": ["ce", "bs", "ce even", "bs even"]},
        {"outliers": ["letters"], "n": 20},
    ],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relative")
    return folder, run_suite(SUITE, folder)


def right(context, model, label):
    table = context.store.load(context.observation_key(Cell(model, label, "test", 0)))
    return ~table["broken"] if "broken" in table else table["logits"].argmax(1) == table["label"]


def test_a_run_has_relative_accuracies(run):
    folder, summary = run
    results = summary.results
    assert not summary.failures
    context = Context(validate_suite(SUITE), folder)
    clean = {m: right(context, m, "clean") for m in ("ce seed 0", "ce seed 1", "bs", "ce even", "bs even", "adjusted")}
    assert clean["bs even"].mean() > clean["ce even"].mean()  # so that it is A_u below
    for model, plain, same in (("ce seed 1", "ce even", "ce even"), ("bs", "ce even", "bs even")):
        (row,) = results.find(model=model, metric="relative_accuracy")
        expected = clean[model].mean() / max(clean[plain].mean(), clean[same].mean())
        assert row.value == pytest.approx(expected, abs=1e-12)
        assert row.ci_low < row.value < row.ci_high
        assert row.condition == "clean"
        assert row.against == ("ce even" if plain == same else "ce even and bs even")
    (row,) = results.find(model="bs", metric="robust_relative_accuracy", condition="pgd Linf 0.1")
    robust = {m: right(context, m, "pgd Linf 0.1").mean() for m in ("bs", "ce even", "bs even")}
    assert row.value == pytest.approx(robust["bs"] / max(robust["ce even"], robust["bs even"]), abs=1e-12)
    (row,) = results.find(model="bs", metric="robust_relative_accuracy", condition="worst case Linf 0.1")
    worst = {
        m: (right(context, m, "clean") & right(context, m, "pgd Linf 0.1") & right(context, m, "fgsm Linf 0.05")).mean()
        for m in ("bs", "ce even", "bs even")
    }
    assert row.value == pytest.approx(worst["bs"] / max(worst["ce even"], worst["bs even"]), abs=1e-12)


def test_what_has_no_relative_accuracy_says_why(run):
    results = run[1].results
    for row in results.find(model="ce even", metric="relative_accuracy"):
        assert row.value is None
        assert row.reason == "ce seed 0 was trained on 5 to 104 samples a class, not on balanced data"
    # The made model does not meet fgsm, so neither does its worst case at that budget.
    assert not results.find(model="adjusted", metric="robust_relative_accuracy", condition="fgsm Linf 0.05")
    (row,) = results.find(model="adjusted", metric="robust_relative_accuracy", condition="pgd Linf 0.1")
    assert row.value is not None
    (row,) = results.find(model="bs", metric="robust_relative_accuracy", condition="fgsm Linf 0.05")
    assert row.value is not None
    assert not results.find(condition="outliers letters", metric="relative_accuracy")


def test_logit_adjustment_takes_the_frequencies_of_its_members_own_data(run):
    models = {m["name"]: m for m in run[1].results.models}
    shift = models["adjusted"]["made"]["report"]["shift"]
    assert shift[9] - shift[0] == pytest.approx(np.log(104 / 5), abs=1e-4)
    even = models["adjusted even"]["made"]["report"]["shift"]
    assert max(even) - min(even) < 1e-9
    assert models["bs even"]["training"]["data"] == BALANCED
    assert "data" not in models["bs"]["training"]


def test_every_seed_has_its_own_and_they_are_averaged(run):
    results = run[1].results
    values = [results.find(model=f"ce seed {s}", metric="relative_accuracy")[0].value for s in (0, 1)]
    (mean,) = [r for r in results.replicates if r.metric == "relative_accuracy"]
    assert (mean.model, mean.n, mean.against) == ("ce", 2, "ce even")
    assert mean.value == pytest.approx(np.mean(values))


def test_groups_of_classes_are_cut_where_the_suite_says(run):
    results = run[1].results
    groups = {r.metric: r.group for r in results.find(model="bs", condition="clean") if "shot" in r.metric}
    assert groups == {
        "many_shot_accuracy": "2 classes: 0, 1",
        "medium_shot_accuracy": "4 classes: 2, 3, 4, 5",
        "few_shot_accuracy": "4 classes: 6, 7, 8, 9",
    }
    assert "fewer than 15" in results.metrics["few_shot_accuracy"]["definition"]
    for condition in ("pgd Linf 0.1", "fgsm Linf 0.05", "worst case Linf 0.1"):
        there = {r.metric for r in results.find(model="bs", condition=condition)}
        assert {*groups, "harmonic_accuracy", "worst_class_accuracy"} <= there


def test_the_report_has_them(run):
    results = run[1].results
    table = longtail.accuracies(results)
    assert [name for name, _ in table.rows] == [m["name"] for m in results.models]
    assert table.columns[3].title == "clean: few shot (4 classes), % ↑"
    assert "Here: 6, 7, 8, 9." in table.columns[3].definition
    assert {"clean: relative accuracy, % ↑", "Linf 0.1: robust relative accuracy, % ↑"} <= {
        c.title for c in table.columns
    }
    (row,) = results.find(model="bs", metric="few_shot_accuracy", condition="clean")
    assert dict(table.rows)["bs"][3].value == row.value
    seeds = longtail.over_seeds(results)
    assert [name for name, _ in seeds.rows] == ["ce"]
    relatives = dict(longtail.relatives(results).rows)
    assert relatives["bs · clean"][2].text == "ce even and bs even"
    assert relatives["ce even · clean"][0].text == "–"
    # Of two models, without other figures: quick to render.
    kept = ("bs", "bs even")
    light = results.model_copy(
        update={
            "models": [m for m in results.models if m["name"] in kept],
            "results": [r for r in results.results if r.model in kept],
            "curves": [],
            "comparisons": [],
        }
    )
    html, markdown = render_html(light, None, []), render_markdown(results)
    assert "<h2>Long tail</h2>" in html
    assert "on digits@balanced:exp:20 with class-prior" in html
    assert "## Long tail" in markdown
    assert "## Relative accuracy" in markdown


def test_data_without_a_long_tail_has_no_such_section(finished):
    results = finished[1].results
    assert not longtail.longtail(results)
    assert "Long tail" not in render_markdown(results)


def test_a_training_without_data_of_its_own_has_the_key_it_had(tmp_path):
    """Naming the suite's own data is the same training."""
    suite = {**SUITE, "relative": [], "models": [SUITE["models"][1]]}
    named = yaml.safe_load(yaml.safe_dump(suite))
    named["models"][0]["train"]["data"] = SUITE["data"]
    keys = [Context(validate_suite(s), tmp_path).training["bs"].folder.name for s in (suite, named)]
    assert keys[0] == keys[1]
    named["models"][0]["train"]["data"] = BALANCED
    assert Context(validate_suite(named), tmp_path).training["bs"].folder.name != keys[0]


def test_what_is_not_as_the_definition_has_it_is_noted(tmp_path):
    def said(**train):
        suite = {**SUITE, "conditions": [], "relative": [{"model": "bs", "plain": "even", "same": "even"}]}
        even = {"name": "even", **({"train": {"defense": "standard", "recipe": RECIPE, **train}} if train else {})}
        suite["models"] = [SUITE["models"][1], even if train else {**even, "spec": "small-cnn"}]
        context = Context(validate_suite(suite), tmp_path)
        return measure_relative._trained(context, context.suite.relative[0])

    assert said(data=BALANCED) == ("", [])
    assert said(data="digits") == ("", [SIZES.format(1078)])  # nearly balanced as it is, and three times as large
    refused, notes = said(data="digits@step:10")
    assert refused == "even was trained on 10 to 104 samples a class, not on balanced data"
    assert notes == []
    assert said() == ("", ["relative accuracy of bs: what even was trained on is not known"])


SIZES = "relative accuracy of bs: the models were trained on different numbers of samples: bs on 351, even on {}"


def changed(**parts):
    return {**yaml.safe_load(yaml.safe_dump(SUITE)), **parts}


def test_what_a_suite_cannot_ask_for(tmp_path):
    for entry, says in (
        ({"model": "bss", "plain": "ce even", "same": "bs even"}, "Did you mean 'bs'"),
        ({"model": "bs", "plain": "bs", "same": "bs even"}, "relative to itself"),
        ({"model": "bs", "plain": "ce even"}, "same: Field required"),
        ({"model": "bs", "plain": "ce even", "sane": "bs even"}, "Did you mean 'same'"),
    ):
        with pytest.raises(ConfigError, match=says):
            validate_suite(changed(relative=[entry]))
    three = changed(relative=[{"model": "ce", "plain": "even", "same": "even"}])
    three["models"][3] = {"name": "even", "train": {"defense": "standard", "recipe": RECIPE, "seeds": 3}}
    three["models"] = three["models"][:4]
    with pytest.raises(ConfigError, match="ce has 2, even has 3"):
        validate_suite(three)
    mixed = changed(relative=[])
    mixed["models"] = [*mixed["models"][:5], {"name": "soup", "make": {"name": "soup", "of": ["bs", "bs even"]}}]
    with pytest.raises(ConfigError, match="trained on different data"):
        _ = Context(validate_suite(mixed), tmp_path).training
    wrong = changed(relative=[])
    wrong["models"][1]["train"]["data"] = "mnist5k"
    with pytest.raises(ConfigError, match="model 'bs': train: data 'mnist5k': 10 classes"):
        _ = Context(validate_suite(wrong), tmp_path).training
