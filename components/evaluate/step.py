"""Evaluate: a checkpoint's scores of the held-out samples."""

import hashlib
from pathlib import Path

from components import say, skeletons, step, storage, tracking
from ffn.checkpoint import read_meta
from ffn.config import code, digest
from ffn.errors import FFNError
from ffn.evaluation import evaluate
from ffn.scores import Scores, measure


@step
def run(*, data: Path, checkpoint: Path, parent: str, store: str, scores: Path) -> dict[str, str]:
    """Write the scores to `scores`; returns what names them, preset, protocol, stream, seed, and `top1`, a fraction.

    With a `store`, the durable folder or `s3://BUCKET/PREFIX`, they are kept there, and found where the same checkpoint was
    evaluated on the same set by the same code. The measures go to the MLflow run of the training, so that one run tells all
    about a stream.
    """
    meta = read_meta(checkpoint)
    names = tracking.names(meta.config.preset, meta.protocol, meta.stream, meta.config.training.seed)
    with (
        tracking.child(parent, key=meta.key, kind="train", names=names) as track,
        skeletons.opened(data) as known,
    ):
        made = kept(store, known.digest, data, checkpoint) if store else scored(data, checkpoint)
        made.write(scores)
        metrics = measure(made)
        track.dataset(known, "evaluation", part=f"{meta.protocol}/test", used=len(made.ids))
        track.result(metrics, made.classes)
    say(f"top1 {100 * metrics.top1:.2f} %  mean class {100 * metrics.top1_mean_class:.2f} %  of {len(made.ids)}")
    return {**names, "top1": f"{metrics.top1:.4f}"}


def scored(data: Path, checkpoint: Path) -> Scores:
    """The scores of the checkpoint on the samples that its protocol holds out of `data`."""
    with skeletons.opened(data, skeletons.held_out(read_meta(checkpoint).protocol)) as used:
        return evaluate(used, checkpoint)


def kept(store: str, data_digest: str, data: Path, checkpoint: Path) -> Scores:
    """What `scored` gives, found in the store or kept there."""
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(checkpoint.iterdir())}
    name = f"scores/{digest('evaluate', data_digest, files, code())}.arrow"
    with storage.mirrored(store, name) as (folder, keep):
        try:
            found = Scores.read(folder / name)
        except FFNError:  # none, or not whole
            found = scored(data, checkpoint)
            found.write(folder / name)
            keep()
        else:
            say(f"found in {store}")
    return found
