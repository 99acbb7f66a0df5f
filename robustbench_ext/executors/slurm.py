"""Work as jobs of a Slurm cluster, through submitit.

One job per worker, not per piece of work: a cell may take seconds, a place in Slurm's queue minutes. The jobs serve the
queue in the run folder (`robustbench_ext.executors.queue`) and end with it; one that Slurm ends before (time limit,
preemption, a node that fails) is submitted again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from robustbench_ext.errors import ConfigError, MissingExtraError
from robustbench_ext.executors.queue import QueueExecutor, serve

RESUBMISSIONS = 5  # for each worker, of jobs that ended before their work did
MINUTES = 240


class SlurmExecutor(QueueExecutor):
    """Workers that are Slurm jobs.

    Args:
        folder: the run folder, on a file system that the nodes share, under the same path.
        cluster: `slurm`; `local` (processes) or `debug` (in process) for submitit's stand-ins.
        workers: jobs.
        options: submitit's parameters, such as `slurm_partition=gpu`, `timeout_min=240`, `slurm_account=...`.
    """

    def __init__(
        self, folder: Path, cluster: str, workers: int, options: Mapping[str, str], say: Callable[[str], None]
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise MissingExtraError("executor slurm: pip install 'robustbench-ext[slurm]'") from None
        from robustbench_ext.device import gpus

        given = {"timeout_min": MINUTES, "name": "rbx", **{k: yaml.safe_load(v) for k, v in options.items()}}
        if gpus():
            given.setdefault("gpus_per_node", 1)
        if cluster == "slurm":
            given.setdefault("cpus_per_task", 1)
        try:
            self._submitit = submitit.AutoExecutor(folder=folder.resolve() / "slurm", cluster=cluster)
            self._submitit.update_parameters(**given)
        except (RuntimeError, ValueError, TypeError, NameError, KeyError, AssertionError) as error:
            raise ConfigError(
                f"executor slurm{'' if cluster == 'slurm' else ':' + cluster}: {error}. It needs Slurm's sbatch on this "
                f"machine; options are submitit's, such as slurm_partition=gpu or timeout_min=240"
            ) from error
        super().__init__(folder, workers, say)
        self._run_folder, self._left = folder.resolve(), RESUBMISSIONS * workers
        self._jobs: list[Any] = [self._start() for _ in range(workers)]
        said = ", ".join(str(job.job_id) for job in self._jobs)
        say(f"{'Slurm' if cluster == 'slurm' else cluster} jobs {said}; their logs are in {folder / 'slurm'}")
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _start(self) -> Any:
        return self._submitit.submit(serve, self._run_folder, idle=float("inf"), queue=self.folder.name)

    def _keep(self) -> None:
        """Submit again what ended too early."""
        while not self._over.wait(2.0):
            for i, job in enumerate(self._jobs):
                if not job.done() or not self.pending or self._over.is_set():
                    continue
                if self._left > 0:
                    self._left -= 1
                    self._jobs[i] = self._start()
                    self._say(
                        f"job {job.job_id} ended before its work was done; {self._jobs[i].job_id} takes its place"
                    )
                elif all(other.done() for other in self._jobs):
                    self.give_up(f"all jobs ended before the work was done; the last said: {_last_words(job)}")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the queue; jobs end after what they have in hand, or are cancelled if nobody waits for it."""
        if self._over.is_set():
            return
        super().shutdown(wait, cancel_futures=cancel_futures)
        self._keeper.join()
        for job in self._jobs:
            if cancel_futures or not wait:
                job.cancel()
            elif not job.done():
                job.wait()


def _last_words(job: Any) -> str:
    try:
        text = (job.stderr() or "").strip()
    except Exception as error:  # submitit raises what it meets when a log is not there
        return f"nothing ({type(error).__name__})"
    return text.splitlines()[-1] if text else "nothing"
