"""What every network here does alike. Tensors are (N·M, C, T, V), channels last in memory."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffn.model.fused import normal_sum
from ffn.model.persons import BatchNorm2d


class NormedConv2d(nn.Conv2d):
    """A convolution with a bias whose output meets a batch-norm over the same channels, directly or after sums with its like.

    The batch-norm takes every constant of a channel away again, so in training the bias has no gradient but rounding. Autograd
    would sum all features for it, a tenth to a quarter of the layer's backward pass; here it is zero at once.
    A strided 1x1 convolution takes its stride first: oneDNN's own is slower, and with few channels writes past its memory
    on two threads (torch 2.13).
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weights()
        stride = self.stride
        if self.kernel_size == (1, 1):
            if self.training and input.shape[2:] == (1, 1) and self.groups == 1:  # which a convolution is slow at
                return functional.linear(input.flatten(1), weight.flatten(1), bias)[:, :, None, None]
            input, stride = input[:, :, :: stride[0], :: stride[1]], (1, 1)
        return functional.conv2d(input, weight, bias, stride, self.padding, self.dilation, self.groups)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as they go into the convolution."""
        assert self.bias is not None
        return without_gradient(self.weight, self.bias) if self.training else (self.weight, self.bias)


def without_gradient(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution, or of several, as `NormedConv2d` takes them in training: none for the bias but zero."""
    without_bias: Callable[..., Tensor] = _WithoutBias.apply
    return without_bias(weight, bias), bias.detach()


class _WithoutBias(torch.autograd.Function):
    """The weight, with a gradient of zero for the bias, which the optimiser wants to hear of."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (bias,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(bias)


class Layers(nn.Sequential):
    """Layers one after another, a batch-norm with the ReLU behind it as one."""

    def forward(self, input: Tensor) -> Tensor:
        before: nn.Module | None = None
        for layer, following in itertools.zip_longest(self, list(self)[1:]):
            if isinstance(layer, BatchNorm2d) and isinstance(following, nn.ReLU):
                input = normal_sum((input, layer))
            elif not (isinstance(layer, nn.ReLU) and isinstance(before, BatchNorm2d)):
                input = layer(input)
            before = layer
        return input


def shortcut(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Module:
    """The identity, or a strided 1x1 convolution with batch-norm where the shape changes."""
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(NormedConv2d(in_channels, out_channels, 1, (stride, 1)), BatchNorm2d(out_channels))


def channels_last_(network: nn.Module) -> None:
    """The weights in the order in memory that the features have."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
