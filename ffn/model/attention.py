"""Attention at the end of MSF-TCN. Tensors are (N·M, C, T, V), channels last in memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional


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
        return torch.sigmoid(self.local(x) + self.globally(functional.adaptive_avg_pool2d(x, 1)))


class MSCAMGate(nn.Module):
    """The row S3(MS-CAM): X · M(X), without the input of MSF-TCN. Source: Eq. (3)."""

    def __init__(self, channels: int, *, reduction: int) -> None:
        super().__init__()
        self.weights = MSCAM(channels, reduction=reduction)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gated: Tensor = x * self.weights(x)
        return gated


class AFF(nn.Module):
    """Attentional feature fusion of the output X of MSF-TCN with its input Y: X·M(X+Y) + Y·(1 - M(X+Y)).

    Where MSF-TCN has a stride, Y passes a strided 5x1 convolution with batch-norm first: the paper does not say what
    stands there, its FLOP column settles it. Source: Eq. (4), without the factor 2 of the original AFF code.
    """

    def __init__(self, channels: int, *, reduction: int, stride: int) -> None:
        super().__init__()
        self.weights = MSCAM(channels, reduction=reduction)
        self.align: nn.Module = nn.Identity()
        if stride > 1:
            self.align = nn.Sequential(
                nn.Conv2d(channels, channels, (5, 1), (stride, 1), (2, 0)),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.align(y)
        return torch.lerp(y, x, self.weights(x + y))  # y + m (x - y)


def _bottleneck(channels: int, reduction: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels // reduction, 1),
        nn.BatchNorm2d(channels // reduction),
        nn.ReLU(),
        nn.Conv2d(channels // reduction, channels, 1),
        nn.BatchNorm2d(channels),
    )
