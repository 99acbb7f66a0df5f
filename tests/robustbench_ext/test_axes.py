"""Which budget stands for an attack's norm in the headline."""

from __future__ import annotations

from typing import Any

import pytest

from robustbench_ext.axes import main_threats


class _Results:
    """As much of a run's results as the choice of a budget looks at: its conditions, all of them measured."""

    def __init__(self, attacks: list[tuple[str, float]]) -> None:
        worst = sorted(set(attacks))
        self.conditions = [
            *(
                {"kind": "attack", "norm": norm, "eps": eps, "label": f"{i} {norm} {eps}"}
                for i, (norm, eps) in enumerate(attacks)
            ),
            *({"kind": "worst-case", "norm": norm, "eps": eps, "label": f"worst {norm} {eps}"} for norm, eps in worst),
        ]

    def find(self, **query: Any) -> list[Any]:
        return [query]


@pytest.mark.parametrize(
    ("budgets", "chosen"),
    [
        ([0.1], 0.1),
        ([0.1, 0.2, 0.3], 0.2),  # one attack each: the middle
        ([0.1, 0.2], 0.2),  # of two the larger
        ([0.1, 0.2, 0.2, 0.3], 0.2),  # most attacks
        ([0.1, 0.1, 0.2, 0.3], 0.1),
        ([0.1, 0.1, 0.2, 0.2], 0.2),  # as many attacks at both: of two the larger, as with one attack each
        ([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4], 0.2),
    ],
)
def test_the_budget_of_the_headline(budgets: list[float], chosen: float) -> None:
    found = main_threats(_Results([("Linf", eps) for eps in budgets]))  # type: ignore[arg-type]
    assert [c["eps"] for c in found] == [chosen]


def test_each_norm_has_its_own() -> None:
    found = main_threats(_Results([("Linf", 0.1), ("Linf", 0.1), ("L2", 1.0), ("L2", 2.0), ("L2", 3.0)]))  # type: ignore[arg-type]
    assert [(c["norm"], c["eps"]) for c in found] == [("L2", 2.0), ("Linf", 0.1)]
