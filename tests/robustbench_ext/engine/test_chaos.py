"""Twenty random SIGKILLs, of workers and of whole runs: the results are those of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from robustbench_ext.engine import run_suite
from robustbench_ext.records import RecordStore

KILLS, IN_TRAINING = 20, 8
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc"),
]


def living(session):
    """Processes of a session that are no zombies, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            mine = entry.name.isdigit() and os.getsid(int(entry.name)) == session
            if mine and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode()
        except OSError:
            continue
    return found


def children(pid):
    """Direct and indirect children."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            mine = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += mine + [grandchild for child in mine for grandchild in children(child)]
    return found


def test_results_survive_twenty_random_kills(tmp_path, tiny_suite):
    for model in tiny_suite["models"]:
        model["train"]["recipe"]["epochs"] = 30  # long enough to be killed in training as well
    tiny_suite["n"], tiny_suite["chunk_size"] = 300, 30  # many short cells
    tiny_suite["conditions"] = [
        *tiny_suite["conditions"],
        {"attack": "square", "eps": 0.1, "queries": 300},
        {"attack": "apgd-dlr", "eps": 0.1, "steps": 50},
    ]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_suite))
    command = [sys.executable, "-m", "robustbench_ext.cli.main", "run", "tiny.yaml", "--out", "run"]
    command += ["--executor", "local", "--workers", "2"]
    draws, log = random.Random(0), (tmp_path / "log").open("w")
    killed = {"run": 0, "worker": 0}
    records = 0

    def start():
        return subprocess.Popen(command, cwd=tmp_path, stderr=log, stdout=log, start_new_session=True)

    run = start()
    deadline = time.monotonic() + 1500
    while sum(killed.values()) < KILLS and time.monotonic() < deadline:
        # Something must have happened since the last kill, or a run that starts slowly would be killed for ever.
        before, since = activity(tmp_path), time.monotonic()
        while activity(tmp_path) == before and run.poll() is None and time.monotonic() - since < 120:
            time.sleep(0.05)
        if sum(killed.values()) >= IN_TRAINING:  # the others fall into the computing of cells
            while not list(tmp_path.glob("run/records/*.json")) and run.poll() is None:
                time.sleep(0.05)
        time.sleep(draws.uniform(0.0, 0.5))
        if run.poll() is not None:
            break
        workers = [pid for pid in children(run.pid) if "forkserver" in living(run.pid).get(pid, "")]
        if draws.random() < 0.4 or len(workers) < 2:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            killed["run"] += 1
            run = start()
        else:
            # The last ones: the first is the server that workers are forked from.
            os.kill(draws.choice(workers[1:]), signal.SIGKILL)
            killed["worker"] += 1
        records = max(records, len(list((tmp_path / "run" / "records").glob("*.json"))))
    run.wait(timeout=600)
    log.close()
    text = (tmp_path / "log").read_text()
    assert sum(killed.values()) == KILLS, f"the run was over after {killed}: make it longer\n{text[-2000:]}"
    assert killed["run"] and killed["worker"], killed
    assert run.returncode in (0, 1), text[-3000:]
    assert "failed:" not in text
    assert records > 20  # kills fell into the computing of cells too, not only into training
    # Every record is whole, nothing half-written is left where records are looked for.
    store = RecordStore(tmp_path / "run" / "records")
    assert all(store.has(note.stem) for note in store.folder.glob("[!.]*.json"))
    assert not [file for file in store.folder.iterdir() if file.name.startswith(".")]
    run_suite(tiny_suite, tmp_path / "quiet")
    for name in ("results.json", "results.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()


def activity(folder):
    """Changes whenever a run gets on: a record, a checkpoint, an epoch."""
    files = [*folder.glob("run/records/*"), *folder.glob("run/models/*/*")]
    stamps = []
    for file in files:
        try:
            stamps.append((file.name, file.stat().st_mtime_ns))
        except OSError:
            continue
    return sorted(stamps)
