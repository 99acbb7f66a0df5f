"""The contract, enforced; loading by every spelling; taps; fingerprints."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustbench_ext.errors import DataError, ModelError
from robustbench_ext.models import (
    Taps,
    check_images,
    check_labels,
    fingerprint_module,
    frozen_eval,
    load_model,
    logits_of,
    observe,
    wrap,
)
from robustbench_ext.models.contract import refuse_probabilities

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((torch.rand(4, 3, 8, 8) - 0.45) / 0.225, "ImageNet-normalised.*wrap"),
        ((torch.rand(4, 1, 8, 8) - 0.5) / 0.5, "look normalised.*mean="),
        (torch.rand(4, 3, 8, 8) * 255, "divide by 255"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "divide by 255"),
        (torch.rand(4, 3, 8, 8).double(), "float32"),
        (torch.rand(3, 8, 8), r"\(N, C, H, W\)"),
        (torch.full((1, 1, 8, 8), float("nan")), "NaN"),
        (torch.rand(4, 3, 8, 8) * 1e4, "expected \\[0, 1\\]"),
    ],
)
def test_inputs_outside_the_contract_are_refused(x, message):
    with pytest.raises(DataError, match=message):
        check_images(x)


def test_inputs_inside_the_contract_pass():
    for x in (torch.rand(4, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.empty(0, 1, 8, 8)):
        check_images(x)


def test_labels_out_of_range_are_refused():
    with pytest.raises(DataError, match=r"labels span 0..10, but the model has 10 outputs"):
        check_labels(torch.tensor([0, 10]), 10, 2)
    with pytest.raises(DataError, match="int64"):
        check_labels(torch.tensor([0.0, 1.0]), 10, 2)
    with pytest.raises(DataError, match="one class index per input"):
        check_labels(torch.tensor([0, 1, 2]), 10, 2)


class Output(nn.Module):
    """Returns whatever it was given."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.full((4, 3), float("nan")), "NaN or infinite logits for 4 of 4"),
        (torch.tensor([[1.0, float("inf")]] * 4), "NaN or infinite"),
        (torch.rand(4), r"expected \(4, K\)"),
        (torch.rand(4, 1), "one logit"),
        ({"logits": torch.rand(4, 3)}, "returned dict"),
    ],
)
def test_outputs_outside_the_contract_are_refused(output, message):
    with pytest.raises(ModelError, match=message):
        logits_of(Output(output), torch.rand(4, 1, 8, 8))


def test_probabilities_are_refused_and_logits_are_not():
    logits = torch.randn(8, 5)
    with pytest.raises(ModelError, match="Remove the last softmax"):
        refuse_probabilities(logits.softmax(1))
    refuse_probabilities(logits)
    refuse_probabilities(logits.log_softmax(1))


def test_frozen_eval_restores_every_module_and_parameter():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    model.train()
    model[1].eval()  # a user may have frozen one layer's statistics
    model[0].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError), frozen_eval(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        model(torch.rand(2, 1, 8, 8))
        raise RuntimeError
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wrap_normalises_once():
    inner = nn.Flatten()
    x = torch.rand(2, 3, 4, 4)
    wrapped = wrap(inner, **IMAGENET)
    mean, std = (torch.tensor(IMAGENET[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(wrapped(x), inner((x - mean) / std))
    assert wrap(inner) is inner
    with pytest.raises(ModelError, match="already"):
        wrap(wrapped, **IMAGENET)
    with pytest.raises(ModelError, match="divide by 255"):
        wrap(inner, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    with pytest.raises(ModelError, match="positive"):
        wrap(inner, mean=(0.5,), std=(0.0,))


@pytest.mark.parametrize("name", ["small-cnn", "small-resnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_reference_networks(name, shape):
    loaded = load_model(name, shape=shape, num_classes=7)
    assert loaded.module(torch.rand(3, *shape)).shape == (3, 7)
    assert load_model(name, shape=shape, num_classes=7).fingerprint == loaded.fingerprint


FACTORY = """
import torch
class Net(torch.nn.Module):
    def __init__(self, k=4):
        super().__init__()
        self.body = torch.nn.Linear(64, 16)
        self.head = torch.nn.Linear(16, k)
    def forward(self, x):
        return self.head(torch.relu(self.body(x.flatten(1))))
def build(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs)
ready = build()
wrong = 3
"""


def test_factories(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    x = torch.rand(2, 1, 8, 8)
    a = load_model("mynets.py:build", kwargs={"k": 6})
    b = load_model(f"{tmp_path}/mynets.py:Net")
    c = load_model("mynets:ready")
    assert a.module(x).shape == (2, 6)
    assert b.module(x).shape == c.module(x).shape == (2, 4)
    for spec, message in {
        "mynets:biuld": "Did you mean 'build'",
        "mynets.py:wrong": "expected a torch.nn.Module|gave int|failed with TypeError",
        "nothere.py:build": "there is no file",
        "nothere.module:build": "importing nothere.module failed",
        "small-cnm": "Did you mean 'small-cnn'",
    }.items():
        with pytest.raises(ModelError, match=message):
            load_model(spec)
    with pytest.raises(ModelError, match="failed with TypeError"):
        load_model("mynets.py:build", kwargs={"depth": 6})


def test_weights(tmp_path):
    loaded = load_model("small-cnn", shape=(1, 8, 8))
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in loaded.module.state_dict().items()}
    save_file(changed, tmp_path / "w.safetensors")
    again = load_model(f"small-cnn + {tmp_path / 'w.safetensors'}", shape=(1, 8, 8))
    assert again.fingerprint != loaded.fingerprint
    assert torch.equal(again.module.state_dict()["fc2.bias"], changed["fc2.bias"])
    with pytest.raises(ModelError, match="do not fit"):
        load_model(f"small-resnet + {tmp_path / 'w.safetensors'}", shape=(1, 8, 8))
    torch.save(nn.Linear(1, 1), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="pickled weights can run code"):
        load_model("small-cnn", weights=str(tmp_path / "w.pt"), shape=(1, 8, 8))


def test_torchvision_by_name_reads_nothing_but_names():
    loaded = load_model("torchvision:squeezenet1_1", shape=(3, 64, 64), num_classes=5)
    assert loaded.module(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(ModelError, match="Did you mean 'resnet18'"):
        load_model("torchvision:resnet81")
    with pytest.raises(ModelError, match="unknown weights"):
        load_model("torchvision:resnet18", weights="IMAGENET1K_V9")


def test_fingerprint_follows_weights_structure_and_normalisation():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    base = fingerprint_module(plain)
    assert fingerprint_module(plain) == base
    assert fingerprint_module(wrap(plain, [0.5], [0.5])) != base
    assert fingerprint_module(nn.Sequential(*plain, nn.ReLU())) != base
    with torch.no_grad():
        plain[1].weight[0, 0] += 1e-6
    assert fingerprint_module(plain) != base


@pytest.mark.parametrize("name", ["small-cnn", "small-resnet", "torchvision:resnet18"])
def test_taps_share_the_forward_pass(name):
    shape = (3, 32, 32)
    model = load_model(name, shape=shape).module.eval()
    x, y = torch.rand(5, *shape), torch.zeros(5, dtype=torch.int64)
    calls = []
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    handle = head.register_forward_hook(lambda *_: calls.append(1))
    seen = observe(model, x, y, ["penultimate"], batch_size=5)
    handle.remove()
    assert len(calls) == 1
    assert torch.allclose(seen.logits, model(x).detach(), atol=1e-5)
    assert torch.allclose(head(seen.features["penultimate"]).detach(), seen.logits, atol=1e-5)


def test_taps_by_module_name_and_pooling():
    model = load_model("small-resnet", shape=(3, 32, 32)).module.eval()
    x = torch.rand(3, 3, 32, 32)
    seen = observe(model, x, torch.zeros(3, dtype=torch.int64), ["layer2", "penultimate"])
    expected = model.layer2(model.layer1(model.stem(x))).mean((2, 3)).detach()
    assert torch.allclose(seen.features["layer2"], expected, atol=1e-6)
    with pytest.raises(ModelError, match="unknown feature tap 'layer9'"):
        Taps(model, ["layer9"])


class Untraceable(nn.Module):
    """torch.fx cannot follow control flow that depends on values."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.body(x.flatten(1)))
        return self.head(h * 2 if h.sum() > 0 else h)


def test_untraceable_models_are_read_with_hooks():
    model = Untraceable()
    x = torch.rand(4, 1, 8, 8)
    seen = observe(model, x, torch.zeros(4, dtype=torch.int64), ["penultimate", "body"])
    assert torch.allclose(model.head(seen.features["penultimate"]).detach(), seen.logits, atol=1e-6)
    assert seen.features["body"].shape == (4, 8)
    with pytest.raises(ModelError, match="unknown feature tap"):
        observe(model, x, torch.zeros(4, dtype=torch.int64), ["tail"])


def test_a_checkpoint_folder_of_another_network_is_an_error(tmp_path):
    (tmp_path / "model.json").write_text(
        json.dumps({"architecture": {"spec": "small-cnn", "shape": [1, 8, 8], "num_classes": 10}})
    )
    with pytest.raises(ModelError, match="no such file"):
        load_model(str(tmp_path))


NET = """
import torch
FACTOR = {factor}
class Base(torch.nn.Module):
    def forward(self, x):
        return {call}(x.flatten(1) * FACTOR)
class Net(Base):
    def __init__(self, roll=0):
        super().__init__()
        self.roll = roll
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(64, 4)
"""


def test_fingerprint_follows_what_a_model_computes_beside_its_weights(tmp_path):
    """Each of these changes the outputs and not one weight; each must change the key."""

    def key(factor=1, call="self.fc", **kwargs):
        (tmp_path / "net.py").write_text(NET.format(factor=factor, call=call))
        return load_model(f"{tmp_path}/net.py:Net", kwargs=kwargs).fingerprint

    base = key()
    assert key() == base
    assert key(roll=1) != base  # a plain attribute
    assert key(factor=2) != base  # a constant of the module
    assert key(call="-self.fc") != base  # a method of a base class
    module = load_model(f"{tmp_path}/net.py:Net").module
    own = fingerprint_module(module)
    handle = module.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    assert fingerprint_module(module) != own  # a hook
    handle.remove()
    assert fingerprint_module(module) == own
    module.forward = lambda x: x.flatten(1)[:, :4]
    assert fingerprint_module(module) != own  # a patched method


def test_unseeded_factories_give_the_same_weights_every_time(tmp_path):
    (tmp_path / "net.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(3, 3)\n")
    spec = f"{tmp_path}/net.py:build"
    assert load_model(spec).fingerprint == load_model(spec).fingerprint


def test_taps_read_the_very_model_that_is_evaluated():
    model = load_model("small-cnn", shape=(1, 8, 8)).module.eval()
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    model.register_forward_pre_hook(lambda m, a: (1 - a[0],))
    seen = observe(model, x, y, ["penultimate"])
    assert torch.allclose(seen.logits, model(x).detach(), atol=1e-5)
    with pytest.raises(ModelError, match="other outputs than the one to evaluate"):
        observe(model, x, y, ["relu_1"])


def test_taps_by_graph_node():
    model = load_model("small-cnn", shape=(1, 8, 8)).module.eval()
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    seen = observe(model, x, y, ["relu_3", "penultimate", "conv1"])
    assert torch.allclose(seen.features["relu_3"], seen.features["penultimate"], atol=1e-6)
    assert torch.allclose(seen.features["conv1"], model.conv1(x).mean((2, 3)).detach(), atol=1e-6)
    assert torch.allclose(seen.logits, model(x).detach(), atol=1e-5)


def test_damaged_weights_are_a_model_error(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(f"small-cnn + {tmp_path / 'w.safetensors'}", shape=(1, 8, 8))


def test_a_wrapped_model_keeps_its_mode():
    assert wrap(nn.Flatten().eval(), [0.5], [0.5]).training is False
    assert wrap(nn.Flatten().train(), [0.5], [0.5]).training is True
