"""Settings of a process that travel with the work: a worker on another machine follows those of the run that started it.

They are environment variables, so that they can be set once for a shell, and none of them belongs in a suite: where data
lies and what a user allows is a matter of this machine and this user, not of the experiment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

DATA = "RBX_DATA"  # folder of local copies of published datasets
DEVICE = "RBX_DEVICE"  # auto, cpu, cuda, cuda:1, mps
DETERMINISTIC = "RBX_DETERMINISTIC"  # 1: only algorithms that give the same bits every time, on a GPU too
UNSAFE = "RBX_ALLOW_UNSAFE_LOAD"  # 1: files that can run code when they are loaded may be loaded
TRAVELLING = (DATA, DEVICE, DETERMINISTIC, UNSAFE)
WORKER = "RBX_WORKER"  # number of this process among the workers of its machine, from 0; set by executors


def snapshot() -> dict[str, str]:
    """The settings of this process, as they are sent with every piece of work."""
    return {name: os.environ[name] for name in TRAVELLING if name in os.environ}


def follow(settings: Mapping[str, str]) -> None:
    """Take over the settings of another process; those that it did not set are unset here too."""
    for name in TRAVELLING:
        if name in settings:
            os.environ[name] = settings[name]
        else:
            os.environ.pop(name, None)


@contextmanager
def changed(**values: str | None) -> Iterator[None]:
    """Inside the block the named settings have these values (None: as they are); afterwards the old ones."""
    before = {name: os.environ.get(name) for name in values}
    try:
        os.environ.update({name: value for name, value in values.items() if value is not None})
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
