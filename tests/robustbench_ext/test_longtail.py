"""Long tails: published counts, deterministic nested cuts, names; means over classes and their intervals; a whole run."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from reports import tables
from reports.html import render_html
from robustbench_ext.data import ArraySplit, Dataset, imbalanced, load_dataset
from robustbench_ext.data.longtail import class_counts, split_spec
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.evaluate import Cell, Context
from robustbench_ext.metrics import tails
from robustbench_ext.metrics.classification import accuracy, worst_class_accuracy
from robustbench_ext.metrics.intervals import wilson
from robustbench_ext.suite import validate_suite

PUBLISHED = {  # CIFAR-10 as cut by LDAM-DRW
    10: ([5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500], 20431),
    50: ([5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100], 13996),
    100: ([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50], 12406),
}


def labelled(counts, split="train", order=None):
    """A split of one-pixel images with these class counts."""
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = np.array([f"{split}:{i:06d}" for i in range(len(labels))])
    x = (np.arange(len(labels)) % 256 / 255.0).astype(np.float32)[:, None, None, None]
    order = np.arange(len(labels)) if order is None else order
    return ArraySplit(x[order], labels[order], ids[order])


def dataset(counts, order=None):
    small = [5] * len(counts)
    splits = {"train": labelled(counts, order=order), "calibration": labelled(small, "c"), "test": labelled(small, "t")}
    return Dataset("made", splits, tuple(str(k) for k in range(len(counts))), (1, 1, 1), "made up")


def counts_of(split, classes=10):
    return np.bincount(split.labels, minlength=classes).tolist()


# Profiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", PUBLISHED)
def test_published_counts_on_label_vectors(ratio):
    expected, total = PUBLISHED[ratio]
    cut = imbalanced(dataset([5000] * 10), "exp", ratio)["train"]
    assert counts_of(cut) == expected
    assert len(cut) == total
    assert class_counts("step", ratio, 5000, 10).tolist() == [5000] * 5 + [5000 // ratio] * 5


def test_ends_of_the_profiles_are_exact():
    for ratio in (1, 3, 7, 10, 49, 100):
        for largest in (100, 104, 147, 5000):
            for profile in ("exp", "step"):
                counts = class_counts(profile, ratio, largest, 10)
                assert counts[0] == largest
                assert counts[-1] == largest // ratio  # in floats 147 * (1 / 49) falls below 3
                assert (np.diff(counts) <= 0).all()
    assert class_counts("step", 10, 50, 5).tolist() == [50, 50, 5, 5, 5]
    assert class_counts("exp", 10, 50, 2).tolist() == [50, 5]
    with pytest.raises(DataError, match="at least 2"):
        class_counts("exp", 10, 50, 1)


def test_a_cut_of_unbalanced_data_starts_from_its_smallest_class():
    source = dataset([90, 60, 200, 75])
    assert counts_of(imbalanced(source, "step", 6)["train"], 4) == [60, 60, 10, 10]
    assert counts_of(imbalanced(source, "exp", 1)["train"], 4) == [60] * 4


def test_cuts_are_nested_and_do_not_depend_on_the_order_of_the_files():
    counts = [120] * 6
    ids = [set(imbalanced(dataset(counts), "exp", r)["train"].ids.tolist()) for r in (1, 2, 5, 10, 40)]
    for larger, smaller in itertools.pairwise(ids):
        assert smaller < larger
    order = np.random.default_rng(0).permutation(sum(counts))
    first = imbalanced(dataset(counts), "exp", 10)["train"]
    second = imbalanced(dataset(counts, order), "exp", 10)["train"]
    assert first.ids.tolist() == second.ids.tolist()
    assert np.array_equal(first.images(slice(None)), second.images(slice(None)))
    # The choice is no prefix of the files: their order may mean something.
    assert sorted(first.ids[first.labels == 5].tolist()) != labelled(counts).ids[600:612].tolist()


def test_prefixes_of_a_cut_split_keep_its_proportions():
    cut = imbalanced(dataset([400] * 10), "exp", 20)["train"]
    share = np.array(counts_of(cut)) / len(cut)
    for n in (100, 400, 900):
        found = np.array(counts_of(cut.take(n))) / n
        assert abs(found - share).max() <= 1 / n + 1e-12


def test_only_train_is_cut_unless_asked():
    source = load_dataset("digits")
    cut = load_dataset("digits@step:10")
    assert (cut.name, source.name) == ("digits@step:10", "digits")
    assert "train cut to 570 of 1078 samples, 104 to 10 a class in two steps" in cut.source
    for split in ("calibration", "test"):
        assert cut[split].fingerprint() == source[split].fingerprint()
    assert cut["train"].fingerprint() != source["train"].fingerprint()
    assert set(cut["train"].ids) < set(source["train"].ids)
    both = load_dataset("digits@step:10+calibration")
    assert both.name == "digits@step:10+calibration"
    assert both["train"].fingerprint() == cut["train"].fingerprint()
    assert counts_of(both["calibration"]) == [35] * 5 + [3] * 5
    assert both["test"].fingerprint() == source["test"].fingerprint()
    prints = {load_dataset(f"digits@{s}")["train"].fingerprint() for s in ("step:10", "step:20", "exp:10", "exp:1e1")}
    assert len(prints) == 3
    assert load_dataset("digits@exp:1e1").name == "digits@exp:10"


def test_an_at_in_a_path_is_part_of_the_path(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.random((400, 4, 4)), np.arange(400) % 4
    plain, inside = tmp_path / "me@work" / "d.npz", tmp_path / "d@home.npz"
    plain.parent.mkdir()
    np.savez(plain, x=x, y=y)
    np.savez(inside, x=x, y=y)
    for file in (plain, inside):
        assert counts_of(load_dataset(f"npz:{file}")["train"], 4) == [60] * 4
        assert counts_of(load_dataset(f"npz:{file}@step:20")["train"], 4) == [60, 60, 3, 3]
    (tmp_path / "odd@exp:2").mkdir()
    assert split_spec(f"folder:{tmp_path / 'odd@exp:2'}")[1] is None
    assert split_spec("torchvision:CIFAR10@step:100")[0] == "torchvision:CIFAR10"
    assert split_spec(r"npz:C:\me@work\d.npz")[1] is None


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("digits@ex:10", ConfigError, "unknown imbalance profile 'ex'. Did you mean 'exp'? Known: exp, step"),
        ("digits@exp", ConfigError, "the ratio is missing. Expected NAME@PROFILE:RATIO"),
        ("digits@", ConfigError, "'@' is no imbalance"),
        ("npz:me@home.npz", ConfigError, "and there is no file me@home.npz"),
        ("@exp:10", ConfigError, "there is no name in front of the @"),
        ("digits@exp:0.5", ConfigError, "ratio = 0.5, expected a number >= 1"),
        ("digits@exp:ten", ConfigError, "got 'ten', expected a number"),
        ("digits@exp:10@step:2", ConfigError, "only one imbalance"),
        ("digits@exp:10+test", ConfigError, "unknown split to cut too 'test'. Known: calibration"),
        ("digits@exp:1000", DataError, "a ratio of at most 104 leaves one"),
        ("digit@exp:10", ConfigError, "Did you mean 'digits'"),
    ],
)
def test_a_bad_imbalance_says_what_is_known(spec, error, message):
    with pytest.raises(error) as caught:
        load_dataset(spec)
    assert message in str(caught.value)


def test_a_split_that_is_not_there_cannot_be_cut():
    source = dataset([30, 30])
    bare = Dataset("bare", {"test": source["test"]}, ("0", "1"), (1, 1, 1))
    with pytest.raises(DataError, match="no split 'train'"):
        imbalanced(bare, "exp", 2)
    gap = Dataset("gap", {"train": labelled([5, 0, 5]), "test": labelled([2, 2, 2], "t")}, ("0", "1", "2"), (1, 1, 1))
    with pytest.raises(DataError, match="no sample in the train split"):
        imbalanced(gap, "exp", 2)


# Groups of classes ---------------------------------------------------------------------------------------------------


def groups(counts, **options):
    return {name: members.tolist() for name, members in tails.class_groups(np.array(counts), **options).items()}


def test_groups_by_training_counts():
    assert groups([500, 101, 100, 20, 19, 1]) == {"many_shot": [0, 1], "medium_shot": [2, 3], "few_shot": [4, 5]}
    assert groups([500, 300, 200]) == {"many_shot": [0, 1, 2]}
    assert groups([50, 30, 10], many=40, few=20) == {"many_shot": [0], "medium_shot": [1], "few_shot": [2]}
    assert groups([300, 30, 300, 30]) == {"head": [0, 2], "tail": [1, 3]}
    assert groups([40, 0, 30]) == {"medium_shot": [0, 2], "few_shot": [1]}
    assert groups([110, 104, 107]) == {}
    assert groups([200, 100]) == {}  # a factor of two is not yet a long tail
    assert groups([201, 100]) == {"head": [0], "tail": [1]}


def outcomes(right, total):
    """Verdicts and labels with `right[k]` of `total[k]` correct."""
    labels = np.repeat(np.arange(len(total)), total)
    correct = np.concatenate([np.arange(n) < k for k, n in zip(right, total, strict=True)])
    return correct, labels


def test_hand_made_means_over_classes():
    right, total = [9, 2, 5, 20, 1, 8, 7, 6, 3, 4], [10, 10, 10, 40, 10, 10, 10, 10, 10, 10]
    correct, labels = outcomes(right, total)
    estimate, lowest = tails.tail_accuracy(correct, labels, 10)
    assert lowest.tolist() == [1, 4, 8]
    assert estimate.value == pytest.approx((0.2 + 0.1 + 0.3) / 3, abs=1e-15)
    assert estimate.n == 30
    assert tails.balanced_accuracy(correct, labels, 10).value == pytest.approx(0.5, abs=1e-15)
    group = tails.class_mean_accuracy(correct, labels, np.array([0, 3]))
    assert group.value == pytest.approx(0.7, abs=1e-15)
    assert group.n == 50
    # ceil: three of seven classes, one of three, one of two
    for classes, m in ((7, 3), (3, 1), (2, 1)):
        verdicts = outcomes([1] * classes, [2] * classes)
        assert len(tails.tail_accuracy(*verdicts, classes)[1]) == m


def test_classes_without_test_samples_are_left_out_and_named():
    correct, labels = outcomes([3, 0, 6, 9], [10, 0, 10, 10])
    estimate, lowest = tails.tail_accuracy(correct, labels, 5)
    assert lowest.tolist() == [0]
    assert estimate.value == pytest.approx(0.3)
    assert estimate.reason == "2 of 5 classes have no test samples"
    assert tails.balanced_accuracy(correct, labels, 5).value == pytest.approx(0.6)
    nothing = tails.class_mean_accuracy(correct, labels, np.array([1, 4]))
    assert np.isnan(nothing.value)
    assert nothing.reason == "2 of 2 classes have no test samples"
    with pytest.raises(DataError, match="is empty"):
        tails.tail_accuracy(correct[:0], labels[:0], 5)
    with pytest.raises(DataError, match=r"expected a number in \(0, 1\]"):
        tails.tail_accuracy(correct, labels, 5, share=0.0)


def test_relations_between_the_means():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(0, 10, 300)
        correct = rng.random(300) < rng.random(10)[labels]
        tail, lowest = tails.tail_accuracy(correct, labels, 10)
        balanced = tails.balanced_accuracy(correct, labels, 10)
        worst, k = worst_class_accuracy(correct, labels, 10)
        assert worst.value <= tail.value <= balanced.value
        assert k in lowest
        assert tails.tail_accuracy(correct, labels, 10, share=0.1)[0].value == pytest.approx(worst.value)
        assert tails.tail_accuracy(correct, labels, 10, share=1)[0].value == pytest.approx(balanced.value)
        for estimate in (tail, balanced):
            assert 0 <= estimate.ci_low <= estimate.value <= estimate.ci_high <= 1
        order = rng.permutation(300)
        assert tails.tail_accuracy(correct[order], labels[order], 10)[0] == tail
    balanced_labels = np.repeat(np.arange(10), 30)
    assert tails.balanced_accuracy(correct, balanced_labels, 10).value == pytest.approx(accuracy(correct).value)


def test_intervals_at_the_ends_do_not_shrink_to_points():
    for right, at in ((20, 1.0), (0, 0.0)):
        correct, labels = outcomes([right] * 10, [20] * 10)
        for estimate in (tails.balanced_accuracy(correct, labels, 10), tails.tail_accuracy(correct, labels, 10)[0]):
            assert estimate.value == at
            assert at in (estimate.ci_low, estimate.ci_high)
            assert estimate.ci_high - estimate.ci_low > 0.01


def test_equal_classes_have_wilsons_interval_of_all_their_samples():
    correct, labels = outcomes([30] * 8, [50] * 8)
    found = tails.balanced_accuracy(correct, labels, 8)
    assert (found.ci_low, found.ci_high) == pytest.approx(wilson(240, 400), abs=1e-12)


def test_a_tail_that_is_plain_to_see_pays_nothing_for_the_selection():
    """Its ends are Clopper and Pearson's of the pooled samples at the level that the screen leaves (0.0225 a side)."""
    correct, labels = outcomes([95] * 7 + [20] * 3, [100] * 10)
    found, lowest = tails.tail_accuracy(correct, labels, 10)
    assert lowest.tolist() == [7, 8, 9]
    assert stats.binom.sf(59, 300, found.ci_low) == pytest.approx(0.0225, abs=1e-6)
    # The upper end is found with 2,048 draws: four standard errors of a share of 0.0225 are 0.013.
    assert stats.binom.cdf(60, 300, found.ci_high) == pytest.approx(0.0225, abs=0.013)
    # Where any class may be in the tail, the upper end allows for it.
    tied = tails.tail_accuracy(*outcomes([25] * 7 + [20] * 3, [100] * 10), 10)[0]
    assert tied.value == found.value
    assert tied.ci_high > found.ci_high + 0.02
    assert tied.ci_low == pytest.approx(found.ci_low)


def misses(p, n, repeats, interval, truth):
    """Share of simulated test sets whose interval does not hold the truth."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(len(p)), n)
    out = 0
    for _ in range(repeats):
        found = interval(rng.random(len(labels)) < p[labels], labels)
        out += not found.ci_low - 1e-12 <= truth <= found.ci_high + 1e-12
    return out / repeats


CASES = {
    "equal": np.full(10, 0.5),
    "good": np.full(10, 0.9),
    "nearly perfect": np.full(10, 0.99),
    "spread": np.linspace(0.2, 0.9, 10),
    "step": np.repeat([0.8, 0.35], 5),
    "four low": np.repeat([0.9, 0.3], [6, 4]),
    "hopeless tail": np.repeat([0.6, 0.01], [7, 3]),
}


def test_means_over_fixed_classes_cover():
    """At most 5 % miss, plus four standard errors of 1,000 simulations (2.8 points)."""
    for n in (12, 100):
        for p in (*CASES.values(), np.repeat([0.99, 0.5], [9, 1])):
            rate = misses(p, n, 1000, lambda c, y: tails.balanced_accuracy(c, y, 10), p.mean())
            assert rate <= 0.05 + 0.028, (p, n, rate)
    unequal = np.array([200, 150, 100, 80, 60, 40, 30, 20, 15, 10])
    for p in (np.linspace(0.3, 0.9, 10), np.linspace(0.9, 0.3, 10), np.full(10, 0.97)):
        assert misses(p, unequal, 1000, lambda c, y: tails.balanced_accuracy(c, y, 10), p.mean()) <= 0.078


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 36, 100])
@pytest.mark.parametrize("case", CASES)
def test_the_tail_interval_covers_the_lowest_true_accuracies(case, n):
    """At most 5 % miss, plus four standard errors of 400 simulations (4.4 points)."""
    p = CASES[case]
    truth = np.sort(p)[:3].mean()
    assert misses(p, n, 400, lambda c, y: tails.tail_accuracy(c, y, 10)[0], truth) <= 0.05 + 0.044


@pytest.mark.slow
def test_without_the_allowance_for_the_selection_the_tail_would_not_be_covered():
    """What the interval is for: that of the three classes that came out lowest, taken as if they had been fixed before."""

    def naive(correct, labels):
        return tails.class_mean_accuracy(correct, labels, tails.tail_accuracy(correct, labels, 10)[1])

    assert misses(CASES["equal"], 100, 400, naive, 0.5) > 0.3


@pytest.mark.slow
def test_the_tail_interval_covers_with_unequal_test_counts_and_many_classes():
    unequal = np.array([200, 150, 100, 80, 60, 40, 30, 20, 15, 10])
    for p in (np.linspace(0.3, 0.9, 10), np.linspace(0.9, 0.3, 10), np.full(10, 0.97), np.repeat([0.99, 0.5], [9, 1])):
        truth = np.sort(p)[:3].mean()
        assert misses(p, unequal, 400, lambda c, y: tails.tail_accuracy(c, y, 10)[0], truth) <= 0.094, p
    for p in (np.full(100, 0.5), np.full(100, 0.9), np.linspace(0.1, 0.9, 100)):
        truth = np.sort(p)[:30].mean()
        # Four standard errors of 60 simulations are 11.3 points.
        assert misses(p, 10, 60, lambda c, y: tails.tail_accuracy(c, y, 100)[0], truth) <= 0.05 + 0.113


# A whole run ---------------------------------------------------------------------------------------------------------

SUITE = {
    "schema": 1,
    "name": "tailed",
    "data": "digits@step:10",
    "n": 200,
    "models": [
        {"name": "plain", "train": {"defense": "standard", "recipe": {"epochs": 5, "eps": 0.1, "validation_n": 50}}}
    ],
    "conditions": [
        {"attack": "pgd", "eps": 0.1, "steps": 5, "stop": "never"},
        {"attack": "fgsm", "eps": 0.05},
        {"outliers": ["letters"], "n": 20},
    ],
}


@pytest.fixture(scope="module")
def tailed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tailed")
    return folder, run_suite(SUITE, folder)


def test_a_run_on_long_tailed_data_measures_its_tail(tailed):
    folder, summary = tailed
    results = summary.results
    assert not summary.failures
    assert results.data["name"] == "digits@step:10"
    assert results.data["splits"]["train"]["n"] == 570
    context = Context(validate_suite(SUITE), folder)
    table = context.store.load(context.observation_key(Cell("plain", "pgd Linf 0.1", "test", 0)))
    for condition in ("clean", "pgd Linf 0.1", "fgsm Linf 0.05", "worst case Linf 0.1"):
        found = {r.metric: r for r in results.find(condition=condition, probe="classifier") if "accuracy" in r.metric}
        assert {"head_accuracy", "tail_accuracy", "tail30_accuracy", "balanced_accuracy"} <= set(found)
        assert "many_shot_accuracy" not in found
        assert found["head_accuracy"].group == "5 classes: 0, 1, 2, 3, 4"
        assert found["tail_accuracy"].group == "5 classes: 5, 6, 7, 8, 9"
    # Training on ten samples a class leaves those classes behind.
    clean = {r.metric: r.value for r in results.find(condition="clean", probe="classifier") if "accuracy" in r.metric}
    assert clean["head_accuracy"] > clean["tail_accuracy"] + 0.2
    right, y = ~table["broken"], table["label"]
    (row,) = results.find(condition="pgd Linf 0.1", metric="tail_accuracy")
    assert row.value == pytest.approx(np.mean([right[y == k].mean() for k in range(5, 10)]), abs=1e-12)
    (row,) = results.find(condition="pgd Linf 0.1", metric="tail30_accuracy")
    assert row.value == pytest.approx(np.sort([right[y == k].mean() for k in range(10)])[:3].mean(), abs=1e-12)
    assert not results.find(condition="outliers letters", metric="tail30_accuracy")


def test_the_report_of_long_tailed_data_has_a_tail_table(tailed):
    folder, summary = tailed
    table = tables.tails(summary.results)
    assert [c.title for c in table.columns] == [
        "mean over classes, % ↑",
        "tail 30 %, % ↑",
        "worst class, % ↑",
        "head (5 classes), % ↑",
        "tail (5 classes), % ↑",
    ]
    assert [name for name, _ in table.rows] == ["plain · clean", "plain · worst case Linf 0.1"]
    html = render_html(summary.results, json.loads((folder / "run.json").read_text()), [])
    assert "train cut to 570 of 1078 samples" in html
    assert "Here: 5, 6, 7, 8, 9." in html


def test_other_data_is_another_model(tailed):
    folder, _ = tailed
    keys = {
        data: Context(validate_suite({**SUITE, "data": data}), folder).training["plain"].folder.name
        for data in ("digits", "digits@step:10", "digits@step:20", "digits@step:10+calibration")
    }
    assert len(set(keys.values())) == 4
