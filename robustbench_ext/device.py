"""Where models run: chosen by RBX_DEVICE, one GPU for each worker of a machine; and what numbers they compute with there.

Nothing else of the package asks for GPUs. A model is put on `current()` by the process that works with it; whatever calls it
sends its inputs to where the model is (`of`, `send`, `call`) and takes the outputs back.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError
from robustbench_ext.settings import DETERMINISTIC, DEVICE, WORKER

PRECISIONS = ("float32", "tf32", "bfloat16")
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE = (":4096:8", ":16:8")  # the workspaces with which cuBLAS repeats itself bit by bit


# Which device --------------------------------------------------------------------------------------------------------


def gpus() -> int:
    """How many GPUs the work of this machine is spread over; 0 where it is done elsewhere or on one that is named."""
    return _cuda_count() if _wanted() in ("auto", "cuda") else 0


def current() -> torch.device:
    """The device of this process.

    RBX_DEVICE names it: `cpu`; `cuda:1`, that GPU; `cuda`, a GPU, of several the one whose number is RBX_WORKER modulo their
    number; `mps`; `auto` (default), as `cuda` where there is a GPU, else the CPU. `auto` never chooses `mps`, which has no
    float64.

    Raises:
        ConfigError: no such device here; the message says what there is.
    """
    wanted = _wanted()
    if wanted == "auto" and not gpus():
        return torch.device("cpu")
    if gpus():
        return torch.device("cuda", _worker() % gpus())
    try:
        named = torch.device(wanted)
    except RuntimeError:
        named = None
    if named is None or named.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device '{wanted}': expected auto, cpu, cuda, cuda:NUMBER or mps. {_there()}")
    missing = (named.type == "cuda" and (named.index or 0) >= _cuda_count()) or (
        named.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ConfigError(f"device '{wanted}' is not to be had. {_there()}")
    return named


def of(model: nn.Module, otherwise: torch.device | str = "cpu") -> torch.device:
    """Where a model is: the device of its first parameter or buffer; `otherwise` where it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device(otherwise)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in double precision: all that we know of but Apple's do."""
    return device.type != "mps"


def send(batch: Tensor, to: torch.device, copy: bool = False) -> Tensor:
    """A batch on a device; to a GPU through pinned memory, without waiting for it.

    Args:
        copy: never the caller's own memory, so that a model that works in place changes nothing of it.
    """
    if to.type == "cuda" and batch.device.type == "cpu":
        return batch.pin_memory().to(to, non_blocking=True)
    return batch.to(to, copy=copy)


def call(model: nn.Module, x: Tensor) -> Tensor:
    """`model(x)` wherever the model is; the outputs come back to where x is, with their gradient."""
    out: Tensor = model(x.to(of(model, x.device)))
    return out.to(x.device)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was asked for: before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def name(device: torch.device) -> str:
    """What kind of device it is: a GPU's name, such as `NVIDIA H100 80GB HBM3`, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe() -> dict[str, Any]:
    """The device of this process; of a GPU, its name, memory in GiB and compute capability. Whether it repeats bit by bit."""
    device = current()
    found: dict[str, Any] = {"device": str(device), "deterministic": _wants_determinism()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"name": about.name, "memory_gib": round(about.total_memory / 2**30, 1)}
        found["capability"] = f"{about.major}.{about.minor}"
    return found


def _wanted() -> str:
    return os.environ.get(DEVICE, "auto").strip() or "auto"


def _worker() -> int:
    given = os.environ.get(WORKER, "0")
    if not given.isdigit():
        raise ConfigError(f"{WORKER} = '{given}', expected the number of this process on its machine, from 0")
    return int(given)


def _cuda_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _there() -> str:
    """What devices there are, one sentence."""
    found = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(_cuda_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    why = "" if _cuda_count() else f"; torch {torch.__version__} sees no GPU"
    if torch.version.cuda is None and not _cuda_count():
        why += ", it is built without CUDA"
    return f"Here there is {', '.join(found)}{why}."


# Which numbers -------------------------------------------------------------------------------------------------------


@contextmanager
def settled() -> Iterator[torch.device]:
    """Inside the block this process computes as a run does: float32 that is float32, and with RBX_DETERMINISTIC=1 only
    algorithms that repeat bit by bit (an operation that has none raises PyTorch's RuntimeError). Afterwards as before.
    """
    with contextlib.ExitStack() as stack:
        if _wants_determinism():
            stack.enter_context(_deterministic())
        stack.enter_context(float32())
        yield current()


@contextmanager
def float32(tf32: bool = False) -> Iterator[None]:
    """Inside the block float32 products on a GPU are rounded as float32, or (`tf32`) to TensorFloat-32's 10 bits.

    PyTorch's own default is TF32 for convolutions: relative errors of 1e-3, which decide over inputs at a boundary. These
    settings are the process's; the old ones come back.
    """
    with _restored(_settings()):
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        if _BY_OPERATION:
            places: list[Any] = [matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
            for place in places:  # "none", which the old names set, means the global setting
                place.fp32_precision = "tf32" if tf32 else "ieee"
        yield


_BY_OPERATION = hasattr(torch.backends, "fp32_precision")  # since torch 2.9, beside the old names


def _settings() -> list[tuple[Any, str]]:
    """Where PyTorch keeps what decides between float32 and TF32; old names first, since they set the new ones too."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    old = [(place, "allow_tf32") for place in (matmul, cudnn)]
    new = [(place, "fp32_precision") for place in (matmul, cudnn.conv, cudnn.rnn)] if _BY_OPERATION else []  # type: ignore[attr-defined]
    return old + new


@contextmanager
def _restored(settings: list[tuple[Any, str]]) -> Iterator[None]:
    before = []
    for place, key in settings:
        # The old name cannot be read where a user has set the new ones; then those are what counts.
        with contextlib.suppress(RuntimeError):
            before.append((place, key, getattr(place, key)))
    try:
        yield
    finally:
        for place, key, value in before:
            setattr(place, key, value)


def _wants_determinism() -> bool:
    return os.environ.get(DETERMINISTIC, "0") not in ("", "0")


@contextmanager
def _deterministic() -> Iterator[None]:
    # cuBLAS reads it when it first works, so a process that has used a GPU before may be too late.
    if os.environ.get(_CUBLAS) not in _REPEATABLE:
        os.environ[_CUBLAS] = _REPEATABLE[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with _restored([(torch.backends.cudnn, "benchmark")]):
        try:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False  # it picks algorithms by a stopwatch
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# Which memory --------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the device or of the machine, ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # CUDA's and MPS's "out of memory"; the CPU allocator's, on Linux and on Windows; libraries that fail to get theirs.
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "alloc_failed",
        "bad allocation",
        "bad_alloc",
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def empty_cache() -> None:
    """Give back what the allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
