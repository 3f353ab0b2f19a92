"""The steps as Kubeflow Pipelines sees them: what goes into each, what comes out. What a step does is in its `step.py`.

A component's arguments are those of its step's `run`, by the same names: artifacts reach it as paths. The body runs in the pod:
it is taken from here as text, so it imports what it needs.
"""

import functools
from typing import NamedTuple

from kfp import dsl

from components import IMAGE

component = functools.partial(dsl.component, base_image=IMAGE, install_kfp_package=False)


@component
def begin(
    job: str,
    name: str,
    called: str,
    resource: str,
    resumes: str,
    version: str,
    source: str,
    source_version: str,
    space: str,
    presets: list[str],
    seeds: list[int],
    overrides: list[str],
) -> NamedTuple("Begun", [("parent", str), ("source_version", str)]):  # type: ignore[valid-type]
    """Opens the parent run in MLflow; its id, and the version that names the state of the recordings."""
    from components.attempts import attempt

    return attempt("begin", locals())


@component
def ingest(
    source: str, source_version: str, space: str, store: str, data: dsl.Output[dsl.Dataset], report: dsl.Output[dsl.Markdown]
) -> None:
    """Raw recordings to one skeleton set."""
    from components.attempts import attempt

    data.metadata.update(attempt("ingest", locals()))


@component
def train(
    data: dsl.Input[dsl.Dataset],
    preset: str,
    protocol: str,
    stream: str,
    seed: int,
    overrides: list[str],
    checkpoints: str,
    parent: str,
    checkpoint: dsl.Output[dsl.Model],
) -> None:
    """One stream of one protocol."""
    from components.attempts import attempt

    checkpoint.metadata.update(attempt("train", locals()))


@component
def evaluate(
    data: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Input[dsl.Model],
    preset: str,
    protocol: str,
    stream: str,
    seed: int,
    parent: str,
    store: str,
    scores: dsl.Output[dsl.Artifact],
) -> None:
    """Scores of the held-out samples."""
    from components.attempts import attempt

    scores.metadata.update(attempt("evaluate", locals()))


@component
def fuse(
    scores: dsl.Input[list[dsl.Artifact]],
    preset: str,
    protocol: str,
    seed: int,
    parent: str,
    fused: dsl.Output[dsl.Artifact],
    confusion: dsl.Output[dsl.ClassificationMetrics],
) -> None:
    """The streams' scores joined."""
    from components.attempts import attempt

    facts, classes, matrix = attempt("fuse", locals())
    fused.metadata.update(facts)
    if classes:
        confusion.log_confusion_matrix(classes, matrix)


@component
def register(
    data: dsl.Input[dsl.Dataset],
    checkpoints: dsl.Input[list[dsl.Model]],
    fused: dsl.Input[dsl.Artifact],
    preset: str,
    protocol: str,
    seed: int,
    parent: str,
) -> str:
    """The fused model as a candidate, alias challenger; returns its URI."""
    from components.attempts import attempt

    return str(attempt("register", locals()))


@component
def gate(
    model: str,
    data: dsl.Input[dsl.Dataset],
    floor: float,
    margin: float,
    significance: float,
    class_drop: float,
    preset: str,
    protocol: str,
    seed: int,
    parent: str,
) -> str:
    """Challenger and champion measured: `promote` or `hold`."""
    from components.attempts import attempt

    return str(attempt("gate", locals()))


@component
def promote(model: str, preset: str, protocol: str, seed: int, parent: str) -> None:
    """The version becomes champion."""
    from components.attempts import attempt

    attempt("promote", locals())


@component
def finish(
    job: str,
    status: dsl.PipelineTaskFinalStatus,
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
) -> None:
    """Results, and the end of the parent run, whatever became of the steps."""
    from components.attempts import attempt

    for name, value in attempt("finish", locals()).items():
        metrics.log_metric(name, value)
