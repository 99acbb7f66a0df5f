"""Images of your own: a folder with one sub-folder per class, as `folder:PATH` reads it. Here of scikit-learn's digits.

python examples/own_data.py runs/own-data
rbx run examples/own_suite.yaml --out runs/own
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write(folder: Path) -> int:
    """Write every digit as FOLDER/CLASS/NUMBER.png, 8x8 grey; returns how many there are.

    The loader cuts them into 60 % train, 20 % calibration and 20 % test by their names. Sub-folders train, calibration and
    test, with classes inside them, cut them yourself.
    """
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / str(label) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image / 16 * 255).astype(np.uint8)).save(file)  # the values are 0 to 16
    return len(digits.images)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-data")
    print(f"{write(target)} images in {target}: give them as folder:{target}")  # noqa: T201
