"""Computed once: locks, workers, time that is over."""

import os
import time

import pytest

from robustbench_ext.gate import locks
from robustbench_ext.gate.locks import Lock, Task, share
from robustbench_ext.gate.run import seconds_of

COUNTED = """
import os, pathlib, time
import torch, tiny

class Counted(tiny.Net):
    def forward(self, x):
        if x.requires_grad or True:
            pathlib.Path(os.environ["COUNT"]).open("a").write(f"{len(x)}\\n")
        return super().forward(x)
"""


def test_a_lock_is_held_by_one_and_given_back(tmp_path):
    lock = Lock(tmp_path / "a" / "x.lock")
    assert lock.acquire() and not Lock(lock.path).acquire()
    with lock.kept():
        assert lock.path.is_file()
    assert not lock.path.exists() and lock.acquire()


@pytest.mark.parametrize("how", ["dead process", "no sign of life"])
def test_a_stale_lock_is_taken_over_once(tmp_path, how, monkeypatch):
    lock = Lock(tmp_path / "x.lock")
    assert lock.acquire()
    if how == "dead process":
        host, _ = lock.path.read_text().split()
        child = os.spawnlp(os.P_WAIT, "true", "true")
        assert child == 0
        lock.path.write_text(f"{host} {2**22 + 1}")  # above the largest process id
    else:
        old = time.time() - locks.STALE - 1
        os.utime(lock.path, (old, old))
    assert Lock(lock.path).acquire()
    assert not Lock(lock.path).acquire()
    assert [p.name for p in tmp_path.iterdir()] == ["x.lock"]


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    lock = Lock(tmp_path / "x.lock")
    assert lock.acquire()
    os.utime(lock.path, (0, 0))
    with lock.kept():
        time.sleep(0.2)
        assert lock.path.stat().st_mtime > time.time() - 5


def test_tasks_are_left_to_who_is_at_them(tmp_path):
    done, other = set(), Lock(tmp_path / "a.lock")
    assert other.acquire()

    def work(name):
        done.add(name)
        if name == "b":  # meanwhile, the other one finishes
            done.add("a")
            other.release()

    tasks = [Task(n, lambda n=n: n in done, lambda n=n: work(n)) for n in ("a", "b")]
    assert share(tasks, tmp_path) == []
    assert done == {"a", "b"} and not list(tmp_path.iterdir())
    done.clear()
    assert [t.key for t in share(tasks, tmp_path, late=lambda: bool(done))] == ["b"]


def test_a_failure_gives_the_lock_back(tmp_path):
    def work():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        share([Task("a", lambda: False, work)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60), ("1.5m", 90), ("2 min", 120), ("1h", 3600), (5, 5), ("0.5", 0.5)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


# In a project --------------------------------------------------------------------------------------------------------

SHARED = """
import pytest

@pytest.fixture(scope="session")
def net():
    import counted
    return counted.Counted().eval()

@pytest.mark.parametrize("i", range(4))
def test_shared(robustness, net, test_data, i):
    r = robustness(net, test_data, attack="pgd", eps=0.05, steps=5, n=300, outliers="uniform-noise", outliers_n=50)
    r.robust_accuracy.at_least(0.1)
    r.robust_accuracy.at_least(r.robust_accuracy.value - 0.001)
    r.auroc.at_least(0.1)
    if i == 3:
        r.robust_accuracy.at_least(0.99)
"""


def said(result):
    """The table's lines, without the counts that warnings have elsewhere."""
    lines = result.stdout.lines
    start = next(i for i, line in enumerate(lines) if "= robustness =" in line)
    return [line for line in lines[start + 1 :] if line.startswith(("test_", "  pass", "  fail", "  inconclusive"))]


def test_once_in_a_session_and_the_same_with_two_workers(project, monkeypatch):
    project.write("counted.py", COUNTED)
    project.write("test_model.py", SHARED)
    folders = project.path / "temporary"
    folders.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders))
    monkeypatch.setenv("COUNT", str(project.path / "one.txt"))
    one = project.run("-W", "ignore", "-p", "no:randomly")
    one.assert_outcomes(passed=3, failed=1)
    passes = [int(n) for n in (project.path / "one.txt").read_text().split()]
    attacked = 300 * 6  # six passes at most for each sample under attack, and what checks and readings cost beside
    assert sum(passes) < 2 * attacked + 4000
    monkeypatch.setenv("COUNT", str(project.path / "two.txt"))
    two = project.start("-W", "ignore", "-n2")
    two.assert_outcomes(passed=3, failed=1)
    assert said(two) == said(one)
    # Each worker makes the two checks that only tests know (mode, a second normalisation); all else is made once.
    again = [int(n) for n in (project.path / "two.txt").read_text().split()]
    assert sum(again) <= sum(passes) + 64 * 8
    assert not list(folders.glob("robustness-*"))


def test_a_cache_is_kept_from_session_to_session(project, monkeypatch):
    project.write("counted.py", COUNTED)
    project.write("test_model.py", SHARED)
    monkeypatch.setenv("COUNT", str(project.path / "count.txt"))
    project.run("-W", "ignore", "--robust-cache=kept")
    first = len((project.path / "count.txt").read_text().split())
    project.run("-W", "ignore", "--robust-cache=kept")
    assert len((project.path / "count.txt").read_text().split()) < 1.5 * first
    assert (project.path / "kept" / "records").is_dir()
    assert not list((project.path / "kept" / "locks").iterdir())


SLOW = """
import time, tiny

class Slow(tiny.Net):
    def forward(self, x):
        if x.requires_grad and len(x) > 64:  # the attack, not the checks before it
            time.sleep(0.1)
        return super().forward(x)

def test_attack(robustness, test_data):
    r = robustness(Slow().eval(), test_data, attack="pgd", eps=0.05, steps=1000, stop="never", n=300, BUDGET)
    r.accuracy.at_least(0.5)
    r.robust_accuracy.at_least(0.0)
"""


@pytest.mark.parametrize("where", ["call", "session"])
def test_what_there_was_no_time_for_is_inconclusive_and_said(project, where):
    project.write("test_model.py", SLOW.replace("BUDGET", "budget='2s'" if where == "call" else ""))
    option = [] if where == "call" else ["--robust-budget=2s"]
    began = time.perf_counter()
    result = project.run(*option)
    assert time.perf_counter() - began < 12  # the preflight takes its time, the attack would take much longer
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(
        [
            "*robust_accuracy (pgd Linf 0.05), wanted >= 0: *pgd Linf 0.05: the time was over after * of 300 samples*",
            "*1 inconclusive, 1 pass",
        ]
    )
    if where == "session":
        project.run(*option, "--robust-strict").assert_outcomes(failed=1)


def test_no_time_at_all(project):
    project.write("test_model.py", SLOW.replace("BUDGET", "budget=0"))
    result = project.run("-W", "ignore")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["2 inconclusive"])


@pytest.mark.slow
def test_workers_write_one_baseline_together(project):
    """Read, changed and written under a lock: no metric is lost."""
    project.save_data()
    metrics = ["accuracy", "ece", "nll", "brier", "worst_class_accuracy", "balanced_accuracy"]
    lines = "".join(f"  - {{metric: {m}, not_worse_than_baseline: true}}\n" for m in metrics)
    project.write("model.rbx.yaml", f"model: tiny:make\ndata: npz:data.npz\nn: 60\nexpect:\n{lines}")
    project.start("-n2", "--robust-update").assert_outcomes(passed=6)
    project.run("--robust-strict").assert_outcomes(passed=6)


def test_a_factory_is_called_once(project):
    project.save_data()
    project.write(
        "made.py",
        "import pathlib, tiny\n\ndef make():\n    pathlib.Path('made.txt').open('a').write('x')\n    return tiny.make()\n",
    )
    project.write(
        "model.rbx.yaml",
        "model: made:make\ndata: npz:data.npz\nn: 60\nexpect: [accuracy >= 0.1, ece <= 0.9, nll <= 9]\n",
    )
    project.run().assert_outcomes(passed=3)
    assert (project.path / "made.txt").read_text() == "x"


def test_a_model_in_torchscript_stops_between_chunks(project):
    project.write(
        "test_model.py",
        """
import torch

def test_script(robustness, model, test_data):
    scripted = torch.jit.script(model)
    r = robustness(scripted, test_data, attack="pgd", eps=0.05, steps=200, stop="never", n=300, budget="0.05s")
    assert r.undone
    assert not robustness(scripted, test_data, attack="pgd", eps=0.05, steps=3, n=300, budget="1m").undone
""",
    )
    project.run("-W", "ignore").assert_outcomes(passed=1)
