"""The network against a plain reference of its modules; its counts are tested with the paper's rows."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ffn.config import PRESETS, ModelConfig
from ffn.errors import FFNError
from ffn.layouts import COCO17, KINECT20, NTU25
from ffn.model.attention import AFF, CVSTA, DropAttention, MSCAMGate
from ffn.model.common import NormedConv2d
from ffn.model.graph import spatial_adjacency
from ffn.model.network import RIVALS, Network, build
from ffn.model.spatial import SpatialShift, aggregate, graph_conv
from ffn.model.temporal import MSFTCN


@pytest.mark.parametrize(("layout", "entries"), [(COCO17, [17, 22, 10]), (NTU25, [25, 40, 8])])
def test_adjacency_has_the_published_entries(layout, entries):
    adjacency = spatial_adjacency(layout)
    assert (adjacency != 0).sum((1, 2)).tolist() == entries
    np.testing.assert_allclose(adjacency.sum((0, 1)), 1, rtol=1e-6)


@pytest.mark.parametrize("layout", [COCO17, NTU25, KINECT20])
def test_layouts_are_trees_over_named_joints(layout):
    count = len(layout.joints)
    assert len(set(layout.joints)) == count == len(layout.parents)
    assert len(layout.edges) == count - 1
    reached = {layout.center}
    for _ in range(count):
        reached |= {a for v, p in layout.edges for a in (v, p) if v in reached or p in reached}
    assert reached == set(range(count))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", [COCO17, NTU25])
def test_forward_and_backward(name, layout):
    config = replace(PRESETS[name].model, width=16)
    network = build(config if config.network != "ffn" else replace(config, depths=(2, 1)), layout, 5)
    logits = network(torch.randn(3, 2, 12, len(layout.joints), 3))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_knows_no_setting_of_ffn(name):
    config = ModelConfig(network=name, width=16)
    with pytest.raises(FFNError, match=r"model\.depths"):
        build(replace(config, depths=(1, 1)), COCO17, 3)


def test_persons_are_averaged():
    network = Network(replace(PRESETS["S4"].model, width=16, depths=(1, 1)), NTU25, 4).eval()
    x = torch.randn(2, 2, 10, 25, 3)
    with torch.inference_mode():
        one_by_one = (network(x[:, :1]) + network(x[:, 1:])) / 2
        torch.testing.assert_close(network(x), one_by_one, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(network(x), network(x.flip(1)), atol=1e-6, rtol=1e-5)


def test_aggregate_is_the_einsum():
    x, adjacency = torch.randn(4, 3 * 6, 5, 17), torch.randn(3, 17, 17)
    expected = torch.einsum("bsctv,svw->bctw", x.view(4, 3, 6, 5, 17), adjacency)
    torch.testing.assert_close(aggregate(x, adjacency), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(aggregate(x.to(memory_format=torch.channels_last), adjacency), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("wide", "narrow"), [(3, 8), (8, 8), (8, 4)])
def test_graph_conv_is_the_convolution_then_the_graph_whichever_comes_first(wide, narrow):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(wide, 3 * narrow, 1).double()
    adjacency = torch.rand(3, 5, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, wide, 7, 5, dtype=torch.float64, requires_grad=True)
    parts = conv(x).view(2, 3, narrow, 7, 5)
    expected = torch.einsum("bsctv,svw->bctw", parts, adjacency)
    assert torch.allclose(graph_conv(x, conv, adjacency), expected, atol=1e-12)
    weights = torch.randn_like(expected)
    of = (x, adjacency, conv.weight, conv.bias)
    ours = torch.autograd.grad((graph_conv(x, conv, adjacency) * weights).sum(), of)
    for mine, other in zip(ours, torch.autograd.grad((expected * weights).sum(), of), strict=True):
        assert torch.allclose(mine, other, atol=1e-11)


@pytest.mark.parametrize(
    "shape", [{"kernel_size": (3, 1), "padding": (1, 0), "stride": (2, 1)}, {"kernel_size": 1, "stride": (2, 1)}]
)
def test_before_a_batch_norm_a_bias_has_no_gradient(shape):
    torch.manual_seed(0)
    ours = torch.nn.Sequential(NormedConv2d(4, 6, **shape), torch.nn.BatchNorm2d(6)).double()
    plain = torch.nn.Sequential(torch.nn.Conv2d(4, 6, **shape), torch.nn.BatchNorm2d(6)).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, 9, 5, dtype=torch.float64)
    for network in (ours, plain):
        network(x).square().mul(torch.arange(6).view(1, 6, 1, 1)).tanh().sum().backward()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-12)
    assert torch.equal(ours[0].bias.grad, torch.zeros(6))
    assert torch.allclose(ours[1].running_mean, plain[1].running_mean)
    assert torch.allclose(ours.eval()(x), plain.eval()(x))


def test_spatial_shift_is_equation_2():
    torch.manual_seed(0)
    module = SpatialShift(6, 4, joints=5, alpha=0.2).eval()
    torch.nn.init.normal_(module.mask)
    x = torch.randn(2, 6, 3, 5)
    shifted = torch.zeros_like(x)
    for c in range(6):
        for v in range(5):
            mask = torch.tanh(module.mask[v, c]) + 1
            shifted[:, c, :, v] = (x[:, c, :, (v + c) % 5] - 0.2 * x[:, c, :, v]) * mask
    expected = torch.einsum("oc,bctv->botv", module.conv.weight[:, :, 0, 0], shifted) / (1 + module.norm.eps) ** 0.5
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_spatial_shift_has_the_gradients_of_equation_2(alpha):
    torch.manual_seed(0)
    module = SpatialShift(6, 4, joints=5, alpha=alpha).double()
    mask = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, mask: torch.func.functional_call(module, {"mask": mask}, (x,)), (x, mask))


def test_spatial_shift_is_the_same_where_it_is_not_trained():
    """In training its gradients are written by hand; elsewhere the plain expression stands, which can be exported."""
    torch.manual_seed(0)
    module = SpatialShift(6, 4, joints=5, alpha=0.2).double()
    torch.nn.init.normal_(module.mask)
    module.norm.eval()  # the same statistics in both
    found = []
    for training in (True, False):
        module.training = training
        x = torch.linspace(-1, 1, 180, dtype=torch.float64).sin().view(2, 6, 3, 5).requires_grad_()
        y = module(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, module.mask))))
    for trained, plain in zip(*found, strict=True):
        torch.testing.assert_close(trained, plain)


@pytest.mark.parametrize("stride", [1, 2])
def test_msf_tcn_is_its_branches(stride):
    """Branch by branch, with the horizontal connections from large to small receptive fields."""
    torch.manual_seed(0)
    module = MSFTCN(16, stride=stride).eval()
    x = torch.randn(2, 16, 20, 5)
    conv, norm = module.enter[0], module.enter[1]
    outputs = []
    for branch in range(7):
        group = slice(2 * branch, 2 * branch + 2)
        entered = torch.einsum("oc,bctv->botv", conv.weight[group, :, 0, 0], x[:, group]) + conv.bias[group, None, None]
        entered = torch.relu(entered / (1 + norm.eps) ** 0.5)
        if branch < 5:
            out = torch.nn.functional.conv2d(
                entered, module.dilated[branch].weight, module.dilated[branch].bias, (stride, 1), (5 - branch, 0), (5 - branch, 1)
            )
            outputs.append(out + outputs[-1] if outputs else out)
        elif branch == 5:
            outputs.append(torch.nn.functional.max_pool2d(entered, (3, 1), (stride, 1), (1, 0)))
        else:
            outputs.append(torch.nn.functional.avg_pool2d(entered, (3, 1), (stride, 1), (1, 0)))
    outputs.append(torch.nn.functional.conv2d(x[:, 14:], module.point.weight, module.point.bias, (stride, 1)))
    torch.testing.assert_close(module(x), module.fuse(torch.cat(outputs, 1)), atol=1e-5, rtol=1e-5)


def test_aff_is_equation_4():
    module = AFF(8, reduction=2, stride=1).eval()
    x, y = torch.randn(2, 2, 8, 6, 5)
    m = module.weights(x + y)
    assert ((m > 0) & (m < 1)).all()
    torch.testing.assert_close(module(x, y), x * m + y * (1 - m), atol=1e-6, rtol=1e-5)


def test_ms_cam_is_equation_3():
    torch.manual_seed(0)
    module = MSCAMGate(8, reduction=2).eval()
    x = torch.randn(2, 8, 6, 5)
    inside = module.weights.local(x) + module.weights.globally(x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(module(x, torch.randn_like(x)), x * torch.sigmoid(inside), atol=1e-6, rtol=1e-5)


def test_cvsta_weighs_frames_and_joints_apart():
    torch.manual_seed(0)
    module = CVSTA(8).eval()
    x = torch.randn(2, 8, 6, 5)
    expected = torch.empty_like(x)
    for t in range(6):
        for v in range(5):
            frame = module.frames(module.enter(x[:, :, t].mean(2)[..., None, None]))
            joint = module.joints(module.enter(x[..., v].mean(2)[..., None, None]))
            expected[:, :, t, v] = x[:, :, t, v] * (frame * joint)[..., 0, 0]
    torch.testing.assert_close(module(x, torch.randn_like(x)), expected, atol=1e-6, rtol=1e-5)


def test_drop_attention_hides_what_stands_out():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 6, 5))
    x[1, :, :, 2] += 6  # one joint that stands out as a whole
    square = (x - x.mean((2, 3), keepdims=True)) ** 2
    a = 1 / (1 + np.exp(-(square / (4 * (square.sum((2, 3), keepdims=True) / 29 + 1e-4)) + 0.5)))
    joints, entries = a.mean((1, 2)) < 0.7, a < 0.7
    assert not joints[1, 2]
    assert 0 < entries.mean() < joints.mean() < 1
    kept = entries & joints[:, None, None]
    expected = np.where(kept, x / joints.mean() / entries.mean(), 0)

    module, tensor = DropAttention(), torch.tensor(x, dtype=torch.float32)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    np.testing.assert_allclose(module(tensor, tensor), expected, rtol=1e-5)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn by chance"
    assert torch.equal(module.eval()(tensor, tensor), tensor)
    assert not list(module.parameters())
    flat = module.train()(torch.ones(2, 4, 6, 5), tensor)
    assert torch.equal(flat, torch.ones(2, 4, 6, 5)), "an absent person has nothing that stands out"


@pytest.mark.slow
def test_narrow_networks_train_on_two_threads_with_batches_of_two_sizes():
    """In a process of its own: what this guards against ends the process (oneDNN's strided 1x1 convolution of two channels)."""
    code = """
import torch
from dataclasses import replace
from ffn.config import PRESETS
from ffn.layouts import KINECT20
from ffn.model.network import build
torch.set_num_threads(2)
network = build(replace(PRESETS["S4"].model, width=16, depths=(1, 1)), KINECT20, 10)
for step in range(60):
    network(torch.randn(15 + step % 2, 1, 32, 20, 3)).square().sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
