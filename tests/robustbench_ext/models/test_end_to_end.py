"""Whatever model a user has goes through a suite from the command line, on data that is bundled."""

import json

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from robustbench_ext.cli.main import app

SUITE = {
    "schema": 1,
    "data": "digits",
    "n": 60,
    "models": [{"name": "x", "spec": "small-cnn"}],
    "conditions": [
        {"attack": "pgd", "eps": 0.1, "steps": 3},
        {"attack": "standard", "eps": 0.1, "steps": 3, "targets": 2, "queries": 20},
        {"attack": "square", "eps": 0.1, "queries": 100},
        {"corruption": "gaussian-noise", "severity": [1, 3]},
        {"outliers": "letters", "n": 40},
    ],
    "detectors": ["msp", "energy", "mahalanobis"],
    "uq": ["temperature"],
}


def _net(folder):
    """An ONNX export of a small network, by whichever exporter this PyTorch has."""
    pytest.importorskip("onnx2torch")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    try:
        torch.onnx.export(net, (torch.zeros(2, 1, 8, 8),), str(folder / "net.onnx"), dynamo=False)
    except Exception as error:
        pytest.skip(f"no exporter: {error}")
    return f"onnx:{folder / 'net.onnx'}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm", "torchvision", "onnx", "forest"])
def test_models_from_elsewhere(kind, tmp_path):
    if kind == "timm":
        pytest.importorskip("timm")
    spec = {
        "timm": lambda: "timm:test_resnet.r160_in1k",
        "torchvision": lambda: "torchvision:resnet18#resize=32#channels=3",
        "onnx": lambda: _net(tmp_path),
        "forest": lambda: "sklearn:ensemble.RandomForestClassifier",
    }[kind]()
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SUITE))
    command = [
        "run",
        str(tmp_path / "small.yaml"),
        "--model",
        f"mine={spec}",
        "--executor",
        "serial",
        "--out",
        str(tmp_path / "run"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert not results["failures"]
    measured = {row["condition"] for row in results["results"] if row["value"] is not None}
    blind = kind == "forest"
    assert ("pgd Linf 0.1" in measured) == ("standard Linf 0.1" in measured) == (not blind)
    assert {"clean", "square Linf 0.1", "gaussian-noise 3"} <= measured
    assert any("mine gives scores alone" in note for note in results["notes"]) == blind
    assert "mine gives scores alone" in (tmp_path / "run" / "report.md").read_text() or not blind
    values = [row["value"] for row in results["results"] if row["value"] is not None]
    assert np.isfinite(values).all()
