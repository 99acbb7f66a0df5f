"""Corruptions: the fifteen of ImageNet-C and its four extra ones, batched, on the device of the batch, seeded per sample."""

from robustbench_ext.data.corruptions.base import Corruption, levels_for
from robustbench_ext.data.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from robustbench_ext.data.corruptions.digital import (
    brightness,
    contrast,
    elastic_transform,
    jpeg_compression,
    pixelate,
    saturate,
)
from robustbench_ext.data.corruptions.levels import EXTRA, FIFTEEN, LEVELS, TABLE
from robustbench_ext.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from robustbench_ext.data.corruptions.weather import fog, frost, snow, spatter

__all__ = [
    "EXTRA",
    "FIFTEEN",
    "LEVELS",
    "TABLE",
    "Corruption",
    "brightness",
    "contrast",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_blur",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg_compression",
    "levels_for",
    "motion_blur",
    "pixelate",
    "saturate",
    "shot_noise",
    "snow",
    "spatter",
    "speckle_noise",
    "zoom_blur",
]
