"""Last-layer Laplace: laplace-torch's own predictions, an independent posterior, what the parts say."""

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from robustbench_ext.errors import ConfigError, MissingExtraError, ModelError
from robustbench_ext.models import Observations, observe
from robustbench_ext.models.networks import small_cnn

pytest.importorskip("laplace")
from laplace import Laplace as Theirs

from uq import Laplace

pytestmark = pytest.mark.filterwarnings("ignore")
TAP = "penultimate"


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.hidden = nn.Linear(9, 12)
        self.last = nn.Linear(12, 3, bias=bias)

    def forward(self, x):
        return self.last(torch.relu(self.hidden(x.flatten(1))))


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def trained(request):
    """A network with mistakes on its own data, and that data."""
    torch.manual_seed(0)
    net = Net(request.param)
    x = torch.rand(300, 1, 3, 3)
    y = (3 * (0.8 * x[:, 0, 0, 0] + 0.2 * torch.rand(300))).long().clamp(0, 2)
    optimiser = torch.optim.Adam(net.parameters(), 0.03, weight_decay=1e-3)
    for _ in range(200):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval(), x, y


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_probabilities_are_those_of_laplace_torch(trained, structure):
    """Run by itself on the whole network, with its own prior: 100 steps of Adam on the marginal likelihood."""
    net, x, y = trained
    double = deepcopy(net).double()
    theirs = Theirs(double, "classification", subset_of_weights="last_layer", hessian_structure=structure)
    theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.double(), y), batch_size=300))
    theirs.optimize_prior_precision(method="marglik")
    ours = Laplace(structure).fit(net, x, y)
    found = ours.summary()["prior precision"]
    # A scalar near its optimum, where the likelihood is flat to second order; Adam with rate 0.1 ends within a few per cent.
    assert found == pytest.approx(float(theirs.prior_precision), rel=0.05)
    theirs.prior_precision = torch.tensor([found], dtype=torch.float64)
    fresh = torch.rand(50, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    # Ours starts from float32 features (relative 6e-8 of numbers below 10), theirs from float64 ones.
    torch.testing.assert_close(
        ours.predict(fresh).logits.exp(), theirs(fresh.double(), link_approx="probit"), rtol=0, atol=2e-6
    )
    p = Laplace(structure, found, link="mc", draws=4000).fit(net, x, y).predict(fresh).logits.exp()
    drawn = theirs(fresh.double(), link_approx="mc", n_samples=4000)
    # Two Monte-Carlo means of numbers in [0, 1] with standard deviations of at most 0.3: 5 sigma.
    torch.testing.assert_close(p, drawn, rtol=0, atol=5 * 0.3 * (2 / 4000) ** 0.5)


def gauss_newton(net, features):
    """sum over samples of J^T (diag p - p p^T) J by its definition, and J, with weights row by row and then biases."""
    with torch.no_grad():
        p = net.last(features.float()).double().softmax(1)
    eye = torch.eye(3, dtype=torch.float64)
    parts = [torch.kron(eye, f[None]) for f in features.double()]
    if net.last.bias is not None:
        parts = [torch.cat([j, eye], dim=1) for j in parts]
    j = torch.stack(parts)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("nka,nkl,nlb->ab", j, curvature, j), j


def test_the_posterior_and_its_prior_are_what_the_formulas_say(trained):
    net, x, y = trained
    seen = observe(net, x, y, taps=[TAP])
    ours = Laplace("full", draws=50_000).fit_observations(seen, model=net)
    precision = ours.summary()["prior precision"]
    hessian, j = gauss_newton(net, seen.features[TAP])
    weights = torch.cat([p.flatten() for p in net.last.parameters()]).double()
    one = torch.eye(len(hessian), dtype=torch.float64)

    def evidence(a):  # log p(D | a) up to a constant: MacKay 1992
        fit = -0.5 * a * weights.square().sum() - 0.5 * torch.logdet(hessian + a * one)
        return float(fit + 0.5 * len(hessian) * torch.log(torch.tensor(a)))

    assert evidence(precision) > max(evidence(1.02 * precision), evidence(precision / 1.02))
    few = j[:20]
    covariance = few @ torch.linalg.inv(hessian + precision * one) @ few.mT
    mean = seen.logits[:20].double()
    spread = 1 + torch.pi / 8 * covariance.diagonal(dim1=1, dim2=2)
    reading = ours.read(Observations(seen.logits[:20], y[:20], {TAP: seen.features[TAP][:20]}))
    torch.testing.assert_close(reading.logits, (mean / spread.sqrt()).log_softmax(1), rtol=0, atol=1e-4)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50_000, 3, generator=g, dtype=torch.float64)
    p = (mean[:, None] + torch.einsum("nij,sj->nsi", torch.linalg.cholesky(covariance), z)).softmax(2)
    entropy = torch.special.entr
    aleatoric = entropy(p).sum(2).mean(1)
    epistemic = entropy(p.mean(1)).sum(1) - aleatoric
    # Monte-Carlo error of 50,000 draws of numbers in [0, log 3], twice: 5 sigma with a deviation of 0.3.
    torch.testing.assert_close(reading.aleatoric, aleatoric, rtol=0, atol=0.01)
    torch.testing.assert_close(reading.epistemic, epistemic, rtol=0, atol=0.01)


def test_the_parts_add_up_and_a_strong_prior_leaves_the_model_alone(trained):
    net, x, y = trained
    reading = Laplace(link="mc").fit(net, x, y).predict(x[:40])
    total = torch.special.entr(reading.logits.exp()).sum(1)
    torch.testing.assert_close(reading.aleatoric + reading.epistemic, total, rtol=0, atol=1e-12)
    torch.testing.assert_close(reading.logits.exp().sum(1), torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (reading.epistemic > 0).all()
    sure = Laplace(prior_precision=1e12).fit(net, x, y).predict(x[:40])
    with torch.no_grad():
        own = net(x[:40]).double().log_softmax(1)
    torch.testing.assert_close(sure.logits, own, rtol=0, atol=1e-5)
    assert float(sure.epistemic.max()) < 1e-8


def toy():
    """Three classes of 2-d features about the corners of a triangle, and the linear layer that tells them apart."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    angle = 2 * torch.pi * y / 3
    f = torch.stack([angle.cos(), angle.sin()], 1) + 0.5 * torch.randn(300, 2, generator=g)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(f), y)
        loss.backward()
        return loss

    optimiser.step(closure)
    return model, f, y


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_epistemic_uncertainty_grows_away_from_the_data(structure):
    model, f, y = toy()

    def seen(f, y):
        with torch.no_grad():
            return Observations(model(f), y, {TAP: f})

    ours = Laplace(structure).fit_observations(seen(f, y), model=model)
    circle = 2 * torch.pi * torch.arange(60) / 60
    ring = torch.stack([circle.cos(), circle.sin()], 1)
    means = [float(ours.read(seen(r * ring, y[:60])).epistemic.mean()) for r in (1, 2, 4, 8)]
    assert means == sorted(means)
    # Between two classes, where more of the same distance leaves the prediction undecided, it grows by far.
    between = torch.tensor([[0.5, 3**0.5 / 2]])
    near, far = (float(ours.read(seen(r * between, y[:1])).epistemic) for r in (1, 8))
    assert far > 5 * near


def test_readings_depend_on_the_sample_alone(trained, monkeypatch):
    net, x, y = trained
    ours = Laplace(link="mc").fit(net, x, y)
    whole = ours.predict(x[:30])
    again = Laplace(link="mc").fit(net, x, y).predict(x[:30].flip(0))
    monkeypatch.setattr("uq.laplace._BLOCK", 3000)  # a few samples a block
    parts = ours.predict(x[:30])
    for what in ("logits", "aleatoric", "epistemic"):
        # Sums of another order: relative 1e-12 of numbers below 10.
        torch.testing.assert_close(getattr(whole, what), getattr(again, what).flip(0), rtol=0, atol=1e-9)
        torch.testing.assert_close(getattr(whole, what), getattr(parts, what), rtol=0, atol=1e-9)


def test_attacks_can_follow_its_gradient(trained):
    net, x, y = trained
    ours = Laplace().fit(net, x, y)
    features = torch.rand(2, 12, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(2, 3)
    assert torch.autograd.gradcheck(lambda f: ours.calibrate(Observations(none, y[:2], {TAP: f})), (features,))


def test_faults(trained, monkeypatch):
    net, x, y = trained
    with pytest.raises(ModelError, match="linear last layer"):
        Laplace().fit(small_cnn(1, 3, 8, cosine_head=True).eval(), torch.rand(20, 1, 8, 8), y[:20])
    with pytest.raises(ConfigError, match="fit_observations"):
        Laplace().fit_observations(observe(net, x, y, taps=[TAP]))
    for wrong in ({"structure": "block"}, {"link": "bridge"}, {"prior_precision": 0}, {"draws": 1}, {"draws": 2.5}):
        with pytest.raises(ConfigError):
            Laplace(**wrong)
    assert Laplace.fit_on == "train"
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        Laplace()
