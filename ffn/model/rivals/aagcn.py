"""AAGCN: 2s-AGCN with attention over joints, frames and channels after every graph convolution."""

import torch
from torch import Tensor, nn

from ffn.layouts import Layout
from ffn.model.common import channels_last_, shortcut
from ffn.model.persons import pooled
from ffn.model.rivals.agcn import AdaptiveGCN
from ffn.model.rivals.common import Block, Head, PersonNorm, directed_adjacency, ten_blocks
from ffn.model.temporal import TCN


class AAGCN(nn.Module):
    """One stream of MS-AAGCN. Clips to class logits: (N, M, T, V, C) float, M at most 2 -> (N, K).

    Source: Skeleton-Based Action Recognition with Multi-Stream Adaptive Graph Convolutional Networks (Shi et al., 2019), as
    MMAction2 configures it.
    """

    def __init__(self, layout: Layout, classes: int, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        adjacency = torch.from_numpy(directed_adjacency(layout))
        joints = len(layout.joints)
        self.norm = PersonNorm(joints, channels)
        self.blocks = nn.Sequential(
            *(
                Block(
                    nn.Sequential(AdaptiveGCN(in_channels, out_channels, adjacency), STCAttention(out_channels, joints=joints)),
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


class STCAttention(nn.Module):
    """Attention over joints, then frames, then channels: each weighs x by 1 + sigmoid of what pooling over the rest shows.

    Joints: a convolution over the whole skeleton; frames: one over nine frames; channels: two linear layers, C -> C/2 -> C.
    (B, C, T, V) -> the same. Source: MS-AAGCN, the STC-attention module.
    """

    def __init__(self, channels: int, *, joints: int) -> None:
        super().__init__()
        kernel = joints - 1 + joints % 2  # odd, so that V stays
        self.joints = nn.Conv1d(channels, 1, kernel, padding=kernel // 2)
        self.frames = nn.Conv1d(channels, 1, 9, padding=4)
        self.squeeze = nn.Linear(channels, channels // 2)
        self.excite = nn.Linear(channels // 2, channels)
        nn.init.xavier_normal_(self.joints.weight)
        nn.init.zeros_(self.frames.weight)
        nn.init.kaiming_normal_(self.squeeze.weight)
        nn.init.zeros_(self.excite.weight)
        for layer in (self.joints, self.frames, self.squeeze, self.excite):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x * (1 + torch.sigmoid(self.joints(x.mean(2)))[:, :, None])
        x = x * (1 + torch.sigmoid(self.frames(x.mean(3)))[:, :, :, None])
        channels = self.excite(torch.relu(self.squeeze(x.mean((2, 3)))))
        return x * (1 + torch.sigmoid(channels))[:, :, None, None]
