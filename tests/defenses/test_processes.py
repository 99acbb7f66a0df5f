"""Two processes on one machine (gloo) against one: the gradients of the joint batch, and a whole training."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import json, os, sys
import numpy as np
import torch
torch.set_num_threads(1)
from pathlib import Path
from torch import nn
import defenses
from defenses import DONE, GAIRAT, MAIL, SRAT, TRADES, WEAT, ClassPrior
from defenses.trainer import Architecture, Recipe, _Training
from defenses.runtime import Runtime
from robustbench_ext.data import load_dataset

data = load_dataset("digits@step:5")
out = {}
for name, defense in {
    "trades": TRADES(), "weat": WEAT(), "weat-normalised": WEAT(normalise=True), "gairat": GAIRAT(burn_in=0),
    "mail": MAIL(burn_in=0), "done": DONE(r=1, eta=0.5), "srat": SRAT(lam=0, defer=0, weights="inverse"),
    "class-prior": ClassPrior(method="effective-number", base="pgd-at"),
}.items():
    # Batch norm sees its process's part, so the network has none; 51 samples do not halve.
    recipe = Recipe(epochs=1, batch_size=51, eps=0.1, attack_steps=3, validation_n=20, validation_steps=1, lr=1e-9)
    network = Architecture(sys.argv[2] + ":build", data.shape, 10)
    run = _Training(defense, network, data, recipe, 0, Runtime("cpu"), "key", Path(sys.argv[1]), 60.0)
    run.model.train()
    for step in range(2):
        run.step(np.arange(51 * step, 51 * (step + 1)), 0)
    out[name] = torch.cat([p.grad.flatten() for p in run.bare.parameters()])
    run.runtime.close()
if int(os.environ.get("RANK", "0")) == 0:
    torch.save(out, sys.argv[3])
"""

NETWORK = """
import torch
def build():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                               torch.nn.Linear(288, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
"""


def launch(command, processes, cwd):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jobs = []
    for rank in range(processes):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if processes > 1:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
            }
        jobs.append(subprocess.Popen(command, env=env, cwd=cwd, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate(timeout=240)
        assert job.returncode == 0, errors[-3000:]


def test_gradients_are_those_of_the_joint_batch(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    for processes in (1, 2):
        files = [str(tmp_path / f"run{processes}"), str(tmp_path / "net.py"), str(tmp_path / f"{processes}.pt")]
        launch([sys.executable, "-c", SCRIPT, *files], processes, tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for name, gradient in one.items():
        error = float((two[name] - gradient).norm() / gradient.norm())
        assert error < 1e-5, f"{name}: {error}"


@pytest.mark.slow
def test_a_whole_training_on_two_processes(tmp_path):
    command = ["train", "trades", "--data", "digits", "--out", str(tmp_path / "m"), "--device", "cpu"]
    for setting in ("epochs=6", "attack_steps=3", "eps=0.1", "validation_n=100"):
        command += ["--set", setting]
    launch([sys.executable, "-m", "robustbench_ext.cli", *command], 2, tmp_path)
    described = json.loads((tmp_path / "m" / "model.json").read_text())
    assert len(described["curve"]) == 6
    assert max(row["robust_accuracy"] for row in described["curve"]) > 0.5
