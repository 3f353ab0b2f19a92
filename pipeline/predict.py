"""Prediction for one recording, by a protocol's champion or a checkpoint."""

import os
import tempfile
from pathlib import Path

from ffn.data.readers.ntu import read_file
from ffn.errors import FFNError
from ffn.inference import FusedModel, write_fused
from pipeline.local import Workspace


def top(file: Path, *, model: str, checkpoint: Path | None, count: int, workspace: Workspace) -> list[tuple[str, float]]:
    """The `count` most probable classes of the `.skeleton` file, with their probabilities."""
    fused = _of_checkpoint(checkpoint) if checkpoint else _champion(model, workspace)
    joints = fused.meta.layout.name
    if joints != "ntu25":
        raise FFNError(f"{file}: 25 joints, but the model takes {joints}; choose a model that was trained on .skeleton files")
    p = fused.predict([read_file(file, space=fused.meta.space)])[0]
    return [(fused.classes[k], float(p[k])) for k in p.argsort()[::-1][:count]]


def _of_checkpoint(folder: Path) -> FusedModel:
    from ffn.checkpoint import read_meta

    stream = read_meta(folder).stream
    with tempfile.TemporaryDirectory() as scratch:
        return FusedModel.load(write_fused(Path(scratch) / "fused", {stream: folder}, {stream: 1.0}))


def _champion(model: str, workspace: Workspace) -> FusedModel:
    os.environ.update(workspace.environment())
    from components import tracking

    names = [model] if model else tracking.registered()
    champions = [found for name in names if (found := tracking.version(name, alias="champion"))]
    if len(champions) > 1:
        raise FFNError(f"{len(champions)} champions: {', '.join(found.name for found in champions)}; choose one with --model")
    if not champions:
        known = ", ".join(tracking.registered()) or "none; train some with `ffn run`"
        raise FFNError(f"{model or 'no --model given'}: no champion; registered models: {known}")
    return FusedModel.load(tracking.download(champions[0]))
