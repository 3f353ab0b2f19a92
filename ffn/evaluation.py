"""Evaluation: class probabilities of the held-out samples."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ffn import checkpoint
from ffn.data.sampler import Sampler
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.scores import Scores

BATCH = 64
"""Clips per forward pass."""


def evaluate(data: SkeletonSet, folder: Path | str, *, device: str | None = None) -> Scores:
    """Scores of the checkpoint in `folder` on the held-out samples of its protocol, averaged over its test clips.

    Raises `FFNError` where the data's layout, space or classes are not those the model was trained on.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made, network = checkpoint.load(folder, where)
    split = data.split(made.protocol)
    for what, ours, theirs in (
        ("layout", made.layout, data.layout),
        ("space", made.space, data.space),
        ("classes", made.classes, split.classes),
    ):
        if ours != theirs:
            raise FFNError(f"{folder}: trained on other {what} than {data.path} holds; ingest the same kind of data")
    sampler = Sampler.of(data, made.stream, made.config.clip, where)
    return Scores(
        ids=tuple(data.ids.take(split.test).to_pylist()),
        labels=split.labels[split.test],
        probabilities=predict(network, sampler, split.test),
        classes=made.classes,
        protocol=made.protocol,
        stream=made.stream,
        preset=made.config.preset,
        data_digest=data.digest,
        seed=made.config.training.seed,
    )


@torch.inference_mode()
def predict(network: nn.Module, sampler: Sampler, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """(N, K) softmax of the samples `rows`, mean over the sampler's test clips."""
    device = sampler.device
    batches = []
    for batch in torch.split(torch.from_numpy(rows), BATCH):
        total = torch.zeros((), device=device)
        for number in range(sampler.clip.test_clips):
            clips = sampler.test_batch(batch, number)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = network(clips)
            total = total + logits.float().softmax(1)
        batches.append((total / sampler.clip.test_clips).cpu())
    return torch.cat(batches).numpy()
