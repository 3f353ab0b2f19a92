"""A batch-norm's numbers for one batch, features that are normalised where they are taken, and how compiled loops see features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from ffn.model import loops
from ffn.model.loops import share_threads
from ffn.model.persons import BatchNorm1d, BatchNorm2d

Array = NDArray[Any]
Norm = BatchNorm1d | BatchNorm2d


@dataclass(kw_only=True)
class Statistics:
    """A batch-norm's numbers for one batch, see `ffn.model.loops`."""

    mean: Array
    """(P, C) float64, as is `scale`, 1 / standard deviation."""
    scale: Array
    weight: Array
    """(P·C,), of the batch-norm."""
    frame: Array
    """Slope, level and mean (3, V, C) of the entries of a frame, of the features' type: slope·x + level is normal."""
    count: float
    """Elements that a mean is taken of."""
    last: int
    times: int
    """Frames from `last` on count `times` times."""
    joint: bool
    sums: Array | None = None
    """Sums (2, P or V, C) of dz and of dz (x - mean), which what takes the features leaves here in the backward pass."""

    def terms(self, channels: int) -> tuple[Array, Tensor, Tensor]:
        """From `sums`: `terms` (3, V, C) of `loops.normal_gradients`, gradients of weight and bias.

        Of so many `channels`: those beyond the norm's own, which it was not given, are left as they are.
        """
        sums, dtype = self.sums, self.frame.dtype
        assert sums is not None, "the batch-norm of features that nothing has taken"
        if len(self.mean) == 1 and sums.shape[1] > 1:
            sums = sums.sum(1, keepdims=True)
        dweight, dbias = (torch.from_numpy(part.astype(dtype).reshape(-1)) for part in (sums[1] * self.scale, sums[0]))
        if self.joint:
            distributed.all_reduce(torch.from_numpy(sums))
        made = np.empty((3, self.frame.shape[1], channels), dtype)
        loops.affine_gradients(sums, self.weight, self.count, self.mean, self.scale, made)
        return made, dweight, dbias

    def of_frames(self, channels: int) -> Array:
        """`frame` as (3, V·C) of so many channels: those beyond the norm's own are left as they are."""
        _, joints, own = self.frame.shape
        made = np.zeros((3, joints, channels), self.frame.dtype)
        made[0] = 1
        made[:, :, :own] = self.frame
        return made.reshape(3, -1)


@dataclass(frozen=True)
class Normal:
    """Features (B, C, T, V), channels last in memory, that are normalised where they are taken, once.

    In the backward pass what takes them says the gradient of the *normalised* features in place of that of `x`, and leaves
    `Statistics.sums` of it: it goes through both when it works out that gradient, and the batch-norm needs the sums over all
    of it before it can go on.
    """

    x: Tensor
    statistics: Statistics


def normalised(x: Tensor, norm: Norm) -> Normal:
    """`x` (B, C, T, V), of any origin, and its batch-norm, or that of its first channels."""
    share_threads()
    statistics = of_features(norm, x)
    made: Callable[..., Tensor] = _Normalised.apply
    return Normal(made(statistics, x, norm.weight, norm.bias), statistics)


def plain(x: Tensor) -> Normal:
    """`x` (B, C, T, V) as it is: nothing is to be done to it."""
    frame = np.zeros((3, x.shape[3], x.shape[1]), rows(x).dtype)
    frame[0] = 1
    zero = np.zeros((1, x.shape[1]))
    return Normal(x, Statistics(mean=zero, scale=zero, weight=zero[0], frame=frame, count=1.0, last=0, times=1, joint=False))


def of_features(norm: Norm, x: Tensor) -> Statistics:
    """Those of `x` (B, C, T, V), which go into the running statistics of `norm`."""
    period = max(1, norm.num_features // x.shape[1])
    sums = np.empty((parts(x), 3, period, x.shape[1]), rows(x).dtype)
    loops.moments(rows(x), len(x), x.shape[2], sums)
    return of_sums(norm, x, sums)


def of_sums(norm: Norm, x: Tensor, sums: Array) -> Statistics:
    """Those of `x` (B, C, T, V), or its first channels, as many as are the norm's, from its `loops.moments` (parts, 3, P, C)."""
    samples, _, length, joints = x.shape
    period = sums.shape[2]
    said = np.empty((3, period, norm.num_features // period))
    loops.about_zero(sums, samples, length, joints / period, norm.times, said)
    if norm.joint:
        distributed.all_reduce(torch.from_numpy(said))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    mean, scale, frame = np.empty(said.shape[1:]), np.empty(said.shape[1:]), np.empty((3, joints, said.shape[2]), sums.dtype)
    loops.affine(
        said, weight, bias, norm.eps, norm.momentum, norm.running_mean.numpy(), norm.running_var.numpy(), mean, scale,
        frame.reshape(3, -1),
    )  # fmt: skip
    return Statistics(
        mean=mean,
        scale=scale,
        weight=weight,
        frame=frame,
        count=float(said[2, 0, 0]),
        last=(samples - (norm.times > 1)) * length,
        times=norm.times,
        joint=norm.joint,
    )


def parts(x: Tensor) -> int:
    """How many equal pieces of samples of `x` (B, C, T, V) sums are made of: a multiple of B, about `loops.PARTS`."""
    return len(x) * max(1, min(loops.PARTS // len(x), x.shape[2]))


def total(sums: Array) -> Array:
    """(parts, K, P, C) -> (K, P, C) float64."""
    made = np.empty(sums.shape[1:])
    loops.total(sums, made)
    return made


def rows(x: Tensor) -> Array:
    """(B, C, T, V) as rows (B·T·V, C), which share the memory of features that are channels last."""
    made: Array = x.detach().permute(0, 2, 3, 1).numpy().reshape(-1, x.shape[1])
    return made


def frames(x: Tensor) -> Array:
    """(B, C, T, V) as frames (B·T, V·C)."""
    made: Array = x.detach().permute(0, 2, 3, 1).numpy().reshape(-1, x.shape[3] * x.shape[1])
    return made


def like(x: Tensor) -> Tensor:
    """Memory for features of the shape of `x`, channels last."""
    return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)


def leave(sums: Array, statistics: list[Statistics]) -> None:
    """`sums` (1 + k, P, C) of the gradient of a sum, and of it times each of its k terms, to where the terms find theirs."""
    for k, each in enumerate(statistics):
        each.sums = sums[[0, 1 + k]]


def scalar(value: float, x: Tensor) -> Any:
    """`value` in the type of `x`."""
    return np.dtype(str(x.dtype).removeprefix("torch.")).type(value)


class _Normalised(torch.autograd.Function):
    """`normalised`: the features; the gradient through the batch-norm."""

    @staticmethod
    def forward(ctx: Any, statistics: Statistics, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.statistics = statistics
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,), statistics = ctx.saved_tensors, ctx.statistics
        terms, dweight, dbias = statistics.terms(x.shape[1])
        dx = like(x)
        loops.normal_gradients(
            frames(grads[0]), frames(x), terms.reshape(3, -1), statistics.last, terms.dtype.type(statistics.times), frames(dx)
        )
        return None, dx, dweight, dbias
