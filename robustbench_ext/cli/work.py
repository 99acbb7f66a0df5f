"""`rbx work`: be a worker of a run folder."""

from __future__ import annotations

from pathlib import Path

import typer

from robustbench_ext.cli.console import say


def work(
    folder: Path = typer.Argument(help="The run folder, seen under the same path as by the run."),
    idle: float = typer.Option(600.0, min=0.0, help="Seconds without work after which it ends."),
) -> None:
    """Be a worker: take work from the queue of a run folder until the run closes it.

    For schedulers and machines that have no executor of their own: start any number of these wherever the folder can be seen,
    and the run with `rbx run SUITE --out FOLDER --executor queue`. Each computes with one thread, on the device that the run
    names; CUDA_VISIBLE_DEVICES chooses among several GPUs.

    Example: rbx work /shared/runs/quickstart
    """
    from robustbench_ext.executors.queue import serve

    serve(folder, idle=idle, say=say)
