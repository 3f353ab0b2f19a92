"""Prediction for one recording, by a protocol's champion or by checkpoints."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffn.data.readers.ntu import read_file
from ffn.errors import FFNError
from ffn.inference import FusedModel, windows, with_clips
from pipeline.local import Workspace


def load(model: str, checkpoints: Sequence[Path], workspace: Workspace) -> FusedModel:
    """The champion of `model` (of the only one where it is not named), or the model of the checkpoints."""
    return FusedModel.of(checkpoints) if checkpoints else _champion(model, workspace)


def read(file: Path, fused: FusedModel) -> NDArray[np.float32]:
    """Keypoints (M, T, 25, 3) of the `.skeleton` file. Raises `FFNError` where the model takes other joints."""
    joints = fused.meta.layout.name
    if joints != "ntu25":
        raise FFNError(f"{file}: 25 joints, but the model takes {joints}; choose a model that was trained on .skeleton files")
    return read_file(file, space=fused.meta.space)


def top(fused: FusedModel, recording: NDArray[np.float32], count: int) -> list[tuple[str, float]]:
    """The `count` most probable classes of the recording, with their probabilities."""
    p = fused.predict([recording])[0]
    return [(fused.classes[k], float(p[k])) for k in p.argsort()[::-1][:count]]


def over_time(fused: FusedModel, recording: NDArray[np.float32], every: int) -> Iterator[tuple[int, int, str, float]]:
    """First frame, frame after the last, most probable class and its probability of every window of a clip's length.

    A window begins `every` so many frames. It is a clip as it stands: nothing is drawn, so one clip says all.
    """
    window = fused.meta.config.clip.frames
    single = with_clips(fused, 1) if recording.shape[1] >= window else fused
    for start, stop in windows(recording.shape[1], window, every):
        part = recording[:, start:stop]
        if part.any():
            ((name, probability),) = top(single, part, 1)
            yield start, stop, name, probability
        else:
            yield start, stop, "nobody visible", 0.0


def _champion(model: str, workspace: Workspace) -> FusedModel:
    os.environ.update(workspace.environment())
    from components import registry

    names = [model] if model else [name for name in registry.registered() if not name.endswith(registry.CANDIDATES)]
    champions = [found for name in names if (found := registry.champion(name))]
    if len(champions) > 1:
        raise FFNError(f"{len(champions)} champions: {', '.join(found.name for found in champions)}; choose one with --model")
    if not champions:
        known = ", ".join(registry.registered()) or "none; train some with `ffn run`"
        raise FFNError(f"{model or 'no --model given'}: no champion; registered models: {known}")
    with registry.fused(champions[0]) as folder:
        return FusedModel.load(folder)
