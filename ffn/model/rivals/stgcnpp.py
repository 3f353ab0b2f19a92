"""ST-GCN++: ST-GCN with a free adjacency, a residual in the graph convolution and a multi-branch temporal one."""

import torch
from torch import Tensor, nn

from ffn.layouts import Layout
from ffn.model.common import NormedConv2d, channels_last_, shortcut
from ffn.model.persons import BatchNorm1d, BatchNorm2d, pooled
from ffn.model.rivals.common import Block, Head, TemporalBranches, directed_adjacency, ten_blocks
from ffn.model.spatial import graph_conv


class STGCNPP(nn.Module):
    """Clips to class logits: (N, M, T, V, C) float -> (N, K).

    Source: PYSKL (Duan et al., 2022), as MMAction2 configures it: the adjacency a parameter that starts from the directed
    graph, six temporal branches, data batch-norm over V·C.
    """

    def __init__(self, layout: Layout, classes: int, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        adjacency = torch.from_numpy(directed_adjacency(layout))
        self.norm = BatchNorm1d(len(layout.joints) * channels)
        self.blocks = nn.Sequential(
            *(
                Block(
                    ResidualGCN(in_channels, out_channels, adjacency),
                    MSTCN(out_channels, stride=stride),
                    shortcut(in_channels, out_channels, stride=stride) if number else None,
                )
                for number, (in_channels, out_channels, stride) in enumerate(ten_blocks(channels, width))
            )
        )
        self.head = Head(4 * width, classes)
        channels_last_(self)

    def forward(self, x: Tensor) -> Tensor:
        n, m, t, v, c = x.shape
        y = self.norm(x.reshape(n * m * t, v * c)).view(n * m, t, v, c).permute(0, 3, 1, 2)
        logits: Tensor = self.head(pooled(self.blocks, y, x), persons=m)
        return logits


class ResidualGCN(nn.Module):
    """ST-GCN's graph convolution with a free adjacency and a residual before the ReLU.

    The residual is the identity, or a 1x1 convolution with batch-norm where the width changes.
    (B, C_in, T, V) -> (B, C_out, T, V). Source: PYSKL; MMAction2's `unit_gcn(adaptive='init', with_res=True)`.
    """

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        self.adjacency = nn.Parameter(adjacency.clone())
        self.conv = nn.Conv2d(in_channels, out_channels * len(adjacency), 1)
        self.norm = BatchNorm2d(out_channels)
        self.residual = shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(graph_conv(x, self.conv, self.adjacency)) + self.residual(x))


class MSTCN(nn.Sequential):
    """Six branches (dilations 1 to 4, max pooling, 1x1), fused by batch-norm, ReLU, a full 1x1 convolution, batch-norm.

    (B, C, T, V) -> (B, C, T / stride, V). Source: PYSKL; MMAction2's `mstcn`.
    """

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__(
            TemporalBranches(channels, channels, kernel=3, dilations=(1, 2, 3, 4), stride=stride),
            BatchNorm2d(channels),
            nn.ReLU(),
            NormedConv2d(channels, channels, 1),
            BatchNorm2d(channels),
        )
