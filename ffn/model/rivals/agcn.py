"""2s-AGCN: a graph that every clip adapts to itself."""

from functools import reduce

import torch
from torch import Tensor, nn

from ffn.layouts import Layout
from ffn.model.common import channels_last_, shortcut
from ffn.model.persons import BatchNorm2d, pooled
from ffn.model.rivals.common import Block, Head, PersonNorm, directed_adjacency, fan_out_, ten_blocks
from ffn.model.temporal import TCN


class AGCN(nn.Module):
    """One stream of 2s-AGCN. Clips to class logits: (N, M, T, V, C) float, M at most 2 -> (N, K).

    Source: Two-Stream Adaptive Graph Convolutional Networks (Shi et al., 2019), as MMAction2 configures it (AAGCN without
    attention); see `AdaptiveGCN` for where that leaves the paper.
    """

    def __init__(self, layout: Layout, classes: int, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        adjacency = torch.from_numpy(directed_adjacency(layout))
        self.norm = PersonNorm(len(layout.joints), channels)
        self.blocks = nn.Sequential(
            *(
                Block(
                    AdaptiveGCN(in_channels, out_channels, adjacency),
                    TCN(out_channels, stride=stride),
                    shortcut(in_channels, out_channels, stride=stride) if number else None,
                )
                for number, (in_channels, out_channels, stride) in enumerate(ten_blocks(channels, width))
            )
        )
        self.head = Head(4 * width, classes)
        channels_last_(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(pooled(self.blocks, self.norm(x), x), persons=x.shape[1])
        return logits


class AdaptiveGCN(nn.Module):
    """Adaptive graph convolution: a free adjacency, plus a gated one computed from the clip itself.

    (B, C_in, T, V) -> (B, C_out, T, V). Batch-norm, residual (identity, or 1x1 convolution with batch-norm), ReLU; the
    batch-norm starts near zero, so that a new block is its residual.
    Source: 2s-AGCN and MS-AAGCN (Shi et al., 2019). As in MMAction2's `unit_aagcn`, 2s-AGCN's fixed graph A and free
    graph B are one parameter that starts from A, its softmax is MS-AAGCN's tanh, and a gate that starts at zero weighs it.
    """

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        subsets, embedding = len(adjacency), out_channels // 4
        self.adjacency = nn.Parameter(adjacency.clone())
        self.gate = nn.Parameter(torch.zeros(1))
        self.query = nn.Conv2d(in_channels, subsets * embedding, 1)
        self.key = nn.Conv2d(in_channels, subsets * embedding, 1)
        values = [nn.Conv2d(in_channels, out_channels, 1) for _ in range(subsets)]
        self.values = nn.ModuleList(values)
        self.norm = BatchNorm2d(out_channels)
        self.residual = shortcut(in_channels, out_channels)
        for conv in (self.query, self.key):
            fan_out_(conv, embedding)
        for conv in values:
            fan_out_(conv, out_channels * in_channels * subsets)
        nn.init.constant_(self.norm.weight, 1e-6)

    def topology(self, x: Tensor) -> Tensor:
        """(B, C, T, V) -> (B, S, V, V): the share of joint v in joint w, for every clip."""
        query, key = (conv(x).unflatten(1, (len(self.adjacency), -1)) for conv in (self.query, self.key))
        similarity = torch.einsum("bsetv,bsetw->bsvw", query, key) / (query.shape[2] * query.shape[3])
        return self.adjacency + self.gate * torch.tanh(similarity)

    def forward(self, x: Tensor) -> Tensor:
        graphs = self.topology(x).unbind(1)
        y = reduce(torch.add, (conv(_mix(x, graph)) for conv, graph in zip(self.values, graphs, strict=True)))
        return torch.relu(self.norm(y) + self.residual(x))


def _mix(x: Tensor, graph: Tensor) -> Tensor:
    """Sum over joints, one graph per clip: (B, C, T, V) and (B, V, W) -> (B, C, T, W)."""
    b, _, t, v = x.shape
    x_btvc = x.permute(0, 2, 3, 1)
    weights = graph.mT[:, None].expand(b, t, -1, v)
    return torch.bmm(weights.reshape(b * t, -1, v), x_btvc.reshape(b * t, v, -1)).view(b, t, -1, x.shape[1]).permute(0, 3, 1, 2)
