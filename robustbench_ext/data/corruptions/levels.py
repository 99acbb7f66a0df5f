"""What severities 1 to 5 mean, as published for ImageNet-C (224x224) and CIFAR-10-C (32x32).

Hendrycks, Dietterich: *Benchmarking neural network robustness to common corruptions and perturbations*, ICLR 2019,
arXiv 1903.12261; values from the authors' released scripts. Lengths are pixels; those of `elastic-transform` are shares of the
image's side.
"""

from __future__ import annotations

from typing import Any

LEVELS = ("imagenet-c", "cifar-c")
SMALL = 64  # images with a shorter side than this get CIFAR-10-C's severities unless told otherwise

_ZOOM = "end and step of the zoom factors"

# name: what the numbers are, ImageNet-C's five, CIFAR-10-C's five.
TABLE: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian-noise": ("standard deviation", (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot-noise": ("photons at full intensity", (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse-noise": ("share of values", (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle-noise": ("standard deviation", (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian-blur": ("sigma", (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1)),
    "glass-blur": (
        "sigma, farthest swap, rounds",
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "defocus-blur": (
        "radius, sigma of the disk's edge",
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "motion-blur": (
        "radius, sigma",
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom-blur": (
        _ZOOM,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "fog": (
        "thickness, decay of the fractal",
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "frost": (
        "weight of the image, weight of the frost",
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "snow": (
        "mean, standard deviation, size, threshold of the flakes; radius, sigma of their motion; weight of the image",
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "spatter": (
        "mean, standard deviation, sigma, threshold of the liquid; strength or sigma of its edge; mud instead of water",
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
    "brightness": ("added value", (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": ("factor", (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": (
        "factor and addend of the saturation",
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    ),
    "jpeg-compression": ("quality", (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "pixelate": ("share of the side", (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "elastic-transform": (
        "displacement, its sigma, shift of the corners",
        # The authors' 244 for a side of 224, as shares of the side.
        tuple(
            tuple(244 / 224 * v for v in row)
            for row in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
}

# The fifteen that mCE is taken over, and the four that are kept for validation.
FIFTEEN = (
    "gaussian-noise",
    "shot-noise",
    "impulse-noise",
    "defocus-blur",
    "glass-blur",
    "motion-blur",
    "zoom-blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic-transform",
    "pixelate",
    "jpeg-compression",
)
EXTRA = ("speckle-noise", "gaussian-blur", "spatter", "saturate")
