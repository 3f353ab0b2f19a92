"""Ingest, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def ingest(source: str, source_version: str, space: str, parent: str, data: dsl.Output[dsl.Dataset]) -> None:
    """Raw recordings to one skeleton set."""
    from pathlib import Path

    from components.ingest.step import run

    data.metadata.update(run(source=source, source_version=source_version, space=space, parent=parent, out=Path(data.path)))
