"""Evaluate: a checkpoint's scores of the held-out samples."""

from pathlib import Path

from components import say, step, tracking
from ffn.checkpoint import read_meta
from ffn.data.store import SkeletonSet
from ffn.evaluation import evaluate
from ffn.scores import measure


@step
def run(*, data: Path, checkpoint: Path, parent: str, out: Path) -> dict[str, str]:
    """Write the scores to `out`; returns what names them: preset, protocol, stream, seed.

    The measures go to the MLflow run of the training, so that one run tells all about a stream.
    """
    skeletons, meta = SkeletonSet.open(data), read_meta(checkpoint)
    names = tracking.names(meta.config.preset, meta.protocol, meta.stream, meta.config.training.seed)
    with tracking.child(parent, key=meta.key, kind="train", names=names) as track:
        scores = evaluate(skeletons, checkpoint)
        scores.write(out)
        metrics = measure(scores)
        track.dataset(skeletons, "evaluation", part=f"{meta.protocol}/test", used=len(scores.ids))
        track.result(metrics, scores.classes)
    say(f"top1 {100 * metrics.top1:.2f} %  mean class {100 * metrics.top1_mean_class:.2f} %  of {len(scores.ids)}")
    return names
