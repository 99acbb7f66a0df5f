"""What a run was made with: versions, hardware, the state of the working tree. Goes to run.json, never to results."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from robustbench_ext import __version__

PACKAGES = ("torch", "torchvision", "torchattacks", "numpy", "scipy", "scikit-learn", "mlxtend", "matplotlib")


def environment() -> dict[str, Any]:
    """Versions, processor, cores, memory, GPUs and, where the package runs from a git checkout, its commit."""
    versions = {"robustbench-ext": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "hardware": hardware(), "commit": commit()}


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cores": cores}
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found["processor"] = names[0] if names else platform.processor()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    import torch

    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def commit() -> str | None:
    """The checkout's commit, with a plus sign where it has uncommitted changes; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        run = [
            subprocess.run(  # noqa: S603
                command, cwd=root, capture_output=True, text=True, encoding="utf-8", timeout=10, check=True
            ).stdout.strip()
            for command in (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0] + ("+" if run[1] else "")
