"""The graph: raw recordings to promoted models, every protocol in a box of its own, every stream trained on its own.

Protocols, presets and seeds are loops when the graph is built, streams a `ParallelFor` inside each one's nested pipeline.
"""

from collections.abc import Sequence
from typing import Any

from kfp import dsl

from components.begin.component import begin
from components.evaluate.component import evaluate
from components.finish.component import finish
from components.fuse.component import fuse
from components.gate.component import gate
from components.ingest.component import ingest
from components.promote.component import promote
from components.register.component import register
from components.train.component import train
from pipeline.placement import place
from pipeline.settings import Settings

NAME = "ffn"
DEFAULT_PRESET = "S4"

JOB = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
"""What KFP calls the run: the name of one that was given none, as those of a schedule are."""


def build(
    protocols: Sequence[str],
    streams: Sequence[str],
    settings: Settings,
    *,
    presets: Sequence[str] = (DEFAULT_PRESET,),
    seeds: Sequence[int] = (0,),
) -> Any:
    """The pipeline for these protocols and streams, ready to be compiled or called.

    Several presets or seeds make it a comparison: each trains on its own, the report sets them beside one another, and no
    model is registered, for the best of several by held-out accuracy would be chosen on the held-out samples.
    """
    compared = len(presets) * len(seeds) > 1
    boxes = [
        _box(protocol, streams, settings, preset=preset, seed=seed, compared=compared)
        for protocol in protocols
        for preset in presets
        for seed in seeds
    ]

    @dsl.pipeline(name=NAME, description="Raw skeletons to promoted action-recognition models")
    def pipeline(
        source: str,
        name: str = "",
        source_version: str = "",
        space: str = "3d",
        overrides: list[str] = [],  # noqa: B006
    ) -> None:
        end = place(finish(name=name, job=JOB), settings)
        with dsl.ExitHandler(end, name="run"):
            begun = begin(
                name=name, job=JOB, source=source, source_version=source_version, space=space,
                presets=list(presets), seeds=list(seeds), overrides=overrides,
            )  # fmt: skip
            place(begun, settings)
            run = begun.output
            ingested = place(ingest(source=source, source_version=source_version, space=space, parent=run), settings)
            for box in boxes:
                did = box(data=ingested.outputs["data"], name=name, overrides=overrides, parent=run)
                did.set_caching_options(False)

    return pipeline


def _box(protocol: str, streams: Sequence[str], settings: Settings, *, preset: str, seed: int, compared: bool) -> Any:
    """One protocol's box: train and evaluate every stream, fuse; register, and promote what is not worse, unless `compared`.

    The settings may leave promotion to a person: then the gate says what it thinks, and nothing moves.
    """

    @dsl.pipeline(name=f"{protocol}-{preset}-seed{seed}" if compared else protocol)
    def box(data: dsl.Input[dsl.Dataset], name: str, overrides: list[str], parent: str) -> None:
        with dsl.ParallelFor(list(streams), name="streams", parallelism=settings.parallelism or None) as stream:
            trained = train(
                data=data, protocol=protocol, stream=stream, preset=preset, seed=seed, overrides=overrides,
                checkpoints=settings.checkpoints, parent=parent,
            )  # fmt: skip
            evaluated = evaluate(data=data, checkpoint=trained.outputs["checkpoint"], parent=parent)
        fused = fuse(scores=dsl.Collected(evaluated.outputs["scores"]), parent=parent)
        for task in (trained, evaluated, fused):
            place(task, settings)
        if compared:
            return
        registered = register(
            data=data, checkpoints=dsl.Collected(trained.outputs["checkpoint"]), fused=fused.outputs["fused"],
            name=name, job=JOB, parent=parent,
        )  # fmt: skip
        verdict = gate(model=registered.output, data=data)
        for task in (registered, verdict):
            place(task, settings)
        if settings.promote:
            with dsl.If(verdict.output == "promote", name="not worse"):
                place(promote(model=registered.output), settings)

    return box
