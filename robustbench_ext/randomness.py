"""Random numbers that depend on (seed, purpose, sample id, step) and on nothing else.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: *Parallel random numbers: as easy as 1, 2, 3*, SC 2011) turns a counter
into four random 32-bit words. The counter here is (element, step, sample id), the key is (seed, purpose). So a draw
does not depend on the other samples of the batch, on their number or order, or on the device: a sample can leave the
batch, a batch can be split, a job can move to another worker, and the draws are the same.

It is written in int64 arithmetic, which wraps alike on every device that PyTorch supports.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
# Counters per block of work: on the CPU what stays in its cache, elsewhere few blocks; both bound the temporary memory.
_BLOCK, _BLOCK_ELSEWHERE = 1 << 15, 1 << 20


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words; returns four tensors of 32-bit words."""
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product needs 64 unsigned bits. int64 wraps to the same bits, and masking after the (arithmetic) shift
        # discards the sign bits that the shift drags in.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def sample_keys(ids: Iterable[object]) -> Tensor:
    """Sample ids (strings or integers) as 64-bit keys, int64 of shape (N,), the same on every machine."""
    digests = b"".join(hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids)
    return torch.from_numpy(np.frombuffer(digests, dtype="<i8").astype(np.int64))


class SampleRandom:
    """The random stream of a batch of samples, for one purpose.

    Args:
        seed: any integer.
        keys: int64 (N,), from `sample_keys`.
        purpose: what the numbers are for; streams of different purposes are independent.
    """

    def __init__(self, seed: int, keys: Tensor, purpose: str) -> None:
        self.seed = seed
        self.keys = keys
        self.purpose = purpose
        digest = hashlib.blake2b(f"{seed}|{purpose}".encode(), digest_size=8).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))

    @classmethod
    def of(
        cls, seed: int, ids: Sequence[object] | np.ndarray, purpose: str, device: torch.device | str = "cpu"
    ) -> SampleRandom:
        """The stream of the samples with these ids."""
        return cls(seed, sample_keys(ids).to(device), purpose)

    def select(self, index: Tensor) -> SampleRandom:
        """The stream of some of the samples: their draws are what they were in the full batch."""
        return SampleRandom(self.seed, self.keys[index], self.purpose)

    def child(self, purpose: str) -> SampleRandom:
        """An independent stream of the same samples."""
        return SampleRandom(self.seed, self.keys, f"{self.purpose}/{purpose}")

    def bits(self, count: int, step: int = 0) -> Tensor:
        """`count` random 32-bit words per sample, int64 of shape (N, count)."""
        quads = -(-count // 4)
        low, high = self.keys & _MASK, (self.keys >> 32) & _MASK
        element = torch.arange(quads, device=self.keys.device)
        block = _BLOCK if self.keys.device.type == "cpu" else _BLOCK_ELSEWHERE
        rows = max(1, block // max(1, quads))
        blocks = []
        for start in range(0, len(self.keys), rows):
            shape = (len(self.keys[start : start + rows]), quads)
            words = philox(
                element.expand(shape),
                torch.full(shape, step & _MASK, device=self.keys.device),
                low[start : start + rows, None].expand(shape),
                high[start : start + rows, None].expand(shape),
                self._key,
            )
            blocks.append(torch.stack(words, dim=2).reshape(shape[0], 4 * quads)[:, :count])
        return torch.cat(blocks) if blocks else torch.zeros((0, count), dtype=torch.int64, device=self.keys.device)

    def uniform(self, shape: Sequence[int], low: float = 0.0, high: float = 1.0, step: int = 0) -> Tensor:
        """Uniform float32 in [low, high), shape (N, *shape), with 24 random bits each."""
        unit = (self.bits(math.prod(shape), step) >> 8).to(torch.float32) * 2.0**-24
        return (low + (high - low) * unit).reshape(len(self.keys), *shape)

    def normal(self, shape: Sequence[int], step: int = 0) -> Tensor:
        """Standard normal float32, shape (N, *shape), by Box and Muller; |z| stays below 5.8 (24-bit uniforms)."""
        count = math.prod(shape)
        pairs = -(-count // 2)
        words = self.bits(2 * pairs, step) >> 8
        radius = torch.sqrt(-2.0 * torch.log((words[:, :pairs] + 1).to(torch.float32) * 2.0**-24))
        angle = words[:, pairs:].to(torch.float32) * (2.0**-24 * 2.0 * math.pi)
        values = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
        return values[:, :count].reshape(len(self.keys), *shape)
