"""Which frames and persons of a recording are kept."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Number = TypeVar("Number", bound=np.floating)


def canonical_persons(keypoints: NDArray[Number]) -> NDArray[Number]:
    """The frames in which the main person is seen, main person first.

    `keypoints` is (M, T, V, C) with M at least 1; persons after the second are left out. A person is seen in a frame if
    any of its values differs from 0 by more than 1e-8. Where person 1 is seen in more frames than person 0, the two are
    swapped. Frames in which the person that is then first is not seen are dropped, and so is a second person who is seen
    in none of the frames left. Returns (1 or 2, T', V, C) of the same type; T' is 0 where nobody is seen at all.

    Source: the first step of MMAction2 1.2.0 `PreNormalize3D`. Departures: a recording without anybody comes back empty
    instead of unchanged, and a second person who is all zero is removed (the clip's zero padding brings it back).
    """
    persons = keypoints[:2]
    seen = ~np.isclose(persons, 0).all(axis=(2, 3))
    if len(seen) == 2 and seen[1].sum() > seen[0].sum():
        persons, seen = persons[::-1], seen[::-1]
    kept = persons[:, seen[0]]
    return kept if len(seen) == 2 and seen[1, seen[0]].any() else kept[:1]


def unpadded(keypoints: NDArray[Number]) -> NDArray[Number]:
    """The recording without persons of zeros only and without trailing frames of zeros only.

    `keypoints` is (M, T, V, C); persons after the second are left out. Frames of zeros before the last frame in which a
    person is seen stay. Returns (M', T', V, C) of the same type; M' and T' are 0 where nobody is seen at all.
    """
    persons = keypoints[:2]
    seen = (persons != 0).any(axis=(2, 3))
    return persons[seen.any(axis=1), : np.flatnonzero(seen.any(axis=0)).max(initial=-1) + 1]
