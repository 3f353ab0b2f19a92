"""Register, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register(
    data: dsl.Input[dsl.Dataset],
    checkpoints: dsl.Input[list[dsl.Model]],
    fused: dsl.Input[dsl.Artifact],
    name: str,
    job: str,
    parent: str,
) -> str:
    """The fused model as a version, alias challenger; returns its URI."""
    from pathlib import Path

    from components.register.step import run

    return run(
        data=Path(data.path),
        checkpoints=[Path(folder.path) for folder in checkpoints],
        fused=Path(fused.path),
        name=name or job,
        parent=parent,
    )
