"""The plain networks and ours are the same function; the benchmark notices where they are not."""

import pytest
import torch

from benchmarks import network
from ffn.errors import FFNError


@pytest.mark.slow
@pytest.mark.parametrize("name", ["S0", "S4"])
def test_ours_and_the_plain_network_have_the_same_logits_and_gradients(name):
    network.require_same(name)


def test_another_computation_is_not_timed(monkeypatch):
    made = network.network

    def other(name):
        changed = made(name)
        changed.blocks[3].spatial.shift.alpha = 0.21
        return changed

    monkeypatch.setattr(network, "network", other)
    with pytest.raises(FFNError, match="logits of S4"):
        network.require_same("S4")


def test_what_is_kept_counts_memory_once():
    class Twice(torch.nn.Module):
        def forward(self, x):
            y = x.exp()  # kept by itself, and by the square
            return y.square()

    x = torch.zeros(1000, 250, requires_grad=True)
    assert network.kept(Twice(), x) == pytest.approx(1.0)
