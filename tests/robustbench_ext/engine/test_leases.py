"""Leases: one holder, no clock, no waiting for the dead."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from robustbench_ext import leases
from robustbench_ext.leases import Holder, Leases, _born, _machine

posix = pytest.mark.skipif(os.name != "posix", reason="looks for processes")


def write(folder, name, **changes):
    """A lease that somebody else holds: this very process in another run, but for the changes."""
    store = Leases(folder, "other")
    holder = replace(
        Holder(name, "other", "token", _machine(), "elsewhere", os.getpid(), _born(os.getpid())), **changes
    )
    store.folder.mkdir(parents=True, exist_ok=True)
    store.path(name).write_text(json.dumps(asdict(holder)), encoding="utf-8")
    return store.path(name)


def test_one_of_many_holds_it_and_it_is_gone_afterwards(tmp_path):
    inside, most, held = 0, 0, 0
    lock, start = threading.Lock(), threading.Barrier(16)

    def take(i):
        nonlocal inside, most, held
        start.wait()
        with Leases(tmp_path, f"run {i}").hold("cell") as mine:
            if mine:
                with lock:
                    inside, held = inside + 1, held + 1
                    most = max(most, inside)
                time.sleep(0.02)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=take, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert held >= 1
    store = Leases(tmp_path, "late")
    assert store.is_free("cell")
    store.clear()
    assert not store.folder.exists()  # nothing is left behind, temporary files neither


def test_released_after_an_error_too(tmp_path):
    store = Leases(tmp_path, "run")
    with pytest.raises(ZeroDivisionError), store.hold("cell"):
        raise ZeroDivisionError
    assert store.is_free("cell")


def test_a_lease_of_the_same_run_is_taken_over_at_once(tmp_path):
    write(tmp_path, "cell", run="mine")  # by a worker that is lost, wherever it was
    with Leases(tmp_path, "mine").hold("cell") as mine:
        assert mine
    write(tmp_path, "cell", run="another")
    with Leases(tmp_path, "mine").hold("cell") as mine:
        assert not mine


@posix
def test_a_holder_that_is_gone_from_this_machine_is_seen_at_once(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", "pass"])
    done.wait()
    store = Leases(tmp_path, "mine")
    write(tmp_path, "cell", pid=done.pid)
    assert store.is_free("cell")
    # Another process that has got the number since is not the holder.
    if _born(os.getpid()):
        write(tmp_path, "cell", born="0")
        with store.hold("cell") as mine:
            assert mine
    # The same number in another container means another process.
    write(tmp_path, "cell", pid=done.pid, machine="another")
    assert not store.is_free("cell")


@pytest.mark.skipif(not _born(os.getpid()), reason="reads /proc")
def test_a_holder_that_has_ended_and_was_not_buried_is_gone(tmp_path):
    store = Leases(tmp_path, "mine")
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    write(tmp_path, "cell", pid=child.pid, born=_born(child.pid))
    assert not store.is_free("cell")
    child.stdin.close()  # it ends, and nobody asks how: a zombie, as in containers without an init
    deadline = time.monotonic() + 30
    while not store.is_free("cell") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.is_free("cell")
    child.wait()


def test_a_holder_elsewhere_counts_as_gone_once_it_is_not_touched_for_long(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    store = Leases(tmp_path, "mine", stale=120)
    path = write(tmp_path, "cell", machine="another")
    # However old the file says it is: the clock of the machine that wrote it may be anything.
    os.utime(path, (0, 0))
    assert not store.is_free("cell")
    now[0] += 119
    assert not store.is_free("cell")
    # A touch counts, also one that sets the time back because that clock has jumped.
    os.utime(path, (-1e6, -1e6))
    now[0] += 119
    assert not store.is_free("cell")
    now[0] += 119
    assert not store.is_free("cell")
    now[0] += 2
    assert store.is_free("cell")
    assert not path.exists()


def test_no_clock_but_the_monotonic_one_is_read(tmp_path, monkeypatch):
    def jumping():
        raise AssertionError("the system's clock may jump")

    monkeypatch.setattr(leases.time, "time", jumping)
    store = Leases(tmp_path, "mine")
    with store.hold("cell") as mine:
        assert mine
        assert not Leases(tmp_path, "other").is_free("cell")


def test_the_holder_touches_it_until_somebody_takes_it_over(tmp_path):
    store = Leases(tmp_path, "mine", beat=0.02)
    with store.hold("cell"):
        path = store.path("cell")
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while path.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime_ns != before
        taken = write(tmp_path, "cell", token="new", machine="another")
        time.sleep(0.1)
        after = taken.stat().st_mtime_ns
        time.sleep(0.1)
        assert taken.stat().st_mtime_ns == after
    assert taken.is_file()  # and it is not dropped by the old holder either


def test_breaking_a_lease_that_somebody_else_has_just_taken_gives_it_back(tmp_path):
    store = Leases(tmp_path, "mine")
    path = write(tmp_path, "cell", token="old")
    looked_at = store.holder("cell")
    write(tmp_path, "cell", token="new")  # between looking and breaking
    store._break(path, looked_at)
    assert store.holder("cell").token == "new"
    store._break(path, store.holder("cell"))
    assert store.holder("cell") is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}'])
def test_a_damaged_lease_is_waited_for_and_then_removed(tmp_path, monkeypatch, content):
    now = [0.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    store = Leases(tmp_path, "mine", stale=120)
    path = write(tmp_path, "cell")
    path.write_text(content, encoding="utf-8")
    with store.hold("cell") as mine:
        assert not mine
    assert not store.is_free("cell")
    now[0] += 121
    assert store.is_free("cell")
    with store.hold("cell") as mine:
        assert mine


def test_file_systems_without_links_will_do(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(leases.os, "link", no_links)
    store = Leases(tmp_path, "mine")
    with store.hold("cell") as mine:
        assert mine
        with Leases(tmp_path, "other").hold("cell") as other:
            assert not other
    assert store.is_free("cell")
