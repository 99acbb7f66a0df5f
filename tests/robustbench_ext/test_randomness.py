"""Counter-based draws: known answers, independence of the batch, distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from robustbench_ext.randomness import SampleRandom, philox, sample_keys


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123, the authors' own distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(*[torch.tensor([c]) for c in counter], key)
    assert tuple(int(w) for w in words) == expected


def test_draws_do_not_depend_on_the_batch():
    ids = [f"sample-{i}" for i in range(250)]
    whole = SampleRandom.of(3, ids, "x").normal((3, 5), step=2)
    for size in (1, 7):
        parts = [SampleRandom.of(3, ids[i : i + size], "x").normal((3, 5), step=2) for i in range(0, 250, size)]
        assert torch.equal(torch.cat(parts), whole)
    shuffled = SampleRandom.of(3, ids[::-1], "x").normal((3, 5), step=2)
    assert torch.equal(shuffled.flip(0), whole)
    assert torch.equal(SampleRandom.of(3, ids, "x").select(torch.tensor([9, 4])).normal((3, 5), step=2), whole[[9, 4]])


def test_streams_differ_by_seed_purpose_step_and_id():
    base = SampleRandom.of(0, ["a"], "p").bits(8)
    others = [
        SampleRandom.of(1, ["a"], "p").bits(8),
        SampleRandom.of(0, ["b"], "p").bits(8),
        SampleRandom.of(0, ["a"], "q").bits(8),
        SampleRandom.of(0, ["a"], "p").child("c").bits(8),
        SampleRandom.of(0, ["a"], "p").bits(8, step=1),
    ]
    assert all(not torch.equal(base, other) for other in others)
    # A longer draw begins with the shorter one: counters, not a stream that is cut.
    assert torch.equal(SampleRandom.of(0, ["a"], "p").bits(20)[:, :8], base)


def test_distributions():
    random = SampleRandom.of(0, range(400), "test")
    uniform = random.uniform((250,), -2.0, 3.0).numpy().ravel()
    assert uniform.min() >= -2.0
    assert uniform.max() < 3.0
    assert stats.kstest(uniform, "uniform", args=(-2, 5)).pvalue > 1e-3
    normal = random.normal((251,)).numpy().ravel()
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 4 / np.sqrt(len(normal))


def test_sample_keys_are_fixed_for_all_time():
    # A change here would change every stored result that used randomness.
    assert sample_keys(["digits:0000", 7]).tolist() == [
        int.from_bytes(__import__("hashlib").blake2b(text, digest_size=8).digest(), "little", signed=True)
        for text in (b"digits:0000", b"7")
    ]


def test_large_draws_are_blocked_without_a_seam(monkeypatch):
    random = SampleRandom.of(0, range(10), "x")
    whole = random.bits(100)
    monkeypatch.setattr("robustbench_ext.randomness._BLOCK", 30)
    assert torch.equal(random.bits(100), whole)
