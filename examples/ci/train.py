"""Train the model with adversarial training (PGD-AT); write its weights, and the test data as a file. Seconds on one core.

python train.py
"""

import numpy as np
import torch
from digitnet import WEIGHTS, DigitNet, split
from safetensors.torch import save_file
from torch.nn import functional as F

from robustbench_ext.attacks import PGD

EPOCHS, BATCH, EPS = 40, 64, 0.1


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, (x, y) = DigitNet(), split()["train"]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attack = PGD(eps=EPS, steps=5, stop="never")
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(y)).split(BATCH):
            # Every epoch starts its attacks from other points: the seed is part of the draw.
            attacked = attack(model, x[rows], y[rows], ids=rows.numpy().astype(str), seed=epoch).x_adv
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(attacked), y[rows]).backward()
            optimizer.step()
    save_file(model.state_dict(), str(WEIGHTS))
    (x, y), file = split()["test"], WEIGHTS.with_name("test_data.npz")
    np.savez_compressed(file, x_test=x.numpy(), y_test=y.numpy())  # for tests without Python


if __name__ == "__main__":
    main()
