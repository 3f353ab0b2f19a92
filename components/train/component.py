"""Train, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    data: dsl.Input[dsl.Dataset],
    protocol: str,
    stream: str,
    preset: str,
    seed: int,
    overrides: list[str],
    checkpoints: str,
    parent: str,
    checkpoint: dsl.Output[dsl.Model],
) -> None:
    """One stream of one protocol."""
    from pathlib import Path

    from components.train.step import run

    checkpoint.metadata.update(
        run(
            data=Path(data.path),
            protocol=protocol,
            stream=stream,
            preset=preset,
            seed=seed,
            overrides=overrides,
            checkpoints=checkpoints,
            parent=parent,
            out=Path(checkpoint.path),
        )
    )
