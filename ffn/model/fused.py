"""Training on a CPU: what stands between the convolutions, compiled to few passes.

A step of FFN spends as long on passes over the features as on convolutions: a batch-norm, a sum and a ReLU, each an operator,
read and write them five times where twice is enough, or not at all where a product takes them (`ffn.model.products`). Functions
here compute the same as the modules do one by one, gradients and running statistics included; elsewhere (on a GPU, under
torch.compile, in evaluation) the modules are called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffn.model import branch_loops, fusion_loops, loops, tiles
from ffn.model.loops import share_threads
from ffn.model.persons import BatchNorm2d
from ffn.model.product_loops import GROUPS
from ffn.model.products import Sum, form
from ffn.model.statistics import Norm, Normal, Statistics, frames, leave, like, normalised, of_sums, rows, total
from ffn.model.tiles import ROWS

Array = NDArray[Any]
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
    return Sum(tuple(normalised(x, norm) for x, norm in terms), residual, relu).total()


def fusion(both: Tensor, y: Tensor, gate: Normal, offset: Tensor, residual: Tensor | None) -> Tensor:
    """ReLU of X·M + Y·(1 - M), plus `residual`, of `both` = X + Y; M = sigmoid(normalised `gate` + `offset`).

    All are `fusable` (B, C, T, V), `offset` (B, C, 1, 1).
    """
    share_threads()
    fused: Callable[..., Tensor] = _Fusion.apply
    return fused(gate.statistics, residual, both, y, gate.x, offset)


def shifted(x: Tensor, mask: Tensor, alpha: float, source: Tensor, target: Tensor, *, training: bool) -> Tensor:
    """(X[source] - alpha X) mask of frames: `x` (B, C, T, V), channels last; `mask`, `source` and its inverse `target` (V·C,).

    In training its gradient is a gather too: autograd's own scatters, which is slow where it has to be reproducible; and every
    pass over the features that can be is in place.
    """
    b, c, t, v = x.shape
    frames, mask = x.permute(0, 2, 3, 1).reshape(b * t, v * c), mask.to(x.dtype)
    if training:
        gathered: Callable[..., Tensor] = _GatheredShift.apply
        y = gathered(frames, mask, alpha, source, target)
    else:
        y = _difference(frames, alpha, source) * mask
    return y.view(b, t, v, c).permute(0, 3, 1, 2)


def branches(x: Normal, weights: Tensor, bias: Tensor, norm: BatchNorm2d, *, dilations: Sequence[int], stride: int) -> Normal:
    """The eight branches of MSF-TCN side by side, of what enters them, (B, 8 W, T, V) -> (B, 8 W, T / stride, V); on a CPU.

    `x` is normalised, but for the last eighth, with a ReLU. Five convolutions of three frames with `weights` (5, W, W, 3, 1) and
    `bias` (5, W), each with those before it added; the maximum and the mean, zeros beyond the ends included, of three frames; the
    last one's frames themselves. `norm` is the batch-norm of the result. There is no gradient for `bias`, see `NormedConv2d`.
    """
    share_threads()
    made: Callable[..., Tensor] = _Branches.apply
    found: list[Statistics] = []
    y = made(x.statistics, norm, found, np.array(dilations), stride, x.x, weights, bias, norm.weight, norm.bias)
    return Normal(y, found[0])


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


def _samples(x: Tensor) -> Array:
    """(B, C, T, V) as (B, T·V, C)."""
    return rows(x).reshape(len(x), -1, x.shape[1])


class _Fusion(torch.autograd.Function):
    """`fusion`."""

    @staticmethod
    def forward(
        ctx: Any, statistics: Statistics, residual: Tensor | None, both: Tensor, y: Tensor, of: Tensor, offset: Tensor
    ) -> Tensor:
        m, z = like(both), like(both)
        fusion_loops.fusion(
            _samples(of), *statistics.frame[:2, 0], offset.detach().flatten(1).numpy(), _samples(both), _samples(y),
            _samples(both)[:0] if residual is None else _samples(residual), _samples(m), _samples(z),
        )  # fmt: skip
        ctx.save_for_backward(z, both, y, m, of)
        ctx.statistics, ctx.residual = statistics, residual is not None
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        share_threads()
        statistics = ctx.statistics
        given = [_samples(part) for part in (grads[0], *ctx.saved_tensors)]
        samples, _, channels = given[0].shape
        dtype = given[0].dtype
        sums = np.empty((samples, 2, 1, channels), dtype)
        dboth, dy, dof = (like(grads[0]) for _ in range(3))
        dresidual = like(grads[0]) if ctx.residual else None
        fusion_loops.fusion_gradients(
            *given, statistics.frame[2, :1], _samples(dboth), _samples(dy), _samples(dof),
            _samples(dy)[:0] if dresidual is None else _samples(dresidual), sums,
        )  # fmt: skip
        leave(total(sums), [statistics])
        return None, dresidual, dboth, dy, dof, torch.from_numpy(sums[:, 0, 0].copy()).view(samples, channels, 1, 1)


class _Product(torch.autograd.Function):
    """`frame_product`: torch's is a product for every frame, and the gradient of the matrix the sum of as many."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, x: Tensor) -> Tensor:
        share_threads()
        matrix, x = matrix.contiguous(), x.contiguous()
        y = x.new_empty(len(x), len(matrix), x.shape[2])
        loops.product(matrix.detach().numpy(), x.detach().numpy(), y.numpy())
        ctx.save_for_backward(matrix, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        share_threads()
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
    def forward(
        ctx: Any, statistics: Statistics, norm: BatchNorm2d, found: list[Statistics], dilations: Array, stride: int, x: Tensor,
        weights: Tensor, bias: Tensor, *_: Tensor,
    ) -> Tensor:  # fmt: skip
        b, c, t, v = x.shape
        y = torch.empty(b, c, (t - 1) // stride + 1, v, dtype=x.dtype, memory_format=torch.channels_last)
        affine = statistics.of_frames(c)
        floors, added = np.zeros((v, c), affine.dtype), np.zeros((v, c), affine.dtype)
        floors[:, -(c // 8) :] = -np.inf
        added[:, : bias.numel()] = bias.cumsum(0).flatten().numpy()
        sums = np.empty((b, 3, 1, c), affine.dtype)
        branch_loops.branches(
            frames(x), affine, floors.reshape(-1), _taps(weights.transpose(1, 2)), dilations, added.reshape(-1), form(x), stride,
            frames(y), sums,
        )  # fmt: skip
        found.append(of_sums(norm, y, sums))
        ctx.save_for_backward(x, weights, y)
        ctx.statistics, ctx.own = statistics, found[0]
        ctx.affine, ctx.floors, ctx.dilations, ctx.stride = affine, floors.reshape(-1), dilations, stride
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        share_threads()
        (x, weights, y), own = ctx.saved_tensors, ctx.own
        terms, dnorm_weight, dnorm_bias = own.terms(y.shape[1])
        dx = like(x)
        panels = _taps(weights)
        sums = np.empty((len(x), 2, 1, x.shape[1]), panels.dtype)
        *tiled, width, wide = panels.shape
        dpanels = np.empty((min(len(x), GROUPS), *tiled, width + -width % (ROWS // 2), wide), panels.dtype)
        branch_loops.branches_gradients(
            frames(grads[0]), frames(y), terms.reshape(3, -1), own.last, terms.dtype.type(own.times), frames(x), ctx.affine,
            ctx.floors, panels, ctx.dilations, form(x), ctx.stride, frames(dx), sums, dpanels,
        )  # fmt: skip
        leave(total(sums)[..., : ctx.statistics.mean.shape[1]], [ctx.statistics])
        by_tap = tiles.from_panels(torch.from_numpy(dpanels).sum(0)[..., :width, :])
        return *(None,) * 5, dx, by_tap.permute(0, 2, 3, 1)[..., None], None, dnorm_weight, dnorm_bias


def _taps(weights: Tensor) -> Array:
    """Convolutions (J, K, N, taps, 1) as panels (J, taps, P, K, wide) for every frame of theirs, see `ffn.model.tiles`."""
    return tiles.in_panels(weights[..., 0].permute(0, 3, 1, 2), 2)


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
