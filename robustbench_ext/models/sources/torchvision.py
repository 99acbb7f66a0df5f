"""`torchvision:NAME`: with fresh weights built to the data, or with published ones and all that is known of them."""

from __future__ import annotations

from robustbench_ext.errors import ModelError, unknown_name
from robustbench_ext.models.sources.base import Found, Wanted, seeded


def load(wanted: Wanted) -> Found:
    """A classifier of torchvision.

    Fresh weights, seeded, have as many outputs as the data has classes; a network with a fixed input size is built to the
    data's. Published weights (`weights: DEFAULT` or a name such as `IMAGENET1K_V2`) keep their head; normalisation and input
    size are read from the preset that torchvision ships with them. Torchvision downloads them where they are not in its cache.

    Raises:
        ModelError: no such model or weights, or a network that does not take the data's size.
    """
    from torchvision import models

    name, weights = wanted.name, wanted.weights
    if name not in models.list_models():
        raise ModelError(unknown_name("torchvision model", name, models.list_models()))
    if weights is None or wanted.weights_file:
        made = {"num_classes": wanted.num_classes, **wanted.kwargs}
        if name.startswith("vit_"):
            made.setdefault("image_size", wanted.shape[1])
        try:
            with seeded(wanted.seed):
                return Found(models.get_model(name, weights=None, **made), weights=weights)
        except Exception as error:  # a network's own words for arguments that it cannot take
            raise ModelError(
                f"model '{wanted.spec}' cannot be built for inputs {wanted.shape} with {made}: {type(error).__name__}: "
                f"{error}. The size must be a multiple of a vit's patches: give resize, for example #resize=224."
            ) from error
    try:
        entry = models.get_model_weights(name)[weights]
    except KeyError:
        names = [w.name for w in models.get_model_weights(name)]
        raise ModelError(f"torchvision:{name}: " + unknown_name("weights", weights, names)) from None
    preset = entry.transforms()
    mean, std = tuple(preset.mean), tuple(preset.std)
    side = int(preset.crop_size[0])
    try:
        module = models.get_model(name, weights=entry, **wanted.kwargs)
    except OSError as error:  # urllib's errors are OSErrors
        raise ModelError(
            f"model '{wanted.spec}': the weights {entry.name} cannot be downloaded ({error}). Put "
            f"{entry.url.rpartition('/')[2]} into $TORCH_HOME/hub/checkpoints (~/.cache/torch/hub/checkpoints) yourself."
        ) from error
    read = (
        f"normalisation mean={list(mean)}, std={list(std)} and input size {side}x{side} read from torchvision's weights"
    )
    return Found(module, mean, std, (3, side, side), [f"{read} {entry.name}"])
