"""Where a training runs: one process on one device, or several under accelerate's launcher.

The global batch is cut into one part a process. Each part's mean loss is scaled by its share of the batch, so that the
averaged gradients are those of the joint batch whatever the sizes of the parts. Batch norm sees its process's part only,
except on GPUs, where it is synchronised.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.device import current
from robustbench_ext.errors import ConfigError


class Runtime:
    """Devices and processes.

    Args:
        device: "auto" (what RBX_DEVICE says, else a GPU if there is one), "cpu", "cuda", "cuda:1"; under a launcher every
            process gets its own.
        precision: "float32" or "bfloat16".

    Attributes:
        device, rank, world: this process's device, its number, and how many there are.
    """

    def __init__(self, device: str = "auto", precision: str = "float32") -> None:
        self.precision = precision
        self._accelerator: Any = None
        self.rank, self.world = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._accelerator = _accelerator(device)
            self.device = torch.device(self._accelerator.device)
            self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        else:
            device = str(current()) if device == "auto" else device
            if device.startswith("cuda") and not torch.cuda.is_available():
                raise ConfigError(f"device '{device}': torch sees no GPU here; give --device cpu")
            try:
                self.device = torch.device(device)
            except RuntimeError:
                raise ConfigError(f"device '{device}': expected auto, cpu, cuda or cuda:NUMBER") from None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the outer loss calls it; the inner attack works on the bare one."""
        if self._accelerator is None:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        wrapped: nn.Module = self._accelerator.prepare_model(model)
        return wrapped

    def part(self, index: np.ndarray) -> np.ndarray:
        """This process's samples of a global batch."""
        return np.array_split(index, self.world)[self.rank]

    def scale(self, part: int, whole: int) -> float:
        """What a part's mean loss is multiplied by before gradients are averaged over processes."""
        return part * self.world / whole

    @contextmanager
    def precise(self) -> Iterator[None]:
        """Forward passes in the chosen precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            yield

    def average_gradients(self, module: nn.Module) -> None:
        """Average the gradients of parameters that no wrapper takes care of, such as a projection head's."""
        if self.world > 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.world

    def average_buffers(self, buffers: Iterable[Tensor]) -> None:
        """Give all processes the mean batch-norm statistics."""
        if self.world > 1:
            for buffer in buffers:
                if buffer.is_floating_point():
                    torch.distributed.all_reduce(buffer)
                    buffer /= self.world

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        if self.world == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(total)
        return bool(total > 0)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over processes."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def from_main(self, make: Any) -> Any:
        """What the main process makes, on every process."""
        if self.world == 1:
            return make()
        box = [make() if self.is_main else None]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def close(self) -> None:
        """Wait for the others."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def _accelerator(device: str) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise ConfigError(
            "several processes were launched, which needs accelerate: pip install 'robustbench-ext[train]'"
        ) from None
    # Two forward passes come before each backward pass (natural and adversarial); broadcasting the buffers in the second
    # would change them under the first one's feet. They are averaged after every epoch instead.
    options = DistributedDataParallelKwargs(broadcast_buffers=False)
    chosen = str(current()) if device == "auto" else device
    on_cpu = chosen == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=on_cpu, kwargs_handlers=[options])
