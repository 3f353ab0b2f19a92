"""MS-G3D: disentangled multi-scale graphs, and graphs that reach over the frames of a window."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ffn.layouts import Layout
from ffn.model.common import channels_last_, shortcut
from ffn.model.persons import BatchNorm2d, pooled
from ffn.model.rivals.common import Head, PersonNorm, TemporalBranches


class MSG3D(nn.Module):
    """Clips to class logits: (N, M, T, V, C) float, M at most 2 -> (N, K).

    Three blocks of a factorised path (MS-GCN, two MS-TCN) beside two G3D paths of windows of three and five frames, each
    block followed by an MS-TCN. `width` is ST-GCN's, for one scale over all networks: the blocks have 1.5, 3 and 6 times
    as many channels, the paper's 96, 192 and 384 at 64.
    Source: Disentangling and Unifying Graph Convolutions (Liu et al., 2020) and the authors' code; the classifier and
    the convolutions over frames start as FFN's do, not as PyTorch's default.
    """

    def __init__(self, layout: Layout, classes: int, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        hops = hop_distances(layout)
        widths = [width * 3 * 2**stage // 2 for stage in range(3)]
        self.norm = PersonNorm(len(layout.joints), channels)
        blocks: list[nn.Module] = []
        for stage, out_channels in enumerate(widths):
            blocks += [STGC(channels, out_channels, hops, first=not stage), MSTCN(out_channels, out_channels)]
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = Head(widths[-1], classes)
        channels_last_(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(pooled(self.blocks, self.norm(x), x), persons=x.shape[1])
        return logits


class STGC(nn.Module):
    """Spatial-temporal block: the factorised path plus the G3D paths, ReLU.

    All but the first block halve the frames. (B, C_in, T, V) -> (B, C_out, T / stride, V). Source: MS-G3D, section 3.4.
    """

    WINDOWS = (3, 5)

    def __init__(self, in_channels: int, out_channels: int, hops: NDArray[np.int64], *, first: bool) -> None:
        super().__init__()
        stride = 1 if first else 2
        hidden = out_channels if first else in_channels
        self.factorised = nn.Sequential(
            MSGCN(in_channels, hidden, hops),
            MSTCN(hidden, out_channels, stride=stride),
            MSTCN(out_channels, out_channels, relu=False),
        )
        self.windowed = nn.ModuleList(
            G3D(in_channels, hidden, out_channels, hops, window=window, stride=stride) for window in self.WINDOWS
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.factorised(x)
        for path in self.windowed:
            y = y + path(x)
        return torch.relu(y)


class MSGCN(nn.Module):
    """Disentangled multi-scale graph convolution: thirteen graphs, from the joint itself to twelve hops away.

    Aggregation over every graph plus a free residual of it, 1x1 convolution of all scales, batch-norm, ReLU.
    (B, C_in, T, V) -> (B, C_out, T, V). Source: MS-G3D, section 3.2.
    """

    SCALES = 13
    adjacency: Tensor

    def __init__(self, in_channels: int, out_channels: int, hops: NDArray[np.int64], *, scales: int = SCALES) -> None:
        super().__init__()
        self.register_buffer("adjacency", torch.from_numpy(scale_adjacency(hops, scales)), persistent=False)
        self.mask = nn.Parameter(torch.empty_like(self.adjacency).uniform_(-1e-6, 1e-6))
        self.conv = nn.Conv2d(scales * in_channels, out_channels, 1)
        self.norm = BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(gather(x, self.adjacency + self.mask))))


class G3D(nn.Module):
    """Graph convolution over a sliding window: every joint reaches its neighbours in all frames of the window at once.

    MS-GCN with six scales on the graph of window·V joints, a convolution that collapses the window, batch-norm.
    (B, C_in, T, V) -> (B, C_out, T / stride, V). Source: MS-G3D, section 3.3.
    """

    SCALES = 6

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, hops: NDArray[np.int64], *, window: int, stride: int
    ) -> None:
        super().__init__()
        self.window = window
        self.stride = stride
        self.gcn = MSGCN(in_channels, hidden, windowed_hops(hops, window), scales=self.SCALES)
        self.collapse = nn.Conv2d(hidden, out_channels, (window, 1))
        self.norm = BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        b, _, _, v = x.shape
        y = self.gcn(windows(x, self.window, stride=self.stride))  # (B, C, T', window·V)
        t = y.shape[2]
        frames = y.permute(0, 2, 3, 1).reshape(b * t, self.window, v, -1).permute(0, 3, 1, 2)
        collapsed = self.collapse(frames).permute(0, 2, 3, 1).reshape(b, t, v, -1).permute(0, 3, 1, 2)
        normal: Tensor = self.norm(collapsed)
        return normal


class MSTCN(nn.Module):
    """Multi-scale temporal convolution: six branches (dilations 1 to 4, max pooling, 1x1), batch-norm, residual, ReLU.

    (B, C_in, T, V) -> (B, C_out, T / stride, V). Source: MS-G3D, section 3.4; the batch-norms at the ends of the branches
    are one here.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.relu = relu
        self.branches = TemporalBranches(in_channels, out_channels, kernel=3, dilations=(1, 2, 3, 4), stride=stride)
        self.norm = BatchNorm2d(out_channels)
        self.residual = shortcut(in_channels, out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.branches(x)) + self.residual(x)
        return torch.relu(y) if self.relu else y


def hop_distances(layout: Layout) -> NDArray[np.int64]:
    """(V, V) edges on the shortest way between two joints; V where there is none."""
    count = len(layout.joints)
    near = np.eye(count, dtype=bool)
    for v, p in layout.edges:
        near[v, p] = near[p, v] = True
    hops = np.full((count, count), count)
    reached = np.eye(count, dtype=bool)
    for distance in range(count):
        hops[reached & (hops == count)] = distance
        reached = reached @ near
    return hops


def windowed_hops(hops: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """(window·V, window·V) distances in a window: as within a frame, whatever the frames; itself in another is one hop.

    Source: MS-G3D, section 3.3.
    """
    tiled = np.tile(hops, (window, window))
    return np.where(np.eye(len(tiled), dtype=bool), 0, np.maximum(tiled, 1))


def scale_adjacency(hops: NDArray[np.int64], scales: int) -> NDArray[np.float32]:
    """(scales, V, V) normalised graphs: at scale k the joints exactly k hops away and the joint itself, D^-1/2 A D^-1/2.

    Source: MS-G3D, section 3.2.
    """
    own = np.eye(len(hops), dtype=bool)
    graphs = np.stack([(hops == k) | own for k in range(scales)])
    root = np.sqrt(graphs.sum(2))
    normalised: NDArray[np.float64] = graphs / (root[:, :, None] * root[:, None, :])
    return normalised.astype(np.float32)


def windows(x: Tensor, window: int, *, stride: int) -> Tensor:
    """The frames around every stride-th frame, zeros beyond the ends: (B, C, T, V) -> (B, C, T / stride, window·V)."""
    b, c, t, v = x.shape
    x_btvc = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 0, window // 2, window // 2))
    frames = torch.stack([x_btvc[:, k : k + t : stride] for k in range(window)], 2)
    return frames.view(b, -1, window * v, c).permute(0, 3, 1, 2)


def gather(x: Tensor, adjacency: Tensor) -> Tensor:
    """Sum over joints, every scale for itself: (B, C, T, V) and (S, V, W) -> (B, S·C, T, W).

    A channels-last input is never copied: one product of (W·S, V) with every frame's (V, C).
    """
    b, c, t, v = x.shape
    s, _, w = adjacency.shape
    weights = adjacency.permute(2, 0, 1).reshape(w * s, v)
    x_btvc = x.permute(0, 2, 3, 1).reshape(b * t, v, c)
    return torch.bmm(weights.expand(b * t, w * s, v), x_btvc).view(b, t, w, s * c).permute(0, 3, 1, 2)
