"""Attention at the end of MSF-TCN. Tensors are (N·M, C, T, V), channels last in memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ffn.model.common import Layers, NormedConv2d
from ffn.model.fused import fusion
from ffn.model.persons import BatchNorm2d, Counting, mean
from ffn.model.products import Sum
from ffn.model.statistics import Normal


class MSCAM(nn.Module):
    """MS-CAM: channel attention at two scales, local (every frame and joint) and global (their mean).

    sigmoid(L(x) + G(x)), weights in [0, 1] of the shape of x; L and G are 1x1 convolutions C -> C/r -> C with batch-norm,
    ReLU between them. Source: Eq. (3) and Fig. 3(a).
    """

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        self.local = _bottleneck(channels, reduction)
        self.globally = _bottleneck(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        local: Tensor = self.local(x)
        return local.add_(self.globally(functional.adaptive_avg_pool2d(x, 1))).sigmoid_()

    def fused(self, x: Sum) -> tuple[Normal, Tensor, Tensor]:
        """What the weights are the sigmoid of, L(x), to be normalised, and G(x); and `x`, whose features are `fusable`."""
        enter, norm, _, leave, last = self.local
        assert isinstance(enter, NormedConv2d)
        assert isinstance(leave, NormedConv2d)
        assert isinstance(norm, BatchNorm2d)
        assert isinstance(last, BatchNorm2d)
        narrow, (same, total) = x.product(*enter.weights(), norm, copies=1, pooled=True)
        local, _ = Sum((narrow,)).product(*leave.weights(), last)
        mean = total[:, :, None, None] / (same.shape[2] * same.shape[3])
        return local, self.globally(mean), same


class MSCAMGate(nn.Module):
    """The row S3(MS-CAM): X · M(X), without the input of MSF-TCN. Source: Eq. (3)."""

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        self.weights = MSCAM(channels, reduction=reduction)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gated: Tensor = x * self.weights(x)
        return gated


class CVSTA(nn.Module):
    """The row S3(CVSTA): X weighed by frame and by joint, every channel for itself: X · a_T · a_V.

    Means over the joints and over the frames lie side by side, (B, C, T + V, 1), for one 1x1 convolution, batch-norm and
    Hardswish; a 1x1 convolution, batch-norm and sigmoid each make a_T (B, C, T, 1) and a_V (B, C, 1, V).
    Source: the counts of Table 5. The paper cites MDR-GCN for CVSTA, whose module also learns a graph, and does not say how
    it was attached; this is the attention by frame and joint of EfficientGCN (ST-JointAtt), also found in MDR-GCN's code,
    without its compression of channels: both columns fit.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(NormedConv2d(channels, channels, 1), BatchNorm2d(channels), nn.Hardswish())
        self.frames = nn.Sequential(NormedConv2d(channels, channels, 1), BatchNorm2d(channels), nn.Sigmoid())
        self.joints = nn.Sequential(NormedConv2d(channels, channels, 1), BatchNorm2d(channels), nn.Sigmoid())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        means = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)], 2)
        frames, joints = self.enter(means).split([x.shape[2], x.shape[3]], 2)
        weighed: Tensor = x * self.frames(frames) * self.joints(joints.transpose(2, 3))
        return weighed


class DropAttention(Counting, nn.Module):
    """The row S3(Drop-att): training hides what stands out most, so that the network learns from the rest. No parameters.

    With d = (x - mean)^2 over (T, V) of a channel and s^2 its variance, a = sigmoid(d / (4 (s^2 + 1e-4)) + 0.5). Joints whose
    a, averaged over channels and frames, reaches `keep_prob` become zero; then every value whose own a does; what is kept
    grows by the share that was hidden. Nothing is drawn by chance. The mean of a stays below sigmoid(0.75) = 0.68, so above
    that a threshold never hides everything. The identity at evaluation.
    Source: SkeAttnCLR (arXiv 2305.00666), whose code builds it with 0.7; a is SimAM's. How it was attached the paper leaves
    open: at the end of MSF-TCN here, as the others.
    """

    def __init__(self, *, keep_prob: float = 0.7) -> None:
        super().__init__()
        self.keep_prob = keep_prob

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return x
        with torch.no_grad():
            square = (x.float() - x.float().mean((2, 3), keepdim=True)).square()
            variance = square.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
            a = torch.sigmoid(square / (4 * (variance + 1e-4)) + 0.5)
            joints = (a.mean((1, 2), keepdim=True) < self.keep_prob).float()
            entries = (a < self.keep_prob).float()
            kept = joints / mean(joints, self) * entries / mean(entries, self)
        return x * kept.to(x.dtype)


class AFF(nn.Module):
    """Attentional feature fusion of the output X of MSF-TCN with its input Y: X·M(X+Y) + Y·(1 - M(X+Y)).

    Where MSF-TCN has a stride, Y passes a strided 5x1 convolution with batch-norm first: the paper does not say what
    stands there, its FLOP column settles it. Source: Eq. (4), without the factor 2 of the original AFF code.
    """

    def __init__(self, channels: int, *, reduction: int, stride: int) -> None:
        super().__init__()
        self.channels = channels, channels // reduction
        self.weights = MSCAM(channels, reduction=reduction)
        self.align: nn.Module = nn.Identity()
        if stride > 1:
            self.align = nn.Sequential(
                NormedConv2d(channels, channels, (5, 1), (stride, 1), (2, 0)),
                BatchNorm2d(channels),
            )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.align(y)
        return torch.lerp(y, x, self.weights(x + y))  # y + m (x - y)

    def fused(self, x: Normal, y: Tensor, y_again: Tensor, residual: Tensor | None) -> Tensor:
        """The block's output, of `fusable` features, with the residual and ReLU; `y` twice: two gradients meet in one pass."""
        if not isinstance(self.align, nn.Identity):
            y = y_again = self.align(y)
        local, globally, both = self.weights.fused(Sum((x,), y, relu=False))
        return fusion(both, y_again, local, globally, residual)


def _bottleneck(channels: int, reduction: int) -> Layers:
    return Layers(
        NormedConv2d(channels, channels // reduction, 1),
        BatchNorm2d(channels // reduction),
        nn.ReLU(inplace=True),
        NormedConv2d(channels // reduction, channels, 1),
        BatchNorm2d(channels),
    )
