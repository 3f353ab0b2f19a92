"""Persons who are not there: one stands for all of them, and batch-norm counts it as often as they are.

Clips have room for two persons, and four in five of NTU's recordings show one. The others are zeros, all alike, and stay alike in
every module here: a batch needs to work out one. Only what mixes samples must know for how many it stands.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


class Counting:
    """A module that mixes the samples of a batch."""

    samples = 1
    """B, where the last sample stands for `times`."""
    times = 1
    joint = False
    """Whether the batch goes over all processes of torch.distributed."""


class BatchNorm1d(Counting, nn.BatchNorm1d):
    """Batch-norm of (B·R, C); in training over samples as often as they count."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalized(self, input)


class BatchNorm2d(Counting, nn.BatchNorm2d):
    """Batch-norm of (B, C, T, V); in training over samples as often as they count."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalized(self, input)


def pooled(blocks: nn.Module, x: Tensor, clips: Tensor) -> Tensor:
    """Mean over frames and joints of what `blocks` makes of the persons: (N·M, C, T, V) -> (N·M, F).

    `clips` (N, M, T, V, C) tell who is there. Where shapes have to stay the same, for CUDA graphs and exports, all are
    worked out.
    """
    features: Tensor
    if clips.device.type != "cpu" or torch.compiler.is_compiling():
        features = blocks(x).mean((2, 3))
        return features
    present = clips.flatten(2).any(2)
    present[:, 0] = True  # a data batch-norm by person makes zeros differ between the first and the second
    present = present.flatten()
    absent = len(x) - int(present.sum())
    if absent < 2:
        features = blocks(x).mean((2, 3))
        return features
    persons = torch.cat([present.nonzero()[:, 0], (~present).nonzero()[:1, 0]])
    counting = [module for module in blocks.modules() if isinstance(module, Counting)]
    for module in counting:
        module.samples, module.times = len(persons), absent
    try:
        features = blocks(x[persons].contiguous(memory_format=torch.channels_last)).mean((2, 3))
    finally:
        for module in counting:
            module.times = 1
    return features.index_select(0, torch.where(present, present.cumsum(0) - 1, len(persons) - 1))


def mean(x: Tensor, over: Counting) -> Tensor:
    """The mean of all elements of `x` (B, ...), through which no gradient flows, every sample as often as it counts."""
    each = x.numel() // len(x)
    total = torch.stack([x.sum() + (over.times - 1) * x[-1].sum(), x.new_tensor(each * (len(x) + over.times - 1))])
    if over.joint:
        distributed.all_reduce(total)
    return total[0] / total[1]


def _normalized(norm: Any, x: Tensor) -> Tensor:
    if not norm.training or (norm.times == 1 and not norm.joint):
        y: Tensor = _BatchNorm.forward(norm, x)
        return y
    last = len(x) // norm.samples if norm.times > 1 else 0
    normalization: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _Normalization.apply
    y, mean, variance, count = normalization(x, norm.weight, norm.bias, norm.eps, last, norm.times, norm.joint)
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return y


class _Normalization(torch.autograd.Function):
    """(y, mean, biased variance, elements per channel) of a batch (B, C, ...) whose last rows count several times."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, last: int, times: int, joint: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        each = x[0].numel() // x.shape[1]
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        if last:
            their_mean, their_variance = torch.batch_norm_update_stats(x[-last:], None, None, 0.0)
            share = last * (times - 1) / (len(x) + last * (times - 1))
            apart = their_mean - mean
            mean = mean + share * apart
            variance = variance.lerp(their_variance, share).addcmul_(apart, apart, value=share * (1 - share))
        count = mean.new_tensor(each * (len(x) + last * (times - 1)))
        if joint:
            mean, variance, count = _joined(mean, variance, count)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.last, ctx.times, ctx.joint = last, times, joint
        ctx.mark_non_differentiable(mean, variance, count)
        return functional.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, (x, weight, mean, scale, count) = grads[0], ctx.saved_tensors
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, scale, True, 0.0, [False, True, True]
        )
        sums = torch.stack([dweight, dbias])
        if ctx.joint:
            distributed.all_reduce(sums)
        # dx = weight * scale * (dy - mean(dy) - x_normal * mean(dy * x_normal)); of a row that counts several times dy is a
        # sum already, and the rest is not.
        slope, level = sums / count
        shape = [1, -1] + [1] * (x.ndim - 2)
        of_dy = weight * scale
        of_x = -of_dy * scale * slope
        rest = -of_x * mean - of_dy * level
        of_dy, of_x, rest = of_dy.view(shape), of_x.view(shape), rest.view(shape)
        dx = torch.addcmul(rest, dy, of_dy).addcmul_(x, of_x)
        if ctx.last:
            dx[-ctx.last :].add_(torch.addcmul(rest, x[-ctx.last :], of_x), alpha=ctx.times - 1)
        return dx, dweight, dbias, None, None, None, None


def _joined(mean: Tensor, variance: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of all processes' samples, from those of each."""
    channels = len(mean)
    said = mean.new_zeros(distributed.get_world_size(), 2 * channels + 1)  # a row of every process
    said[distributed.get_rank()] = torch.cat([mean, variance, count[None]])
    distributed.all_reduce(said)
    means, variances, counts = torch.split(said, [channels, channels, 1], 1)
    total = counts.sum()
    joint = (means * counts).sum(0) / total
    return joint, ((variances + (means - joint) ** 2) * counts).sum(0) / total, total
