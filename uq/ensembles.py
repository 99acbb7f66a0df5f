"""Two-tier ensembles: equal weights within a family of networks, learnt ones over families (AWARE-NET, arXiv 2505.00312).

    tier 1   p_a = 1/m_a sum_i softmax(z_ai)           members of one architecture, say, trained from different starts
    tier 2   p   = sum_a softmax(w)_a p_a              w by the likelihood of held-out labels, from w = 0

Both tiers together are one weight for each member, softmax(w)_a / m_a, so the ensemble is a network like any other
(`robustbench_ext.models.ensemble`), to be attacked as a whole. The members are frozen; only w is fitted, one number a family,
so that a few hundred held-out samples are enough.

What is maximised, mean log sum_a s_a p_a(y) over weights s = softmax(w) >= 0 of sum 1, is concave in s: there is one maximum,
and expectation-maximisation climbs to it from equal weights without ever falling. `inverse_mse_weights` is the closed form
without likelihood, right for families whose errors are independent, which those of networks are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_ext import device as devices
from robustbench_ext.errors import ConfigError, DataError
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.ensemble import Ensemble
from uq.mixing import inverse_variance_weights, second_moments

RULES = ("learned", "uniform", "inverse-variance")
STEPS, STILL = 20_000, 1e-13  # of expectation-maximisation, and the gain in NLL below which it is at rest
Families = Sequence[Sequence[int]]  # members of each family, by their place


# The two tiers -------------------------------------------------------------------------------------------------------


def within_families(log_p: Tensor, families: Families) -> Tensor:
    """Tier 1: log of the mean probabilities of every family, (A, N, K), of members' log-probabilities (M, N, K)."""
    return torch.stack([log_p[list(family)].logsumexp(dim=0) - math.log(len(family)) for family in families])


def over_families(log_q: Tensor, weights: Tensor) -> Tensor:
    """Tier 2: log of the weighted mean (N, K) of families' log-probabilities (A, N, K); weights (A,) >= 0 of sum 1."""
    return (log_q + weights.log()[:, None, None]).logsumexp(dim=0)


def member_weights(families: Families, weights: Tensor) -> Tensor:
    """Both tiers as one weight a member, (M,)."""
    found = torch.zeros(sum(len(family) for family in families), dtype=torch.float64)
    for family, weight in zip(families, weights.tolist(), strict=True):
        found[list(family)] = weight / len(family)
    return found


# The weights ---------------------------------------------------------------------------------------------------------


def likelihood_weights(log_q: Tensor, labels: Tensor) -> Tensor:
    """softmax(w) (A,), float64, of the least negative log-likelihood of the mixture on samples with labels (N,).

    Args:
        log_q: families' log-probabilities (A, N, K) of held-out samples, N >= 1.
    """
    if log_q.ndim != 3 or len(labels) != log_q.shape[1] or not len(labels):
        raise DataError(
            f"log-probabilities {tuple(log_q.shape)} and {len(labels)} labels; expected (A, N, K), (N,), N >= 1"
        )
    true = log_q.double()[:, torch.arange(len(labels)), labels]  # (A, N)
    log_s = torch.full((len(true), 1), -math.log(len(true)), dtype=torch.float64)
    before = math.inf
    for _ in range(STEPS):
        joint = log_s + true
        total = joint.logsumexp(dim=0)
        loss = -float(total.mean())
        if not loss < before - STILL:
            break
        before = loss
        # The share of the samples that every family explains is its next weight.
        log_s = (joint - total).logsumexp(dim=1, keepdim=True) - math.log(len(labels))
    return log_s[:, 0].softmax(dim=0)


def inverse_mse_weights(log_q: Tensor, labels: Tensor) -> Tensor:
    """One over every family's Brier score on held-out samples, of sum 1, (A,)."""
    target = nn.functional.one_hot(labels, log_q.shape[2]).double()
    return inverse_variance_weights(second_moments(log_q.double().exp(), target).diagonal())


def mean_nll(log_p: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of log-probabilities (N, K)."""
    return float(nn.functional.nll_loss(log_p.double(), labels))


# Disagreement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disagreement:
    """The share of samples on which two members predict different classes, averaged over pairs of members.

    Attributes:
        within: of every family; None where it has one member.
        across: over pairs of different families; None where there is one family.
    """

    within: tuple[float | None, ...]
    across: float | None


def disagreement(log_p: Tensor, families: Families) -> Disagreement:
    """Of members' log-probabilities, or logits, (M, N, K), N >= 1."""
    predicted = log_p.argmax(dim=2)
    differ = (predicted[:, None] != predicted[None]).double().mean(dim=2)  # (M, M)
    within = []
    for family in families:
        members, n = torch.tensor(list(family)), len(family)
        within.append(float(differ[members][:, members].sum() / (n * (n - 1))) if n > 1 else None)  # the diagonal is 0
    family_of = torch.empty(len(predicted), dtype=torch.int64)
    for number, family in enumerate(families):
        family_of[list(family)] = number
    apart = differ[family_of[:, None] != family_of[None]]
    return Disagreement(tuple(within), float(apart.mean()) if len(apart) else None)


# Together ------------------------------------------------------------------------------------------------------------


def kinds(members: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Families of networks by their printed structure, called after their classes."""
    alike: dict[str, list[str]] = {}
    for name, module in members.items():
        alike.setdefault(repr(module), []).append(name)
    found: dict[str, list[str]] = {}
    for names in alike.values():
        module = members[names[0]]
        plain = type(getattr(module, "inner", module)).__name__
        number = sum(title.partition(" ")[0] == plain for title in found)
        found[f"{plain} {number + 1}" if number else plain] = names
    return found


def check_families(families: Mapping[str, Sequence[str]], members: Sequence[str]) -> None:
    """Raise ConfigError unless every member is in exactly one family."""
    listed = [name for family in families.values() for name in family]
    if sorted(listed) != sorted(members) or not all(families.values()):
        raise ConfigError(
            f"ensemble: families hold {', '.join(sorted(listed)) or 'nothing'}; expected each of {', '.join(members)} once"
        )


def log_probabilities(members: Sequence[nn.Module], x: Tensor, batch_size: int = 250) -> Tensor:
    """Of every member, (M, N, K), float64, in evaluation mode and without gradient."""
    found = []
    for member in members:
        with torch.no_grad(), frozen_eval(member):
            found.append(
                torch.cat([devices.call(member, part).double().log_softmax(dim=1) for part in x.split(batch_size)])
            )
    if len({tuple(log_p.shape) for log_p in found}) > 1:
        raise ConfigError(
            f"ensemble: members give {', '.join(str(p.shape[1]) for p in found)} classes; expected as many each"
        )
    return torch.stack(found)


def make_ensemble(
    members: Mapping[str, nn.Module],
    x: Tensor,
    labels: Tensor,
    families: Mapping[str, Sequence[str]] | None = None,
    rule: str = "learned",
    batch_size: int = 250,
) -> tuple[Ensemble, dict[str, Any]]:
    """One network of several, and what is to be said of it.

    Args:
        members: networks by name, of the same inputs and classes; they become parts of the ensemble as they are.
        x, labels: held-out inputs (N, C, H, W) in [0, 1] and labels (N,); never test data.
        families: names of members by the name of their family; by default one for each structure (`kinds`).
        rule: of the second tier: "learned" (by likelihood), "uniform", "inverse-variance" (`inverse_mse_weights`).

    Returns:
        The ensemble; and by family its members, weight, held-out NLL and disagreement within, the disagreement across families,
        and the held-out NLL of equal weights and of these.
    """
    if rule not in RULES:
        raise ConfigError(f"ensemble: weights = {rule!r}, expected one of {', '.join(RULES)}")
    named = {name: list(family) for name, family in (kinds(members) if families is None else families).items()}
    names = list(members)
    check_families(named, names)
    places = [[names.index(member) for member in family] for family in named.values()]
    log_p = log_probabilities(list(members.values()), x, batch_size)
    log_q = within_families(log_p, places)
    equal = torch.full((len(places),), 1 / len(places), dtype=torch.float64)
    weights = equal
    if rule != "uniform":
        weights = (likelihood_weights if rule == "learned" else inverse_mse_weights)(log_q, labels)
    apart = disagreement(log_p, places)
    report = {
        "families": {
            name: {"members": family, "weight": float(weight), "nll": mean_nll(q, labels), "disagreement": within}
            for (name, family), weight, q, within in zip(named.items(), weights, log_q, apart.within, strict=True)
        },
        "disagreement_across": apart.across,
        "nll": mean_nll(over_families(log_q, weights), labels),
        "nll_uniform": mean_nll(over_families(log_q, equal), labels),
        "n": len(labels),
    }
    return Ensemble(list(members.values()), member_weights(places, weights)), report
