"""`hf:NAME_OR_FOLDER`: image classifiers of Hugging Face's transformers, with what their image processor does to inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import ModelError
from robustbench_ext.models.sources.base import Found, Wanted, options, package, unsafe_allowed
from robustbench_ext.settings import UNSAFE

_TOLERANCE = 1e-4  # of processed pixels, some units large; a processor works in float32


class ImageClassifier(nn.Module):
    """Logits (N, K) of a classifier that returns an output object.

    Args:
        network: of transformers, `network(pixel_values=x).logits`.
        flip: whether it was trained on BGR.
    """

    def __init__(self, network: nn.Module, flip: bool) -> None:
        super().__init__()
        self.network, self.flip = network, flip
        self.training = network.training

    def extra_repr(self) -> str:
        return f"flip={self.flip}"

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x.flip(1) if self.flip else x).logits
        return logits


def load(wanted: Wanted) -> Found:
    """An image classifier from a folder that `save_pretrained` wrote, or from the hub (transformers downloads it).

    The image processor beside it is shown a black, a white and a random image of the size that it makes: from what it gives
    back mean, std and the order of channels are read, whatever its options are called. Resizing and cropping are not applied:
    data of another size is said, and `resize` is yours to give.

    Weights are read from safetensors only and code of the repository is never run, unless unsafe loading is allowed.

    Options: `revision` of a repository; `processor: false` leaves the processor unread (then give mean and std).

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: no such model, no safetensors, or a processor that is no affine map of each channel.
    """
    transformers = package("transformers", "hf", wanted)
    chosen = options(wanted, revision=None, processor=True)
    if wanted.weights is not None:
        raise ModelError(f"model '{wanted.spec}' holds its own weights; leave out weights {wanted.weights}")
    name = wanted.name
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"model '{wanted.spec}': there is no folder {Path(name).resolve()}")
    trusted = unsafe_allowed()
    common = {"trust_remote_code": trusted, **({"revision": chosen["revision"]} if chosen["revision"] else {})}
    safe = {} if trusted else {"use_safetensors": True}
    try:
        network = transformers.AutoModelForImageClassification.from_pretrained(name, **common, **safe)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, ImportError, ... for what is missing or refused
        raise ModelError(
            f"model '{wanted.spec}' cannot be loaded: {type(error).__name__}: {error}. Expected a folder that save_pretrained "
            f"wrote, with model.safetensors (pickled weights and code of the repository are read only with "
            f"--allow-unsafe-load, or {UNSAFE}=1), or a repository's name where there is a network."
        ) from error
    channels = int(getattr(network.config, "num_channels", 3))
    if not chosen["processor"]:
        return Found(ImageClassifier(network, False), notes=["its image processor was not read, as told"])
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, **common)
    except Exception as error:  # see above
        said = str(error).strip().splitlines()
        note = f"no image processor could be read ({said[0] if said else type(error).__name__}): give mean and std"
        return Found(ImageClassifier(network, False), size=_size(network.config, channels, {}), notes=[note])
    size = _size(network.config, channels, _sides(processor))
    mean, std, flip = _read(processor, size or wanted.shape, wanted)
    found = Found(ImageClassifier(network, flip), mean, std, size)
    what = (
        f"normalisation mean={mean}, std={std}" + (f", input size {size[1]}x{size[2]}" if size else "") + ", BGR" * flip
    )
    found.notes.append(f"{what} read from {type(processor).__name__} of {Path(name).name}")
    return found


def _sides(processor: Any) -> dict[str, int]:
    """What the processor makes of any image: its crop where it crops, its size otherwise."""
    size = getattr(processor, "size", None) if getattr(processor, "do_resize", False) else None
    if getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None):
        size = processor.crop_size
    known = dict(size) if size else {}
    return {side: int(value) for side, value in known.items() if value is not None}


def _size(config: Any, channels: int, sides: dict[str, int]) -> tuple[int, int, int] | None:
    if "height" in sides and "width" in sides:
        return channels, sides["height"], sides["width"]
    if "shortest_edge" in sides:
        return channels, sides["shortest_edge"], sides["shortest_edge"]
    side = getattr(config, "image_size", None)
    return (channels, int(side), int(side)) if isinstance(side, int) else None


def _read(processor: Any, size: tuple[int, int, int], wanted: Wanted) -> tuple[list[float], list[float], bool]:
    """Mean and std, for images in [0, 1], and whether channels are turned round, of what a processor does to bytes."""
    channels, height, width = size
    plain = {name: False for name in ("do_resize", "do_center_crop") if hasattr(processor, name)}
    noise = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    images = [np.zeros_like(noise), np.full_like(noise, 255), noise]
    try:
        out = processor(images, return_tensors="pt", input_data_format="channels_last", **plain)[
            "pixel_values"
        ].double()
    except Exception as error:  # whatever a processor says of images that it does not take
        raise ModelError(
            f"model '{wanted.spec}': its {type(processor).__name__} cannot be read: {type(error).__name__}: {error}. Give "
            f"mean, std and the option processor: false."
        ) from error
    black, white = out[0].mean(dim=(1, 2)), out[1].mean(dim=(1, 2))
    x = torch.from_numpy(noise).permute(2, 0, 1).double() / 255
    for flip in (False, True):
        expected = black[:, None, None] + (white - black)[:, None, None] * (x.flip(0) if flip else x)
        if (
            out[2].shape == expected.shape
            and torch.allclose(out[2], expected, rtol=0, atol=_TOLERANCE)
            and bool((white > black).all())
        ):
            mean, std = -black / (white - black), 1 / (white - black)
            if flip:  # ours normalises before it turns them round
                mean, std = mean.flip(0), std.flip(0)
            return [float(f"{v:.6g}") + 0.0 for v in mean.tolist()], [float(f"{v:.6g}") for v in std.tolist()], flip
    raise ModelError(
        f"model '{wanted.spec}': what its {type(processor).__name__} does to images is more than a mean, a std and an order of "
        f"channels. Put the rest into a factory of your own, or give mean, std and the option processor: false."
    )
