"""Inference: raw keypoints of a recording in, class probabilities out, preprocessing inside."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ffn import checkpoint
from ffn.checkpoint import Checkpoint, publishing_folder, read_meta
from ffn.config import FUSIONS, STREAMS
from ffn.data.readers.source import arrange, check_finite
from ffn.data.sampler import Sampler
from ffn.errors import FFNError
from ffn.evaluation import predict


@dataclass(frozen=True, kw_only=True)
class FusedModel:
    """The streams of one protocol and their weights; a single stream is a fusion of one."""

    streams: Mapping[str, tuple[Checkpoint, nn.Module]]
    weights: Mapping[str, float]

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Load what `write_fused` wrote, on the CPU. Raises `FFNError` where it is not a fused model."""
        folder = Path(folder)
        weights = read_weights(folder)
        return cls(streams={stream: checkpoint.load(folder / stream) for stream in weights}, weights=weights)

    @classmethod
    def of(cls, checkpoints: Sequence[Path | str]) -> Self:
        """The model of one stream's checkpoint, or of two or four streams' with the paper's weights, on the CPU.

        Raises `FFNError` where they are not of one protocol, data set and set of classes, or no fusion of the paper's.
        """
        metas = {read_meta(folder).stream: Path(folder) for folder in checkpoints}
        known = [{stream: 1.0} for stream in STREAMS] + list(FUSIONS.values())
        weights = next((fusion for fusion in known if set(fusion) == set(metas)), None)
        if weights is None or len(metas) < len(checkpoints):
            expected = ", or ".join(" ".join(fusion) for fusion in FUSIONS.values())
            raise FFNError(f"checkpoints of streams {' '.join(metas)}: expected one stream, or {expected}, one checkpoint each")
        require_together(metas)
        return cls(streams={stream: checkpoint.load(metas[stream]) for stream in weights}, weights=weights)

    @property
    def meta(self) -> Checkpoint:
        """The description the streams share: classes, layout, space, protocol, data."""
        return next(iter(self.streams.values()))[0]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.meta.classes

    def predict(self, clips: Sequence[NDArray[np.floating[Any]]], image_size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """(N, K) probabilities of N recordings, each (M, T, V, 3): metres in 3D, or pixels and a score in 2D.

        `image_size` (width, height) of 2D recordings; the training recordings' size where it is not given.
        Raises `FFNError` where a recording has another shape, no frame with a person, or a joint that is not finite in float16.
        """
        ready = [self._prepared(number, clip) for number, clip in enumerate(clips)]
        rows = np.arange(len(ready))
        total = np.zeros((len(ready), len(self.classes)))
        for stream, weight in self.weights.items():
            made, network = self.streams[stream]
            sampler = Sampler.of_arrays(
                ready, layout=made.layout, space=made.space, stream=stream, clip=made.config.clip,
                image_size=image_size or made.image_size,
            )  # fmt: skip
            total += weight * predict(network, sampler, rows)
        return (total / sum(self.weights.values())).astype(np.float32)

    def _prepared(self, number: int, clip: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
        """The recording as ingestion would store it."""
        where, joints = f"recording {number}", len(self.meta.layout.joints)
        clip = np.asarray(clip, np.float64)
        if clip.ndim != 4 or clip.shape[2:] != (joints, 3) or not clip.shape[0] or not clip.shape[1]:
            raise FFNError(f"{where}: keypoints {clip.shape}, expected (persons, frames, {joints}, 3)")
        check_finite(clip[:2], self.meta.layout, where)
        return arrange(clip, self.meta.space, where).astype(np.float16)


def read_weights(folder: Path) -> dict[str, float]:
    """Stream -> weight of what `write_fused` wrote. Raises `FFNError` where it is not a fused model."""
    try:
        return dict(json.loads((folder / "fusion.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise FFNError(f"{folder}: not a fused model ({error}); expected fusion.json and a checkpoint per stream") from None


def with_clips(model: FusedModel, clips: int) -> FusedModel:
    """`model` with another number of test clips."""

    def changed(meta: Checkpoint) -> Checkpoint:
        clip = dataclasses.replace(meta.config.clip, test_clips=clips)
        return dataclasses.replace(meta, config=dataclasses.replace(meta.config, clip=clip))

    return dataclasses.replace(model, streams={name: (changed(meta), net) for name, (meta, net) in model.streams.items()})


def windows(frames: int, window: int, every: int) -> list[tuple[int, int]]:
    """First frame and frame after the last of the windows over `frames`, one begun `every` so many frames.

    Only whole windows; a recording shorter than one is a window of its own.
    """
    return [(start, start + window) for start in range(0, frames - window + 1, every)] or [(0, frames)]


def write_fused(folder: Path | str, checkpoints: Mapping[str, Path], weights: Mapping[str, float]) -> Path:
    """Gather the checkpoints of `weights`' streams in one folder, published whole.

    Raises `FFNError` where a stream is missing or the checkpoints are not of one protocol, data set and set of classes.
    """
    absent = [stream for stream in weights if stream not in checkpoints]
    if absent:
        raise FFNError(f"fused model: no checkpoint of stream {', '.join(absent)}")
    require_together({stream: checkpoints[stream] for stream in weights})
    with publishing_folder(Path(folder)) as partial:
        for stream in weights:
            shutil.copytree(checkpoints[stream], partial / stream)
        (partial / "fusion.json").write_text(json.dumps(dict(weights)))
    return Path(folder)


def require_together(checkpoints: Mapping[str, Path]) -> None:
    """Raise `FFNError` naming the checkpoint that is not of its stream, or not of the others' protocol, data and classes."""
    metas = {stream: read_meta(folder) for stream, folder in checkpoints.items()}
    first = next(iter(metas.values()))
    for stream, meta in metas.items():
        if meta.stream != stream:
            raise FFNError(f"{checkpoints[stream]}: checkpoint of stream {meta.stream}, expected {stream}")
        for what in ("protocol", "data_digest", "classes", "layout", "space"):
            if getattr(meta, what) != getattr(first, what):
                raise FFNError(f"{checkpoints[stream]}: its {what} differs from that of the other streams")
