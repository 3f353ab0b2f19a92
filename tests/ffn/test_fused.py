"""The compiled passes of training compute what the modules do one by one: outputs, gradients and running statistics."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ffn.config import override, preset
from ffn.layouts import COCO17
from ffn.model import fused, fusion_loops
from ffn.model.fused import normal_sum, shifted
from ffn.model.network import build
from ffn.model.persons import BatchNorm1d, BatchNorm2d
from ffn.model.products import Sum
from ffn.model.statistics import normalised

B, C, T, V = 5, 16, 8, 7  # frames that parts of samples do not share evenly


def features(*shape: int, dtype: torch.dtype = torch.double) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def norm_of(kind: type, count: int, *, times: int = 1, dtype: torch.dtype = torch.double):
    norm = kind(count).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.samples, norm.times = B, times
    return norm


def outcome(work, inputs, norms):
    """Output, gradients, statistics of `work(inputs, norms)` on copies."""
    inputs, norms = [x.detach().clone().requires_grad_() for x in inputs], copy.deepcopy(norms)
    y = work(inputs, norms)
    kept = y.detach().clone()
    gradient = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).sin()
    y.backward(gradient)
    gradients = [x.grad for x in inputs] + [value.grad for norm in norms for value in norm.parameters()]
    return [kept, *gradients, *(value for norm in norms for value in norm.buffers())]


def require_the_modules(work, inputs, norms, monkeypatch, *, tolerance: float = 1e-10) -> None:
    got = outcome(work, inputs, norms)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "fusable", lambda x, training: False)
        expected = outcome(work, inputs, norms)
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=number: f"value {n}: {m}")


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("terms", [(BatchNorm2d,), (BatchNorm1d,), (BatchNorm2d, BatchNorm1d)])
def test_a_sum_of_normalised_terms(terms, residual, relu, times, monkeypatch):
    torch.manual_seed(0)
    norms = [norm_of(kind, C if kind is BatchNorm2d else V * C, times=times) for kind in terms]
    inputs = [features(B, C, T, V) for _ in range(len(terms) + residual)]

    def work(x, norms):
        return normal_sum(*zip(x, norms, strict=False), residual=x[-1] if residual else None, relu=relu)

    require_the_modules(work, inputs, norms, monkeypatch)


def test_float32_keeps_its_digits_far_from_zero(monkeypatch):
    """The variance of numbers that lie far from zero is not the difference of two large sums.

    Without a ReLU: rounding decides what is above zero.
    """
    torch.manual_seed(0)
    x = (1000 + torch.randn(B, C, 50, V)).requires_grad_()
    norm = norm_of(BatchNorm2d, C, dtype=torch.float32)
    got = outcome(lambda x, norms: normal_sum((x[0], norms[0]), relu=False), [x], [norm])
    expected = outcome(lambda x, norms: normal_sum((x[0], norms[0]), relu=False), [x.double()], [norm.double()])
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=1e-3, atol=1e-3)
    with_relu = outcome(lambda x, norms: normal_sum((x[0], norms[0])), [x], [norm])
    torch.testing.assert_close(with_relu[0].double(), expected[0].relu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.2, 0.0])
def test_the_gradient_of_a_shift_is_autograds(alpha):
    torch.manual_seed(0)
    joint, channel = torch.arange(V)[:, None], torch.arange(C)
    source, target = (((joint + way * channel) % V * C + channel).view(-1) for way in (1, -1))
    inputs = [features(B, C, T, V), torch.randn(V * C, dtype=torch.double)]
    for mine, theirs in zip(
        *(outcome(lambda x, norms, t=t: shifted(*x, alpha, source, target, training=t), inputs, []) for t in (True, False)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 2, 12, 13])
@pytest.mark.parametrize("name", ["S4", "S2", "S3-aff4", "S0"])
def test_a_network_with_and_without(name, frames, monkeypatch):
    """Every person is there: one who is not is alike in many frames, and rounding decides which is the largest of them."""
    torch.manual_seed(0)
    network = build(override(preset(name), ["model.width=8"]).model, COCO17, 5).double()
    clips = torch.randn(3, 2, frames, 17, 3).double()

    def passed():
        made = copy.deepcopy(network)
        logits = made(clips)
        logits.square().sum().backward()
        return [logits.detach(), *(value.grad for value in made.parameters()), *made.buffers()]

    got = passed()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        expected = passed()
    scale = max(float(value.abs().max()) for value in expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("width", [8, 16])
def test_a_network_of_which_a_part_fits(width):
    """Some of its channels are not whole vectors: what takes them are modules, between others that are not."""
    torch.manual_seed(0)
    network = build(override(preset("S4"), [f"model.width={width}"]).model, COCO17, 5)
    clips = torch.randn(3, 2, 12, 17, 3)
    torch.testing.assert_close(
        copy.deepcopy(network)(clips), copy.deepcopy(network).double()(clips.double()).float(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("width", [1, 4, 6, 8, 16])
def test_branches_side_by_side_are_torchs_convolutions_and_poolings(width, times):
    """Whole numbers, so that a maximum is often found twice; the widths make panels of every size."""
    torch.manual_seed(0)
    norms = [norm_of(BatchNorm2d, count * width, times=times) for count in (7, 8)]
    dilations = (5, 4, 3, 2, 1)
    for frames, stride in ((7, 1), (8, 2), (7, 2), (1, 2), (2, 2), (19, 1)):
        x = torch.randint(0, 3, (B, 8 * width, frames, V)).double().contiguous(memory_format=torch.channels_last)
        inputs = [x, torch.randn(5, width, width, 3, 1, dtype=torch.double)]
        bias = torch.randn(5, width, dtype=torch.double)

        def plain(x, norms, stride=stride, bias=bias):
            entered = norms[0](x[0][:, : 7 * width]).relu()
            *groups, to_max, to_mean = entered.chunk(7, 1)
            convolved = [
                nn.functional.conv2d(group, x[1][k], bias[k], (stride, 1), (dilation, 0), (dilation, 1))
                for k, (group, dilation) in enumerate(zip(groups, dilations, strict=True))
            ]
            for k in range(1, 5):
                convolved[k] = convolved[k] + convolved[k - 1]
            pools = nn.MaxPool2d((3, 1), (stride, 1), (1, 0))(to_max), nn.AvgPool2d((3, 1), (stride, 1), (1, 0))(to_mean)
            return norms[1](torch.cat([*convolved, *pools, x[0][:, 7 * width :, ::stride]], 1))

        def compiled(x, norms, stride=stride, bias=bias):
            first = normalised(x[0], norms[0])
            made = fused.branches(first, x[1], bias, norms[1], dilations=dilations, stride=stride)
            return Sum((made,), relu=False).total()

        got = outcome(compiled, inputs, norms)
        for mine, theirs in zip(got, outcome(plain, inputs, norms), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_the_sigmoid_is_torchs():
    x = torch.cat([torch.linspace(-110, 110, 20001), torch.tensor([0.0, 1e-30, -1e-30])])
    got = torch.tensor([float(fusion_loops._sigmoid(np.float32(value))) for value in x.tolist()])
    torch.testing.assert_close(got, x.sigmoid(), rtol=1e-6, atol=1e-37)


def test_what_is_not_a_number_stays_so():
    norm = norm_of(BatchNorm2d, C, dtype=torch.float32)
    x = torch.randn(B, C, T, V)
    x[0, 3, 0, 0] = torch.nan
    y = normal_sum((x, norm))
    assert y[:, 3].isnan().all()
    assert not y[:, :3].isnan().any()


def test_numbers_do_not_depend_on_threads():
    torch.manual_seed(0)
    network = build(preset("S4-small").model, COCO17, 5)
    clips, before, found = torch.randn(2, 2, 16, 17, 3), torch.get_num_threads(), []
    norm, x = norm_of(BatchNorm2d, 64, dtype=torch.float32), features(8, 64, 20, 17, dtype=torch.float32)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(outcome(lambda x, norms: normal_sum((x[0], norms[0]), residual=x[1]), [x, x], [norm]))
            copy.deepcopy(network)(clips).sum().backward()
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_the_loops_leave_torch_its_threads():
    """numba's threads are OpenMP's, as torch's are: when it starts them it would set their number to that of the cores."""
    code = (
        "import torch; torch.set_num_threads(1); \n"
        "from ffn.model.fused import normal_sum; from ffn.model.persons import BatchNorm2d\n"
        "normal_sum((torch.randn(2, 4, 3, 3), BatchNorm2d(4))); print(torch.get_num_threads())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["1"], said
