"""What every network here does alike. Tensors are (N·M, C, T, V), channels last in memory."""

import torch
from torch import nn


def shortcut(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Module:
    """The identity, or a strided 1x1 convolution with batch-norm where the shape changes."""
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, (stride, 1)), nn.BatchNorm2d(out_channels))


def channels_last_(network: nn.Module) -> None:
    """The weights in the order in memory that the features have."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
