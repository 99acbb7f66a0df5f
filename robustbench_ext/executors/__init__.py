"""Where work is done: in this process, in several, on a cluster. All keep the interface of `concurrent.futures`."""

from robustbench_ext.executors.base import CLUSTERS, EXECUTORS, LostWorker, SerialExecutor, make_executor, room_of

__all__ = ["CLUSTERS", "EXECUTORS", "LostWorker", "SerialExecutor", "make_executor", "room_of"]
