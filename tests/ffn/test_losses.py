"""Losses against float64 formulas, and their gradients."""

import numpy as np
import pytest
import torch

from ffn.config import PRESETS, LossConfig
from ffn.losses import loss


def formula(name, p, *, epoch, epochs, cycle=4):
    """The loss of true-class probabilities `p`, gamma = gamma_hc = 2, f_c = `cycle`, epsilon = 1."""
    if name == "focal":
        return np.mean(-((1 - p) ** 2) * np.log(p))
    if name == "poly":
        return np.mean(-np.log(p) + (1 - p))
    if name == "two_stage" and epoch > epochs / cycle:
        xi = (cycle * epoch / epochs - 1) / (cycle - 1)
        return np.mean(xi * -((1 + p) ** 2) * np.log(p) + (1 - xi) * -((1 - p) ** 2) * np.log(p))
    return np.mean(-np.log(p))


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "poly", "two_stage"])
@pytest.mark.parametrize("epoch", [1, 2, 3, 8])
def test_loss_is_its_formula(name, epoch):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 7)) * 4, rng.integers(0, 7, 30)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = loss(LossConfig(name=name), torch.tensor(logits), torch.tensor(labels), epoch=epoch, epochs=8)
    assert float(got) == pytest.approx(formula(name, shares[range(30), labels], epoch=epoch, epochs=8), rel=1e-5)


@pytest.mark.parametrize("cycle", [2, 4, 6])
def test_two_stage_is_its_formula_in_every_epoch_of_the_paper(cycle):
    """The rows of Table 6: 110 epochs, of which 55, 27 and 18 are cross-entropy."""
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(20, 5)) * 4, rng.integers(0, 5, 20)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    config = PRESETS[f"S0-two-stage-{cycle}"]
    plain = []
    for epoch in range(1, config.training.epochs + 1):
        got = float(loss(config.loss, torch.tensor(logits), torch.tensor(labels), epoch=epoch, epochs=110))
        expected = formula("two_stage", shares[range(20), labels], epoch=epoch, epochs=110, cycle=cycle)
        assert got == pytest.approx(expected, rel=1e-5), epoch
        plain.append(got == pytest.approx(formula("cross_entropy", shares[range(20), labels], epoch=epoch, epochs=110), rel=1e-5))
    assert sum(plain) == 110 // cycle


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "poly", "two_stage"])
@pytest.mark.parametrize("margin", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_loss_and_gradient_stay_finite(name, margin):
    """p -> 0 at a margin of -200, p -> 1 at 200."""
    logits = torch.tensor([[margin, 0.0, 0.0]], requires_grad=True)
    value = loss(LossConfig(name=name), logits, torch.tensor([0]), epoch=3, epochs=4)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    if margin == -200:
        assert logits.grad[0, 0] < -0.5, "a hopeless sample still pulls"


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "poly", "two_stage"])
def test_loss_of_half_precision_logits_is_float32(name):
    value = loss(LossConfig(name=name), torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0]), epoch=1, epochs=4)
    assert value.dtype == torch.float32


def test_two_stage_turns_at_a_quarter():
    config, logits, labels = LossConfig(name="two_stage"), torch.randn(9, 5), torch.arange(9) % 5
    plain = loss(LossConfig(), logits, labels, epoch=1, epochs=100)
    assert torch.equal(loss(config, logits, labels, epoch=25, epochs=100), plain)
    focal = loss(LossConfig(name="focal"), logits, labels, epoch=1, epochs=100)
    just_after = loss(config, logits, labels, epoch=26, epochs=100)
    assert abs(just_after - focal) < 0.1 * abs(plain - focal), "xi starts at 0, where the loss is focal"
