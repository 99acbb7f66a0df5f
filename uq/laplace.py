"""Last-layer Laplace approximation, by the package laplace-torch (Daxberger et al., NeurIPS 2021, arXiv 2106.14806).

The weights of the last layer get a Gaussian posterior about their trained values: its precision is the Gauss-Newton Hessian of
the training loss plus a prior precision. At features f the logits then are Gaussian, N(m(f), C(f)), m the model's own, and

    probit   p = softmax(m / sqrt(1 + pi/8 diag C))                                      (MacKay 1992)
    mc       p = mean over draws of softmax(m + L z),  L L^T = C

The draws z are standard normal, the same ones for every input: what is read of an input depends on nothing but the input.
Uncertainties are of these draws, in nats:

    aleatoric   mean over draws of the entropy of softmax(m + L z)
    epistemic   entropy of the mean of softmax(m + L z), minus the aleatoric part: the mutual information of class and weights

so that both add up to the entropy of the mean prediction (that of `logits` with the mc link, about that with probit).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import log, pi
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from detectors.head import Head, head_of
from robustbench_ext.errors import ConfigError, MissingExtraError
from robustbench_ext.models.observe import PENULTIMATE, Observations
from robustbench_ext.numbers import parse_number
from robustbench_ext.randomness import SampleRandom
from uq.base import Estimator, Reading

INSTALL = 'pip install "robustbench-ext[uq]" (or: pip install laplace-torch)'
STRUCTURES = ("kron", "diag", "full")
LINKS = ("probit", "mc")
_BLOCK = 1 << 22  # float64 numbers a block of samples may take
_PRIOR_RANGE = (1e-6, 1e8)


class Laplace(Estimator):
    """A Gaussian over the last layer's weights, fitted on training data.

    Args:
        structure: of the Hessian. "kron" (Kronecker-factored), "diag" or "full" (K (d + 1) weights squared: small heads only).
        prior_precision: "marglik" for the scalar with the largest marginal likelihood, or a number > 0.
        link: "probit" or "mc".
        draws: number of draws, for the parts and for "mc".
        seed: of the draws.
    """

    name: ClassVar[str] = "laplace"
    reference: ClassVar[str] = "arXiv 2106.14806"
    taps = (PENULTIMATE,)
    fit_on = "train"
    needs_model = True

    def __init__(
        self,
        structure: str = "kron",
        prior_precision: str | float = "marglik",
        link: str = "probit",
        draws: int = 100,
        seed: int = 0,
    ) -> None:
        _package()
        for what, value, known in (("structure", structure, STRUCTURES), ("link", link, LINKS)):
            if value not in known:
                raise ConfigError(f"laplace: {what} = {value!r}, expected one of {', '.join(known)}")
        if prior_precision != "marglik":
            prior_precision = parse_number(prior_precision, "laplace: prior_precision")
            if prior_precision <= 0:
                raise ConfigError(f"laplace: prior_precision = {prior_precision}, expected a number > 0 or marglik")
        count = parse_number(draws, "laplace: draws")
        if count < 2 or count != int(count):
            raise ConfigError(f"laplace: draws = {draws!r}, expected a whole number >= 2")
        self.structure, self.prior_precision, self.link = structure, prior_precision, link
        self.draws, self.seed = int(count), int(parse_number(seed, "laplace: seed"))

    def parameters(self) -> dict[str, Any]:
        return {
            "structure": self.structure,
            "prior_precision": self.prior_precision,
            "link": self.link,
            "draws": self.draws,
            "seed": self.seed,
            "package": version("laplace-torch"),
        }

    def _fit(self, held_out: Observations, model: nn.Module | None) -> None:
        head = head_of(model, held_out, self.name)
        known = TensorDataset(held_out.features[PENULTIMATE].double(), held_out.labels)
        network = nn.Sequential(nn.Identity(), _linear(head))  # theirs looks for a last layer among several
        with torch.enable_grad(), _quiet():
            self._posterior = _package()(
                network, "classification", subset_of_weights="last_layer", hessian_structure=self.structure
            )
            self._posterior.fit(DataLoader(known, batch_size=_rows(head)))
        self._at_limit = False
        found = self._most_likely() if self.prior_precision == "marglik" else float(self.prior_precision)
        self._posterior.prior_precision = torch.tensor([found], dtype=torch.float64)
        self._precision, self._head = found, head
        draws = SampleRandom.of(self.seed, range(self.draws), f"uq/{self.name}")
        self._z = draws.normal((len(head.weight),)).double()

    def _most_likely(self) -> float:
        """The scalar prior precision of the largest marginal likelihood, by a bounded search over its logarithm."""
        from scipy.optimize import minimize_scalar

        def loss(log_precision: float) -> float:
            precision = torch.tensor([log_precision], dtype=torch.float64).exp()
            return -float(self._posterior.log_marginal_likelihood(precision))

        low, high = map(log, _PRIOR_RANGE)
        found = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)
        self._at_limit = min(found - low, high - found) < 1e-3
        return float(torch.tensor(found, dtype=torch.float64).exp())

    def _calibrate(self, seen: Observations) -> Tensor:
        return torch.cat([self._logits(*parts) for parts in self._moments(seen)])

    def _read(self, seen: Observations) -> Reading:
        logits, aleatoric, epistemic = [], [], []
        for mean, covariance in self._moments(seen):
            drawn = self._drawn(mean, covariance)
            within, total = _entropy(drawn).mean(dim=1), _entropy(_mean_log_probability(drawn))
            logits.append(self._logits(mean, covariance))
            aleatoric.append(within)
            epistemic.append((total - within).clamp_min(0))  # Jensen: negative by rounding alone
        return Reading(torch.cat(logits), torch.cat(aleatoric), torch.cat(epistemic))

    def _moments(self, seen: Observations) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean (n, K) and covariance (n, K, K) of the logits, block by block."""
        features = seen.features[PENULTIMATE].double()
        k, d = self._head.weight.shape
        eye = torch.eye(k, dtype=torch.float64)
        rows = _rows(self._head)
        for part in features.split(min(rows, max(1, _BLOCK // (self.draws * k)))):
            # The logits' derivatives with respect to the weights, row by row, and to the biases: (n, K, K d [+ K]).
            jacobian = torch.einsum("nd,jk->njkd", part, eye).reshape(len(part), k, k * d)
            if self._head.bias.any():
                jacobian = torch.cat([jacobian, eye.expand(len(part), k, k)], dim=2)
            yield self._head(part), self._posterior.functional_variance(jacobian)

    def _drawn(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """log softmax (n, draws, K) of the draws."""
        k = mean.shape[1]
        # A relative 1e-10 on the diagonal: a covariance of lower rank has no Cholesky factor.
        scale = covariance.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-100)
        jitter = 1e-10 * scale[:, None, None] * torch.eye(k, dtype=torch.float64)
        factor = torch.linalg.cholesky(covariance + jitter)
        return torch.log_softmax(mean[:, None] + torch.einsum("nkj,sj->nsk", factor, self._z), dim=2)

    def _logits(self, mean: Tensor, covariance: Tensor) -> Tensor:
        if self.link == "mc":
            return _mean_log_probability(self._drawn(mean, covariance))
        variance = covariance.diagonal(dim1=1, dim2=2)
        return torch.log_softmax(mean / torch.sqrt(1 + pi / 8 * variance), dim=1)

    def warnings(self) -> list[str]:
        if self._at_limit:
            return [f"the marginal likelihood has no maximum in {_PRIOR_RANGE}: the prior precision means nothing"]
        return []

    def summary(self) -> dict[str, float]:
        return {"prior precision": self._precision}


def _linear(head: Head) -> nn.Linear:
    k, d = head.weight.shape
    layer = nn.Linear(d, k, bias=bool(head.bias.any()), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        if layer.bias is not None:
            layer.bias.copy_(head.bias)
    return layer


def _rows(head: Head) -> int:
    """Samples whose Jacobians (K x K (d + 1) each) fit a block."""
    k, d = head.weight.shape
    return max(1, _BLOCK // (k * k * (d + 1)))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(dim=-1)


def _mean_log_probability(drawn: Tensor) -> Tensor:
    """log of the mean over draws of probabilities: (n, draws, K) to (n, K)."""
    return torch.logsumexp(drawn, dim=1) - log(drawn.shape[1])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that laplace-torch and what it imports give on every use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _package() -> Any:
    try:
        with _quiet():
            from laplace import Laplace as Theirs
    except ImportError as error:
        raise MissingExtraError(f"laplace needs the package laplace-torch: {INSTALL}") from error
    return Theirs
