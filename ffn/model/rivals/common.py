"""What the rivals have in common with one another. Tensors are (N·M, C, T, V), channels last in memory."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ffn.errors import FFNError
from ffn.layouts import Layout
from ffn.model.common import NormedConv2d
from ffn.model.persons import BatchNorm1d, BatchNorm2d
from ffn.model.temporal import temporal_conv


def directed_adjacency(layout: Layout) -> NDArray[np.float32]:
    """(3, V, V) adjacency of the directed partition: the joint itself, its parent, the mean of its children.

    Entry [k, v, w] is the share of joint v in joint w; a column sums to one, or to zero where there is no such joint.
    Source: 2s-AGCN; mode `spatial` of MMAction2 and pyskl, which all four of their networks here are configured with.
    """
    count = len(layout.joints)
    from_parent = np.zeros((count, count))
    for child, parent in layout.edges:
        from_parent[parent, child] = 1
    subsets = np.stack([np.eye(count), from_parent, from_parent.T])
    shares: NDArray[np.float64] = subsets / np.maximum(subsets.sum(1, keepdims=True), 1)
    return shares.astype(np.float32)


def ten_blocks(channels: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(C_in, C_out, stride) of ST-GCN's ten blocks: four of `width`, three of twice it, three of four times it."""
    for stage, depth in enumerate((4, 3, 3)):
        for place in range(depth):
            yield channels, width * 2**stage, 2 if stage and not place else 1
            channels = width * 2**stage


def fan_out_(conv: nn.Conv2d, channels: int) -> None:
    """Kaiming fan-out for a 1x1 convolution that holds several of `channels` outputs each; biases zero."""
    nn.init.normal_(conv.weight, 0, (2 / channels) ** 0.5)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


class Block(nn.Module):
    """relu(temporal(spatial(x)) + residual(x)). (B, C_in, T, V) -> (B, C_out, T / stride, V). Source: ST-GCN."""

    def __init__(self, spatial: nn.Module, temporal: nn.Module, residual: nn.Module | None) -> None:
        super().__init__()
        self.spatial = spatial
        self.temporal = temporal
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.temporal(self.spatial(x))
        if self.residual is not None:
            y = y + self.residual(x)
        return torch.relu(y)


class TemporalBranches(nn.Module):
    """The branches of a multi-scale temporal convolution, side by side; what follows them differs from rival to rival.

    All but the last begin with a 1x1 convolution, batch-norm and ReLU (one convolution for all of them here). Then one
    convolution over `kernel` frames per dilation, and max pooling over three frames; the last branch is a strided 1x1
    convolution. The first takes the channels that do not divide. (B, C_in, T, V) -> (B, C_out, T / stride, V).
    Source: MS-G3D's MS-TCN; ST-GCN++ and CTR-GCN vary it.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel: int, dilations: tuple[int, ...], stride: int) -> None:
        super().__init__()
        width = out_channels // (len(dilations) + 2)
        self.widths = [out_channels - width * (len(dilations) + 1), *[width] * len(dilations)]
        entered = sum(self.widths)
        self.enter = nn.Sequential(NormedConv2d(in_channels, entered, 1), BatchNorm2d(entered), nn.ReLU())
        self.dilated = nn.ModuleList(
            temporal_conv(channels, kernel=kernel, stride=stride, dilation=dilation)
            for channels, dilation in zip(self.widths, dilations, strict=False)
        )
        self.max_pool = nn.MaxPool2d((3, 1), (stride, 1), (1, 0))
        self.point = NormedConv2d(in_channels, width, 1, (stride, 1))

    def forward(self, x: Tensor) -> Tensor:
        *groups, to_max = self.enter(x).split(self.widths, 1)
        branches = [conv(group) for conv, group in zip(self.dilated, groups, strict=True)]
        return torch.cat([*branches, self.max_pool(to_max), self.point(x)], 1)


class PersonNorm(nn.Module):
    """Data batch-norm over M·V·C, so that either of two persons has statistics of its own.

    (N, M, T, V, C) with M at most 2 -> (N·M, C, T, V). A clip of one person is the first; more raise `FFNError`.
    Source: 2s-AGCN; MMAction2's `data_bn_type='MVC'`.
    """

    PERSONS = 2

    def __init__(self, joints: int, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm1d(self.PERSONS * joints * channels)

    def forward(self, x: Tensor) -> Tensor:
        n, m, t, v, c = x.shape
        if m > self.PERSONS:
            raise FFNError(f"clip.persons={m}: this network's data batch-norm knows two persons, set clip.persons to 2 or less")
        x = functional.pad(x, (0, 0, 0, 0, 0, 0, 0, self.PERSONS - m))
        x = self.norm(x.transpose(1, 2).reshape(n * t, -1)).view(n, t, self.PERSONS, v, c)
        return x[:, :, :m].transpose(1, 2).reshape(n * m, t, v, c).permute(0, 3, 1, 2)


class Head(nn.Module):
    """Mean over persons, linear layer. (N·M, C) -> (N, K)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(channels, classes)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor, *, persons: int) -> Tensor:
        logits: Tensor = self.classifier(x.view(-1, persons, x.shape[1]).mean(1))
        return logits
