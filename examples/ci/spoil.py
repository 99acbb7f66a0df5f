"""Make the model worse, to see the tests fail: python spoil.py 0.3 adds noise of 0.3 standard deviations to every weight."""

import sys

import torch
from digitnet import WEIGHTS
from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    torch.manual_seed(0)
    size = float(sys.argv[1])
    weights = load_file(str(WEIGHTS))
    save_file({name: w + size * w.std() * torch.randn_like(w) for name, w in weights.items()}, str(WEIGHTS))
