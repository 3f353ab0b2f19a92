"""A compiled pipeline on KFP: uploaded as a version, submitted once however often it is asked for, put on a schedule."""

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from ffn import config as configuration
from ffn.errors import FFNError
from pipeline.server import Call, Json, Server, equals
from pipeline.settings import DIGEST, NAME
from pipeline.watch import CANCEL_PATIENCE, ENDS, Status, cancel, close

MARK = "made by ffn from inputs "
"""In the description of runs and schedules, before the digest of the pipeline and its parameters."""

SETTLE_SECONDS = 120.0
"""How long a retry waits for a cancelled run to end."""

WAIT_SECONDS = 3.0
"""Between disabling a schedule and believing that it makes no further run."""

MOST_RESUMED = 20

WITHOUT_PLUGIN = {"mlflow": {"disabled": True}}
"""KFP's MLflow plugin, where an administrator has it on, would log every run once more; of a schedule's runs it knows nothing.

Not for schedules: one that says anything of plugins loses the parameters of its runs.
Source: KFP 2.17.0, backend/src/apiserver/plugins/mlflow/dispatcher.go:51, backend/src/apiserver/resource/resource_manager.go:1314.
"""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A compiled pipeline with its parameters: what a run is made from."""

    path: Path
    spec: Json
    parameters: Mapping[str, object]
    version: str
    """Names the pipeline version: the image's digest and the graph's."""

    @property
    def digest(self) -> str:
        return configuration.digest(self.spec, dict(self.parameters))

    @property
    def description(self) -> str:
        """What the pipeline does, as it says itself, and what the run is made from."""
        said = self.spec.get("pipeline_spec", self.spec).get("pipelineInfo", {}).get("description", "")
        return f"{said} · {MARK}{self.digest}" if said else f"{MARK}{self.digest}"

    def body(self, version: Json, resumes: str = "") -> Json:
        """What runs and schedules have in common; `version` is the uploaded one."""
        return {
            "description": self.description,
            "pipeline_version_reference": {name: version[name] for name in ("pipeline_id", "pipeline_version_id")},
            "runtime_config": {"parameters": {**self.parameters, **({"resumes": resumes} if resumes else {})}},
        }


def load(path: Path, parameters: Mapping[str, object], *, allow_tag: bool = False) -> Pipeline:
    """The pipeline that `ffn cluster compile` wrote to `path`, with these parameters.

    Raises `FFNError` for a file that is none, a parameter it does not know or lacks, and for an image by tag unless allowed:
    what a retried job or a cached step would get from a tag that has moved is not what was submitted.
    """
    try:
        documents = [part for part in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader) if part]
        pipeline = documents[0]
        images = {step["container"]["image"] for step in pipeline["deploymentSpec"]["executors"].values()}
        known = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
    except OSError as error:
        raise FFNError(f"{path}: {error.strerror}; `ffn cluster compile --out {path}` writes it") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError):
        raise FFNError(f"{path}: not a compiled pipeline; `ffn cluster compile --out {path}` writes one") from None
    if unknown := sorted(set(parameters) - set(known)):
        raise FFNError(f"{path}: no parameter {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if missing := [
        name for name, of in known.items() if name not in parameters and "defaultValue" not in of and not of.get("isOptional")
    ]:
        raise FFNError(f"{path}: parameter {', '.join(missing)} is missing")
    if (tags := sorted(image for image in images if not DIGEST.search(image))) and not allow_tag:
        raise FFNError(f"{path}: image {', '.join(tags)} is a tag; compile with FFN_IMAGE=...@sha256:..., or --allow-tag")
    spec = {"pipeline_spec": pipeline, "platform_spec": documents[1]} if len(documents) > 1 else pipeline
    return Pipeline(path=path, spec=spec, parameters=parameters, version=_said_version(pipeline) or version_of(images, spec))


def version_of(images: Iterable[str], spec: object) -> str:
    """`<image>-<graph>`, twelve hex digits of the digest of each; of an image by tag its tag."""
    names = sorted({image.rpartition("@sha256:")[2][:12] if DIGEST.search(image) else image.rpartition(":")[2] for image in images})
    return f"{'-'.join(names)}-{configuration.digest(spec)[:12]}"


def _said_version(pipeline: Json) -> str:
    """The version that the compiled pipeline's runs say they are of; empty where they say none."""
    for component in pipeline.get("components", {}).values():
        begin = component.get("dag", {}).get("tasks", {}).get("begin", {})
        if said := begin.get("inputs", {}).get("parameters", {}).get("version", {}):
            return str(said.get("runtimeValue", {}).get("constant", ""))
    return ""


def submit(
    server: Server, pipeline: Pipeline, *, name: str, experiment: str, account: str = "", retry: bool = False
) -> tuple[Json, str]:
    """The run called `name`, and what was done for it: `made`, `found` or `retried`.

    A run of that name from the same inputs is the one that is wanted. If it failed or was cancelled, a `retry` makes a new run
    of that name, which goes on with the old one's MLflow run and the states of its trainings: KFP's own retry would not run
    `finish` again. Raises `FFNError` where the name belongs to a run from other inputs.
    """
    where = experiment_id(server, experiment)
    before: Json | None = None

    def find() -> Json | None:
        found = best(_named(server, name, where))
        if found and not _ours(found, pipeline):
            raise FFNError(f"run {name} of experiment {experiment} was made from other inputs; choose another --name")
        return None if found and before and found["run_id"] == before["run_id"] else found

    found = find()
    if found and retry:
        found = _settled(server, found)
    if found and not (retry and found.get("state") in ("FAILED", "CANCELED")):
        return found, "found"
    before = found
    content = pipeline.body(uploaded(server, pipeline), resumes=_resumed(found) if found else "")
    body = {"display_name": name, "experiment_id": where, "plugins_input": WITHOUT_PLUGIN, **content}
    body |= {"service_account": account} if account else {}
    run, made = server.create(find, server.runs.run_service_create_run, body)
    return _the_one(server, pipeline, name, where, run) if made else run, "retried" if before else "made" if made else "found"


def _settled(server: Server, run: Json) -> Json:
    """The run, when it has ended, if it was asked to: a cancelled one takes its time."""
    until = time.monotonic() + SETTLE_SECONDS
    while run.get("state") == "CANCELING" and time.monotonic() < until:
        time.sleep(2)
        run = server.ask(server.runs.run_service_get_run, run["run_id"])
    if run.get("state") == "CANCELING":
        raise FFNError(f"run {run['run_id']} is still being cancelled; the same command in a minute goes on with it")
    return run


def _resumed(run: Json) -> str:
    """The ids of `run` and of those that it went on with itself: where it never began, one of them has the run in MLflow."""
    said = (run.get("runtime_config") or {}).get("parameters") or {}
    return " ".join([run["run_id"], *str(said.get("resumes") or "").split()][:MOST_RESUMED])


def best(runs: Sequence[Json]) -> Json | None:
    """Of the runs of one name, the newest last: one that goes on (the oldest), else one that succeeded, else the newest."""
    going = [run for run in runs if run.get("state") not in ENDS]
    done = [run for run in runs if run.get("state") == "SUCCEEDED"]
    return going[0] if going else done[-1] if done else runs[-1] if runs else None


def uploaded(server: Server, pipeline: Pipeline) -> Json:
    """The pipeline's version on the server, uploaded where it is not there: KFP's lists, versions and clones refer to it."""
    spot = {"namespace": server.endpoint.namespace}
    ours = partial(_called, server, server.pipelines.pipeline_service_list_pipelines, NAME, **spot)
    body = {"display_name": NAME, "name": NAME, **spot}
    owner = _ensured(server, ours, server.pipelines.pipeline_service_create_pipeline, body)["pipeline_id"]
    versions = partial(_called, server, server.pipelines.pipeline_service_list_pipeline_versions, pipeline.version, owner)
    return _ensured(
        server, versions, server.uploads.upload_pipeline_version, pipeline.path, pipelineid=owner, name=pipeline.version,
        display_name=pipeline.version, description=pipeline.description.partition(f" · {MARK}")[0],
    )  # fmt: skip


def experiment_id(server: Server, name: str) -> str:
    """The experiment called `name`, made where there is none."""
    spot = {"namespace": server.endpoint.namespace}
    called = partial(_called, server, server.experiments.experiment_service_list_experiments, name, **spot)
    body = {"display_name": name, **spot}
    return str(_ensured(server, called, server.experiments.experiment_service_create_experiment, body)["experiment_id"])


def _called(server: Server, call: Call, name: str, *given: str, **query: str) -> Iterator[Json]:
    """Entries of a list that have that name."""
    listed = server.list(call, *given, filter=equals("display_name", name), **query)
    return (entry for entry in listed if entry.get("display_name") == name)


def _ensured(server: Server, found: Callable[[], Iterator[Json]], call: Call, *given: object, **more: object) -> Json:
    """The first that is found, or what the call makes; another job may be quicker between our look and our request."""
    try:
        return server.create(lambda: next(found(), None), call, *given, **more)[0]
    except FFNError:
        if (other := next(found(), None)) is None:
            raise
        return other


def run_id(server: Server, run: str, experiment: str) -> str:
    """The id of `run`, which is one already or the name of a run. Raises `FFNError` where there is none of that name."""
    try:
        return str(uuid.UUID(run))
    except ValueError:
        found = best(_named(server, run, experiment_id(server, experiment)))
    if not found:
        raise FFNError(f"no run {run} in experiment {experiment} of {server.endpoint.url}")
    return str(found["run_id"])


def schedule(server: Server, pipeline: Pipeline, *, name: str, cron: str, experiment: str, account: str = "") -> tuple[Json, str]:
    """The schedule called `name`, and what was done for it: `made`, `found` or `replaced`.

    One run at a time; what was missed while the server was down is not caught up with. The new one is there before the old
    one goes: cut off between, the same command ends what it began. No run is harmed: see `unschedule`.
    """
    cron = six_fields(cron)
    where = experiment_id(server, experiment)

    def same(entry: Json) -> bool:
        return _ours(entry, pipeline) and entry.get("trigger", {}).get("cron_schedule", {}).get("cron") == cron

    def find() -> Json | None:
        return next((entry for entry in _scheduled(server, name, where) if same(entry)), None)

    kept = find()
    made = kept is None
    if kept is None:
        body = {
            "display_name": name, "experiment_id": where, **pipeline.body(uploaded(server, pipeline)), "mode": "ENABLE",
            "max_concurrency": "1", "no_catchup": True, "trigger": {"cron_schedule": {"cron": cron}},
            **({"service_account": account} if account else {}),
        }  # fmt: skip
        kept, made = server.create(find, server.schedules.recurring_run_service_create_recurring_run, body)
    others = [entry for entry in _scheduled(server, name, where) if entry["recurring_run_id"] != kept["recurring_run_id"]]
    for entry in others:
        _end_schedule(server, entry)
    if not made and kept.get("status") == "DISABLED":
        server.ask(server.schedules.recurring_run_service_enable_recurring_run, kept["recurring_run_id"])
    return kept, "replaced" if others else "made" if made else "found"


def unschedule(server: Server, name: str, experiment: str) -> list[tuple[Json, Json | None]]:
    """End the schedules called `name`; each with the run of it that still goes on, if there is one.

    A schedule owns the workflows of its runs, and deleting it would kill one that goes on: that schedule is disabled, makes no
    further run, and is deleted by the next `unschedule` or `schedule` of that name.
    """
    return [(entry, _end_schedule(server, entry)) for entry in _scheduled(server, name, experiment_id(server, experiment))]


def _end_schedule(server: Server, entry: Json) -> Json | None:
    """Disable the schedule; delete it unless a run of it goes on, which is returned."""
    schedule = entry["recurring_run_id"]
    server.ask(server.schedules.recurring_run_service_disable_recurring_run, schedule)

    def going() -> Json | None:
        of = {"experiment_id": entry.get("experiment_id", ""), "filter": equals("recurring_run_id", schedule)}
        made = server.list(server.runs.run_service_list_runs, **of)
        return next((run for run in made if run.get("recurring_run_id") == schedule and run.get("state") not in ENDS), None)

    found = going()
    if not found:  # the controller may be making one just now
        time.sleep(WAIT_SECONDS)
        found = going()
    if not found:
        server.delete(server.schedules.recurring_run_service_delete_recurring_run, schedule)
    return found


def schedules(server: Server, experiment: str) -> list[Json]:
    """All schedules of the experiment."""
    call = server.schedules.recurring_run_service_list_recurring_runs
    return list(server.list(call, experiment_id=experiment_id(server, experiment)))


def six_fields(cron: str) -> str:
    """KFP's cron expression, seconds first, of one with five or six fields. Raises `FFNError` for any other."""
    parts = cron.split()
    if len(parts) not in (5, 6) or not all(re.fullmatch(r"[\w*/,?#-]+", part) for part in parts):
        raise FFNError(f"--cron {cron!r}: expected five fields (minute hour day month weekday), such as '0 2 * * 0'")
    return " ".join(parts if len(parts) == 6 else ["0", *parts])


def _named(server: Server, name: str, experiment: str) -> list[Json]:
    """Runs of that name that were not archived, the newest last."""
    found = _called(server, server.runs.run_service_list_runs, name, experiment_id=experiment)
    return sorted((run for run in found if run.get("storage_state") != "ARCHIVED"), key=_age)


def _scheduled(server: Server, name: str, experiment: str) -> list[Json]:
    return list(_called(server, server.schedules.recurring_run_service_list_recurring_runs, name, experiment_id=experiment))


def _age(entry: Json) -> tuple[str, str]:
    return entry.get("created_at") or "", entry["run_id"]


def _ours(entry: Json, pipeline: Pipeline) -> bool:
    return f"{MARK}{pipeline.digest}" in (entry.get("description") or "")


def _the_one(server: Server, pipeline: Pipeline, name: str, experiment: str, made: Json) -> Json:
    """The oldest of the runs of this name that go on.

    The others, made by a job at the same moment, are cancelled, and archived so that nobody takes one for the run.
    """
    going = [run for run in _named(server, name, experiment) if _ours(run, pipeline) and run.get("state") not in ENDS]
    for other in going[1:]:
        cancel(server, other["run_id"])
        close(other["run_id"], Status.CANCELLED)
        server.ask(server.runs.run_service_archive_run, other["run_id"], patience=CANCEL_PATIENCE)
    return going[0] if going else made
