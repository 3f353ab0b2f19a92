"""Batches of clips straight from the ragged keypoint buffer: sampling, normalisation, stream and padding as tensor code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ffn import streams
from ffn.config import ClipConfig
from ffn.data.store import SkeletonSet, Space
from ffn.layouts import Layout

TEST_SEED = 255
"""MMAction2's seed of the test clips; here it draws one table for all samples, so a clip does not depend on its batch."""


PART = 600_000
"""Numbers of the output that a CPU works on at a time: what lies between two steps then stays in its cache."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Clips of one stream, from data that lives on one device.

    `keypoints` (R, V, 3) float16 or float32; sample i's person m, frame t is row `starts[i] + m * frames[i] + t`.
    Output clips are (N, M, T, V, 3) float32 on the device of `keypoints`; every other tensor is on the CPU. Which rows make a
    batch is decided there, so that only persons who exist are worked on and nothing ever waits for a GPU.
    """

    keypoints: Tensor
    starts: Tensor
    frames: Tensor
    persons: Tensor
    image_sizes: Tensor
    layout: Layout
    space: Space
    stream: str
    clip: ClipConfig

    @classmethod
    def of(cls, data: SkeletonSet, stream: str, clip: ClipConfig, device: torch.device | str = "cpu") -> Self:
        """The whole of `data` on `device`; on the CPU the memory map itself, nothing copied."""
        columns = (data.keypoints, data.starts, data.frames, data.persons, data.image_sizes)
        keypoints, starts, frames, persons, sizes = (torch.from_numpy(np.ascontiguousarray(c)) for c in columns)
        return cls(
            keypoints=keypoints.to(device), starts=starts, frames=frames, persons=persons, image_sizes=sizes,
            layout=data.layout, space=data.space, stream=stream, clip=clip,
        )  # fmt: skip

    @classmethod
    def of_arrays(
        cls,
        clips: Sequence[NDArray[np.floating[Any]]],
        *,
        layout: Layout,
        space: Space,
        stream: str,
        clip: ClipConfig,
        image_size: tuple[int, int] = (0, 0),
    ) -> Self:
        """A sampler over recordings in memory, each (M, T, V, 3)."""
        frames = torch.tensor([c.shape[1] for c in clips])
        persons = torch.tensor([c.shape[0] for c in clips])
        rows = frames * persons
        keypoints = np.concatenate([c.reshape(-1, *c.shape[2:]) for c in clips]).astype(np.float32, copy=False)
        return cls(
            keypoints=torch.from_numpy(keypoints), starts=rows.cumsum(0) - rows, frames=frames, persons=persons,
            image_sizes=torch.tensor(image_size).expand(len(clips), 2),
            layout=layout, space=space, stream=stream, clip=clip,
        )  # fmt: skip

    def train_batch(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Clips of the samples `index` (N,), frames drawn at random and augmented, from `generator` (of the CPU) alone."""
        return self.train_clips(index, self.draws(len(index), generator))

    def draws(self, count: int, generator: torch.Generator) -> Tensor:
        """The uniform numbers that decide `count` training clips, a row each, on the CPU."""
        return torch.rand(count, 2 * self.clip.frames + 8, generator=generator)

    def train_clips(self, index: Tensor, draws: Tensor) -> Tensor:
        """Clips of the samples `index` (N,), frames chosen and augmented as the N rows of `draws` say; both on the CPU."""
        frames, length = self.frames[index], self.clip.frames
        if self.clip.sampling == "random":
            numbers = random_frames(frames, draws[:, 8 : length + 8])
        else:
            numbers = frame_numbers(frames, (draws[:, 0] * frames).long(), draws[:, 7 : 2 * length + 8])
        if not (self.clip.rotate or self.clip.scale):
            return self._clips(index, numbers)
        change = augmentation(draws[:, 1:7], space=self.space, rotate=self.clip.rotate, scale=self.clip.scale)
        return self._clips(index, numbers, change)

    def test_batch(self, index: Tensor, number: int) -> Tensor:
        """Test clip `number` of the samples `index` (N,), on the CPU; the same for a sample in whatever batch it comes."""
        length, frames = self.clip.frames, self.frames[index]
        if self.clip.sampling == "random":
            return self._clips(index, even_frames(frames, length, (number + 0.5) / self.clip.test_clips))
        table = torch.rand(self.clip.test_clips, 2 * length + 1, generator=torch.Generator().manual_seed(TEST_SEED))
        return self._clips(
            index, frame_numbers(frames, number * frames // self.clip.test_clips, table[number].expand(len(index), -1))
        )

    def _clips(self, index: Tensor, numbers: Tensor, change: Tensor | None = None) -> Tensor:
        """Frames `numbers` (N, T) of the samples `index` (N,) as normalised clips of the stream, (N, M, T, V, 3).

        `change` (N, 3, 3) is applied to every joint: all four streams are linear in the coordinates, so it may come last.
        """
        origin, matrix = self._normalization(index, change)
        shape = (len(index), self.clip.persons, numbers.shape[1], *self.keypoints.shape[1:])
        out = torch.empty(shape, device=self.keypoints.device)
        size = max(1, PART // math.prod(shape[1:])) if out.device.type == "cpu" else len(index)
        for first in range(0, len(index), size):
            part = slice(first, first + size)
            self._fill(out[part], index[part], numbers[part], origin[part], matrix[part])
        return out

    def _fill(self, out: Tensor, index: Tensor, numbers: Tensor, origin: Tensor, matrix: Tensor) -> None:
        """Write clips to `out`, by way of rows (P * T, V * 3): those of the P persons there are, and a last one of zeros."""
        present = torch.arange(out.shape[1]) < self.persons[index, None]  # (N, M)
        clip, person = nn.functional.pad(present.nonzero().T, (0, 1))  # (P,), (P,)
        numbers, frames = numbers[clip], self.frames[index[clip]]
        rows = (self.starts[index[clip]] + person * frames)[:, None] + numbers
        ends = numbers == frames[:, None] - 1
        x, seen = self._rows(rows)
        if "m" in self.stream:
            following, then_seen = self._rows(rows + ~ends)
            x, seen = streams.difference(following, x, self.space), then_seen - seen
        if "b" in self.stream:
            x, seen = streams.bone(x, self.layout, self.space), streams.bone(seen, self.layout, "3d")
        clip = self._send(clip)
        x = x.view(*rows.shape, -1)
        if self.space == "3d" or self.stream == "j":
            x = streams.centered(x, seen, origin[clip])
        x = streams.turned(x, matrix[clip])
        if "m" in self.stream:
            x.flatten(0, 1).index_fill_(0, self._send(ends.flatten().nonzero()[:, 0]), 0)
        x[-1] = 0
        slots = torch.where(present.flatten(), present.flatten().cumsum(0) - 1, len(clip) - 1)
        torch.index_select(x.flatten(1), 0, self._send(slots), out=out.view(len(slots), -1))

    def _rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `numbers` of the keypoints as float32 (R, V * 3), and (R or 1, V) whether a joint is seen: 1, or 0 if missing."""
        x = self.keypoints.flatten(1).index_select(0, self._send(numbers.flatten())).float()
        return x, streams.seen(x) if self.space == "3d" else x.new_ones(1, self.keypoints.shape[1])

    def _normalization(self, index: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """Origins (N, 3) and matrices (N, 3, 3), or their diagonals (N, 3), that normalise and augment the samples `index`."""
        if self.space == "3d":
            origin, turn = streams.alignment(self.keypoints[self._send(self.starts[index])].float(), self.layout)
            return origin, turn if change is None else self._send(change) @ turn
        origin, scale = streams.image_scale(self.image_sizes[index], ("b" in self.stream) + ("m" in self.stream))
        return self._send(origin), self._send(scale if change is None else change * scale[:, None])

    def _send(self, x: Tensor) -> Tensor:
        """`x` on the device of the keypoints, without waiting for it."""
        device = self.keypoints.device
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def frame_numbers(frames: Tensor, start: Tensor, draws: Tensor) -> Tensor:
    """Which frames make a clip of L: (N,) lengths, (N,) starts and (N, 2 L + 1) uniform draws -> (N, L) frame numbers.

    Fewer than L frames: L in a row from `start`, going round. L to 2 L - 1: in order, skipping frames at slots drawn
    without repetition. 2 L and more: one at random from each of L equal bins.
    Source: MMAction2 v1.2.0, `UniformSampleFrames`, the draws being ours to give.
    """
    length = (draws.shape[1] - 1) // 2
    steps = torch.arange(length)
    frames, start = frames[:, None], start[:, None]
    around = (start + steps) % frames
    keys = draws[:, : length + 1]
    spare = (frames - length).clamp(0, length)
    threshold = torch.from_numpy(np.sort(keys.numpy(), 1)).gather(1, spare)  # thirty times faster than torch's sort
    skipping = steps + ((keys < threshold) & (spare > 0)).cumsum(1)[:, :-1]
    low = steps * frames // length
    size = (steps + 1) * frames // length - low
    binned = low + (draws[:, length + 1 :] * size).long()
    return torch.where(frames < length, around, torch.where(frames < 2 * length, skipping, binned))


def random_frames(frames: Tensor, draws: Tensor) -> Tensor:
    """L frames at random, in order: (N,) lengths and (N, L) uniform draws -> (N, L) frame numbers, some more than once.

    Short recordings are stretched and long ones thinned, unevenly, another way every time.
    Source: Shift-GCN's and CTR-GCN's treatment of NW-UCLA.
    """
    return (draws.sort(1).values * frames[:, None]).long()


def even_frames(frames: Tensor, length: int, place: float) -> Tensor:
    """`random_frames` without chance: (N,) lengths -> (N, `length`), the frame at `place`, in [0, 1), of each of L equal bins."""
    steps = torch.arange(length, device=frames.device, dtype=torch.float64)
    return ((steps + place) / length * frames[:, None]).long()


def augmentation(draws: Tensor, *, space: Space, rotate: float, scale: float) -> Tensor:
    """Random linear changes (N, 3, 3) from uniform draws (N, 6): angles within ±`rotate` radians, axis scales within 1 ± `scale`.

    3D: rotations about x, y and z, three scales. 2D: one rotation in the image plane, two scales, the score untouched.
    All four streams are linear in the coordinates, so the change may follow the stream.
    """
    angles = (2 * draws[:, :3] - 1) * rotate
    scales = 1 + (2 * draws[:, 3:6] - 1) * scale
    if space == "2d":
        angles = torch.cat([torch.zeros_like(angles[:, :2]), angles[:, 2:]], 1)
        scales = torch.cat([scales[:, :2], torch.ones_like(scales[:, :1])], 1)
    turn = torch.diag_embed(scales)
    for axis in range(3):
        cosine, sine = angles[:, axis].cos(), angles[:, axis].sin()
        a, b = (axis + 1) % 3, (axis + 2) % 3
        one = torch.eye(3, device=draws.device).repeat(len(draws), 1, 1)
        one[:, a, a], one[:, a, b], one[:, b, a], one[:, b, b] = cosine, -sine, sine, cosine
        turn = one @ turn
    return turn
