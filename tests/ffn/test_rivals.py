"""The rivals of Table 8 against their published counts and a plain reference of what is characteristic of each."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional

from ffn.errors import FFNError
from ffn.layouts import COCO17, KINECT20, NTU25
from ffn.model.rivals.aagcn import AAGCN, STCAttention
from ffn.model.rivals.agcn import AGCN, AdaptiveGCN
from ffn.model.rivals.common import PersonNorm, TemporalBranches, directed_adjacency
from ffn.model.rivals.ctrgcn import CTRGC, CTRGCN
from ffn.model.rivals.msg3d import G3D, MSG3D, gather, hop_distances, scale_adjacency, windowed_hops, windows
from ffn.model.rivals.stgcnpp import STGCNPP, ResidualGCN

# parameters; multiply-accumulates, G, without batch-norm and with it (60 classes, one clip of M=2, T=100, V=17). The
# first is what the counts of the rivals' own code hold (1.93, 4.34, 4.34, 1.94, 6.81), the second is FFN's convention.
COUNTS = {
    STGCNPP: (1_393_016, 1.9264, 1.9477),
    AGCN: (3_459_344, 4.3361, 4.3488),
    AAGCN: (3_760_228, 4.3388, 4.3515),
    CTRGCN: (1_436_496, 1.9355, 1.9521),
    MSG3D: (2_975_763, 6.8101, 6.8396),
}


@pytest.mark.parametrize("rival", COUNTS)
def test_counts_of_their_own_code(rival):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        network = rival(COCO17, 60).eval()
        analysis = FlopCountAnalysis(network, torch.zeros(1, 2, 100, 17, 3))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        total, norms = analysis.total() / 1e9, analysis.by_operator()["batch_norm"] / 1e9
    parameters, without_norms, with_norms = COUNTS[rival]
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert total - norms == pytest.approx(without_norms, abs=1e-4)
    assert total == pytest.approx(with_norms, abs=1e-4)


@pytest.mark.parametrize("rival", COUNTS)
@pytest.mark.parametrize("layout", [COCO17, NTU25, KINECT20])
def test_forward_and_backward(rival, layout):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    try:
        network = rival(layout, 5, width=8)
        logits = network(torch.randn(2, 2, 9, len(layout.joints), 3))
        logits.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.shape == (2, 5)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("rival", COUNTS)
def test_persons_are_averaged(rival):
    torch.manual_seed(0)
    network = rival(NTU25, 4, width=8).eval()
    x = torch.randn(2, 2, 10, 25, 3)
    with torch.inference_mode():
        one_by_one = (network(x[:, :1]) + network(x[:, 1:])) / 2
        torch.testing.assert_close(network(x), one_by_one, atol=1e-6, rtol=1e-5)


def test_person_norm_keeps_the_persons_apart():
    torch.manual_seed(0)
    x = torch.stack([torch.randn(4, 6, 5, 3), 10 + 3 * torch.randn(4, 6, 5, 3)], 1)  # (N, M, T, V, C)
    y = PersonNorm(5, 3)(x).view(4, 2, 3, 6, 5)
    torch.testing.assert_close(y.mean((0, 3)), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 3), correction=0), torch.ones(2, 3, 5), atol=1e-3, rtol=0)
    alone = PersonNorm(5, 3)
    torch.testing.assert_close(alone(x[:, :1]).view(4, 3, 6, 5), y[:, 0])
    with pytest.raises(FFNError, match=r"clip\.persons=3"):
        alone(torch.zeros(1, 3, 6, 5, 3))


@pytest.mark.parametrize("layout", [COCO17, NTU25, KINECT20])
def test_directed_adjacency_is_self_parent_children(layout):
    own, parent, children = directed_adjacency(layout)
    np.testing.assert_array_equal(own, np.eye(len(own)))
    assert np.count_nonzero(parent) == np.count_nonzero(children) == len(layout.edges)
    for v, p in layout.edges:
        assert parent[p, v] == 1
        assert children[v, p] == pytest.approx(1 / sum(q == p for _, q in layout.edges))


@pytest.mark.parametrize("stride", [1, 2])
def test_temporal_branches_are_the_branches(stride):
    torch.manual_seed(0)
    module = TemporalBranches(6, 13, kernel=3, dilations=(1, 2, 3), stride=stride).eval()
    x = torch.randn(2, 6, 9, 4)
    conv, norm = module.enter[0], module.enter[1]
    entered = (
        torch.relu(torch.einsum("oc,bctv->botv", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]) / (1 + norm.eps) ** 0.5
    )
    groups = [entered[:, :5], entered[:, 5:7], entered[:, 7:9], entered[:, 9:11]]
    expected = [
        functional.conv2d(group, module.dilated[i].weight, module.dilated[i].bias, (stride, 1), (i + 1, 0), (i + 1, 1))
        for i, group in enumerate(groups[:3])
    ]
    expected.append(functional.max_pool2d(groups[3], (3, 1), (stride, 1), (1, 0)))
    expected.append(functional.conv2d(x, module.point.weight, module.point.bias, (stride, 1)))
    torch.testing.assert_close(module(x), torch.cat(expected, 1), atol=1e-5, rtol=1e-5)


def test_stgcnpp_gcn_has_a_free_adjacency_and_a_residual():
    torch.manual_seed(0)
    module = ResidualGCN(4, 4, torch.rand(3, 5, 5)).eval()
    x = torch.randn(2, 4, 3, 5)
    y = module.conv(x).view(2, 3, 4, 3, 5)
    expected = torch.relu(torch.einsum("bsctv,svw->bctw", y, module.adjacency) / (1 + module.norm.eps) ** 0.5 + x)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def test_agcn_computes_a_graph_for_every_clip():
    torch.manual_seed(0)
    module = AdaptiveGCN(3, 8, torch.rand(3, 5, 5)).eval()
    torch.nn.init.constant_(module.gate, 0.7)
    torch.nn.init.ones_(module.norm.weight)
    x = torch.randn(2, 3, 4, 5)
    query, key = module.query(x), module.key(x)  # subset s has channels 2s and 2s + 1
    graphs = module.adjacency.expand(2, 3, 5, 5).clone()
    for b, s, v, w in np.ndindex(2, 3, 5, 5):
        own = slice(2 * s, 2 * s + 2)
        graphs[b, s, v, w] += 0.7 * torch.tanh((query[b, own, :, v] * key[b, own, :, w]).sum() / (2 * 4))
    torch.testing.assert_close(module.topology(x), graphs, atol=1e-6, rtol=1e-5)
    y = sum(module.values[s](torch.einsum("bctv,bvw->bctw", x, graphs[:, s])) for s in range(3))
    expected = torch.relu(y / (1 + module.norm.eps) ** 0.5 + module.residual(x))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("joints", [5, 6])
def test_aagcn_attends_to_joints_then_frames_then_channels(joints):
    torch.manual_seed(0)
    module = STCAttention(4, joints=joints)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 12, joints)

    def along(conv, means):  # (B, C, L) -> (B, L), position by position
        reach = conv.kernel_size[0] // 2
        padded = functional.pad(means, (reach, reach))
        places = [(padded[:, :, i : i + 2 * reach + 1] * conv.weight[0]).sum((1, 2)) + conv.bias for i in range(means.shape[2])]
        return torch.stack(places, 1)

    y = x + x * torch.sigmoid(along(module.joints, x.mean(2)))[:, None, None, :]
    y = y + y * torch.sigmoid(along(module.frames, y.mean(3)))[:, None, :, None]
    hidden = torch.relu(y.mean((2, 3)) @ module.squeeze.weight.T + module.squeeze.bias)
    y = y + y * torch.sigmoid(hidden @ module.excite.weight.T + module.excite.bias)[:, :, None, None]
    torch.testing.assert_close(module(x), y, atol=1e-5, rtol=1e-5)


def test_ctrgcn_refines_the_graph_for_every_channel():
    torch.manual_seed(0)
    module = CTRGC(3, 4, torch.rand(3, 5, 5)).eval()
    torch.nn.init.constant_(module.gate, 0.7)
    torch.nn.init.ones_(module.norm.weight)
    x = torch.randn(2, 3, 6, 5)
    phi, psi, value = module.phi(x).mean(2), module.psi(x).mean(2), module.value(x)
    graphs, y = torch.zeros(2, 3, 4, 5, 5), torch.zeros(2, 4, 6, 5)
    for b, s, c, v, w in np.ndindex(graphs.shape):
        own, out = slice(8 * s, 8 * s + 8), 4 * s + c
        relation = torch.tanh(phi[b, own, v] - psi[b, own, w])
        refined = module.refine.weight[out, :, 0, 0] @ relation + module.refine.bias[out]
        graphs[b, s, c, v, w] = module.adjacency[s, v, w] + 0.7 * refined
        y[b, c, :, w] += value[b, out, :, v] * graphs[b, s, c, v, w]
    torch.testing.assert_close(module.topology(x), graphs, atol=1e-5, rtol=1e-5)
    expected = torch.relu(y / (1 + module.norm.eps) ** 0.5 + module.residual(x))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


def disentangled(near, k):
    """MS-G3D's k-adjacency by matrix powers: what k steps reach and k - 1 do not, and the joint itself, normalised."""
    own = np.eye(len(near))
    graph = (
        own if k == 0 else np.minimum(np.linalg.matrix_power(near, k), 1) - np.minimum(np.linalg.matrix_power(near, k - 1), 1) + own
    )
    root = np.diag(graph.sum(1) ** -0.5)
    return root @ graph @ root


@pytest.mark.parametrize("layout", [COCO17, NTU25, KINECT20])
@pytest.mark.parametrize(("window", "scales"), [(1, 13), (3, 6), (5, 6)])
def test_msg3d_graphs_are_disentangled(layout, window, scales):
    hops = hop_distances(layout)
    near = np.tile(hops <= 1, (window, window)).astype(float)
    graphs = scale_adjacency(windowed_hops(hops, window), scales)
    for k in range(scales):
        np.testing.assert_allclose(graphs[k], disentangled(near, k), atol=1e-6)


@pytest.mark.parametrize(("window", "stride", "frames"), [(3, 1, 6), (3, 2, 6), (5, 2, 7)])
def test_msg3d_windows_are_an_unfold(window, stride, frames):
    x = torch.randn(2, 3, frames, 4)
    unfolded = functional.unfold(x, (window, 1), padding=(window // 2, 0), stride=(stride, 1)).view(2, 3, window, -1, 4)
    torch.testing.assert_close(windows(x, window, stride=stride), unfolded.transpose(2, 3).flatten(3))


def test_msg3d_gathers_every_scale_and_collapses_the_window():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 17)
    module = G3D(3, 4, 5, hop_distances(COCO17), window=3, stride=2).eval()
    torch.nn.init.normal_(module.gcn.mask)
    graphs = module.gcn.adjacency + module.gcn.mask
    unfolded = windows(x, 3, stride=2)
    gathered = torch.einsum("bctv,svw->bsctw", unfolded, graphs).flatten(1, 2)
    torch.testing.assert_close(gather(unfolded, graphs), gathered, atol=1e-5, rtol=1e-5)
    hidden = torch.relu(module.gcn.conv(gathered) / (1 + module.norm.eps) ** 0.5).view(2, 4, 3, 3, 17)  # (B, C, T', window, V)
    expected = functional.conv3d(hidden, module.collapse.weight[:, :, None], module.collapse.bias).squeeze(3)
    torch.testing.assert_close(module(x), expected / (1 + module.norm.eps) ** 0.5, atol=1e-5, rtol=1e-5)
