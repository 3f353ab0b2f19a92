"""What stands between the convolutions, for training on a CPU: batch-norm and all that follows it, compiled to few passes.

A step of FFN spends as long on passes over the features as on convolutions: a batch-norm, a sum and a ReLU, each an operator,
read and write them five times where twice is enough. Functions here compute the same as the modules do one by one, gradients
and running statistics included; elsewhere (on a GPU, under torch.compile, in evaluation) the modules are called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from ffn.model import loops
from ffn.model.persons import BatchNorm1d, BatchNorm2d

Array = NDArray[Any]
_MOST: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # made when numba starts
Norm = BatchNorm1d | BatchNorm2d
Term = tuple[Tensor, Norm]
"""Features (B, C, T, V) and their batch-norm: of C channels, or of V·C joints and channels."""


def normal(x: Tensor, norm: Norm) -> Tensor:
    """`x` (B, C, T, V) normalised by the module alone; a batch-norm of joints and channels sees them as one."""
    b, c, t, v = x.shape
    y: Tensor
    if isinstance(norm, BatchNorm2d):
        y = norm(x)
        return y
    y = norm(x.permute(0, 2, 3, 1).reshape(b * t, v * c))
    return y.view(b, t, v, c).permute(0, 3, 1, 2)


def normal_sum(*terms: Term, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    """ReLU of the sum of one or two normalised `terms` and of `residual`; all (B, C, T, V), channels last in memory."""
    (x, norm), *_ = terms
    if x.shape[2:] == (1, 1) or not fusable(x, norm.training):  # of one position there is nothing to save
        y = normal(*terms[0])
        for term in terms[1:]:
            y = y.add_(normal(*term))
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if relu else y
    summed: Callable[..., Tensor] = _NormalSum.apply
    parts = [part for x, norm in terms for part in (x, norm.weight, norm.bias)]
    return summed(tuple(norm for _, norm in terms), relu, residual, *parts)


def fusion(both: Tensor, y: Tensor, gate: Term, offset: Tensor, residual: Tensor | None) -> Tensor:
    """ReLU of X·M + Y·(1 - M), plus `residual`, of `both` = X + Y; M = sigmoid(normalised `gate` + `offset`).

    All are `fusable` (B, C, T, V), `offset` (B, C, 1, 1).
    """
    fused: Callable[..., Tensor] = _Fusion.apply
    of, norm = gate
    return fused(norm, residual, both, y, of, norm.weight, norm.bias, offset)


def shifted(x: Tensor, mask: Tensor, alpha: float, source: Tensor, target: Tensor, *, training: bool) -> Tensor:
    """(X[source] - alpha X) mask of frames: `x` (B, C, T, V), channels last; `mask`, `source` and its inverse `target` (V·C,)."""
    b, c, t, v = x.shape
    if fusable(x, training):
        shift: Callable[..., Tensor] = _Shift.apply
        return shift(x, mask, alpha, source, target)
    frames, mask = x.permute(0, 2, 3, 1).reshape(b * t, v * c), mask.to(x.dtype)
    if training:
        gathered: Callable[..., Tensor] = _GatheredShift.apply
        y = gathered(frames, mask, alpha, source, target)
    else:
        y = _difference(frames, alpha, source) * mask
    return y.view(b, t, v, c).permute(0, 3, 1, 2)


def branches(x: Tensor, norm: BatchNorm2d) -> tuple[Tensor, ...]:
    """Eight (B, C / 8, T, V) of `x` (B, C, T, V): seven normalised by `norm`, with ReLU, the last as it is; `fusable`."""
    split: Callable[..., tuple[Tensor, ...]] = _Branches.apply
    return split(norm, x, norm.weight, norm.bias)


def joined(convolved: Sequence[Tensor], to_max: Tensor, to_mean: Tensor, to_point: Tensor) -> Tensor:
    """The eight branches of MSF-TCN side by side, (B, W, T, V) each -> (B, 8 W, T / stride, V), on a CPU.

    Every one of the five `convolved`, which have the stride, with those before it added; the maximum and the mean, zeros beyond the
    ends included, of three frames; the last one's frames themselves.
    """
    together: Callable[..., Tensor] = _Joined.apply
    return together(to_max, to_mean, to_point, *convolved)


def frame_product(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix` (P, J) times every frame of `x` (F, J, C): (F, P, C); in training."""
    if not fusable(x, True):
        return torch.bmm(matrix.expand(len(x), *matrix.shape), x)
    product: Callable[..., Tensor] = _Product.apply
    return product(matrix, x)


def add_to_frames(x: Tensor, bias: Tensor) -> Tensor:
    """`bias` (V, C) added to every frame of `x` (B, C, T, V), in place; in training."""
    if not fusable(x, True):
        return x.add_(bias.T[:, None])
    add: Callable[..., Tensor] = _AddToFrames.apply
    return add(x, bias)


def fusable(x: Tensor, training: bool) -> bool:
    """Whether the loops can take `x`, features (B, C, T, V) or frames, in a module that is `training`."""
    return (
        training
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """A batch-norm's numbers for one batch. Arrays are (P, C), see `ffn.model.loops`."""

    mean: Array
    scale: Array
    """1 / standard deviation, float64."""
    weight: Array
    slope: Array
    level: Array
    """slope·x + level is normal."""
    count: float
    """Elements that a mean is taken of."""
    last: int
    times: int
    """Rows from `last` on count `times` times."""
    joint: bool

    def spread(self, period: int) -> tuple[Array, Array]:
        """Slope and level for rows that are told apart by `period`."""
        return _spread(self.slope, period), _spread(self.level, period)

    def terms(self, sums: Array) -> tuple[Array, Tensor, Tensor]:
        """From sums (2, P, C) of dz and of dz (x - mean): `terms` (3, P, C) of the gradient of x, gradients of weight and bias.

        dx = w s (dz - mean(dz) - x' mean(dz x')) with x' = s (x - mean).
        """
        dtype = self.slope.dtype
        if len(self.mean) == 1:
            sums = sums.sum(1, keepdims=True)
        dweight, dbias = (torch.from_numpy(part.astype(dtype).reshape(-1)) for part in (sums[1] * self.scale, sums[0]))
        if self.joint:
            distributed.all_reduce(torch.from_numpy(sums))
        of_dz = self.weight * self.scale
        of_x = of_dz * self.scale**2 * sums[1] / -self.count
        rest = -of_x * self.mean - of_dz * sums[0] / self.count
        return np.stack([of_dz, of_x, rest]).astype(dtype), dweight, dbias


def _statistics(norm: Norm, rows: Array) -> _Statistics:
    """Those of `rows` (R, C) or their first channels, as many as are the norm's, which go into its running statistics."""
    period = max(1, norm.num_features // rows.shape[1])
    pivot = rows[:period, : norm.num_features].astype(np.float64)
    last = len(rows) - len(rows) // norm.samples if norm.times > 1 else len(rows)
    first, second = _moments(rows, pivot)
    count = len(rows) / period
    if norm.times > 1:
        more = norm.times - 1
        first, second = (a + more * b for a, b in zip((first, second), _moments(rows[last:], pivot), strict=True))
        count += more * (len(rows) - last) / period
    said = np.stack([first + count * pivot, second + 2 * pivot * first + count * pivot**2, np.full_like(first, count)])
    if norm.joint:
        distributed.all_reduce(torch.from_numpy(said))
    count = float(said[2, 0, 0])
    mean = said[0] / count
    variance = np.maximum(said[1] / count - mean**2, 0)
    scale = 1 / np.sqrt(variance + norm.eps)
    weight, bias = (value.detach().view(period, -1).numpy() for value in (norm.weight, norm.bias))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        for running, now in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
            running.lerp_(torch.from_numpy(now.reshape(-1)).to(running.dtype), norm.momentum)
    slope = weight * scale
    return _Statistics(
        mean=mean,
        scale=scale,
        weight=weight,
        slope=slope.astype(rows.dtype),
        level=(bias - slope * mean).astype(rows.dtype),
        count=count,
        last=last,
        times=norm.times,
        joint=norm.joint,
    )


def _moments(rows: Array, pivot: Array) -> Array:
    """Sums (2, P, C) of rows - pivot and of its square, float64."""
    sums = np.empty((loops.PARTS, 2, *pivot.shape), rows.dtype)
    loops.moments(rows, pivot.astype(rows.dtype), sums)
    return _total(sums)


def _total(sums: Array) -> Array:
    """(PARTS, K, P, C) -> (K, P, C) float64."""
    total = np.empty(sums.shape[1:])
    loops.total(sums, total)
    return total


def _spread(values: Array, period: int) -> Array:
    """(..., P, C), P 1 or `period`, as (..., `period`, C)."""
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:-2], period, values.shape[-1])))


def _rows(x: Tensor) -> Array:
    """(B, C, T, V) as rows (B·T·V, C), which share the memory of features that are channels last."""
    rows: Array = x.detach().permute(0, 2, 3, 1).reshape(-1, x.shape[1]).numpy()
    return rows


def _samples(x: Tensor) -> Array:
    """(B, C, T, V) as (B, T·V, C)."""
    return _rows(x).reshape(len(x), -1, x.shape[1])


def _positions(x: Tensor) -> Array:
    """(B, C, T, V) as (B, T, V, C)."""
    b, c, t, v = x.shape
    return _rows(x).reshape(b, t, v, c)


def _frames(x: Tensor) -> Array:
    """(B, C, T, V) as frames (B·T, V·C)."""
    return _rows(x).reshape(-1, x.shape[3] * x.shape[1])


def _places(index: Tensor) -> Array:
    """`index` as numbers that count from no end: numba need not ask whether they are negative."""
    return index.numpy().view(np.uint64)


def _scalar(value: float, x: Tensor) -> Any:
    """`value` in the type of `x`."""
    return np.dtype(str(x.dtype).removeprefix("torch.")).type(value)


def _share() -> None:
    """As many threads for the loops as torch has, which numba, when it first starts, gives every core."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, _MOST))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _like(x: Tensor) -> Tensor:
    """Memory for features of the shape of `x`, channels last."""
    return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)


class _NormalSum(torch.autograd.Function):
    """`normal_sum`."""

    @staticmethod
    def forward(
        ctx: Any, norms: tuple[Norm, ...], relu: bool, residual: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor,
        x2: Tensor | None = None, *others: Tensor,
    ) -> Tensor:  # fmt: skip
        _share()
        features = [x] if x2 is None else [x, x2]
        rows = [_rows(part) for part in features]
        statistics = [_statistics(norm, part) for norm, part in zip(norms, rows, strict=True)]
        period = max(len(each.mean) for each in statistics)
        y = _like(x)
        given = [part for row, each in zip(rows, statistics, strict=True) for part in (row, *each.spread(period))]
        floor = _scalar(0 if relu else -np.inf, x)
        loops.normal_sum(*given, *(None,) * (6 - len(given)), None if residual is None else _rows(residual), floor, _rows(y))
        ctx.save_for_backward(*features, *([y] if relu else []))
        ctx.statistics, ctx.period, ctx.residual = statistics, period, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _share()
        statistics, period = ctx.statistics, ctx.period
        count = len(statistics)
        features, (y,) = ctx.saved_tensors[:count], ctx.saved_tensors[count:] or (None,)
        rows = [_rows(part) for part in features]
        dy = _rows(grads[0])
        y_rows = None if y is None else _rows(y)
        dtype = dy.dtype
        sums = np.empty((loops.PARTS, 1 + count, period, dy.shape[1]), dtype)
        means = [_spread(each.mean, period).astype(dtype) for each in statistics]
        given = [part for pair in zip(rows, means, strict=True) for part in pair]
        loops.normal_sum_moments(dy, y_rows, *given, *(None,) * (4 - len(given)), sums)
        total = _total(sums)
        found = [each.terms(total[[0, 1 + k]]) for k, each in enumerate(statistics)]
        made = [_like(part) for part in features]
        given = [
            part
            for row, (terms, _, _), dx in zip(rows, found, made, strict=True)
            for part in (row, _spread(terms, period), _rows(dx))
        ]
        dresidual = None
        if ctx.residual:
            dresidual = grads[0] if y is None else _like(grads[0])
        loops.normal_sum_gradients(
            dy, y_rows, *given, *(None,) * (6 - len(given)), None if dresidual is None or y is None else _rows(dresidual),
            statistics[0].last, dtype.type(statistics[0].times),
        )  # fmt: skip
        parts = [part for dx, (_, dweight, dbias) in zip(made, found, strict=True) for part in (dx, dweight, dbias)]
        return None, None, dresidual, *parts


class _Fusion(torch.autograd.Function):
    """`fusion`."""

    @staticmethod
    def forward(
        ctx: Any, norm: Norm, residual: Tensor | None, both: Tensor, y: Tensor,
        of: Tensor, weight: Tensor, bias: Tensor, offset: Tensor,
    ) -> Tensor:  # fmt: skip
        _share()
        statistics = _statistics(norm, _rows(of))
        m, z = _like(both), _like(both)
        loops.fusion(
            _samples(of), statistics.slope[0], statistics.level[0], offset.detach().flatten(1).numpy(), _samples(both), _samples(y),
            None if residual is None else _samples(residual), _samples(m), _samples(z),
        )  # fmt: skip
        ctx.save_for_backward(z, both, y, m, of)
        ctx.statistics, ctx.residual = statistics, residual is not None
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _share()
        statistics = ctx.statistics
        given = [_samples(part) for part in (grads[0], *ctx.saved_tensors)]
        samples, rows, channels = given[0].shape
        dtype = given[0].dtype
        sums = np.empty((samples, 2, 1, channels), dtype)
        loops.fusion_moments(*given, statistics.mean[0].astype(dtype), sums[:, :, 0])
        terms, dweight, dbias = statistics.terms(_total(sums))
        dboth, dy, dof = (_like(grads[0]) for _ in range(3))
        dresidual = _like(grads[0]) if ctx.residual else None
        loops.fusion_gradients(
            *given, terms[:, 0], _samples(dboth), _samples(dy), _samples(dof), None if dresidual is None else _samples(dresidual),
            statistics.last // rows, dtype.type(statistics.times),
        )  # fmt: skip
        doffset = torch.from_numpy(sums[:, 0, 0].copy()).view(samples, channels, 1, 1)
        return None, dresidual, dboth, dy, dof, dweight, dbias, doffset


class _Product(torch.autograd.Function):
    """`frame_product`: torch's is a product for every frame, and the gradient of the matrix the sum of as many."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        _share()
        matrix, x = matrix.contiguous(), x.contiguous()
        y = x.new_empty(len(x), len(matrix), x.shape[2])
        loops.product(matrix.detach().numpy(), x.detach().numpy(), y.numpy())
        ctx.save_for_backward(matrix, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        _share()
        matrix, x = ctx.saved_tensors
        dx, dmatrix = torch.empty_like(x), x.new_empty(loops.PARTS, *matrix.shape)
        loops.product_gradients(
            matrix.T.contiguous().numpy(), x.numpy(), grads[0].contiguous().numpy(), dx.numpy(), dmatrix.numpy()
        )
        return dmatrix.sum(0), dx


class _AddToFrames(torch.autograd.Function):
    """`add_to_frames`: for the bias a sum over whole frames, forty times as fast as autograd's over two of four axes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.add_(bias.T[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        b, c, t, v = grads[0].shape
        return grads[0], grads[0].permute(0, 2, 3, 1).reshape(b * t, v * c).sum(0).view(v, c)


class _Branches(torch.autograd.Function):
    """`branches`."""

    @staticmethod
    def forward(ctx: Any, norm: BatchNorm2d, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        _share()
        b, c, t, v = x.shape
        rows = _rows(x)
        statistics = _statistics(norm, rows)
        y = x.new_empty(8, len(rows), c // 8)
        loops.branches(rows, statistics.slope, statistics.level, y.numpy())
        ctx.save_for_backward(x, y)
        ctx.statistics = statistics
        return tuple(part.view(b, t, v, -1).permute(0, 3, 1, 2) for part in y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        _share()
        (x, y), statistics = ctx.saved_tensors, ctx.statistics
        dx = _like(x)
        rows, dz = _rows(x), _rows(dx)
        loops.branches_gradients(tuple(_rows(part) for part in grads), y.numpy(), dz)
        sums = np.empty((loops.PARTS, 2, *statistics.mean.shape), dz.dtype)
        loops.normal_sum_moments(dz, None, rows, statistics.mean.astype(dz.dtype), None, None, sums)
        terms, dweight, dbias = statistics.terms(_total(sums))
        loops.normal_sum_gradients(
            dz, None, rows, terms, dz, None, None, None, None, statistics.last, dz.dtype.type(statistics.times)
        )
        return None, dx, dweight, dbias


class _Joined(torch.autograd.Function):
    """`joined`."""

    @staticmethod
    def forward(ctx: Any, to_max: Tensor, to_mean: Tensor, to_point: Tensor, *convolved: Tensor) -> Tensor:
        _share()
        b, c, t, v = convolved[0].shape
        y = convolved[0].new_empty(b, t, v, 8, c)
        loops.joined(tuple(map(_positions, convolved)), *map(_positions, (to_max, to_mean, to_point)), y.numpy())
        ctx.save_for_backward(to_max)
        return y.view(b, t, v, 8 * c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        _share()
        (to_max,) = ctx.saved_tensors
        b, c, t, v = grads[0].shape
        made = [_like(to_max) for _ in range(3)]
        convolved = [torch.empty(b, t, v, c // 8, dtype=to_max.dtype).permute(0, 3, 1, 2) for _ in range(5)]
        loops.joined_gradients(
            _positions(grads[0]).reshape(b, t, v, 8, -1), _positions(to_max), tuple(map(_positions, convolved)),
            *map(_positions, made),
        )  # fmt: skip
        return *made, *convolved


class _Shift(torch.autograd.Function):
    """`shifted`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, alpha: float, source: Tensor, target: Tensor) -> Tensor:
        _share()
        y = _like(x)
        loops.shift(_frames(x), _places(source), mask.detach().numpy(), _scalar(alpha, x), _frames(y))
        ctx.save_for_backward(x, mask, source, target)
        ctx.alpha = alpha
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        _share()
        x, mask, source, target = ctx.saved_tensors
        dx = _like(x)
        moved, still = (torch.empty(loops.PARTS, len(mask), dtype=x.dtype) for _ in range(2))
        loops.shift_gradients(
            _frames(grads[0]), _frames(x), _places(target), mask.numpy(), mask[target].numpy(), _scalar(ctx.alpha, x), _frames(dx),
            moved.numpy(), still.numpy(),
        )  # fmt: skip
        return dx, moved.sum(0)[source] - ctx.alpha * still.sum(0), None, None, None


class _GatheredShift(torch.autograd.Function):
    """`shifted` of frames (F, V·C) in torch's operators, with a gather for the gradient of its gather.

    Autograd's own scatters, which is slow where it has to be reproducible; and every pass over the features that can be is in
    place here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, alpha: float, source: Tensor, target: Tensor) -> Tensor:
        difference = _difference(x, alpha, source)
        ctx.save_for_backward(difference, mask, target)
        ctx.alpha = alpha
        return difference * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        difference, mask, target = ctx.saved_tensors
        masked = grads[0] * mask
        return _difference(masked, ctx.alpha, target), (grads[0] * difference).sum(0), None, None, None


def _difference(x: Tensor, alpha: float, index: Tensor) -> Tensor:
    """(F, V·C) frames with their values rearranged by `index`, less alpha times the frames as they are."""
    return x.index_select(1, index).sub_(x, alpha=alpha)
