"""A second device for machines without one: it computes on the CPU and refuses what a GPU refuses.

Tensors of type `Elsewhere` say that they are on `DEVICE`; each holds a CPU tensor and computes with it. Inside `second_device`

- what is made with `device=DEVICE` or sent there is `Elsewhere`, and what is sent to the CPU is not any more;
- an operation on tensors of both sides raises, but for what CUDA allows too: a CPU tensor without axes, which counts as a
  number, indices on the CPU, and copies;
- numpy and `tolist` refuse tensors that are elsewhere;
- `Waits` counts what a program would have to wait for: questions to the device (`bool`, `float`, `nonzero`, masks as
  indices) and copies from it. Copies to it count apart.

Numbers are those of the CPU, so results can be compared bit by bit. What it cannot show: kernels that round otherwise,
operations that CUDA has not, pinned memory, and time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("xla", 0)  # a type that torch knows, has no code for here, and does not try to start
CPU = torch.device("cpu")
aten = torch.ops.aten

float64 = True  # false: like Apple's devices, which have none

_ASKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2}
_INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Elsewhere(Tensor):
    """A tensor on the second device."""

    held: Tensor
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        if held.dtype == torch.float64 and not float64:
            raise TypeError(f"{DEVICE} has no float64")
        # For torch's own code it is a "meta" tensor: one without memory, which autograd handles like the CPU's.
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: a tensor of the second device has left `second_device`")


class Waits(Counter[str]):
    """How often the program waited for the device, by place; `sent` counts copies to it, which need not be waited for."""

    sent = 0

    def add(self, why: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        self[f"{why} in {frame.f_code.co_name}, {frame.f_code.co_filename.rpartition('/')[2]}"] += 1


class _Second(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waits = Waits()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        tensors: list[Tensor] = []
        plain_args, plain_kwargs = _held(args, tensors), {key: _held(value, tensors) for key, value in kwargs.items()}
        away = [t for t in tensors if type(t) is Elsewhere]
        if away:
            self._refuse_mixing(func, args, [t for t in tensors if type(t) is not Elsewhere and t.ndim > 0])
            if packet in _ASKS:
                self.waits.add(str(packet))
            if packet in _INDEXES and any(i is not None and i.dtype == torch.bool for i in args[1]):
                self.waits.add("mask")
            if packet is aten.copy_ and not isinstance(args[0], Elsewhere):
                self.waits.add("copy")
        # "meta" is what torch's own code takes the device of these tensors for.
        target = kwargs.get("device")
        goes_away = bool(away) if target is None else target.type in (DEVICE.type, "meta")
        if target is not None:
            plain_kwargs["device"] = CPU
            if packet is aten._to_copy and away and not goes_away:
                self.waits.add("copy")
            self.waits.sent += packet is aten._to_copy and not away and goes_away
        out = func(*plain_args, **plain_kwargs)
        # What works in place returns its argument.
        return _wrapped(out, {id(t.held): t for t in away}) if goes_away else out

    @staticmethod
    def _refuse_mixing(func: Any, args: Any, here: list[Tensor]) -> None:
        packet = func.overloadpacket
        if not here or packet is aten.copy_:
            return
        if packet in _INDEXES and isinstance(args[0], Elsewhere):
            values = args[2] if len(args) > 2 and isinstance(args[2], Tensor) else None
            if values is None or isinstance(values, Elsewhere) or values.ndim == 0:
                return  # indices may lie on the CPU
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu, in {func}"
        )


def _held(value: Any, seen: list[Tensor]) -> Any:
    """What the CPU computes with, in lists and tuples too; all tensors are added to `seen`."""
    if isinstance(value, Tensor):
        seen.append(value)
        return value.held if type(value) is Elsewhere else value
    return type(value)([_held(part, seen) for part in value]) if type(value) in (list, tuple) else value


def _wrapped(value: Any, known: dict[int, Elsewhere]) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else Elsewhere(value)
    return type(value)([_wrapped(part, known) for part in value]) if type(value) in (list, tuple) else value


@contextmanager
def second_device() -> Iterator[Waits]:
    """Inside the block there is a second device; gives what its programs waited for."""
    with _Second() as mode:
        yield mode.waits
