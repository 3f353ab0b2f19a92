"""A skeleton pipeline as the field writes it: numpy, one sample after the other, one small function per step.

Source: the descriptions of MMAction2 v1.2.0's `PreNormalize2D`, `PreNormalize3D`, `GenSkeFeat` (`JointToBone`, `ToMotion`),
`UniformSampleFrames`, `PoseDecode` and `FormatGCNInput`, their loops over frames included: two thirds of the time in 2D, four
fifths in 3D. Departures: float32 from the first step, as pyskl does it (MMAction2 keeps float16, which numpy computes more
slowly), and the random numbers are handed in, so that both ways can draw the same frames.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffn.data.store import Space
from ffn.layouts import Layout

Array = NDArray[np.floating[Any]]


def clip(
    keypoints: Array, draws: Array, *, stream: str, length: int, persons: int, layout: Layout, space: Space, size: tuple[int, int]
) -> Array:
    """One training clip (persons, length, V, 3) of a sample (M, T, V, 3), frames by its row of `Sampler.draws`."""
    x = keypoints.astype(np.float32)
    x = pre_normalize_2d(x, *size) if space == "2d" else pre_normalize_3d(x, layout)
    if "b" in stream:
        x = joint_to_bone(x, layout.parents, space)
    if "m" in stream:
        x = to_motion(x, space)
    frames = x.shape[1]
    counts = persons_in_frames(x)
    numbers = uniform_sample_frames(frames, length, int(draws[0] * np.float32(frames)), draws[7 : 2 * length + 8])
    # Where the number of persons changes, the source forbids frame numbers between two frames; whole ones stay as they are.
    changes = [False, *(a != b or b != c for a, b, c in zip(counts, counts[1:], counts[2:], strict=False)), False]
    kept = np.array([changes[number] for number in numbers])
    numbers = (kept * numbers + (1 - kept) * numbers).astype(np.int64)
    return format_gcn_input(x[:, numbers], persons)


def persons_in_frames(x: Array) -> list[int]:
    """How many persons every frame shows, counted from the last person on."""
    counts = []
    for frame in range(x.shape[1]):
        person = len(x) - 1
        while person >= 0 and np.all(np.abs(x[person, frame]) < 1e-5):
            person -= 1
        counts.append(person + 1)
    return counts


def pre_normalize_2d(x: Array, width: int, height: int) -> Array:
    """Pixels to [-1, 1]."""
    x[..., 0] = (x[..., 0] - width / 2) / (width / 2)
    x[..., 1] = (x[..., 1] - height / 2) / (height / 2)
    return x


def pre_normalize_3d(x: Array, layout: Layout) -> Array:
    """Frames without the main person dropped, frame by frame; centred; spine to +z, shoulders to +x."""
    seen = [[t for t in range(x.shape[1]) if not np.all(np.isclose(person[t], 0))] for person in x]
    x = x[:, seen[1]][[1, 0]] if len(x) == 2 and len(seen[0]) < len(seen[1]) else x[:, seen[0]]
    assert layout.spine is not None
    assert layout.shoulders is not None
    origin = x[0, 0, layout.spine[1]].copy()
    x = (x - origin) * np.any(x != 0, axis=-1, keepdims=True)
    for (start, end), target in ((layout.spine, (0.0, 0.0, 1.0)), (layout.shoulders, (1.0, 0.0, 0.0))):
        line = (x[0, 0, end] - x[0, 0, start]).astype(np.float64)
        matrix = rotation(np.cross(line, target), angle(line, np.array(target)))
        x = np.einsum("mtvc,kc->mtvk", x, matrix)
    return x.astype(np.float32)


def rotation(axis: Array, theta: float) -> Array:
    """Rotation about `axis` by `theta`, by Euler and Rodrigues."""
    if np.abs(axis).sum() < 1e-6 or abs(theta) < 1e-6:
        return np.eye(3)
    axis = axis / math.sqrt(axis @ axis)
    a = math.cos(theta / 2)
    b, c, d = -axis * math.sin(theta / 2)
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c + a * d), 2 * (b * d - a * c)],
            [2 * (b * c - a * d), a * a + c * c - b * b - d * d, 2 * (c * d + a * b)],
            [2 * (b * d + a * c), 2 * (c * d - a * b), a * a + d * d - b * b - c * c],
        ]
    )


def angle(u: Array, v: Array) -> float:
    """Angle between two vectors, radians; 0 where one is zero."""
    if np.abs(u).sum() < 1e-6 or np.abs(v).sum() < 1e-6:
        return 0.0
    return math.acos(float(np.clip(u / np.linalg.norm(u) @ (v / np.linalg.norm(v)), -1, 1)))


def joint_to_bone(x: Array, parents: Sequence[int], space: Space) -> Array:
    """Joint minus parent, pair by pair; scores are averaged."""
    bone = np.zeros_like(x)
    for joint, parent in enumerate(parents):
        bone[..., joint, :] = x[..., joint, :] - x[..., parent, :]
        if space == "2d":
            bone[..., joint, 2] = (x[..., joint, 2] + x[..., parent, 2]) / 2
    return bone


def to_motion(x: Array, space: Space) -> Array:
    """Next frame minus this one, the last frame zero; scores are averaged."""
    motion = np.zeros_like(x)
    motion[:, :-1] = np.diff(x, axis=1)
    if space == "2d":
        motion[:, :-1, :, 2] = (x[:, :-1, :, 2] + x[:, 1:, :, 2]) / 2
    return motion


def uniform_sample_frames(frames: int, length: int, start: int, draws: Array) -> NDArray[np.int64]:
    """Frame numbers (length,): going round, skipping, or one from every bin."""
    if frames < length:
        return np.arange(start, start + length) % frames
    if frames < 2 * length:
        skipped = np.argsort(draws[: length + 1])[: frames - length]
        offset = np.zeros(length + 1, np.int64)
        offset[skipped] = 1
        return np.arange(length) + np.cumsum(offset)[:-1]
    bounds = np.array([i * frames // length for i in range(length + 1)])
    return bounds[:length] + (draws[length + 1 :] * np.diff(bounds).astype(np.float32)).astype(np.int64)


def format_gcn_input(x: Array, persons: int) -> Array:
    """Exactly `persons` persons: further ones cut off, missing ones zeros."""
    if len(x) < persons:
        x = np.concatenate([x, np.zeros((persons - len(x), *x.shape[1:]), x.dtype)], axis=0)
    return np.ascontiguousarray(x[:persons])
