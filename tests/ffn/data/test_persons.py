import numpy as np
import pytest

from ffn.data.persons import canonical_persons, unpadded


def clip(*seen: str) -> np.ndarray:
    """(M, T, 2, 3): person m is 10 m + t + 1 in frames marked `x`, zero elsewhere."""
    made = np.zeros((len(seen), len(seen[0]), 2, 3))
    for m, marks in enumerate(seen):
        for t, mark in enumerate(marks):
            made[m, t] = (10 * m + t + 1) * (mark == "x")
    return made


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (["x.x"], [[1, 3]]),
        (["x.x", ".xx"], [[1, 3], [0, 13]]),
        (["x..", ".xx"], [[12, 13]]),
        (["x..", "xxx"], [[11, 12, 13], [1, 0, 0]]),
        (["x..", "..."], [[1]]),
        (["...", "x.."], [[11]]),
        (["xx.", "..x"], [[1, 2]]),
        (["..."], [[]]),
        (["x", "x", "x"], [[1], [11]]),
    ],
)
def test_frames_and_order(seen, expected):
    kept = canonical_persons(clip(*seen))
    assert kept[:, :, 0, 0].tolist() == expected


def test_one_joint_is_enough_to_be_seen_and_rounding_dust_is_not():
    x = np.full((1, 3, 2, 3), 1e-9)
    x[0, 1, 1, 2] = 1e-7
    assert canonical_persons(x).shape == (1, 1, 2, 3)


def test_type_and_repeat():
    x = clip("x.xx", ".x.x").astype(np.float16)
    once = canonical_persons(x)
    assert once.dtype == np.float16
    np.testing.assert_array_equal(canonical_persons(once), once)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([".x.x"], [[0, 2, 0, 4]]),
        (["x.x.."], [[1, 0, 3]]),
        (["x...", ".xx."], [[1, 0, 0], [0, 12, 13]]),
        (["xx.", "..."], [[1, 2]]),
        (["...", "xx."], [[11, 12]]),
        (["xx", "..", "xx"], [[1, 2]]),
        (["..", ".."], []),
        ([], []),
    ],
)
def test_padding(seen, expected):
    kept = unpadded(clip(*seen) if seen else np.zeros((0, 3, 2, 3)))
    assert kept[:, :, 0, 0].tolist() == expected
    np.testing.assert_array_equal(unpadded(kept), kept)
