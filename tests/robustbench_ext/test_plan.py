"""Plans: bounds that hold, and what is there already."""

import json

import pytest
from typer.testing import CliRunner

from robustbench_ext.attacks import APGDCE, APGDT, FABT, FGSM, PGD, Square, Standard, build_attack
from robustbench_ext.cli.main import app
from robustbench_ext.evaluate import Context
from robustbench_ext.plan import plan
from robustbench_ext.suite import validate_suite

EXACT = [FGSM(eps=0.01), PGD(eps=0.01, steps=5, restarts=2), APGDCE(eps=0.01, steps=9), Square(eps=0.01, queries=70)]
EXACT += [
    APGDT(eps=0.01, steps=6, targets=3),
    APGDCE(eps=0.01, steps=9, stop="never"),
    PGD(eps=0.01, steps=3, stop="never"),
]
BOUNDS = [FABT(eps=0.01, steps=8, targets=3), Standard(eps=0.01, steps=4, targets=2, queries=20)]


@pytest.mark.parametrize("attack", EXACT + BOUNDS, ids=lambda a: f"{a.name}-{a.stop}")
def test_a_robust_sample_costs_what_the_attack_says(attack, digits_model, digits_test):
    x, y, ids = (v[:80] for v in digits_test)
    result = attack(digits_model, x, y, ids=ids)
    cost = attack.cost(10)
    robust = ~result.broken
    assert robust.any()
    forwards, backwards = result.forwards[robust] - 1, result.backwards[robust]  # without the clean pass
    assert int(forwards.max()) <= cost.forwards
    assert int(backwards.max()) <= cost.backwards
    if attack in EXACT:
        assert set(forwards.tolist()) == {cost.forwards}
        assert set(backwards.tolist()) == {cost.backwards}


def test_few_classes_cost_less():
    assert APGDT(eps=0.1).cost(3).backwards == 200
    assert build_attack("torchattacks:CW").cost(10) is None


def test_plan_before_and_after_the_run(finished, tiny_suite, tmp_path):
    fresh = plan(Context(validate_suite(tiny_suite), tmp_path))
    assert all(cell.there == 0 and cell.seconds > 0 for cell in fresh)
    assert {cell.condition for cell in fresh if cell.model == "trades"} >= {
        "clean",
        "apgd-ce Linf 0.1",
        "outliers letters",
    }
    (apgd,) = [c for c in fresh if c.model == "trades" and c.condition == "apgd-ce Linf 0.1"]
    assert (apgd.n, apgd.forwards, apgd.backwards) == (120, 10, 8)
    folder, _ = finished
    done = plan(Context(validate_suite(tiny_suite), folder))
    assert all(cell.there == cell.n and cell.seconds == 0 for cell in done)


def test_the_command_fits_80_columns():
    done = CliRunner().invoke(app, ["plan", "quickstart", "--set", "n=50", "--out", "nowhere"])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "all of it" in done.output
    cells = json.loads(CliRunner().invoke(app, ["plan", "quickstart", "--set", "n=50", "--json"]).output)
    assert {"model", "condition", "n", "forwards", "backwards", "seconds"} <= set(cells[0])
