"""Compiled loops of what only a block of FFN does: MSF-TCN's branches, and the fusion of its attention. See `ffn.model.loops`."""

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from ffn.machine import compiled, compiled_in_parallel
from ffn.model.loops import PARTS, add_moments, add_powers

Array = NDArray[Any]


@compiled
def _sigmoid(x: Any) -> Any:
    """Of a float32, to its last digits: a call of exp for every number would cost more than all the rest of a pass."""
    x = -min(max(x, np.float32(-87)), np.float32(87))
    halvings = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    rest = x - halvings * np.float32(0.693145751953125) - halvings * np.float32(1.42860682030941723e-6)  # ln 2 in two parts
    power = np.float32(1)
    for k in range(8):  # e^rest, |rest| <= ln 2 / 2, by its series from the end
        power = np.float32(1) + power * rest / np.float32(8 - k)
    scale = np.uint32((np.int32(halvings) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(1) / (np.float32(1) + power * scale)


@compiled_in_parallel
def fusion(
    of: Array, slope: Array, level: Array, offset: Array, both: Array, y: Array, residual: Array, m: Array, out: Array
) -> None:
    """Write m = sigmoid(slope·of + level + offset), and to `out` the ReLU of y + m (both - 2 y), plus `residual`, if it has any.

    All are (B, R, C), `slope` and `level` (C,), `offset` (B, C).
    """
    samples, rows, channels = both.shape
    for n in prange(samples):
        for r in range(rows):
            for c in range(channels):
                x = of[n, r, c] * slope[c] + (level[c] + offset[n, c])
                share = _sigmoid(x) if both.itemsize == 4 else 1 / (1 + np.exp(-x))
                z = y[n, r, c] + share * (both[n, r, c] - y[n, r, c] - y[n, r, c])
                if len(residual):
                    z += residual[n, r, c]
                m[n, r, c] = share
                out[n, r, c] = both.dtype.type(0) if z < 0 else z


@compiled_in_parallel
def fusion_gradients(
    dz: Array, z: Array, both: Array, y: Array, m: Array, of: Array, mean: Array,
    dboth: Array, dy: Array, dof: Array, dresidual: Array, sums: Array,
) -> None:  # fmt: skip
    """Write the gradients of `fusion`'s arguments (B, R, C), that of `of` normalised; `dresidual` is empty where there is none.

    Sums of that one, and of it times (of - mean), `mean` (1, C), go into `sums` (B, 2, 1, C).
    """
    samples, rows, channels = both.shape
    for n in prange(samples):
        sums[n] = 0
        for r in range(rows):
            for c in range(channels):
                d = dz[n, r, c] if z[n, r, c] > 0 else dz.dtype.type(0)
                share = m[n, r, c]
                g = d * (both[n, r, c] - y[n, r, c] - y[n, r, c]) * (share - share * share)
                dboth[n, r, c] = d * share
                dy[n, r, c] = d - d * (share + share)
                dof[n, r, c] = g
                if len(dresidual):
                    dresidual[n, r, c] = d
            if r % 4 == 3 or r == rows - 1:
                add_moments(dof[n], r // 4 * 4, of[n], r // 4 * 4, r % 4 + 1, mean, 1, sums, n)


@compiled_in_parallel
def branches(x: Array, slope: Array, level: Array, out: Array) -> None:
    """Write the ReLU of slope·x + level, an eighth of the channels of `x` (R, C) at a time, to `out` (8, R, C / 8).

    The last eighth is written as it is; `slope` and `level` (1, 7 C / 8) are of the others.
    """
    groups, rows, width = out.shape
    for part in prange(PARTS):
        for r in range(rows * part // PARTS, rows * (part + 1) // PARTS):
            for group in range(groups - 1):
                for i in range(width):
                    c = group * width + i
                    y = x[r, c] * slope[0, c] + level[0, c]
                    out[group, r, i] = x.dtype.type(0) if y < 0 else y
            for i in range(width):
                out[groups - 1, r, i] = x[r, (groups - 1) * width + i]


@compiled_in_parallel
def branches_gradients(dy: Any, y: Array, x: Array, mean: Array, out: Array, sums: Array) -> None:
    """Write `dy`, eight (R, C / 8), side by side to `out` (R, C): zero where `y` (8, R, C / 8) is, but for the last eighth.

    Sums of the others, and of them times (x - mean), `mean` (1, 7 C / 8), go into `sums` (PARTS, 2, 1, 7 C / 8).
    """
    d0, d1, d2, d3, d4, d5, d6, d7 = dy
    rows, width = d0.shape
    for part in prange(PARTS):
        sums[part] = 0
        first, last = rows * part // PARTS, rows * (part + 1) // PARTS
        for r in range(first, last):  # an index into `dy` would not be vectorised
            for i in range(width):
                out[r, i] = d0[r, i] if y[0, r, i] > 0 else y.dtype.type(0)
            for i in range(width):
                out[r, width + i] = d1[r, i] if y[1, r, i] > 0 else y.dtype.type(0)
            for i in range(width):
                out[r, 2 * width + i] = d2[r, i] if y[2, r, i] > 0 else y.dtype.type(0)
            for i in range(width):
                out[r, 3 * width + i] = d3[r, i] if y[3, r, i] > 0 else y.dtype.type(0)
            for i in range(width):
                out[r, 4 * width + i] = d4[r, i] if y[4, r, i] > 0 else y.dtype.type(0)
            for i in range(width):
                out[r, 5 * width + i] = d5[r, i] if y[5, r, i] > 0 else y.dtype.type(0)
            for i in range(width):
                out[r, 6 * width + i] = d6[r, i] if y[6, r, i] > 0 else y.dtype.type(0)
            for i in range(width):
                out[r, 7 * width + i] = d7[r, i]
            if (r - first) % 4 == 3 or r == last - 1:
                at = r - (r - first) % 4
                add_moments(out, at, x, at, r + 1 - at, mean, 1, sums, part)


@compiled_in_parallel
def joined(convolved: Any, to_max: Array, to_mean: Array, to_point: Array, out: Array, sums: Array) -> None:
    """Write the eight branches of MSF-TCN side by side to `out` (B, T', V, 8, W), and their `moments` into `sums` (B, 3, 1, 8 W).

    Five `convolved` (B, T', V, W), each with those before it added; maximum and mean over three frames, and every frame that the
    stride keeps, of the last three (B, T, V, W).
    """
    samples, steps, joints, _, width = out.shape
    frames = to_max.shape[1]
    stride = (frames + steps - 1) // steps
    y0, y1, y2, y3, y4 = convolved
    for n in prange(samples):
        rows = out[n].reshape(steps * joints, 8 * width)
        for step in range(steps):
            t = step * stride
            low, high = max(t - 1, 0), min(t + 1, frames - 1)
            for v in range(joints):
                for i in range(width):
                    y = y0[n, step, v, i]
                    out[n, step, v, 0, i] = y
                    y += y1[n, step, v, i]
                    out[n, step, v, 1, i] = y
                    y += y2[n, step, v, i]
                    out[n, step, v, 2, i] = y
                    y += y3[n, step, v, i]
                    out[n, step, v, 3, i] = y
                    y += y4[n, step, v, i]
                    out[n, step, v, 4, i] = y
                    a, b, c = to_max[n, low, v, i], to_max[n, t, v, i], to_max[n, high, v, i]
                    b = a if a > b else b
                    out[n, step, v, 5, i] = c if c > b else b
                    a, b, c = to_mean[n, low, v, i], to_mean[n, t, v, i], to_mean[n, high, v, i]
                    a = a if low < t else out.dtype.type(0)
                    c = c if high > t else out.dtype.type(0)
                    out[n, step, v, 6, i] = (a + b + c) / out.dtype.type(3)
                    out[n, step, v, 7, i] = to_point[n, t, v, i]
            if step == 0:
                for c in range(8 * width):
                    sums[n, 0, 0, c], sums[n, 1, 0, c], sums[n, 2, 0, c] = 0, 0, rows[0, c]
            add_powers(rows, step * joints, joints, sums, n)


@compiled_in_parallel
def joined_gradients(
    dz: Array, y: Array, terms: Array, times: Any, to_max: Array, convolved: Any, dmax: Array, dmean: Array, dpoint: Array
) -> None:
    """Write the gradients of `joined` to its arguments' likes, from `dz`, that of its `y` normalised: see `normal_gradients`.

    `terms` are (3, 8, W); the last sample counts `times` times. The first of equal values is the largest one.
    """
    samples, steps, joints, _, width = dz.shape
    frames = to_max.shape[1]
    stride = (frames + steps - 1) // steps
    d0, d1, d2, d3, d4 = convolved
    for n in prange(samples):
        dy = np.empty((8, width), dz.dtype)
        count = times if n == samples - 1 else dz.dtype.type(1)
        for t in range(frames):
            for v in range(joints):
                for i in range(width):
                    dmax[n, t, v, i] = 0
                    dmean[n, t, v, i] = 0
                    dpoint[n, t, v, i] = 0
        for step in range(steps):
            t = step * stride
            low, high = max(t - 1, 0), min(t + 1, frames - 1)
            for v in range(joints):
                for k in range(8):
                    for i in range(width):
                        dy[k, i] = terms[0, k, i] * dz[n, step, v, k, i] + count * (
                            terms[1, k, i] * y[n, step, v, k, i] + terms[2, k, i]
                        )
                for i in range(width):
                    d = dy[4, i]
                    d4[n, step, v, i] = d
                    d += dy[3, i]
                    d3[n, step, v, i] = d
                    d += dy[2, i]
                    d2[n, step, v, i] = d
                    d += dy[1, i]
                    d1[n, step, v, i] = d
                    d += dy[0, i]
                    d0[n, step, v, i] = d
                    dpoint[n, t, v, i] = dy[7, i]
                for i in range(width):
                    d = dy[5, i]
                    a, b, c = to_max[n, low, v, i], to_max[n, t, v, i], to_max[n, high, v, i]
                    first = (a >= b) & (a >= c)
                    second = (b >= c) & (not first)
                    dmax[n, low, v, i] += d if first else dz.dtype.type(0)
                    dmax[n, t, v, i] += d if second else dz.dtype.type(0)
                    dmax[n, high, v, i] += dz.dtype.type(0) if first | second else d
                for i in range(width):
                    d = dy[6, i] / dz.dtype.type(3)
                    dmean[n, t, v, i] += d
                    if low < t:
                        dmean[n, low, v, i] += d
                    if high > t:
                        dmean[n, high, v, i] += d
