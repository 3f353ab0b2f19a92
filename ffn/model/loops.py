"""Compiled loops over features on a CPU: what surrounds the convolutions of a training step, in as few passes as it can be.

Features are rows (R, C): R = B·T·V positions, sample after sample, frame after frame, joint after joint; C channels. What belongs
to a batch-norm is (P, C) with a period P: row r takes entry r mod P, so that P = 1 is a batch-norm of the channels and P = V
one of joints and channels. Sums are made in `PARTS` parts of whole frames, whoever computes which, so that results do not depend on
the number of threads. Numbers of every argument are of one type, float32 or float64, but `total`, which is float64.
"""

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from ffn.machine import compiled, compiled_in_parallel, compiled_sums

Array = NDArray[Any]
PARTS = 32


@compiled_in_parallel
def moments(x: Array, pivot: Array, sums: Array) -> None:
    """Sums of x - pivot and of its square into `sums` (PARTS, 2, P, N), over the first N channels of `x` (R, C); `pivot` (P, N)."""
    parts, _, period, channels = sums.shape
    groups = len(x) // period
    for part in prange(parts):
        for p in range(period):
            for c in range(channels):
                sums[part, 0, p, c] = 0
                sums[part, 1, p, c] = 0
        first, last = groups * part // parts, groups * (part + 1) // parts
        for group in range(first, last - 3, 4):  # a sum is read and written once for four rows
            for p in range(period):
                r0 = group * period + p
                r1, r2, r3 = r0 + period, r0 + 2 * period, r0 + 3 * period
                for c in range(channels):
                    middle = pivot[p, c]
                    d0, d1, d2, d3 = x[r0, c] - middle, x[r1, c] - middle, x[r2, c] - middle, x[r3, c] - middle
                    sums[part, 0, p, c] += d0 + d1 + d2 + d3
                    sums[part, 1, p, c] += d0 * d0 + d1 * d1 + d2 * d2 + d3 * d3
        for group in range(last - (last - first) % 4, last):
            for p in range(period):
                r = group * period + p
                for c in range(channels):
                    d = x[r, c] - pivot[p, c]
                    sums[part, 0, p, c] += d
                    sums[part, 1, p, c] += d * d


@compiled_in_parallel
def normal_sum(
    x: Array, slope: Array, level: Array, x2: Any, slope2: Any, level2: Any, residual: Any, floor: Any, out: Array
) -> None:
    """Write slope·x + level to `out` (R, C), at least `floor`; with the same of `x2` and `residual`, if not None."""
    period, channels = slope.shape
    groups = len(x) // period
    for part in prange(PARTS):
        for group in range(groups * part // PARTS, groups * (part + 1) // PARTS):
            for p in range(period):
                r = group * period + p
                for c in range(channels):
                    y = x[r, c] * slope[p, c] + level[p, c]
                    if x2 is not None:
                        y += x2[r, c] * slope2[p, c] + level2[p, c]
                    if residual is not None:
                        y += residual[r, c]
                    out[r, c] = floor if y < floor else y


@compiled
def _through(dy: Array, y: Any, r: Any, c: Any) -> Any:
    """The gradient `dy` (R, C) before the ReLU that made `y`, all of it where `y` is None."""
    if y is None:
        return dy[r, c]
    return dy[r, c] if y[r, c] > 0 else dy.dtype.type(0)


@compiled_in_parallel
def normal_sum_moments(dy: Array, y: Any, x: Array, mean: Array, x2: Any, mean2: Any, sums: Array) -> None:
    """Sums of dz, of dz (x - mean), and where there is an `x2` of dz (x2 - mean2), into `sums` (PARTS, 2 or 3, P, C).

    dz is the gradient `dy` (R, C) where `y` is above zero; all of `dy` where `y` is None.
    """
    _, kinds, period, channels = sums.shape
    groups = len(x) // period
    for part in prange(PARTS):
        for k in range(kinds):
            for p in range(period):
                for c in range(channels):
                    sums[part, k, p, c] = 0
        first, last = groups * part // PARTS, groups * (part + 1) // PARTS
        for group in range(first, last - 3, 4):
            for p in range(period):
                r0 = group * period + p
                r1, r2, r3 = r0 + period, r0 + 2 * period, r0 + 3 * period
                for c in range(channels):
                    z0, z1, z2, z3 = _through(dy, y, r0, c), _through(dy, y, r1, c), _through(dy, y, r2, c), _through(dy, y, r3, c)
                    m = mean[p, c]
                    sums[part, 0, p, c] += z0 + z1 + z2 + z3
                    sums[part, 1, p, c] += z0 * (x[r0, c] - m) + z1 * (x[r1, c] - m) + z2 * (x[r2, c] - m) + z3 * (x[r3, c] - m)
                    if x2 is not None:
                        m = mean2[p, c]
                        sums[part, 2, p, c] += (
                            z0 * (x2[r0, c] - m) + z1 * (x2[r1, c] - m) + z2 * (x2[r2, c] - m) + z3 * (x2[r3, c] - m)
                        )
        for group in range(last - (last - first) % 4, last):
            for p in range(period):
                r = group * period + p
                for c in range(channels):
                    dz = _through(dy, y, r, c)
                    sums[part, 0, p, c] += dz
                    sums[part, 1, p, c] += dz * (x[r, c] - mean[p, c])
                    if x2 is not None:
                        sums[part, 2, p, c] += dz * (x2[r, c] - mean2[p, c])


@compiled_in_parallel
def normal_sum_gradients(
    dy: Array, y: Any, x: Array, terms: Array, dx: Array, x2: Any, terms2: Any, dx2: Any, dresidual: Any, last: int, times: Any
) -> None:
    """Write the gradients of `normal_sum`: terms[0]·dz + terms[1]·x + terms[2], `terms` (3, P, C), to `dx`; dz to `dresidual`.

    What does not come of dz counts `times` times from row `last` on.
    """
    _, period, channels = terms.shape
    groups = len(x) // period
    for part in prange(PARTS):
        for group in range(groups * part // PARTS, groups * (part + 1) // PARTS):
            for p in range(period):
                r = group * period + p
                count = times if r >= last else x.dtype.type(1)
                for c in range(channels):
                    dz = _through(dy, y, r, c)
                    dx[r, c] = terms[0, p, c] * dz + count * (terms[1, p, c] * x[r, c] + terms[2, p, c])
                    if x2 is not None:
                        dx2[r, c] = terms2[0, p, c] * dz + count * (terms2[1, p, c] * x2[r, c] + terms2[2, p, c])
                    if dresidual is not None:
                        dresidual[r, c] = dz


@compiled_in_parallel
def shift(x: Array, source: Array, mask: Array, alpha: Any, out: Array) -> None:
    """Write (x[f, source] - alpha x[f]) mask, frame by frame, to `out` (F, V·C); `source` and `mask` (V·C,)."""
    frames, entries = x.shape
    for part in prange(PARTS):
        for f in range(frames * part // PARTS, frames * (part + 1) // PARTS):
            for i in range(entries):
                out[f, i] = (x[f, source[i]] - alpha * x[f, i]) * mask[i]


@compiled_in_parallel
def shift_gradients(
    dy: Array, x: Array, target: Array, mask: Array, target_mask: Array, alpha: Any, dx: Array, moved: Array, still: Array
) -> None:
    """Write the gradient of `shift` to `dx` (F, V·C); sums of dy[target]·x and of dy·x, in parts, to `moved` and `still`.

    `target` undoes the source, `target_mask` is the mask there. The gradient of the mask is moved[source] - alpha still.
    """
    frames, entries = x.shape
    for part in prange(PARTS):
        for i in range(entries):
            moved[part, i] = 0
            still[part, i] = 0
        for f in range(frames * part // PARTS, frames * (part + 1) // PARTS):
            for i in range(entries):
                there = dy[f, target[i]]
                moved[part, i] += there * x[f, i]
                still[part, i] += dy[f, i] * x[f, i]
                dx[f, i] = there * target_mask[i] - alpha * dy[f, i] * mask[i]


@compiled_sums
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
def _product_moments(x: Array, dy: Array, f: Any, part: Any, sums: Array) -> None:
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
            _product_moments(x, dy, f, part, dmatrix)


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
    of: Array, slope: Array, level: Array, offset: Array, both: Array, y: Array, residual: Any, m: Array, out: Array
) -> None:
    """Write m = sigmoid(slope·of + level + offset), and to `out` the ReLU of y + m (both - 2 y), plus any `residual`.

    All are (B, R, C), `slope` and `level` (C,), `offset` (B, C).
    """
    samples, rows, channels = both.shape
    for n in prange(samples):
        for r in range(rows):
            for c in range(channels):
                x = of[n, r, c] * slope[c] + (level[c] + offset[n, c])
                share = _sigmoid(x) if both.itemsize == 4 else 1 / (1 + np.exp(-x))
                z = y[n, r, c] + share * (both[n, r, c] - y[n, r, c] - y[n, r, c])
                if residual is not None:
                    z += residual[n, r, c]
                m[n, r, c] = share
                out[n, r, c] = both.dtype.type(0) if z < 0 else z


@compiled_in_parallel
def fusion_moments(dz: Array, z: Array, both: Array, y: Array, m: Array, of: Array, mean: Array, sums: Array) -> None:
    """Sums of g and of g (of - mean) of every sample into `sums` (B, 2, C), g being the gradient of what `m` is the sigmoid of."""
    samples, rows, channels = both.shape
    for n in prange(samples):
        for c in range(channels):
            sums[n, 0, c] = 0
            sums[n, 1, c] = 0
        for r in range(rows):
            for c in range(channels):
                d = dz[n, r, c] if z[n, r, c] > 0 else dz.dtype.type(0)
                share = m[n, r, c]
                g = d * (both[n, r, c] - y[n, r, c] - y[n, r, c]) * (share - share * share)
                sums[n, 0, c] += g
                sums[n, 1, c] += g * (of[n, r, c] - mean[c])


@compiled_in_parallel
def fusion_gradients(
    dz: Array, z: Array, both: Array, y: Array, m: Array, of: Array, terms: Array,
    dboth: Array, dy: Array, dof: Array, dresidual: Any, last: int, times: Any,
) -> None:  # fmt: skip
    """Write the gradients of `fusion`'s arguments (B, R, C); that of `of` through its batch-norm, by `terms` (3, C).

    What does not come of dz counts `times` times from sample `last` on.
    """
    samples, rows, channels = both.shape
    for n in prange(samples):
        count = times if n >= last else dz.dtype.type(1)
        for r in range(rows):
            for c in range(channels):
                d = dz[n, r, c] if z[n, r, c] > 0 else dz.dtype.type(0)
                share = m[n, r, c]
                g = d * (both[n, r, c] - y[n, r, c] - y[n, r, c]) * (share - share * share)
                dboth[n, r, c] = d * share
                dy[n, r, c] = d - d * (share + share)
                dof[n, r, c] = terms[0, c] * g + count * (terms[1, c] * of[n, r, c] + terms[2, c])
                if dresidual is not None:
                    dresidual[n, r, c] = d


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
def branches_gradients(dy: Any, y: Array, out: Array) -> None:
    """Write `dy`, eight (R, C / 8), side by side to `out` (R, C): zero where `y` (8, R, C / 8) is, but for the last eighth."""
    d0, d1, d2, d3, d4, d5, d6, d7 = dy
    rows, width = d0.shape
    for part in prange(PARTS):
        for r in range(rows * part // PARTS, rows * (part + 1) // PARTS):  # an index into `dy` would not be vectorised
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


@compiled_in_parallel
def joined(convolved: Any, to_max: Array, to_mean: Array, to_point: Array, out: Array) -> None:
    """Write the eight branches of MSF-TCN side by side to `out` (B, T', V, 8, W).

    Five `convolved` (B, T', V, W), each with those before it added; maximum and mean over three frames, and every frame that the
    stride keeps, of the last three (B, T, V, W).
    """
    samples, steps, joints, _, width = out.shape
    frames = to_max.shape[1]
    stride = (frames + steps - 1) // steps
    y0, y1, y2, y3, y4 = convolved
    for n in prange(samples):
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


@compiled_in_parallel
def joined_gradients(dy: Array, to_max: Array, convolved: Any, dmax: Array, dmean: Array, dpoint: Array) -> None:
    """Write the gradients of `joined` to its arguments' likes: the first of equal values is the largest one."""
    samples, steps, joints, _, width = dy.shape
    frames = to_max.shape[1]
    stride = (frames + steps - 1) // steps
    d0, d1, d2, d3, d4 = convolved
    for n in prange(samples):
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
                for i in range(width):
                    d = dy[n, step, v, 4, i]
                    d4[n, step, v, i] = d
                    d += dy[n, step, v, 3, i]
                    d3[n, step, v, i] = d
                    d += dy[n, step, v, 2, i]
                    d2[n, step, v, i] = d
                    d += dy[n, step, v, 1, i]
                    d1[n, step, v, i] = d
                    d += dy[n, step, v, 0, i]
                    d0[n, step, v, i] = d
                    dpoint[n, t, v, i] = dy[n, step, v, 7, i]
                for i in range(width):
                    d = dy[n, step, v, 5, i]
                    a, b, c = to_max[n, low, v, i], to_max[n, t, v, i], to_max[n, high, v, i]
                    first = (a >= b) & (a >= c)
                    second = (b >= c) & (not first)
                    dmax[n, low, v, i] += d if first else dy.dtype.type(0)
                    dmax[n, t, v, i] += d if second else dy.dtype.type(0)
                    dmax[n, high, v, i] += dy.dtype.type(0) if first | second else d
                for i in range(width):
                    d = dy[n, step, v, 6, i] / dy.dtype.type(3)
                    dmean[n, t, v, i] += d
                    if low < t:
                        dmean[n, low, v, i] += d
                    if high > t:
                        dmean[n, high, v, i] += d


@compiled
def total(sums: Array, joined: Array) -> None:
    """The sum of `sums` (PARTS, K, P, C) over parts into `joined` (K, P, C) float64."""
    joined[:] = 0
    for part in range(len(sums)):
        for kind in range(sums.shape[1]):
            for p in range(sums.shape[2]):
                for c in range(sums.shape[3]):
                    joined[kind, p, c] += sums[part, kind, p, c]
