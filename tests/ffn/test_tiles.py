"""Products tile by tile are numpy's, whatever is left over at the edges."""

import numpy as np
import pytest
import torch

from ffn.model import tiles

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, tiles.ROWS // 2, tiles.ROWS // 2 + 1, tiles.ROWS, 2 * tiles.ROWS + 1])
@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_a_product_and_the_gradient_of_its_panels(dtype, rows, vectors):
    inputs, outputs = 2 * tiles.VECTOR // dtype().itemsize, vectors * tiles.VECTOR // dtype().itemsize
    a, b = (RNG.normal(size=(rows + tiles.ROWS, count)).astype(dtype) for count in (inputs, outputs))
    matrix = RNG.normal(size=(inputs, outputs)).astype(dtype)
    weights = torch.from_numpy(matrix.T.copy())
    panels = tiles.to_panels(weights.view(outputs, 2, -1))
    assert torch.equal(tiles.from_panels(torch.from_numpy(panels)), weights)
    assert np.array_equal(tiles.to_transposed(weights[:, None]), tiles.to_panels(weights.T[:, None]))
    made = np.full((rows + tiles.ROWS, outputs), np.nan, dtype)
    tiles.multiply(a, rows, panels, False, made)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == np.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(made[:rows], a[:rows] @ matrix, **tolerance)
    assert np.isnan(made[rows + tiles.ROWS // 2 :]).all(), "no more than half a tile is written too much"

    gradients = np.full((2, *panels.shape), np.nan, dtype)
    tiles.accumulate(a, b, rows, False, 1, False, gradients)
    tiles.accumulate(a, b, rows, False, 1, True, gradients)
    np.testing.assert_allclose(tiles.from_panels(torch.from_numpy(gradients[1])).T, 2 * a[:rows].T @ b[:rows], **tolerance)
    assert np.isnan(gradients[0]).all()


@pytest.mark.parametrize("size", [tiles.ROWS // 2, 8, 16, 24, 32, 64])
def test_a_product_with_blocks_of_a_diagonal(size):
    count = 8
    blocks = RNG.normal(size=(count, size, size)).astype(np.float32)
    matrix = np.zeros((count, size, count, size), np.float32)
    matrix[np.arange(count), :, np.arange(count)] = blocks
    matrix = matrix.reshape(count * size, -1)
    panels = tiles.to_diagonal(blocks)
    assert panels is not None
    assert panels.size == blocks.size
    assert np.array_equal(tiles.from_diagonal(panels), blocks)
    a, b = (RNG.normal(size=(5 + tiles.ROWS, count * size)).astype(np.float32) for _ in range(2))
    made = np.empty_like(a)
    tiles.multiply(a, 5, panels, True, made)
    np.testing.assert_allclose(made[:5], a[:5] @ matrix, rtol=1e-4, atol=1e-4)
    gradients = np.empty((1, *panels.shape), np.float32)
    tiles.accumulate(a, b, 5, True, 0, False, gradients)
    whole = (a[:5].T @ b[:5]).reshape(count, size, count, size)[np.arange(count), :, np.arange(count)]
    np.testing.assert_allclose(tiles.from_diagonal(gradients[0]), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "columns", "frames"), [(1, 1, 1), (51, 17, 3), (7, 12, 2)])
def test_products_of_the_rows_of_frames(rows, columns, frames, dtype):
    """More rows than there are may be read, whatever they are, but do not go into those that were asked for."""
    channels = 3 * tiles.VECTOR // dtype().itemsize
    a, b = (np.full((frames * count + tiles.ROWS, channels), np.nan, dtype) for count in (rows, columns))
    a[: frames * rows], b[: frames * columns] = (
        RNG.normal(size=(frames * rows, channels)),
        RNG.normal(size=(frames * columns, channels)),
    )
    out = tiles.dots(2, rows, columns, np.dtype(dtype))
    for _ in range(2):
        tiles.add_dots(a, rows, b, columns, frames, 1, out)
    left, right = a[: frames * rows].reshape(frames, rows, -1), b[: frames * columns].reshape(frames, columns, -1)
    expected = 2 * np.einsum("fpc,fjc->pj", left, right)
    np.testing.assert_allclose(out[1].sum(2)[:rows, :columns], expected, rtol=1e-4, atol=1e-3)
    assert not out[0].any()


@pytest.mark.parametrize("offset", [0, 1])
def test_writing_past_the_caches(offset):
    """Where the rows are whole vectors and where they are not, or do not begin at one."""
    for columns in (4 * tiles.VECTOR, 6):
        a = RNG.normal(size=(3, columns)).astype(np.float32)
        memory = np.zeros(5 * columns + tiles.VECTOR, np.float32)
        start = -memory.ctypes.data % tiles.VECTOR // 4 + offset
        out = memory[start : start + 5 * columns].reshape(5, columns)
        tiles.write(a, 3, out, 1)
        assert np.array_equal(out[1:4], a)
        assert not out[0].any()
        assert not out[4].any()
