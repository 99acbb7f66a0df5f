"""`rbx doctor`: is this installation fit to run?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer

from robustbench_ext.cli.console import CHECK_FAILED


def doctor() -> None:
    """Show versions, hardware and what is missing. Exit code 1 if something needed is broken."""
    sound = True
    try:
        from robustbench_ext.provenance import environment

        found = environment()
        for name, version in found["versions"].items():
            print(f"{name:<16} {version}")
        for name, value in found["hardware"].items():
            print(f"{name:<16} {value or 'none'}")
    except ImportError as error:
        print(f"FAIL  {error}. Install torch and torchvision together: pip install torch torchvision")
        sound = False
    try:
        import torchvision

        print(f"ok    torchvision {torchvision.__version__} imports")
    except (ImportError, RuntimeError, AttributeError) as error:
        print(f"FAIL  torchvision does not fit torch ({error}): pip install --upgrade torch torchvision")
        sound = False
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
