"""CTR-GCN: every channel refines the graph for itself."""

import torch
from torch import Tensor, nn

from ffn.layouts import Layout
from ffn.model.common import channels_last_, shortcut
from ffn.model.persons import BatchNorm2d, pooled
from ffn.model.rivals.common import Block, Head, PersonNorm, TemporalBranches, directed_adjacency, fan_out_, ten_blocks


class CTRGCN(nn.Module):
    """Clips to class logits: (N, M, T, V, C) float, M at most 2 -> (N, K).

    Source: Channel-wise Topology Refinement Graph Convolution (Chen et al., 2021), as pyskl configures it.
    """

    def __init__(self, layout: Layout, classes: int, *, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        adjacency = torch.from_numpy(directed_adjacency(layout))
        self.norm = PersonNorm(len(layout.joints), channels)
        self.blocks = nn.Sequential(
            *(
                Block(
                    CTRGC(in_channels, out_channels, adjacency),
                    MSTCN(out_channels, stride=stride),
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


class CTRGC(nn.Module):
    """Channel-wise topology refinement: a free adjacency that all channels share, plus what each channel adds to it.

    The refinement of the pair (v, w) is a 1x1 convolution R -> C_out of tanh(phi(x)[v] - psi(x)[w]), both means over the
    frames; a gate that starts at zero weighs it. The three subsets stand side by side in every convolution and are
    summed. Batch-norm (near zero at the start), residual (identity, or 1x1 convolution with batch-norm), ReLU.
    (B, C_in, T, V) -> (B, C_out, T, V). Source: CTR-GCN, section 3; pyskl's `unit_ctrgcn`, whose entry [v, w] is the
    share of v in w where the authors' code has it the other way round, and whose three subsets share one gate.
    """

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        subsets = len(adjacency)
        relations = 8 if in_channels <= 16 else in_channels // 8
        self.adjacency = nn.Parameter(adjacency.clone())
        self.gate = nn.Parameter(torch.zeros(1))
        self.phi = nn.Conv2d(in_channels, subsets * relations, 1)
        self.psi = nn.Conv2d(in_channels, subsets * relations, 1)
        self.refine = nn.Conv2d(subsets * relations, subsets * out_channels, 1, groups=subsets)
        self.value = nn.Conv2d(in_channels, subsets * out_channels, 1)
        self.norm = BatchNorm2d(out_channels)
        self.residual = shortcut(in_channels, out_channels)
        for conv in (self.phi, self.psi):
            fan_out_(conv, relations)
        for conv in (self.refine, self.value):
            fan_out_(conv, out_channels)
        nn.init.constant_(self.norm.weight, 1e-6)

    def topology(self, x: Tensor) -> Tensor:
        """(B, C_in, T, V) -> (B, S, C_out, V, V): the share of joint v in joint w, for every clip and channel."""
        phi, psi = self.phi(x).mean(2), self.psi(x).mean(2)  # (B, S·R, V)
        refined = self.refine(torch.tanh(phi[:, :, :, None] - psi[:, :, None, :]))
        by_subset: Tensor = refined.unflatten(1, (len(self.adjacency), -1))
        return self.adjacency[:, None] + self.gate * by_subset

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x).unflatten(1, (len(self.adjacency), -1))
        y = torch.einsum("bsctv,bscvw->bctw", value, self.topology(x)).contiguous(memory_format=torch.channels_last)
        return torch.relu(self.norm(y) + self.residual(x))


class MSTCN(nn.Sequential):
    """Four branches (five frames at dilation 1 and 2, max pooling, 1x1), batch-norm, ReLU.

    (B, C, T, V) -> (B, C, T / stride, V). Source: CTR-GCN; the batch-norms at the ends of pyskl's branches are one here.
    """

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__(
            TemporalBranches(channels, channels, kernel=5, dilations=(1, 2), stride=stride),
            BatchNorm2d(channels),
            nn.ReLU(),
        )
