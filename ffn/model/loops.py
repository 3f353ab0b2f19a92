"""Compiled loops over features on a CPU: what surrounds the convolutions of a training step, in as few passes as it can be.

Features are rows (R, C): R = B·T·V positions, sample after sample, frame after frame, joint after joint; C channels. What belongs
to a batch-norm is (P, C) with a period P: row r takes entry r mod P, so that P = 1 is a batch-norm of the channels and P = V
one of joints and channels. Sums are made in `PARTS` parts of whole frames, whoever computes which, so that results do not depend on
the number of threads. Numbers of every argument are of one type, float32 or float64, but `total`, which is float64.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray

from ffn.machine import compiled, compiled_in_parallel, compiled_sums

Array = NDArray[Any]
PARTS = 32
_MOST: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # made when numba starts


def share_threads() -> None:
    """As many threads for the loops as torch has, which numba, when it first starts, gives every core."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, _MOST))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@compiled
def piece(part: Any, parts: Any, samples: Any, frames: Any) -> Any:
    """The sample of a part, and its first frame and the one after its last."""
    pieces = parts // samples
    sample, number = part // pieces, part % pieces
    return sample, frames * number // pieces, frames * (number + 1) // pieces


@compiled
def add_powers(x: Array, at: Any, rows: Any, sums: Array, part: Any) -> None:
    """Add sums of x - pivot and of its square to sums[part] (3, P, C), of `rows` of `x` (R, C) from `at` on.

    The third of them is the pivot. A sum is read and written once for four rows.
    """
    _, _, period, channels = sums.shape
    for p in range(period):
        for r0 in range(at + p, at + rows - 3 * period, 4 * period):
            r1, r2, r3 = r0 + period, r0 + 2 * period, r0 + 3 * period
            for c in range(channels):
                pivot = sums[part, 2, p, c]
                d0, d1, d2, d3 = x[r0, c] - pivot, x[r1, c] - pivot, x[r2, c] - pivot, x[r3, c] - pivot
                sums[part, 0, p, c] += d0 + d1 + d2 + d3
                sums[part, 1, p, c] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
        for r in range(at + rows // (4 * period) * (4 * period) + p, at + rows, period):
            for c in range(channels):
                d = x[r, c] - sums[part, 2, p, c]
                sums[part, 0, p, c] += d
                sums[part, 1, p, c] += d * d


@compiled
def add_moments(d: Array, at: Any, x: Array, x_at: Any, rows: Any, mean: Array, kind: Any, sums: Array, part: Any) -> None:
    """Add sums of d, if `kind` is 1, and of d (x - mean), of this `kind`, to sums[part] (2 or 3, P, C).

    They are of `rows` of `d` from `at` on, and of `x` from `x_at` on.
    """
    _, _, period, channels = sums.shape
    for p in range(period):
        for r0 in range(p, rows - 3 * period, 4 * period):
            i0, j0 = at + r0, x_at + r0
            i1, i2, i3 = i0 + period, i0 + 2 * period, i0 + 3 * period
            j1, j2, j3 = j0 + period, j0 + 2 * period, j0 + 3 * period
            for c in range(channels):
                d0, d1, d2, d3 = d[i0, c], d[i1, c], d[i2, c], d[i3, c]
                m = mean[p, c]
                sums[part, kind, p, c] += d0 * (x[j0, c] - m) + d1 * (x[j1, c] - m) + d2 * (x[j2, c] - m) + d3 * (x[j3, c] - m)
                if kind == 1:
                    sums[part, 0, p, c] += d0 + d1 + d2 + d3
        for r in range(rows // (4 * period) * (4 * period) + p, rows, period):
            for c in range(channels):
                sums[part, kind, p, c] += d[at + r, c] * (x[x_at + r, c] - mean[p, c])
                if kind == 1:
                    sums[part, 0, p, c] += d[at + r, c]


@compiled_in_parallel
def moments(x: Array, samples: int, length: int, sums: Array) -> None:
    """Sums of x - pivot and of its square, and the pivot, a value among them, into `sums` (parts, 3, P, C); `x` (R, C).

    A part is a piece of one of the `samples`, which have `length` frames.
    """
    parts, _, period, channels = sums.shape
    joints = len(x) // (samples * length)
    for part in prange(parts):
        sample, first, last = piece(part, parts, samples, length)
        at = (sample * length + first) * joints
        for p in range(period):
            for c in range(channels):
                sums[part, 0, p, c] = 0
                sums[part, 1, p, c] = 0
                sums[part, 2, p, c] = x[at + p, c]
        add_powers(x, at, (last - first) * joints, sums, part)


@compiled
def about_zero(sums: Array, counts: Array, times: Array, joined: Array) -> None:
    """Sums of x and of its square, and how many there are, into `joined` (3, P, C) float64, from those of `moments`.

    A part has `counts` (parts,) of them, which stand for `times` (parts,) as many.
    """
    joined[:] = 0
    for part in range(len(sums)):
        count, often = counts[part], times[part]
        for p in range(sums.shape[2]):
            for c in range(sums.shape[3]):
                first, second = np.float64(sums[part, 0, p, c]), np.float64(sums[part, 1, p, c])
                pivot = np.float64(sums[part, 2, p, c])
                joined[0, p, c] += often * (first + count * pivot)
                joined[1, p, c] += often * (second + pivot * (2 * first + count * pivot))
                joined[2, p, c] += often * count


@compiled_in_parallel
def normal_sum(
    x: Array, slope: Array, level: Array, x2: Any, slope2: Any, level2: Any, residual: Any, floor: Any, out: Array
) -> None:
    """Write slope·x + level of frames to `out` (F, V·C), at least `floor`; with the same of `x2` and `residual`, if not None."""
    frames, entries = x.shape
    for part in prange(PARTS):
        for f in range(frames * part // PARTS, frames * (part + 1) // PARTS):
            for i in range(entries):
                y = x[f, i] * slope[i] + level[i]
                if x2 is not None:
                    y += x2[f, i] * slope2[i] + level2[i]
                if residual is not None:
                    y += residual[f, i]
                out[f, i] = floor if y < floor else y


@compiled_in_parallel
def normal_sum_gradients(dy: Array, y: Any, x: Array, mean: Array, x2: Any, mean2: Any, dz: Any, sums: Array) -> None:
    """Write the gradient of a sum before its ReLU, `dy` (F, V·C) where `y` is above zero, to `dz`; both None where it has no ReLU.

    Sums of it, of it times (x - mean), and where there is an `x2` of it times (x2 - mean2), go into `sums` (PARTS, 2 or 3, 1, V·C).
    """
    frames, entries = x.shape
    for part in prange(PARTS):
        sums[part] = 0
        first, last = frames * part // PARTS, frames * (part + 1) // PARTS
        for f in range(first, last, 4):
            some = min(4, last - f)
            if y is None:
                add_moments(dy, f, x, f, some, mean, 1, sums, part)
                if x2 is not None:
                    add_moments(dy, f, x2, f, some, mean2, 2, sums, part)
            else:
                for g in range(f, f + some):
                    for i in range(entries):
                        dz[g, i] = dy[g, i] if y[g, i] > 0 else dy.dtype.type(0)
                add_moments(dz, f, x, f, some, mean, 1, sums, part)
                if x2 is not None:
                    add_moments(dz, f, x2, f, some, mean2, 2, sums, part)


@compiled_in_parallel
def normal_gradients(dz: Array, x: Array, terms: Array, last: int, times: Any, dx: Array) -> None:
    """Write the gradient of frames `x`, terms[0]·dz + terms[1]·x + terms[2], to `dx` (F, V·C); `dz` is of x normalised.

    What does not come of `dz` counts `times` times from frame `last` on; `terms` are (3, V·C).
    """
    frames, entries = x.shape
    for part in prange(PARTS):
        for f in range(frames * part // PARTS, frames * (part + 1) // PARTS):
            count = times if f >= last else x.dtype.type(1)
            for i in range(entries):
                dx[f, i] = terms[0, i] * dz[f, i] + count * (terms[1, i] * x[f, i] + terms[2, i])


@compiled
def _product(matrix: Array, x: Array, f: Any, out: Array) -> None:
    """`product` of frame `f`: two rows and three terms at a time, as many as registers hold with what they are made of."""
    outputs, inputs = matrix.shape
    channels = x.shape[2]
    for p in range(0, outputs, 2):
        second = p + 1 < outputs
        q = p + 1 if second else p
        for c in range(channels):
            out[f, p, c] = 0
            out[f, q, c] = 0
        for j in range(0, inputs - 2, 3):
            a0, a1, a2 = matrix[p, j], matrix[p, j + 1], matrix[p, j + 2]
            b0, b1, b2 = matrix[q, j], matrix[q, j + 1], matrix[q, j + 2]
            if second:
                for c in range(channels):
                    x0, x1, x2 = x[f, j, c], x[f, j + 1, c], x[f, j + 2, c]
                    out[f, p, c] += a0 * x0 + a1 * x1 + a2 * x2
                    out[f, q, c] += b0 * x0 + b1 * x1 + b2 * x2
            else:
                for c in range(channels):
                    out[f, p, c] += a0 * x[f, j, c] + a1 * x[f, j + 1, c] + a2 * x[f, j + 2, c]
        for j in range(inputs - inputs % 3, inputs):
            a0, b0 = matrix[p, j], matrix[q, j] if second else x.dtype.type(0)
            for c in range(channels):
                out[f, p, c] += a0 * x[f, j, c]
                out[f, q, c] += b0 * x[f, j, c]


@compiled_sums
def product_moments(x: Array, dy: Array, f: Any, part: Any, sums: Array) -> None:
    """Add sums over channels of `dy` (F, P, C) times `x` (F, J, C), of frame `f`, to `sums` (PARTS, P, J): six at a time."""
    _, outputs, inputs = sums.shape
    channels = x.shape[2]
    for p in range(0, outputs, 2):
        second = p + 1 < outputs
        q = p + 1 if second else p
        for j in range(0, inputs - 2, 3):
            a0 = a1 = a2 = b0 = b1 = b2 = x.dtype.type(0)
            for c in range(channels):
                d, e = dy[f, p, c], dy[f, q, c]
                x0, x1, x2 = x[f, j, c], x[f, j + 1, c], x[f, j + 2, c]
                a0 += d * x0
                a1 += d * x1
                a2 += d * x2
                b0 += e * x0
                b1 += e * x1
                b2 += e * x2
            sums[part, p, j] += a0
            sums[part, p, j + 1] += a1
            sums[part, p, j + 2] += a2
            if second:
                sums[part, q, j] += b0
                sums[part, q, j + 1] += b1
                sums[part, q, j + 2] += b2
        for j in range(inputs - inputs % 3, inputs):
            a0 = b0 = x.dtype.type(0)
            for c in range(channels):
                a0 += dy[f, p, c] * x[f, j, c]
                b0 += dy[f, q, c] * x[f, j, c]
            sums[part, p, j] += a0
            if second:
                sums[part, q, j] += b0


@compiled_in_parallel
def product(matrix: Array, x: Array, out: Array) -> None:
    """Write `matrix` (P, J) times every frame of `x` (F, J, C) to `out` (F, P, C)."""
    frames = len(x)
    for part in prange(PARTS):
        for f in range(frames * part // PARTS, frames * (part + 1) // PARTS):
            _product(matrix, x, f, out)


@compiled_in_parallel
def product_gradients(transposed: Array, x: Array, dy: Array, dx: Array, dmatrix: Array) -> None:
    """Write the gradients of `product` to `dx` (F, J, C) and, in parts, to `dmatrix` (PARTS, P, J); `transposed` (J, P)."""
    frames = len(x)
    for part in prange(PARTS):
        for p in range(dmatrix.shape[1]):
            for j in range(dmatrix.shape[2]):
                dmatrix[part, p, j] = 0
        for f in range(frames * part // PARTS, frames * (part + 1) // PARTS):  # a frame of `dy` is read once for both
            _product(transposed, dy, f, dx)
            product_moments(x, dy, f, part, dmatrix)


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


@compiled
def affine(
    said: Array, weight: Array, bias: Array, eps: float, momentum: float, running_mean: Array, running_variance: Array, mean: Array,
    scale: Array, made: Array,
) -> None:  # fmt: skip
    """From the sums of `about_zero` over all there is: `mean` and `scale`, 1 / standard deviation, (P, C) float64.

    They go into the running statistics (P·C,), and `made` (3, V·C) becomes slope, level and mean of a frame's entries:
    slope·x + level is normal.
    """
    _, period, channels = said.shape
    count = said[2, 0, 0]
    for p in range(period):
        for c in range(channels):
            i = p * channels + c
            middle = said[0, p, c] / count
            variance = max(said[1, p, c] / count - middle * middle, 0.0)
            mean[p, c], scale[p, c] = middle, 1 / np.sqrt(variance + eps)
            running_mean[i] += momentum * (middle - running_mean[i])
            running_variance[i] += momentum * (variance * (count / (count - 1)) - running_variance[i])
            for j in range(i, made.shape[1], period * channels):
                slope = weight[i] * scale[p, c]
                made[0, j], made[1, j], made[2, j] = slope, bias[i] - slope * middle, middle


@compiled
def affine_gradients(sums: Array, weight: Array, count: float, mean: Array, scale: Array, terms: Array) -> None:
    """The `terms` (3, V, A), A at least C, of `normal_gradients`, from sums (2, P, C) of dz and of dz (x - mean).

    dx = w s (dz - mean(dz) - x' mean(dz x')) with x' = s (x - mean). Channels beyond C have no batch-norm.
    """
    period, channels = mean.shape
    _, joints, width = terms.shape
    for v in range(joints):
        p = v % period
        for c in range(width):
            terms[0, v, c], terms[1, v, c], terms[2, v, c] = 1, 0, 0
            if c < channels:
                of_dz = weight[p * channels + c] * scale[p, c]
                of_x = of_dz * scale[p, c] * scale[p, c] * sums[1, p, c] / -count
                terms[0, v, c], terms[1, v, c], terms[2, v, c] = of_dz, of_x, -of_x * mean[p, c] - of_dz * sums[0, p, c] / count


@compiled
def total(sums: Array, joined: Array) -> None:
    """The sum of `sums` (PARTS, K, P, C) over parts into `joined` (K, P, C) float64."""
    joined[:] = 0
    for part in range(len(sums)):
        for kind in range(sums.shape[1]):
            for p in range(sums.shape[2]):
                for c in range(sums.shape[3]):
                    joined[kind, p, c] += sums[part, kind, p, c]
