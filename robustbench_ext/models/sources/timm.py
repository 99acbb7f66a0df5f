"""`timm:NAME` and `timm:NAME.TAG`: networks of the package timm (Wightman, PyTorch Image Models)."""

from __future__ import annotations

from typing import Any

from robustbench_ext.errors import ModelError, unknown_name
from robustbench_ext.models.sources.base import Found, Wanted, package, seeded

PRETRAINED = ("DEFAULT", "pretrained")


def load(wanted: Wanted) -> Found:
    """A network of timm.

    Without published weights `num_classes` and `in_chans` follow the data, and so does the image size of a network that is
    built for one size; weights are seeded, or come from a file. With `weights: DEFAULT` (or `pretrained`; timm downloads
    what is not in its cache) the head and the channels stay as they were trained. Mean, std and input size are those of
    timm's own configuration of the (tagged) weights, also for a file: give mean and std if it was trained otherwise.

    Raises:
        MissingExtraError: timm is not installed.
        ModelError: no such network, tag or weights, or a network that does not take the data's size.
    """
    timm = package("timm", "timm", wanted)
    name, pretrained = wanted.name, wanted.weights in PRETRAINED
    _known(timm, wanted)
    if not (pretrained or wanted.weights is None or wanted.weights_file):
        raise ModelError(
            f"timm:{name}: weights = {wanted.weights!r}, expected a file (.safetensors, .pt), or {' or '.join(PRETRAINED)}; "
            f"which published weights is said by the tag: {', '.join(_tagged(timm, name)[:3]) or 'there are none'}"
        )
    made: dict[str, Any] = {} if pretrained else {"num_classes": wanted.num_classes, "in_chans": wanted.shape[0]}
    config = timm.get_pretrained_cfg(name)
    if not pretrained and config is not None and config.fixed_input_size:
        made["img_size"] = tuple(wanted.shape[1:])
    made |= wanted.kwargs
    try:
        with seeded(wanted.seed):
            module = timm.create_model(name, pretrained=pretrained, **made)
    except Exception as error:  # a network's own words for what it cannot take, or the hub's for what it cannot give
        raise ModelError(_failed(wanted, made, pretrained, error)) from error
    return _described(timm, wanted, module, pretrained)


def _described(timm: Any, wanted: Wanted, module: Any, pretrained: bool) -> Found:
    """The module with what timm's configuration says of its inputs."""
    config = timm.data.resolve_model_data_config(module)
    mean, std, size = tuple(config["mean"]), tuple(config["std"]), tuple(config["input_size"])
    channels = int(
        getattr(module, "in_chans", None) or wanted.kwargs.get("in_chans", size[0] if pretrained else wanted.shape[0])
    )
    found = Found(module, weights=wanted.weights if wanted.weights_file else None)
    if pretrained or module.pretrained_cfg.get("fixed_input_size"):
        # Of a network that was built to other images its own size says nothing of the data.
        side = wanted.kwargs.get("img_size", size[1:] if pretrained else wanted.shape[1:])
        height, width = (side, side) if isinstance(side, int) else side
        found.size = (channels, int(height), int(width))
    if channels != len(mean):
        if len(set(mean)) > 1 or len(set(std)) > 1:
            found.notes.append(
                f"timm's normalisation of {wanted.name} is for {len(mean)} channels and was left out, since the network has "
                f"{channels}: give mean and std if it was trained with any"
            )
            return found
        mean, std = mean[:1] * channels, std[:1] * channels
    found.mean, found.std = mean, std
    read = f"normalisation mean={list(mean)}, std={list(std)}"
    if found.size is not None:
        read += f" and input size {found.size[1]}x{found.size[2]}"
    tag = str(module.pretrained_cfg.get("tag") or "")
    found.notes.append(
        f"{read} read from timm's configuration of {module.pretrained_cfg['architecture']}{'.' * bool(tag)}{tag}"
    )
    return found


def _known(timm: Any, wanted: Wanted) -> None:
    if ":" in wanted.name or "/" in wanted.name:
        raise ModelError(
            f"model '{wanted.spec}': expected a name of timm's own. Of a repository elsewhere download the safetensors file, "
            f"and give timm:ARCHITECTURE + FILE."
        )
    architecture, _, tag = wanted.name.partition(".")
    if not timm.is_model(architecture):
        raise ModelError(_short(unknown_name("timm model", architecture, timm.list_models())))
    tags = [known.partition(".")[2] for known in _tagged(timm, architecture)]
    if tag and tag not in tags:
        raise ModelError(f"timm:{architecture}: " + unknown_name("tag", tag, tags))


def _tagged(timm: Any, name: str) -> list[str]:
    """The published weights of an architecture, as ARCHITECTURE.TAG."""
    architecture = name.partition(".")[0]
    return [known for known in timm.list_pretrained(f"{architecture}*") if known.partition(".")[0] == architecture]


def _short(text: str) -> str:
    """There are more than a thousand names."""
    head, known, names = text.partition(" Known: ")
    return f"{head} There are {len(names.split(', '))}: timm.list_models('*resnet*') finds some." if known else text


def _failed(wanted: Wanted, made: dict[str, Any], pretrained: bool, error: Exception) -> str:
    why = f"{type(error).__name__}: {error}"
    if pretrained:
        return (
            f"model '{wanted.spec}': the published weights cannot be loaded: {why}. Without a network, download "
            f"model.safetensors of timm/{wanted.name} elsewhere and give timm:{wanted.name} + FILE."
        )
    return (
        f"model '{wanted.spec}' cannot be built for inputs {wanted.shape} with {made}: {why}. A network with patches or "
        f"windows takes multiples of them only: give resize, for example #resize=224."
    )
