"""`pt2:FILE`: an archive that `torch.export.save` wrote."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from robustbench_ext.errors import ModelError
from robustbench_ext.models.sources.base import Found, Wanted, existing_file, in_batches, options, refuse_unsafe


class Exported(nn.Module):
    """An exported program, which is neither in training nor in evaluation mode: it stays as it was exported.

    Args:
        program: the unflattened module of the program.
        batch: inputs at a time that it was exported for; 0 for any number.
        said: what it is, with its hash.
    """

    def __init__(self, program: nn.Module, batch: int, said: str) -> None:
        super().__init__()
        self.program, self.batch, self.said = program, batch, said
        self.in_parts = batch > 0  # so that hooks see the last part alone
        self.training = False

    def extra_repr(self) -> str:
        return self.said

    def train(self, mode: bool = True) -> Exported:
        """Its own flag only: exported programs refuse train() and eval()."""
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return in_batches(self.program, x, self.batch)


def load(wanted: Wanted) -> Found:
    """The program of an archive, as it was exported: in evaluation mode, we hope, and with the size that it was exported for.

    Raises:
        ModelError: not allowed, no such file, or none that this PyTorch reads.
    """
    options(wanted)
    file = existing_file(wanted)
    refuse_unsafe(
        wanted.spec,
        "a .pt2 archive holds a program, and pickles beside it",
        "Where you have the network's code, name that and its weights instead: file.py:factory + weights.safetensors, which "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors') writes.",
    )
    try:
        exported = torch.export.load(str(file))
        program = exported.module()
        shape = _input_shape(exported)
    except Exception as error:  # torch.export raises whatever an archive of another version trips over
        raise ModelError(f"model '{wanted.spec}' cannot be loaded: {type(error).__name__}: {error}") from error
    if any(given != made for given, made in zip(wanted.shape, shape[1:], strict=False) if made):
        raise ModelError(
            f"model '{wanted.spec}' was exported for inputs {shape[1:]}, and is given {wanted.shape}. Add #resize= and "
            f"#channels= behind its name, or export it again."
        )
    said = f"{file.name}, sha256={hashlib.sha256(file.read_bytes()).hexdigest()[:20]}"
    notes = [f"exported for {shape[0]} inputs at a time; batches are cut and filled up"] if shape[0] else []
    return Found(Exported(program, shape[0], said), notes=notes)


def _input_shape(exported: torch.export.ExportedProgram) -> tuple[int, ...]:
    """Of the only input; 0 for what may vary."""
    names = exported.graph_signature.user_inputs
    node = next(n for n in exported.graph.nodes if n.op == "placeholder" and n.name == names[0])
    shape = node.meta["val"].shape
    if len(names) != 1 or len(shape) != 4:
        raise ModelError(f"it takes {len(names)} inputs, the first of {len(shape)} axes; expected one, (N, C, H, W)")
    return tuple(side if isinstance(side, int) else 0 for side in shape)
