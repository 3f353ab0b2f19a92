"""Training losses, from logits by log-softmax. p is the probability of the true class."""

import torch
from torch import Tensor
from torch.nn import functional

from ffn.config import LossConfig


def loss(config: LossConfig, logits: Tensor, labels: Tensor, *, epoch: int, epochs: int) -> Tensor:
    """Mean loss of a batch, (N, K) logits and (N,) labels, in epoch `epoch` (from 1) of `epochs`; float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if config.name == "two_stage":
        return two_stage(logits, labels, config, epoch=epoch, epochs=epochs)
    if config.name == "focal":
        return focal(logits, labels, gamma=config.gamma)
    if config.name == "poly":
        return poly(logits, labels, epsilon=config.epsilon)
    return functional.cross_entropy(logits, labels, label_smoothing=config.smoothing)


def focal(logits: Tensor, labels: Tensor, *, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p. Source: Eq. (6)."""
    log_p = _log_p(logits, labels)
    return (-((-torch.expm1(log_p)) ** gamma) * log_p).mean()


def poly(logits: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """-log p + epsilon (1 - p). Source: PolyLoss (arXiv 2204.12511), poly-1."""
    log_p = _log_p(logits, labels)
    return (-log_p - epsilon * torch.expm1(log_p)).mean()


def two_stage(logits: Tensor, labels: Tensor, config: LossConfig, *, epoch: int, epochs: int) -> Tensor:
    """Cross-entropy up to epoch m = epochs / f_c; then xi L2 + (1 - xi) L1 with xi rising from 0 to 1.

    L1 = -(1 - p)^gamma log p, L2 = -(1 + p)^gamma_hc log p, xi = (f_c epoch / epochs - 1) / (f_c - 1).
    Source: Eqs. (5) to (10). The paper leaves m open; this is the only value at which xi neither jumps nor is negative.
    """
    if epoch * config.cycle_factor <= epochs:
        return functional.cross_entropy(logits, labels, label_smoothing=config.smoothing)
    xi = (config.cycle_factor * epoch / epochs - 1) / (config.cycle_factor - 1)
    log_p = _log_p(logits, labels)
    weight = xi * (1 + log_p.exp()) ** config.gamma_hc + (1 - xi) * (-torch.expm1(log_p)) ** config.gamma
    return (-weight * log_p).mean()


def _log_p(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
