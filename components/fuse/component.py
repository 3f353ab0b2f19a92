"""Fuse, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fuse(scores: dsl.Input[list[dsl.Artifact]], parent: str, fused: dsl.Output[dsl.Artifact]) -> None:
    """The streams' scores joined."""
    from pathlib import Path

    from components.fuse.step import run

    fused.metadata.update(run(scores=[Path(table.path) for table in scores], parent=parent, out=Path(fused.path)))
