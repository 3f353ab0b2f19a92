"""Graph convolutions over the joints of one frame. Tensors are (N·M, C, T, V), channels last in memory."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffn.model.persons import BatchNorm1d, BatchNorm2d


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
        return torch.relu_(self.norm(graph_conv(x, self.conv, self.adjacency * self.importance)))


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
        gcn: Tensor = self.norm(graph_conv(x, self.conv, self.adjacency))
        return gcn.add_(self.residual(x)).add_(self.shift(x)).relu_()


class SpatialShift(nn.Module):
    """Spatial shift: every channel of a joint looks at another joint, so that one joint sees the whole skeleton.

    Channel c of joint v takes the value of joint (v + c) mod V, less alpha times its own; a trainable mask weighs the
    result, a 1x1 convolution mixes it: Y = W (X - alpha X0) M. Then batch-norm over joints and channels.
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
        b, c, t, v = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(b * t, v * c)
        mask = (torch.tanh(self.mask) + 1).to(x.dtype).view(-1)
        if self.training:
            shift: Callable[..., Tensor] = _Shift.apply
            y = shift(rows, mask, self.alpha, self.source, self.target)
        else:
            y = _difference(rows, self.alpha, self.source) * mask
        y = self.conv(y.view(b, t, v, c).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        normal: Tensor = self.norm(y.reshape(b * t, -1))  # (B·T, V·C)
        return normal.view(b, t, v, -1).permute(0, 3, 1, 2)


class _Shift(torch.autograd.Function):
    """(X - alpha X0) M on rows of V·C, with a gather for the gradient of its gather.

    Autograd's own scatters, which is slow where it has to be reproducible; and every pass over the features that can be is in
    place here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, alpha: float, source: Tensor, target: Tensor) -> Tensor:
        difference = _difference(x, alpha, source)
        ctx.save_for_backward(difference, mask, target)
        ctx.alpha = alpha
        return difference * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        difference, mask, target = ctx.saved_tensors
        masked = grads[0] * mask
        return _difference(masked, ctx.alpha, target), (grads[0] * difference).sum(0), None, None, None


def _difference(x: Tensor, alpha: float, index: Tensor) -> Tensor:
    """(R, V·C) rows with their values rearranged by `index`, less alpha times the rows as they are."""
    return x.index_select(1, index).sub_(x, alpha=alpha)


def graph_conv(x: Tensor, conv: nn.Conv2d, adjacency: Tensor) -> Tensor:
    """Sum over subsets s of (W_s x + b_s) A_s: (B, C_in, T, V), `conv` to S·C_out channels, (S, V, W) -> (B, C_out, T, W).

    In training the graph comes first where channels become more, on the fewer ones; in evaluation the order is the one that
    the paper's counts are of. A channels-last input is never copied.
    """
    subsets, _, w = adjacency.shape
    if not conv.training or conv.in_channels >= conv.out_channels // subsets:
        return aggregate(conv(x), adjacency)
    b, c, t, v = x.shape
    weights = adjacency.permute(2, 0, 1).reshape(w * subsets, v)
    rows = x.permute(0, 2, 3, 1).reshape(b * t, v, c)
    gathered = torch.bmm(weights.expand(b * t, w * subsets, v), rows).view(b, t, w, subsets * c).permute(0, 3, 1, 2)
    weight = conv.weight.view(subsets, -1, c).transpose(0, 1).reshape(-1, subsets * c, 1, 1)
    assert conv.bias is not None
    bias = conv.bias.view(subsets, -1).T @ adjacency.sum(1)  # (C_out, W)
    return functional.conv2d(gathered, weight).add_(bias[:, None])


def aggregate(x: Tensor, adjacency: Tensor) -> Tensor:
    """Sum over subsets and joints: (B, S·C, T, V) and (S, V, W) -> (B, C, T, W).

    A channels-last input is never copied: one product of (W, V·S) with every frame's (V·S, C).
    """
    b, _, t, v = x.shape
    s, _, w = adjacency.shape
    x_btvsc = x.permute(0, 2, 3, 1).reshape(b * t, v * s, -1)
    weights = adjacency.permute(2, 1, 0).reshape(w, v * s)
    return torch.bmm(weights.expand(b * t, w, v * s), x_btvsc).view(b, t, w, -1).permute(0, 3, 1, 2)
