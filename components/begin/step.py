"""Begin: open the parent run of the pipeline run, or take up the one of that name."""

from components import step, tracking


@step
def run(
    *, name: str, source: str, source_version: str, space: str, presets: list[str], seeds: list[int], overrides: list[str]
) -> str:
    """Returns the id of the MLflow run that is the parent of every other step's.

    Raises `FFNError` where the run of that name was begun with other inputs; recordings of one version may have moved.
    """
    inputs = {
        "source_version": source_version or source,
        "space": space,
        "presets": " ".join(presets),
        "seeds": " ".join(map(str, seeds)),
        "overrides": " ".join(overrides),
    }
    return tracking.begin(name, inputs, {"source": source})
