"""Scheduling: order, lost workers, work that another run has in hand, what stops a run."""

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from robustbench_ext import execute
from robustbench_ext.errors import ConfigError, StoppedError
from robustbench_ext.execute import HELD, LOSSES, Hooks, Job, WorkError, run_jobs
from robustbench_ext.executors import LostWorker, SerialExecutor, make_executor, room_of


class Record:
    """Hooks that remember."""

    def __init__(self, **hooks):
        self.done, self.failed, self.lost = [], {}, []
        self.hooks = Hooks(
            lambda job, facts: self.done.append(job.id),
            lambda job, failure: self.failed.update({job.id: failure.error}),
            lambda job, why: self.lost.append(job.id),
            **hooks,
        )


def jobs(*ids, after=None, cost=None):
    return [Job(i, i, i, frozenset((after or {}).get(i, ())), (cost or {}).get(i, 0.0)) for i in ids]


def test_work_in_this_process_is_named_before_it_begins():
    record, seen = Record(), []
    record.hooks.tick = lambda running: seen.append([job.id for job in running])

    def work(name):
        seen.append(name)
        return {}

    assert run_jobs(jobs("a", "b"), work, SerialExecutor(), record.hooks) == []
    assert [what for what in seen if what in ("a", "b", ["a"], ["b"])] == [["a"], "a", ["a"], ["b"], "b", ["b"]]


def test_lost_work_is_given_out_again():
    tries = []

    def work(name):
        tries.append(name)
        if name == "b" and tries.count("b") < LOSSES:
            raise LostWorker("killed")
        return {}

    record = Record()
    assert run_jobs(jobs("a", "b", "c", after={"c": ["b"]}), work, SerialExecutor(), record.hooks) == []
    assert record.done == ["a", "b", "c"]
    assert record.lost == ["b"] * (LOSSES - 1)


def test_work_that_kills_its_workers_is_a_failure_and_the_rest_goes_on():
    tries = []

    def work(name):
        tries.append(name)
        if name == "b":
            raise LostWorker("killed by signal 9")
        return {}

    record = Record()
    failures = run_jobs(jobs("a", "b", "c", "d", after={"c": ["b"]}), work, SerialExecutor(), record.hooks)
    assert tries.count("b") == LOSSES
    assert "killed by signal 9" in record.failed["b"]
    assert record.failed["c"].startswith(execute.NOT_STARTED)
    assert record.done == ["a", "d"]
    assert [f.job for f in failures] == ["b", "c"]


def test_work_that_gets_on_between_losses_is_not_to_blame():
    tries, epoch = [], [0]

    def work(name):
        tries.append(name)
        if len(tries) <= 4 * LOSSES:
            epoch[0] += len(tries) % 2  # a checkpoint after every second try
            raise LostWorker("killed")
        return {}

    record = Record(progress=lambda job: epoch[0])
    assert run_jobs(jobs("train"), work, SerialExecutor(), record.hooks) == []
    assert len(record.lost) == 4 * LOSSES


def test_what_another_run_has_in_hand_is_put_aside_until_it_is_free(monkeypatch):
    monkeypatch.setattr(execute, "LOOK", 0.0)
    looks, order = [], []

    def work(name):
        order.append(name)
        return {HELD: True} if name == "a" and len(looks) < 3 else {}

    def is_free(job):
        looks.append(job.id)
        return len(looks) >= 3

    record = Record(is_free=is_free)
    assert run_jobs(jobs("a", "b", "c", after={"c": ["a"]}), work, SerialExecutor(), record.hooks) == []
    assert order == ["a", "b", "a", "c"]  # the rest goes on meanwhile; what needs it does not
    assert record.done == ["b", "a", "c"]


def test_a_full_disk_stops_everything():
    started = []

    def work(name):
        started.append(name)
        if name == "b":
            raise WorkError("no space left", "", True)
        return {}

    with pytest.raises(StoppedError, match="no space left"):
        run_jobs(jobs("a", "b", "c"), work, SerialExecutor(), Record().hooks)
    assert started == ["a", "b"]


def test_a_broken_foreign_pool_says_what_was_in_it():
    def work(name):
        raise BrokenProcessPool("a child process terminated abruptly")

    with pytest.raises(StoppedError, match="during one of: a"):
        run_jobs(jobs("a"), work, SerialExecutor(), Record().hooks)


class Lazy(Executor):
    """Two at a time; each is done when the loop has looked."""

    room = 2

    def __init__(self):
        self.order, self.most, self._open = [], 0, 0

    def submit(self, fn, /, *args, **kwargs):
        self.order.append(args[0])
        future = Future()
        future.set_result({})
        return future


def test_long_work_starts_first_where_several_run_at_once():
    names = "abcd"
    cost = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 9.0}
    lazy = Lazy()
    run_jobs(jobs(*names, after={"d": ["a"]}, cost=cost), lambda name: {}, lazy, Record().hooks)
    assert lazy.order == ["b", "c", "a", "d"]  # d is the longest, and must wait for a
    serial = []
    run_jobs(jobs(*names, cost=cost), lambda name: serial.append(name) or {}, SerialExecutor(), Record().hooks)
    assert serial == list(names)  # one at a time: as written


def test_any_executor_will_do():
    with ThreadPoolExecutor(3) as pool:
        assert room_of(pool) == 6
        record = Record()
        assert run_jobs(jobs(*"abcdefgh"), lambda name: {}, pool, record.hooks) == []
    assert sorted(record.done) == list("abcdefgh")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("locall", None, "Did you mean 'local'"),
        ("local:4", None, "takes no address"),
        ("serial", {"a": "1"}, "takes no options"),
    ],
)
def test_executors_that_do_not_exist(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_executor(name, 10, options=options)
