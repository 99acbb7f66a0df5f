"""Results as `model-index`: the metadata of a model card on the Hugging Face Hub, YAML in its front matter.

The format is described in `modelcard.md` of huggingface/hub-docs. Every value has its interval, its number of samples and its
protocol in `args`. Only data that the Hub knows can be named there, so everything else is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from robustbench_ext.axes import Axis, axes, is_regression
from robustbench_ext.errors import ConfigError
from robustbench_ext.named_data import NAMED
from robustbench_ext.results import Row, RunResults


class _Known(NamedTuple):
    id: str
    title: str
    config: str
    n: int


# Test splits that torchvision reads, by their names here: the Hub's identity, configuration and size.
HUB = {
    "torchvision:CIFAR10": _Known("uoft-cs/cifar10", "CIFAR-10", "plain_text", 10_000),
    "torchvision:CIFAR100": _Known("uoft-cs/cifar100", "CIFAR-100", "cifar100", 10_000),
    "torchvision:MNIST": _Known("ylecun/mnist", "MNIST", "mnist", 10_000),
    "torchvision:FashionMNIST": _Known("zalando-datasets/fashion_mnist", "Fashion-MNIST", "fashion_mnist", 10_000),
    "torchvision:SVHN": _Known("ufldl-stanford/svhn", "SVHN", "cropped_digits", 26_032),
}
_TYPES = {"auroc": "roc_auc"}  # where the Hub has another name for a metric
_KINDS = ("clean", "attack", "worst-case", "corruption", "corruptions")  # conditions on the data's own samples


def render_model_index(results: RunResults, model: str) -> tuple[str, list[str]]:
    """The YAML block, and sentences on what is not in it.

    Raises:
        ConfigError: it would not be honest; the message lists each difference.
    """
    import yaml

    found = differences(results, model)
    if found:
        told = "\n".join(f"  - {text}" for text in found)
        raise ConfigError(f"{model}: no model-index can be written:\n{told}")
    known = HUB[_base(results)]
    shown, left = [], []
    for axis in axes(results):
        row, condition = axis.row(results, model), _condition(results, axis)
        if row is None or row.value is None:
            continue
        if condition.get("kind") in _KINDS:
            shown.append(_metric(results, axis, row, condition))
        else:
            left.append(f"{axis.title}: it is about other data than {known.title}")
    n, seed = results.suite["n"], results.suite["seed"]
    whole = n == known.n
    samples = "the whole split" if whole else f"the first {n} of {known.n} in an order that keeps classes in proportion"
    dataset = {"name": known.title, "type": known.id, "config": known.config, "split": "test"}
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {**dataset, "args": {"n": n, "samples": samples, "seed": seed}},
        "metrics": shown,
    }
    index = {"model-index": [{"name": model, "results": [result]}]}
    return yaml.safe_dump(index, sort_keys=False, allow_unicode=True, width=120), left


def differences(results: RunResults, model: str) -> list[str]:
    """Why a model-index of this model would mislead; empty where it would not."""
    found = []
    if is_regression(results):
        found.append("task: expected classification, found regression")
    known = HUB.get(_base(results))
    if known is None:
        found.append(
            f"data: expected one of {', '.join(HUB)}, found {results.data['name']}, which is not known to the Hub"
        )
    else:
        size = results.data["splits"]["test"]["n"]
        if size != known.n:
            found.append(f"test split: expected {known.n} samples, found {size}")
    failed = [f for f in results.suspicions if f.model == model and f.status == "fail"]
    return found + [f"check {f.name}: expected pass, found fail: {f.message}" for f in failed]


def _base(results: RunResults) -> str:
    """The data's name without an imbalance, which cuts training samples alone; torchvision's where it has the same samples."""
    name = str(results.data["name"]).partition("@")[0]
    return (NAMED[name].fetched_by if name in NAMED else "") or name


def _condition(results: RunResults, axis: Axis) -> dict[str, Any]:
    return next((c for c in results.conditions if c["label"] == axis.condition), {})


def _metric(results: RunResults, axis: Axis, row: Row, condition: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"n": row.n, "condition": row.condition}
    if row.ci_low is not None and row.ci_high is not None:
        told |= {"ci_low": row.ci_low, "ci_high": row.ci_high, "ci_level": row.ci_level, "ci_method": row.ci_method}
    told |= {k: condition[k] for k in ("norm", "eps", "attack", "parameters", "over") if k in condition}
    told |= {k: v for k, v in (("probe", axis.probe_of(row.model)), ("group", row.group)) if v}
    doubts = [f"{f.name}: {f.message}" for f in results.suspicions if f.model == row.model]
    told |= {"doubts": doubts} if doubts else {}
    return {
        "type": _TYPES.get(row.metric, row.metric),
        "value": row.value,
        "name": f"{results.metrics[row.metric]['title']} ({axis.title})",
        "args": told,
    }
