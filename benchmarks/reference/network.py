"""The networks as one writes them first: plain modules, (N·M, C, T, V) contiguous, eager. Nothing here is tuned.

`STGCN` follows MMAction2's ST-GCN, `NaiveFFN` the paper's figures: a convolution per branch, the shift by an index, every
sum as it is written. Both have the modules of `ffn.model`, so that `take` gives them the weights of ours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class GCN(nn.Module):
    """ST-GCN's graph convolution. Source: MMAction2's `unit_gcn(adaptive='importance')`."""

    adjacency: Tensor

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        self.subsets = len(adjacency)
        self.register_buffer("adjacency", adjacency.clone(), persistent=False)
        self.importance = nn.Parameter(torch.ones_like(adjacency))
        self.conv = nn.Conv2d(in_channels, out_channels * self.subsets, 1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        n, _, t, v = x.shape
        x = self.conv(x).view(n, self.subsets, -1, t, v)
        x = torch.einsum("nkctv,kvw->nctw", (x, self.adjacency * self.importance)).contiguous()
        return torch.relu_(self.norm(x))


class TCN(nn.Module):
    """A 9x1 convolution and batch-norm. Source: MMAction2's `unit_tcn`."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, (9, 1), (stride, 1), (4, 0))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


class ESFGCN(nn.Module):
    """The adaptive graph convolution with its residual, and the spatial shift beside it."""

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor, alpha: float) -> None:
        super().__init__()
        self.adjacency = nn.Parameter(adjacency.clone())
        self.conv = nn.Conv2d(in_channels, out_channels * len(adjacency), 1)
        self.norm = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels
        self.residual: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.shift = SpatialShift(in_channels, out_channels, adjacency.shape[-1], alpha)

    def forward(self, x: Tensor) -> Tensor:
        n, _, t, v = x.shape
        y = self.conv(x).view(n, len(self.adjacency), -1, t, v)
        y = torch.einsum("nkctv,kvw->nctw", (y, self.adjacency)).contiguous()
        y = self.norm(y) + self.residual(x)
        return torch.relu_(y + self.shift(x))


class SpatialShift(nn.Module):
    """Eq. (2), the shift as an index over joints and channels. Source: Shift-GCN's non-local shift."""

    index: Tensor

    def __init__(self, in_channels: int, out_channels: int, joints: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        joint, channel = torch.arange(joints)[:, None], torch.arange(in_channels)
        self.register_buffer("index", ((joint + channel) % joints * in_channels + channel).view(-1), persistent=False)
        self.mask = nn.Parameter(torch.zeros(joints, in_channels))
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm1d(joints * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, v = x.shape
        original = x.permute(0, 2, 3, 1).contiguous()
        shifted = torch.index_select(original.view(n * t, v * c), 1, self.index).view(n, t, v, c)
        y = (shifted - self.alpha * original) * (torch.tanh(self.mask) + 1)
        y = self.conv(y.permute(0, 3, 1, 2).contiguous())
        normal: Tensor = self.norm(y.permute(0, 2, 3, 1).reshape(n * t, -1))
        return normal.view(n, t, v, -1).permute(0, 3, 1, 2).contiguous()


class MSFTCN(nn.Module):
    """Eight branches of convolutions of their own, concatenated, and one full 1x1 convolution."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        width = channels // 8
        self.enter = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)) for _ in range(7)
        )
        self.dilated = nn.ModuleList(
            nn.Conv2d(width, width, (3, 1), (stride, 1), (dilation, 0), (dilation, 1)) for dilation in (5, 4, 3, 2, 1)
        )
        self.max_pool = nn.MaxPool2d((3, 1), (stride, 1), (1, 0))
        self.mean_pool = nn.AvgPool2d((3, 1), (stride, 1), (1, 0))
        self.point = nn.Conv2d(width, width, 1, (stride, 1))
        self.fuse = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        groups = x.chunk(8, 1)
        entered = [enter(group) for enter, group in zip(self.enter, groups[:7], strict=True)]
        branches: list[Tensor] = []
        for conv, group in zip(self.dilated, entered[:5], strict=True):
            branches.append(conv(group) + branches[-1] if branches else conv(group))
        branches += [self.max_pool(entered[5]), self.mean_pool(entered[6]), self.point(groups[7])]
        fused: Tensor = self.fuse(torch.cat(branches, 1))
        return fused


class AFF(nn.Module):
    """Eq. (4), X·M(X+Y) + Y·(1 - M(X+Y)), as it is written."""

    def __init__(self, channels: int, reduction: int, stride: int) -> None:
        super().__init__()
        self.weights = nn.ModuleDict({"local": _bottleneck(channels, reduction), "globally": _bottleneck(channels, reduction)})
        self.align: nn.Module = nn.Identity()
        if stride > 1:
            self.align = nn.Sequential(nn.Conv2d(channels, channels, (5, 1), (stride, 1), (2, 0)), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.align(y)
        both = x + y
        mean = nn.functional.adaptive_avg_pool2d(both, 1)
        m = torch.sigmoid(self.weights["local"](both) + self.weights["globally"](mean))
        return x * m + y * (1 - m)


class Block(nn.Module):
    """Spatial module, temporal module, attention, residual, ReLU."""

    def __init__(self, spatial: nn.Module, temporal: nn.Module, attention: nn.Module | None, residual: nn.Module | None) -> None:
        super().__init__()
        self.spatial, self.temporal, self.attention, self.residual = spatial, temporal, attention, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(x)
        z = self.temporal(y)
        if self.attention is not None:
            z = self.attention(z, y)
        if self.residual is not None:
            z = z + self.residual(x)
        return torch.relu_(z)


class Skeleton(nn.Module):
    """Clips (N, M, T, V, C) to logits (N, K) through ten blocks of ST-GCN's widths (`naive`: those of FFN's row S4)."""

    def __init__(self, adjacency: Tensor, classes: int, *, naive: bool, channels: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(adjacency.shape[-1] * channels)
        blocks: list[Block] = []
        for out, stride in [(64, 1)] * 4 + [(128, 2)] + [(128, 1)] * 2 + [(256, 2)] + [(256, 1)] * 2:
            residual: nn.Module | None = nn.Identity() if blocks else None
            if blocks and (channels != out or stride > 1):
                residual = nn.Sequential(nn.Conv2d(channels, out, 1, (stride, 1)), nn.BatchNorm2d(out))
            if naive:
                block = Block(ESFGCN(channels, out, adjacency, 0.2), MSFTCN(out, stride), AFF(out, 1, stride), residual)
            else:
                block = Block(GCN(channels, out, adjacency), TCN(out, stride), None, residual)
            blocks.append(block)
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        n, m, t, v, c = x.shape
        x = x.permute(0, 1, 3, 4, 2).reshape(n * m, v * c, t)
        x = self.norm(x).view(n * m, v, c, t).permute(0, 2, 3, 1).contiguous()
        x = nn.functional.adaptive_avg_pool2d(self.blocks(x), 1)
        logits: Tensor = self.classifier(x.view(n, m, -1).mean(1))
        return logits


def take(plain: Skeleton, network: nn.Module) -> None:
    """Give `plain` the weights and statistics of `network`, the preset S0 or S4 of `ffn.model`, every one of them."""
    plain.load_state_dict(dict(renamed(network.state_dict())))


def renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The one grouped entry of MSF-TCN (`enter.0`, `enter.1`) taken apart into seven; all else by its name."""
    for name, tensor in state.items():
        head, entry, tail = name.partition(".temporal.enter.")
        if not entry:
            yield name, tensor
            continue
        parts = tensor.chunk(7) if tensor.ndim else [tensor] * 7
        for number, part in enumerate(parts):
            yield f"{head}{entry}{number}.{tail}", part


def _bottleneck(channels: int, reduction: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels // reduction, 1),
        nn.BatchNorm2d(channels // reduction),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels // reduction, channels, 1),
        nn.BatchNorm2d(channels),
    )
