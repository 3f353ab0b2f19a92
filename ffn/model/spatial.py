"""Graph convolutions over the joints of one frame. Tensors are (N·M, C, T, V), channels last in memory."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffn.model.fused import add_to_frames, frame_product, fusable, normal_sum, shifted
from ffn.model.persons import BatchNorm1d, BatchNorm2d
from ffn.model.products import GraphAndShift, Sum, fits


class GCN(nn.Module):
    """ST-GCN's graph convolution with a learned mask of edge importance.

    1x1 convolution to one feature per adjacency subset, aggregation over the graph, batch-norm, ReLU.
    (B, C_in, T, V) -> (B, C_out, T, V). Source: ST-GCN, Eq. (10), and MMAction2's `unit_gcn(adaptive='importance')`.
    """

    adjacency: Tensor

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor) -> None:
        super().__init__()
        self.register_buffer("adjacency", adjacency.clone(), persistent=False)
        self.importance = nn.Parameter(torch.ones_like(adjacency))
        self.conv = nn.Conv2d(in_channels, out_channels * len(adjacency), 1)
        self.norm = BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return normal_sum((graph_conv(x, self.conv, self.adjacency * self.importance), self.norm))


class ESFGCN(nn.Module):
    """ESF-GCN: an adaptive graph convolution with a residual, and the spatial shift beside it.

    The adjacency is a free parameter that starts from the graph, without a sparsity term. The residual is the identity,
    or a bare 1x1 convolution where the width changes. Both paths are added before the ReLU.
    (B, C_in, T, V) -> (B, C_out, T, V). Source: section 2.1 and Fig. 2(a).
    """

    def __init__(self, in_channels: int, out_channels: int, adjacency: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.adjacency = nn.Parameter(adjacency.clone())
        self.conv = nn.Conv2d(in_channels, out_channels * len(adjacency), 1)
        self.norm = BatchNorm2d(out_channels)
        same = in_channels == out_channels
        self.residual: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.shift = SpatialShift(in_channels, out_channels, joints=adjacency.shape[-1], alpha=alpha)

    def forward(self, x: Tensor) -> Tensor:
        if fusable(x, self.training) and fits(x, self.norm.num_features):
            return self.sum(x)[0].total()
        gcn = graph_conv(x, self.conv, self.adjacency)
        return normal_sum((gcn, self.norm), (self.shift(x), self.shift.norm), residual=self.residual(x))

    def sum(self, x: Tensor) -> tuple[Sum, Tensor]:
        """Its output, not worked out yet, and `x` for all others that take it; `x` is `fusable`, the output `fits`."""
        assert self.conv.bias is not None
        shift, residual = self.shift, self.residual
        both = GraphAndShift(
            self.adjacency, self.conv.weight, self.conv.bias, self.norm, shift.weights(), shift.alpha, shift.source, shift.target,
            shift.conv.weight, shift.norm, residual.weight if isinstance(residual, nn.Conv2d) else None,
        )  # fmt: skip
        return both(x)


class SpatialShift(nn.Module):
    """Spatial shift: every channel of a joint looks at another joint, so that one joint sees the whole skeleton.

    Channel c of joint v takes the value of joint (v + c) mod V, less alpha times its own; a trainable mask weighs the
    result, a 1x1 convolution mixes it: Y = W (X - alpha X0) M. Then comes `norm`, a batch-norm over joints and channels, which
    is left to the sum it is part of.
    (B, C_in, T, V) -> (B, C_out, T, V). Source: Eq. (2); Shift-GCN's non-local shift, without CD-GCN's shift back,
    which the equation does not show.
    """

    source: Tensor
    target: Tensor

    def __init__(self, in_channels: int, out_channels: int, *, joints: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        joint, channel = torch.arange(joints)[:, None], torch.arange(in_channels)
        source, target = (joint + channel) % joints, (joint - channel) % joints  # (V, C_in), one the other's inverse
        self.register_buffer("source", (source * in_channels + channel).view(-1), persistent=False)
        self.register_buffer("target", (target * in_channels + channel).view(-1), persistent=False)
        self.mask = nn.Parameter(torch.zeros(joints, in_channels))
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        nn.init.normal_(self.conv.weight, 0, math.sqrt(1 / out_channels))
        self.norm = BatchNorm1d(joints * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(shifted(x, self.weights(), self.alpha, self.source, self.target, training=self.training))
        return y

    def weights(self) -> Tensor:
        """M (V·C_in,)."""
        return (torch.tanh(self.mask) + 1).view(-1)


def graph_conv(x: Tensor, conv: nn.Conv2d, adjacency: Tensor) -> Tensor:
    """Sum over subsets s of (W_s x + b_s) A_s: (B, C_in, T, V), `conv` to S·C_out channels, (S, V, W) -> (B, C_out, T, W).

    In training the graph comes first: on the fewer channels where they become more, with a cheaper gradient of the weights where
    they do not. In evaluation the order is the one that the paper's counts are of. A channels-last input is never copied.
    """
    if not conv.training:
        return aggregate(conv(x), adjacency)
    b, c, t, v = x.shape
    subsets, _, w = adjacency.shape
    rows = x.permute(0, 2, 3, 1).reshape(b * t, v, c)
    gathered = frame_product(adjacency.permute(2, 0, 1).reshape(w * subsets, v), rows)
    weight = conv.weight.view(subsets, -1, c).transpose(0, 1).reshape(-1, subsets * c, 1, 1)
    y = functional.conv2d(gathered.view(b, t, w, subsets * c).permute(0, 3, 1, 2), weight)
    assert conv.bias is not None
    return add_to_frames(y, adjacency.sum(1).T @ conv.bias.view(subsets, -1))


def aggregate(x: Tensor, adjacency: Tensor) -> Tensor:
    """Sum over subsets and joints: (B, S·C, T, V) and (S, V, W) -> (B, C, T, W).

    A channels-last input is never copied: one product of (W, V·S) with every frame's (V·S, C).
    """
    b, _, t, v = x.shape
    s, _, w = adjacency.shape
    x_btvsc = x.permute(0, 2, 3, 1).reshape(b * t, v * s, -1)
    weights = adjacency.permute(2, 1, 0).reshape(w, v * s)
    return torch.bmm(weights.expand(b * t, w, v * s), x_btvsc).view(b, t, w, -1).permute(0, 3, 1, 2)
