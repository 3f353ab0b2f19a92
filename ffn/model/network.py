"""The network: ten basic blocks, global average pooling, one linear layer."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor, nn

from ffn.config import ModelConfig
from ffn.errors import FFNError
from ffn.layouts import Layout
from ffn.model.attention import AFF, CVSTA, DropAttention, MSCAMGate
from ffn.model.common import channels_last_, shortcut
from ffn.model.fused import fusable
from ffn.model.graph import spatial_adjacency
from ffn.model.persons import BatchNorm1d, pooled
from ffn.model.products import fits
from ffn.model.rivals.aagcn import AAGCN
from ffn.model.rivals.agcn import AGCN
from ffn.model.rivals.ctrgcn import CTRGCN
from ffn.model.rivals.msg3d import MSG3D
from ffn.model.rivals.stgcnpp import STGCNPP
from ffn.model.spatial import ESFGCN, GCN
from ffn.model.temporal import MSFTCN, TCN

RIVALS: dict[str, Callable[..., nn.Module]] = {
    "st-gcn++": STGCNPP,
    "2s-agcn": AGCN,
    "aagcn": AAGCN,
    "ctr-gcn": CTRGCN,
    "ms-g3d": MSG3D,
}


def build(config: ModelConfig, layout: Layout, classes: int) -> nn.Module:
    """The network `config` describes: clips (N, M, T, V, C) float to class logits (N, K).

    Raises `FFNError` where a rival is given a setting that it does not know.
    """
    if config.network == "ffn":
        return Network(config, layout, classes)
    known = ModelConfig(network=config.network, width=config.width)
    for field in fields(config):
        if getattr(config, field.name) != getattr(known, field.name):
            raise FFNError(f"setting model.{field.name}: {config.network} has none, only model.width")
    return RIVALS[config.network](layout, classes, width=config.width)


class Block(nn.Module):
    """Basic block: spatial module, temporal module, attention, residual, ReLU.

    (B, C_in, T, V) -> (B, C_out, T / stride, V). The residual is the identity, or a strided 1x1 convolution with
    batch-norm where the shape changes; the first block has none. Source: Fig. 2(a).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, residual: bool, adjacency: Tensor, config: ModelConfig
    ) -> None:
        super().__init__()
        self.spatial: nn.Module
        if config.spatial == "gcn":
            self.spatial = GCN(in_channels, out_channels, adjacency)
        else:
            self.spatial = ESFGCN(in_channels, out_channels, adjacency, alpha=config.alpha)
        self.temporal: TCN | MSFTCN = (TCN if config.temporal == "tcn" else MSFTCN)(out_channels, stride=stride)
        self.attention: nn.Module | None = None
        if config.attention == "aff":
            self.attention = AFF(out_channels, reduction=config.reduction, stride=stride)
        elif config.attention == "mscam":
            self.attention = MSCAMGate(out_channels, reduction=config.reduction)
        elif config.attention == "cvsta":
            self.attention = CVSTA(out_channels)
        elif config.attention == "drop":
            self.attention = DropAttention()
        self.residual: nn.Module | None = None
        if residual:
            self.residual = shortcut(in_channels, out_channels, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.attention, AFF) and fusable(x, self.training) and fits(x, *self.attention.channels):
            return self._fused(x, self.attention)
        y = self.spatial(x)
        residual: Tensor | None = None if self.residual is None else self.residual(x)
        z: Tensor = self.temporal(y)
        if self.attention is not None:
            z = self.attention(z, y)
        return (z if residual is None else z.add_(residual)).relu_()

    def _fused(self, x: Tensor, attention: AFF) -> Tensor:
        spatial, temporal = self.spatial, self.temporal
        assert isinstance(spatial, ESFGCN)
        assert isinstance(temporal, MSFTCN)
        y, x = spatial.sum(x)
        z, same = temporal.fused(y, copies=2)
        return attention.fused(z, same[0], same[1], None if self.residual is None else self.residual(x))


class Network(nn.Module):
    """Clips to class logits: (N, M, T, V, C) float -> (N, K).

    Data batch-norm over V·C, the blocks, global average pooling over T and V, mean over persons (an absent one, all
    zeros, included, as in MMAction2), dropout, linear layer. Source: sections 2 and 2.3, Fig. 2.
    """

    def __init__(self, config: ModelConfig, layout: Layout, classes: int, *, channels: int = 3) -> None:
        super().__init__()
        adjacency = torch.from_numpy(spatial_adjacency(layout))
        self.norm = BatchNorm1d(len(layout.joints) * channels)
        blocks: list[Block] = []
        width = channels
        for stage, depth in enumerate(config.depths):
            for place in range(depth):
                out = config.width * 2**stage
                stride = 2 if stage and not place else 1
                blocks.append(Block(width, out, stride=stride, residual=bool(blocks), adjacency=adjacency, config=config))
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, 0, 0.01)
        nn.init.zeros_(self.classifier.bias)
        channels_last_(self)

    def forward(self, x: Tensor) -> Tensor:
        n, m, t, v, c = x.shape
        y = self.norm(x.reshape(n * m * t, v * c))
        y = y.view(n * m, t, v, c).permute(0, 3, 1, 2)  # (N·M, C, T, V), channels last
        y = pooled(self.blocks, y, x).view(n, m, -1).mean(1)
        logits: Tensor = self.classifier(self.dropout(y))
        return logits
