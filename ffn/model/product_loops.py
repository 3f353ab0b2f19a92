"""Compiled products with 1x1 convolutions' weights, together with what stands before and after them in a training step.

Each loop takes a few frames at a time through all that can be done to them: what it makes of the features stays in arrays of
its own, in the core's cache. Features are frames (F, V·C), sample after sample, and what belongs to a batch-norm is (V·C,); an
argument that is not there has no frames. `form` is (frames of a sample, joints, frames at a time). Parts are equal pieces of
samples, of which sums are made; up to `GROUPS` groups of parts share the gradients of weights. C is whole vectors, see
`ffn.model.tiles`.
"""

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from ffn.machine import compiled, compiled_in_parallel
from ffn.model.loops import add_frames, add_moments, add_powers, gradient_of_frames, piece, sum_of_frames
from ffn.model.tiles import ROWS, accumulate, add_dots, multiply, rows_times, write

Array = NDArray[Any]
GROUPS = 16
"""Of parts, at most: each has a sum of its own of the gradients of weights, which take as long to add up as they are many."""


@compiled
def room(frames: Any, joints: Any, channels: Any, of: Array) -> Array:
    """Rows (R, C) of some `frames`, and as many more as a tile may write too much, of the type of `of`."""
    return np.empty((frames * joints + ROWS, channels), of.dtype)


@compiled
def _copied(x: Array, at: Any, some: Any, out: Array) -> None:
    """Write `some` frames of `x` (F, V·C) from frame `at` on to `out`."""
    for f in range(some):
        for i in range(x.shape[1]):
            out[f, i] = x[at + f, i]


@compiled
def as_frames(rows: Array, frames: Any, joints: Any) -> Array:
    """Rows (R, C) as frames (frames, joints·C)."""
    return rows[: frames * joints].reshape(frames, joints * rows.shape[1])


@compiled
def folded(local: Array, part: Any, sums: Array) -> None:
    """Write `local` (1, K, 1, V·C) to sums[part] (K, P, C), those of all joints together where P is 1."""
    _, kinds, period, channels = sums.shape
    sums[part] = 0
    for k in range(kinds):
        for v in range(local.shape[3] // channels):
            p = v if period > 1 else 0
            for c in range(channels):
                sums[part, k, p, c] += local[0, k, 0, v * channels + c]


@compiled
def written(
    made: Array, bias: Array, some: Any, at: Any, begin: Any, end: Any, part: Any, local: Array, out: Array, sums: Array
) -> None:  # fmt: skip
    """Write `some` frames of `made`, plus `bias`, if it has any, to `out` from frame `at` on, with their `loops.moments`.

    `local` (1, 3, 1, V·C) holds the sums between the `begin` and the `end` of a part.
    """
    _, _, period, channels = sums.shape
    entries = local.shape[3]
    joints = entries // channels
    frames = as_frames(made, some, joints)
    if len(bias):
        for f in range(some):
            for i in range(entries):
                frames[f, i] += bias[i]
    if begin:
        for i in range(entries):
            local[0, 0, 0, i], local[0, 1, 0, i] = 0, 0
        for v in range(joints):
            of = v if period > 1 else 0
            for c in range(channels):
                local[0, 2, 0, v * channels + c] = frames[0, of * channels + c]
    add_powers(frames, 0, some, local, 0)
    write(frames, some, out, at)
    if end:
        pivot = local[0, 2, 0]
        folded(local[:, :2], part, sums[:, :2])
        for p in range(period):
            for c in range(channels):
                sums[part, 2, p, c] = pivot[p * channels + c]


@compiled_in_parallel
def normal_product(
    x: Array, affine: Array, x2: Array, affine2: Array, residual: Array, floor: Any, z: Array, panels: Array, diagonal: bool,
    bias: Array, form: Any, out: Array, sums: Array, pooled: Array,
) -> None:  # fmt: skip
    """Write the product of a `loops.normal_sum` of frames (F, V·C) with `panels`, plus `bias` (V·N,), to `out` (F, V·N).

    `affine` are slope and level (2 or more, V·C). The sum itself goes to `z` and its sums over the positions of a part to `pooled`
    (parts, C), if there are such; `sums` (parts, 3, P, N) become the `loops.moments` of `out`.
    """
    length, joints, span = form
    parts, _, _, outputs = sums.shape
    samples = len(x) // length
    groups = min(parts, GROUPS)
    channels = x.shape[1] // joints
    for group in prange(groups):
        of_sum, made = room(span, joints, channels, x), room(span, joints, outputs, x)
        sum_of, local = as_frames(of_sum, span, joints), np.empty((1, 3, 1, len(bias)), x.dtype)
        for part in range(parts * group // groups, parts * (group + 1) // groups):
            sample, first, last = piece(part, parts, samples, length)
            if len(pooled):
                pooled[part] = 0
            for frame in range(first, last, span):
                some, at = min(span, last - frame), sample * length + frame
                sum_of_frames(x, affine, x2, affine2, residual, floor, at, some, sum_of, 0)
                if len(z):
                    write(sum_of, some, z, at)
                if len(pooled):
                    for r in range(some * joints):
                        for c in range(channels):
                            pooled[part, c] += of_sum[r, c]
                multiply(of_sum, some * joints, panels, diagonal, made)
                written(made, bias, some, at, frame == first, frame + span >= last, part, local, out, sums)


@compiled_in_parallel
def normal_product_gradients(
    dout: Array, out: Array, terms: Array, last: int, times: Any, x: Array, affine: Array, x2: Array, affine2: Array, floor: Any,
    z: Array, panels: Array, diagonal: bool, form: Any, direct: Array, direct2: Array, dpooled: Array, dz: Array, sums: Array,
    dpanels: Array,
) -> None:  # fmt: skip
    """Write the gradient of the sum of `normal_product`, before its ReLU, to `dz`; `dout` is that of `out` normalised.

    `terms` (3, V·N) are those of `loops.normal_gradients`, `last` is the first frame that counts `times` times, `affine` are slope,
    level and mean (3, V·C), `panels` are of the transposed weights; `direct` and `direct2` are gradients of `z` from elsewhere,
    `dpooled` (B, C) that of the sum of a sample. There is a `z` where there are two terms or a residual. `sums` (parts, 2 or 3,
    P, C) are those of `loops.normal_sum_gradients`, `dpanels` (groups, P, K, W) sums over groups of parts.
    """
    length, joints, span = form
    parts = len(sums)
    samples = len(x) // length
    groups = len(dpanels)
    entries = x.shape[1]
    channels = entries // joints
    for group in prange(groups):
        of_out, of_sum = room(span, joints, terms.shape[1] // joints, x), room(span, joints, channels, x)
        made = room(span, joints, channels, x)
        out_of, sum_of, dsum = as_frames(of_out, span, joints), as_frames(of_sum, span, joints), as_frames(made, span, joints)
        local = np.empty((1, sums.shape[1], 1, entries), x.dtype)
        mean, mean2 = affine[2:], affine2[2:]
        first_part = parts * group // groups
        for part in range(first_part, parts * (group + 1) // groups):
            sample, first, end = piece(part, parts, samples, length)
            local[:] = 0
            for frame in range(first, end, span):
                some, at = min(span, end - frame), sample * length + frame
                often = times if at >= last else x.dtype.type(1)
                gradient_of_frames(dout, out, terms, often, at, some, out_of, 0)
                if len(z):
                    _copied(z, at, some, sum_of)
                else:
                    sum_of_frames(x, affine, x2, affine2, z, floor, at, some, sum_of, 0)
                accumulate(of_sum, of_out, some * joints, diagonal, group, part > first_part or frame > first, dpanels)
                multiply(of_out, some * joints, panels, diagonal, made)
                add_frames(direct, at, some, dsum, 0)
                add_frames(direct2, at, some, dsum, 0)
                if len(dpooled):
                    for r in range(some * joints):
                        for c in range(channels):
                            made[r, c] += dpooled[sample, c]
                for f in range(some):
                    for i in range(entries):
                        dsum[f, i] = dsum[f, i] if sum_of[f, i] > floor else x.dtype.type(0)
                add_moments(dsum, 0, x, at, some, mean, 1, local, 0)
                if len(x2):
                    add_moments(dsum, 0, x2, at, some, mean2, 2, local, 0)
                write(dsum, some, dz, at)
            folded(local, part, sums)


@compiled
def _of_frames(matrix: Array, x: Array, frames: Any, wide: Any, out: Array) -> None:
    """Write `matrix` (P, J) times every frame of `x` (frames·J, C) to `out` (frames·P, C), C a multiple of `wide`."""
    outputs, inputs = matrix.shape
    channels = x.shape[1]
    for f in range(frames):
        for c in range(0, channels, wide):
            at, to = f * inputs * channels + c, f * outputs * channels + c
            rows_times(matrix, 0, inputs, 1, outputs, x, at, channels, wide, out, to, channels, inputs, -1)


@compiled
def _shifted(x: Array, source: Array, alpha: Any, frames: Any, out: Array) -> None:
    """Write x[source] - alpha x of `frames` of `x` (F, V·C) to `out`, `source` being places in a frame."""
    for f in range(frames):
        for i in range(len(source)):
            out[f, i] = x[f, source[i]] - alpha * x[f, i]


@compiled_in_parallel
def graph_and_shift(
    x: Array, matrix: Array, panels: Array, bias: Array, source: Array, mask: Array, alpha: Any, panels2: Array, panels3: Array,
    form: Any, graph: Array, sums: Array, shift: Array, sums2: Array, residual: Array,
) -> None:  # fmt: skip
    """Write the graph convolution of frames `x` (F, V·C) to `graph` (F, V·N), the convolution of their shift to `shift`.

    And their product with `panels3` to `residual`, if it has frames.
    `matrix` (V·S, V) is the adjacency, by joint and subset, `panels` have S·C terms, `bias` is (V·N,), `source` and `mask`
    are (V·C,). `sums` and `sums2` become the `loops.moments`.
    """
    length, joints, span = form
    parts = len(sums)
    samples = len(x) // length
    groups = min(parts, GROUPS)
    channels, outputs = x.shape[1] // joints, sums.shape[3]
    subsets = len(matrix) // joints
    for group in prange(groups):
        own, moved, made = room(span, joints, channels, x), room(span, joints, channels, x), room(span, joints, outputs, x)
        by_joint = room(span, joints, subsets * channels, x)
        gathered = by_joint.reshape(-1, channels)
        own_frames, moved_frames = as_frames(own, span, joints), as_frames(moved, span, joints)
        local, local2 = np.empty((1, 3, 1, len(bias)), x.dtype), np.empty((1, 3, 1, len(bias)), x.dtype)
        for part in range(parts * group // groups, parts * (group + 1) // groups):
            sample, first, last = piece(part, parts, samples, length)
            for frame in range(first, last, span):
                some, at = min(span, last - frame), sample * length + frame
                begin, end = frame == first, frame + span >= last
                _copied(x, at, some, own_frames)
                _of_frames(matrix, own, some, min(panels2.shape[2], channels), gathered)
                multiply(by_joint, some * joints, panels, False, made)
                written(made, bias, some, at, begin, end, part, local, graph, sums)
                _shifted(own_frames, source, alpha, some, moved_frames)
                for f in range(some):
                    for i in range(len(mask)):
                        moved_frames[f, i] *= mask[i]
                multiply(moved, some * joints, panels2, False, made)
                written(made, bias[:0], some, at, begin, end, part, local2, shift, sums2)
                if len(residual):
                    multiply(own, some * joints, panels3, False, made)
                    write(as_frames(made, some, joints), some, residual, at)


@compiled_in_parallel
def graph_and_shift_gradients(
    dz: Array, graph: Array, terms: Array, shift: Array, terms2: Array, last: int, times: Any, x: Array, matrix: Array,
    transposed: Array, panels: Array, source: Array, target: Array, mask: Array, target_mask: Array, alpha: Any, panels2: Array,
    panels3: Array, direct: Array, form: Any, parts: int, dx: Array, dmatrix: Array, dpanels: Array, dpanels2: Array,
    dpanels3: Array, dbias: Array, dmask: Array,
) -> None:  # fmt: skip
    """Write the gradient of frames `x` (F, V·C) to `dx`; `dz` is that of `graph` and `shift`, both normalised, and of the residual.

    Without `panels3` the residual is `x` itself; `direct` is a gradient of `x` from elsewhere. `transposed` (V, V·S) and the panels
    are of the transposed weights, `target` undoes the source. `dmatrix` is of `tiles.dots`; it, those of the panels, `dbias`
    (groups, V·N) and `dmask` (groups, V·C) are sums over groups of parts.
    """
    length, joints, span = form
    samples = len(x) // length
    groups = len(dpanels)
    entries = x.shape[1]
    channels = entries // joints
    subsets = len(matrix) // joints
    wide = panels.shape[2]
    for group in prange(groups):
        own, of_shift, made = room(span, joints, channels, x), room(span, joints, channels, x), room(span, joints, channels, x)
        summed, dout = np.empty((span, entries), x.dtype), room(span, joints, terms.shape[1] // joints, x)
        by_joint, dby_joint = room(span, joints, subsets * channels, x), room(span, joints, subsets * channels, x)
        gathered, dgathered = by_joint.reshape(-1, channels), dby_joint.reshape(-1, channels)
        own_frames, made_frames = as_frames(own, span, joints), as_frames(made, span, joints)
        shift_frames, dout_frames = as_frames(of_shift, span, joints), as_frames(dout, span, joints)
        dbias[group], dmask[group] = 0, 0
        first_part = parts * group // groups
        for part in range(first_part, parts * (group + 1) // groups):
            sample, first, end = piece(part, parts, samples, length)
            for frame in range(first, end, span):
                some, at = min(span, end - frame), sample * length + frame
                often, again = times if at >= last else x.dtype.type(1), part > first_part or frame > first
                _copied(x, at, some, own_frames)
                gradient_of_frames(dz, graph, terms, often, at, some, dout_frames, 0)
                for f in range(some):
                    for i in range(dbias.shape[1]):
                        dbias[group, i] += dout_frames[f, i]
                _of_frames(matrix, own, some, wide, gathered)
                accumulate(by_joint, dout, some * joints, False, group, again, dpanels)
                multiply(dout, some * joints, panels, False, dby_joint)
                add_dots(dgathered, len(matrix), own, joints, some, group, dmatrix)
                _of_frames(transposed, dgathered, some, wide, made)
                _copied(made_frames, 0, some, summed)
                add_frames(direct, at, some, summed, 0)
                if len(panels3):
                    _copied(dz, at, some, dout_frames)
                    accumulate(own, dout, some * joints, False, group, again, dpanels3)
                    multiply(dout, some * joints, panels3, False, made)
                    add_frames(made_frames, 0, some, summed, 0)
                else:
                    add_frames(dz, at, some, summed, 0)
                gradient_of_frames(dz, shift, terms2, often, at, some, dout_frames, 0)
                multiply(dout, some * joints, panels2, False, made)
                _shifted(own_frames, source, alpha, some, shift_frames)
                for f in range(some):
                    for i in range(entries):
                        dmask[group, i] += made_frames[f, i] * shift_frames[f, i]
                        shift_frames[f, i] *= mask[i]
                accumulate(of_shift, dout, some * joints, False, group, again, dpanels2)
                for f in range(some):
                    for i in range(entries):
                        summed[f, i] += made_frames[f, target[i]] * target_mask[i] - alpha * made_frames[f, i] * mask[i]
                write(summed, some, dx, at)
