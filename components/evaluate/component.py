"""Evaluate, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(data: dsl.Input[dsl.Dataset], checkpoint: dsl.Input[dsl.Model], parent: str, scores: dsl.Output[dsl.Artifact]) -> None:
    """Scores of the held-out samples."""
    from pathlib import Path

    from components.evaluate.step import run

    scores.metadata.update(run(data=Path(data.path), checkpoint=Path(checkpoint.path), parent=parent, out=Path(scores.path)))
