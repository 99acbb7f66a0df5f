"""The report's sections on uncertainty, from synthetic results: what is in them, what is not, that nothing breaks."""

import json
import re

import matplotlib
import numpy as np
import pytest

from reports import figures, tables
from reports import uncertainty_tables as made
from reports.figures import drawing
from reports.html import render_html
from reports.markdown import render_markdown
from robustbench_ext.measure import metric_table
from robustbench_ext.results import Curve, Row, RunResults

matplotlib.use("Agg")


def row(condition, probe, metric, value=0.5, group=None, model="net", **extra):
    ends = {"ci_low": None, "ci_high": None} if value is None else {"ci_low": value - 0.01, "ci_high": value + 0.01}
    fields = {"model": model, "condition": condition, "probe": probe, "metric": metric, "value": value, "group": group}
    return Row(**fields, **ends, ci_level=0.95, ci_method="test", n=100, **extra)


def curve(kind, condition, probe, data, model="net"):
    return Curve(kind=kind, model=model, condition=condition, probe=probe, data=data)


def results_of(data, conditions, probes, rows, curves, models=("net",)):
    described = {"name": "d", "source": "s", "splits": {"test": {"n": 100, "fingerprint": "f"}}, **data}
    return RunResults(
        generator={"name": "robustbench-ext", "version": "0"},
        suite={"name": "s", "title": "Title", "description": "", "n": 100, "seed": 0},
        data=described,
        models=[{"name": m, "spec": "mlp", "fingerprint": "f", "parameters": 10, "notes": []} for m in models],
        conditions=conditions,
        probes=[
            {"label": p, "kind": "estimator", "fitted_on": "calibration", "name": p, "parameters": {}} for p in probes
        ],
        metrics=metric_table(),
        preflight=[],
        results=rows,
        curves=curves,
        cost=[],
        failures=[],
    )


SHIFTS = [
    {"label": "clean", "kind": "clean"},
    {"label": "noise 0.1", "kind": "shift", "shift": "noise", "parameters": {}},
    {"label": "noise 1", "kind": "shift", "shift": "noise", "parameters": {}},
    {"label": "pgd 0.1", "kind": "attack", "attack": "pgd", "norm": "Linf", "eps": 0.1, "parameters": {}},
    {"label": "pgd 0.3", "kind": "attack", "attack": "pgd", "norm": "Linf", "eps": 0.3, "parameters": {}},
]
LEVELS = ("50 %", "80 %", "90 %", "95 %")


def regression(columns=1, estimators=("first", "second"), models=("net", "tree")):
    rng = np.random.default_rng(0)
    rows, curves = [], []
    for m, model in enumerate(models):
        for c, condition in enumerate(c["label"] for c in SHIFTS):
            rows += [row(condition, "regressor", name, 1.0 + m + c, model=model) for name in ("rmse", "mae", "r2")]
            if c:
                rows.append(row(condition, "regressor", "error_rise", 0.1 * c, model=model, against="clean"))
            for e, probe in enumerate(estimators):
                rows += [row(condition, probe, "coverage", 0.8 + 0.01 * e, level, model=model) for level in LEVELS]
                rows += [row(condition, probe, "width", 3.0 + e, level, model=model) for level in LEVELS]
                rows.append(row(condition, probe, "coverage", 0.7, "90 %, lowest third of predictions", model=model))
                rows.append(row(condition, probe, "wis_mean", 0.4 + e + c, model=model))
                rows.append(row(condition, probe, "worst_slab_coverage", 0.6, "90 %", model=model))
                rows.append(row(condition, f"{probe} · width", "error_spearman", 0.3, model=model))
                if c:
                    extra = {"against": "clean", "n_unknown": 50}
                    rows.append(row(condition, f"{probe} · width", "auroc", 0.6, model=model, **extra))
        for probe in estimators:
            observed = {"nominal": [0.5, 0.9], "observed": [0.45, 0.91], "low": [0.4, 0.85], "high": [0.5, 0.95]}
            curves.append(curve("coverage", "clean", probe, observed, model))
            x = np.sort(rng.uniform(size=30))
            drawn = {"y": rng.normal(size=30), "point": np.zeros(30), "low": -1 - x, "high": 1 + x}
            if columns == 1:
                drawn |= {"x": x, "truth_low": -1 - x, "truth_high": 1 + x}
            drawn = {name: values.tolist() for name, values in drawn.items()}
            curves.append(curve("intervals", "clean", probe, drawn, model))
    features = [{"name": f"c{i}", "group": None} for i in range(columns)]
    data = {
        "task": "regression",
        "target": "mpg (miles per US gallon)",
        "shape": [columns],
        "classes": [],
        "features": features,
    }
    return results_of(data, SHIFTS, estimators, rows, curves, models)


def classification(estimators=("temperature", "aps", "ensemble")):
    conditions = [
        {"label": "clean", "kind": "clean"},
        {"label": "noise 3", "kind": "corruption", "corruption": "noise", "severity": 3},
        {"label": "noise 5", "kind": "corruption", "corruption": "noise", "severity": 5},
        {"label": "outliers far", "kind": "outliers", "outliers": "far", "distance": "far"},
    ]
    rows, curves = [], []
    for condition in ("clean", "noise 3", "noise 5"):
        for probe in ("classifier", *estimators):
            if probe == "aps":
                rows.append(row(condition, probe, "set_coverage", 0.91, "90 %"))
                rows.append(row(condition, probe, "set_size", 1.5))
                rows.append(row(condition, probe, "set_class_coverage", 0.7, "cat"))
                continue
            rows += [row(condition, probe, m, 0.1) for m in ("accuracy", "ece", "nll", "brier")]
            bins = {
                "confidence": [0.3, 0.9],
                "accuracy": [0.2, 0.8],
                "low": [0.1, 0.7],
                "high": [0.3, 0.9],
                "n": [5, 95],
            }
            bins |= {"calibrated_low": [0.1, 0.8], "calibrated_high": [0.5, 1.0]}
            curves.append(curve("reliability", condition, probe, bins))
            if estimators:
                rows += [
                    row(condition, probe, m, 0.1) for m in ("classwise_ece", "aurc", "e_aurc", "error_auroc", "mce")
                ]
                curves.append(curve("risk-coverage", condition, probe, {"coverage": [0.5, 1.0], "risk": [0.0, 0.1]}))
    for probe in ("classifier · msp", "ensemble · epistemic") if "ensemble" in estimators else ():
        extra = {"against": "clean", "n_unknown": 50}
        rows += [row(c, probe, "auroc", 0.8, **extra) for c in ("noise 3", "noise 5", "outliers far")]
        rows.append(row("clean", probe, "error_auroc", 0.7))
        curves.append(curve("roc", "outliers far", probe, {"fpr": [0.0, 1.0], "tpr": [0.0, 1.0]}))
    data = {"shape": [1, 8, 8], "classes": ["cat", "dog"]}
    return results_of(data, conditions, estimators, rows, curves)


def rectangular(markdown):
    width = None
    for line in markdown.splitlines():
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", line))
            width = width or count
            assert count == width, line
        else:
            width = None


def cells(table, name):
    return dict(table.rows)[name]


class TestRegression:
    def test_the_report_is_whole(self):
        results = regression()
        html = render_html(results, None, [])
        for title in ("Headline", "Errors", "Prediction intervals", "Uncertainty"):
            assert f"<h2>{title}</h2>" in html
        for title in ("Robustness to attacks", "Accuracy by class", "Calibration", "Prediction sets", "Gallery"):
            assert title not in html
        assert "mpg (miles per US gallon)" in html
        assert "target mpg (miles per US gallon); columns c0." in html
        assert html == render_html(results, None, [])
        markdown = render_markdown(results)
        rectangular(markdown)
        assert "## Prediction intervals, clean" in markdown

    def test_headline_takes_the_first_estimator_and_the_last_conditions(self):
        table = tables.headline(regression())
        assert [c.title for c in table.columns] == [
            "clean RMSE ↓",
            "clean R² ↑",
            "clean coverage at 90 %, %",
            "clean WIS (mean) ↓",
            "noise 1 RMSE ↓",
            "noise 1 coverage at 90 %, %",
            "pgd 0.3 RMSE ↓",
            "pgd 0.3 coverage at 90 %, %",
        ]
        assert "those of first" in table.caption
        values = [cell.value for cell in cells(table, "tree")]
        assert values == [2.0, 2.0, 0.8, 0.4, 4.0, 0.8, 6.0, 0.8]

    def test_intervals_are_there_for_every_model_and_estimator(self):
        results = regression()
        table = made.intervals(results)
        assert [name for name, _ in table.rows] == ["net · first", "net · second", "tree · first", "tree · second"]
        # Metrics that nobody measured have no column.
        assert [c.title for c in table.columns] == ["coverage at 90 %, %", "width at 90 % ↓", "WIS (mean) ↓"]
        assert cells(table, "net · second")[0].text == "81.0 [80.0, 82.0]"
        coverage, score = made.intervals_shifted(results)
        assert [c.title for c in coverage.columns] == ["clean", "noise 1", "pgd 0.3"]
        assert [c.value for c in cells(score, "net · first")] == [0.4, 2.4, 4.4]

    def test_details_are_folded(self):
        results = regression()
        html = render_html(results, None, [])
        assert "<summary>Coverage and width at every level (20 rows)</summary>" in html
        every, where, _ = made.interval_details(results)
        assert [c.title for c in every.columns] == [
            f"{m} at {level}{u}" for m, u in (("coverage", ", %"), ("width", " ↓")) for level in LEVELS
        ]
        assert [c.title for c in where.columns] == ["worst slab, % ↑"]
        assert cells(where, "net · clean · first")[0].note.startswith("90 %")

    def test_an_error_has_not_risen_before_anything_happened(self):
        table = made.errors(regression())
        assert cells(table, "net · clean")[-1].text == ""
        assert cells(table, "net · pgd 0.3")[-1].value == pytest.approx(0.4)

    def test_without_estimators_errors_remain(self):
        results = regression(estimators=())
        html = render_html(results, None, [])
        assert "<h2>Errors</h2>" in html
        assert "Prediction intervals" not in html and "<h2>Uncertainty</h2>" not in html
        assert [c.title for c in tables.headline(results).columns] == [
            "clean RMSE ↓",
            "clean R² ↑",
            "noise 1 RMSE ↓",
            "pgd 0.3 RMSE ↓",
        ]

    def test_two_figures_a_model(self):
        for columns, drawn in ((1, "against the input"), (3, "each estimator&#39;s sorted")):
            html = render_html(regression(columns), None, [])
            assert html.count("<figure") == 4
            assert html.count(drawn) == 2

    def test_hostile_names_do_no_harm(self):
        evil = '<script>alert(1)</script>"|`*../../x $up^_ · y'
        text = regression().to_json().replace('"first"', json.dumps(evil)).replace('"net"', json.dumps(evil))
        text = text.replace('"first · width"', json.dumps(f"{evil} · width"))
        results = RunResults.model_validate_json(text)
        assert "<script>alert" not in render_html(results, None, [])
        markdown = render_markdown(results)
        assert "<script>" not in markdown
        rectangular(markdown)


class TestClassification:
    def test_sections_appear_where_there_is_something_to_say(self):
        html = render_html(classification(), None, [])
        for title in ("Calibration, clean and shifted", "Prediction sets", "Uncertainty"):
            assert f"<h2>{title}</h2>" in html
        rectangular(render_markdown(classification()))

    def test_without_estimators_there_is_nothing_new(self):
        results = classification(())
        html, markdown = render_html(results, None, []), render_markdown(results)
        for title in (
            "Prediction sets",
            "<h2>Uncertainty</h2>",
            "Other calibration errors",
            "Calibration on clean inputs",
        ):
            assert title not in html
        assert "<details><summary>All numbers (3 rows)</summary>" in html
        assert "Calibration, clean" not in markdown and "## Calibration" in markdown

    def test_an_estimator_without_uncertainties_has_no_such_section(self):
        html = render_html(classification(("temperature",)), None, [])
        assert "<h2>Uncertainty</h2>" not in html and "Prediction sets" not in html
        assert "Calibration on clean inputs" in html

    def test_sets_have_no_calibration_rows_and_say_what_they_promise(self):
        results = classification()
        assert not [name for name, _ in tables.calibration(results).rows if name.endswith("aps")]
        table = made.sets(results, ["clean"])
        assert table.columns[0].title == "promised"
        row = cells(table, "net · aps")
        assert [c.text for c in row[:2]] == ["90 %", "91.0 [90.0, 92.0]"]
        assert row[3].note.startswith("cat")

    def test_the_most_severe_corruption_is_shown_first(self):
        results = classification()
        assert made.strongest(results) == ["noise 5"]
        main, _ = made.telling_apart(results)
        assert [c.title for c in main.columns] == ["outliers far", "noise 5"]
        assert [name for name, _ in main.rows] == ["net · classifier · msp", "net · ensemble · epistemic"]

    def test_figures_return_their_axes(self):
        results = classification()
        risk = [c for c in results.curves if c.kind == "risk-coverage"]
        assert figures.risk_coverage(risk * 5, "x").has_data()
        of_intervals = regression().curves
        coverage = [c for c in of_intervals if c.kind == "coverage"]
        drawn = [c for c in of_intervals if c.kind == "intervals"]
        ax = figures.coverage_gap(coverage, "x")
        assert [text.get_text() for text in ax.get_xticklabels()] == ["50 %", "90 %"]
        for one in (drawn[0], regression(2).curves[1]):
            ax = figures.intervals(one, "x")
            labels = {text.get_text() for text in ax.get_legend().get_texts()}
            assert {"interval", "prediction", "inside"} <= labels
        assert figures.sharpness(drawn, "x").has_data()

    def test_a_series_is_never_drawn_like_another(self):
        styles = [tuple(map(str, drawing.series_style(i).values())) for i in range(12)]
        assert len(set(styles)) == 12
