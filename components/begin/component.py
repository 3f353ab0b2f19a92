"""Begin, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def begin(
    name: str,
    job: str,
    source: str,
    source_version: str,
    space: str,
    presets: list[str],
    seeds: list[int],
    overrides: list[str],
) -> str:
    """Returns the id of the parent MLflow run."""
    from components.begin.step import run

    return run(
        name=name or job,
        source=source,
        source_version=source_version,
        space=space,
        presets=presets,
        seeds=seeds,
        overrides=overrides,
    )
