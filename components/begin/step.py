"""Begin: open the parent run of the pipeline run, or take up the one of that name."""

from components import step, tracking


@step
def run(*, name: str, source: str, source_version: str, preset: str, overrides: list[str]) -> str:
    """Returns the id of the MLflow run that is the parent of every other step's."""
    params = {"source": source, "source_version": source_version, "preset": preset, "overrides": " ".join(overrides)}
    return tracking.begin(name, params)
