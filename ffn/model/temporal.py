"""Temporal convolutions over the frames of one joint. Tensors are (N·M, C, T, V), channels last in memory."""

import torch
from torch import Tensor, nn

from ffn.model.common import Layers, NormedConv2d, without_gradient
from ffn.model.fused import branches, fusable
from ffn.model.persons import BatchNorm2d
from ffn.model.products import Sum, fits
from ffn.model.statistics import Normal, plain


class TCN(nn.Module):
    """ST-GCN's temporal convolution: 9x1, batch-norm. (B, C, T, V) -> (B, C, T / stride, V)."""

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv = temporal_conv(channels, kernel=9, stride=stride)
        self.norm = BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


class MSFTCN(nn.Module):
    """MSF-TCN: eight branches of an eighth of the channels each, fused from large receptive fields to small ones.

    Seven branches begin with a 1x1 convolution, batch-norm and ReLU of their own (one grouped convolution here); five go
    on with a 3x1 convolution of dilation 5 to 1, one with max and one with mean pooling over three frames; the eighth is a
    1x1 convolution. Each dilated branch adds its output to the next smaller one. Concatenation, batch-norm, ReLU, one
    full 1x1 convolution, batch-norm. (B, C, T, V) -> (B, C, T / stride, V); C divisible by 8.
    Source: section 2.2 and Fig. 2(b); the counts of Table 2 settle where the full convolution stands.
    """

    DILATIONS = (5, 4, 3, 2, 1)

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(f"MSF-TCN splits its channels into eight groups, got {channels}")
        width = channels // 8
        self.enter = Layers(
            NormedConv2d(7 * width, 7 * width, 1, groups=7),
            BatchNorm2d(7 * width),
            nn.ReLU(inplace=True),
        )
        self.dilated = nn.ModuleList(temporal_conv(width, kernel=3, stride=stride, dilation=d) for d in self.DILATIONS)
        self.max_pool = nn.MaxPool2d((3, 1), (stride, 1), (1, 0))
        self.mean_pool = nn.AvgPool2d((3, 1), (stride, 1), (1, 0))
        self.point = NormedConv2d(width, width, 1, (stride, 1))
        self.fuse = Layers(
            BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            NormedConv2d(channels, channels, 1),
            BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        if fusable(x, self.training) and fits(x, x.shape[1]):
            y, _ = self.fused(Sum((plain(x),), relu=False))
            return Sum((y,), relu=False).total()
        width = x.shape[1] // 8
        to_enter, to_point = x.split_with_sizes([7 * width, width], 1)
        *groups, to_max, to_mean = self.enter(to_enter).chunk(7, 1)
        outputs: list[Tensor] = []
        for conv, group in zip(self.dilated, groups, strict=True):
            y = conv(group)
            outputs.append(y.add_(outputs[-1]) if outputs else y)
        outputs += [self.max_pool(to_max), self.mean_pool(to_mean), self.point(to_point)]
        fused: Tensor = self.fuse(torch.cat(outputs, 1))
        return fused

    def fused(self, x: Sum, *, copies: int = 0) -> tuple[Normal, list[Tensor]]:
        """Its output, and `copies` of `x`, whose features are `fusable` and which `fits`.

        The eighth branch is convolved with the others, before its stride, so that none is copied.
        """
        enter, norm, *_ = self.enter
        first, _, conv, last = self.fuse
        assert isinstance(conv, NormedConv2d)
        assert isinstance(norm, BatchNorm2d)
        assert isinstance(first, BatchNorm2d)
        assert isinstance(last, BatchNorm2d)
        weight, bias = (torch.cat(both) for both in zip(_both(enter), _both(self.point), strict=True))
        entered, same = x.product(*without_gradient(weight, bias), norm, copies=copies)
        weights, biases = (torch.stack(each) for each in zip(*map(_both, self.dilated), strict=True))
        weights, biases = without_gradient(weights, biases)
        together = branches(entered, weights, biases, first, dilations=self.DILATIONS, stride=self.point.stride[0])
        made, _ = Sum((together,)).product(*conv.weights(), last)
        return made, same


def temporal_conv(channels: int, *, kernel: int, stride: int, dilation: int = 1) -> NormedConv2d:
    """A convolution over frames that keeps T at stride 1; Kaiming fan-out as MMAction2 initialises it."""
    padding = dilation * (kernel - 1) // 2
    conv = NormedConv2d(channels, channels, (kernel, 1), (stride, 1), (padding, 0), (dilation, 1))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _both(conv: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(conv, NormedConv2d)
    assert conv.bias is not None
    return conv.weight, conv.bias
