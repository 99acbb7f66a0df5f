"""RobustBench's zoo: imported although its package cannot be, with nothing left behind; loaded from a checkpoint made here."""

import importlib.util
import sys

import pytest
import torch

from robustbench_ext.errors import MissingExtraError, ModelError
from robustbench_ext.models import load_model
from robustbench_ext.models.sources.robustbench import stand_ins

MISSING = [name for name in ("pkg_resources", "autoattack") if importlib.util.find_spec(name) is None]

# A package that imports what the published one imports, with a zoo of one.
PACKAGE = {
    "__init__.py": "from .loaders import LISTED\nfrom .eval import benchmark\nfrom . import model_zoo, utils\n",
    "loaders.py": "import pkg_resources\nLISTED = pkg_resources.resource_filename(__name__, 'files/list.txt')\n",
    "eval.py": (
        "from autoattack import AutoAttack\nfrom autoattack.state import EvaluationState\n"
        "def benchmark():\n    return AutoAttack(1)\n"
    ),
    "model_zoo/__init__.py": (
        "from .enums import BenchmarkDataset, ThreatModel\n"
        "model_dicts = {BenchmarkDataset.cifar_10: {ThreatModel.Linf: {'Standard': {}}}}\n"
    ),
    "model_zoo/enums.py": (
        "from enum import Enum\nclass BenchmarkDataset(Enum):\n    cifar_10 = 'cifar10'\n"
        "class ThreatModel(Enum):\n    Linf = 'Linf'\n    L2 = 'L2'\n"
    ),
    "utils.py": (
        "import torch\nfrom pathlib import Path\n"
        "def load_model(model_name, model_dir, dataset, threat_model):\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))\n"
        "    file = Path(model_dir) / dataset / threat_model / f'{model_name}.pt'\n"
        "    net.load_state_dict(torch.load(file, map_location='cpu'))\n    return net.eval()\n"
    ),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the published package, whose imports fail in the same places."""
    for name, text in PACKAGE.items():
        file = tmp_path / "site" / "robustbench" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    kept = {name: m for name, m in sys.modules.items() if name.partition(".")[0] == "robustbench"}
    for name in kept:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "robustbench"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.skipif(not MISSING, reason="both modules are installed")
def test_it_is_imported_with_stand_ins_that_are_gone_afterwards(package, tmp_path):
    with pytest.raises(ModuleNotFoundError):
        import robustbench
    for name in [n for n in sys.modules if n.partition(".")[0] == "robustbench"]:
        del sys.modules[name]
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    folder = tmp_path / "models" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    torch.save(net.state_dict(), folder / "Standard.pt")
    loaded = load_model("robustbench:Standard", shape=(3, 2, 2))
    x = torch.rand(4, 3, 2, 2)
    assert torch.equal(loaded.module(x), net(x))
    assert not {*MISSING, "autoattack.state"} & set(sys.modules)
    import robustbench

    assert robustbench.loaders.LISTED.startswith(str(tmp_path / "site" / "robustbench" / "files"))
    if "autoattack" in MISSING:
        with pytest.raises(MissingExtraError, match="autoattack"):
            robustbench.benchmark()
    moved = load_model(f"robustbench:Standard#model_dir={folder.parents[1]}", shape=(3, 2, 2))
    assert torch.equal(moved.module(x), net(x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("robustbench:Standart", "Did you mean 'Standard'"),
        ("robustbench:Standard#dataset=mnist", "no such zoo"),
        ("robustbench:Standard#threat_model=L2", "no such zoo"),
        ("robustbench:Standard", r"models/cifar10/Linf/Standard.pt; RobustBench downloads it"),
        ("robustbench:Standard + w.pt", "leave out weights"),
    ],
)
def test_names_that_are_none(package, spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec)


def test_modules_that_are_there_are_left_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    before = dict(sys.modules)
    with stand_ins():
        assert sys.modules == before


@pytest.mark.slow
def test_the_published_package(tmp_path, monkeypatch):
    """Wong2020Fast, a PreActResNet-18 that normalises inside itself, from a checkpoint of random weights."""
    if importlib.util.find_spec("robustbench") is None:
        pytest.skip("robustbench is not installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="unknown model of RobustBench"):
        load_model("robustbench:Wong2020")
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    torch.manual_seed(0)
    net = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]["Wong2020Fast"]["model"]().eval()
    folder = tmp_path / "models" / "cifar10" / "Linf"
    folder.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, folder / "Wong2020Fast.pt")
    loaded = load_model("robustbench:Wong2020Fast", shape=(3, 32, 32))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.module.eval()(x), net(x))
