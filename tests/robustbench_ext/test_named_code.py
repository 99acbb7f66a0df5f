"""Code of a user's own by name: what a file finds beside it, what stays apart, what enters keys, and how names are split."""

import importlib
import inspect
import sys

import pytest
import torch

from robustbench_ext.catalog import ATTACKS
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import ConfigError, ModelError
from robustbench_ext.gate.collect import _beside
from robustbench_ext.models import load_model
from robustbench_ext.named_code import load_named, sources, split_named, split_source
from robustbench_ext.own import is_own
from robustbench_ext.suite import load_suite
from tests.robustbench_ext.test_own import ATTACK

NET = """
import blocks
from parts.heads import head
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        from late import shift  # when it is called, not when the file is read
        return blocks.scale(self.inner(x)) + shift()

def build():
    net = Net()
    nn.init.constant_(net.inner[1].weight, 0.1)
    nn.init.zeros_(net.inner[1].bias)
    return net
"""
BESIDE = {
    "blocks.py": "from parts import heads\nFACTOR = {factor}\ndef scale(x):\n    return FACTOR * x + heads.head()\n",
    "parts/__init__.py": "",
    "parts/heads.py": "from .zero import nothing\ndef head():\n    return nothing()\n",
    "parts/zero.py": "import random  # the standard library's, although there is a file of that name\n"
    "assert hasattr(random, 'Random')\ndef nothing():\n    return 0.0\n",
    "random.py": "raise RuntimeError('never imported')\n",
    "late.py": "def shift():\n    return 0.0\n",
}


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """Two folders with files of the same names; the working directory is neither."""
    for name, factor in (("a", 1.0), ("b", 2.0)):
        for file, text in {"net.py": NET, **BESIDE}.items():
            place = tmp_path / name / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text.replace("{factor}", str(factor)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def outputs(spec):
    loaded = load_model(spec, shape=(1, 8, 8))
    with torch.no_grad():
        return float(loaded.module(torch.ones(1, 1, 8, 8))[0, 0]), loaded.fingerprint


# Beside -----------------------------------------------------------------------------------------------------------------


def test_a_model_imports_modules_beside_it_and_two_folders_stay_apart(nets):
    path, before = list(sys.path), set(sys.modules)
    one, other = outputs(f"{nets}/a/net.py:build"), outputs(f"{nets}/b/net.py:build")
    # 64 ones times 0.1: float32 sums differ from that by rounding of some 1e-6.
    assert one[0] == pytest.approx(6.4, abs=1e-4)
    assert other[0] == pytest.approx(12.8, abs=1e-4)
    assert one[1] != other[1]
    assert outputs(f"{nets}/a/net.py:build") == one  # after the other one, and its late import still finds its own
    new = set(sys.modules) - before
    assert not {"blocks", "parts", "late", "net"} & new
    assert sys.path == path


def test_a_file_that_shares_a_name_with_a_package_may_import_it(tmp_path):
    (tmp_path / "safetensors.py").write_text("import safetensors\nwhere = safetensors.__file__\n")
    assert "site-packages" in load_named(f"{tmp_path}/safetensors.py:where", "thing")


def test_our_packages_are_not_hidden(tmp_path):
    (tmp_path / "uq.py").write_text("from uq.base import Estimator\nmine = Estimator\n")
    (tmp_path / "detectors.py").write_text("raise RuntimeError\n")
    (tmp_path / "f.py").write_text("import detectors.base, uq.base\nfrom detectors import energy\n")
    assert load_named(f"{tmp_path}/uq.py:mine", "thing").__module__ == "uq.base"
    assert load_named(f"{tmp_path}/f.py:energy", "thing").__name__ == "detectors.energy"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("from parts import zero\nx = zero.nothing()\n", 0.0),
        ("import parts.zero as zero\nx = zero.nothing()\n", 0.0),
        ("import parts.zero\nx = parts.zero.nothing()\n", 0.0),
        ("from .parts.zero import nothing\nx = nothing()\n", 0.0),
        ("from plain.inner import x\n", 5),
        ("import blocks, other\nx = other.blocks is blocks\n", True),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    y: 'int' = 3\nx = A().y\n", 3),
    ],
)
def test_every_way_to_import(nets, text, value):
    (nets / "a" / "plain").mkdir()
    (nets / "a" / "plain" / "inner.py").write_text("x = 5\n")  # a folder without __init__.py
    (nets / "a" / "other.py").write_text("import blocks\n")
    (nets / "a" / "f.py").write_text(text)
    assert load_named(f"{nets}/a/f.py:x", "thing") == value


def test_methods_of_ones_own_import_what_is_beside_them(nets):
    (nets / "a" / "mine.py").write_text(ATTACK.replace("size: float = 1.0", "size: float = blocks.FACTOR"))
    (nets / "a" / "mine.py").write_text("import blocks\n" + (nets / "a" / "mine.py").read_text())
    assert ATTACKS.load(f"{nets}/a/mine.py:Mine")(eps=0.1).size == 1.0


# Keys -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edited", ["net.py", "blocks.py", "parts/zero.py", "late.py"])
def test_an_edited_neighbour_is_read_again_and_makes_another_model(nets, edited):
    first = outputs(f"{nets}/a/net.py:build")
    file = nets / "a" / edited
    text = file.read_text()
    file.write_text(
        text.replace("0.0", "1.0")
        .replace("FACTOR = 1.0", "FACTOR = 3.0")
        .replace("(net.inner[1].weight, 0.1)", "(net.inner[1].weight, 0.2)")
    )
    assert file.stat().st_size == len(text)  # neither size nor date says that it changed
    second = outputs(f"{nets}/a/net.py:build")
    assert second[1] != first[1]
    assert second[0] != first[0]
    file.write_text(text)
    assert outputs(f"{nets}/a/net.py:build") == first
    (nets / "a" / "random.py").write_text("1 / 0\n")  # what nobody imports is no part of it
    assert outputs(f"{nets}/a/net.py:build")[1] == first[1]


def test_an_edited_neighbour_of_a_method_changes_its_version(nets):
    (nets / "a" / "mine.py").write_text("from blocks import FACTOR\n" + ATTACK)
    first = ATTACKS.load(f"{nets}/a/mine.py:Mine").version
    (nets / "a" / "parts" / "heads.py").write_text(BESIDE["parts/heads.py"] + "# edited\n")
    assert ATTACKS.load(f"{nets}/a/mine.py:Mine").version != first


def test_what_is_followed(nets):
    found = [path.relative_to(nets / "a").as_posix() for path in sources(nets / "a" / "net.py")]
    assert found == ["blocks.py", "late.py", "net.py", "parts/__init__.py", "parts/heads.py", "parts/zero.py"]


def test_a_model_without_neighbours_keeps_its_fingerprint(tmp_path):
    """As it was before neighbours were followed: the class's file and nothing else."""
    import hashlib

    from robustbench_ext.fingerprint import canonical_json
    from robustbench_ext.models.fingerprints import fingerprint_module

    (tmp_path / "plain.py").write_text("from torch import nn\nclass Net(nn.Module):\n    pass\n")
    module = load_named(f"{tmp_path}/plain.py:Net", "model")()
    digest = hashlib.sha256(repr(module).encode())
    digest.update(b"|Net|[]")
    digest.update(hashlib.sha256((tmp_path / "plain.py").read_bytes()).digest())
    digest.update(canonical_json({}).encode())
    assert fingerprint_module(module, {}) == digest.hexdigest()[:20]


def test_source_can_be_shown(nets):
    """Tracebacks, `inspect` and TorchScript look for a class's module by its name."""
    module = load_model(f"{nets}/a/net.py:build", shape=(1, 8, 8)).module
    assert inspect.getsource(type(module)).startswith("class Net")
    assert importlib.import_module(type(module).__module__).Net is type(module)


# Errors -----------------------------------------------------------------------------------------------------------------


def test_what_failed_is_read_again_when_it_is_mended(nets):
    (nets / "a" / "blocks.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"importing .*net.py failed with ZeroDivisionError: division by zero\."):
            outputs(f"{nets}/a/net.py:build")
    (nets / "a" / "blocks.py").write_text(BESIDE["blocks.py"].replace("{factor}", "1.0"))
    assert outputs(f"{nets}/a/net.py:build")[0] == pytest.approx(6.4, abs=1e-4)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere.py:build", "there is no file .*nowhere.py. Relative paths begin where"),
        ("{a}/net.py:biuld", "unknown name in .*net.py 'biuld'. Did you mean 'build'"),
        ("nosuchmodule:build", "importing nosuchmodule failed with ModuleNotFoundError.* Sources of models are"),
        ("C:/nowhere", "unknown model 'C:/nowhere'"),
        ("{a}/net.py", "name the factory in the file, such as .*net.py:build"),
        ("C:/nowhere.py:build", "there is no file"),
    ],
)
def test_what_is_said_of_models(nets, spec, said):
    with pytest.raises(ModelError, match=said):
        load_model(spec.replace("{a}", f"{nets}/a"), shape=(1, 8, 8))


# Workers ----------------------------------------------------------------------------------------------------------------


def suite_of(nets):
    models = [{"name": name, "spec": f"{nets}/{name}/net.py:build"} for name in ("a", "b")]
    return {"schema": 1, "name": "s", "data": "digits", "n": 20, "models": models, "conditions": []}


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("executor", ["local", "dask"])
def test_workers_find_them_too(nets, executor):
    if executor == "dask":
        pytest.importorskip("distributed")
    serial = run_suite(suite_of(nets), "serial")
    done = run_suite(suite_of(nets), executor, executor=executor, workers=2)
    assert not done.failures
    assert done.results == serial.results


# Names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "source", "named"),
    [
        ("net.py:build", ("net.py", "build"), ("net.py", "build")),
        (r"C:\nets\net.py:build", ("", r"C:\nets\net.py:build"), (r"C:\nets\net.py", "build")),
        ("c:/nets/net.py:build", ("", "c:/nets/net.py:build"), ("c:/nets/net.py", "build")),
        (r"C:\runs\net", ("", r"C:\runs\net"), (r"C:\runs\net", "")),
        (r"onnx:C:\net.onnx", ("onnx", r"C:\net.onnx"), None),
        (r"predict_proba:C:\clf.py:make", ("predict_proba", r"C:\clf.py:make"), None),
        ("digits", ("", "digits"), ("digits", "")),
        ("torchvision:resnet18", ("torchvision", "resnet18"), ("torchvision", "resnet18")),
    ],
)
def test_names_are_split_beside_drives(spec, source, named):
    assert split_source(spec) == source
    if named is not None:
        assert split_named(spec) == named


def test_drives_are_no_modules():
    assert is_own(r"C:\mine\attack.py:Mine")
    assert not is_own(r"C:\runs\net")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (r"C:\nets\net.py:build", "build"),
        (r"C:\runs\net", "net"),
        (r"onnx:C:\made\net.onnx", "net.onnx"),
        (r"predict_proba:C:\made\clf.py:make", "make"),
        ("predict_proba:made/clf.py:make", "make"),
        ("onnx:made/net.onnx", "net.onnx"),
        ("torchvision:resnet18", "torchvision:resnet18"),
        ("pkg.nets:build", "build"),
        ("runs/x/models/abc/", "abc"),
    ],
)
def test_default_names_of_models(spec, name):
    (model,) = load_suite("standard", models=[spec], data="digits").models
    assert (model.name, model.spec) == (name, spec)


def test_paths_in_test_files_are_beside_them(tmp_path):
    for name in ("net.py", "data.npz", "C:x.py"):
        (tmp_path / name).write_text("")
    assert _beside(tmp_path, "model", "net.py:build") == f"{tmp_path}/net.py:build"
    assert _beside(tmp_path, "data", "net.py:make") == f"{tmp_path}/net.py:make"
    assert _beside(tmp_path, "attack", ["pgd", "net.py:Mine"]) == ["pgd", f"{tmp_path}/net.py:Mine"]
    assert _beside(tmp_path, "data", "npz:data.npz") == f"npz:{tmp_path}/data.npz"
    absolute = rf"{tmp_path}\net.py:build".replace("/", "\\")
    for given in (absolute, r"C:\net.py:build", "torchvision:resnet18", "small-cnn", "digits", "npz:other.npz"):
        assert _beside(tmp_path, "model", given) == given


def test_a_bare_path_with_a_drive_is_said_to_need_its_kind(tmp_path, monkeypatch):
    from robustbench_ext.data import load_dataset

    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:").mkdir()
    (tmp_path / "C:" / "d.npz").write_text("")
    with pytest.raises(ConfigError, match="a path needs its kind in front, such as npz:C:/d.npz"):
        load_dataset("C:/d.npz")
