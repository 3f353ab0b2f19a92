"""One absent person for all: the same logits, gradients and statistics as working each of them out."""

import pytest
import torch

from ffn.config import override, preset
from ffn.layouts import COCO17
from ffn.losses import loss
from ffn.model.network import build
from ffn.model.persons import Counting, pooled

NETWORKS = ("S0", "S4", "S3-mscam", "S3-cvsta", "S3-drop", "ST-GCN++", "2s-AGCN", "AAGCN", "CTR-GCN", "MS-G3D")
PERSONS = [2, 1, 0, 1, 1, 2]
"""Of each clip: one shows nobody."""


def clips_of(persons: list[int], **options) -> torch.Tensor:
    clips = torch.randn(len(persons), 2, 12, 17, 3, generator=torch.Generator().manual_seed(0), **options)
    for clip, count in zip(clips, persons, strict=True):
        clip[count:] = 0
    return clips


def network_of(name: str):
    torch.manual_seed(1)
    return build(override(preset(name), ["model.width=8"]).model, COCO17, 5)


def one_pass(network, clips):
    """Logits, gradients, and what the batch-norms keep."""
    torch.manual_seed(2)  # dropout
    logits = network(clips)
    if logits.requires_grad:
        labels = torch.arange(len(clips)) % 5
        torch.autograd.backward(loss(preset("S4").loss, logits, labels, epoch=1, epochs=2))
    gradients = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    return {"logits": logits.detach()} | gradients | dict(network.named_buffers())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_absent_person_stands_for_all(name, training, monkeypatch):
    clips = clips_of(PERSONS, dtype=torch.double)
    ours, plain = network_of(name).double().train(training), network_of(name).double().train(training)
    rows = []
    ours.blocks.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    got = one_pass(ours, clips)
    assert rows == [sum(PERSONS) + 2]  # with the clip of nobody, and the one for all
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        expected = one_pass(plain, clips)
    assert list(got) == list(expected)
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for what, tensor in expected.items():
        torch.testing.assert_close(got[what], tensor, rtol=1e-7, atol=1e-9 * scale, msg=f"{name}: {what}")


def test_float32_and_the_network_as_it_was_before():
    """Nothing is left behind: the next batch, of pairs only, is worked out as if there had been no other."""
    ours, plain = network_of("S4"), network_of("S4")
    pairs = clips_of([2, 2, 2])
    ours(clips_of(PERSONS))
    assert all(module.times == 1 for module in ours.modules() if isinstance(module, Counting))
    torch.testing.assert_close(ours(pairs), plain(pairs), rtol=0, atol=0)


def test_an_error_leaves_nothing_behind():
    network = network_of("S4")
    with pytest.raises(RuntimeError):
        pooled(network.blocks, torch.randn(12, 4, 12, 17), clips_of(PERSONS))  # three channels are expected
    assert all(module.times == 1 for module in network.modules() if isinstance(module, Counting))
