"""Normalisation and the four streams: where recordings are turned, and the compiled loop that writes clips.

A row is one person's frame, 3 V numbers: x, y, z in metres (3D), or x, y and a score (2D) of joint after joint.
Joint by joint everything here is `matrix (x - origin)`, and a stream takes differences of joints and of frames: the origin drops
out of them, and the matrix, with normalisation and augmentation in it, comes last.
Source: MMAction2 v1.2.0, `PreNormalize2D`, `PreNormalize3D`, `JointToBone`, `ToMotion`, `GenSkeFeat`; in float32 throughout,
where MMAction2 keeps the data's float16. Joints of 2D keypoints without a score are not masked.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffn.data.store import Space
from ffn.layouts import Layout
from ffn.machine import compiled

Array = NDArray[Any]


def image_scale(image_size: Tensor, halvings: int) -> tuple[Tensor, Tensor]:
    """Origin (N, 3) and scale (N, 3) that take pixels to [-1, 1] in images of (N, 2) pixels, width and height.

    The score keeps its origin and is halved `halvings` times: once for every `difference`, which adds up two.
    """
    half = image_size / 2
    score = torch.zeros_like(half[:, :1])
    return torch.cat([half, score], 1), torch.cat([1 / half, score + 0.5**halvings], 1)


def alignment(first: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Origin and rotation that stand a skeleton upright and face-on.

    `first` (N, V, 3) is the main person's first frame. Returns the origin (N, 3), the top of the spine bone, and rotations
    (N, 3, 3), y = R x, that turn the spine bone to +z and then the line between the shoulders (right minus left) to +x.
    A layout without spine or shoulders is centred on its centre joint and not turned.
    """
    origin = first[:, layout.spine[1] if layout.spine else layout.center]
    turn = torch.eye(3, dtype=first.dtype, device=first.device).expand(first.shape[0], 3, 3)
    present = (first != 0).any(-1, keepdim=True)
    centered = (first - origin[:, None]) * present
    for bone, axis in ((layout.spine, 2), (layout.shoulders, 0)):
        if bone:
            line = centered[:, bone[1]] - centered[:, bone[0]]
            turn = rotation_to_axis((turn @ line[..., None])[..., 0], axis) @ turn
    return origin, turn


def rotation_to_axis(vectors: Tensor, axis: int) -> Tensor:
    """Rotations (N, 3, 3) that turn `vectors` (N, 3) to the positive coordinate axis; identity where a vector is zero."""
    target = torch.zeros_like(vectors)
    target[:, axis] = 1
    length = vectors.norm(dim=-1, keepdim=True)
    unit = vectors / length.clamp_min(1e-12)
    normal = torch.linalg.cross(unit, target)
    sine, cosine = normal.norm(dim=-1), unit[:, axis]
    k = normal / sine.clamp_min(1e-12)[:, None]
    x, y, z = k.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    eye = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    turn = eye + sine[:, None, None] * cross + (1 - cosine)[:, None, None] * (cross @ cross)
    # As in the source, a vector that is (anti)parallel to the axis has no rotation plane and stays as it is.
    still = (sine < 1e-6) | (length[:, 0] < 1e-6)
    return torch.where(still[:, None, None], eye, turn)


def write_clips(
    out: Array,
    keypoints: Array,
    starts: Array,
    frames: Array,
    persons: Array,
    numbers: Array,
    origin: Array,
    matrix: Array,
    *,
    layout: Layout,
    space: Space,
    stream: str,
) -> None:
    """Write clips (N, M, T, V, 3) of `stream` to `out` float32, contiguous: joints less `origin` (N, 3), times `matrix` (N, 3, 3).

    `keypoints` (R, V, 3) float16; frame t of clip n is the sample's frame `numbers` (N, T), which for person m is row
    `starts[n] + m * frames[n] + numbers[n, t]`. A person beyond `persons` (N,) is zeros, so is the motion of the last frame; a
    3D joint at zero is missing and has no origin to lose. Raises `IndexError` where a frame is none of its sample's.
    """
    if ((numbers < 0) | (numbers >= frames[:, None])).any() or (starts + persons * frames > len(keypoints)).any():
        raise IndexError(f"frames {numbers.min()} to {numbers.max()} of samples of {frames.min()} to {frames.max()} frames")
    _write(
        out.reshape(-1), keypoints.view(np.uint16).reshape(-1), starts, frames, persons, numbers, origin, matrix,
        layout.parents, space == "3d", "b" in stream, "m" in stream,
    )  # fmt: skip


@compiled
def _value(bits: Array, place: Any) -> Any:
    """float32 of the bits of a float16, but for a factor of 2^112: numba has no float16 on a CPU."""
    word = np.uint32(bits[place])
    return np.uint32((word & np.uint32(0x8000)) << np.uint32(16) | (word & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)


@compiled
def _seen(bits: Array, place: Any) -> Any:
    """1 if the joint whose coordinates begin at `place` is seen; 0 if it is missing, all of them zero."""
    return np.float32(
        (_value(bits, place) != 0) | (_value(bits, place + np.uintp(1)) != 0) | (_value(bits, place + np.uintp(2)) != 0)
    )


@compiled
def _write(
    out: Array,
    bits: Array,
    starts: Array,
    frames: Array,
    persons: Array,
    numbers: Array,
    origin: Array,
    matrix: Array,
    parents: tuple[int, ...],
    spatial: bool,
    bone: bool,
    motion: bool,
) -> None:
    # Written for the vectoriser: loops over whole rows, as long as the compiler knows (a tuple's length is part of its type) and
    # whole vectors where they may be; places unsigned (a signed one could count from the end); of a matrix its five
    # diagonals, spread over a row's columns, so that no loop runs over three coordinates.
    clips, length = numbers.shape
    width = 3 * len(parents)
    whole = (width + 15) // 16 * 16
    everyone = out.size // (numbers.size * width)
    columns = np.zeros(whole, np.uint32)
    work = np.zeros((10, whole + 16), np.float32)
    row, less, offset, shifted, sign = work[0], work[1], work[2], work[3], work[4]
    diagonals = work[5:]
    d0, d1, d2, d3, d4 = work[5], work[6], work[7], work[8], work[9]
    s0, s1, s2, s3, s4 = shifted, shifted[1:], shifted[2:], shifted[3:], shifted[4:]
    for i in range(width):
        columns[i] = 3 * parents[i // 3] + i % 3
        sign[i] = -1 if i % 3 == 2 and not spatial else 1
    unit = np.float32(2.0**112)
    to, step = np.uintp(0), np.uintp(width)
    for clip in range(clips):
        turned = False
        for joint in range(len(parents)):
            for i in range(3):
                offset[3 * joint + i] = origin[clip, i]
                for j in range(3):
                    diagonals[2 + j - i, 3 * joint + i] = matrix[clip, i, j]
                    turned |= i != j and matrix[clip, i, j] != 0
        for person in range(everyone):
            first, last = starts[clip] + person * frames[clip], frames[clip] - 1
            for frame in range(length):
                number = numbers[clip, frame]
                if person >= persons[clip] or (motion and number == last):
                    for i in range(width):
                        out[to + np.uintp(i)] = 0
                    to += step
                    continue
                here = np.uintp(first + number) * step
                missing = np.uint32(0)
                for i in range(width):
                    value = _value(bits, here + np.uintp(i))
                    row[i] = value * unit
                    missing += np.uint32(value == 0)
                if motion:
                    for i in range(width):
                        value = _value(bits, here + step + np.uintp(i))
                        row[i] = value * unit - row[i] * sign[i]
                        missing += np.uint32(value == 0)
                if spatial and missing:
                    for joint in range(len(parents)):
                        place = here + np.uintp(3 * joint)
                        seen = _seen(bits, place + step) - _seen(bits, place) if motion else _seen(bits, place)
                        for i in range(3):
                            less[3 * joint + i] = seen
                    for i in range(whole):
                        row[i] -= less[i] * offset[i]
                elif not (bone or motion):
                    for i in range(whole):
                        row[i] -= offset[i]
                if bone:
                    for i in range(whole):
                        s2[i] = row[i] - row[columns[i]] * sign[i]
                else:
                    for i in range(whole):
                        s2[i] = row[i]
                if turned:
                    for i in range(width):
                        out[to + np.uintp(i)] = s0[i] * d0[i] + s1[i] * d1[i] + s2[i] * d2[i] + s3[i] * d3[i] + s4[i] * d4[i]
                else:
                    for i in range(width):
                        out[to + np.uintp(i)] = s2[i] * d2[i]
                to += step
