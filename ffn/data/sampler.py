"""Batches of clips straight from the ragged keypoint buffer: which frames, which normalisation, which augmentation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffn import streams
from ffn.config import ClipConfig
from ffn.data.store import SkeletonSet, Space
from ffn.layouts import Layout
from ffn.machine import compiled

TEST_SEED = 255
"""MMAction2's seed of the test clips; here it draws one table for all samples, so a clip does not depend on its batch."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Clips of one stream, made on a CPU core for a network on `device`.

    `keypoints` (R, V, 3) float16; sample i's person m, frame t is row `starts[i] + m * frames[i] + t`.
    Clips are (N, M, T, V, 3) float32. A core makes them much faster than a GPU trains on them, and a GPU gets them by way of
    pinned memory: nothing ever waits for it.
    """

    keypoints: NDArray[np.float16]
    starts: Tensor
    frames: Tensor
    persons: Tensor
    image_sizes: Tensor
    layout: Layout
    space: Space
    stream: str
    clip: ClipConfig
    device: torch.device

    @classmethod
    def of(cls, data: SkeletonSet, stream: str, clip: ClipConfig, device: torch.device | str = "cpu") -> Self:
        """The whole of `data`: the memory map itself, nothing copied."""
        columns = (data.starts, data.frames, data.persons, data.image_sizes)
        starts, frames, persons, sizes = (torch.from_numpy(np.ascontiguousarray(column)) for column in columns)
        return cls(
            keypoints=np.asarray(data.keypoints), starts=starts, frames=frames, persons=persons, image_sizes=sizes,
            layout=data.layout, space=data.space, stream=stream, clip=clip, device=torch.device(device),
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
        """A sampler over recordings in memory, each (M, T, V, 3), rounded to float16 as a set keeps them."""
        frames = torch.tensor([c.shape[1] for c in clips])
        persons = torch.tensor([c.shape[0] for c in clips])
        rows = frames * persons
        return cls(
            keypoints=np.concatenate([c.reshape(-1, *c.shape[2:]) for c in clips]).astype(np.float16, copy=False),
            starts=rows.cumsum(0) - rows, frames=frames, persons=persons,
            image_sizes=torch.tensor(image_size).expand(len(clips), 2),
            layout=layout, space=space, stream=stream, clip=clip, device=torch.device("cpu"),
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
        out = torch.empty(shape, pin_memory=self.device.type == "cuda")
        columns = (self.starts[index], self.frames[index], self.persons[index], numbers, origin, matrix)
        streams.write_clips(
            out.numpy(), self.keypoints, *(column.contiguous().numpy() for column in columns),
            layout=self.layout, space=self.space, stream=self.stream,
        )  # fmt: skip
        return out.to(self.device, non_blocking=True)

    def _normalization(self, index: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """Origins (N, 3) and matrices (N, 3, 3) that normalise and augment the samples `index`."""
        if self.space == "3d":
            first = torch.from_numpy(self.keypoints[self.starts[index].numpy()].astype(np.float32))
            origin, turn = streams.alignment(first, self.layout)
        else:
            origin, scale = streams.image_scale(self.image_sizes[index], ("b" in self.stream) + ("m" in self.stream))
            turn = torch.diag_embed(scale)
        return origin, turn if change is None else change @ turn


def frame_numbers(frames: Tensor, start: Tensor, draws: Tensor) -> Tensor:
    """Which frames make a clip of L: (N,) lengths, (N,) starts and (N, 2 L + 1) uniform draws -> (N, L) frame numbers.

    Fewer than L frames: L in a row from `start`, going round. L to 2 L - 1: in order, skipping frames at slots drawn
    without repetition. 2 L and more: one at random from each of L equal bins.
    Source: MMAction2 v1.2.0, `UniformSampleFrames`, the draws being ours to give.
    """
    out = torch.empty(len(frames), draws.shape[1] // 2, dtype=torch.int64)
    _choose(*(column.contiguous().numpy() for column in (out, frames, start, draws)))
    return out


@compiled
def _choose(out: NDArray[Any], frames: NDArray[Any], start: NDArray[Any], draws: NDArray[Any]) -> None:
    clips, length = out.shape
    for clip in range(clips):
        count = frames[clip]
        if count < length:
            number = start[clip]
            for step in range(length):
                out[clip, step] = number
                number = 0 if number == count - 1 else number + 1
        elif count < 2 * length:
            keys, number = draws[clip, : length + 1], 0
            threshold = np.sort(keys)[count - length] if count > length else np.float32(0)
            for step in range(length):
                number += keys[step] < threshold
                out[clip, step] = number
                number += 1
        else:
            for step in range(length):
                low = step * count // length
                size = (step + 1) * count // length - low
                out[clip, step] = low + int(draws[clip, length + 1 + step] * np.float32(size))


def random_frames(frames: Tensor, draws: Tensor) -> Tensor:
    """L frames at random, in order: (N,) lengths and (N, L) uniform draws -> (N, L) frame numbers, some more than once.

    Short recordings are stretched and long ones thinned, unevenly, another way every time.
    Source: Shift-GCN's and CTR-GCN's treatment of NW-UCLA.
    """
    in_order = torch.from_numpy(np.sort(draws.numpy(), 1))  # thirty times faster than torch's sort
    return (in_order * frames[:, None]).long()


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
