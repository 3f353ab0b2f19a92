"""Compiled loops of MSF-TCN's eight branches, from the batch-norm at their beginning to where they lie side by side.

A sample at a time, small enough for a core's cache: what the branches make of it before they meet never comes to the memory. Frames
(F, V·C) hold the branches of a joint side by side, an eighth of the channels, W, each: five convolutions of three frames, dilated,
each with those before it added; the maximum and the mean of three frames; the frames as they are.

In a loop's own arrays frames of a sample lie by phase, those that leave the same rest when divided by the stride one after another,
so that what a tap takes does too; there are zeros in place of frames beyond the ends. See `ffn.model.loops`.
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
def _reach(taps: Any, dilations: Array, stride: Any) -> Any:
    """How many frames of a phase a convolution takes before and after the one that it stands at, at most."""
    return (taps // 2 * dilations[0] + stride - 1) // stride


@compiled
def _place(frame: Any, stride: Any, size: Any) -> Any:
    """Where a frame lies that is so many after one of phase 0, where phases have `size` frames."""
    return frame % stride * size + frame // stride


@compiled
def _convolved(
    x: Array, frame: Any, size: Any, some: Any, joints: Any, panels: Array, dilations: Array, stride: Any, out: Array
) -> None:  # fmt: skip
    """Write convolutions of `some` frames of `x` (R, C), from frame `frame` of phase 0 on, to the first rows of `out` (R, C).

    One after the other takes W channels and adds those before it, with `panels` (convolutions, taps, P, W, wide) of its weights.
    """
    channels = x.shape[1]
    count, taps, split, width, wide = panels.shape
    for j in range(count):
        for tap in range(taps):
            at = (frame + _place((tap - taps // 2) * dilations[j], stride, size)) * joints * channels + j * width
            for p in range(split):
                at_panel, into = ((j * taps + tap) * split + p) * width * wide, j * width + p * wide
                of = into if tap else into - width if j else -1
                rows_times(x, at, channels, 1, some * joints, panels, at_panel, wide, wide, out, into, channels, width, of)


@compiled
def _convolved_gradients(
    x: Array, phase: Any, some: Any, joints: Any, dy: Array, frame: Any, panels: Array, dilations: Array, stride: Any, out: Array,
    group: Any, dpanels: Array,
) -> None:  # fmt: skip
    """Write the gradient of `some` frames of a phase, whose rows are `x` (R, C), to `out` (R, C), and add to dpanels[group].

    `dy` (R, C) is that of the convolutions, each with those after it added; frame `frame` belongs to the first ones of all phases.
    `panels` are those of the transposed weights.
    """
    channels = x.shape[1]
    count, taps, split, width, wide = panels.shape
    size, dsize = width * wide, dpanels.shape[4] * wide
    out[:] = 0
    for j in range(count):
        for tap in range(taps):
            ahead = phase - (tap - taps // 2) * dilations[j]
            if ahead % stride == 0:
                at = (frame + ahead // stride) * joints * channels + j * width
                for p in range(split):
                    panel, into = (j * taps + tap) * split + p, j * width + p * wide
                    rows_times(
                        dy, at, channels, 1, some * joints, panels, panel * size, wide, wide, out, into, channels, width, into
                    )  # fmt: skip
                    into = (group * count * taps * split + panel) * dsize
                    rows_times(
                        x, j * width, 1, channels, width, dy, at + p * wide, channels, wide, dpanels, into, wide, some * joints,
                        into,
                    )  # fmt: skip


@compiled
def _entered(x: Array, affine: Array, floors: Array, at: Any, stride: Any, some: Any, out: Array, to: Any) -> None:
    """Write slope·x + level, at least `floors` (V·C,), of `some` frames of a phase from frame `at` on to `out`, from `to` on."""
    for f in range(some):
        for i in range(len(floors)):
            y = x[at + f * stride, i] * affine[0, i] + affine[1, i]
            out[to + f, i] = floors[i] if y < floors[i] else y


@compiled
def _pooled(x: Array, before: Any, at: Any, after: Any, joints: Any, out: Array, to: Any) -> None:
    """Write the last three branches of frame `at` of `x` (R, 8, W) to rows from `to` on of `out`, with those `before` and `after`.

    Beyond the ends are zeros: what is pooled is not below zero.
    """
    for v in range(joints):
        p, q, r, o = before * joints + v, at * joints + v, after * joints + v, to + v
        for i in range(x.shape[2]):
            a, b, c = x[p, 5, i], x[q, 5, i], x[r, 5, i]
            b = a if a > b else b
            out[o, 5, i] = c if c > b else b
            out[o, 6, i] = (x[p, 6, i] + x[q, 6, i] + x[r, 6, i]) / x.dtype.type(3)
            out[o, 7, i] = x[q, 7, i]


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
    around = _reach(panels.shape[1], dilations, stride)
    size = steps + 2 * around
    groups = min(samples, GROUPS)
    for group in prange(groups):
        entered, made = room(stride * size, joints, channels, x), room(span, joints, channels, x)
        frames, local = as_frames(entered, stride * size, joints), np.empty((1, 3, 1, len(bias)), x.dtype)
        by_branch, made_by_branch = entered.reshape(len(entered), 8, -1), made.reshape(len(made), 8, -1)
        entered[:] = 0
        for n in range(samples * group // groups, samples * (group + 1) // groups):
            for phase in range(stride):
                some = (length - phase + stride - 1) // stride
                _entered(x, affine, floors, n * length + phase, stride, some, frames, phase * size + around)
            for step in range(0, steps, span):
                some, frame = min(span, steps - step), step + around
                _convolved(entered, frame, size, some, joints, panels, dilations, stride, made)
                for f in range(frame, frame + some):
                    before, after = f + _place(-1, stride, size), f + _place(1, stride, size)
                    _pooled(by_branch, before, f, after, joints, made_by_branch, (f - frame) * joints)
                written(made, bias, some, n * steps + step, step == 0, step + span >= steps, n, local, out, sums)


@compiled
def _largest_gradients(dy: Array, stride: Any, steps: Any, around: Any, joints: Any, largest: Array, out: Array) -> None:
    """Write the gradient of the maxima of a sample, in `dy` (R, 8, W) from frame `around` on, to `out` (T + 2, V, W), a frame late.

    `largest` (T + 2, V, W) are what they are of, zeros beyond the ends; the first of equal values is the largest one.
    """
    out[:] = 0
    for step in range(steps):
        t = step * stride
        for v in range(joints):
            r = (around + step) * joints + v
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
    dy: Array, frame: Any, phase: Any, stride: Any, joints: Any, dlargest: Array, t: Any, out: Array, to: Any
) -> None:  # fmt: skip
    """Write the gradient of the last three branches of frame `t`, of this phase, to rows from `to` on of `out` (R, 8, W).

    Frame `frame` of `dy` (R, 8, W) belongs to the first frame of all phases; those of the mean are by frame of the three.
    """
    for v in range(joints):
        o = to + v
        for i in range(out.shape[2]):
            out[o, 5, i] = dlargest[t + 1, v, i]
            out[o, 6, i] = 0
            out[o, 7, i] = 0
    for delta in range(-1, 2):
        if (phase + delta) % stride == 0:
            row = (frame + (phase + delta) // stride) * joints
            for v in range(joints):
                r, o = row + v, to + v
                for i in range(out.shape[2]):
                    out[o, 6, i] += dy[r, 6, i]
                if delta == 0:
                    for i in range(out.shape[2]):
                        out[o, 7, i] = dy[r, 7, i]


@compiled_in_parallel
def branches_gradients(
    dz: Array, y: Array, terms: Array, last: int, times: Any, x: Array, affine: Array, floors: Array, panels: Array,
    dilations: Array, form: Any, stride: int, dx: Array, sums: Array, dpanels: Array,
) -> None:  # fmt: skip
    """Write the gradient of what enters `branches` to `dx`, that of normalised `x`; `dz` is that of its output `y` normalised.

    `terms` (3, V·C) are those of `loops.normal_gradients`, frames of `y` from `last` on count `times` times; `affine` are slope,
    level and mean (3, V·C), `panels` (5, 3, P, W, wide) of the transposed weights. Sums of `dx`, and of it times (x - mean), go
    into `sums` (B, 2, 1, C), sums over groups of samples into `dpanels` (groups, 5, 3, P, W or more, wide).
    """
    length, joints, span = form
    samples = len(sums)
    steps = len(y) // samples
    entries = x.shape[1]
    width = entries // joints // 8
    around = _reach(panels.shape[1], dilations, stride)
    groups = len(dpanels)
    x_by_branch = x.reshape(-1, joints, 8, width)
    slope, level = affine[0].reshape(joints, 8, width), affine[1].reshape(joints, 8, width)
    for group in prange(groups):
        dy = room(steps + 2 * around, joints, 8 * width, x)
        own, made = room(span, joints, 8 * width, x), room(span, joints, 8 * width, x)
        own_frames, made_frames = as_frames(own, span, joints), as_frames(made, span, joints)
        by_branch, made_by_branch = dy.reshape(-1, 8, width), made.reshape(-1, 8, width)
        largest, dlargest = np.zeros((length + 2, joints, width), x.dtype), np.empty((length + 2, joints, width), x.dtype)
        local = np.empty((1, 2, 1, entries), x.dtype)
        dy[:] = 0
        dpanels[group] = 0
        for n in range(samples * group // groups, samples * (group + 1) // groups):
            often = times if n * steps >= last else x.dtype.type(1)
            gradient_of_frames(dz, y, terms, often, n * steps, steps, as_frames(dy, steps + 2 * around, joints), around)
            for r in range(around * joints, (around + steps) * joints):
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
            _largest_gradients(by_branch, stride, steps, around, joints, largest, dlargest)
            local[:] = 0
            for phase in range(stride):
                count = (length - phase + stride - 1) // stride
                for step in range(0, count, span):
                    some, at = min(span, count - step), n * length + step * stride + phase
                    _entered(x, affine, floors, at, stride, some, own_frames, 0)
                    _convolved_gradients(
                        own, phase, some, joints, dy, step + around, panels, dilations, stride, made, group, dpanels
                    )
                    for f in range(some):
                        t = (step + f) * stride + phase
                        _pooled_gradients(
                            by_branch, step + f + around, phase, stride, joints, dlargest, t, made_by_branch, f * joints
                        )
                    for f in range(some):
                        for i in range(entries):
                            made_frames[f, i] = made_frames[f, i] if own_frames[f, i] > floors[i] else x.dtype.type(0)
                    together = some if stride == 1 else 1
                    for f in range(0, some, together):
                        add_moments(made_frames, f, x, at + f * stride, together, affine[2:], 1, local, 0)
                        write(made_frames[f : f + together], together, dx, at + f * stride)
            folded(local, n, sums)
