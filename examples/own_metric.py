"""A metric of your own: a number per sample, from logits and labels. Named in a suite as `examples/own_metric.py:top_2`."""

from __future__ import annotations

from torch import Tensor


def top_2(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of samples whose label is one of the two most probable classes.

    Args:
        logits: float32 (n, K); labels: int64 (n,).

    Returns:
        bool (n,): its mean is reported as a share. Numbers instead of bools would be reported as a mean.
    """
    return (logits.topk(2, dim=1).indices == labels[:, None]).any(dim=1)


top_2.higher_is_better = True  # type: ignore[attr-defined]
