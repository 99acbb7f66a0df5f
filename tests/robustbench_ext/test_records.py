"""Records: whole or not there; damage is noticed."""

import numpy as np
import pytest

from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.files import write_atomically
from robustbench_ext.fingerprint import hash_arrays, hash_strings, key_of
from robustbench_ext.records import RecordStore

COLUMNS = {"id": np.array(["a", "b"]), "logits": np.ones((2, 3), dtype=np.float32), "features/x": np.zeros((2, 4))}


def test_round_trip(tmp_path):
    store = RecordStore(tmp_path)
    assert not store.has("k")
    store.save("k", COLUMNS, {"what": "test"})
    for fresh in (store, RecordStore(tmp_path)):
        assert fresh.has("k")
        found = fresh.load("k")
        assert set(found) == set(COLUMNS)
        assert all(np.array_equal(found[n], COLUMNS[n]) for n in COLUMNS)
        assert fresh.meta("k")["what"] == "test"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.json", "k.npz"]  # no temporary file is left


@pytest.mark.parametrize("damage", ["truncate", "flip", "no-columns", "no-note", "half-note"])
def test_damage_counts_as_missing(tmp_path, damage):
    store = RecordStore(tmp_path)
    store.save("k", COLUMNS, {})
    columns, note = tmp_path / "k.npz", tmp_path / "k.json"
    if damage == "truncate":
        columns.write_bytes(columns.read_bytes()[:-7])
    elif damage == "flip":
        raw = bytearray(columns.read_bytes())
        raw[len(raw) // 2] ^= 1
        columns.write_bytes(bytes(raw))
    elif damage == "no-columns":
        columns.unlink()
    elif damage == "no-note":
        note.unlink()
    else:
        note.write_text(note.read_text()[:20])
    fresh = RecordStore(tmp_path)
    assert not fresh.has("k")
    with pytest.raises(RobustBenchExtError, match="missing or damaged"):
        fresh.load("k")
    fresh.save("k", COLUMNS, {})
    assert fresh.has("k")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")

    def fail(file):
        file.write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_keys():
    assert key_of({"a": 1, "b": [1.5, "x"]}) == key_of({"b": [1.5, "x"], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of({"a": np.float64(0.1)}) == key_of({"a": 0.1})
    with pytest.raises(ValueError, match="JSON"):
        key_of({"a": float("nan")})
    with pytest.raises(TypeError, match="a key cannot hold"):
        key_of({"a": object()})
    x = np.arange(6, dtype=np.float32)
    assert hash_arrays({"x": x}) != hash_arrays({"x": x.reshape(2, 3)})
    assert hash_arrays({"x": x}) != hash_arrays({"x": x.astype(np.float64)})
    assert hash_arrays({"x": x[::2]}) == hash_arrays({"x": x[::2].copy()})
    assert hash_strings(["ab", "c"]) != hash_strings(["a", "bc"])
