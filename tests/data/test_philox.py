from __future__ import annotations

import numpy as np
import pytest

from mnclglf.data.philox import ORDER_STREAM, SPLIT_STREAM, permutation, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known-answer vectors of the Random123 distribution, philox4x32 10
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: int, words: str) -> None:
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key)) == words


def test_arrays_of_counters_give_the_words_of_each() -> None:
    rows = np.arange(5)
    many = philox((1, rows[:, None].astype(np.uint64), np.array([7, 9], np.uint64), 3), 12345)
    assert many.shape == (4, 5, 2)
    for row in rows:
        for column, word in enumerate((7, 9)):
            np.testing.assert_array_equal(many[:, row, column], philox((1, int(row), word, 3), 12345))


def test_uniform_stays_inside_the_open_interval() -> None:
    low, middle, high = uniform(np.array([0, 2**31, 2**32 - 1], dtype=np.uint64))
    assert 0 < low < 2**-32
    assert middle == pytest.approx(0.5)
    assert 1 - 2**-32 < high < 1


def test_permutation_has_each_number_once_and_depends_on_everything() -> None:
    base = permutation(1000, seed=3, epoch=2)
    np.testing.assert_array_equal(np.sort(base), np.arange(1000))
    np.testing.assert_array_equal(base, permutation(1000, seed=3, epoch=2, stream=ORDER_STREAM))
    for other in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 3}, {"seed": 3, "epoch": 2, "stream": SPLIT_STREAM}):
        # two unrelated orders agree in one place on average; 10 or more has probability 1e-7
        assert (permutation(1000, **other) == base).sum() < 10


def test_permutation_spreads_every_number_evenly() -> None:
    places = np.stack([permutation(10, seed=seed) for seed in range(2000)])
    counts = np.stack([np.bincount(places[:, place], minlength=10) for place in range(10)])
    assert np.abs(counts - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9)  # five standard deviations
