"""Promote, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote(model: str) -> None:
    """The version becomes champion."""
    from components.promote.step import run

    run(model=model)
