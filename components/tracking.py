"""MLflow, as the steps see it: one parent run per pipeline run, one child run per piece of work, a registry of models.

With `registry.py` the only place where a step touches MLflow. All is found again by its tags, so that a step which runs twice
continues what it began. The server is the one `MLFLOW_TRACKING_URI` names.

A process that is killed leaves its run RUNNING. Whatever begins or ends next closes it: the next attempt of the same work, the
end of the pipeline run, or the beginning of the next pipeline run at the same place.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from csv import writer as csv_writer
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the steps' own address of it
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# KFP's MLflow plugin, where an administrator has it on, names a run of its own making to every step: never ours.
# Source: KFP 2.17.0, backend/src/v2/common/plugins/mlflow/handler.go:141.
os.environ.pop("MLFLOW_RUN_ID", None)
os.environ.pop("MLFLOW_EXPERIMENT_ID", None)

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Map
from numpy.typing import NDArray

import ffn
from components import LABEL, cluster
from ffn.checkpoint import Checkpoint
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.report import Result
from ffn.scores import Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN, KEY, KIND, PARENT = "ffn.run", "ffn.key", "ffn.step", "mlflow.parentRunId"
"""Tags: which pipeline run it is (on the parent: KFP's id, or the name on one machine), what a child was made from, what it did,
whose child it is."""

WHERE, ATTEMPT, FAILED = "ffn.where", "ffn.attempt", "ffn.failed."
"""Tags: where the pipeline run goes on, which beginning of it a run was last opened in, and on the parent why a step ended for good
(the step's label follows)."""

ERROR, POD, STEP, NOTE = "ffn.error", "ffn.pod", "ffn.label", "mlflow.note.content"
"""Tags of a child that failed: why, in which pod, in which step. The note is what MLflow shows first."""

COMMIT = "mlflow.source.git.commit"
LINEAGE: Mapping[str, str] = {
    "git_commit": COMMIT,
    "image": "ffn.image",
    "kfp_run": "ffn.kfp_run",
    "kfp_url": "ffn.kfp_url",
    "data_digest": "ffn.data_digest",
    "pipeline_version": "ffn.pipeline_version",
}
"""Where a model comes from: tag of a registered version -> tag of every run that led to it."""

ENDED_TEXT = 2000
"""The most that is kept of an error's text."""

PYFUNC = Path(__file__).parent / "register" / "pyfunc.py"
SERVING_REQUIREMENTS = ("mlflow", "numba", "numpy", "pandas", "pyarrow", "safetensors", "torch")
"""What the code of a registered model imports, and no more: `ffn.inference` and what it leads to (numba's loops prepare the clips,
pyarrow is imported beside the configuration of sets), `register/pyfunc.py` with pandas.

llvmlite is imported too, but numba asks for the one version that fits it. MLflow is whole, not mlflow-skinny: `mlflow models
serve` needs its server, and it brings pandas and pyarrow anyway.
"""

SAMPLING_SECONDS = 5.0
"""Between two samples of the system metrics."""

MOST_RUNS = 50_000
"""The most that MLflow returns at once."""

PARAM_LENGTH = 6000
"""The longest parameter value MLflow takes."""


@dataclass(frozen=True, kw_only=True)
class Child:
    """One MLflow run of a step: what is logged twice is stored once."""

    id: str
    client: MlflowClient

    @classmethod
    def of(cls, run_id: str) -> Self:
        """The run of that id."""
        return cls(id=run_id, client=MlflowClient())

    def page(self) -> str:
        """This run in MLflow's interface, where a person's browser finds it; on this machine where the store is a database.

        The interface begins with its view of language models unless the address says otherwise.
        """
        uri = os.environ.get("FFN_MLFLOW_UI") or mlflow.get_tracking_uri()
        server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
        experiment = self.client.get_run(self.id).info.experiment_id
        return f"{server}/#/experiments/{experiment}/runs/{self.id}?workflowType=machine_learning"

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters; one that was logged before keeps its first value."""
        known = self.client.get_run(self.id).data.params
        new = [Param(name, str(value)[:PARAM_LENGTH]) for name, value in values.items() if name not in known]
        self.client.log_batch(self.id, params=new)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of one step in one call; without a step, one that has that value already is not logged again."""
        known = {} if step else self.client.get_run(self.id).data.metrics
        now = int(time.time() * 1000)
        new = [Metric(name, float(value), now, step) for name, value in values.items() if known.get(name) != value]
        self.client.log_batch(self.id, metrics=new)

    def param(self, name: str) -> str:
        """A parameter that was logged; empty where it was not."""
        return str(self.client.get_run(self.id).data.params.get(name, ""))

    def steps(self, metric: str) -> set[int]:
        """The steps at which `metric` was logged."""
        return {point.step for point in self.client.get_metric_history(self.id, metric)}

    def result(self, metrics: Metrics, classes: tuple[str, ...]) -> None:
        """Log held-out measures: scalars, the confusion matrix and the per-class table as CSV and as figures."""
        from ffn import plots

        self.metrics(metrics.to_dict())
        header = ["true \\ predicted", *classes]
        self.text(
            csv([header, *([name, *row] for name, row in zip(classes, metrics.confusion.tolist(), strict=True))]), "confusion.csv"
        )
        rows = [(row.name, row.samples, row.recall, row.precision, row.mistaken_for) for row in metrics.per_class]
        self.text(csv([("class", "samples", "recall", "precision", "mistaken for"), *rows]), "per_class.csv")
        self.figure(plots.confusion_matrix(metrics, classes), "figures/confusion.png")
        self.figure(plots.per_class(metrics, classes), "figures/per_class.png")

    def dataset(self, data: SkeletonSet, context: str, *, part: str = "", **facts: object) -> None:
        """Log the skeleton set, or the `part` of it that was used, as an input; `context` is `training` or `evaluation`."""
        source = str(data.provenance.get("source", data.path))
        entity = Dataset(
            # MLflow keeps one input per name and digest, and the context of the first.
            name="/".join(filter(None, (Path(source).name or source, part))),
            digest=data.digest,
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"samples": len(data), "classes": len(data.classes), "layout": data.layout.name, **facts}),
        )
        inputs = [DatasetInput(entity, [InputTag("mlflow.data.context", context)])]
        try:
            self.client.log_inputs(self.id, inputs)
        except MlflowException:
            # MLflow looks, then stores: of two streams that log one data set at the same moment, one fails. Now it is found.
            self.client.log_inputs(self.id, inputs)

    def figure(self, figure: "Figure", name: str) -> None:
        self.client.log_figure(self.id, figure, name)

    def text(self, text: str, name: str) -> None:
        self.client.log_text(self.id, text, name)

    def folder(self, folder: Path, name: str) -> None:
        self.client.log_artifacts(self.id, str(folder), name)

    def tag(self, name: str, value: str) -> None:
        self.client.set_tag(self.id, name, value)

    @property
    def status(self) -> str:
        """RUNNING, FINISHED, FAILED or KILLED."""
        return str(self.client.get_run(self.id).info.status)

    @property
    def open(self) -> bool:
        """Whether the run is going on."""
        return self.status == "RUNNING"

    @property
    def name(self) -> str:
        return str(self.client.get_run(self.id).info.run_name)

    def facts(self) -> dict[str, str]:
        """What was asked of a pipeline run, and where it comes from, by plain names."""
        run = self.client.get_run(self.id)
        return {**run.data.params, **{name: run.data.tags[tag] for name, tag in LINEAGE.items() if tag in run.data.tags}}

    def model(self, folder: Path, meta: Checkpoint, example: NDArray[np.float32]) -> str:
        """Log the fused model in `folder` as one pyfunc and return its URI; a run has one model, however often it is logged.

        `example` is (1, M, T, V, 3) raw keypoints.
        """
        known = self.logged()
        if known:
            return known
        joints = len(meta.layout.joints)
        size = [ParamSpec(name, DataType.long, value) for name, value in zip(("width", "height"), meta.image_size, strict=True)]
        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, joints, 3))]),
            outputs=Schema(
                [ColSpec("string", "label"), ColSpec("double", "probability"), ColSpec(Map(DataType.double), "probabilities")]
            ),
            params=ParamSchema(size) if meta.space == "2d" else None,
        )
        with mlflow.start_run(run_id=self.id, log_system_metrics=False):
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(PYFUNC),
                artifacts={"fused": str(folder)},
                signature=signature,
                input_example=example,
                code_paths=[str(Path(ffn.__file__).parent)],
                pip_requirements=[pinned(name) for name in SERVING_REQUIREMENTS],
            )
        self.client.update_run(self.id, "RUNNING")
        self.tag("ffn.model", logged.model_uri)
        return str(logged.model_uri)

    def logged(self) -> str | None:
        """URI of the model that `model` logged, if it did: the tag's, or of one that a kill left whole but untagged."""
        run = self.client.get_run(self.id)
        if tagged := run.data.tags.get("ffn.model"):
            return str(tagged)
        logged = [self.client.get_logged_model(output.model_id) for output in run.outputs.model_outputs] if run.outputs else []
        return next((str(model.model_uri) for model in logged if model.status == LoggedModelStatus.READY), None)


def begin(
    run: str,
    inputs: Mapping[str, object],
    facts: Mapping[str, object] | None = None,
    *,
    name: str = "",
    where: str = "",
    resumes: str = "",
    tags: Mapping[str, str] | None = None,
    once: bool = False,
) -> str:
    """The parent run of the pipeline run `run`, with its `facts` and `tags`: found by its tag, or else created. Returns its id.

    `run` is KFP's id of it, on one machine its name; `name` is what people read. A pipeline run that `resumes` another one
    which did not finish takes up that one's parent (several ids, with blanks between, the first that has one). What an earlier
    beginning left open is closed. Where a pipeline run begins `once`, a second call is the same beginning.

    Raises `FFNError` where the run was begun with other inputs, and leaves it as it is.
    """
    client = MlflowClient()
    found = _parent(client, run) or next((taken for one in resumes.split() if (taken := _unfinished(client, one))), None)
    if found:
        _require_equal(found.info.run_name, found.data.params, inputs)
    run_id = found.info.run_id if found else client.create_run(_experiment(client), run_name=name or run).info.run_id
    again = bool(once and found and found.data.tags.get(RUN) == run)
    attempt = found.data.tags[ATTEMPT] if found and again else uuid.uuid4().hex[:12]
    if found and not again:
        _end_children(client, found)
        for tag in found.data.tags:
            if tag.startswith(FAILED):
                client.delete_tag(run_id, tag)
    said = {RUN: run, ATTEMPT: attempt, **({WHERE: where} if where else {}), **(tags or {})}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in said.items() if value])
    client.update_run(run_id, "RUNNING")
    Child(id=run_id, client=client).params({**inputs, **(facts or {})})
    return str(run_id)


def _require_equal(name: str, known: Mapping[str, str], inputs: Mapping[str, object]) -> None:
    for what, value in inputs.items():
        ours, theirs = str(value)[:PARAM_LENGTH], known.get(what)
        if theirs is not None and ours != theirs:
            raise FFNError(f"run {name!r} was begun with {what} {theirs!r}, now it is {ours!r}; choose another --name")


def parent(run: str) -> Child:
    """The parent run of the pipeline run `run`. Raises `FFNError` where there is none."""
    client = MlflowClient()
    found = _parent(client, run)
    if not found:
        raise FFNError(f"no pipeline run {run!r} in {mlflow.get_tracking_uri()}")
    return Child(id=found.info.run_id, client=client)


def anywhere(run: str) -> Child | None:
    """The parent run of KFP's run `run`, in whichever experiment; None where there is none."""
    client = MlflowClient()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{RUN}` = '{run}'", max_results=1)
    return Child(id=found[0].info.run_id, client=client) if found else None


def present() -> str:
    """The parent run of the pipeline run that this process is a step of, found from outside; empty where it is of none."""
    run = os.environ.get("FFN_RUN") or cluster.run()
    found = _parent(MlflowClient(), run) if run else None
    return str(found.info.run_id) if found else ""


def close_dead(where: str, state: Callable[[str], str]) -> list[str]:
    """Close the parents at the place `where` whose pipeline run has ended without closing them; their names.

    `state` tells what MLflow should say of a pipeline run: RUNNING, FINISHED, FAILED or KILLED.
    """
    client = MlflowClient()
    still = f"attributes.status = 'RUNNING' and tags.`{WHERE}` = '{where}'"
    closed = []
    for run in client.search_runs([_experiment(client)], still, max_results=MOST_RUNS):
        ended = state(run.data.tags[RUN]) if PARENT not in run.data.tags else "RUNNING"
        if ended != "RUNNING":
            end(run.info.run_id, ended)
            closed.append(str(run.info.run_name))
    return closed


def outcome(parent_id: str, state: str) -> str:
    """How the parent is to end: as `state` says, but FAILED in place of FINISHED where a step or a piece of work did not finish.

    Children that are still open lost their process: they end KILLED.
    """
    client = MlflowClient()
    run = client.get_run(parent_id)
    now, _ = _end_children(client, run)
    failed = now or any(tag.startswith(FAILED) for tag in run.data.tags)
    return "FAILED" if failed and state == "FINISHED" else state


def end(parent_id: str, state: str) -> str:
    """End the parent and all its children; returns how, which is its `outcome`.

    What failed in an earlier beginning and was not needed again (of other data, say) leaves a finished run: MLflow keeps it among
    the deleted ones.
    """
    client = MlflowClient()
    state = outcome(parent_id, state)
    if state == "FINISHED":
        for child in _end_children(client, client.get_run(parent_id))[1]:
            client.delete_run(child.info.run_id)
    client.set_terminated(parent_id, state)
    return state


def _end_children(client: MlflowClient, parent: Run) -> tuple[list[Run], list[Run]]:
    """End open children as KILLED; the children that did not finish: of the parent's present attempt, and of earlier ones."""
    found = children(client, parent.info.run_id, also=" and attributes.status != 'FINISHED'")
    for child in found:
        if child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, "KILLED")
    now = [child for child in found if child.data.tags.get(ATTEMPT) == parent.data.tags.get(ATTEMPT)]
    return now, [child for child in found if child not in now]


def record_failure(parent: str, label: str, said: str) -> None:
    """Write on the parent run why the step `label` ended for good, and in which pod."""
    pod = cluster.pod()
    MlflowClient().set_tag(parent, FAILED + label, f"{said}{f' (pod {pod})' if pod else ''}"[:ENDED_TEXT])


def failure(parent: str, label: str) -> str:
    """Why the step `label` ended for good in this beginning of the pipeline run; empty where it did not."""
    return str(MlflowClient().get_run(parent).data.tags.get(FAILED + label, ""))


def failures(parent_id: str) -> dict[str, str]:
    """Step -> why it failed: what steps wrote down, and the children that were killed without a word."""
    client = MlflowClient()
    run = client.get_run(parent_id)
    found = {tag.removeprefix(FAILED): why for tag, why in run.data.tags.items() if tag.startswith(FAILED)}
    now, _ = _end_children(client, run)
    for child in now:
        found.setdefault(child.data.tags.get(STEP) or str(child.info.run_name), child.data.tags.get(ERROR) or LOST)
    return found


LOST = "its process was killed without a word: for want of memory, with its node, or by hand"


def note(parent: str, tags: Mapping[str, str]) -> None:
    """Set tags of the parent run, if there is one."""
    if parent:
        MlflowClient().log_batch(parent, tags=[RunTag(key, value) for key, value in tags.items()])


@contextlib.contextmanager
def child(parent: str, *, key: str, kind: str, name: str = "", names: Mapping[str, str] | None = None) -> Iterator[Child]:
    """The child of `parent` made from `key`: found, or else created; open inside the block, closed by how it ends.

    It is called `name`, or by its `names`, which become its tags. An empty `parent` gives a run without one.
    """
    client = MlflowClient()
    above = client.get_run(parent) if parent else None
    experiment = above.info.experiment_id if above else _experiment(client)
    wanted = f"tags.`{KEY}` = '{key}'" + (f" and tags.`{PARENT}` = '{parent}'" if parent else "")
    found = client.search_runs([experiment], wanted, max_results=1)
    tags = {tag: above.data.tags[tag] for tag in (ATTEMPT, *LINEAGE.values()) if above and tag in above.data.tags}
    tags |= {POD: pod} if (pod := cluster.pod()) else {}
    tags |= {STEP: label} if (label := os.environ.get(LABEL)) else {}
    if found:
        run_id = found[0].info.run_id
        client.log_batch(run_id, tags=[RunTag(tag, value) for tag, value in tags.items()])
        for tag in {ERROR, NOTE} & set(found[0].data.tags):
            client.delete_tag(run_id, tag)
        client.update_run(run_id, "RUNNING")
    else:
        tags |= {f"ffn.{what}": value for what, value in (names or {}).items()}
        tags |= {KEY: key, KIND: kind, **({PARENT: parent} if parent else {})}
        run_id = client.create_run(experiment, run_name=name or title(names or {}), tags=tags).info.run_id
    monitor = SystemMetricsMonitor(run_id, sampling_interval=SAMPLING_SECONDS, samples_before_logging=1, resume_logging=bool(found))
    monitor.start()
    state, why = "FINISHED", ""
    try:
        yield Child(id=run_id, client=client)
    except Exception as error:
        state, why = "FAILED", str(error) if isinstance(error, FFNError) else f"{type(error).__name__}: {error}"
        raise
    except BaseException:
        state = "KILLED"
        raise
    finally:
        monitor.finish()
        if why:
            said = {ERROR: why[:ENDED_TEXT], NOTE: f"**Failed**: {why[:ENDED_TEXT]}"}
            client.log_batch(run_id, tags=[RunTag(tag, value) for tag, value in said.items()])
        client.set_terminated(run_id, state)


def names(preset: str, protocol: str, stream: str, seed: int) -> dict[str, str]:
    """What tells one training or fusion from the others of its pipeline run."""
    return {"preset": preset, "protocol": protocol, "stream": stream, "seed": str(seed)}


def title(names: Mapping[str, str]) -> str:
    """`S4/ntu60-xsub/j`, and `S4/ntu60-xsub/j/seed1` where the seed is not 0."""
    seed = names.get("seed", "0")
    return "/".join([*(value for what, value in names.items() if what != "seed"), *([f"seed{seed}"] if seed != "0" else [])])


def children(client: MlflowClient, parent_id: str, *, also: str = "") -> list[Run]:
    experiment = client.get_run(parent_id).info.experiment_id
    wanted = f"tags.`{PARENT}` = '{parent_id}'{also}"
    return list(client.search_runs([experiment], wanted, max_results=MOST_RUNS, order_by=["attributes.start_time ASC"]))


def pictures(parent_id: str) -> dict[str, dict[str, bytes]]:
    """Child that has figures -> name of one (`confusion`, `learning_curves`) -> PNG; a figure that cannot be had is left out."""
    client = MlflowClient()
    found: dict[str, dict[str, bytes]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for child in children(client, parent_id):
            for name in ("confusion", "learning_curves") if child.data.tags.get(KIND) in ("train", "fuse") else ():
                try:
                    path = client.download_artifacts(child.info.run_id, f"figures/{name}.png", folder)
                except (MlflowException, OSError):
                    continue
                found.setdefault(str(child.info.run_name), {})[name] = Path(path).read_bytes()
    return found


def results(parent_id: str) -> list[Result]:
    """What every child that was measured gave; one that was measured twice counts once, as it was measured last."""
    found: dict[tuple[str, ...], Result] = {}
    for run in children(MlflowClient(), parent_id):
        said = tuple(run.data.tags.get(f"ffn.{what}") for what in ("preset", "protocol", "stream", "seed"))
        if all(said) and "top1" in run.data.metrics:
            preset, protocol, stream, seed = said
            found[said] = Result(preset=preset, protocol=protocol, stream=stream, seed=int(seed), top1=run.data.metrics["top1"])
    return list(found.values())


def pinned(package: str) -> str:
    """The installed version of `package` as a requirement: `torch==2.13.0`.

    Without the local part that names a build (`+cpu`, `+cu130`): one index has 2.13.0+cpu, another 2.13.0 alone, and the pin
    without it fits both. Which build is right is for the machine that loads the model.
    """
    return f"{package}=={importlib.metadata.version(package).split('+')[0]}"


def csv(rows: Iterable[Iterable[object]]) -> str:
    """Rows as comma-separated text."""
    text = io.StringIO()
    csv_writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ffn")
    found = client.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    try:
        where, tags = os.environ.get("FFN_ARTIFACTS") or None, {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=where, tags=tags))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return str(client.get_experiment_by_name(name).experiment_id)


def _parent(client: MlflowClient, run: str) -> Run | None:
    quoted = run.replace("'", "")
    found = client.search_runs([_experiment(client)], f"tags.`{RUN}` = '{quoted}'", max_results=1)
    return found[0] if found else None


def _unfinished(client: MlflowClient, run: str) -> Run | None:
    """The parent that the pipeline run `run` was the last to work for, unless that finished."""
    found = _parent(client, run)
    return found if found and found.info.status != "FINISHED" else None


def lineage(parent: str) -> dict[str, str]:
    """Tags for a version that the pipeline run `parent` made: what it says of `LINEAGE`, its name and id; none without a run."""
    if not parent:
        return {}
    run = MlflowClient().get_run(parent)
    said = {name: run.data.tags[tag] for name, tag in LINEAGE.items() if run.data.tags.get(tag)}
    return {**said, "run": str(run.info.run_name), "mlflow_run": parent}
