"""Evaluate: a checkpoint's scores of the held-out samples."""

from pathlib import Path

from components import say, step, tracking
from ffn.checkpoint import read_meta
from ffn.data.store import SkeletonSet
from ffn.evaluation import evaluate
from ffn.scores import measure


@step
def run(*, data: Path, checkpoint: Path, parent: str, scores: Path) -> dict[str, str]:
    """Write the scores to `scores`; returns what names them, preset, protocol, stream, seed, and `top1`, a fraction.

    The measures go to the MLflow run of the training, so that one run tells all about a stream.
    """
    skeletons, meta = SkeletonSet.open(data), read_meta(checkpoint)
    names = tracking.names(meta.config.preset, meta.protocol, meta.stream, meta.config.training.seed)
    with tracking.child(parent, key=meta.key, kind="train", names=names) as track:
        made = evaluate(skeletons, checkpoint)
        made.write(scores)
        metrics = measure(made)
        track.dataset(skeletons, "evaluation", part=f"{meta.protocol}/test", used=len(made.ids))
        track.result(metrics, made.classes)
    say(f"top1 {100 * metrics.top1:.2f} %  mean class {100 * metrics.top1_mean_class:.2f} %  of {len(made.ids)}")
    return {**names, "top1": f"{metrics.top1:.4f}"}
