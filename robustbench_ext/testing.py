"""Conformance: what every attack and every detector must keep, for packages of your own, too.

As ready-made tests, one for each norm and each way to use the attack:

    from robustbench_ext.testing import attack_tests, detector_tests

    test_my_attack = attack_tests(MyAttack, steps=10)
    test_my_detector = detector_tests(MyDetector, k=5)

or as classes, where something is to be added or left out:

    class TestMyAttack(AttackConformance):
        make = MyAttack
        parameters = {"steps": 10}

or on the command line, `rbx check --attack my_attack.py:MyAttack --detector my_detector.py:MyDetector`, or as plain checks:

    def test_my_attack():
        check_attack(MyAttack(eps=0.1))

They run on a small fixed network and 48 inputs and take about a second. A broken promise is an AssertionError with a sentence
that says which one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from robustbench_ext.attacks.base import Attack
from robustbench_ext.attacks.threat import TOLERANCE, flat_norm
from robustbench_ext.catalog import ATTACKS, DETECTORS
from robustbench_ext.checks import Check
from robustbench_ext.errors import RobustBenchExtError, line_of_user
from robustbench_ext.randomness import SampleRandom

if TYPE_CHECKING:
    from detectors.base import Detector

SAMPLES, CLASSES = 48, 5


class _Network(nn.Module):
    """A small fixed network with batch norm and dropout, so that a wrong mode shows."""

    def __init__(self) -> None:
        super().__init__()
        self.generator_states: set[bytes] = set()  # of torch's global generator, at every pass
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
            )
            self.head = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.generator_states.add(torch.get_rng_state().numpy().tobytes())
        logits: Tensor = 3.0 * self.head(self.body(x))
        return logits


def example() -> tuple[_Network, Tensor, Tensor, list[str]]:
    """A model in training mode, inputs, labels (its own predictions but for four planted errors), ids."""
    model = _Network()
    ids = [f"check:{i}" for i in range(SAMPLES)]
    x = SampleRandom.of(0, ids, "conformance").uniform((1, 8, 8))
    model.train()
    with torch.no_grad():
        model(x)  # batch norm has seen some data
        y = model.eval()(x).argmax(dim=1)
    y[:4] = (y[:4] + 1) % CLASSES
    return model.train(), x, y, ids


def _expect(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(promise)


def check_attack(attack: Attack, flips: int = 1) -> None:
    """Run all checks of an attack on a small model.

    Args:
        attack: with a finite budget.
        flips: verdicts that may differ between batch sizes by rounding.

    Raises:
        AssertionError: a promise is broken.
    """
    model, x, y, ids = example()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.generator_states.clear()
    result = attack(model, x, y, ids=ids, seed=1)
    _expect(
        not attack.per_sample_draws or len(model.generator_states) == 1,
        "random draws must come from search.random, not from torch's global generator (or say per_sample_draws = False)",
    )
    size = flat_norm(result.x_adv - x, attack.norm)
    _expect(float(size.max()) <= attack.eps + TOLERANCE, f"returned inputs must stay within {attack.threat()}")
    _expect(float(result.x_adv.min()) >= 0 and float(result.x_adv.max()) <= 1, "returned inputs must stay in [0, 1]")
    _expect(model.training, "the model must come back in the mode that it came in")
    unchanged = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    _expect(unchanged, "parameters and batch-norm statistics must not change")
    _expect(
        all(p.requires_grad and p.grad is None for p in model.parameters()), "parameters must keep their gradient flags"
    )
    with torch.no_grad():
        again = model.eval()(result.x_adv)
    _expect(torch.allclose(again, result.logits, atol=1e-4), "logits must belong to the returned inputs, in eval mode")
    _expect(torch.equal(result.broken, result.logits.argmax(1) != y), "verdicts must belong to the returned logits")
    _expect(torch.equal(result.x_adv[:4], x[:4]), "samples that are misclassified clean must be left as they are")
    repeated = attack(model, x, y, ids=ids, seed=1)
    _expect(torch.equal(repeated.x_adv, result.x_adv), "the same seed must give the same inputs")
    if attack.per_sample_draws:
        small = attack(model, x, y, ids=ids, seed=1, batch_size=7)
        changed = int((small.broken != result.broken).sum())
        _expect(changed <= flips, f"verdicts must not depend on the batch size; {changed} of {SAMPLES} do")
    if attack.eps != float("inf"):
        zero = replace(attack, eps=0.0)(model, x, y, ids=ids)
        _expect(torch.equal(zero.x_adv, x), "a budget of 0 must be the identity")
        larger = replace(attack, eps=min(1.0, 2 * attack.eps) if attack.norm == "Linf" else 2 * attack.eps)
        more = int(larger(model, x, y, ids=ids, seed=1).broken.sum())
        _expect(more >= int(result.broken.sum()) - flips, "twice the budget must not break fewer samples")
    cost = attack.cost(CLASSES)
    if cost is not None:
        _expect(
            int(result.forwards.max()) <= cost.forwards + attack.draws,
            "no sample may cost more forward passes than cost() says",
        )
        _expect(
            int(result.backwards.max()) <= cost.backwards, "no sample may cost more backward passes than cost() says"
        )


def check_detector(detector: Detector) -> None:
    """Run all checks of a detector on a small model.

    Raises:
        AssertionError: a promise is broken.
    """
    model, x, y, _ = example()
    if detector.needs_fit and not detector._fitted:
        from robustbench_ext.errors import NotFittedError

        try:
            detector.score(x)
        except NotFittedError:
            pass
        else:
            raise AssertionError("scoring before fitting must raise NotFittedError")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    detector.fit(model, x, y)
    scores = detector.score(x)
    _expect(scores.shape == (SAMPLES,), f"scores must have shape ({SAMPLES},), got {tuple(scores.shape)}")
    _expect(bool(torch.isfinite(scores).all()), "scores must be finite")
    _expect(model.training, "the model must come back in the mode that it came in")
    unchanged = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    _expect(unchanged, "parameters and batch-norm statistics must not change")
    rows = torch.cat([detector.score(x[i : i + 1]) for i in range(SAMPLES)])
    _expect(torch.allclose(rows, scores, rtol=1e-3, atol=1e-5), "a sample's score must not depend on its batch")


# Ready-made tests ----------------------------------------------------------------------------------------------------

BUDGETS: Mapping[str, float] = {"Linf": 0.1, "L2": 0.6}  # that break some and not all of the inputs of `example`


def attack_cases(make: Callable[..., Attack], budgets: Mapping[str, float], **parameters: Any) -> list[tuple[str, str]]:
    """(norm, case) of every way to use an attack: the norms that it knows, and what it says that it can do."""
    norms = [norm for norm in getattr(make, "norms", tuple(budgets)) if norm in budgets]
    cases = []
    for norm in norms:
        attack = make(norm=norm, eps=budgets[norm], **parameters)
        cases += [(norm, "conforms"), (norm, "to the end"), (norm, "specification")]
        if attack.keep == "norm":
            cases.append((norm, "without a budget"))
        if "target" in {f.name for f in fields(attack)}:
            cases.append((norm, "targeted"))
    return cases


def check_attack_case(
    make: Callable[..., Attack], norm: str, case: str, eps: float, flips: int = 1, **more: Any
) -> None:
    """Check one case of `attack_cases`.

    Raises:
        AssertionError: a promise is broken.
    """
    if case == "specification":
        check_specification(make(norm=norm, eps=eps, **more), make(norm=norm, eps=eps / 2, **more))
    elif case == "to the end":
        check_attack(make(norm=norm, eps=eps, **{**more, "stop": "never"}), flips)
    elif case == "without a budget":
        check_attack(make(norm=norm, eps=float("inf"), **more), flips)
    elif case == "targeted":
        check_attack(make(norm=norm, eps=eps, **{**more, "target": "random"}), flips)
    else:
        check_attack(make(norm=norm, eps=eps, **more), flips)


def check_specification(one: Any, other: Any) -> None:
    """What results are kept under: the specifications of two methods with different parameters.

    Raises:
        AssertionError: they are no JSON, are the same, or lack the version.
    """
    texts = []
    for method in (one, other):
        try:
            texts.append(json.dumps(method.spec(), sort_keys=True, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise AssertionError(f"spec() must hold JSON-like values alone: {error}") from None
        _expect("version" in method.spec(), "spec() must hold the version, which is raised when results change")
    _expect(
        texts[0] != texts[1], "other parameters must give another spec(), or results would be taken for each other's"
    )


def attack_tests(
    make: Callable[..., Attack], *, budgets: Mapping[str, float] = BUDGETS, flips: int = 1, **parameters: Any
) -> Callable[[str, str], None]:
    """A parametrised test of an attack: `test_my_attack = attack_tests(MyAttack, steps=10)`.

    Args:
        make: the class, or a function of norm, eps and further parameters.
        budgets: eps by norm; norms that are not in it are left out. They should break some of the inputs.
        flips: verdicts that may differ between batch sizes by rounding.
        parameters: of the attack; few steps will do.
    """
    import pytest

    cases = attack_cases(make, budgets, **parameters)
    if not cases:
        raise ValueError(f"attack_tests: none of the norms {', '.join(budgets)} is one of the attack's; give budgets=")

    @pytest.mark.parametrize(("norm", "case"), cases)
    def test(norm: str, case: str) -> None:
        __tracebackhide__ = True
        check_attack_case(make, norm, case, budgets[norm], flips, **parameters)

    found: Callable[[str, str], None] = test
    return found


def check_detector_case(make: Callable[..., Detector], case: str, **parameters: Any) -> None:
    """Check a detector: "conforms", "order" (scores follow their inputs, and fitting again gives the same), "specification".

    Raises:
        AssertionError: a promise is broken.
    """
    if case == "conforms":
        check_detector(make(**parameters))
        return
    model, x, y, _ = example()
    first, again = make(**parameters).fit(model, x, y), make(**parameters).fit(model, x, y)
    if case == "specification":
        try:
            json.dumps(first.spec(), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"parameters() must hold JSON-like values alone: {error}") from None
        _expect(
            first.spec() == again.spec(), "fitting must not change spec(): it says what the scores depend on beforehand"
        )
        missing = [name for name in parameters if name not in first.spec()]
        _expect(not missing, f"parameters() must say what the constructor was given; {', '.join(missing)} is not in it")
        return
    scores = first.score(x)
    _expect(torch.equal(scores, again.score(x)), "fitting twice on the same data must give the same scores")
    order = torch.arange(SAMPLES - 1, -1, -1)
    turned = first.score(x[order])
    _expect(torch.allclose(turned, scores[order], rtol=1e-3, atol=1e-5), "scores must follow the order of their inputs")


DETECTOR_CASES = ("conforms", "order", "specification")


def detector_tests(make: Callable[..., Detector], **parameters: Any) -> Callable[[str], None]:
    """A parametrised test of a detector: `test_my_detector = detector_tests(MyDetector, k=5)`."""
    import pytest

    @pytest.mark.parametrize("case", DETECTOR_CASES)
    def test(case: str) -> None:
        __tracebackhide__ = True
        check_detector_case(make, case, **parameters)

    found: Callable[[str], None] = test
    return found


def check_methods(attacks: Sequence[str], detectors: Sequence[str]) -> list[Check]:
    """Every case of attacks and detectors by name, registered or `file.py:Class`, with their default parameters.

    Raises:
        ConfigError: there is no such method.
    """
    found = []
    for name in attacks:
        make, shown = ATTACKS.load(name), ATTACKS.label(name)
        for norm, case in attack_cases(make, BUDGETS):
            found.append(_tried(f"{shown} {norm}, {case}", partial(check_attack_case, make, norm, case, BUDGETS[norm])))
    for name in detectors:
        make, shown = DETECTORS.load(name), DETECTORS.label(name)
        found += [_tried(f"{shown}, {case}", partial(check_detector_case, make, case)) for case in DETECTOR_CASES]
    return found


def _tried(name: str, check: Callable[[], None]) -> Check:
    try:
        check()
    except (AssertionError, RobustBenchExtError) as error:
        return Check(name, "fail", str(error))
    except Exception as error:  # the method's own
        return Check(name, "fail", f"{type(error).__name__}: {error}{line_of_user(error)}")
    return Check(name, "pass", "kept")


class AttackConformance:
    """Tests of an attack as a base class: name yours `Test...`, set `make`, and perhaps `parameters`, `budgets`, `flips`."""

    make: ClassVar[Any]
    parameters: ClassVar[Mapping[str, Any]] = {}
    budgets: ClassVar[Mapping[str, float]] = BUDGETS
    flips: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "make" in vars(cls):
            cls.test_attack = staticmethod(  # type: ignore[attr-defined]
                attack_tests(vars(cls)["make"], budgets=cls.budgets, flips=cls.flips, **cls.parameters)
            )


class DetectorConformance:
    """Tests of a detector as a base class: name yours `Test...`, set `make`, and perhaps `parameters`."""

    make: ClassVar[Any]
    parameters: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "make" in vars(cls):
            cls.test_detector = staticmethod(  # type: ignore[attr-defined]
                detector_tests(vars(cls)["make"], **cls.parameters)
            )
