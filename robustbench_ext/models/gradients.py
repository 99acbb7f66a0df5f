"""Input gradients of a frozen network, without what only training needs.

While a model is attacked its parameters are constants, and its batch norms in evaluation mode are affine maps per
channel. PyTorch's backward passes know neither: batch norm's reads its input again, and the input gradient of a
convolution that reads one-channel images is computed by a kernel made for many channels, which is several times slower
than the plain matrix product. `InputGradients` replaces these two backward passes, for any model, without touching it.
Forward passes are PyTorch's own, so logits are the same to the last bit; gradients are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _FrozenBatchNorm(torch.autograd.Function):
    """Batch norm in evaluation mode, whose gradient is the incoming one times weight / sqrt(variance + eps)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        scale = torch.rsqrt(variance + eps)
        if weight is not None:
            scale = scale * weight
        ctx.save_for_backward(scale)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return grads[0] * scale.view(1, -1, *(1,) * (grads[0].ndim - 2)), None, None, None, None, None


class _ImageConv(torch.autograd.Function):
    """A convolution of one-channel images on the CPU, whose input gradient is a matrix product and a fold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.options = x.shape[2:], options
        stride, padding, dilation = options
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation = ctx.options
        columns = weight.flatten(1).t() @ grads[0].flatten(2)  # (n, kernel pixels, output pixels)
        # The images of the batch as channels of one image: a fold goes through its batch one by one.
        together = columns.reshape(1, -1, columns.shape[2])
        image = F.fold(together, ctx.size, tuple(weight.shape[2:]), dilation, padding, stride)
        return image.view(len(columns), 1, *ctx.size), None, None, None


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    plain = isinstance(padding, str) or x.ndim != 4 or x.device.type != "cpu" or weight.shape[1] != 1 or groups != 1
    if plain or _learns(x, weight, bias) or not x.requires_grad:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    found: Tensor = _ImageConv.apply(x, weight, bias, (stride, padding, dilation))
    return found


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or not x.requires_grad or _learns(x, weight, bias):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    found: Tensor = _FrozenBatchNorm.apply(x, running_mean, running_var, weight, bias, eps)
    return found


def _learns(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a parameter wants a gradient, or the numbers are not float32 or float64 (autocast has its own rules)."""
    odd = x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type)
    return odd or any(p is not None and (p.requires_grad or p.dtype != x.dtype) for p in parameters)


_REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
}


class InputGradients(TorchFunctionMode):
    """Inside this context, models whose parameters are frozen have cheaper input gradients; see the module."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACED.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return replacement(*args, **(kwargs or {}))
