"""Compiled loops over features on a CPU: batch-norms, their sums, and products with a graph, in as few passes as it can be.

Features are rows (R, C), R = B·T·V positions, sample after sample, frame after frame, joint after joint, and C channels; or
frames (F, V·C), the same numbers by the frame. What belongs to a batch-norm is (P, C) with a period P: row r takes entry r mod P,
so that P = 1 is a batch-norm of the channels and P = V one of joints and channels; or it is (V·C,), for the entries of a frame. An
argument that is not there has no frames. Sums are made in parts of whole frames, about `PARTS` of them, whoever computes which, so
that results do not depend on the number of threads. Numbers of all arguments are of one type, float32 or float64, but for sums over
all parts and what comes of them, which are float64.
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
    if numba.get_num_threads() != min(threads, _MOST):
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
def about_zero(sums: Array, samples: int, length: int, share: float, times: int, joined: Array) -> None:
    """Sums of x and of its square, and how many there are, into `joined` (3, P, C) float64, from those of `moments`.

    Of a frame there are `share`; the last of the `samples` stands for `times` as many.
    """
    joined[:] = 0
    for part in range(len(sums)):
        sample, begin, end = piece(part, len(sums), samples, length)
        count, often = (end - begin) * share, times if sample == samples - 1 else 1
        for p in range(joined.shape[1]):
            for c in range(joined.shape[2]):
                first, second = np.float64(sums[part, 0, p, c]), np.float64(sums[part, 1, p, c])
                pivot = np.float64(sums[part, 2, p, c])
                joined[0, p, c] += often * (first + count * pivot)
                joined[1, p, c] += often * (second + pivot * (2 * first + count * pivot))
                joined[2, p, c] += often * count


@compiled
def add_frames(x: Array, at: Any, some: Any, out: Array, to: Any) -> None:
    """Add `some` frames of `x` (F, V·C), if it has any, from frame `at` on to `out` from frame `to` on."""
    if len(x):
        for f in range(some):
            for i in range(x.shape[1]):
                out[to + f, i] += x[at + f, i]


@compiled
def sum_of_frames(
    x: Array, affine: Array, x2: Array, affine2: Array, residual: Array, floor: Any, at: Any, some: Any, out: Array, to: Any
) -> None:  # fmt: skip
    """Write `some` frames of a `normal_sum` from frame `at` on to `out` from frame `to` on."""
    entries = x.shape[1]
    least = x.dtype.type(-np.inf) if len(x2) or len(residual) else floor
    for f in range(some):
        for i in range(entries):
            y = x[at + f, i] * affine[0, i] + affine[1, i]
            out[to + f, i] = least if y < least else y
    if len(x2):
        for f in range(some):
            for i in range(entries):
                out[to + f, i] += x2[at + f, i] * affine2[0, i] + affine2[1, i]
    add_frames(residual, at, some, out, to)
    if least < floor:
        for f in range(some):
            for i in range(entries):
                out[to + f, i] = floor if out[to + f, i] < floor else out[to + f, i]


@compiled
def gradient_of_frames(dz: Array, x: Array, terms: Array, often: Any, at: Any, some: Any, out: Array, to: Any) -> None:
    """Write `some` frames of a `normal_gradients` from frame `at` on, which count `often`, to `out` from frame `to` on."""
    entries = terms.shape[1]
    for f in range(some):
        for i in range(entries):
            out[to + f, i] = terms[0, i] * dz[at + f, i] + often * (terms[1, i] * x[at + f, i] + terms[2, i])


@compiled_in_parallel
def normal_sum(x: Array, affine: Array, x2: Array, affine2: Array, residual: Array, floor: Any, out: Array) -> None:
    """Write slope·x + level of frames to `out` (F, V·C), at least `floor`; with the same of `x2`, and with `residual`.

    `affine` and `affine2` are slope and level (2 or more, V·C).
    """
    for part in prange(PARTS):
        for f in range(len(x) * part // PARTS, len(x) * (part + 1) // PARTS):
            sum_of_frames(x, affine, x2, affine2, residual, floor, f, 1, out, f)


@compiled_in_parallel
def normal_sum_gradients(dy: Array, y: Array, x: Array, affine: Array, x2: Array, affine2: Array, dz: Array, sums: Array) -> None:
    """Write the gradient of a sum before its ReLU, `dy` (F, V·C) where `y` is above zero, to `dz`.

    Where there is no ReLU `y` has no frames, and `dz` is `dy`. `affine` and `affine2` are slope, level and mean (3, V·C); sums of
    `dz`, of it times (x - mean), and where `x2` has frames of it times (x2 - mean2), go into `sums` (PARTS, 2 or 3, 1, V·C).
    """
    frames, entries = x.shape
    for part in prange(PARTS):
        sums[part] = 0
        first, last = frames * part // PARTS, frames * (part + 1) // PARTS
        for f in range(first, last, 4):
            some = min(4, last - f)
            if len(y):
                for g in range(f, f + some):
                    for i in range(entries):
                        dz[g, i] = dy[g, i] if y[g, i] > 0 else dy.dtype.type(0)
            add_moments(dz, f, x, f, some, affine[2:], 1, sums, part)
            if len(x2):
                add_moments(dz, f, x2, f, some, affine2[2:], 2, sums, part)


@compiled_in_parallel
def normal_gradients(dz: Array, x: Array, terms: Array, last: int, times: Any, dx: Array) -> None:
    """Write the gradient of frames `x`, terms[0]·dz + terms[1]·x + terms[2], to `dx` (F, V·C); `dz` is of x normalised.

    What does not come of `dz` counts `times` times from frame `last` on; `terms` are (3, V·C).
    """
    for part in prange(PARTS):
        for f in range(len(x) * part // PARTS, len(x) * (part + 1) // PARTS):
            gradient_of_frames(dz, x, terms, times if f >= last else x.dtype.type(1), f, 1, dx, f)


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
