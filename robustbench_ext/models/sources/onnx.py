"""`onnx:FILE`: an ONNX graph, as a PyTorch module where it converts faithfully, otherwise as a black box over onnxruntime."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustbench_ext.errors import ConfigError, ModelError, unknown_name
from robustbench_ext.models.black_box import CLIP, BlackBox
from robustbench_ext.models.contract import frozen_eval
from robustbench_ext.models.sources.base import Found, Wanted, existing_file, in_batches, options, package

RTOL = 1e-3  # of the largest output: far above rounding, far below what a wrong operator does
_FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64}
_PROBES = 5  # inputs that conversion and runtime are compared on; no common fixed batch size


@dataclass(frozen=True)
class Layout:
    """How the graph wants its input: (n, C, H, W), (n, H, W, C) or (n, C H W); so many at a time; of which type.

    Attributes:
        order: "NCHW", "NHWC" or "flat"; batch: 0 for any number.
        output: position of the output that is read.
        probabilities: whether that holds probabilities, whose logarithm is taken.
    """

    order: str
    batch: int
    dtype: torch.dtype
    output: int
    probabilities: bool

    def arranged(self, x: Tensor) -> Tensor:
        """(n, C, H, W) as the graph wants it."""
        x = x.permute(0, 2, 3, 1) if self.order == "NHWC" else x.flatten(1) if self.order == "flat" else x
        return x.to(self.dtype).contiguous()

    def logits(self, out: Tensor) -> Tensor:
        """What is read of the graph's output."""
        out = out.float()
        return out.clamp_min(CLIP).log() if self.probabilities else out


class Runtime(BlackBox):
    """Scores of a graph from onnxruntime, on one CPU thread."""

    def __init__(self, file: Path, layout: Layout, said: str, onnxruntime: Any) -> None:
        super().__init__(said)
        self.layout = layout
        self.session = _session(onnxruntime, file)

    def scores(self, x: np.ndarray) -> np.ndarray:
        given = self.layout.arranged(torch.from_numpy(x))
        return self.layout.logits(in_batches(self._run, given, self.layout.batch)).numpy()

    def _run(self, x: Tensor) -> Tensor:
        name = self.session.get_outputs()[self.layout.output].name
        (out,) = self.session.run([name], {self.session.get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(np.asarray(out))


class Converted(nn.Module):
    """The graph as a PyTorch module (onnx2torch). Where it takes batches of one size, it runs several times in a pass
    (`in_parts`), so that hooks see the last part alone, and features cannot be read.
    """

    def __init__(self, network: nn.Module, layout: Layout, said: str) -> None:
        super().__init__()
        self.network, self.layout, self.said = network, layout, said
        self.in_parts = layout.batch > 0

    def extra_repr(self) -> str:
        return self.said

    def forward(self, x: Tensor) -> Tensor:
        return self.layout.logits(in_batches(self._run, self.layout.arranged(x), self.layout.batch))

    def _run(self, x: Tensor) -> Tensor:
        out = self.network(x)
        logits: Tensor = out[self.layout.output] if isinstance(out, (tuple, list)) else out
        return logits


def load(wanted: Wanted) -> Found:
    """A graph with one input. Batches are cut to its size where that is fixed; images are turned to (n, H, W, C) or flattened
    where the shape of its input says so.

    It becomes a PyTorch module, with gradients, if onnx2torch knows all its operators, if its outputs agree with onnxruntime's
    on random images, and if a gradient comes back. Otherwise it is a black box (`differentiable = False`), and the note says
    why.

    Options: `output` by name, where there are several (the first by default); `probabilities: true` where the graph ends in a
    softmax: its logarithm is read, clipped at 1e-6.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        ModelError: no such file, no graph, or one of another input than the data's.
    """
    chosen = options(wanted, output=None, probabilities=False)
    file = existing_file(wanted)
    onnxruntime = package("onnxruntime", "onnx", wanted)
    try:
        session = _session(onnxruntime, file)
    except Exception as error:  # onnxruntime's classes of errors are its own
        raise ModelError(f"model '{wanted.spec}' is no graph that onnxruntime can run: {error}") from error
    layout = _layout(session, wanted, chosen)
    said = f"{file.name}, sha256={hashlib.sha256(file.read_bytes()).hexdigest()[:20]}, {chosen}"
    runtime = Runtime(file, layout, f"{said}, onnxruntime {onnxruntime.__version__}", onnxruntime)
    network, why = _converted(file, layout, said, runtime, wanted)
    notes = _notes(layout if network is None else network.layout)
    if network is None:
        return Found(runtime, notes=[*notes, f"no gradients: runs in onnxruntime as a black box, since {why}"])
    return Found(network, notes=[*notes, f"converted by onnx2torch, with gradients; {why}"])


def _session(onnxruntime: Any, file: Path) -> Any:
    told = onnxruntime.SessionOptions()
    told.intra_op_num_threads = told.inter_op_num_threads = (
        1  # sums add up in another order with another number of threads
    )
    told.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), told, providers=["CPUExecutionProvider"])


def _layout(session: Any, wanted: Wanted, chosen: dict[str, Any]) -> Layout:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type not in _FLOATS:
        told = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise ModelError(f"model '{wanted.spec}' takes {told}; expected one input of floats")
    names = [o.name for o in outputs]
    if chosen["output"] is not None and chosen["output"] not in names:
        raise ConfigError(f"model '{wanted.spec}': {unknown_name('output', str(chosen['output']), names)}")
    output = names.index(chosen["output"]) if chosen["output"] is not None else 0
    if outputs[output].type not in _FLOATS:
        raise ModelError(
            f"model '{wanted.spec}': its output '{names[output]}' is {outputs[output].type}, expected logits (N, K) of floats. "
            f"Choose another by #output=NAME, of {', '.join(names)}."
        )
    batch, *made = (side if isinstance(side, int) and side > 0 else 0 for side in inputs[0].shape)
    channels, height, width = wanted.shape
    orders = {
        "NCHW": (channels, height, width),
        "NHWC": (height, width, channels),
        "flat": (channels * height * width,),
    }
    for order, given in orders.items():
        if len(made) == len(given) and all(mine in (0, theirs) for mine, theirs in zip(made, given, strict=True)):
            dtype = _FLOATS[inputs[0].type]
            return Layout(order, batch, dtype, output, bool(chosen["probabilities"]))
    raise ModelError(
        f"model '{wanted.spec}' takes inputs {inputs[0].shape}, and is given (N, {channels}, {height}, {width}). Add "
        f"#resize=SIDE or, for grey images, #channels=3 behind its name, or export it for these images."
    )


def _notes(layout: Layout) -> list[str]:
    notes = [f"takes {layout.batch} inputs at a time; batches are cut and filled up"] if layout.batch else []
    notes += (
        [f"images are given as {'(n, H, W, C)' if layout.order == 'NHWC' else '(n, C H W)'}"]
        if layout.order != "NCHW"
        else []
    )
    return notes + (
        [f"its outputs are taken for probabilities: logits are log(max(p, {CLIP:g}))"] if layout.probabilities else []
    )


def _converted(file: Path, layout: Layout, said: str, runtime: Runtime, wanted: Wanted) -> tuple[Converted | None, str]:
    """The graph as a module, and how near it is to onnxruntime; or None, and why."""
    onnx2torch = package("onnx2torch", "onnx", wanted)
    if layout.dtype is not torch.float32:
        return None, f"its input is {layout.dtype}"
    x = torch.from_numpy(np.random.default_rng(0).random((_PROBES, *wanted.shape), dtype=np.float32))
    theirs = torch.from_numpy(runtime.scores(x.numpy()))
    why = ""
    # The batch size that a file names is often that of the example it was exported with, and nothing in the graph needs it.
    for batch in dict.fromkeys((0, layout.batch)):
        try:
            network = Converted(onnx2torch.convert(str(file)), replace(layout, batch=batch), said).eval()
            with frozen_eval(network), torch.enable_grad():
                leaf = x.clone().requires_grad_(True)
                out = network(leaf)
                gradient = (
                    torch.autograd.grad(out.sum(dim=0)[0], leaf, allow_unused=True)[0] if out.requires_grad else None
                )
        except Exception as error:  # operators that onnx2torch does not know, and whatever its modules raise
            lines = str(error).strip().splitlines()
            why = f"onnx2torch cannot convert it ({type(error).__name__}: {lines[0] if lines else ''})"
            continue
        why = _difference(out.detach(), theirs)
        if why:
            continue
        if gradient is None or not bool(gradient.any()):
            return None, "its gradient is zero everywhere (quantised?)"
        gap = float((out.detach() - theirs).abs().max())
        return network, f"it differs from onnxruntime by {gap:.1g}, with outputs up to {float(theirs.abs().max()):.3g}"
    return None, why


def _difference(ours: Tensor, theirs: Tensor) -> str:
    """What sets the conversion apart from onnxruntime; empty where it is rounding."""
    if ours.shape != theirs.shape:
        return f"the conversion gives shape {tuple(ours.shape)}, onnxruntime {tuple(theirs.shape)}"
    gap, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    return (
        ""
        if gap <= RTOL * size
        else f"the conversion differs from onnxruntime by {gap:.3g}, with outputs up to {size:.3g}"
    )
