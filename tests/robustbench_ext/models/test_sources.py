"""Models from elsewhere: what is read of them, what is built to the data, what is refused. Nothing is downloaded."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError, MissingExtraError, ModelError
from robustbench_ext.models import load_model
from robustbench_ext.models.adapt import Adapted
from robustbench_ext.models.wrap import Normalized

GREY, SMALL = (1, 8, 8), (3, 32, 32)


def said(loaded, *words):
    """Whether one note holds all these words."""
    return any(all(word in note for word in words) for note in loaded.notes)


# Names and options -------------------------------------------------------------------------------------------------------


def test_options_stand_behind_a_name_or_in_kwargs():
    a = load_model("torchvision:squeezenet1_1#resize=64#channels=3#dropout=0.25", shape=GREY)
    kwargs = {"resize": 64, "channels": 3, "dropout": 0.25}
    b = load_model("torchvision:squeezenet1_1", shape=GREY, kwargs=kwargs)
    assert a.fingerprint == b.fingerprint
    assert a.module.inner.classifier[0].p == 0.25
    assert said(a, "resized from 8x8 to 64x64") and said(a, "repeated 3 times")
    assert load_model("torchvision:squeezenet1_1#resize=48#channels=3", shape=GREY).fingerprint != a.fingerprint


def test_a_source_that_is_misspelt_is_answered_with_all_of_them():
    with pytest.raises(ModelError, match="Sources of models are torchvision, timm"):
        load_model("tim:resnet18")
    with pytest.raises(ModelError, match="SOURCE:NAME with one of the sources torchvision"):
        load_model("resnet18")


@pytest.mark.parametrize(
    ("options", "message"),
    [("#channels=3", "only one grey channel"), ("#resize=0", "whole number"), ("#resize=[1]", "height")],
)
def test_images_that_cannot_be_adapted(options, message):
    with pytest.raises(ConfigError, match=message):
        load_model(f"torchvision:resnet18{options}", shape=(2, 8, 8))


def test_adapting_is_differentiable_stays_in_the_box_and_commutes_with_normalisation():
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    resized = Adapted(nn.Identity(), (20, 12), 3)(x)
    assert resized.shape == (4, 3, 20, 12)
    assert bool(((resized >= 0) & (resized <= 1)).all())
    (gradient,) = torch.autograd.grad(resized.sum(), x)
    # Each of 4 x 3 x 20 x 12 outputs is a mean, whose weights sum to 1 (in float32).
    assert float(gradient.sum()) == pytest.approx(4 * 3 * 240, rel=1e-5)
    after = Normalized(nn.Identity(), [0.4] * 3, [0.2] * 3)(Adapted(nn.Identity(), (20, 12), 3)(x))
    before = Adapted(nn.Identity(), (20, 12), 3)(Normalized(nn.Identity(), [0.4], [0.2])(x))
    assert torch.allclose(after, before, atol=1e-5)  # float32 sums of a few terms of size 3
    down = Adapted(nn.Identity(), (4, 4), None)(x)
    assert torch.allclose(down.mean(), x.mean(), atol=0.05)  # antialiased: it averages, and does not pick


# torchvision -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """torchvision's published weights, without the download: the network as it is built for them."""
    from torchvision import models

    build = models.get_model
    monkeypatch.setattr(
        models,
        "get_model",
        lambda name, weights=None, **kw: build(name, num_classes=1000 if weights else kw["num_classes"]),
    )


def test_torchvision_weights_bring_their_metadata(published):
    loaded = load_model("torchvision:squeezenet1_1#weights=DEFAULT", shape=SMALL)
    assert loaded.module.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert loaded.module(torch.rand(2, *SMALL)).shape == (2, 1000)
    assert said(loaded, "normalisation mean=[0.485, 0.456, 0.406]", "224x224", "IMAGENET1K_V1")
    assert said(loaded, "made for inputs 3x224x224", "given 3x32x32", "#resize=224")
    adapted = load_model("torchvision:squeezenet1_1#weights=DEFAULT#resize=224#channels=3", shape=GREY)
    assert said(adapted, "resized from 8x8 to 224x224") and not said(adapted, "made for")
    own = load_model("torchvision:squeezenet1_1#weights=DEFAULT", shape=SMALL, mean=[0.5] * 3, std=[0.5] * 3)
    assert own.module.mean.flatten().tolist() == [0.5] * 3 and said(own, "as given, instead of")


def test_torchvision_fresh_weights_follow_data_and_seed():
    a, b = (load_model("torchvision:squeezenet1_1", shape=SMALL, num_classes=7, seed=s) for s in (0, 1))
    assert a.module(torch.rand(1, *SMALL)).shape == (1, 7) and a.fingerprint != b.fingerprint and not a.notes
    with pytest.raises(ModelError, match=r"cannot be built for inputs \(3, 28, 28\).*#resize=224"):
        load_model("torchvision:vit_b_32", shape=(3, 28, 28))


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model("small-cnn", shape=GREY)
    load_model("torchvision:squeezenet1_1", shape=SMALL)
    assert torch.equal(torch.rand(3), expected)


# timm ----------------------------------------------------------------------------------------------------------------------


def test_timm_fresh_weights_follow_the_data():
    pytest.importorskip("timm")
    loaded = load_model("timm:test_resnet.r160_in1k", shape=GREY, num_classes=7)
    assert loaded.module(torch.rand(2, *GREY)).shape == (2, 7)
    assert loaded.module.mean.flatten().tolist() == [0.5]
    assert said(loaded, "normalisation mean=[0.5], std=[0.5]", "timm's configuration of test_resnet.r160_in1k")
    assert not said(loaded, "made for")  # it was made for these
    same, other = (load_model("timm:test_resnet.r160_in1k", shape=GREY, num_classes=7, seed=s) for s in (0, 1))
    assert same.fingerprint == loaded.fingerprint != other.fingerprint
    # Its normalisation is of three different channels: none of them is that of a grey one.
    grey = load_model("timm:test_efficientnet", shape=(1, 32, 32))
    assert said(grey, "left out", "1: give mean and std") and not isinstance(grey.module, Normalized)


def test_timm_networks_of_one_size_are_built_to_the_data():
    pytest.importorskip("timm")
    loaded = load_model("timm:test_vit.r160_in1k", shape=SMALL)
    assert loaded.module(torch.rand(1, *SMALL)).shape == (1, 10) and not said(loaded, "made for")
    resized = load_model("timm:test_vit.r160_in1k#resize=48#channels=3", shape=GREY)
    assert resized.module(torch.rand(1, *GREY)).shape == (1, 10)


def test_timm_published_weights_keep_head_and_channels(monkeypatch):
    timm = pytest.importorskip("timm")
    build, asked = timm.create_model, []

    def create(name, pretrained, **kwargs):
        asked.append((pretrained, kwargs))
        return build(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    loaded = load_model("timm:test_efficientnet.r160_in1k", shape=SMALL, weights="DEFAULT")
    assert asked == [(True, {})]
    assert loaded.module.eval()(torch.rand(1, *SMALL)).shape == (1, 1000)
    assert said(loaded, "mean=[0.485, 0.456, 0.406]", "160x160") and said(loaded, "#resize=160")
    assert said(load_model("timm:test_efficientnet.r160_in1k", shape=GREY, weights="DEFAULT"), "#resize=160#channels=3")

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match=r"no route to host.*download model.safetensors of timm/test_resnet"):
        load_model("timm:test_resnet.r160_in1k", weights="pretrained")


def test_timm_weights_from_a_file(tmp_path):
    pytest.importorskip("timm")
    loaded = load_model("timm:test_resnet", shape=GREY, seed=3)
    save_file(loaded.module.inner.state_dict(), tmp_path / "w.safetensors")
    again = load_model(f"timm:test_resnet + {tmp_path / 'w.safetensors'}", shape=GREY)
    assert again.fingerprint == loaded.fingerprint != load_model("timm:test_resnet", shape=GREY).fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:test_resnt", "Did you mean 'test_resnet'.*timm.list_models"),
        ("timm:test_resnet.in21k", "unknown tag 'in21k'.*r160_in1k"),
        ("timm:hf-hub:someone/resnet", "expected a name of timm's own"),
        ("timm:test_resnet#weights=V2", r"expected a file .*test_resnet.r160_in1k"),
        ("timm:test_resnet#depth=3", "cannot be built"),
    ],
)
def test_timm_names_that_are_none(spec, message):
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=message):
        load_model(spec, shape=GREY)


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ("timm:resnet18", "timm", "timm"),
        ("hf:somewhere", "transformers", "hf"),
        ("onnx:FILE", "onnxruntime", "onnx"),
        ("robustbench:Standard", "robustbench", "robustbench"),
    ],
)
def test_a_missing_package_is_one_line(monkeypatch, tmp_path, spec, package, extra):
    (tmp_path / "x.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'robustbench-ext\[{extra}\]'$"):
        load_model(spec.replace("FILE", str(tmp_path / "x.onnx")))


# Hugging Face --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A tiny vision transformer, saved with its image processor."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "vit"
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**small, image_size=16, patch_size=8, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    processor = transformers.ViTImageProcessor(size=sides, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    processor.save_pretrained(folder)
    return folder, model, processor


def test_hf_models_get_what_their_processor_would_give_them(vit):
    folder, model, processor = vit
    loaded = load_model(f"hf:{folder}", shape=(3, 16, 16), num_classes=5)
    assert said(loaded, "mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25]", "16x16", "ViTImageProcessor")
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        theirs = model(**processor([image], return_tensors="pt")).logits
        # Read mean and std are those of the configuration to 6 digits, so inputs agree to some 1e-5 and logits of size 1 too.
        assert torch.allclose(loaded.module.eval()(x), theirs, atol=1e-4)
    small = load_model(f"hf:{folder}#resize=16#channels=3", shape=GREY)
    assert small.module(torch.rand(2, *GREY)).shape == (2, 5)
    assert said(load_model(f"hf:{folder}", shape=GREY), "made for inputs 3x16x16", "#resize=16#channels=3")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTImageProcessor", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.75] * 3}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}),
        (
            "EfficientNetImageProcessor",
            {"size": {"height": 16, "width": 16}, "rescale_offset": True, "rescale_factor": 1 / 127.5},
        ),
    ],
)
def test_hf_processors_are_read_whatever_their_options(vit, tmp_path, name, options):
    """No rescaling; BGR; an offset and a second division: each is measured, none is assumed."""
    transformers = pytest.importorskip("transformers")
    _, model, _ = vit
    model.save_pretrained(tmp_path)
    processor = getattr(transformers, name)(**options)
    processor.save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}", shape=(3, 16, 16))
    image = np.random.default_rng(2).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        given = processor([image], do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        assert torch.allclose(loaded.module.eval()(x), model(pixel_values=given).logits, atol=1e-3)
    assert said(loaded, "BGR") == (name == "MobileViTImageProcessor")


def test_hf_refuses_pickles_and_code_of_others(vit, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, model, _ = vit
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="--allow-unsafe-load"):
        load_model(f"hf:{tmp_path}", shape=(3, 16, 16))
    with pytest.raises(ModelError, match="there is no folder"):
        load_model("hf:./nowhere")
    monkeypatch.setenv("RBX_ALLOW_UNSAFE_LOAD", "1")
    loaded = load_model(f"hf:{tmp_path}", shape=(3, 16, 16))
    assert said(loaded, "no image processor", "give mean and std")
    assert loaded.module(torch.rand(1, 3, 16, 16)).shape == (1, 5)


# Programs ------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).mean(dim=(2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def _pickle(net, file):
    torch.save(net, file)


def _script(net, file):
    torch.jit.save(torch.jit.script(net), str(file))


def _export(net, file):
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(net, (torch.zeros(2, *GREY),), dynamic_shapes=({0: batch},))
    torch.export.save(program, str(file))


def _export_of_three(net, file):
    torch.export.save(torch.export.export(net, (torch.zeros(3, *GREY),)), str(file))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("source", "write"), [("pickle", _pickle), ("torchscript", _script), ("pt2", _export), ("pt2", _export_of_three)]
)
def test_programs_only_by_permission(net, tmp_path, monkeypatch, source, write):
    file = tmp_path / "model.pt2"
    write(net, file)
    with pytest.raises(
        ModelError, match=r"safetensors.*--allow-unsafe-load on the command line, or RBX_ALLOW_UNSAFE_LOAD=1"
    ):
        load_model(f"{source}:{file}", shape=GREY)
    monkeypatch.setenv("RBX_ALLOW_UNSAFE_LOAD", "1")
    loaded = load_model(f"{source}:{file}", shape=GREY)
    module = loaded.module.eval()
    x = torch.rand(7, *GREY, requires_grad=True)
    # The same operators in the same order, perhaps in other batches: rounding of logits of size 1.
    assert torch.allclose(module(x), net(x), atol=1e-5)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (module, net))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert load_model(f"{source}:{file}", shape=GREY).fingerprint == loaded.fingerprint
    assert said(loaded, "3 inputs at a time") == (write is _export_of_three)


def test_programs_that_are_something_else(net, tmp_path, monkeypatch):
    monkeypatch.setenv("RBX_ALLOW_UNSAFE_LOAD", "1")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="expected a torch.nn.Module"):
        load_model(f"pickle:{tmp_path / 'w.pt'}")
    for source in ("pt2", "torchscript"):
        (tmp_path / "nonsense").write_bytes(b"nonsense")
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_model(f"{source}:{tmp_path / 'nonsense'}")
        with pytest.raises(ModelError, match="there is no file"):
            load_model(f"{source}:nowhere.pt2")
    _export(net, tmp_path / "m.pt2")
    with pytest.raises(ModelError, match=r"exported for inputs \(1, 8, 8\)"):
        load_model(f"pt2:{tmp_path / 'm.pt2'}", shape=(3, 8, 8))
    with pytest.raises(ModelError, match="holds its own weights"):
        load_model(f"pt2:{tmp_path / 'm.pt2'}", weights="w.safetensors")
