"""Records: whole or not there; damage is noticed."""

import numpy as np
import pytest

from robustbench_ext.errors import RobustBenchExtError
from robustbench_ext.files import write_atomically
from robustbench_ext.fingerprint import hash_arrays, hash_strings, key_of
from robustbench_ext.measured import Table
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


def test_one_column_is_read_and_the_whole_file_is_checked(tmp_path, monkeypatch):
    store = RecordStore(tmp_path)
    store.save("k", COLUMNS, {})
    read = []
    member = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, name: read.append(name) or member(self, name))
    found = RecordStore(tmp_path).load("k", ["id"])
    assert list(found) == ["id"] == read
    assert np.array_equal(found["id"], COLUMNS["id"])
    with pytest.raises(RobustBenchExtError, match="cannot be read"):
        store.load("k", ["label"])
    raw = bytearray((tmp_path / "k.npz").read_bytes())
    raw[raw.index(b"features/x.npy") + 200] ^= 1  # in a column that is not asked for
    (tmp_path / "k.npz").write_bytes(bytes(raw))
    with pytest.raises(RobustBenchExtError, match="missing or damaged"):
        RecordStore(tmp_path).load("k", ["id"])


def test_a_table_reads_what_it_keeps(tmp_path):
    """Of all records but the first, whose columns say what there is: neither features nor large columns."""
    store, asked = RecordStore(tmp_path), []
    for i in range(3):
        columns = {"id": np.array([f"{i}a", f"{i}b"]), "label": np.arange(2) + i, "broken": np.array([True, False])}
        store.save(f"k{i}", {**columns, "logits": np.ones((2, 3), np.float32) * i, "features/x": np.zeros((2, 9))}, {})

    def load(key, names=None):
        asked.append((key, names))
        return store.load(key, names)

    table = Table(["k0", "k1", "k2"], load)
    assert [key for key, names in asked if names is None] == ["k0"]
    assert all(not {"id", "features/x", "preview"} & {*names} for _, names in asked if names is not None)
    assert table["label"].tolist() == [0, 1, 1, 2, 2, 3]
    assert table["id"].tolist() == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert table["logits"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    asked.clear()
    wide = Table(
        ["k0", "k1"], lambda key, names=None: {n: v for n, v in load(key, names).items() if n in ("id", "logits")}
    )
    assert wide.rows("logits")[1:3][:, 0].tolist() == [0, 1]


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
