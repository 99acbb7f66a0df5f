"""Callbacks: told in order, closed once, and no harm where they raise."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from robustbench_ext.callbacks import Callback
from robustbench_ext.engine import Progress, run_suite


class Spy(Callback):
    name = "spy"

    def __init__(self, raises=None, error=RuntimeError):
        self.heard, self.raises, self.error = [], raises, error

    def _hear(self, hook):
        self.heard.append(hook)
        if hook == self.raises:
            raise self.error("down")

    def on_run_start(self, suite, folder):
        assert folder.is_dir() and suite.name == "tiny"
        self._hear("start")

    def on_cell(self, done, total, what, facts):
        assert 1 <= done <= total and "seconds" in facts
        self._hear("cell")

    def on_epoch(self, model, row):
        self._hear("epoch")

    def on_run_end(self, summary):
        assert (summary.folder / "results.json").is_file()
        self._hear("end")

    def close(self):
        self._hear("close")


@pytest.fixture
def small(tiny_suite):
    return {**tiny_suite, "conditions": ["clean"], "detectors": [], "uq": [], "models": tiny_suite["models"][:1]}


def test_hooks_in_order_and_closed_once(tmp_path, small):
    spy = Spy()
    with ThreadPoolExecutor(1) as pool:  # beside the run, so that epochs are seen
        run_suite(small, tmp_path, executor=pool, callbacks=[spy])
    assert spy.heard[0] == "start"
    assert spy.heard[-2:] == ["end", "close"]
    assert spy.heard.count("cell") == 4  # training, preflight, two parts of the clean test samples


@pytest.mark.parametrize("hook", ["start", "cell", "end", "close"])
def test_one_that_raises_is_said_once_closed_and_left_out(tmp_path, small, hook):
    bad, good, said = Spy(hook), Spy(), []
    summary = run_suite(small, tmp_path, callbacks=[bad, good], progress=Progress(message=said.append))
    assert not summary.failures
    assert len([text for text in said if "goes on without spy" in text]) == 1
    assert bad.heard.count(hook) == 1
    assert bad.heard.count("close") == 1
    assert good.heard[-2:] == ["end", "close"]


def test_closed_after_an_interruption_too(tmp_path, small):
    spy = Spy("cell", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run_suite(small, tmp_path, callbacks=[spy])
    assert spy.heard == ["start", "cell", "close"]
