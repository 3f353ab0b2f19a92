from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

Frames = Sequence[Sequence[np.ndarray]]
"""Per frame, per body, (25, 12): the numbers of the joints' lines."""


@pytest.fixture
def skeleton() -> Callable[[Frames], bytes]:
    """The text of a `.skeleton` file, as the recorder writes it."""

    def text(frames: Frames) -> bytes:
        lines = [str(len(frames))]
        for bodies in frames:
            lines.append(str(len(bodies)))
            for number, body in enumerate(bodies):
                lines += [f"{72057594037944340 + number} 0 1 1 1 1 0 -0.04 0.14 2", str(len(body))]
                lines += [" ".join(f"{value:.7g}" for value in joint) for joint in body]
        return ("\r\n".join(lines) + "\r\n").encode()

    return text


@pytest.fixture
def body() -> Callable[..., list[np.ndarray]]:
    """One body's frames: a random pose whose joints move by about `motion` metres from frame to frame."""

    def frames(seed: int, count: int, motion: float = 0.1) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        metres = rng.normal(size=(25, 3)) + np.array([0, 0, 3])
        values = np.concatenate([metres, rng.uniform(100, 900, (25, 4)), rng.normal(size=(25, 4))], 1)
        values = np.concatenate([values, np.full((25, 1), 2.0)], 1)
        made = np.repeat(values[None], count, 0)
        made[:, :, :7] += np.cumsum(rng.normal(size=(count, 1, 7)) * motion, axis=0)
        return [np.array([[float(f"{value:.7g}") for value in joint] for joint in frame]) for frame in made]

    return frames


@pytest.fixture
def ntu_folder(tmp_path: Path, skeleton, body) -> Path:
    """Eight small recordings that fill every protocol."""
    folder = tmp_path / "ntu"
    folder.mkdir()
    for number, (setup, camera, subject, action) in enumerate(
        [(1, 1, 3, 1), (1, 2, 1, 1), (2, 3, 2, 1), (2, 1, 7, 2), (1, 2, 1, 2), (18, 1, 41, 61), (19, 2, 45, 61), (2, 2, 8, 60)]
    ):
        name = f"S{setup:03}C{camera:03}P{subject:03}R001A{action:03}.skeleton"
        (folder / name).write_bytes(skeleton([[frame] for frame in body(number, 4 + number)]))
    return folder
