"""The papers' networks: parameter counts, the functions that they compute, initialisation, sizes, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustbench_ext.catalog import MODELS
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models import load_model, observe
from robustbench_ext.models.inference import Inference

# name: options of a small version, features before its last layer
SMALL = {
    "resnet-18": ({"width": 4}, 32),
    "preact-resnet-18": ({"width": 4}, 32),
    "wide-resnet": ({"depth": 16, "widen_factor": 2, "width": 4, "dropout": 0.3}, 32),
    "wide-resnet-34-10": ({"width": 1}, 40),
    "trades-cnn": ({"width": 8, "hidden": 20}, 20),
}
SHAPES = [(1, 28, 28), (3, 28, 28), (1, 32, 32), (3, 32, 32), (3, 64, 64)]


def small(name, shape=(3, 32, 32), num_classes=10):
    return load_model(name, shape=shape, num_classes=num_classes, kwargs=SMALL[name][0]).module


def parameters(name, channels=3, classes=10, size=32, **options):
    """The count, without drawing any weight."""
    with torch.device("meta"):
        return sum(p.numel() for p in MODELS.load(name)(channels, classes, size, **options).parameters())


def conv(inputs, outputs, kernel=3):
    return kernel * kernel * inputs * outputs


def norm(channels):
    return 2 * channels  # a scale and a shift


def linear(inputs, outputs):
    return (inputs + 1) * outputs


def test_resnet_18_count():
    total = conv(3, 64) + norm(64)
    for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += conv(inputs, outputs) + 3 * conv(outputs, outputs) + 4 * norm(outputs)
        total += conv(inputs, outputs, 1) + norm(outputs) if inputs != outputs else 0
    total += linear(512, 10)
    assert total == 11_173_962  # the published one
    assert parameters("resnet-18") == total
    assert parameters("resnet-18", size=64, classes=200) == total + 190 * 513
    assert parameters("resnet-18", channels=1) == total - 2 * conv(1, 64)


def test_preact_resnet_18_count():
    total = conv(3, 64)
    for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += conv(inputs, outputs) + 3 * conv(outputs, outputs) + norm(inputs) + 3 * norm(outputs)
        total += conv(inputs, outputs, 1) if inputs != outputs else 0
    assert total + linear(512, 10) == 11_171_146  # without the batch norm before the linear layer
    total += norm(512) + linear(512, 10)
    assert total == 11_172_170
    assert parameters("preact-resnet-18") == total


def wide_count(depth, widen, channels=3, classes=10):
    n = (depth - 4) // 6
    total = conv(channels, 16)
    for inputs, outputs in ((16, 16 * widen), (16 * widen, 32 * widen), (32 * widen, 64 * widen)):
        total += norm(inputs) + conv(inputs, outputs) + norm(outputs) + conv(outputs, outputs)
        total += conv(inputs, outputs, 1) if inputs != outputs else 0
        total += (n - 1) * 2 * (norm(outputs) + conv(outputs, outputs))
    return total + norm(64 * widen) + linear(64 * widen, classes)


def test_wide_resnet_counts():
    assert wide_count(34, 10) == 46_160_474
    assert parameters("wide-resnet-34-10") == 46_160_474
    assert parameters("wide-resnet", depth=34) == 46_160_474
    assert parameters("wide-resnet") == wide_count(28, 10) == 36_479_194  # the paper's table says 36.5M
    for depth, widen, millions in ((16, 8, 11.0), (28, 12, 52.5), (40, 4, 8.9)):
        count = parameters("wide-resnet", depth=depth, widen_factor=widen)
        assert count == wide_count(depth, widen)
        assert round(count / 1e6, 1) == millions  # the paper's table
    assert parameters("wide-resnet", depth=10, widen_factor=1, channels=1) == wide_count(10, 1, 1)


def test_trades_cnn_count():
    total = sum(conv(i, o) + o for i, o in ((1, 32), (32, 32), (32, 64), (64, 64)))
    total += linear(64 * 4 * 4, 200) + linear(200, 200) + linear(200, 10)
    assert total == 312_202
    assert parameters("trades-cnn", channels=1, size=28) == total
    assert parameters("trades-cnn", channels=1, size=32) == total + 64 * (25 - 16) * 200
    assert parameters("trades-cnn", channels=1, size=64) == total + 64 * (169 - 16) * 200
    assert parameters("trades-cnn", channels=1, size=16) == total + 64 * (1 - 16) * 200


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(name, shape):
    model = small(name, shape, 7).train()
    x = torch.rand(4, *shape, requires_grad=True)
    logits = model(x)
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 6])).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    assert bool((last.weight.grad != 0).any())


@pytest.mark.parametrize("name", SMALL)
def test_penultimate_and_determinism(name):
    shape, width = (3, 28, 28), SMALL[name][1]
    model = small(name, shape)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.normal_(last.weight, generator=torch.Generator().manual_seed(0))  # trades-cnn's is zero
    x, y = torch.rand(5, *shape), torch.arange(5)
    seen = observe(model, x, y, taps=["penultimate"], batch_size=2)
    feature = seen.features["penultimate"]
    assert feature.shape == (5, width)
    assert bool((feature >= 0).all()), "what is behind a ReLU or a mean of such"
    assert torch.allclose(F.linear(feature, last.weight, last.bias), seen.logits, atol=1e-5)
    assert len(seen.logits.unique()) == seen.logits.numel()
    assert torch.equal(observe(model, x, y, batch_size=2).logits, seen.logits)


@pytest.mark.parametrize("name", SMALL)
def test_the_fused_copy_can_be_made(name):
    model = small(name).eval().requires_grad_(False)
    assert Inference(model, torch.rand(3, 3, 32, 32)).fused


@pytest.mark.parametrize(
    ("name", "random"), [("wide-resnet", True), ("wide-resnet-34-10", False), ("trades-cnn", True)]
)
def test_dropout_is_random_in_training_mode_only(name, random):
    model = small(name)
    nn.init.normal_([m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight)
    x = torch.rand(4, 3, 32, 32)
    model.train()
    assert torch.equal(model(x), model(x)) != random
    model.eval()
    assert torch.equal(model(x), model(x))


def disturbed(model):
    """Batch norms as after training: nothing in them is 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(0, 0.2, generator=generator)
    return model.eval()


@torch.no_grad()
def test_resnet_18_is_torchvisions_with_another_stem():
    from torchvision.models import resnet18

    loaded = load_model("resnet-18", shape=(3, 32, 32))
    assert loaded.fingerprint == load_model("resnet-18", shape=(3, 32, 32)).fingerprint
    model = disturbed(loaded.module)
    other = resnet18(num_classes=10)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    state = {k.replace("shortcut", "downsample").replace("linear", "fc"): v for k, v in model.state_dict().items()}
    other.load_state_dict(state)
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(other.eval()(x), model(x), rtol=1e-4, atol=1e-4)


def written_out(state, x, stages, shortcut, final, last, blocks):
    """A pre-activation residual network, from its weights alone."""

    def active(x, name):
        moments = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.relu(F.batch_norm(x, *moments, state[f"{name}.weight"], state[f"{name}.bias"]))

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for number, stage in enumerate(stages):
        for block in range(blocks):
            at, stride = f"{stage}.{block}", 2 if number and not block else 1
            inner = active(x, f"{at}.bn1")
            out = F.conv2d(inner, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(active(out, f"{at}.bn2"), state[f"{at}.conv2.weight"], padding=1)
            project = state.get(f"{at}.{shortcut}.weight")
            x = out + (x if project is None else F.conv2d(inner, project, stride=stride))
    return F.linear(active(x, final).mean(dim=(2, 3)), state[f"{last}.weight"], state[f"{last}.bias"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("preact-resnet-18", ([f"layer{i}" for i in (1, 2, 3, 4)], "shortcut.0", "bn", "linear", 2)),
        ("wide-resnet", ([f"block{i}.layer" for i in (1, 2, 3)], "convShortcut", "bn1", "fc", 2)),
        ("wide-resnet-34-10", ([f"block{i}.layer" for i in (1, 2, 3)], "convShortcut", "bn1", "fc", 5)),
    ],
)
def test_preactivation_networks_written_out(name, layout):
    model = disturbed(small(name)).double()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(model(x), written_out(model.state_dict(), x, *layout), rtol=1e-10, atol=1e-10)


def test_published_layer_names():
    """Layers that papers name."""
    for name, layers in {
        "resnet-18": ("layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv1"),
        "wide-resnet-34-10": ("block1.layer.3.conv2", "block1.layer.2.conv2"),
        "trades-cnn": ("feature_extractor.conv4", "classifier.fc3"),
    }.items():
        assert set(layers) <= {n for n, _ in small(name).named_modules()}


@pytest.mark.parametrize("name", SMALL)
def test_fresh_weights_do_not_depend_on_the_generator(name):
    torch.manual_seed(1)
    first = small(name).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(v, first[k]) for k, v in small(name).state_dict().items())


def reset(model):
    """New weights of every layer, as a training with another seed draws them."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    return model


@pytest.mark.parametrize("change", [lambda m: m, reset], ids=["fresh", "reset"])
def test_initialisation(change):
    model = change(load_model("trades-cnn", shape=(1, 28, 28)).module)
    assert not model.classifier.fc3.weight.any()
    assert not model.classifier.fc3.bias.any()
    assert not model(torch.rand(2, 1, 28, 28)).any()
    wide = change(load_model("wide-resnet", shape=(3, 32, 32), kwargs={"depth": 10, "widen_factor": 4}).module)
    assert not wide.fc.bias.any()
    for conv2d, fan in (
        (model.feature_extractor.conv4, 9 * 64),  # inputs
        (wide.block2.layer[0].conv1, 9 * 128),  # outputs; it has 64 inputs
    ):
        n = conv2d.weight.numel()
        spread = conv2d.weight.detach().double().square().mean() * fan / 2  # a chi-square over its degrees of freedom
        assert abs(float(spread) - 1) <= 4 * (2 / n) ** 0.5
    assert not model.feature_extractor.conv4.bias.any()


@pytest.mark.parametrize("name", ["resnet-18", "preact-resnet-18", "wide-resnet"])
def test_stem_stride(name):
    build, options = MODELS.load(name), SMALL[name][0]
    maps = []
    for stride in (1, 2):
        model = build(3, 10, 64, **options, stem_stride=stride).eval()
        last = model.layer4 if hasattr(model, "layer4") else model.block3
        last.register_forward_hook(lambda _, __, out: maps.append(out.shape[-1]))
        assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    assert maps == ([16, 8] if name == "wide-resnet" else [8, 4])


@pytest.mark.parametrize(
    ("name", "size", "options", "error", "message"),
    [
        ("resnet-18", 7, {}, ModelError, "resnet-18 needs inputs of at least 8x8, not 7x7"),
        ("preact-resnet-18", 8, {"stem_stride": 2}, ModelError, "at least 16x16"),
        ("wide-resnet-34-10", 3, {}, ModelError, "wide-resnet-34-10 needs inputs of at least 4x4"),
        ("trades-cnn", 15, {}, ModelError, "trades-cnn needs inputs of at least 16x16"),
        ("resnet-18", 32, {"width": 0}, ConfigError, "resnet-18: width = 0, expected a whole number >= 1"),
        ("wide-resnet", 32, {"depth": 32}, ConfigError, "depth = 32, expected 6 n \\+ 4"),
        ("wide-resnet", 32, {"depth": 4}, ConfigError, "expected a whole number >= 10"),
        ("wide-resnet", 32, {"widen_factor": 1.5}, ConfigError, "widen_factor = 1.5, expected a whole number"),
        ("wide-resnet", 32, {"dropout": 1}, ConfigError, "dropout = 1, expected a share in"),
        ("trades-cnn", 28, {"hidden": "many"}, ConfigError, "hidden: got 'many'"),
    ],
)
def test_what_cannot_work_is_refused(name, size, options, error, message):
    with pytest.raises(error, match=message):
        load_model(name, shape=(3, size, size), kwargs=options)


@pytest.mark.parametrize(("name", "size"), [("resnet-18", 8), ("wide-resnet", 4), ("trades-cnn", 16)])
def test_the_smallest_size_works(name, size):
    model = small(name, (1, size, size)).eval()
    assert model(torch.rand(2, 1, size, size)).shape == (2, 10)
