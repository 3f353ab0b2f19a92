"""Compiles the loops of training for both types at once: tests in several processes would each do so for themselves.

`python -m tests.compile`; where they are in the cache already it takes seconds.
"""

import multiprocessing

import torch

from ffn.config import override, preset
from ffn.layouts import COCO17
from ffn.model.network import build


def step(dtype: torch.dtype) -> None:
    """Forward and backward of a small network that every loop takes part in."""
    torch.set_num_threads(1)
    network = build(override(preset("S4"), ["model.depths=1,1"]).model, COCO17, 2).to(dtype)
    network(torch.randn(2, 1, 8, 17, 3, dtype=dtype)).sum().backward()


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(step, [torch.float32, torch.float64])
