"""Killed in the middle of an epoch, a training ends at the same weights, bit for bit, whatever it carries along."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from defenses import AWP, DONE, GAIRAT, SRAT, TRADES, WEAT
from defenses.trainer import Architecture, Recipe, train
from robustbench_ext.errors import ConfigError
from robustbench_ext.models import load_model

QUICK = {"epochs": 3, "batch_size": 200, "eps": 0.1, "attack_steps": 2, "validation_n": 20, "validation_steps": 1}


class Stop(Exception):
    """What a killed run looks like from inside."""


def weights(folder):
    return load_model(str(folder)).module.state_dict()


@pytest.mark.parametrize(
    ("defense", "options"),
    [
        (TRADES(), {"average": "ema", "average_decay": 0.9, "augmentation": {"crop": 1, "flip": True, "cutmix": 1.0}}),
        (DONE(r=1, eta=0.3), {"average": "swa", "swa_start": 0.0}),
        (SRAT(defer=0.3), {"clip_grad": 1.0}),
        (AWP(base="gairat", gamma=0.01), {"optimizer": "adamw", "lr": 0.001}),
        (WEAT(), {"schedule": "piecewise", "label_smoothing": 0.1, "energy_n": 20}),
        (GAIRAT(burn_in=0.3), {"precision": "bfloat16"}),
    ],
    ids=lambda v: getattr(v, "name", ""),
)
def test_the_middle_of_an_epoch(defense, options, digits, tmp_path):
    recipe = Recipe(**{**QUICK, **options})
    network = Architecture("small-cnn", digits.shape, 10)
    whole = train(defense, network, digits, recipe, tmp_path / "whole")
    stops = iter([(1, 2), (1, 4), (2, 1)])  # (epoch, batch), again and again
    seen = []

    def interrupt(stop):
        def on_batch(epoch, batch, batches):
            seen.append((epoch, batch))
            assert batches == 6
            if (epoch, batch) == stop:
                raise Stop

        return on_batch

    for stop in stops:
        with pytest.raises(Stop):
            train(defense, network, digits, recipe, tmp_path / "cut", on_batch=interrupt(stop), checkpoint_seconds=0)
    cut = train(defense, network, digits, recipe, tmp_path / "cut", on_batch=interrupt(None), checkpoint_seconds=0)
    # A batch that was not yet in a checkpoint is done again; nothing else is.
    assert len(seen) == 18 + 3
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[k], b[k]) for k in a)
    curves = [json.loads((f / "model.json").read_text())["curve"] for f in (whole, cut)]
    assert curves[0] == curves[1]


def test_an_unfinished_training_of_another_kind_is_not_overwritten(digits, tmp_path):
    network, recipe = Architecture("small-cnn", digits.shape, 10), Recipe(**QUICK)

    def interrupt(row):
        raise Stop

    with pytest.raises(Stop):
        train(TRADES(), network, digits, recipe, tmp_path / "m", on_epoch=interrupt)
    kept = (tmp_path / "m" / "checkpoint.pt").read_bytes()
    for defense, seed in ((TRADES(beta=1), 0), (TRADES(), 1)):
        with pytest.raises(ConfigError, match="unfinished training"):
            train(defense, network, digits, recipe, tmp_path / "m", seed)
    assert (tmp_path / "m" / "checkpoint.pt").read_bytes() == kept


def test_a_real_kill(digits, tmp_path):
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from pathlib import Path; import sys\n"
        "from defenses import TRADES\n"
        "from defenses.trainer import Architecture, Recipe, train\n"
        "from robustbench_ext.data import load_dataset\n"
        "data = load_dataset('digits')\n"
        "recipe = Recipe(epochs=2, batch_size=64, eps=0.1, attack_steps=4, validation_n=20, validation_steps=1)\n"
        "train(TRADES(), Architecture('small-cnn', data.shape, 10), data, recipe, Path(sys.argv[1]),\n"
        "      on_batch=lambda *a: print(*a, flush=True), checkpoint_seconds=0)\n"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    for line in process.stdout:
        if line.split()[:2] == ["1", "7"]:
            os.kill(process.pid, signal.SIGKILL)
            break
        assert time.monotonic() < deadline
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "model.json").exists()
    for folder in ("cut", "whole"):
        subprocess.run([*command, str(tmp_path / folder)], check=True, stdout=subprocess.DEVNULL)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
