"""The section on ensembles that a run made: what every family weighs, and whether its members disagree (`uq.ensembles`)."""

from __future__ import annotations

from typing import Any

from reports.section import Section
from reports.tables import Cell, Column, Table
from robustbench_ext.results import RunResults

TEXT = (
    "Mean probabilities within a family, weighted ones over families. Weights and the numbers below are of the calibration "
    "split, on which the weights were chosen. Accuracies and attacks elsewhere are of the ensemble as one network."
)


def ensembles(results: RunResults) -> Section:
    """Models that were made as ensembles."""
    return Section("ensembles", "Ensembles", TEXT, tables=[table(results)])


def table(results: RunResults) -> Table:
    """A line a family, and one for the ensemble."""
    differ = "Share of calibration samples on which two members predict different classes, averaged over pairs"
    found = Table(
        "Ensembles by family, on the calibration split",
        "model · family",
        [
            Column("members"),
            Column("weight, %"),
            Column(
                "NLL ↓",
                "Mean negative log-likelihood of the labels; of the ensemble, also with equal weights of families.",
            ),
            Column(
                "disagreement, %", f"{differ}: of members of the family; for `all`, of members of different families."
            ),
        ],
    )
    for model in results.models:
        made: dict[str, Any] = model.get("made") or {}
        if made.get("maker") != "ensemble":
            continue
        report = made["report"]
        for name, family in report["families"].items():
            names = Cell(", ".join(family["members"]))
            cells = [names, _share(family["weight"]), _nll(family["nll"]), _share(family["disagreement"])]
            found.rows.append((f"{model['name']} · {name}", cells))
        nll = Cell(f"{report['nll']:.3f} (equal weights {report['nll_uniform']:.3f})", report["nll"])
        cells = [Cell(str(len(made["of"]))), Cell("100"), nll, _share(report["disagreement_across"])]
        found.rows.append((f"{model['name']} · all", cells))
    return found


def _nll(value: float) -> Cell:
    return Cell(f"{value:.3f}", value)


def _share(value: float | None) -> Cell:
    return Cell("–", None, "one member, or one family") if value is None else Cell(f"{100 * value:.1f}", value)
