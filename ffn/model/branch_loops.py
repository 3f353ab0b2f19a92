"""Compiled loops of MSF-TCN's eight branches, from the batch-norm at their beginning to where they lie side by side.

A sample at a time, small enough for a core's cache: what the branches make of it before they meet never comes to the memory. Frames
(F, V·C) hold the branches of a joint side by side, an eighth of the channels, W, each: five convolutions of three frames, dilated,
each with those before it added; the maximum and the mean of three frames; the frames as they are. See `ffn.model.loops`.
"""

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from ffn.machine import compiled, compiled_in_parallel
from ffn.model.loops import add_moments, gradient_of_frames
from ffn.model.product_loops import GROUPS, as_frames, folded, room, written
from ffn.model.tiles import rows_times, write

Array = NDArray[Any]


@compiled
def _entered(x: Array, affine: Array, floors: Array, at: Any, some: Any, out: Array, to: Any) -> None:
    """Write slope·x + level, at least `floors` (V·C,), of `some` frames from frame `at` on to `out` from frame `to` on."""
    for f in range(some):
        for i in range(len(floors)):
            y = x[at + f, i] * affine[0, i] + affine[1, i]
            out[to + f, i] = floors[i] if y < floors[i] else y


@compiled
def _pooled(x: Array, at: Any, joints: Any, out: Array, to: Any) -> None:
    """Write the last three branches of a frame, whose rows begin at `at` in `x` (R, 8, W), to rows from `to` on of `out`.

    There are frames before and after it, zeros beyond the ends: what is pooled is not below zero.
    """
    for v in range(joints):
        before, r, after, o = at + v - joints, at + v, at + v + joints, to + v
        for i in range(x.shape[2]):
            a, b, c = x[before, 5, i], x[r, 5, i], x[after, 5, i]
            b = a if a > b else b
            out[o, 5, i] = c if c > b else b
            out[o, 6, i] = (x[before, 6, i] + x[r, 6, i] + x[after, 6, i]) / x.dtype.type(3)
            out[o, 7, i] = x[r, 7, i]


@compiled
def _convolved(x: Array, frame: Any, some: Any, joints: Any, panels: Array, dilations: Array, out: Array, to: Any) -> None:
    """Write the first five branches of `some` frames from frame `frame` of `x` (R, C) on to rows from `to` on of `out` (R, C)."""
    channels = x.shape[1]
    count, taps, split, width, wide = panels.shape
    for j in range(count):
        for tap in range(taps):
            at = (frame + (tap - 1) * dilations[j]) * joints * channels + j * width
            for p in range(split):
                at_panel, into = ((j * taps + tap) * split + p) * width * wide, to * channels + j * width + p * wide
                of = into if tap else into - width if j else -1  # the branch before, or nothing
                rows_times(
                    x, at, channels, 1, some * joints, panels, at_panel, wide, wide, out, into, channels, width, of
                )  # fmt: skip


@compiled_in_parallel
def branches(
    x: Array, affine: Array, floors: Array, panels: Array, dilations: Array, bias: Array, form: Any, stride: int, out: Array,
    sums: Array,
) -> None:  # fmt: skip
    """Write the branches of frames `x` (F, V·C) to `out` (F', V·C), F' after the stride, and their `loops.moments` to `sums`.

    `affine` and `floors` are slope and level (2 or more, V·C) and least value (V·C,) of what enters, `panels` (5, 3, P, W, wide)
    those of the convolutions' weights by frame, `bias` (V·C,) is added, `sums` (B, 3, 1, C).
    """
    length, joints, span = form
    samples = len(sums)
    steps = len(out) // samples
    channels = x.shape[1] // joints
    reach = dilations[0]
    groups = min(samples, GROUPS)
    for group in prange(groups):
        entered, made = room(length + 2 * reach, joints, channels, x), room(span, joints, channels, x)
        frames, local = as_frames(entered, length + 2 * reach, joints), np.empty((1, 3, 1, len(bias)), x.dtype)
        by_branch, made_by_branch = entered.reshape(len(entered), 8, -1), made.reshape(len(made), 8, -1)
        entered[: reach * joints] = 0
        entered[(reach + length) * joints :] = 0
        for n in range(samples * group // groups, samples * (group + 1) // groups):
            _entered(x, affine, floors, n * length, length, frames, reach)
            for step in range(0, steps, span):
                some = min(span, steps - step)
                together = some if stride == 1 else 1
                for f in range(0, some, together):  # in order: rows that a tile writes too much are the next frame's
                    frame = reach + (step + f) * stride
                    _convolved(entered, frame, together, joints, panels, dilations, made, f * joints)
                    for g in range(together):
                        _pooled(by_branch, (frame + g) * joints, joints, made_by_branch, (f + g) * joints)
                written(made, bias, some, n * steps + step, step == 0, step + span >= steps, n, local, out, sums)


@compiled
def _largest_gradients(dy: Array, stride: Any, steps: Any, reach: Any, joints: Any, largest: Array, out: Array) -> None:
    """Write the gradient of the maxima of a sample, in `dy` (R, 8, W) from frame `reach` on, to `out` (T + 2, V, W), a frame late.

    `largest` (T + 2, V, W) are what they are of, zeros beyond the ends; the first of equal values is the largest one.
    """
    out[:] = 0
    for step in range(steps):
        t = step * stride
        for v in range(joints):
            r = (reach + step) * joints + v
            for i in range(largest.shape[2]):
                d = dy[r, 5, i]
                a, b, c = largest[t, v, i], largest[t + 1, v, i], largest[t + 2, v, i]
                first = (a >= b) & (a >= c)
                second = (b >= c) & (not first)
                out[t, v, i] += d if first else dy.dtype.type(0)
                out[t + 1, v, i] += d if second else dy.dtype.type(0)
                out[t + 2, v, i] += dy.dtype.type(0) if first | second else d


@compiled
def _pooled_gradients(
    dy: Array, t: Any, stride: Any, reach: Any, joints: Any, dlargest: Array, out: Array, to: Any
) -> None:  # fmt: skip
    """Write the gradient of the last three branches of frame `t` to rows from `to` on of `out` (R, 8, W).

    `dy` are as `_largest_gradients` takes them, those of the mean by frame of the three.
    """
    for v in range(joints):
        o = to + v
        for i in range(out.shape[2]):
            out[o, 5, i] = dlargest[t + 1, v, i]
            out[o, 6, i] = 0
            out[o, 7, i] = 0
    for delta in range(-1, 2):
        if (t + delta) % stride == 0:
            row = ((t + delta) // stride + reach) * joints
            for v in range(joints):
                r, o = row + v, to + v
                for i in range(out.shape[2]):
                    out[o, 6, i] += dy[r, 6, i]
                if delta == 0:
                    for i in range(out.shape[2]):
                        out[o, 7, i] = dy[r, 7, i]


@compiled
def _convolved_gradients(
    x: Array, at: Any, some: Any, joints: Any, dy: Array, frame: Any, stride: Any, reach: Any, panels: Array, dilations: Array,
    out: Array, group: Any, dpanels: Array,
) -> None:  # fmt: skip
    """Write the gradient of `_convolved` of `some` frames from `frame` on to rows from `at` on of `out`, and add to dpanels[group].

    Rows from `at` on of `x` are what was convolved; `dy` as `_largest_gradients` takes it, but (R, C).
    """
    channels = x.shape[1]
    count, taps, split, width, wide = panels.shape
    size, dsize = width * wide, dpanels.shape[4] * wide
    out[at : at + some * joints] = 0
    for j in range(count):
        for tap in range(taps):
            source = frame - (tap - 1) * dilations[j]
            if source % stride == 0:
                from_x, from_dy = at * channels + j * width, (source // stride + reach) * joints * channels + j * width
                for p in range(split):
                    panel, into = (j * taps + tap) * split + p, from_x + p * wide
                    rows_times(
                        dy, from_dy, channels, 1, some * joints, panels, panel * size, wide, wide, out, into, channels, width, into
                    )  # fmt: skip
                    into = (group * count * taps * split + panel) * dsize
                    rows_times(
                        x, from_x, 1, channels, width, dy, from_dy + p * wide, channels, wide, dpanels, into, wide, some * joints,
                        into,
                    )  # fmt: skip


@compiled_in_parallel
def branches_gradients(
    dz: Array, y: Array, terms: Array, last: int, times: Any, x: Array, affine: Array, floors: Array, panels: Array,
    dilations: Array, form: Any, stride: int, dx: Array, sums: Array, dpanels: Array,
) -> None:  # fmt: skip
    """Write the gradient of what enters `branches` to `dx`, that of normalised `x`; `dz` is that of its output `y` normalised.

    `terms` (3, V·C) are those of `loops.normal_gradients`, of frames of `y` those from `last` on count `times` times; `affine` are
    slope, level and mean (3, V·C), `panels` (5, 3, P, W, wide) of the transposed weights. Sums of `dx`, and of it times (x - mean),
    go into `sums` (B, 2, 1, C), sums over groups of samples into `dpanels` (groups, 5, 3, P, W or more, wide).
    """
    length, joints, span = form
    samples = len(sums)
    steps = len(y) // samples
    entries = x.shape[1]
    channels = entries // joints
    width = channels // 8
    reach = dilations[0]
    groups = len(dpanels)
    x_by_branch = x.reshape(-1, joints, 8, width)
    slope, level = affine[0].reshape(joints, 8, width), affine[1].reshape(joints, 8, width)
    for group in prange(groups):
        dy = room(steps + 2 * reach, joints, channels, x)
        own, made = room(span, joints, channels, x), room(span, joints, channels, x)
        own_frames, made_frames = as_frames(own, span, joints), as_frames(made, span, joints)
        by_branch, made_by_branch = dy.reshape(-1, 8, width), made.reshape(-1, 8, width)
        largest, dlargest = np.zeros((length + 2, joints, width), x.dtype), np.empty((length + 2, joints, width), x.dtype)
        local = np.empty((1, 2, 1, entries), x.dtype)
        dy[: reach * joints] = 0
        dy[(reach + steps) * joints :] = 0
        dpanels[group] = 0
        for n in range(samples * group // groups, samples * (group + 1) // groups):
            often = times if n * steps >= last else x.dtype.type(1)
            gradient_of_frames(dz, y, terms, often, n * steps, steps, as_frames(dy, steps + 2 * reach, joints), reach)
            for r in range(reach * joints, (reach + steps) * joints):
                for i in range(width):
                    d = by_branch[r, 4, i]
                    for j in range(3, -1, -1):
                        d += by_branch[r, j, i]
                        by_branch[r, j, i] = d
                    by_branch[r, 6, i] /= x.dtype.type(3)
            for t in range(length):
                for v in range(joints):
                    for i in range(width):
                        z = x_by_branch[n * length + t, v, 5, i] * slope[v, 5, i] + level[v, 5, i]
                        largest[t + 1, v, i] = x.dtype.type(0) if z < 0 else z
            _largest_gradients(by_branch, stride, steps, reach, joints, largest, dlargest)
            local[:] = 0
            for frame in range(0, length, span):
                some, at = min(span, length - frame), n * length + frame
                together = some if stride == 1 else 1
                _entered(x, affine, floors, at, some, own_frames, 0)
                for f in range(0, some, together):  # in order, see `branches`
                    _convolved_gradients(
                        own, f * joints, together, joints, dy, frame + f, stride, reach, panels, dilations, made, group, dpanels
                    )
                    for g in range(f, f + together):
                        _pooled_gradients(by_branch, frame + g, stride, reach, joints, dlargest, made_by_branch, g * joints)
                for f in range(some):
                    for i in range(entries):
                        made_frames[f, i] = made_frames[f, i] if own_frames[f, i] > floors[i] else x.dtype.type(0)
                add_moments(made_frames, 0, x, at, some, affine[2:], 1, local, 0)
                write(made_frames, some, dx, at)
            folded(local, n, sums)
