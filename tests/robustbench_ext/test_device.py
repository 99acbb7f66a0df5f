"""Where models run, which numbers they compute with, and that nothing mixes devices or waits for one without need.

There is no GPU here: `second_device` stands for one. It computes on the CPU, so where both ways do the same arithmetic their
results are compared bit by bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_ext import device, publish, run_suite
from robustbench_ext.attacks import search as search_module
from robustbench_ext.attacks import threat as threat_module
from robustbench_ext.attacks.base import build_attack
from robustbench_ext.attacks.threat import Threat
from robustbench_ext.catalog import ATTACKS, REGRESSION_ATTACKS
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.evaluate import Context
from robustbench_ext.gradient_checks import check_gradients
from robustbench_ext.models import observe
from robustbench_ext.models.inference import Inference
from robustbench_ext.models.observe import PENULTIMATE
from robustbench_ext.plan import measure_speed
from robustbench_ext.preflight import preflight
from robustbench_ext.probes import scorer
from robustbench_ext.randomness import SampleRandom
from robustbench_ext.suite import load_suite, validate_suite
from tests.robustbench_ext import second_device as stand_in
from tests.robustbench_ext.second_device import DEVICE, Elsewhere, second_device

N, CLASSES, SHAPE = 12, 5, (3, 8, 8)


class Rowwise(nn.Module):
    """A network whose arithmetic for a sample does not depend on the batch: products are sums over the last axis, no gemm."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(16, 192, generator=generator) / 8)
        self.second = nn.Parameter(torch.randn(CLASSES, 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh((x.flatten(1)[:, None] * self.first).sum(-1))
        return (hidden[:, None] * self.second).sum(-1)


class Net(nn.Module):
    """Layers of every kind that attacks and probes treat specially: convolutions, batch norm, dropout, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6 * 16, CLASSES)
        self.norm.running_var.fill_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(torch.nn.functional.avg_pool2d(h, 2).flatten(1)))


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Inputs and their labels by `Rowwise`, the last one wrong."""
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1))
    y = Rowwise()(x).argmax(1)
    y[-1] = (y[-1] + 1) % CLASSES
    return x, y


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    """A second device for the length of a test."""
    with second_device() as waits:
        yield waits


# The stand-in itself -------------------------------------------------------------------------------------------------


def test_the_second_device_refuses_what_a_gpu_refuses(elsewhere):
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    assert isinstance(there + 1.0, Elsewhere)
    assert (there * 2).device == DEVICE
    assert there[torch.tensor([0, 2])].shape == (2,)  # indices may lie on the CPU
    assert torch.where(there > 0, there, 0.0).device == DEVICE
    for mix in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there > 0]):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    for read in (there.numpy, there.tolist):
        with pytest.raises((RuntimeError, TypeError)):
            read()
    assert torch.equal(there.cpu(), here)
    leaf = torch.ones(3, device=DEVICE).requires_grad_(True)
    (gradient,) = torch.autograd.grad((leaf.cpu() * torch.tensor([1.0, 2.0, 3.0])).sum(), leaf)
    assert gradient.device == DEVICE
    assert gradient.cpu().tolist() == [1.0, 2.0, 3.0]


def test_the_second_device_counts_what_is_waited_for(elsewhere):
    there = torch.arange(4.0, device=DEVICE)
    for work, waits in (
        (lambda: there.sum() > 1, 0),
        (lambda: bool(there.sum() > 1), 1),
        (lambda: float(there[0]), 1),
        (lambda: (there > 1).nonzero(), 1),
        (lambda: there[there > 1], 1),
        (lambda: there.cpu(), 1),
        (lambda: torch.ones(2).to(DEVICE), 0),
    ):
        before = elsewhere.total()
        work()
        assert elsewhere.total() - before == waits
    assert elsewhere.sent == 1


def test_a_model_that_makes_tensors_on_the_cpu_is_found(elsewhere, rows):
    class Careless(Rowwise):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.zeros(CLASSES)

    with pytest.raises(RuntimeError, match="same device"):
        build_attack("pgd", eps=0.1, steps=1)(Careless().to(DEVICE), *rows)


# Which device --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="GPU 9000", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: about.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)


def test_a_machine_without_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RBX_DEVICE", raising=False)
    assert device.current() == torch.device("cpu")
    assert device.describe() == {"device": "cpu", "deterministic": False}
    assert device.gpus() == 0
    for wanted in ("cuda", "cuda:0"):
        monkeypatch.setenv("RBX_DEVICE", wanted)
        with pytest.raises(ConfigError, match=f"'{wanted}' is not to be had. Here there is cpu.*sees no GPU"):
            device.current()
    monkeypatch.setenv("RBX_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda, cuda:NUMBER or mps"):
        device.current()


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_workers_take_turns_on_the_gpus(wanted, monkeypatch, two_gpus):
    monkeypatch.setenv("RBX_DEVICE", wanted)
    found = []
    for worker in range(4):
        monkeypatch.setenv("RBX_WORKER", str(worker))
        found.append(str(device.current()))
    assert found == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert device.gpus() == 2
    monkeypatch.setenv("RBX_WORKER", "first")
    with pytest.raises(ConfigError, match="RBX_WORKER"):
        device.current()


def test_one_gpu_by_number(monkeypatch, two_gpus):
    monkeypatch.setenv("RBX_WORKER", "0")
    monkeypatch.setenv("RBX_DEVICE", "cuda:1")
    assert str(device.current()) == "cuda:1"
    assert device.gpus() == 0  # the work is not spread over them
    said = {"device": "cuda:1", "name": "GPU 9000", "memory_gib": 80.0, "capability": "9.0", "deterministic": False}
    assert device.describe() == said
    monkeypatch.setenv("RBX_DEVICE", "cuda:2")
    with pytest.raises(ConfigError, match=r"Here there is cpu, cuda:0 \(GPU 9000\), cuda:1 \(GPU 9000\)"):
        device.current()


def test_training_agrees(monkeypatch, two_gpus):
    from defenses.runtime import Runtime

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for wanted, worker in (("auto", "1"), ("cuda", "3"), ("cuda:0", "1"), ("cpu", "1")):
        monkeypatch.setenv("RBX_DEVICE", wanted)
        monkeypatch.setenv("RBX_WORKER", worker)
        assert Runtime("auto").device == device.current()


def test_where_a_model_is():
    buffers = nn.Module()
    buffers.register_buffer("mean", torch.zeros(1, device="meta"))
    assert device.of(nn.Linear(1, 1)).type == "cpu"
    assert device.of(buffers).type == "meta"
    assert device.of(nn.ReLU(), "meta").type == "meta"


# Which numbers -------------------------------------------------------------------------------------------------------


def _tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_float32_is_float32_and_the_settings_come_back():
    before = _tf32()
    assert before[1]  # PyTorch's own default for convolutions: what this is about
    with device.settled():
        assert _tf32() == (False, False)
        with pytest.raises(ZeroDivisionError), device.float32(tf32=True):
            assert _tf32() == (True, True)
            raise ZeroDivisionError
        assert _tf32() == (False, False)
    assert _tf32() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9")
def test_the_new_names_of_the_setting_are_respected():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"  # for everything: the old names cannot be read any more
        with device.float32():
            assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee")
        assert (conv.fp32_precision, matmul.fp32_precision) == ("tf32", "tf32")
    finally:
        torch.backends.fp32_precision, matmul.fp32_precision = before, "none"


def test_attacks_and_observations_are_float32(rows):
    """A verdict at the boundary must not hang on TF32, whatever the process allows itself."""
    seen = set()

    class Watching(Rowwise):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((x.requires_grad, _tf32()))
            return super().forward(x)

    build_attack("pgd", eps=0.05, steps=2, precision="tf32")(Watching(), *rows)
    observe(Watching(), *rows)
    assert seen == {(True, (True, True)), (False, (False, False))}


def test_determinism(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("RBX_DETERMINISTIC", "0")
    with device.settled():
        assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("RBX_DETERMINISTIC", "1")
    with device.settled():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert device.describe()["deterministic"]


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, short):
    assert device.is_out_of_memory(error) is short


def test_real_shortage_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert device.is_out_of_memory(caught.value)
    device.empty_cache()


# Random draws --------------------------------------------------------------------------------------------------------


def test_draws_are_the_same_elsewhere(elsewhere, monkeypatch):
    from robustbench_ext import randomness

    ids = [f"sample {i}" for i in range(7)]
    here, there = (SampleRandom.of(4, ids, "test", where) for where in ("cpu", DEVICE))
    for step in (0, 2**33):
        assert torch.equal(here.uniform((5, 3), step=step), there.uniform((5, 3), step=step).cpu())
        assert torch.equal(here.normal((5,), step=step), there.normal((5,), step=step).cpu())
    whole = here.bits(50)
    monkeypatch.setattr(randomness, "_BLOCK", 20)
    monkeypatch.setattr(randomness, "_BLOCK_ELSEWHERE", 30)
    assert torch.equal(whole, here.bits(50))
    assert torch.equal(whole, there.bits(50).cpu())


# Attacks -------------------------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any]]] = [
    ("fgsm", {"eps": 0.02}),
    ("pgd", {"eps": 0.03, "steps": 8, "restarts": 2}),
    ("pgd", {"eps": 0.3, "norm": "L2", "steps": 8, "loss": "dlr", "target": "random"}),
    ("pgd", {"eps": 0.03, "steps": 6, "stop": "never"}),
    ("pgd", {"eps": 0.03, "steps": 4, "precision": "tf32"}),
    ("mi-fgsm", {"eps": 0.03, "steps": 8}),
    ("random-noise", {"eps": 0.1, "tries": 20}),
    ("apgd-ce", {"eps": 0.02, "steps": 10, "restarts": 2}),
    ("apgd-ce", {"eps": 0.3, "norm": "L2", "steps": 8, "stop": "never"}),
    ("apgd-dlr", {"eps": 0.02, "steps": 10}),
    ("apgd-t", {"eps": 0.02, "steps": 6, "targets": 2}),
    ("fab-t", {"eps": 0.02, "steps": 4, "targets": 2}),
    ("fab-t", {"eps": 0.3, "norm": "L2", "steps": 4, "targets": 2}),
    ("square", {"eps": 0.03, "queries": 40}),
    ("square", {"eps": 0.5, "norm": "L2", "queries": 30, "restarts": 2}),
    ("square", {"eps": 0.03, "queries": 30, "stop": "never"}),
    ("deepfool", {"steps": 5}),
    ("deepfool", {"norm": "Linf", "eps": 0.02, "stop": "broken", "steps": 3}),
    ("cw", {"steps": 10, "rounds": 2}),
    ("cw", {"steps": 10, "rounds": 2, "eps": 0.4, "stop": "broken"}),
    ("ddn", {"steps": 10}),
    ("ddn", {"steps": 16, "eps": 0.8, "stop": "broken"}),
    ("fmn", {"steps": 10}),
    ("fmn", {"steps": 10, "norm": "Linf", "eps": 0.02, "stop": "broken"}),
    ("spatial", {"tries": 12}),
    ("spatial", {"method": "grid", "angles": 3, "shifts": 3}),
    ("standard", {"eps": 0.02, "steps": 5, "targets": 2, "queries": 20}),
    ("audited", {"eps": 0.02, "steps": 4, "targets": 2, "queries": 20, "screen_steps": 2, "widening": 1.5}),
    ("adaptive", {"eps": 0.03, "steps": 6}),
    ("rand", {"eps": 0.02, "steps": 4, "draws": 2}),
]


def _id(case: Any) -> str:
    return case if isinstance(case, str) else " ".join(f"{k}={v}" for k, v in case.items() if k in ("norm", "stop"))


def test_no_attack_is_left_out():
    assert {name for name, _ in CASES} == set(ATTACKS.names()) - {"torchattacks"}


def _same(found: Any, expected: Any) -> None:
    """All that an attack says, bit by bit; passes may be more, where broken samples stay for a while."""
    for name in ("x_adv", "logits", "broken", "norms", "broken_by", "reached", "late_gain"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.device.type == "cpu"
        assert torch.equal(torch.nan_to_num(ours.float(), -7.0), torch.nan_to_num(theirs.float(), -7.0)), name
    for name, column in expected.extra.items():
        assert torch.equal(found.extra[name], column), name
    assert bool((found.forwards >= expected.forwards).all())
    assert bool((found.backwards >= expected.backwards).all())


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the fused copies of the CPU, whose rounding decides which way a search goes."""
    monkeypatch.setattr(Inference, "_make", staticmethod(lambda model, x: None))


@pytest.mark.parametrize(("name", "options"), CASES, ids=_id)
def test_attacks_do_the_same_elsewhere(name, options, rows, unfused):
    model, attack = Rowwise(), build_attack(name, **options)
    expected = attack(model, *rows, seed=2, batch_size=7)
    assert bool(expected.broken[:-1].any()), "nothing was broken: the comparison would show little"
    with second_device():
        found = attack(model.to(DEVICE), *rows, seed=2, batch_size=7)
    _same(found, expected)


@pytest.mark.parametrize(("name", "options"), CASES, ids=_id)
def test_late_looks_change_no_result(name, options, rows, unfused, monkeypatch):
    """Broken samples that stay in the batch are frozen: on the CPU too, where nothing else is different."""
    attack = build_attack(name, **options)
    expected = attack(Rowwise(), *rows, seed=2, batch_size=7)
    for patience in (3, 1000):
        monkeypatch.setattr(search_module, "patience", lambda device, patience=patience: patience)
        _same(attack(Rowwise(), *rows, seed=2, batch_size=7), expected)


def test_the_late_gain_ends_with_the_break(monkeypatch):
    """One sample breaks before the mark, one after it. Both stay in the batch, and what follows does not count."""
    x, y = torch.zeros(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64)
    # The true class's logits; the other one's are 0.4. Three submissions in vain, so that the next look is a while away.
    steps = [(0.9, 0.9, 0.9)] * 3 + [(0.0, 0.5, 0.5), (0.0, -1.0, 0.6), (-9.0, -9.0, 0.7)]

    def gains(patience: int) -> Tensor:
        monkeypatch.setattr(search_module, "patience", lambda device: patience)
        clean = torch.tensor([[1.0, 0.4]] * 3)
        random = SampleRandom.of(0, range(3), "test")
        search = search_module.Search(nn.Identity(), x, y, Threat("Linf", 0.1), random, "broken", clean)
        for number, logits in enumerate(steps):
            true = torch.tensor(logits)[search.index]
            search.submit(search.x, torch.stack([true, torch.full_like(true, 0.4)], dim=1))
            if number == 3:
                search.mark()
        return search.late_gain()

    now, late = gains(1), gains(1000)
    assert torch.equal(torch.nan_to_num(now, -1.0), torch.nan_to_num(late, -1.0))
    assert torch.isnan(now[0])
    assert float(now[1]) > 0


def test_what_broke_a_sample_is_not_asked_again(rows, monkeypatch):
    """Square gathers its breaks until a look is due; at the end they are submitted with the logits that broke them."""

    x, y = rows
    queries = 30

    class Tired(Rowwise):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            right = 100.0 * torch.nn.functional.one_hot(y[: len(x)], CLASSES)  # all but the last sample stand
            return super().forward(x) + (right if self.calls == 1 + queries else 0.0)

    attack = build_attack("square", eps=0.06, queries=queries)
    expected = attack(Rowwise(), x, y)
    monkeypatch.setattr(search_module, "patience", lambda device: 1000)
    monkeypatch.setattr(search_module.Search, "due", lambda search: False)  # no look but the last
    found = attack(Tired(), x, y)
    assert bool(expected.broken[:-1].any())
    assert torch.equal(found.broken, expected.broken)


def test_passes_of_samples_that_stay_are_counted(rows, monkeypatch):
    """On the CPU looks are immediate. Elsewhere they come after 1, 2, 4, 8 submissions, and 1 again after a find."""
    x, y = rows
    attack = build_attack("pgd", eps=0.03, steps=12)
    now = attack(Rowwise(), x, y)
    monkeypatch.setattr(search_module, "patience", lambda device: 1000)
    late = attack(Rowwise(), x, y)
    assert bool((late.forwards > now.forwards).any())
    shared = 1
    for result in (now, late):
        assert bool((result.forwards[:-1] >= result.backwards[:-1] + shared).all())
    # The model is asked for every sample of a batch: what is counted is what it was given.
    given = []

    class Counting(Rowwise):
        def forward(self, x: Tensor) -> Tensor:
            given.append(len(x))
            return super().forward(x)

    again = attack(Counting(), x, y)
    assert sum(given) == int(again.forwards.sum())


L2_CASES = [("pgd", {"norm": "L2", "eps": 0.3, "steps": 3}), ("fmn", {"steps": 3}), ("cw", {"steps": 3, "rounds": 1})]


@pytest.mark.parametrize(("name", "options"), L2_CASES, ids=_id)
def test_devices_without_float64(name, options, rows, monkeypatch):
    """Where there is none, lengths are left to the CPU; everything else of an attack on a classifier does without."""
    model, attack = Rowwise(), build_attack(name, **options)
    expected = attack(model, *rows, seed=2)
    monkeypatch.setattr(stand_in, "float64", False)
    with second_device():
        model.to(DEVICE)
        with pytest.raises(TypeError, match="no float64"):
            attack(model, *rows, seed=2)
        monkeypatch.setattr(threat_module, "has_float64", lambda where: where.type == "cpu")
        _same(attack(model, *rows, seed=2), expected)


def test_with_layers_that_are_treated_specially(rows):
    """Batch norm and convolutions have backward passes of our own; their arithmetic may depend on the batch."""
    x, _ = rows
    model = Net().eval()
    y = model(x).argmax(1)
    attack = build_attack("standard", eps=0.02, steps=5, targets=2, queries=20)
    expected = attack(model, x, y)
    assert 0 < int(expected.broken.sum()) < N
    with second_device():
        found = attack(model.to(DEVICE), x, y)
    assert torch.equal(found.broken, expected.broken)
    torch.testing.assert_close(found.x_adv, expected.x_adv, atol=1e-5, rtol=0)


def test_outputs_that_are_not_finite_are_found_later(rows):
    class Bursting(Rowwise):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (x.flatten(1).amin(1, keepdim=True) > 0)  # 0 / 0 where a pixel is black

    x, y = rows
    with second_device(), pytest.raises(ModelError, match="NaN or infinite"):
        build_attack("pgd", eps=0.5, steps=3, stop="never")(Bursting().to(DEVICE), x.clamp_min(0.01), y)


@pytest.mark.parametrize("name", REGRESSION_ATTACKS.names())
def test_attacks_on_regressors_do_the_same_elsewhere(name):
    from robustbench_ext.attacks.regression import TableBudget

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh((x[:, None] * self.weight).sum(-1)).sum(-1)

    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    budget = TableBudget(np.array([1.0, 0.5, 0.0, 2.0]), np.full(4, -9.0), np.full(4, 9.0))
    options = {"steps": 3} if name == "pgd" else {"queries": 20}
    attack, model = REGRESSION_ATTACKS.load(name)(eps=0.3, **options), Regressor()
    expected = attack(model, x, torch.zeros(9), budget, batch_size=5)
    with second_device():
        found = attack(model.to(DEVICE), x, torch.zeros(9), budget, batch_size=5)
    for column in ("x_adv", "prediction", "error_after", "forwards", "backwards"):
        assert torch.equal(getattr(found, column), getattr(expected, column)), column


# Waiting -------------------------------------------------------------------------------------------------------------


def _waits(name: str, **options: Any) -> int:
    """Waits for the device in an attack that breaks nothing."""
    x = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(1))
    model = Rowwise()
    y = model(x).argmax(1)
    with second_device() as waits:
        result = build_attack(name, eps=1e-6, **options)(model.to(DEVICE), x, y)
    assert not bool(result.broken.any())
    return waits.total()


@pytest.mark.parametrize(
    ("name", "few", "many", "more"),
    [
        ("pgd", {"steps": 4, "stop": "never"}, {"steps": 12, "stop": "never"}, 0),
        ("apgd-ce", {"steps": 4, "stop": "never"}, {"steps": 12, "stop": "never"}, 0),
        ("mi-fgsm", {"steps": 4, "stop": "never"}, {"steps": 12, "stop": "never"}, 0),
        ("adaptive", {"steps": 4}, {"steps": 12}, 0),
        ("ddn", {"norm": "L2", "steps": 4}, {"norm": "L2", "steps": 12}, 0),
        ("fmn", {"norm": "L2", "steps": 4}, {"norm": "L2", "steps": 12}, 0),
        ("pgd", {"steps": 16}, {"steps": 40}, 3),  # one look in eight submissions
        ("apgd-ce", {"steps": 16}, {"steps": 40}, 3),
        ("square", {"queries": 18}, {"queries": 42}, 3),
        ("square", {"norm": "L2", "queries": 18}, {"norm": "L2", "queries": 42}, 3),
        ("random-noise", {"tries": 16}, {"tries": 40}, 3),
        ("fab-t", {"steps": 16, "targets": 1}, {"steps": 24, "targets": 1}, 8 + 2),  # a plane a step; two submissions
    ],
    ids=lambda case: _id(case) if isinstance(case, (str, dict)) else "",
)
def test_steps_wait_for_the_device_seldom(name, few, many, more):
    assert _waits(name, **many) - _waits(name, **few) == more


def test_the_standard_ensemble_waits_seldom():
    """As its members do. What is left belongs to a member, a target or a batch, and not to a step."""
    base = _waits("standard", targets=1, steps=16, queries=18)
    assert (
        _waits("standard", targets=1, steps=24, queries=26) - base == 1 + 1 + (8 + 2) + 1
    )  # APGD-CE, -T, FAB-T, Square


# Observations and probes ---------------------------------------------------------------------------------------------


def _net_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(2))
    model = Net().eval()
    return model, x, model(x).argmax(1)


def test_observations_lie_on_the_cpu():
    model, x, y = _net_and_data()
    expected = observe(model, x, y, (PENULTIMATE, "conv"), batch_size=16)
    with second_device() as waits:
        found = observe(model.to(DEVICE), x, y, (PENULTIMATE, "conv"), batch_size=16)
    assert torch.equal(found.logits, expected.logits)
    for tap in (PENULTIMATE, "conv"):
        assert torch.equal(found.features[tap], expected.features[tap])
    # A copy of logits and of each feature a batch, and whether all was finite; nothing else.
    assert waits.total() == 3 * 3 + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: _detector("odin", eps=0.01),
        lambda: _detector("odin", eps=[0.0, 0.01], validate={"attack": "fgsm", "eps": 0.1}),
        lambda: _detector("feature-squeezing", bits=3, window=2, means=0.1),
        lambda: _detector("mahalanobis", eps=0.01),
        lambda: _detector("mahalanobis", layers=[PENULTIMATE, "conv"], eps=[0.0, 0.01], validate={"attack": "fgsm"}),
        lambda: _detector("energy", reading="delta"),
        lambda: _detector("gradnorm"),
        lambda: _detector("vim", dim=20),
        lambda: _detector("react"),
    ],
    ids=["odin", "odin tuned", "squeezing", "mahalanobis", "mahalanobis tuned", "energy", "gradnorm", "vim", "react"],
)
def test_detectors_do_the_same_elsewhere(make):
    from detectors.validation import with_attack

    model, x, y = _net_and_data()
    attack = build_attack("fgsm", eps=0.1)

    def scores(model: nn.Module) -> Tensor:
        detector = make()
        validation = None
        if detector.validate is not None:
            validation = with_attack(model, x, y, attack, np.array([str(i) for i in range(len(x))]))
        return detector.fit(model, x, y, validation=validation).score(x, batch_size=16)

    expected = scores(model)
    with second_device():
        found = scores(model.to(DEVICE))
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def _detector(name: str, **options: Any) -> Any:
    from robustbench_ext.catalog import DETECTORS

    return DETECTORS.load(name)(**options)


@pytest.mark.parametrize(
    "name", ["mc-dropout", "deep-ensemble", "bias-variance-mix", "bias-variance-mix augment", "aps"]
)
def test_estimators_do_the_same_elsewhere(name):
    from robustbench_ext.catalog import ESTIMATORS

    model, x, y = _net_and_data()
    options: dict[str, Any] = {
        "mc-dropout": {"passes": 3},
        "deep-ensemble": {"members": ["other"]},
        "bias-variance-mix": {"source": "dropout", "passes": 3},
        "bias-variance-mix augment": {"source": "augment", "passes": 3},
        "aps": {"randomised": True},
    }[name]
    other = Rowwise()

    def read(model: nn.Module, other: nn.Module) -> Any:
        estimator = ESTIMATORS.load(name.partition(" ")[0])(**options)
        if name == "deep-ensemble":
            estimator = estimator.with_members([other])
        return estimator.fit(model, x, y).predict(x, batch_size=16)

    expected = read(model, other)
    with second_device():
        found = read(model.to(DEVICE), other.to(DEVICE))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mahalanobis", "temperature"])
def test_adaptive_attacks_on_what_was_fitted_do_the_same_elsewhere(name):
    """What was fitted lies on the CPU, the model elsewhere: the gradient goes both ways."""
    from robustbench_ext.catalog import DETECTORS, ESTIMATORS

    model, x, y = _net_and_data()
    seen = observe(model, x, y, (PENULTIMATE,))
    fitted = (DETECTORS if name in DETECTORS else ESTIMATORS).load(name)().fit_observations(seen)
    attack = build_attack("adaptive", eps=0.05, steps=6, scorer=scorer(fitted))
    expected = attack(model, x, y)
    with second_device():
        found = attack(model.to(DEVICE), x, y)
    assert torch.equal(found.broken, expected.broken)
    torch.testing.assert_close(found.x_adv, expected.x_adv, rtol=0, atol=1e-6)


def test_preflight_and_plan_elsewhere(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    split = digits["test"]
    expected = preflight(model, split, n=32)
    with second_device():
        found = preflight(model.to(DEVICE), split, n=32)
        speed = measure_speed(model, split.images(slice(0, 8)), 8)
        check = check_gradients(model, *(t.to(DEVICE) for t in (split.images(slice(0, 8)), torch.arange(8))))
    assert [(c.name, c.status, c.message) for c in found] == [(c.name, c.status, c.message) for c in expected]
    assert speed.forward > 0
    assert check.name == "gradients"


def test_regressors_elsewhere():
    from robustbench_ext.data import load_dataset
    from robustbench_ext.models.observe_regressor import observe_regressor
    from robustbench_ext.models.tabular import load_regressor
    from robustbench_ext.regression_preflight import has_gradient, preflight_regressor

    data = load_dataset("diabetes")
    model = load_regressor("mlp", data).module
    x = data["test"].inputs(slice(0, 20))
    expected = observe_regressor(model, x, (PENULTIMATE,)), preflight_regressor(model, data)
    with second_device():
        model.to(DEVICE)
        found = observe_regressor(model, x, (PENULTIMATE,)), preflight_regressor(model, data)
        assert has_gradient(model, x)
    assert torch.equal(found[0].predictions, expected[0].predictions)
    assert torch.equal(found[0].features[PENULTIMATE], expected[0].features[PENULTIMATE])
    assert [(c.name, c.status) for c in found[1]] == [(c.name, c.status) for c in expected[1]]


# The engine ----------------------------------------------------------------------------------------------------------

SUITE: dict[str, Any] = {
    "schema": 1,
    "name": "elsewhere",
    "data": "digits",
    "n": 20,
    "models": [{"name": "net", "spec": "small-cnn"}, {"name": "other", "spec": "small-cnn", "mean": 0.5, "std": 0.5}],
    "conditions": [
        {"attack": "pgd", "eps": 0.05, "steps": 3},
        {"attack": "adaptive", "eps": 0.05, "steps": 2, "against": "mahalanobis"},
        {"corruption": "gaussian-noise", "severity": 1},
        {"outliers": "letters", "n": 10},
    ],
    "detectors": ["mahalanobis", "odin"],
    "uq": ["temperature", {"name": "deep-ensemble", "members": ["other"], "only": ["net"]}],
}


def test_a_suite_runs_elsewhere(tmp_path, monkeypatch):
    """Models are put there once and all that is written down is the same; only metadata names the device."""
    here = run_suite(SUITE, tmp_path / "here")
    assert not here.failures
    monkeypatch.setattr(device, "current", lambda: DEVICE)
    with second_device():
        there = run_suite(SUITE, tmp_path / "there")
    assert not there.failures
    records = sorted(file.name for file in (tmp_path / "here" / "records").glob("*.npz"))
    assert records == sorted(
        file.name for file in (tmp_path / "there" / "records").glob("*.npz")
    )  # keys name no device
    named = set()
    for name in records:
        with np.load(tmp_path / "here" / "records" / name) as a, np.load(tmp_path / "there" / "records" / name) as b:
            for column in a.files:
                if column in ("forwards", "backwards"):
                    assert (b[column] >= a[column]).all()
                elif a[column].dtype.kind == "f":
                    np.testing.assert_allclose(a[column], b[column], rtol=1e-4, atol=1e-5)
                else:
                    np.testing.assert_array_equal(a[column], b[column])
        named.add(json.loads((tmp_path / "there" / "records" / name).with_suffix(".json").read_text())["device"])
    assert named == {DEVICE.type}


def test_a_model_that_is_handed_over_stays_where_it_is(tmp_path, monkeypatch, digits):
    monkeypatch.setattr(device, "current", lambda: DEVICE)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    suite = {**SUITE, "models": [{"name": "net", "spec": "given"}], "conditions": [], "detectors": [], "uq": []}
    done = run_suite(suite, tmp_path / "run", models={"net": model})
    assert not done.failures
    assert model[1].weight.device.type == "cpu"


# Precision -----------------------------------------------------------------------------------------------------------


def _conditions(tmp_path: Any, **more: Any) -> dict[str, Any]:
    suite = {**SUITE, "detectors": ["msp"], "uq": [], **more}
    return Context(load_suite(suite), tmp_path).conditions


def test_a_suites_precision_is_for_attacks_that_follow_gradients(tmp_path):
    entries = [
        {"attack": "pgd", "eps": 0.1},
        {"attack": "pgd", "eps": 0.2, "precision": "float32"},
        {"attack": "standard", "eps": 0.1, "steps": 2, "queries": 10},
        {"attack": "square", "eps": 0.1},
        {"corruption": "gaussian-noise", "severity": 1},
    ]
    plain = _conditions(tmp_path, conditions=entries)
    rough = _conditions(tmp_path, conditions=entries, precision="bfloat16")
    changed = [label for label in plain if plain[label].spec() != rough[label].spec()]
    assert changed == ["pgd Linf 0.1", "standard Linf 0.1"]
    assert rough["standard Linf 0.1"].attack.attacks[0].precision == "bfloat16"
    # float32 is no part of a key: records from before there was the field are found again.
    assert (
        _conditions(tmp_path, conditions=entries, precision="float32")["pgd Linf 0.1"].spec()
        == plain["pgd Linf 0.1"].spec()
    )
    with pytest.raises(ConfigError, match="precision"):
        load_suite({**SUITE, "precision": "float16"})
    with pytest.raises(ConfigError, match="for attacks on classifiers"):
        _conditions(tmp_path, data="diabetes", conditions=[], detectors=[], precision="tf32")


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_verdicts_are_float32(precision, rows):
    """Gradients are rougher; what is returned as broken is broken for the model itself, with its own logits."""
    x, y = rows
    model = Net().eval()
    y = model(x).argmax(1)
    found = build_attack("pgd", eps=0.03, steps=10, precision=precision)(model, x, y)
    assert int(found.broken.sum()) > 0
    with torch.no_grad():
        own = model(found.x_adv)
    assert torch.equal(own.argmax(1) != y, found.broken)
    torch.testing.assert_close(found.logits[found.broken], own[found.broken], atol=1e-5, rtol=1e-5)


# `rbx doctor` --------------------------------------------------------------------------------------------------------


def test_doctor_names_the_device(monkeypatch, capsys, two_gpus):
    import typer

    from robustbench_ext.cli.doctor import doctor

    monkeypatch.setenv("RBX_DEVICE", "auto")
    monkeypatch.setenv("RBX_WORKER", "0")
    doctor()
    said = capsys.readouterr().out
    assert "work is done on cuda:0 (GPU 9000, 80.0 GiB, capability 9.0), one worker for each of 2 GPUs" in said
    assert "may differ by rounding" in said
    assert "fits torch" in said
    monkeypatch.setenv("RBX_DEVICE", "cuda:7")
    with pytest.raises(typer.Exit):
        doctor()
    assert "FAIL  device 'cuda:7' is not to be had" in capsys.readouterr().out


# What a run says of it ------------------------------------------------------------------------------------------------------


def test_run_json_says_what_device_a_run_was_made_on(tmp_path, monkeypatch):
    suite = {
        "schema": 1,
        "name": "s",
        "data": "digits",
        "n": 20,
        "models": [{"name": "m", "spec": "small-cnn"}],
    }
    run_suite(suite, tmp_path)
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["device"] == device.describe() == {"device": "cpu", "deterministic": False}
    assert said["computed_on"] == ["cpu"]
    before = (tmp_path / "results.json").read_bytes()
    # A machine that has not the device that was asked for can still write down what others computed.
    monkeypatch.setenv("RBX_DEVICE", "cuda:7")
    publish.write_results(*_finished(suite, tmp_path))
    said = json.loads((tmp_path / "run.json").read_text())
    assert said["device"]["device"] == "none here"
    assert "cuda:7" in said["device"]["reason"]
    assert said["computed_on"] == ["cpu"]
    assert (tmp_path / "results.json").read_bytes() == before


def _finished(suite, folder):
    context = Context(validate_suite(suite), folder)
    log = publish.RunLog()
    results, measured = publish.assemble(context, log)
    return context, results, measured, log, 0.0
