"""Finish, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(name: str, job: str, status: dsl.PipelineTaskFinalStatus, table: dsl.Output[dsl.Markdown]) -> None:
    """Close the parent run with the table of results, whatever became of the steps."""
    from pathlib import Path

    from components.finish.step import run

    run(name=name or job, state=status.state, out=Path(table.path))
