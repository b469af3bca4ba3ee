"""Counter-based random numbers: the same (seed, counter) gives the same numbers, whatever was drawn before.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), vectorized
over counters. numpy's own Generator is not used: its streams depend on how much was drawn and may change between
versions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, the Weyl sequence of the round keys
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_LOW = np.uint64(_WORD)
_HALF = np.uint64(32)

# Third word of the counter: row of the image; fourth: epoch. The second word says what the numbers are for: views count
# up from 0 and all other uses down from the top, so that they never share a number.
ORDER_STREAM = _WORD
SPLIT_STREAM = _WORD - 1
LABEL_STREAM = _WORD - 2
BLOCK_STREAM = _WORD - 3


def philox(counter: tuple[NDArray[np.uint64] | int, ...], key: int) -> NDArray[np.uint64]:
    """Returns the four 32-bit words of each counter.

    Args:
        counter: four words below 2**32, integers or arrays that broadcast to one shape [...].
        key: key of 64 bits.

    Returns:
        Words, uint64 [4, ...], each below 2**32.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return np.stack([c0, c1, c2, c3])


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Returns 32-bit words as numbers strictly between 0 and 1."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32


def permutation(count: int, *, seed: int, epoch: int = 0, stream: int = ORDER_STREAM) -> NDArray[np.int64]:
    """Returns a random order of 0 .. count - 1, int64 [count], determined by seed, epoch and stream."""
    return np.argsort(_keys(count, seed, epoch, stream), kind="stable")


def block_permutation(count: int, block: int, blocks: int, *, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """Returns a random order of 0 .. count - 1 in which near places hold near numbers, int64 [count].

    Blocks of `block` consecutive numbers are put into a random order, and divided in it into groups of `blocks`. The
    numbers of a group are shuffled together, by the same random numbers as in `permutation`: if one group holds all,
    the two are equal.
    """
    order = permutation(-(-count // block), seed=seed, epoch=epoch, stream=BLOCK_STREAM)
    group = np.empty(len(order), np.int64)
    group[order] = np.arange(len(order)) // blocks
    return np.lexsort((_keys(count, seed, epoch, ORDER_STREAM), group[np.arange(count) // block]))


def _keys(count: int, seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    """Returns a random number of 64 bits for each of 0 .. count - 1."""
    words = philox((0, stream, np.arange(count, dtype=np.uint64), epoch), seed)
    return words[0] << _HALF | words[1]
