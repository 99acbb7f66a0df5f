"""The same results.json whatever does the work: processes, Dask, Slurm's stand-in, Ray, workers of a queue."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from robustbench_ext import __version__
from robustbench_ext.engine import Progress, run_suite, work
from robustbench_ext.errors import ConfigError, RobustBenchExtError
from robustbench_ext.execute import WorkError
from robustbench_ext.executors import LostWorker, make_executor
from robustbench_ext.executors.local import LocalExecutor
from robustbench_ext.executors.queue import QUEUE, QueueExecutor, serve

PACKAGES = {"dask": "distributed", "slurm:local": "submitit", "ray": "ray"}


def values(folder):
    return (folder / "results.json").read_bytes(), (folder / "results.csv").read_bytes()


@pytest.fixture(scope="module")
def serial_quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    run_suite("quickstart", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", *PACKAGES])
def test_the_quickstart_is_the_same_everywhere(serial_quickstart, tmp_path, executor):
    if executor in PACKAGES:
        pytest.importorskip(PACKAGES[executor])
    summary = run_suite("quickstart", tmp_path / "run", executor=executor, workers=2)
    assert not summary.failures
    assert values(tmp_path / "run") == values(serial_quickstart)


@pytest.mark.slow
@pytest.mark.parametrize("executor", PACKAGES)
def test_clusters_lose_workers_and_go_on(finished, tmp_path, tiny_suite, executor):
    pytest.importorskip(PACKAGES[executor])
    (tmp_path / "nets.py").write_text(
        "import os, pathlib, signal, torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.fc = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        mark = pathlib.Path(__file__).with_name('once')\n"
        "        if x.requires_grad and not mark.exists():\n"
        "            mark.touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return self.fc(x.flatten(1))\n"
    )
    suite = {**tiny_suite, "models": [{"name": "net", "spec": f"{tmp_path / 'nets.py'}:Net"}]}
    summary = run_suite(suite, tmp_path / "run", executor=executor, workers=2)
    assert (tmp_path / "once").exists()
    assert not summary.failures
    assert summary.results.find(model="net", metric="robust_accuracy")


def test_threads_will_do_too(finished, tmp_path, tiny_suite):
    with ThreadPoolExecutor(2) as pool:
        run_suite(tiny_suite, tmp_path / "run", executor=pool)
    assert values(tmp_path / "run") == values(finished[0])


def test_workers_of_a_queue(finished, tmp_path, tiny_suite):
    said = []
    worker = threading.Thread(target=serve, args=(tmp_path / "run",), kwargs={"idle": 6, "say": said.append})
    worker.start()  # before the run; there may not even be a folder
    progress = Progress(message=said.append)
    summary = run_suite(tiny_suite, tmp_path / "run", executor="queue", progress=progress)
    assert values(tmp_path / "run") == values(finished[0])
    assert any(text.startswith("waiting for workers") for text in said)
    assert any(text.endswith("has joined") for text in said)
    assert not (tmp_path / "run" / QUEUE).exists()
    assert summary.computed == finished[1].computed
    worker.join(timeout=60)  # it ends by itself once nothing comes
    assert not worker.is_alive()
    assert said[-1].startswith("worker") and "is done" in said[-1]


def test_a_worker_of_a_queue_that_dies(tmp_path):
    said = []
    queue = QueueExecutor(tmp_path, 1, said.append)
    future = queue.submit(work, ("cell", "run", {}, ["a"], {}))
    code = (
        "import sys, os, pathlib\n"
        "from robustbench_ext.leases import Leases\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with Leases(folder, 'w').hold('w'):\n"
        "    (task,) = [f for f in (folder / 'todo').glob('*.json')]\n"
        "    task.rename(folder / 'taken' / f'{task.stem}@w.json')\n"
        "    os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(queue.folder)], check=False)
    with pytest.raises(LostWorker, match="worker w is gone"):
        future.result(timeout=60)
    queue.shutdown()


def test_the_queue_carries_nothing_else(tmp_path):
    queue = QueueExecutor(tmp_path, 1)
    with pytest.raises(RobustBenchExtError, match="calls of engine"):
        queue.submit(print, "x")
    queue.shutdown()
    assert not (tmp_path / QUEUE).exists()


def test_what_raises_in_a_worker_comes_back_as_text(tmp_path):
    queue = QueueExecutor(tmp_path, 1)
    future = queue.submit(
        work,
        (
            "cell",
            str(tmp_path),
            {"nonsense": 1},
            ["a"],
            {"settings": {}, "cwd": ".", "run": "r", "version": __version__},
        ),
    )
    serve(tmp_path, idle=0.5, say=lambda text: None)
    with pytest.raises(WorkError) as raised:
        future.result(timeout=60)
    assert not raised.value.fatal
    assert "Traceback" in raised.value.trace
    queue.shutdown()


def test_workers_elsewhere_need_the_same_paths(tmp_path):
    origin = {"settings": {}, "cwd": str(tmp_path / "not here"), "run": "r", "version": __version__}
    with pytest.raises(WorkError, match="Workers need the same paths as the run"):
        work(("check", str(tmp_path), {}, "net", origin))
    with pytest.raises(WorkError, match="Install the same version on both"):
        work(("check", str(tmp_path), {}, "net", {**origin, "version": "0.0.0"}))


def double(x):
    return 2 * x


def test_the_local_executor_is_an_executor():
    with LocalExecutor(2) as pool:
        assert list(pool.map(double, range(20))) == [2 * i for i in range(20)]
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(double, 1)


def test_an_address_where_nothing_listens():
    pytest.importorskip("distributed")
    with pytest.raises(ConfigError, match="dask://127.0.0.1:9"):
        make_executor("dask://127.0.0.1:9", 4, options={"timeout": "0.5"})


def test_slurm_without_slurm(tmp_path):
    pytest.importorskip("submitit")
    with pytest.raises(ConfigError, match="sbatch"):
        make_executor("slurm", 4, folder=tmp_path)
    assert not (tmp_path / QUEUE).exists()


def test_settings_travel_with_the_work(tmp_path, tiny_suite, monkeypatch):
    monkeypatch.setenv("RBX_DATA", "/somewhere")
    (tmp_path / "nets.py").write_text(
        "import os, json, pathlib, torch\n"
        "def build():\n"
        "    said = {k: v for k, v in os.environ.items() if k.startswith('RBX_')}\n"
        "    pathlib.Path(__file__).with_name(f'{os.getpid()}.json').write_text(json.dumps(said))\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    suite = {
        **{k: v for k, v in tiny_suite.items() if k not in ("detectors", "uq")},
        "conditions": ["clean"],
        "models": [{"name": "net", "spec": f"{tmp_path / 'nets.py'}:build"}],
    }
    run_suite(suite, tmp_path / "run", executor="local", workers=2)
    said = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(said) >= 2
    assert all(s["RBX_DATA"] == "/somewhere" for s in said)
    assert {s.get("RBX_WORKER") for s in said} >= {"0"}
