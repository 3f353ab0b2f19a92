"""Products of matrices within compiled loops, piece by piece, so that what is made is worked on while a cache still holds it.

A library's product reads its factors from memory and writes the result there; the pass before and the pass after it read and
write both again. `multiply` and `accumulate` are called by a loop for a few frames at a time, on arrays of its own that stay in its
core's cache. They go tile by tile: sums of up to `ROWS` rows and two vectors of columns stay in registers over all terms.

The right factor is in panels (P, K, W): P times W columns, of K terms each. Rows of the left one and of the product are whole
vectors.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from ffn.machine import compiled, wide_vectors

Array = NDArray[Any]
_WIDE = wide_vectors()
VECTOR = 64 if _WIDE else 32
"""Bytes of a vector."""
ROWS = 8 if _WIDE else 4
"""Of a tile: with two vectors each, what the registers hold beside a row of the right factor."""
DOTS = (3, 6) if _WIDE else (3, 3)
"""Rows and columns of a tile of dot products."""
SIZES = 2 * VECTOR, VECTOR, VECTOR // 2, VECTOR // 4, VECTOR // 8
"""Bytes that a row of a panel may have."""


def width(columns: int, itemsize: int) -> int:
    """Columns of a panel, for a matrix of `columns` numbers of `itemsize` bytes: two vectors', one, or a half, quarter or eighth.

    Columns are a multiple of the last.
    """
    return next(size // itemsize for size in SIZES if columns * itemsize % size == 0)


def _tile(rows: int, vectors: int, size: int = VECTOR) -> Callable[..., None]:
    """The product of one tile: see `_tile.tile`."""

    def tile(
        typing: Any, a: Any, at_a: Any, a_row: Any, a_term: Any, b: Any, at_b: Any, b_term: Any, out: Any, at_out: Any,
        out_row: Any, terms: Any, at_sum: Any,
    ) -> Any:  # fmt: skip
        """Sums over `terms` of a[at_a + i a_row + k a_term] b[at_b + k b_term + j], put to out[at_out + i out_row + j].

        With out[at_sum + i out_row + j] in the sum, if `at_sum` is not below zero. Arrays are flat, whatever their shape; places
        count elements.
        """
        place = types.intp
        signature = types.void(a, place, place, place, b, place, place, out, place, place, place, place)
        return signature, _code(rows, vectors, size)

    made: Callable[..., None] = intrinsic(tile)
    return made


def _start(context: Any, builder: Any, signature: Any, arguments: Any, index: int, at: Any) -> Any:
    """Where the number `at` of an array lies, an argument."""
    array = context.make_array(signature.args[index])(context, builder, arguments[index])
    return builder.gep(array.data, [at])


def _multiplied_and_added(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def _code(rows: int, vectors: int, size: int) -> Callable[..., Any]:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, at_a, a_row, a_term, _, at_b, b_term, _, at_out, out_row, terms, at_sum = arguments
        number = context.get_data_type(signature.args[0].dtype)
        itemsize = signature.args[0].dtype.bitwidth // 8
        lanes = max(1, size // itemsize)  # none is so narrow that it would be less
        vector, place, of_lanes = ir.VectorType(number, lanes), at_a.type, ir.VectorType(ir.IntType(32), lanes)
        zero, unknown = ir.Constant(vector, None), ir.Constant(vector, ir.Undefined)

        def start(index: int, at: Any) -> Any:
            return _start(context, builder, signature, arguments, index, at)

        def vector_at(start: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(start, [offset]), vector.as_pointer())

        def places(start: Any) -> list[Any]:
            return [
                vector_at(start, builder.add(builder.mul(out_row, place(i)), place(j * lanes)))
                for i in range(rows)
                for j in range(vectors)
            ]

        from_a, from_b, into = start(0, at_a), start(4, at_b), start(7, at_out)
        offsets = [builder.mul(a_row, place(i)) for i in range(rows)]
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)

        builder.position_at_end(loop)
        term, row_a, row_b = (builder.phi(kind) for kind in (place, from_a.type, from_b.type))
        sums = [builder.phi(vector) for _ in range(rows * vectors)]
        right = [builder.load(vector_at(row_b, place(j * lanes)), align=itemsize) for j in range(vectors)]
        made = []
        for i in range(rows):
            first = builder.insert_element(unknown, builder.load(builder.gep(row_a, [offsets[i]])), ir.IntType(32)(0))
            left = builder.shuffle_vector(first, unknown, ir.Constant(of_lanes, None))
            made += [_multiplied_and_added(builder, left, right[j], sums[i * vectors + j]) for j in range(vectors)]
        following = builder.add(term, place(1))
        for phi, first, then in (
            (term, place(0), following),
            (row_a, from_a, builder.gep(row_a, [a_term])),
            (row_b, from_b, builder.gep(row_b, [b_term])),
            *((each, zero, value) for each, value in zip(sums, made, strict=True)),
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", following, terms), loop, after)

        builder.position_at_end(after)
        out = places(into)
        with builder.if_else(builder.icmp_signed("<", at_sum, place(0))) as (put, added):
            with put:
                for at, value in zip(out, made, strict=True):
                    builder.store(value, at, align=itemsize)
            with added:
                for at, of, value in zip(out, places(start(7, at_sum)), made, strict=True):
                    builder.store(builder.fadd(builder.load(of, align=itemsize), value), at, align=itemsize)
        return context.get_dummy_value()

    return code


_double, _single, _half, _quarter, _eighth = _tile(ROWS, 2), *(_tile(ROWS, 1, size) for size in SIZES[1:])
_low_double, _low_single, _low_half, _low_quarter, _low_eighth = (
    _tile(ROWS // 2, 2), *(_tile(ROWS // 2, 1, size) for size in SIZES[1:]),
)  # fmt: skip


def _dots_of(
    typing: Any, a: Any, at_a: Any, a_row: Any, a_frame: Any, b: Any, at_b: Any, b_row: Any, b_frame: Any, out: Any, at_out: Any,
    out_row: Any, vectors: Any, frames: Any,
) -> Any:  # fmt: skip
    """Add products of `DOTS` rows of `a` and of `b`, so many `vectors` long, to vectors from out[at_out] on, lane by lane.

    Over `frames`, which begin `a_frame` and `b_frame` numbers after one another.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, at_a, a_row, a_frame, _, at_b, b_row, b_frame, _, at_out, out_row, vectors, frames = arguments
        number = context.get_data_type(signature.args[0].dtype)
        itemsize = signature.args[0].dtype.bitwidth // 8
        lanes = VECTOR // itemsize
        vector, place = ir.VectorType(number, lanes), at_a.type
        rows, columns = DOTS

        def loaded(start: Any, offset: Any) -> Any:
            return builder.load(builder.bitcast(builder.gep(start, [offset]), vector.as_pointer()), align=itemsize)

        starts = [_start(context, builder, signature, arguments, index, at) for index, at in ((0, at_a), (4, at_b), (8, at_out))]
        before, frame, loop, following, after = builder.block, *(builder.append_basic_block() for _ in range(4))
        builder.branch(frame)

        builder.position_at_end(frame)
        number_of, frame_a, frame_b = (builder.phi(kind) for kind in (place, starts[0].type, starts[1].type))
        so_far = [builder.phi(vector) for _ in range(rows * columns)]
        builder.branch(loop)

        builder.position_at_end(loop)
        term, row_a, row_b = (builder.phi(kind) for kind in (place, frame_a.type, frame_b.type))
        sums = [builder.phi(vector) for _ in so_far]
        left = [loaded(row_a, builder.mul(a_row, place(i))) for i in range(rows)]
        right = [loaded(row_b, builder.mul(b_row, place(j))) for j in range(columns)]
        made = [
            _multiplied_and_added(builder, left[i], right[j], sums[i * columns + j]) for i in range(rows) for j in range(columns)
        ]
        next_term, next_a, next_b = (
            builder.add(term, place(1)),
            builder.gep(row_a, [place(lanes)]),
            builder.gep(row_b, [place(lanes)]),
        )
        builder.cbranch(builder.icmp_signed("<", next_term, vectors), loop, following)
        inner = (
            (term, place(0), next_term),
            (row_a, frame_a, next_a),
            (row_b, frame_b, next_b),
            *zip(sums, so_far, made, strict=True),
        )
        for phi, first, then in inner:
            phi.add_incoming(first, frame)
            phi.add_incoming(then, loop)

        builder.position_at_end(following)
        next_frame = builder.add(number_of, place(1))
        outer = (
            (number_of, place(0), next_frame),
            (frame_a, starts[0], builder.gep(frame_a, [a_frame])),
            (frame_b, starts[1], builder.gep(frame_b, [b_frame])),
            *((each, ir.Constant(vector, None), value) for each, value in zip(so_far, made, strict=True)),
        )
        builder.cbranch(builder.icmp_signed("<", next_frame, frames), frame, after)
        for phi, first, then in outer:
            phi.add_incoming(first, before)
            phi.add_incoming(then, following)

        builder.position_at_end(after)
        for i in range(rows):
            for j in range(columns):
                offset = builder.add(builder.mul(out_row, place(i)), place(j * lanes))
                at = builder.bitcast(builder.gep(starts[2], [offset]), vector.as_pointer())
                builder.store(builder.fadd(builder.load(at, align=itemsize), made[i * columns + j]), at, align=itemsize)
        return context.get_dummy_value()

    place = types.intp
    return types.void(a, place, place, place, b, place, place, place, out, place, place, place, place), code


def _stream_of(typing: Any, a: Any, at_a: Any, out: Any, at_out: Any) -> Any:
    """Write the vector at a[at_a] to out[at_out], which is aligned to vectors, past the caches."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_data_type(signature.args[0].dtype)
        itemsize = signature.args[0].dtype.bitwidth // 8
        vector = ir.VectorType(number, VECTOR // itemsize).as_pointer()
        starts = [
            builder.bitcast(_start(context, builder, signature, arguments, index, arguments[index + 1]), vector) for index in (0, 2)
        ]
        stored = builder.store(builder.load(starts[0], align=itemsize), starts[1], align=VECTOR)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(a, types.intp, out, types.intp), code


def _fence_of(typing: Any) -> Any:
    """Others see what was written before."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


_dots: Callable[..., None] = intrinsic(_dots_of)
_stream: Callable[..., None] = intrinsic(_stream_of)
_fence: Callable[..., None] = intrinsic(_fence_of)


@compiled
def write(a: Array, rows: Any, out: Array, at: Any) -> None:
    """Write the first `rows` of `a` to `out`, of as many columns, from row `at` on.

    Past the caches where it can be, which saves reading what is written over: features are larger than caches.
    """
    lanes, columns = VECTOR // a.itemsize, a.shape[1]
    if columns % lanes == 0 and out.ctypes.data % VECTOR == 0:
        for i in range(0, rows * columns, lanes):
            _stream(a, i, out, at * columns + i)
        _fence()
    else:
        for r in range(rows):
            for c in range(columns):
                out[at + r, c] = a[r, c]


@compiled
def rows_times(
    a: Array, at_a: Any, a_row: Any, a_term: Any, rows: Any, b: Array, at_b: Any, b_term: Any, wide: Any, out: Array, at_out: Any,
    out_row: Any, terms: Any, at_sum: Any,
) -> None:  # fmt: skip
    """One panel, `wide` columns of `b`, times any number of `rows`: up to half a tile of rows too many are read and written."""
    size = wide * a.itemsize
    for r in range(0, rows, ROWS):
        at, to = at_a + r * a_row, at_out + r * out_row
        of = at_sum + r * out_row if at_sum >= 0 else at_sum
        if rows - r > ROWS // 2:
            if size == 2 * VECTOR:
                _double(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
            elif size == VECTOR:
                _single(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
            elif size == VECTOR // 2:
                _half(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
            elif size == VECTOR // 4:
                _quarter(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
            else:
                _eighth(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
        elif size == 2 * VECTOR:
            _low_double(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
        elif size == VECTOR:
            _low_single(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
        elif size == VECTOR // 2:
            _low_half(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
        elif size == VECTOR // 4:
            _low_quarter(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)
        else:
            _low_eighth(a, at, a_row, a_term, b, at_b, b_term, out, to, out_row, terms, of)


@compiled
def multiply(a: Array, rows: Any, panels: Array, diagonal: Any, out: Array) -> None:
    """Write the first `rows` of `a` (R, A) times `panels` (P, K, W) to `out` (R, P·W), with room for up to `ROWS` more.

    `diagonal`: of blocks of K terms and columns, see `to_diagonal`.
    """
    count, terms, wide = panels.shape
    for p in range(count):
        at = p * wide // terms * terms if diagonal else 0
        rows_times(a, at, a.shape[1], 1, rows, panels, p * terms * wide, wide, wide, out, p * wide, out.shape[1], terms, -1)


@compiled
def accumulate(a: Array, b: Array, rows: Any, diagonal: Any, which: Any, add: Any, panels: Array) -> None:
    """Put the transpose of the first `rows` of `a` (R, A) times those of `b` (R, P·W) into panels[which], of (G, P, K, W).

    Or `add` it. This is the gradient of the panels of `multiply`; K is a multiple of half of `ROWS`.
    """
    _, count, terms, wide = panels.shape
    for p in range(count):
        at, to = p * wide // terms * terms if diagonal else 0, (which * count + p) * terms * wide
        rows_times(a, at, 1, a.shape[1], terms, b, p * wide, b.shape[1], wide, panels, to, wide, rows, to if add else -1)


@compiled
def add_dots(a: Array, rows: Any, b: Array, columns: Any, frames: Any, which: Any, out: Array) -> None:
    """Add products over channels of the `rows` of each frame of `a` (R, C) with the `columns` rows of that of `b` (R, C).

    They go to out[which] of (G, rows, columns, lanes), see `dots`, lane by lane: sums over the last axis are the products. Up to a
    tile of rows too many are read.
    """
    _, height, across, lanes = out.shape
    channels = a.shape[1]
    for p in range(0, rows, DOTS[0]):
        for j in range(0, columns, DOTS[1]):
            _dots(
                a, p * channels, channels, rows * channels, b, j * channels, channels, columns * channels, out,
                ((which * height + p) * across + j) * lanes, across * lanes, channels // lanes, frames,
            )  # fmt: skip


def dots(groups: int, rows: int, columns: int, dtype: Any) -> Array:
    """Zeros for `add_dots`: whole tiles of lanes."""
    return np.zeros((groups, rows + -rows % DOTS[0], columns + -columns % DOTS[1], VECTOR // dtype.itemsize), dtype)


def in_panels(matrices: Tensor, batch: int) -> Array:
    """Matrices (B..., K..., N), of terms K and N columns, with `batch` axes before them, as (B..., P, K..., W)."""
    wide = width(matrices.shape[-1], matrices.element_size())
    made: Array = matrices.view(*matrices.shape[:-1], -1, wide).movedim(-2, batch).contiguous().numpy()
    return made


def to_panels(weights: Tensor) -> Array:
    """Weights (N, S, C), of N columns and S·C terms, as panels."""
    made = in_panels(weights.permute(1, 2, 0), 0)
    return made.reshape(len(made), -1, made.shape[-1])


def to_transposed(weights: Tensor) -> Array:
    """Weights (N, S, C) the other way round, of S·C columns and N terms, as panels."""
    made = in_panels(weights.transpose(0, 1), 1)
    return made.reshape(-1, *made.shape[2:])


def from_panels(panels: Tensor) -> Tensor:
    """Transposed matrices (..., N, K) of panels (..., P, K, W): as weights lie."""
    return panels.transpose(-1, -2).flatten(-3, -2)


def to_diagonal(blocks: Array) -> Array | None:
    """`blocks` (G, K, K) of a diagonal as panels (G·P, K, W), for `multiply` with `diagonal`; None where they do not fit."""
    size, itemsize = blocks.shape[1], blocks.itemsize
    if size % (ROWS // 2) or size * itemsize % SIZES[-1]:
        return None
    made = in_panels(torch.from_numpy(blocks), 1)
    return made.reshape(-1, *made.shape[2:])


def from_diagonal(panels: Array) -> Array:
    """The blocks (G, K, K) of `to_diagonal`."""
    _, size, wide = panels.shape
    blocks: Array = from_panels(torch.from_numpy(panels).view(-1, size // wide, size, wide)).transpose(1, 2).numpy()
    return blocks
