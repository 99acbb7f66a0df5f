"""Comparisons: the sample-by-sample forms give the results' own values, pairs are tested as statsmodels does, other protocols
are refused with their differences."""

import json
import math
import shutil

import numpy as np
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from typer.testing import CliRunner

from robustbench_ext import compare as cmp
from robustbench_ext.axes import axes, best
from robustbench_ext.cli.main import app
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.index import Index, Stored
from robustbench_ext.measure import correct
from robustbench_ext.metrics.paired import holm
from robustbench_ext.per_sample import Area, Mean, Resampled, Share, statistic
from robustbench_ext.three_axes import perspectives

EXACT = 1e-12  # sums of a few hundred float64 terms in another order


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Two models under attacks, all fifteen corruptions at one severity, two domains, outliers; estimators with sets."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, run_suite(suite_of(), folder)


def suite_of(**changes):
    def model(name, defense, epochs):
        recipe = {"epochs": epochs, "eps": 0.1, "attack_steps": 2, "validation_n": 50}
        return {"name": name, "train": {"defense": defense, "recipe": recipe}}

    return {
        "schema": 1,
        "name": "compared",
        "data": "digits",
        "n": 150,
        "chunk_size": 80,
        "models": [model("standard", "standard", 4), model("trades", {"name": "trades", "beta": 3}, 3)],
        "conditions": [
            {"attack": "pgd", "eps": [0.05, 0.1], "steps": 4},
            {"attack": "fgsm", "eps": 0.1},
            {"corruption": ["gaussian-noise", "contrast"], "severity": [1, 3]},
            {"outliers": "letters", "n": 60},
        ],
        "detectors": ["msp", "energy"],
        "uq": ["temperature", {"name": "aps", "alpha": 0.1}],
        **changes,
    }


def value_of(found):
    if isinstance(found, Share):
        return found.right.mean()
    if isinstance(found, Mean):
        return found.values.mean()
    if isinstance(found, Resampled):
        return found.value
    return (found.unknown[:, None] > found.clean).mean() + (found.unknown[:, None] == found.clean).mean() / 2


@pytest.mark.parametrize("task", ["classifiers", "regressors"])
def test_sample_by_sample_forms_give_the_values_of_the_results(task, request):
    folder, summary = request.getfixturevalue(task)
    records, seen = Stored(folder), set()
    for row in summary.results.results:
        found = statistic(records, summary.results, row.model, row.condition, row.probe, row.metric, _group(row))
        if found is None or row.value is None:
            continue
        seen.add(row.metric)
        assert value_of(found) == pytest.approx(row.value, rel=1e-9, abs=EXACT), (row.condition, row.probe, row.metric)
    if task == "classifiers":
        assert seen >= {"accuracy", "robust_accuracy", "balanced_accuracy", "worst_class_accuracy", "mean_accuracy"}
        assert seen >= {"ece", "nll", "brier", "set_coverage", "set_size", "auroc"}
    else:
        assert seen >= {"rmse", "r2", "mae", "coverage", "width", "interval_score", "wis_mean", "pinball"}


def _group(row):
    return None if row.metric in ("worst_class_accuracy", "mean_accuracy", "set_coverage") else row.group


@pytest.fixture(scope="module")
def regressors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared-tables")
    forest = {"network": "sklearn:ensemble.RandomForestRegressor", "kwargs": {"n_estimators": 8}}
    suite = {
        "schema": 1,
        "name": "tables",
        "data": "diabetes",
        "n": 60,
        "models": [
            {"name": "mlp", "train": {"kwargs": {"hidden": [8]}, "recipe": {"epochs": 10}}},
            {"name": "forest", "train": forest},
        ],
        "conditions": [{"shift": "feature-noise", "size": 1}],
        "uq": ["split-conformal", "quantile-regression"],
    }
    return folder, run_suite(suite, folder)


def test_p_values_are_those_of_statsmodels(classifiers):
    folder, summary = classifiers
    records = Stored(folder)
    worst = next(c for c in summary.results.conditions if c["kind"] == "worst-case" and c["eps"] == 0.1)
    for condition, metric, over in (
        ("clean", "accuracy", ["clean"]),
        (worst["label"], "robust_accuracy", ["clean", *worst["over"]]),
    ):
        a, b = (
            np.logical_and.reduce([correct(records.observations(m, c)) for c in over]) for m in ("trades", "standard")
        )
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        (row,) = summary.results.compared(metric, condition)
        assert (row.model, row.against) == ("trades", "standard")
        assert row.p_value == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
        assert row.value == pytest.approx(a.mean() - b.mean(), abs=EXACT)
        assert row.n == 150


def test_every_axis_of_the_headline_is_compared(classifiers, regressors):
    for _, summary in (classifiers, regressors):
        results = summary.results
        compared = {(c.condition, c.metric) for c in results.comparisons}
        asked = [*axes(results), *(p.question for p in perspectives(results))]
        assert compared == {(axis.condition, axis.metric) for axis in asked}


def test_best_is_only_who_is_better_than_all_others(classifiers):
    results = classifiers[1].results.model_copy(deep=True)
    axis = axes(results)[0]
    (row,) = results.compared("accuracy", "clean")
    row.outcome = "inconclusive"
    assert best(results, axis) is None
    row.outcome = "better"
    assert best(results, axis) == "trades"
    row.outcome = "worse"
    assert best(results, axis) == "standard"
    # A third model that nobody has beaten takes the mark away.
    clean = results.find(model="trades", condition="clean", probe="classifier", metric="accuracy", group=None)[0]
    results.models.append({**results.models[0], "name": "third"})
    results.results.append(clean.model_copy(update={"model": "third"}))
    assert best(results, axis) is None


def test_correction_runs_over_the_family(classifiers):
    folder, summary = classifiers
    records = Stored(folder)
    a, b = (cmp.Side(records, summary.results, name, name) for name in ("trades", "standard"))
    wanted = axes(summary.results)
    apart, together = (cmp.compare([(a, b)], wanted, family) for family in ("axis", "all"))
    assert [c.p_adjusted for c in apart] == [c.p_value for c in apart]
    assert [c.p_adjusted for c in together] == holm([c.p_value for c in together])
    assert [c.p_value for c in apart] == [c.p_value for c in together]


def test_other_samples_are_refused():
    a = Share(np.array(["a", "b"]), np.array([True, False]))
    with pytest.raises(DataError, match="same samples"):
        cmp.test(a, Share(np.array(["b", "a"]), a.right))
    with pytest.raises(DataError, match="Share with a Mean"):
        cmp.test(a, Mean(a.ids, np.zeros(2)))


def test_audits_and_minimum_norms_have_no_verdicts_to_compare(classifiers):
    folder, summary = classifiers
    results = summary.results.model_copy(deep=True)
    condition = next(c for c in results.conditions if c["kind"] == "attack")
    place = ("standard", condition["label"], "classifier", "robust_accuracy")
    assert statistic(Stored(folder), results, *place) is not None
    condition["minimum_norm"] = True
    assert statistic(Stored(folder), results, *place) is None


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(classifiers, tmp_path_factory):
    """The same suite with one attack weaker, one more, and a model retrained from another seed."""
    folder = tmp_path_factory.mktemp("again") / "later"
    suite = suite_of()
    suite["models"][1]["train"]["seed"] = 1
    suite["conditions"] = [
        {"attack": "pgd", "eps": [0.05, 0.1], "steps": 2},
        {"attack": "fgsm", "eps": [0.1, 0.2]},
        *suite["conditions"][2:],
    ]
    shutil.copytree(classifiers[0], folder)  # what is the same is reused
    return folder, run_suite(suite, folder)


def test_other_protocols_are_refused_with_the_differences(classifiers, again):
    with pytest.raises(ConfigError) as caught:
        cmp.compare_runs([classifiers[0], again[0]])
    text = str(caught.value)
    assert "pgd Linf 0.1: steps 4 / 2" in text
    assert "--common" in text
    found = cmp.compare_runs([classifiers[0], again[0]], common=True)
    assert any("left out: pgd Linf 0.1: steps 4 / 2" in note for note in found.notes)
    assert any("fgsm Linf 0.2" in note for note in found.notes)
    # The worst case is over the attacks that differ.
    assert not [c for c in found.comparisons if c.metric == "robust_accuracy"]
    assert {c.metric for c in found.comparisons} >= {"accuracy", "ece", "auroc"}


def test_models_are_matched_by_name(classifiers, again):
    found = cmp.compare_runs([classifiers[0], again[0]], common=True)
    names = {(c.model, c.against) for c in found.comparisons}
    first = classifiers[0].name
    assert names == {("later: standard", f"{first}: standard"), ("later: trades", f"{first}: trades")}
    same = [c for c in found.comparisons if "standard" in c.model]
    assert all(c.value == 0 and c.outcome == "inconclusive" and c.n_to_decide is None for c in same)
    crossed = cmp.compare_runs(_folders(classifiers, again), [("standard", "trades")], common=True)
    (pair,) = {(c.model, c.against) for c in crossed.comparisons}
    assert pair == ("later: trades", f"{first}: standard")
    with pytest.raises(ConfigError, match="no model 'nobody'|unknown model 'nobody'"):
        cmp.compare_runs(_folders(classifiers, again), [("nobody", "trades")], common=True)


def _folders(*runs):
    return [folder for folder, _ in runs]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 100}, "n = 150 / 100"),
        ({"seed": 3}, "seed of attacks and corruptions: 0 / 3"),
        ({"data": "digits@exp:10"}, "data"),
    ],
)
def test_other_samples_and_seeds_cannot_be_left_out(classifiers, tmp_path, change, said):
    suite = suite_of(conditions=[], uq=[], detectors=[], **change)
    suite["models"] = suite["models"][:1]
    run_suite(suite, tmp_path / "other")
    with pytest.raises(ConfigError) as caught:
        cmp.compare_runs([classifiers[0], tmp_path / "other"], common=True)
    assert said in str(caught.value)
    assert "--common" not in str(caught.value)


def test_index_survives_and_says_what_is_missing(classifiers, tmp_path):
    folder = classifiers[0]
    index = Index.read(folder)
    assert set(index.models) == {"standard", "trades"}
    assert set(index.models["trades"].probes) == {"msp", "energy", "temperature", "aps"}
    assert Index.model_validate_json(index.model_dump_json()) == index
    shutil.copy(folder / "results.json", tmp_path)
    with pytest.raises(ConfigError, match=r"index\.json"):
        cmp.compare_runs([folder, tmp_path])
    (tmp_path / "index.json").write_text('{"version": 7}')
    with pytest.raises(ConfigError, match="cannot|not an index"):
        cmp.compare_runs([folder, tmp_path])


def test_command_compares_two_runs(classifiers, again, tmp_path):
    runs = [str(folder) for folder in _folders(classifiers, again)]
    refused = CliRunner().invoke(app, ["compare", *runs])
    assert isinstance(refused.exception, ConfigError)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", *runs, "--common", "--all", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("comparison")) <= 80
    found = json.loads((out / "compare.json").read_text())
    assert len(found["comparisons"]) > 50
    assert "NaN" not in (out / "compare.json").read_text()
    assert "later: trades" in (out / "compare.md").read_text()
    one = CliRunner().invoke(app, ["compare", runs[0]])
    assert one.exit_code == 0 and "trades compared with standard" in one.stdout


# Seeds ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    suite = suite_of(conditions=[{"attack": "fgsm", "eps": 0.1, "only": ["trades"]}], uq=[], detectors=[])
    for model in suite["models"]:
        model["train"]["seeds"] = 2
        model["train"]["recipe"]["epochs"] = 2
    folder = tmp_path_factory.mktemp("seeded")
    return folder, run_suite(suite, folder)


def test_seeds_become_models_and_have_a_spread(seeded):
    results = seeded[1].results
    names = ["standard seed 0", "standard seed 1", "trades seed 0", "trades seed 1"]
    assert [m["name"] for m in results.models] == names
    assert {row.model for row in results.find(condition="fgsm Linf 0.1")} == {"trades seed 0", "trades seed 1"}
    (row,) = [
        r
        for r in results.replicates
        if (r.model, r.condition, r.metric, r.group) == ("trades", "clean", "accuracy", None)
    ]
    values = [results.find(model=m, condition="clean", metric="accuracy", group=None)[0].value for m in names[2:]]
    assert row.value == pytest.approx(np.mean(values))
    # Student with one degree of freedom: tan(0.475 pi) standard errors.
    half = math.tan(0.475 * math.pi) * np.std(values, ddof=1) / math.sqrt(2)
    if half:
        assert row.ci_high - row.value == pytest.approx(half)
    assert row.n == 2 and "seeds" in row.ci_method


def test_methods_are_compared_between_seeds(seeded):
    results = seeded[1].results
    assert {(c.model, c.against) for c in results.comparisons} == {("trades", "standard")}
    assert all(c.n == 4 and "seeds" in c.test for c in results.comparisons)


def test_rows_of_the_lowest_class_are_averaged_whichever_class_it_is(seeded):
    results = seeded[1].results
    rows = [r for r in results.replicates if r.metric == "worst_class_accuracy" and r.condition == "clean"]
    assert [r.model for r in rows] == ["standard", "trades"]


@pytest.mark.parametrize("seeds", [0, [], [1, 1], "many", [0.5]])
def test_seeds_that_are_none(seeds):
    from robustbench_ext.suite import load_suite

    suite = suite_of()
    suite["models"][0]["train"]["seeds"] = seeds
    with pytest.raises(ConfigError, match="seeds"):
        load_suite(suite)


def test_area_pairs_only_shared_samples():
    ids = np.array(["a", "b", "c", "d"])
    clean = np.array([0.1, 0.2, 0.3, 0.4])
    one = Area(ids, clean, np.array(["x", "y", "z"]), np.array([0.5, 0.2, 0.9]))
    two = Area(ids, clean + 1, np.array(["y", "z", "w"]), np.array([1.2, 1.9, 1.1]))
    found = cmp.test(one, two)
    assert found.difference.value == pytest.approx(value_of(one) - value_of(two))


def test_another_budget_is_no_other_condition(classifiers, tmp_path):
    """What the first run's headline stands on is missing in the second: refused, or said."""
    suite = suite_of(detectors=[], uq=[], conditions=[{"attack": "fgsm", "eps": 0.2}])
    suite["models"] = suite["models"][:1]
    shutil.copytree(classifiers[0], tmp_path / "other")
    run_suite(suite, tmp_path / "other")
    with pytest.raises(ConfigError, match="worst case Linf 0.1: robust accuracy was not measured in other"):
        cmp.compare_runs([classifiers[0], tmp_path / "other"])
    assert cmp.compare_runs([classifiers[0], tmp_path / "other"], common=True).comparisons


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b'{"a": 1}'])
def test_damaged_files_are_a_sentence(classifiers, tmp_path, content):
    for name in ("results.json", "index.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("results.json", "index.json"):
            shutil.copy(classifiers[0] / file, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            cmp.Run.read(folder)


def test_an_index_that_lacks_a_model_says_so(classifiers, tmp_path):
    shutil.copytree(classifiers[0], tmp_path / "run")
    index = json.loads((tmp_path / "run" / "index.json").read_text())
    del index["models"]["trades"]
    (tmp_path / "run" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="does not know model 'trades'"):
        cmp.compare_runs([tmp_path / "run"])


# The index is not taken at its word ---------------------------------------------------------------------------------------


def damaged(classifiers, tmp_path, change):
    """A copy of the run folder with its index or a record changed: `change(index, folder)`."""
    out = tmp_path / "copy"
    shutil.copytree(classifiers[0], out, ignore=shutil.ignore_patterns("models"))
    index = json.loads((out / "index.json").read_text())
    change(index, out)
    (out / "index.json").write_text(json.dumps(index))
    return out


def lose(kind):
    def change(index, out):
        found = index["models"]["trades"]
        key = (
            found["observations"]["clean"][0]
            if kind == "observations"
            else found["probes"]["energy"]["outliers letters"][0]
        )
        (out / "records" / f"{key}.npz").unlink()

    return change


def flip(index, out):
    file = out / "records" / f"{index['models']['trades']['observations']['clean'][1]}.npz"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))


def swap_models(index, out):
    index["models"]["trades"]["observations"] = index["models"]["standard"]["observations"]


def swap_conditions(index, out):
    mine = index["models"]["trades"]["observations"]
    mine["pgd Linf 0.05"] = mine["pgd Linf 0.1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose("observations"), "trades under clean: missing or damaged"),
        (lose("probe"), "energy of trades under outliers letters: missing or damaged"),
        (flip, "trades under clean: missing or damaged"),
        (swap_models, "trades under clean: of another model"),
        (swap_conditions, "trades under pgd Linf 0.05: of another condition"),
    ],
)
def test_an_index_that_does_not_fit_its_records_is_refused(classifiers, tmp_path, change, said):
    out = damaged(classifiers, tmp_path, change)
    with pytest.raises(ConfigError, match=f"index.json names records that do not fit: .*{said}.*rbx run SUITE --out"):
        cmp.compare_runs([classifiers[0], out])
    with pytest.raises(ConfigError, match=said):
        cmp.compare_runs([out])


def test_an_index_that_fits_is_compared(classifiers, tmp_path):
    out = damaged(classifiers, tmp_path, lambda index, folder: None)
    assert cmp.compare_runs([classifiers[0], out], everything=True).comparisons


def test_infinite_budgets_are_no_difference(tmp_path):
    """JSON has no infinity: the index holds null for the budget of an attack that has none."""
    suite = {
        "schema": 1,
        "name": "norm",
        "data": "digits",
        "n": 20,
        "models": [
            {"name": f"m{i}", "train": {"defense": "standard", "seed": i, "recipe": {"epochs": 1}}} for i in (0, 1)
        ],
        "conditions": [{"attack": "ddn", "steps": 3}],
    }
    run_suite(suite, tmp_path)
    Stored(tmp_path).check("m0", ["clean", *Stored(tmp_path).index.conditions])
