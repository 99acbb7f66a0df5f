"""Conformance: what every attack and every detector must keep, as checks that third parties can run on their own.

    from robustbench_ext.testing import check_attack, check_detector

    def test_my_attack():
        check_attack(MyAttack(eps=0.1))

A broken promise is an AssertionError with a sentence that says which one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from detectors.base import Detector
from robustbench_ext.attacks.base import Attack
from robustbench_ext.attacks.threat import TOLERANCE, flat_norm
from robustbench_ext.randomness import SampleRandom

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
