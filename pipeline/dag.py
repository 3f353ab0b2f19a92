"""The graph: raw recordings to promoted models, every protocol in a box of its own, every stream trained on its own.

Protocols, presets and seeds are loops when the graph is built, streams a `ParallelFor` inside each one's nested pipeline.
"""

from collections.abc import Sequence
from typing import Any

from kfp import dsl

from components import wiring
from pipeline.placement import lifetime, place
from pipeline.settings import NAME, Settings

DEFAULT_PRESET = "S4"


def build(
    protocols: Sequence[str],
    streams: Sequence[str],
    settings: Settings,
    *,
    presets: Sequence[str] = (DEFAULT_PRESET,),
    seeds: Sequence[int] = (0,),
    version: str = "",
) -> Any:
    """The pipeline for these protocols and streams, ready to be compiled or called; `version` is what its runs say they are of.

    Several presets or seeds make it a comparison: each trains on its own, the report sets them beside one another, and no
    model is registered, for the best of several by held-out accuracy would be chosen on the held-out samples.
    """
    compared = len(presets) * len(seeds) > 1
    boxes = {
        (protocol, preset, seed): _box(protocol, streams, settings, preset=preset, seed=seed, compared=compared)
        for protocol in protocols
        for preset in presets
        for seed in seeds
    }

    @dsl.pipeline(
        name=NAME,
        description=described(protocols, streams, presets, seeds, settings.image),
        pipeline_config=None if settings.local else lifetime(),
    )
    def pipeline(
        source: str,
        name: str = "",
        source_version: str = "",
        space: str = "3d",
        overrides: list[str] = [],  # noqa: B006
        resumes: str = "",
    ) -> None:
        # What a pipeline run is found by: KFP's id of it, whatever it is called; on one machine its name. KFP calls the runs of a
        # schedule nothing; what they are in Kubernetes has a name always.
        job, called, resource = (
            (name, "", "")
            if settings.local
            else (dsl.PIPELINE_JOB_ID_PLACEHOLDER, dsl.PIPELINE_JOB_NAME_PLACEHOLDER, dsl.PIPELINE_JOB_RESOURCE_NAME_PLACEHOLDER)
        )
        end = place(wiring.finish(job=job), settings)
        if not settings.local:
            end.set_display_name("results")
        with dsl.ExitHandler(end, name="train, promote"):
            begun = wiring.begin(
                job=job, name=name, called=called, resource=resource, resumes=resumes, version=version, source=source,
                source_version=source_version, space=space, presets=list(presets), seeds=list(seeds), overrides=overrides,
            )  # fmt: skip
            place(begun, settings)
            run = begun.outputs["parent"]
            ingested = wiring.ingest(
                source=source, source_version=begun.outputs["source_version"], space=space, store=settings.store
            )
            place(ingested, settings)
            for (protocol, preset, seed), box in boxes.items():
                did = box(data=ingested.outputs["data"], overrides=overrides, parent=run)
                did.set_caching_options(False)
                if compared and not settings.local:  # KFP's pages cut a label after some 18 characters: what differs comes first
                    did.set_display_name(f"{preset}{f' seed{seed}' if len(seeds) > 1 else ''} {protocol}")

    return pipeline


def described(protocols: Sequence[str], streams: Sequence[str], presets: Sequence[str], seeds: Sequence[int], image: str) -> str:
    """`S4 · ntu60-xsub · j b jm bm · image sha256:0123`: what tells a pipeline from others in KFP's lists."""
    parts = [" ".join(presets), " ".join(protocols), " ".join(streams)]
    if tuple(seeds) != (0,):
        parts.append(f"seeds {' '.join(map(str, seeds))}")
    return " · ".join([*parts, f"image {image.rpartition('@')[2]}"])


def _box(protocol: str, streams: Sequence[str], settings: Settings, *, preset: str, seed: int, compared: bool) -> Any:
    """One protocol's box: train and evaluate every stream, fuse; register, and promote what is not worse, unless `compared`.

    The settings leave promotion to a person unless they say otherwise: then the gate says what it thinks, and nothing moves.
    """

    @dsl.pipeline(name=f"{protocol}-{preset}-seed{seed}" if compared else protocol)
    def box(data: dsl.Input[dsl.Dataset], overrides: list[str], parent: str) -> None:
        of = {"preset": preset, "protocol": protocol, "seed": seed, "parent": parent}
        # KFP numbers the iterations: the loop's name tells which number is which stream.
        with dsl.ParallelFor(
            list(streams), name=f"streams {' '.join(streams)}", parallelism=settings.parallelism or None
        ) as stream:
            trained = wiring.train(data=data, stream=stream, overrides=overrides, checkpoints=settings.checkpoints, **of)
            evaluated = wiring.evaluate(
                data=data, checkpoint=trained.outputs["checkpoint"], stream=stream, store=settings.store, **of
            )
        fused = wiring.fuse(scores=dsl.Collected(evaluated.outputs["scores"]), **of)
        for task in (trained, evaluated, fused):
            place(task, settings)
        if compared:
            return
        registered = wiring.register(
            data=data, checkpoints=dsl.Collected(trained.outputs["checkpoint"]), fused=fused.outputs["fused"], **of
        )
        verdict = wiring.gate(model=registered.output, data=data, **settings.policy, **of)
        for task in (registered, verdict):
            place(task, settings)
        if settings.promote:
            with dsl.If(verdict.output == "promote", name="if gate: promote"):
                place(wiring.promote(model=registered.output, **of), settings)

    return box
