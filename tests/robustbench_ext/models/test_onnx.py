"""ONNX graphs: with gradients where that is faithful, as a black box elsewhere, and always with a reason."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.models import load_model
from robustbench_ext.models.black_box import is_black_box
from robustbench_ext.reach import lacks

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
onnx2torch = pytest.importorskip("onnx2torch")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SHAPE = (1, 8, 8)
_DRAWS = np.random.default_rng(0)
KERNEL = _DRAWS.normal(size=(4, 1, 3, 3)).astype(np.float32)
HEAD = _DRAWS.normal(size=(4, 10)).astype(np.float32)


def reference(x, sharp=1.0):
    """What the graph below computes."""
    maps = F.relu(F.conv2d(x, torch.from_numpy(KERNEL)))
    return sharp * maps.mean(dim=(2, 3)) @ torch.from_numpy(HEAD)


def write(file, batch="n", before=(), after=(), shape=SHAPE, outputs=("logits",)):
    """Convolution, ReLU, global mean, linear layer; `before` and `after` are operators in front of it and behind it."""
    nodes, x, shapes = [], "x", (1,)
    for number, (operator, attributes) in enumerate(before):
        inputs = [x, "shape"] if operator == "Reshape" else [x]
        shapes = attributes.pop("shape", (1,)) if operator == "Reshape" else (1,)
        nodes.append(helper.make_node(operator, inputs, [f"b{number}"], **attributes))
        x = f"b{number}"
    nodes += [
        helper.make_node("Conv", [x, "kernel"], ["maps"]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["a"]),
    ]
    z = "a"
    for number, (operator, attributes) in enumerate(after):
        nodes.append(helper.make_node(operator, [z], [f"a{number}"], **attributes))
        z = f"a{number}"
    nodes.append(helper.make_node("Identity", [z], ["logits"]))
    told = [helper.make_tensor_value_info(o, TensorProto.FLOAT, [batch, 4 if o == "flat" else 10]) for o in outputs]
    weights = [numpy_helper.from_array(KERNEL, "kernel"), numpy_helper.from_array(HEAD, "head")]
    weights.append(numpy_helper.from_array(np.array(shapes, dtype=np.int64), "shape"))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])]
    graph = helper.make_graph(nodes, "net", given, told, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(file))
    return f"onnx:{file}"


def note(loaded, words):
    return any(words in text for text in loaded.notes)


@pytest.mark.parametrize(("batch", "fixed"), [("n", False), (3, False), (3, True)])
def test_a_graph_that_converts_has_gradients(tmp_path, batch, fixed):
    """A batch size that only the input's shape names is let go; one that the graph needs is kept."""
    needs = [("Reshape", {"shape": (3, 1, 8, 8)})] if fixed else []
    loaded = load_model(write(tmp_path / "net.onnx", batch, before=needs), shape=SHAPE)
    assert not is_black_box(loaded.module) and note(loaded, "converted by onnx2torch, with gradients")
    assert note(loaded, "takes 3 inputs at a time") == fixed
    assert lacks(loaded.module) == ({"features", "penultimate"} if fixed else {"penultimate"})  # it ends in a MatMul
    x = torch.rand(7, *SHAPE, requires_grad=True)
    out = loaded.module.eval()(x)
    assert torch.allclose(out, reference(x), atol=1e-5)  # sums of 36 and 4 terms of size 1 in float32
    ours, theirs = (torch.autograd.grad(z.square().sum(), x)[0] for z in (loaded.module(x), reference(x)))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_graph_with_an_unknown_operator_is_a_black_box(tmp_path):
    loaded = load_model(write(tmp_path / "net.onnx", 3, after=[("Hardmax", {"axis": 1})]), shape=SHAPE)
    assert is_black_box(loaded.module) and note(loaded, "black box, since onnx2torch cannot convert it")
    x = torch.rand(7, *SHAPE, requires_grad=True)
    out = loaded.module(x)
    assert torch.equal(out.argmax(1), reference(x).argmax(1)) and bool((out.sum(1) == 1).all())
    assert not out.requires_grad


def test_a_conversion_that_differs_is_refused(tmp_path, monkeypatch):
    convert = onnx2torch.convert

    class Wrong(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 1.01

    monkeypatch.setattr(onnx2torch, "convert", lambda file: Wrong(convert(file)))
    loaded = load_model(write(tmp_path / "net.onnx"), shape=SHAPE)
    assert is_black_box(loaded.module) and note(loaded, "the conversion differs from onnxruntime by")
    x = torch.rand(5, *SHAPE)
    assert torch.allclose(loaded.module(x), reference(x), atol=1e-5)


def test_a_graph_without_a_gradient_is_a_black_box(tmp_path):
    loaded = load_model(write(tmp_path / "net.onnx", before=[("Round", {})]), shape=SHAPE)
    assert is_black_box(loaded.module) and note(loaded, "its gradient is zero everywhere")


def test_channels_last_and_flat_inputs(tmp_path):
    last = write(tmp_path / "last.onnx", before=[("Transpose", {"perm": [0, 3, 1, 2]})], shape=(8, 8, 1))
    x = torch.rand(4, *SHAPE)
    loaded = load_model(last, shape=SHAPE)
    assert note(loaded, "given as (n, H, W, C)")
    assert torch.allclose(loaded.module.eval()(x), reference(x), atol=1e-5)
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])]
    told = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, 10])]
    matrix = _DRAWS.normal(size=(64, 10)).astype(np.float32)
    weights = [numpy_helper.from_array(matrix, "w"), numpy_helper.from_array(np.zeros(10, np.float32), "b")]
    graph = helper.make_graph([helper.make_node("Gemm", ["x", "w", "b"], ["z"])], "flat", given, told, weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(tmp_path / "f.onnx")
    )
    loaded = load_model(f"onnx:{tmp_path / 'f.onnx'}", shape=SHAPE)
    assert note(loaded, "given as (n, C H W)")
    assert torch.allclose(loaded.module.eval()(x), x.flatten(1) @ torch.from_numpy(matrix), atol=1e-5)


def test_probabilities_and_outputs_by_name(tmp_path):
    x = torch.rand(4, *SHAPE)
    spec = write(tmp_path / "p.onnx", after=[("Softmax", {"axis": 1})])
    loaded = load_model(f"{spec}#probabilities=true", shape=SHAPE)
    expected = reference(x).softmax(1).clamp_min(1e-6).log()
    assert torch.allclose(loaded.module.eval()(x), expected, atol=1e-4) and note(loaded, "log(max(p, 1e-06))")
    two = write(tmp_path / "two.onnx", outputs=("flat", "logits"))
    assert load_model(two, shape=SHAPE).module.eval()(x).shape == (4, 4)
    assert torch.allclose(load_model(f"{two}#output=logits", shape=SHAPE).module.eval()(x), reference(x), atol=1e-5)
    with pytest.raises(ConfigError, match="Did you mean 'logits'"):
        load_model(f"{two}#output=logit", shape=SHAPE)


def test_graphs_that_do_not_fit(tmp_path):
    spec = write(tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=r"takes inputs \['n', 1, 8, 8\], and is given \(N, 1, 28, 28\).*#resize"):
        load_model(spec, shape=(1, 28, 28))
    assert load_model(f"{spec}#resize=8", shape=(1, 28, 28)).module.eval()(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    (tmp_path / "no.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="no graph that onnxruntime can run"):
        load_model(f"onnx:{tmp_path / 'no.onnx'}")
    with pytest.raises(ModelError, match="there is no file"):
        load_model("onnx:nowhere.onnx")


def test_the_key_is_the_file(tmp_path):
    first = load_model(write(tmp_path / "net.onnx"), shape=SHAPE).fingerprint
    assert load_model(write(tmp_path / "net.onnx"), shape=SHAPE).fingerprint == first
    assert load_model(write(tmp_path / "net.onnx", 3), shape=SHAPE).fingerprint != first
    black = write(tmp_path / "net.onnx", after=[("Hardmax", {"axis": 1})])
    assert load_model(black, shape=SHAPE).fingerprint == load_model(black, shape=SHAPE).fingerprint != first
