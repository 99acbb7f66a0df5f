"""Made-up results of any size, and names that no report may stumble over."""

from robustbench_ext.measure import metric_table
from robustbench_ext.results import Compared, Finding, Row, RunResults

EVIL = (
    "@torvalds",
    "#1",
    "http://x.example",
    "![x](http://y)",
    "[a](javascript:alert(1))",
    "<script>alert(1)</script>",
    "a|b\\|c",
    "`code`",
    "**bold** _it_ ~~gone~~",
    "$x^2$",
    "GH-12",
    "me@example.org",
    "www.example.org",
    "1b865de35b6a",
    ":smile:",
    "</details>",
    "\u202eabc",
    "a\n## b",
    "&lt;b&gt;",
    "[x]: http://y",
    "owner/repo#7",
)


def synthetic(models, attacks=3, corruptions=2, notes=0, classes=10, findings=0, compared=True):
    """Results of `models` under attacks, corruptions, detection and calibration; values grow with the position."""
    conditions = [{"label": "clean", "kind": "clean"}]
    for i in range(attacks):
        facts = {"attack": "pgd", "norm": "Linf", "eps": 8 / 255, "minimum_norm": False, "parameters": {}}
        conditions.append({"label": f"pgd {i} Linf 8/255", "kind": "attack", **facts})
    for i in range(corruptions):
        conditions.append({"label": f"noise {i}", "kind": "corruption", "corruption": "noise", "severity": i})
    over = [c["label"] for c in conditions if c["kind"] == "attack"]
    worst = {"label": "worst case Linf 8/255", "kind": "worst-case", "norm": "Linf", "eps": 8 / 255, "over": over}
    conditions.append(worst)
    rows = []
    common = {"ci_level": 0.95, "ci_method": "Wilson", "n": 1000}

    def put(model, condition, probe, metric, value, **more):
        ends = {"ci_low": value - 0.03, "ci_high": value + 0.03}
        rows.append(
            Row(model=model, condition=condition, probe=probe, metric=metric, value=value, **ends, **common, **more)
        )

    for m, model in enumerate(models):
        for c, condition in enumerate(conditions):
            label, kind = condition["label"], condition["kind"]
            attacked = kind in ("attack", "worst-case")
            put(model, label, "classifier", "robust_accuracy" if attacked else "accuracy", 0.9 - 0.01 * m - 0.002 * c)
            if kind in ("clean", "worst-case"):
                for metric in ("worst_class_accuracy", "tail30_accuracy", "balanced_accuracy"):
                    put(model, label, "classifier", metric, 0.5, group=f"class {classes - 1}")
            if kind != "worst-case":
                for metric in ("ece", "nll", "brier"):
                    put(model, label, "classifier", metric, 0.1)
            if kind in ("attack", "corruption"):
                put(model, label, "energy", "auroc", 0.7, against="clean", n_unknown=100)
            for k in range(classes if kind == "clean" else 0):
                put(model, label, "classifier", "accuracy", 0.5, group=f"class {k}")
    pairs = [(b, a) for i, a in enumerate(models) for b in models[i + 1 :]] if compared else []
    where = [("clean", "accuracy"), ("worst case Linf 8/255", "robust_accuracy")]
    statuses = ("fail", "doubt")
    return RunResults(
        generator={"name": "robustbench-ext", "version": "0"},
        suite={"name": "s", "title": "Title", "description": "About.", "n": 1000, "seed": 0},
        data={
            "name": "mnist5k",
            "source": "s",
            "shape": [1, 8, 8],
            "classes": [f"class {k}" for k in range(classes)],
            "splits": {"test": {"n": 1000, "fingerprint": "f"}},
        },
        models=[{"name": m, "spec": "mlp", "fingerprint": "f", "parameters": 10, "notes": []} for m in models],
        conditions=conditions,
        probes=[{"label": "energy", "kind": "detector", "fitted_on": "", "name": "energy", "parameters": {}}],
        metrics=metric_table(),
        preflight=[
            Finding(model=models[i % len(models)], name=f"check {i % 7}", status=statuses[i % 2], message="Why. " * 90)
            for i in range(findings)
        ],
        results=rows,
        curves=[],
        cost=[],
        failures=[],
        notes=[f"note {i}: {'something happened ' * 8}" for i in range(notes)],
        comparisons=[difference(*pair, *place) for pair in pairs for place in where],
    )


def difference(model, against, condition, metric, value=-0.01, outcome="worse", **more):
    fields = {"model": model, "against": against, "condition": condition, "probe": "classifier", "metric": metric}
    fields |= {"value": value, "ci_low": value - 0.02, "ci_high": value + 0.02, "ci_level": 0.95, "ci_method": "m"}
    return Compared(**fields, test="t", p_value=0.01, p_adjusted=0.02, outcome=outcome, n=1000, **more)
