"""What goes wrong in a run on its own: workers killed, memory and disk used up, files damaged, others on the same folder."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from robustbench_ext import files, leases
from robustbench_ext.cli.console import PARTIAL
from robustbench_ext.engine import Progress, job_id, run_suite
from robustbench_ext.errors import ConfigError, StoppedError
from robustbench_ext.leases import Holder, Leases
from robustbench_ext.memory import BatchSizes
from robustbench_ext.records import RecordStore

posix = pytest.mark.skipif(os.name != "posix", reason="kills processes")


def values(folder):
    return (folder / "results.json").read_bytes(), (folder / "results.csv").read_bytes()


def copied(finished, tmp_path, records=0):
    """A copy of a finished run without its results, and without all but some of its records."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for name in ("results.json", "results.csv", "run.json", "index.json"):
        (out / name).unlink()
    for note in sorted((out / "records").glob("*.json"))[records:]:
        note.unlink()
    return out


@pytest.fixture
def linear_suite():
    return {
        "name": "linear",
        "data": "digits",
        "n": 120,
        "batch_size": 100,
        "chunk_size": 120,
        "models": [],
        "conditions": [{"attack": "pgd", "eps": 0.1, "steps": 3}, {"corruption": "gaussian-noise", "severity": 3}],
        "detectors": ["msp"],
    }


# Disk ----------------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_loses_nothing(finished, tmp_path, tiny_suite, monkeypatch):
    out = copied(finished, tmp_path)
    left = [7]

    def full(descriptor, fsync=os.fsync):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoppedError, match="make room, then run the same command again"):
        run_suite(tiny_suite, out)
    assert len(list((out / "records").glob("*.json"))) == 3  # a record is two files; the fourth has one
    assert not list(out.rglob(".*"))  # no half of a file either
    monkeypatch.undo()
    summary = run_suite(tiny_suite, out)
    assert summary.reused >= 1
    assert values(out) == values(finished[0])


def test_a_disk_that_is_full_when_the_results_are_written(finished, tmp_path, tiny_suite, monkeypatch):
    out = copied(finished, tmp_path, records=10_000)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StoppedError, match="computes nothing anew"):
        run_suite(tiny_suite, out)
    monkeypatch.undo()
    assert run_suite(tiny_suite, out).computed == 0
    assert values(out) == values(finished[0])


@posix
def test_the_command_line_says_it_and_ends_with_4(finished, tmp_path, tiny_suite):
    out = copied(finished, tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_suite))
    command = [
        sys.executable,
        "-m",
        "robustbench_ext.cli.main",
        "run",
        "tiny.yaml",
        "--out",
        "run",
        "--executor",
        "local",
    ]

    import resource  # not on Windows

    def small_files():  # the nearest thing to a full disk that needs no disk: files end at 2,000 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        [*command, "--workers", "2"], cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_files
    )
    assert done.returncode == PARTIAL, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    # What is there is whole: files of less than 2,000 bytes have room.
    assert all(RecordStore(out / "records").has(note.stem) for note in (out / "records").glob("*.json"))
    assert not [path for path in out.rglob(".*") if path.name.startswith(".")]


def test_what_a_full_disk_looks_like():
    assert files.is_disk_full(OSError(errno.ENOSPC, "x"))
    # safetensors is written in Rust, and says it in words.
    assert files.is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    try:
        try:
            raise OSError(errno.EDQUOT, "x")
        except OSError:
            raise ValueError("cannot save") from None
    except ValueError as error:
        assert files.is_disk_full(error)
    assert not files.is_disk_full(OSError(errno.ENOENT, "x"))


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path, tiny_suite):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written to"):
        run_suite(tiny_suite, tmp_path / "run")


def test_a_file_where_the_folder_should_be(tmp_path, tiny_suite):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        run_suite(tiny_suite, tmp_path / "run")


# Damage --------------------------------------------------------------------------------------------------------------


def test_damaged_weights_are_trained_again_not_evaluated(finished, tmp_path, tiny_suite):
    out = copied(finished, tmp_path, records=10_000)
    (weights, other) = sorted(out.glob("models/*/model.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 64  # still a whole file, with another number in it
    weights.write_bytes(bytes(raw))
    other.write_bytes(other.read_bytes()[:-100])
    summary = run_suite(tiny_suite, out)
    assert summary.trained == 2
    assert summary.computed == 0  # training is deterministic, so the records fit the new weights
    assert values(out) == values(finished[0])


# Memory --------------------------------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """Runs out of memory on more inputs at a time than it can hold."""

    def __init__(self, limit):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, 10)
        self.limits = {"limit": limit}  # a mutable attribute that the fingerprint does see
        object.__setattr__(self, "seen", [])

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.limits["limit"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.fc(x.flatten(1))


def test_a_batch_that_does_not_fit_is_halved_said_and_remembered(tmp_path, linear_suite):
    wide, narrow = Hungry(10_000), Hungry(70)
    said = []
    progress = Progress(message=said.append)
    run_suite(linear_suite, tmp_path / "wide", models={"net": wide})
    summary = run_suite(linear_suite, tmp_path / "narrow", models={"net": narrow}, progress=progress)
    assert not summary.failures
    assert [text for text in said if "out of memory" in text] == [
        "net · clean [calibration]: out of memory with batch_size 100; goes on with 50"
    ]
    # 64 inputs of the preflight fit; then one attempt at 100 and none after it: the other cells start with what fits.
    assert narrow.seen.count(100) == 1
    for a, b in zip(
        json.loads((tmp_path / "wide/results.json").read_text())["results"],
        json.loads((tmp_path / "narrow/results.json").read_text())["results"],
        strict=True,
    ):
        # Batches of another size are the same sums in another order: float32 rounding, nothing else.
        assert a["metric"] == b["metric"]
        assert a["value"] == pytest.approx(b["value"], rel=1e-4, abs=1e-6)


def test_another_process_starts_with_what_fits(tmp_path):
    tried = []

    def compute(size):
        tried.append(size)
        if size > 30:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return size

    assert BatchSizes(tmp_path, 250).fitting("net on cpu", compute) == (15, 15)
    assert BatchSizes(tmp_path, 250).fitting("net on cpu", compute) == (15, None)
    assert tried == [250, 125, 62, 31, 15, 15]
    assert BatchSizes(tmp_path, 250).of("net on cuda:0") == 250  # another device, another memory
    assert BatchSizes(tmp_path, 10).of("net on cpu") == 10  # the suite wants less than fits


def test_memory_that_no_batch_size_helps(tmp_path):
    def compute(size):
        raise MemoryError

    with pytest.raises(Exception, match="out of memory with a single input"):
        BatchSizes(tmp_path, 4).fitting("net", compute)
    with pytest.raises(Exception, match="--set batch_size=2"):
        BatchSizes(tmp_path / "other", 4).fitting("net", compute, may_halve=False)

    def defect(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        BatchSizes(tmp_path, 4).fitting("net", defect)


# Workers -------------------------------------------------------------------------------------------------------------

NETS = """
import os, pathlib, signal, torch
FOLDER = pathlib.Path(__file__).parent
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(64, 10)
    def forward(self, x):
        self.die(x)
        return self.fc(x.flatten(1))
    def die(self, x):
        pass
class Once(Net):
    def die(self, x):
        if x.requires_grad and not (FOLDER / "once").exists():
            (FOLDER / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
class Always(Net):
    def die(self, x):
        if x.requires_grad and (FOLDER / "armed").exists():
            with (FOLDER / "deaths").open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_a_worker_that_dies_costs_its_own_work_and_no_more(tmp_path, linear_suite):
    (tmp_path / "nets.py").write_text(NETS)
    said = []
    names = ("Net", "Once", "Always")
    linear_suite["models"] = [{"name": n, "spec": f"{tmp_path / 'nets.py'}:{n}"} for n in names]
    # The preflight asks for gradients too: let the killer arm itself after it.
    calls = []

    def line(i, total, what, facts):
        calls.append(what)
        if what == "Always · preflight":
            (tmp_path / "armed").touch()

    progress = Progress(message=said.append, line=line)
    summary = run_suite(linear_suite, tmp_path / "run", executor="local", workers=2, progress=progress)
    assert [f.what for f in summary.failures] == ["Always · pgd Linf 0.1"]
    assert "3 workers died" in summary.failures[0].error
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert any(text.startswith("Once ·") and "another worker takes it over" in text for text in said)
    for name in ("Net", "Once"):
        assert summary.results.find(model=name, condition="pgd Linf 0.1", metric="robust_accuracy")
    assert summary.results.find(model="Always", condition="gaussian-noise 3", metric="accuracy")


# Other runs of the same folder ---------------------------------------------------------------------------------------


def holding(folder, name, **changes):
    """A lease of another run that this process seems to hold."""
    pid = os.getpid()
    holder = Holder(name, "other", "token", leases._machine(), "host-b", pid, leases._born(pid))
    store = Leases(folder, "other")
    store.folder.mkdir(parents=True, exist_ok=True)
    store.path(name).write_text(json.dumps(asdict(replace(holder, **changes))))
    return store.path(name)


def test_work_that_another_run_has_in_hand_is_waited_for(finished, tmp_path, tiny_suite):
    out = copied(finished, tmp_path, records=10_000)
    cell = ("trades", "pgd Linf 0.1", "test", 1)
    # One record is missing, and another run is computing it: it appears, and then the lease goes.
    note = next(
        n
        for n in (out / "records").glob("*.json")
        if json.loads(n.read_text())["what"] == "trades · pgd Linf 0.1 part 2"
    )
    content = note.read_text()
    note.unlink()
    lease = holding(out, job_id("cell", cell))
    said = []

    def other_run():
        deadline = time.monotonic() + 60
        while not any("host-b" in text for text in said) and time.monotonic() < deadline:
            time.sleep(0.01)
        note.write_text(content)
        lease.unlink()

    other = threading.Thread(target=other_run)
    other.start()
    summary = run_suite(tiny_suite, out, progress=Progress(message=said.append))
    other.join()
    assert summary.computed == 0
    assert sum("host-b is at it, in another run of this folder" in text for text in said) == 1
    assert values(out) == values(finished[0])


@posix
def test_leases_of_a_run_that_was_killed_hold_nobody_up(finished, tmp_path, tiny_suite):
    out = copied(finished, tmp_path, records=30)
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    for part in (0, 1):
        holding(out, job_id("cell", ("trades", "pgd Linf 0.1", "test", part)), pid=dead.pid)
    run_suite(tiny_suite, out)
    assert values(out) == values(finished[0])
    assert not (out / "leases").exists()


def test_a_clock_that_jumps_changes_nothing(finished, tmp_path, tiny_suite, monkeypatch):
    out = copied(finished, tmp_path)
    draws = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: draws.uniform(-1e9, 4e9))
    run_suite(tiny_suite, out)
    assert values(out) == values(finished[0])


@pytest.mark.slow
@posix
def test_two_runs_started_on_one_folder_share_the_work(finished, tmp_path, tiny_suite):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_suite))
    command = [sys.executable, "-m", "robustbench_ext.cli.main", "run", "tiny.yaml", "--out", "run"]
    runs = [
        subprocess.Popen(
            [*command, "--executor", executor],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for executor in ("serial", "local")
    ]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] in ([0, 0], [1, 1]), errors
    assert values(tmp_path / "run") == values(finished[0])
    computed = [int(text.rpartition("computed ")[2].partition(",")[0]) for text in errors if "computed " in text]
    cells = finished[1].computed
    assert sum(computed) == cells, errors  # nothing was computed twice
    assert not (tmp_path / "run" / "leases").exists()


def test_the_run_folder_holds_no_queue_and_no_lease_afterwards(finished):
    names = {path.name for path in Path(finished[0]).iterdir()}
    assert not names & {"leases", "queue", "batch_sizes"}
