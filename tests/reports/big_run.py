"""A large run that nobody has to compute: every kind of row, curve and finding of the schema, with plausible numbers."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from robustbench_ext.measure import metric_table
from robustbench_ext.results import Compared, Cost, Curve, Failed, Finding, Row, RunResults

HOSTILE = (
    "<script>alert(1)</script>\"'",
    "../../x",
    "</style></script><img src=x onerror=alert(1)>",
    "\u202e\u2067evil\u2069 \u200f\u0000",
    "w" * 200,
    "$x_1$ & |`*_ {{ 7 * 7 }} %}",
)
CORRUPTIONS = (
    *("gaussian-noise", "shot-noise", "impulse-noise", "speckle-noise", "defocus-blur", "glass-blur", "motion-blur"),
    *("zoom-blur", "gaussian-blur", "snow", "frost", "fog", "brightness", "contrast", "saturate", "elastic-transform"),
    *("pixelate", "jpeg-compression", "spatter"),
)
DETECTORS, ESTIMATORS = ("msp", "energy", "mahalanobis", "knn"), ("temperature", "laplace")
SCORES = ("classifier · msp", "laplace · epistemic")
N = 1000


def big_run(
    models=20,
    severities=(3, 5),
    classes=10,
    corruptions=19,
    budgets=5,
    seeds=0,
    hostile=False,
    troubles=True,
    pairs=True,
) -> RunResults:
    """Results of `models` classifiers under clean inputs, attacks of two norms, corruptions, domains and outliers.

    Args:
        corruptions, budgets: how many of them.
        seeds: trainings of each of the first two models, as replicates of one entry each; 0 or 2 and more.
        hostile: give models, conditions, probes, classes and notes names that try to break the page.
        troubles: a cell that failed, a model that failed its checks, notes.
        pairs: compare all pairs of models on the axes of the headline.
    """
    made = _Run(
        [f"model {i:02}" for i in range(models)], _conditions(severities, CORRUPTIONS[:corruptions], budgets), classes
    )
    if seeds:
        made.train_several(seeds)
    results = made.results(troubles)
    if pairs:
        results.comparisons = compared(results)
    return RunResults.model_validate_json(_renamed(results.to_json())) if hostile else results


def _renamed(text: str) -> str:
    """Hostile names for what users name: whole strings, and the same inside labels that are made of them."""
    import json

    names = ("model 00", "pgd Linf 8/255", "mahalanobis", "class 1", "gaussian-noise 5", "laplace")
    for name, evil in zip(names, HOSTILE, strict=True):
        text = text.replace(json.dumps(name)[1:-1], json.dumps(evil)[1:-1])
    return text


class _Run:
    """Rows and curves of a run. Model m's skill falls with m clean and rises with m under attack, so there are trade-offs."""

    def __init__(self, names, conditions, classes):
        self.names, self.groups = names, {}
        self.classes = [f"class {k}" for k in range(classes)]
        self.conditions = list(conditions)
        self.rows, self.curves, self.cost = [], [], []
        self.rng = np.random.default_rng(0)
        self.shapes = {kind: [make(self.rng, v) for v in range(8)] for kind, make in _SHAPES.items()}

    def train_several(self, seeds):
        entries = self.names[:2]
        self.names = [f"{entry} seed {s}" for entry in entries for s in range(seeds)] + self.names[2:]
        self.groups = {f"{entry} seed {s}": entry for entry in entries for s in range(seeds)}

    def row(self, model, condition, probe, metric, value, group=None, n=N, **more):
        value = min(1.0, max(0.0, value)) if metric not in ("nll", "brier", "delta_energy") else value
        half = 1.96 * math.sqrt(max(abs(value * (1 - value)), 1e-3) / n)
        low, high = max(0.0, value - half), value + half
        self.rows.append(
            Row(
                model=model,
                condition=condition,
                probe=probe,
                metric=metric,
                group=group,
                value=value,
                ci_low=low,
                ci_high=min(1.0, high) if metric not in ("nll", "brier") else high,
                ci_level=0.95,
                ci_method="Wilson",
                n=n,
                **more,
            )
        )

    def curve(self, kind, model, condition, probe):
        shape = self.shapes[kind][len(self.curves) % 8]
        # Not validated: thousands of curves share the lists of a few.
        self.curves.append(Curve.model_construct(kind=kind, model=model, condition=condition, probe=probe, data=shape))

    def results(self, troubles) -> RunResults:
        for m, model in enumerate(self.names):
            for condition in self.conditions:
                self._cell(m, model, condition)
        results = RunResults(
            generator={"name": "robustbench-ext", "version": "0"},
            suite={
                "name": "big",
                "title": "A big run",
                "description": "Nothing of it was measured.",
                "n": N,
                "seed": 0,
            },
            data={
                "name": "cifar10",
                "source": "synthetic",
                "shape": [3, 32, 32],
                "classes": self.classes,
                "splits": {"test": {"n": N, "fingerprint": "f"}},
            },
            models=[self._model(m, name) for m, name in enumerate(self.names)],
            conditions=self.conditions,
            probes=[
                {"label": p, "kind": kind, "fitted_on": "train", "name": p, "parameters": {}}
                for kind, labels in (("detector", DETECTORS), ("estimator", ESTIMATORS))
                for p in labels
            ],
            metrics=metric_table(),
            preflight=[
                Finding(model=m, name=check, status="pass", message="as it should be")
                for m in self.names
                for check in ("input range", "mode", "determinism", "gradients")
            ],
            results=self.rows,
            curves=[],
            cost=self.cost,
            failures=[],
        )
        results.curves = self.curves
        for entry in dict.fromkeys(self.groups.values()):
            members = [name for name, group in self.groups.items() if group == entry]
            spread = {"model": entry, "n": len(members), "ci_method": "Student over seeds"}
            results.replicates += [r.model_copy(update=spread) for r in results.find(model=members[0])]
        if troubles:
            bad = self.names[-1]
            said = {"message": "3 of 100 gradients are zero", "hint": "Attack a smoothed loss"}
            results.preflight.append(Finding(model=bad, name="gradients", status="fail", **said))
            results.doubts.append(Finding(model=self.names[1], name="still climbing", status="doubt", **said))
            results.failures = [
                Failed(what=f"{self.names[0]} · gaussian-noise 5", error="DataError: the textures are missing")
            ]
            results.results = [
                r for r in results.results if (r.model, r.condition) != (self.names[0], "gaussian-noise 5")
            ]
            results.notes = [f"{name}: the covariance of a layer is singular" for name in self.names]
        return results

    def _cell(self, m, model, condition):
        label, kind = condition["label"], condition["kind"]
        if kind == "outliers":
            return self._detection(m, model, label)
        if kind in ("corruptions", "domains"):
            extra = {"corruptions": "mean_corruption_error", "domains": "worst_domain_accuracy"}[kind]
            self.row(model, label, "classifier", "mean_accuracy", 0.7 - 0.005 * m)
            return self.row(
                model, label, "classifier", extra, 0.5 + 0.004 * m, group="domain a" if kind == "domains" else None
            )
        attacked = kind in ("attack", "worst-case")
        accuracy = _accuracy(m, condition)
        metric = "robust_accuracy" if attacked else "accuracy"
        self.row(model, label, "classifier", metric, accuracy)
        if kind in ("clean", "attack", "worst-case"):
            for k, name in enumerate(self.classes):
                self.row(model, label, "classifier", metric, accuracy - 0.02 * k, name, n=100)
            for mean in ("worst_class_accuracy", "balanced_accuracy", "tail30_accuracy"):
                self.row(model, label, "classifier", mean, accuracy - 0.1, self.classes[-1], n=100)
        if kind == "worst-case":
            return None
        for p, probe in enumerate(("classifier", *ESTIMATORS)):
            for j, metric in enumerate(("ece", "nll", "brier", "classwise_ece", "aurc", "e_aurc", "error_auroc")):
                self.row(model, label, probe, metric, 0.02 + 0.02 * j + 0.004 * m + 0.1 * (1 - accuracy) - 0.01 * p)
            self.curve("reliability", model, label, probe)
            self.curve("risk-coverage", model, label, probe)
        if kind == "clean":
            for probe in DETECTORS:
                self.row(model, label, probe, "false_alarms", 0.05)
        else:
            self._detection(m, model, label)
        if kind == "attack":
            for metric in ("energy_marginal", "delta_energy", "abs_delta_energy", "energy_joint", "delta_energy_joint"):
                self.row(model, label, "classifier", metric, 0.5 + 0.02 * m)
            self.curve("energies", model, label, "classifier")
            self.cost.append(Cost(model=model, condition=label, n=N, forwards=20 * N, backwards=20 * N))
            if condition["minimum_norm"]:
                self.row(model, label, "classifier", "median_norm", 0.1)
                self.curve("robust-accuracy", model, label, "classifier")
        return None

    def _detection(self, m, model, label):
        extra = {"against": "clean", "n_unknown": 500}
        for d, probe in enumerate((*DETECTORS, *SCORES)):
            for j, metric in enumerate(("auroc", "fpr95", "detection_accuracy", "aupr_out", "aupr_in", "alarms")):
                self.row(model, label, probe, metric, 0.9 - 0.03 * d - 0.05 * j - 0.004 * m + 0.08 * (m == 8), **extra)
            self.curve("roc", model, label, probe)
            if probe in DETECTORS:
                self.curve("scores", model, label, probe)

    def _model(self, m, name):
        curve = [
            {
                "epoch": e,
                "loss": 2 / e,
                "clean_accuracy": 0.9 - 1 / (2 * e),
                "robust_accuracy": 0.5 - 1 / (4 * e),
                **{f"delta_energy_{on}": -0.1 * e for on in ("train", "calibration")},
                **{f"delta_energy_se_{on}": 0.1 for on in ("train", "calibration")},
            }
            for e in range(1, 31)
        ]
        recipe = {"epochs": 30, "optimizer": "sgd", "lr": 0.1, "eps": "8/255", "norm": "Linf", "attack_steps": 10}
        training = {
            "defense": {"defense": "trades", "version": 1, "beta": 6},
            "recipe": recipe,
            "seed": m,
            "selected": {"epoch": 28, "by": "robust"},
            "curve": curve,
        }
        about = {"name": name, "spec": "wrn", "fingerprint": f"{m:020x}", "parameters": 10**6, "notes": []}
        member = {"replicate_of": self.groups[name]} if name in self.groups else {}
        return about | member | ({"training": training} if m % 2 == 0 else {})


def _conditions(severities, corruptions, budgets):
    yield {"label": "clean", "kind": "clean"}
    threats = [("Linf", f"{e}/255", e / 255) for e in (2, 4, 8, 16)] + [("L2", "0.5", 0.5)]
    threats = threats[:budgets]
    for norm, text, eps in threats:
        for attack in ("pgd", "apgd-ce") if text != "8/255" else ("fgsm", "pgd", "apgd-ce", "square"):
            facts = {"attack": attack, "norm": norm, "eps": eps, "minimum_norm": False, "parameters": {"stop": "never"}}
            yield {"label": f"{attack} {norm} {text}", "kind": "attack", **facts}
    yield {
        "label": "cw L2",
        "kind": "attack",
        "attack": "cw",
        "norm": "L2",
        "eps": None,
        "minimum_norm": True,
        "parameters": {},
    }
    for name in corruptions:
        for severity in severities:
            yield {"label": f"{name} {severity}", "kind": "corruption", "corruption": name, "severity": severity}
    for domain in ("a", "b"):
        yield {"label": f"domain {domain}", "kind": "domain", "domain": domain}
    for name, distance in (("letters", "near"), ("photos", "far"), ("noise", "far")):
        yield {"label": f"outliers {name}", "kind": "outliers", "outliers": name, "distance": distance}
    for norm, text, eps in threats:
        yield {"label": f"worst case {norm} {text}", "kind": "worst-case", "norm": norm, "eps": eps, "over": []}
    yield {"label": "all corruptions", "kind": "corruptions"}
    yield {"label": "all domains", "kind": "domains"}


def _accuracy(m, condition):
    clean = 0.95 - 0.006 * m + 0.03 * (m == 2)
    match condition["kind"]:
        case "attack" | "worst-case":
            budget = float(condition.get("eps") or 0.03) * (255 if condition["norm"] == "Linf" else 16)
            weaker = 0.05 if condition.get("attack") in ("fgsm", "square") else 0.0
            return clean * math.exp(-budget / (2 + 0.8 * m)) + weaker
        case "corruption":
            return clean - 0.05 * condition["severity"] - 0.01 * (len(condition["corruption"]) % 7)
        case "domain":
            return clean - 0.3
    return clean


def _reliability(rng, v):
    confidence = np.linspace(0.15, 0.95, 9)
    accuracy = np.clip(confidence - 0.02 * v + rng.normal(0, 0.02, 9), 0, 1)
    spread = {"low": np.clip(accuracy - 0.08, 0, 1), "high": np.clip(accuracy + 0.08, 0, 1)}
    band = {"calibrated_low": np.clip(confidence - 0.1, 0, 1), "calibrated_high": np.clip(confidence + 0.1, 0, 1)}
    return _lists(confidence=confidence, accuracy=accuracy, **spread, **band, n=np.arange(1, 10) * 20.0)


def _roc(rng, v):
    fpr = np.linspace(0, 1, 101)
    return _lists(fpr=fpr, tpr=fpr ** (0.1 + 0.1 * v))


def _scores(rng, v):
    edges = np.linspace(0, 1, 41)
    clean, unknown = (np.histogram(rng.beta(a, 5, 500), edges)[0] / 500 for a in (2, 3 + v))
    return _lists(edges=edges, clean=np.append(clean, 0), unknown=np.append(unknown, 0))


def _energies(rng, v):
    edges = np.linspace(-20, 0, 25)
    names = ("natural", "attacked", "natural_joint", "attacked_joint")
    drawn = {k: np.append(np.histogram(rng.normal(-12 + i, 3, 500), edges)[0] / 500, 0) for i, k in enumerate(names)}
    return _lists(edges=edges, **drawn)


def _risk(rng, v):
    coverage = np.linspace(0.05, 1, 50)
    return _lists(coverage=coverage, risk=(0.1 + 0.01 * v) * coverage**2)


def _distances(rng, v):
    eps = np.linspace(0, 2, 51)
    value = 0.95 * np.exp(-eps * (0.5 + 0.1 * v))
    return _lists(eps=eps, value=value, low=np.clip(value - 0.04, 0, 1), high=np.clip(value + 0.04, 0, 1))


def _lists(**arrays):
    return {name: np.asarray(values).round(6).tolist() for name, values in arrays.items()}


_SHAPES = {
    "reliability": _reliability,
    "roc": _roc,
    "scores": _scores,
    "energies": _energies,
    "risk-coverage": _risk,
    "robust-accuracy": _distances,
}


def compared(results: RunResults) -> list[Compared]:
    """All pairs on the axes of the headline: differences of two standard errors count."""
    from robustbench_ext.axes import axes, model_names

    found = []
    for axis in axes(results):
        higher = results.metrics[axis.metric]["higher_is_better"]
        for a, b in combinations(model_names(results), 2):
            first, second = axis.row(results, b), axis.row(results, a)
            if first is None or second is None:
                continue
            difference, half = first.value - second.value, 0.02
            p = math.erfc(abs(difference) / half * 1.96 / math.sqrt(2))
            adjusted = min(1.0, 10 * p)
            decided = adjusted < 0.05
            found.append(
                Compared(
                    model=b,
                    against=a,
                    condition=axis.condition,
                    probe=axis.probe_of(b),
                    metric=axis.metric,
                    group=None if axis.group is ... else axis.group,
                    value=difference,
                    ci_low=difference - half,
                    ci_high=difference + half,
                    ci_level=0.95,
                    ci_method="Newcombe, paired",
                    test="exact McNemar",
                    p_value=p,
                    p_adjusted=adjusted,
                    outcome=("better" if (difference > 0) == higher else "worse") if decided else "inconclusive",
                    n=N,
                    n_to_decide=None
                    if decided or not difference
                    else math.ceil(N * (2.8 * half / 1.96 / difference) ** 2),
                )
            )
    return found
