"""Where models run: chosen by RBX_DEVICE, one GPU for each worker of a machine. The engine needs these five names."""

from __future__ import annotations

import gc
import os

import torch

from robustbench_ext.errors import ConfigError
from robustbench_ext.settings import DEVICE, WORKER


def gpus() -> int:
    """How many GPUs the work of this machine is spread over; 0 where it is done elsewhere or on one that is named."""
    wanted = os.environ.get(DEVICE, "auto")
    return torch.cuda.device_count() if wanted in ("auto", "cuda") and torch.cuda.is_available() else 0


def current() -> torch.device:
    """The device of this process."""
    wanted = os.environ.get(DEVICE, "auto")
    if gpus():
        return torch.device("cuda", int(os.environ.get(WORKER, "0")) % gpus())
    if wanted == "auto":
        return torch.device("cpu")
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device '{wanted}': expected auto, cpu, cuda, cuda:0 or mps") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the device or of the machine, ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def empty_cache() -> None:
    """Give back what the allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
