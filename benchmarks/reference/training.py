"""The usual training loop: one sample after the other in numpy, a DataLoader with workers, eager float32.

Source: the order of work of MMAction2's 2D skeleton pipeline (normalise, sample frames, pad to two persons, collate).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ffn.data.store import SkeletonSet

Annotation = dict[str, Any]


def annotations(data: SkeletonSet, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> list[Annotation]:
    """The samples as a pickle of MMAction2 holds them: keypoints (M, T, V, 2), scores (M, T, V), image shape, label."""
    made = []
    for row in rows:
        x = data.sample(int(row))
        size = tuple(int(side) for side in data.image_sizes[row])
        made.append({"keypoint": x[..., :2], "score": x[..., 2], "size": size, "label": int(labels[row])})
    return made


def clip(sample: Annotation, length: int, draws: NDArray[np.float32]) -> NDArray[np.float32]:
    """One clip (2, length, V, 3) of the joint stream; `draws` (2 length + 8) uniform numbers, as our sampler takes them."""
    x = sample["keypoint"].astype(np.float32)
    width, height = sample["size"]
    x[..., 0] = (x[..., 0] - width / 2) / (width / 2)
    x[..., 1] = (x[..., 1] - height / 2) / (height / 2)
    x = np.concatenate([x, sample["score"][..., None].astype(np.float32)], -1)
    x = x[:2, _frames(x.shape[1], length, draws)]
    if len(x) < 2:
        x = np.concatenate([x, np.zeros_like(x)])
    return np.ascontiguousarray(x)


def _frames(count: int, length: int, draws: NDArray[np.float32]) -> NDArray[np.int64]:
    steps = np.arange(length)
    if count < length:
        around: NDArray[np.int64] = (int(draws[0] * np.float32(count)) + steps) % count
        return around
    if count < 2 * length:
        keys = draws[7 : 7 + length + 1]
        skipped = np.zeros(length + 1, int)
        skipped[np.argsort(keys)[: count - length]] = 1
        skipping: NDArray[np.int64] = steps + np.cumsum(skipped)[:-1]
        return skipping
    bounds = steps * count // length
    sizes = (steps + 1) * count // length - bounds
    binned: NDArray[np.int64] = bounds + (draws[7 + length + 1 :] * sizes.astype(np.float32)).astype(int)
    return binned


class Clips(Dataset[tuple[Tensor, int]]):
    """Clips of a list of annotations, made when they are asked for."""

    def __init__(self, samples: list[Annotation], length: int) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        sample = self.samples[place]
        draws = torch.rand(2 * self.length + 8).numpy()
        return torch.from_numpy(clip(sample, self.length, draws)), sample["label"]


def loader(samples: list[Annotation], length: int, *, batch_size: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """Shuffled batches, made by worker processes that live as long as the loader."""
    return DataLoader(
        Clips(samples, length), batch_size, shuffle=True, num_workers=workers, persistent_workers=True,
        pin_memory=torch.cuda.is_available(), drop_last=False,
    )  # fmt: skip


def epoch(
    network: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> float:
    """One epoch; returns the mean loss. Every step asks the device for its loss, as loops that log do."""
    network.train()
    total, count = 0.0, 0
    for clips, labels in batches:
        clips, labels = clips.to(device), labels.to(device)
        value = functional.cross_entropy(network(clips), labels)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        total += value.item() * len(clips)
        count += len(clips)
    return total / count
