"""Compiled loops of attentional feature fusion. See `ffn.model.loops`."""

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from ffn.machine import compiled, compiled_in_parallel
from ffn.model.loops import add_moments

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
