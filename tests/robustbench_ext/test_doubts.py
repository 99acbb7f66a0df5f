"""Results that cannot be right are doubted, and sound ones are not. Planted models, real attacks, plain arrays."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from robustbench_ext.attacks.base import build_attack
from robustbench_ext.checks import Check, verdict
from robustbench_ext.doubts import (
    Attacked,
    access_of,
    accuracy_against_budget,
    black_beats_white,
    doubts,
    effort_against_success,
    huge_budget,
    mcnemar,
    randomised_without_draws,
    still_climbing,
)
from robustbench_ext.engine import run_suite
from robustbench_ext.results import Finding, RunResults

N = 200


def first(n, count=N):
    """The first n samples, bool (N,)."""
    return np.arange(count) < n


def made(label, broken, *, attack="pgd", eps=0.1, access=("white",), by=None, late=np.nan, norm="Linf", **parameters):
    n = len(broken)
    return Attacked(
        label=label,
        attack=attack,
        norm=norm,
        eps=eps,
        access=access,
        broken=broken,
        norms=np.where(broken, 0.1 if eps is None else eps, 0.0),
        broken_by=np.where(broken, 0, -1) if by is None else by,
        late_gain=np.full(n, late),
        members=access,
        parameters=parameters,
    )


def square(label, broken, **more):
    return made(label, broken, attack="square", access=("score",), **more)


ALL = np.ones(N, dtype=bool)


def test_black_box_beats_white_box():
    white = made("pgd", first(50))
    check = black_beats_white(ALL, [white, square("square", first(80))])
    assert check.status == "doubt"
    assert "square broke 30 of 150 (95 % interval" in check.message
    assert "pgd left standing" in check.message
    assert check.hint
    assert black_beats_white(ALL, [white, square("square", first(51))]).status == "pass"  # 1 of 150 may be chance
    assert black_beats_white(ALL, [made("pgd", first(190)), square("square", first(191))]).status == "pass"  # 1 of 10


def test_black_box_is_held_against_white_boxes_of_at_most_its_budget():
    black = square("square", first(80))
    assert black_beats_white(ALL, [made("large", first(200), eps=0.2), black]) is None
    assert black_beats_white(ALL, [made("L2", first(10), norm="L2"), black]) is None
    assert black_beats_white(ALL, [made("small", first(79), eps=0.05), black]).status == "pass"
    # A minimum-norm attack counts with the perturbations that are small enough.
    nearest = made("fmn", first(200), eps=None)
    assert black_beats_white(ALL, [replace(nearest, norms=np.full(N, 0.05)), black]).status == "pass"
    assert black_beats_white(ALL, [replace(nearest, norms=np.full(N, 0.3)), black]).status == "doubt"


def test_black_box_members_of_an_ensemble_count_by_themselves():
    by = np.where(first(50), 0, np.where(first(80), 1, -1))
    ensemble = made("standard", first(80), access=("white", "score"), by=by)
    check = black_beats_white(ALL, [ensemble])
    assert check.status == "doubt"
    assert "score in standard broke 30 of 150" in check.message
    # A black-box member that came first took samples that the white-box one never met.
    assert black_beats_white(ALL, [replace(ensemble, access=("score", "white"))]) is None


def test_clean_errors_and_nothing_standing():
    assert black_beats_white(ALL, []) is None
    assert black_beats_white(~ALL, [made("pgd", ALL), square("square", ALL)]).status == "pass"
    none = np.zeros(0, dtype=bool)
    assert black_beats_white(none, [made("pgd", none), square("square", none)]).status == "pass"


def test_mcnemar_by_hand():
    assert mcnemar(first(0), first(9)) == (0, 9, 1.0)
    lost, gained, p = mcnemar(first(10), first(0))
    assert (lost, gained) == (10, 0)
    assert p == pytest.approx(0.5**10)
    assert mcnemar(np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)) == (0, 0, 1.0)


def test_accuracy_that_rises_with_the_budget():
    falls = [made("a", first(20), eps=0.1, steps=20), made("b", first(60), eps=0.2, steps=20)]
    assert accuracy_against_budget(falls).status == "pass"
    rises = [made("b", first(20), eps=0.2, steps=20), made("a", first(60), eps=0.1, steps=20)]
    check = accuracy_against_budget(rises)
    assert check.status == "doubt"
    assert "b misses 40 samples that a breaks, and breaks 0 others (n = 200" in check.message
    assert accuracy_against_budget([rises[0], replace(rises[1], parameters={"steps": 50})]) is None  # another attack
    assert accuracy_against_budget([made("a", first(3), eps=None)]) is None
    assert accuracy_against_budget([made("a", first(23), eps=0.1), made("b", first(20), eps=0.2)]).status == "pass"


@pytest.mark.parametrize("effort", ["steps", "restarts", "queries", "tries"])
def test_more_work_that_finds_less(effort):
    less, more = made("less", first(60), **{effort: 10}), made("more", first(20), **{effort: 100})
    check = effort_against_success([more, less])
    assert check.status == "doubt"
    assert "more misses 40 samples that less breaks" in check.message
    assert effort_against_success([replace(less, broken=first(9)), more]).status == "pass"
    assert effort_against_success([less, replace(more, eps=0.2)]) is None
    assert effort_against_success([less, replace(more, parameters={**more.parameters, "loss": "dlr"})]) is None


def test_more_of_one_and_less_of_another_is_not_more():
    assert effort_against_success([made("a", ALL, steps=10, restarts=5), made("b", ~ALL, steps=50, restarts=1)]) is None


def test_still_climbing():
    assert still_climbing([made("slow", first(50), late=0.1, steps=20)]).status == "doubt"
    assert still_climbing([made("settled", first(50), late=0.01, steps=20)]).status == "pass"
    few = made("jumps", first(50), steps=20)
    few.late_gain[:] = np.where(first(80), 0.9, 0.0)  # 30 of the 150 that stand: a mean of 18 %
    assert still_climbing([few]).status == "pass"
    assert still_climbing([made("short", first(50), late=0.3, steps=5)]) is None
    assert still_climbing([made("silent", first(50), steps=20)]) is None
    assert still_climbing([made("all broken", ALL, late=0.9, steps=20)]) is None
    assert still_climbing([made("mifgsm", first(0), attack="mi-fgsm", late=0.4, steps=20, step_size=None)]) is None
    assert still_climbing([]) is None


def test_huge_budget_in_a_suite():
    labels = np.arange(N) % 10
    stays = made("pgd", first(100), eps=0.5, steps=20)
    assert huge_budget(ALL, labels, 10, [stays]).status == "doubt"
    assert "100 of 200" in huge_budget(ALL, labels, 10, [stays]).message
    assert huge_budget(ALL, labels, 10, [replace(stays, broken=first(185))]).status == "pass"  # chance
    assert huge_budget(ALL, labels * 0, 10, [stays]).status == "pass"  # one class: a constant answer is right
    assert huge_budget(ALL, labels, 10, [replace(stays, eps=0.3)]) is None
    assert huge_budget(ALL, labels, 10, [replace(stays, parameters={})]) is None  # one step may fail


def test_randomised_models_need_draws():
    plain, rand = made("pgd", ALL, draws=1), made("rand", ALL, draws=20)
    assert randomised_without_draws([plain], randomised=False) is None
    assert randomised_without_draws([], randomised=True) is None
    check = randomised_without_draws([plain, rand], randomised=True)
    assert check.status == "fail"
    assert "1 of 2 attacks" in check.message
    assert "`rand`" in check.hint
    assert randomised_without_draws([rand], randomised=True).status == "pass"


def test_audits_are_not_held_against_others():
    audited = replace(made("audited", ~ALL, draws=1), partial=True)
    found = doubts(ALL, np.arange(N) % 10, 10, [audited, square("square", ALL)], randomised=True)
    assert [c.name for c in found] == ["randomised model"]


def test_access():
    assert access_of(build_attack("standard", eps=0.1)) == ("white", "white", "white", "score")
    assert access_of(build_attack("random-noise", eps=0.1)) == ("decision",)
    assert access_of(build_attack("pgd", eps=0.1)) == ("white",)


def test_verdict_is_the_worst():
    assert verdict([]) == "pass"
    assert verdict([Finding(model="m", name="a", status="doubt", message="")]) == "doubt"
    assert verdict([Check("a", "fail", ""), Check("b", "doubt", "")]) == "fail"


# Real attacks on real networks ---------------------------------------------------------------------------------------


def measured(label, model, data, name="pgd", n=120, **parameters):
    x, y, ids = (part[:n] for part in data)
    attack = build_attack(name, **parameters)
    found = attack(model, x, y, ids=ids)
    rest = {k: v for k, v in attack.spec().items() if k not in ("attack", "version", "norm", "eps")}
    return Attacked(
        label,
        attack.name,
        attack.norm,
        attack.eps,
        access_of(attack),
        found.broken.numpy(),
        found.norms.numpy(),
        found.broken_by.numpy(),
        found.late_gain.numpy(),
        attack.members,
        rest,
    )


def test_tiny_steps_are_still_climbing_and_usual_ones_are_not(digits_model, digits_test):
    tiny = measured("tiny", digits_model, digits_test, eps=0.1, steps=20, step_size=0.0005)
    assert still_climbing([tiny]).status == "doubt"
    usual = [
        measured("pgd", digits_model, digits_test, eps=0.1),
        measured("apgd", digits_model, digits_test, name="apgd-ce", eps=0.1, steps=100),
    ]
    assert still_climbing(usual).status == "pass"


@pytest.mark.parametrize("which", ["digits", "mnist"])
def test_sound_networks_raise_no_doubt(which, request):
    model, data = request.getfixturevalue(f"{which}_model"), request.getfixturevalue(f"{which}_test")
    right = (model(data[0][:120]).argmax(1) == data[1][:120]).detach().numpy()
    runs = [measured(f"pgd {e} {s}", model, data, eps=e, steps=s) for e in (0.05, 0.1, 0.2, 0.5) for s in (10, 20)]
    runs += [
        measured("square", model, data, name="square", eps=0.1, queries=100),
        measured("noise", model, data, name="random-noise", eps=0.1, tries=20),
        measured("mi-fgsm", model, data, name="mi-fgsm", eps=0.1),
    ]
    found = doubts(right, data[1][:120].numpy(), 10, runs, randomised=False)
    assert {c.name for c in found} == {
        "black box against white box",
        "accuracy against budget",
        "larger budget not better",
        "still climbing",
        "huge budget in the suite",
    }
    assert verdict(found) == "pass", found


NETS = """
import torch
from torch import nn
from robustbench_ext.models.networks import SmallCNN

class Rounding(nn.Module):
    def forward(self, x):
        return torch.round(x * 8) / 8

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.05 * torch.randn_like(x)

def sound():
    model = SmallCNN(1, 10, 8)
    model.load_state_dict(torch.load("{weights}"))
    return model

def masked():
    return nn.Sequential(Rounding(), sound())

def random():
    return nn.Sequential(Noise(), sound())
"""

SUITE = {
    "schema": 1,
    "name": "planted",
    "data": "digits",
    "n": 100,
    "conditions": [
        {"attack": "pgd", "eps": 0.15, "steps": 10},
        {"attack": "square", "eps": 0.15, "queries": 200},
    ],
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory, digits_model):
    folder = tmp_path_factory.mktemp("planted")
    torch.save(digits_model.state_dict(), folder / "weights.pt")
    (folder / "nets.py").write_text(NETS.replace("{weights}", str(folder / "weights.pt")))
    return folder


def suite_of(planted, *names):
    return {**SUITE, "models": [{"name": name, "spec": f"{planted / 'nets.py'}:{name}"} for name in names]}


def test_a_masked_model_is_doubted_wherever_its_numbers_are_shown(planted):
    (planted / "suite.yaml").write_text(json.dumps(suite_of(planted, "sound", "masked")))
    done = subprocess.run(
        [sys.executable, "-m", "robustbench_ext.cli.main", "run", "suite.yaml", "--out", "out", "--executor", "serial"],
        capture_output=True,
        text=True,
        cwd=planted,
    )
    assert done.returncode == 1, done.stderr  # the preflight fails as well: gradients are zero
    results = RunResults.read(planted / "out" / "results.json")
    by = {(f.model, f.name): f for f in results.doubts}
    name = "black box against white box"
    assert by["masked", name].status == "doubt"
    assert "square Linf 0.15 broke" in by["masked", name].message
    assert by["sound", name].status == "pass"
    html = (planted / "out" / "report.html").read_text()
    strip = html.partition('<div class="verdict')[2].partition("</div>")[0]
    headline = strip.partition("</p>")[0]
    assert "Not to be trusted" in headline
    assert f"{name} (masked)" in headline
    assert "gradients (masked)" in headline
    assert "square Linf 0.15 broke" in strip
    top = (planted / "out" / "report.md").read_text().splitlines()[2]
    assert top.startswith("**Checks: NOT TO BE TRUSTED: ")
    assert f"{name} (masked)" in top
    assert f"doubt: masked: {name}" in " ".join((done.stdout + done.stderr).split())


def test_a_randomised_model_under_plain_attacks_fails(planted, tmp_path):
    summary = run_suite(suite_of(planted, "random"), tmp_path)
    by = {f.name: f for f in summary.results.doubts}
    assert by["randomised model"].status == "fail"
    assert summary.verdict == "fail"


def test_records_without_late_gains_are_read(planted, tmp_path, monkeypatch):
    """Records of earlier versions have neither `late_gain` nor `reached`."""
    from robustbench_ext.conditions import Inputs, UnderAttack

    apply = UnderAttack.apply

    def earlier(self, *arguments):
        made = apply(self, *arguments)
        return Inputs(made.x, {k: v for k, v in made.columns.items() if k not in ("late_gain", "reached")})

    monkeypatch.setattr(UnderAttack, "apply", earlier)
    summary = run_suite(suite_of(planted, "sound"), tmp_path)
    assert "still climbing" not in {f.name for f in summary.results.doubts}
    assert summary.results.doubts


def test_results_checked_by_other_rules_are_measured_again(planted, tmp_path):
    run_suite(suite_of(planted, "sound"), tmp_path)
    file = tmp_path / "results.json"
    before = file.read_text()
    earlier = json.loads(before)
    del earlier["doubts"], earlier["generator"]["checks"]
    assert RunResults.model_validate(earlier).doubts == []  # such files can still be read
    file.write_text(json.dumps(earlier))
    run_suite(suite_of(planted, "sound"), tmp_path)
    assert file.read_text() == before
