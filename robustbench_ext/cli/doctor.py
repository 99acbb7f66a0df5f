"""`rbx doctor`: is this installation fit to run?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from robustbench_ext.cli.console import CHECK_FAILED


def doctor() -> None:
    """Show versions, hardware, the device that work would be done on, and what is missing.

    Exit code 1 if something needed is broken.
    """
    sound = _packages()
    sound = _torchvision() and sound
    sound = sound and _device()
    try:
        import torchattacks  # noqa: F401

        print("ok    torchattacks is there: torchattacks:NAME works in suites")
    except ImportError:
        print("note  torchattacks is missing (optional): pip install --no-deps torchattacks")
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()):
            print(f"ok    {Path.cwd()} can be written to")
    except OSError as error:
        print(f"note  {Path.cwd()} cannot be written to ({error}): give --out a folder elsewhere")
    if not sound:
        raise typer.Exit(CHECK_FAILED)


def _packages() -> bool:
    try:
        from robustbench_ext.provenance import environment

        found = environment()
    except ImportError as error:
        print(f"FAIL  {error}. Install torch and torchvision together: pip install torch torchvision")
        return False
    for name, value in {**found["versions"], **found["hardware"]}.items():
        print(f"{name:<16} {value or 'none'}")
    return True


def _torchvision() -> bool:
    """Whether torchvision was built for the torch that is there: for its version, and for its CUDA."""
    try:
        import torch
        import torchvision
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)  # an operation of its own library
    except (ImportError, RuntimeError, AttributeError) as error:
        print(f"FAIL  torchvision does not fit torch ({error}): pip install --upgrade torch torchvision")
        return False
    print(f"ok    torchvision {torchvision.__version__} fits torch {torch.__version__}")
    number, ours = getattr(torchvision.version, "cuda", None), torch.version.cuda
    theirs = f"{number // 1000}.{number % 1000 // 10}" if isinstance(number, int) else number  # 13000 is CUDA 13.0
    if ours is not None and theirs is not None and theirs != ours:
        print(f"note  torchvision is built for CUDA {theirs}, torch for {ours}: install both from one index")
    return True


def _device() -> bool:
    from robustbench_ext.device import describe, gpus
    from robustbench_ext.errors import ConfigError

    try:
        found = describe()
    except ConfigError as error:
        print(f"FAIL  {error}")
        return False
    about = (
        f" ({found['name']}, {found['memory_gib']} GiB, capability {found['capability']})" if "name" in found else ""
    )
    many = f", one worker for each of {gpus()} GPUs" if gpus() > 1 else ""
    print(f"ok    work is done on {found['device']}{about}{many}; $RBX_DEVICE or --device chooses another")
    print("ok    float32 is float32 there (no TF32), but for gradients of attacks where a suite says precision: tf32")
    if found["device"] != "cpu":
        how = "repeats bit by bit here, or fails" if found["deterministic"] else "may differ by rounding between runs"
        print(f"note  a GPU {how}; --deterministic or RBX_DETERMINISTIC=1 is for the former")
    return True
