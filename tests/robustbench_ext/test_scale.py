"""Data that stays in its files, numbers made block by block: the same as in memory, and never more than a block at a time."""

import itertools
import os
import tracemalloc

import numpy as np
import pytest
import torch

from robustbench_ext import fingerprint, measured
from robustbench_ext.data import files, load_dataset, stored
from robustbench_ext.data.base import ArraySplit, as_floats, rank_of, stratified_order
from robustbench_ext.data.stored import SomeRows, StoredArray
from robustbench_ext.engine import run_suite
from robustbench_ext.errors import DataError
from robustbench_ext.evaluate import Context
from robustbench_ext.measure_uncertainty import lack_of_confidence
from robustbench_ext.metrics import (
    binned,
    blocks,
    calibration,
    classification,
    classwise,
    detection,
    energy,
    selective,
)
from robustbench_ext.metrics.resampling import resampled_mean, sample_mean
from robustbench_ext.publish import RunLog, assemble
from robustbench_ext.suite import validate_suite

# Fingerprints of 8-bit data as they were when all images were held as float32: they are in the keys of records.
WHOLE = ["b1ce6c4ece2ded1716e7", "9e3eab0c49a2a0ad5afb", "9c680061ba55e6b0a1fe"]
SPLIT = ["f58e067fa8dcb6cb3009", "6db7cf13373c031296c7", "36be5300d7dc63704d7b"]


def eight_bits(n=60):
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), np.arange(n) % 4


def test_eight_bits_are_read_as_they_always_were():
    x = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).transpose(0, 3, 1, 2)
    found = as_floats(x)
    assert found.tobytes() == (np.ascontiguousarray(x) / 255.0).astype(np.float32).tobytes()
    assert found.flags.c_contiguous
    floats = as_floats(found)
    floats[:] = 2
    assert found.max() == 1.0


def test_a_split_of_eight_bits_equals_one_of_floats():
    x, y = eight_bits()
    x, ids = x.transpose(0, 3, 1, 2), [f"s{i}" for i in range(len(y))]
    small, large = ArraySplit(x, y, ids), ArraySplit(as_floats(x), y, ids)
    assert small.fingerprint() == large.fingerprint()
    for index in (slice(3, 40), np.array([5, 0, 5]), slice(0, 0)):
        assert torch.equal(small.images(index), large.images(index))
        assert small.images(index).is_contiguous()
    for split in (small, large):
        split.images(slice(None)).zero_()  # by a model that works in place
        assert split.images(slice(None)).max() == 1.0
    assert ArraySplit(torch.from_numpy(x.copy()), y, ids).fingerprint() == large.fingerprint()


@pytest.fixture(params=["stored", "compressed", "folder"])
def written(request, tmp_path, monkeypatch):
    """Writes arrays in one of three ways and gives the spec of the data; all images are large enough to stay in a file."""
    monkeypatch.setattr(files, "_LARGE", 0)

    places = (tmp_path / str(number) / "d" for number in itertools.count())  # the name is in the ids

    def write(**arrays):
        place = next(places)
        place.parent.mkdir()
        if request.param == "folder":
            place.mkdir()
            for name, array in arrays.items():
                np.save(place / f"{name}.npy", array)
            return f"npz:{place}"
        (np.savez if request.param == "stored" else np.savez_compressed)(place.with_suffix(".npz"), **arrays)
        return f"npz:{place}.npz"

    write.in_file = request.param != "compressed"
    return write


def test_data_in_files_is_what_it_would_be_in_memory(written, monkeypatch):
    x, y = eight_bits()
    rows = []
    monkeypatch.setattr(fingerprint, "_BLOCK", 5 * 8 * 8 * 3 * 4)
    read = StoredArray.__getitem__
    monkeypatch.setattr(StoredArray, "__getitem__", lambda self, i: rows.append(len(got := read(self, i))) or got)
    data = load_dataset(written(x=x, y=y))
    assert [split.fingerprint() for split in data.splits.values()] == WHOLE
    assert bool(rows) == written.in_file
    assert ["numpy.savez" in note for note in data.notes] == [True] * (not written.in_file)
    assert max(rows, default=0) <= 5


def test_splits_in_files_are_what_they_would_be_in_memory(written):
    x, y = eight_bits()
    arrays = {"x_train": x[:40], "y_train": y[:40], "x_test": x[40:], "y_test": y[40:]}
    data = load_dataset(written(**arrays, classes=np.array(list("abcd"))))
    assert [split.fingerprint() for split in data.splits.values()] == SPLIT
    assert data.classes == ("a", "b", "c", "d")
    test = data["test"]
    places = [int(name.rpartition(":")[2]) for name in test.ids]
    assert torch.equal(test.images(slice(None)), torch.from_numpy(as_floats(x[40:].transpose(0, 3, 1, 2)[places])))
    with pytest.raises(DataError, match="normalisation"):
        load_dataset(written(**(arrays | {"x_test": 2.0 * np.ones((20, 8, 8, 3))})))
    grey = load_dataset(written(x_test=x[..., 0] / np.float32(255), y_test=y))
    assert torch.equal(grey["test"].images(slice(0, 1)), as_tensor(x[..., 0], grey["test"].ids[0]))


def as_tensor(x, name):
    return torch.from_numpy(as_floats(x[int(name.rpartition(":")[2])][None, None]))


def test_a_run_on_data_in_a_file_reads_batches(tmp_path, monkeypatch):
    """Memory is a chunk's, by design: nothing between the file and the model asks for more."""
    x, y = eight_bits(400)
    (tmp_path / "d").mkdir()
    for name, array in (("x_test", x), ("y_test", y), ("x_calibration", x[:20]), ("y_calibration", y[:20])):
        np.save(tmp_path / "d" / f"{name}.npy", array)
    (tmp_path / "linear.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))\n"
    )
    monkeypatch.setattr(files, "_LARGE", 0)
    monkeypatch.setattr(fingerprint, "_BLOCK", 40 * 192 * 4)
    rows = []
    read = StoredArray.__getitem__
    monkeypatch.setattr(StoredArray, "__getitem__", lambda self, i: rows.append(len(got := read(self, i))) or got)
    suite = {
        "schema": 1,
        "name": "scale",
        "data": f"npz:{tmp_path / 'd'}",
        "chunk_size": 50,
        "models": [{"name": "linear", "spec": f"{tmp_path / 'linear.py'}:make"}],
        "conditions": ["clean", {"corruption": "gaussian-noise", "severity": 1}],
    }
    summary = run_suite(suite, tmp_path / "run")
    assert not summary.failures
    assert summary.results.find(metric="accuracy", condition="clean")[0].n == 400
    assert rows.count(50) >= 16  # each chunk of either condition
    assert max(rows) == 64  # the preflight's


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.arange(12).reshape(4, 3))
    array = stored.npy(file)
    assert array[np.array([3, 0, 1, 2])].tolist() == [[9, 10, 11], [0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert array[1:3].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert array.transpose(0, 1).shape == (4, 3)
    with pytest.raises(IndexError, match="0 to 4 of 4"):
        array[np.array([0, 4])]
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match="changed while it was in use"):
        array[:1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="Is the copy complete"):
        stored.npy(file)
    file.write_bytes(b"no array")
    with pytest.raises(DataError, match="not an array of numpy's"):
        stored.npy(file)
    np.save(file, np.asfortranarray(np.arange(12).reshape(4, 3)))
    assert stored.npy(file) is None
    np.savez_compressed(tmp_path / "x.npz", x=np.arange(3))
    assert stored.member(tmp_path / "x.npz", "x") is None
    with pytest.raises(DataError, match="one array without a name"):
        load_dataset(f"npz:{file}")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="found arrays none"):
        load_dataset(f"npz:{tmp_path / 'none'}")


def test_rows_of_rows():
    x = np.arange(20).reshape(10, 2)
    chosen = SomeRows(x, np.array([7, 1, 4]))
    assert chosen[1:].tolist() == [[2, 3], [8, 9]]
    assert (len(chosen), chosen.shape, chosen.dtype) == (3, (3, 2), x.dtype)


def test_hashes_do_not_depend_on_blocks(monkeypatch):
    arrays = {
        "x": np.arange(24.0).reshape(6, 2, 2).transpose(0, 2, 1),
        "ids": np.array(["a", "bc"] * 3),
        "n": np.array(3),
    }
    whole = fingerprint.hash_arrays(arrays)
    monkeypatch.setattr(fingerprint, "_BLOCK", 1)
    assert fingerprint.hash_arrays(arrays) == whole
    assert list(fingerprint.each_string(arrays["ids"])) == arrays["ids"].tolist()
    assert fingerprint.hash_arrays({"ids": np.zeros(0, dtype="U3")}) == fingerprint.hash_arrays(
        {"ids": np.zeros(0, "U3")}
    )


def test_the_stratified_order_is_its_definition():
    rng = np.random.default_rng(0)
    for n, k in ((1, 1), (50, 3), (1000, 7)):
        labels = rng.integers(-1, k, n)
        ids = np.array([f"x{i // 2}" for i in range(n)])  # equal ids stay in the order in which they were given
        ranks = np.array([rank_of(name) for name in ids], dtype=np.uint64)
        position = np.empty(n)
        for label in np.unique(labels):
            members = sorted(np.flatnonzero(labels == label), key=lambda i: (ranks[i], i))
            position[members] = [(place + 0.5) / len(members) for place in range(len(members))]
        assert stratified_order(labels, ids).tolist() == sorted(range(n), key=lambda i: (position[i], ranks[i], i))


def test_ids_are_numbered():
    assert files.numbered("a:", 3, 2).tolist() == ["a:00", "a:01", "a:02"]
    assert files.numbered("a:", 12, 1)[[0, 9, 11]].tolist() == ["a:0", "a:9", "a:11"]
    assert files.numbered("a:", 0, 2).tolist() == []
    assert files.numbered("a:", 5000, 3)[[4095, 4096, 4999]].tolist() == ["a:4095", "a:4096", "a:4999"]


# Measuring -----------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_where_columns_lie(finished, tiny_suite, monkeypatch):
    """Read from the records whenever they are asked for, in blocks of forty samples: the same to the last digit."""
    folder, summary = finished
    monkeypatch.setattr(measured, "_IN_RECORDS", 0)
    monkeypatch.setattr(measured, "_KEPT", 0)
    monkeypatch.setattr(blocks, "ENTRIES", 407)
    context = Context(validate_suite(tiny_suite), folder)
    joined = measured.Tables(context).observations("standard", "clean")
    assert "logits" not in joined._inside
    assert joined["logits"].shape == (120, 10)
    assert np.array_equal(joined.rows("logits")[50:70], joined["logits"][50:70])  # across two records
    results, _ = assemble(context, RunLog())
    assert results.to_json() == summary.results.to_json()


class Made:
    """Logits (n, k) that are made when they are read, so that nobody has them all."""

    dtype = np.dtype(np.float32)

    def __init__(self, n, k):
        self.shape = (n, k)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        rows = np.arange(*index.indices(len(self)), dtype=np.float32)[:, None]
        return np.cos(rows * (1 + np.arange(self.shape[1], dtype=np.float32))) * np.float32(4)


def test_memory_of_metrics_is_that_of_a_block():
    """200,000 samples of 50 classes, 80 MB as float64. Allowed are six blocks of 8 MiB (a softmax holds its input, what it
    exponentiates, the result and a mask; one more each for slack and for the next logits), and 16 numbers of 8 bytes per
    sample: what a metric of N numbers needs to sort, index and resample them. The bootstrap's weights are there already.
    """
    n, k = 200_000, 50
    logits, labels = Made(n, k), np.arange(n) % k
    most = 6 * 8 * blocks.ENTRIES + 16 * 8 * n
    confidence, right = calibration.confidence_and_correctness(logits, labels)
    assert 8 * n * k > most
    sample_mean(confidence)
    for measure in (
        lambda: calibration.confidence_and_correctness(logits, labels),
        lambda: calibration.nll(logits, labels),
        lambda: calibration.brier(logits, labels),
        lambda: classification.predicted(logits, labels),
        lambda: calibration.ece(confidence, right),
        lambda: binned.ece_debiased(confidence, right),
        lambda: selective.aurc(confidence, ~right),
        lambda: selective.excess_aurc(confidence, ~right),
    ):
        tracemalloc.start()
        measure()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most


def close(a, b, share):
    """Both ends within a share of the interval's width."""
    width = a.ci_high - a.ci_low
    return (
        abs(a.ci_low - b.ci_low) < share * width and abs(a.ci_high - b.ci_high) < share * width and a.value == b.value
    )


def test_intervals_of_many_samples_agree_with_those_of_few(monkeypatch):
    """An end from 1,000 resamples has a standard error of 2.2 % of the width (quantiles of a normal distribution), so the
    difference of two has 3.0 %, four of which are 12 %. The spread over 64 batches is known to 9 %, which moves an end by 4.5 %
    of the width: with the bootstrap's own 2.2 % four of these are 20 %.
    """
    rng = np.random.default_rng(0)
    clean, unknown = rng.normal(size=1500), np.append(rng.normal(size=1400) + 1.5, np.full(100, 0.25))
    scores = rng.normal(size=6400)
    errors = rng.random(6400) < 0.4 * np.exp(scores)
    skewed = rng.exponential(size=3000)
    few = (
        detection.threshold_metrics(clean, unknown),
        selective.aurc(scores, errors),
        selective.excess_aurc(scores, errors),
    )
    monkeypatch.setattr(detection, "LIMIT", 0)
    monkeypatch.setattr(selective, "LIMIT", 0)
    many = (
        detection.threshold_metrics(clean, unknown),
        selective.aurc(scores, errors),
        selective.excess_aurc(scores, errors),
    )
    for metric, estimate in few[0].items():
        assert close(estimate, many[0][metric], 0.12), metric
    assert close(few[1], many[1], 0.2)
    assert close(few[2], many[2], 0.2)
    assert "batches" in many[1].ci_method
    assert close(resampled_mean(skewed), sample_mean(skewed), 0.12)


def test_perfect_detection_of_many_samples_has_no_interval_either(monkeypatch):
    monkeypatch.setattr(detection, "LIMIT", 0)
    found = detection.threshold_metrics(np.arange(500.0), 1000 + np.arange(500.0))
    assert np.isnan(found["aupr_out"].ci_low)
    assert found["fpr95"].value == 0.0
    assert found["fpr95"].ci_high == pytest.approx(0.0076, abs=2e-4)  # Wilson's, for 0 of 500


def test_numbers_do_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 7)).astype(np.float32), rng.integers(0, 7, 300)

    def everything():
        numbers = [classwise.classwise_ece(logits, labels), *classwise.brier_parts(logits, labels).values()]
        numbers += [calibration.nll(logits, labels), calibration.brier(logits, labels)]
        numbers += energy.clean_metrics(energy.sample_energies(logits, labels)).values()
        samples = [*calibration.confidence_and_correctness(logits, labels), classification.predicted(logits, labels)]
        return numbers, np.stack([*samples, lack_of_confidence(logits)]).tolist()

    whole = everything()
    monkeypatch.setattr(blocks, "ENTRIES", 100)
    assert everything() == whole
