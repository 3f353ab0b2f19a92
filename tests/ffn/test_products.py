"""Sums of normalised features, and products of them, are the modules' one after another."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from ffn.model.persons import BatchNorm1d, BatchNorm2d
from ffn.model.products import Sum, fits
from ffn.model.statistics import normalised, plain
from tests.ffn.test_fused import features, norm_of

B, C, T, V, N = 5, 16, 7, 7, 32


def gradients_of(work, inputs, weight, norms):
    """Everything `work` makes, the gradients of what it takes and the norms' statistics, of copies."""
    inputs, norms = [x.detach().clone().requires_grad_() for x in inputs], copy.deepcopy(norms)
    weight = weight.detach().clone().requires_grad_()
    made = [y for y in work(inputs, weight, norms) if y is not None]
    total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).sin()).sum() for y in made)
    total.backward()
    every = [*inputs, weight, *(value for norm in norms for value in norm.parameters())]
    return [y.detach() for y in made] + [x.grad for x in every] + [value for norm in norms for value in norm.buffers()]


def modules_sum(x, norms, relu):
    y = sum(
        norm(part) if isinstance(norm, BatchNorm2d)
        else norm(part.permute(0, 2, 3, 1).reshape(B * T, V * C)).view(B, T, V, C).permute(0, 3, 1, 2)
        for part, norm in zip(x, norms, strict=False)
    ) + (x[len(norms)] if len(x) > len(norms) else 0)  # fmt: skip
    return y.relu() if relu else y


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize(("copies", "pooled"), [(0, False), (1, True), (2, False)])
@pytest.mark.parametrize(("kinds", "residual", "relu"), [
    ((BatchNorm2d,), False, True), ((BatchNorm2d,), True, False), ((BatchNorm2d, BatchNorm1d), True, True),
])  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_a_product_of_a_sum(kinds, residual, relu, copies, pooled, groups, times):
    torch.manual_seed(0)
    inputs = [features(B, C, T, V) for _ in range(len(kinds) + residual)]
    outputs = C if groups > 1 else N
    norms = [norm_of(kind, C if kind is BatchNorm2d else V * C, times=times) for kind in kinds]
    norms.append(norm_of(BatchNorm2d, outputs, times=times))
    weight, bias = torch.randn(outputs, C // groups, 1, 1, dtype=torch.double), torch.randn(outputs, dtype=torch.double)
    assert fits(inputs[0], C, outputs)

    def work(x, weight, norms):
        *of, last = norms
        terms = tuple(normalised(part, norm) for part, norm in zip(x, of, strict=False))
        made, others = Sum(terms, x[-1] if residual else None, relu).product(weight, bias, last, copies=copies, pooled=pooled)
        return [Sum((made,), relu=False).total(), *others]

    def plainly(x, weight, norms):
        *of, last = norms
        y = modules_sum(x, of, relu)
        return [last(functional.conv2d(y, weight, bias, groups=groups)), *[y] * copies, *[y.sum((2, 3))] * pooled]

    got, expected = gradients_of(work, inputs, weight, norms), gradients_of(plainly, inputs, weight, norms)
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=number: f"value {n}: {m}")


def test_features_as_they_are():
    torch.manual_seed(0)
    x = features(B, C, T, V)
    y = Sum((plain(x),), relu=False).total()
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_gradients_of_several_passes_add_up():
    """The statistics of one pass are not another's."""
    torch.manual_seed(0)
    norm, conv, last = norm_of(BatchNorm2d, C), nn.Conv2d(C, N, 1).double(), norm_of(BatchNorm2d, N)
    clips = [features(B, C, T, V) for _ in range(2)]

    def passed(x):
        made, _ = Sum((normalised(x, norm),)).product(conv.weight, conv.bias, last)
        return Sum((made,)).total().square().sum()

    apart = []
    for x in clips:
        passed(x).backward()
        apart.append(conv.weight.grad.clone())
        conv.weight.grad = None
    (passed(clips[0]) + passed(clips[1])).backward()
    torch.testing.assert_close(conv.weight.grad, sum(apart))


@pytest.mark.slow
def test_who_compiles_gets_the_numbers_of_who_finds_it_done(tmp_path: Path) -> None:
    """A training that goes on in another process goes on to the bit."""
    code = """
import hashlib, torch
from ffn.layouts import COCO17
from ffn.model.graph import spatial_adjacency
from ffn.model.spatial import ESFGCN
torch.manual_seed(0)
module = ESFGCN(32, 32, torch.from_numpy(spatial_adjacency(COCO17)), alpha=0.2)
summed, _ = module.sum(torch.randn(3, 32, 9, 17).contiguous(memory_format=torch.channels_last))
summed.total().square().sum().backward()
digest = hashlib.sha256(b"".join(value.grad.numpy().tobytes() for value in module.parameters()))
print(digest.hexdigest())
"""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    said = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert said[0] == said[1]
