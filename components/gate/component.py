"""Gate, wired into the pipeline."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate(model: str, data: dsl.Input[dsl.Dataset]) -> str:
    """`promote` or `hold`."""
    from pathlib import Path

    from components.gate.step import run

    return run(model=model, data=Path(data.path))
