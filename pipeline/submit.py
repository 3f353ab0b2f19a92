"""A compiled pipeline on KFP: submitted once however often it is asked for, watched to its end, put on a schedule."""

import json
import os
import re
import signal
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import NoReturn

import yaml

from ffn import config as configuration
from ffn.errors import FFNError
from pipeline.server import Json, Refused, Server, Unreachable, equals
from pipeline.settings import DIGEST

MARK = "made by ffn from inputs "
"""In the description of runs and schedules, before the digest of the pipeline and its parameters."""

POLL_SECONDS = 10.0
CANCEL_PATIENCE = 20.0
"""Seconds that a cancellation may take: a CI system that ends a job does not wait longer."""

UNKNOWN = "RUNTIME_STATE_UNSPECIFIED"


class Status(IntEnum):
    """How `ffn cluster watch` and `submit --watch` end; 2 is a mistake to mend, 130 and 143 are Ctrl-C and SIGTERM."""

    SUCCEEDED = 0
    FAILED = 1
    CANCELLED = 3
    TIMED_OUT = 4
    UNREACHABLE = 5
    REFUSED = 6


ENDS = {"SUCCEEDED": Status.SUCCEEDED, "SKIPPED": Status.SUCCEEDED, "FAILED": Status.FAILED, "CANCELED": Status.CANCELLED}
"""A run's last states; every other one, known or not, may still change."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A compiled pipeline with its parameters: what a run is made from."""

    spec: Json
    parameters: Mapping[str, object]

    @property
    def digest(self) -> str:
        return configuration.digest(self.spec, dict(self.parameters))

    @property
    def body(self) -> Json:
        """What runs and schedules have in common."""
        return {
            "description": f"{MARK}{self.digest}",
            "pipeline_spec": self.spec,
            "runtime_config": {"parameters": dict(self.parameters)},
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
    return Pipeline(spec=spec, parameters=parameters)


def submit(
    server: Server, pipeline: Pipeline, *, name: str, experiment: str, account: str = "", retry: bool = False
) -> tuple[Json, str]:
    """The run called `name`, and what was done for it: `made`, `found` or `retried`.

    A run of that name from the same inputs is the one that is wanted; one that failed or was cancelled is run again, from
    where it stopped, if `retry`. Raises `FFNError` where the name belongs to a run from other inputs.
    """
    where = experiment_id(server, experiment)

    def find() -> Json | None:
        found = _named(server, name, where)
        if found and not _ours(found[-1], pipeline):
            raise FFNError(f"run {name} of experiment {experiment} was made from other inputs; choose another --name")
        return found[-1] if found else None

    body = {"display_name": name, "experiment_id": where, **pipeline.body}
    run, made = server.create("runs", {**body, "service_account": account} if account else body, find)
    if made:
        return _the_one(server, pipeline, name, where, run), "made"
    if retry and run.get("state") in ("FAILED", "CANCELED"):
        return _again(server, run), "retried"
    return run, "found"


def experiment_id(server: Server, name: str) -> str:
    """The experiment called `name`, made where there is none."""
    spot = {"namespace": server.endpoint.namespace}

    def find() -> Json | None:
        entries = server.list("experiments", "experiments", filter=equals("display_name", name), **spot)
        return next((entry for entry in entries if entry.get("display_name") == name), None)

    body = {"display_name": name, **{key: value for key, value in spot.items() if value}}
    try:
        made, _ = server.create("experiments", body, find)
    except FFNError:
        # Another job was quicker between our look and our request.
        other = find()
        if other is None:
            raise
        made = other
    return str(made["experiment_id"])


def run_id(server: Server, run: str, experiment: str) -> str:
    """The id of `run`, which is one already or the name of a run. Raises `FFNError` where there is none of that name."""
    try:
        return str(uuid.UUID(run))
    except ValueError:
        found = _named(server, run, experiment_id(server, experiment))
    if not found:
        raise FFNError(f"no run {run} in experiment {experiment} of {server.endpoint.url}")
    return str(found[-1]["run_id"])


def watch(server: Server, run: str, *, hours: float, poll: float = POLL_SECONDS, say: Callable[[str], None] = print) -> Status:
    """Tell what the run's steps do until it ends, for `hours` at most; how it ended.

    Raises `Unreachable` where the server gives no answer for longer than its patience, `Refused`, `FFNError` for no such run.
    """
    until = time.monotonic() + 3600 * hours
    told: dict[str, str] = {}
    while True:
        left = until - time.monotonic()
        try:
            now = server.get(f"runs/{run}", patience=max(0.0, min(server.patience, left)))
        except Unreachable:
            if server.patience > left:
                return Status.TIMED_OUT
            raise
        for line in _news(now, told):
            say(line)
        if (state := now.get("state")) in ENDS:
            if said := (now.get("error") or {}).get("message"):
                say(f"run: {said}")
            return ENDS[state]
        left = until - time.monotonic()
        if left <= 0:
            return Status.TIMED_OUT
        time.sleep(min(poll, left))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is Ctrl-C said by a CI system."""


def follow(server: Server, run: str, *, hours: float, cancel_on_exit: bool, poll: float = POLL_SECONDS) -> int:
    """`watch` for a process: its exit status. Left before the run's end, the run goes on, or is cancelled if `cancel_on_exit`."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        status: int = watch(server, run, hours=hours, poll=poll, say=lambda line: print(line, flush=True))
        if status != Status.TIMED_OUT:
            return status
        why = f"not done after {hours:g} hours"
    except KeyboardInterrupt as stop:
        status, why = (143, "terminated") if isinstance(stop, _Terminated) else (130, "interrupted")
    except Unreachable as error:
        status, why = Status.UNREACHABLE, str(error)
    except Refused as error:
        status, why = Status.REFUSED, str(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"ffn: {why}", file=sys.stderr)
    if not cancel_on_exit:
        print(f"ffn: the run goes on; `ffn cluster watch {run}` follows it again", file=sys.stderr)
        return status
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cancel(server, run)
        print(f"ffn: run {run} is asked to end", file=sys.stderr)
    except (Unreachable, Refused, FFNError) as error:
        print(f"ffn: run {run} could not be cancelled and goes on: {error}", file=sys.stderr)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def told(work: Callable[[], int]) -> int:
    """`work`'s exit status, or that of a server which cannot be reached or refuses us, with one line on stderr."""
    try:
        return work()
    except Unreachable as error:
        print(f"ffn: error: unreachable: {error}", file=sys.stderr)
        return Status.UNREACHABLE
    except Refused as error:
        print(f"ffn: error: refused: {error}; see FFN_KFP_TOKEN, FFN_KFP_TOKEN_FILE, FFN_KFP_COOKIE", file=sys.stderr)
        return Status.REFUSED


def cancel(server: Server, run: str) -> None:
    """Ask KFP to end the run; a training keeps the states of its epochs."""
    server.post(f"runs/{run}:terminate", patience=CANCEL_PATIENCE)


def links(server: Server, run: Json) -> Iterator[tuple[str, str]]:
    """Where a person sees the run: KFP, and MLflow as far as it is known."""
    yield "KFP", f"{server.endpoint.ui}/#/runs/details/{run['run_id']}"
    found = False
    for plugin, output in (run.get("plugins_output") or {}).items():
        for entry in (output.get("entries") or {}).values():
            if entry.get("render_type") == "URL":
                found = True
                yield plugin, str(entry.get("value"))
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not found and uri.startswith("http"):
        yield "MLflow", f"{uri.rstrip('/')}/#/experiments?workflowType=machine_learning"


def schedule(server: Server, pipeline: Pipeline, *, name: str, cron: str, experiment: str, account: str = "") -> tuple[Json, str]:
    """The schedule called `name`, and what was done for it: `made`, `found` or `replaced`.

    One run at a time; what was missed while the server was down is not caught up with. The new one is there before the old
    one goes: cut off between, the same command ends what it began.
    """
    cron = six_fields(cron)
    where = experiment_id(server, experiment)

    def same(entry: Json) -> bool:
        return _ours(entry, pipeline) and entry.get("trigger", {}).get("cron_schedule", {}).get("cron") == cron

    def find() -> Json | None:
        return next((entry for entry in _scheduled(server, name, where) if same(entry)), None)

    body = {
        "display_name": name, "experiment_id": where, **pipeline.body, "mode": "ENABLE", "max_concurrency": "1",
        "no_catchup": True, "trigger": {"cron_schedule": {"cron": cron}},
        **({"service_account": account} if account else {}),
    }  # fmt: skip
    kept, made = server.create("recurringruns", body, find)
    others = [entry for entry in _scheduled(server, name, where) if entry["recurring_run_id"] != kept["recurring_run_id"]]
    for entry in others:
        server.delete(f"recurringruns/{entry['recurring_run_id']}")
    if not made and kept.get("status") == "DISABLED":
        server.post(f"recurringruns/{kept['recurring_run_id']}:enable")
    return kept, "replaced" if others else "made" if made else "found"


def unschedule(server: Server, name: str, experiment: str) -> int:
    """Delete the schedules called `name`; how many there were. Their runs stay."""
    found = _scheduled(server, name, experiment_id(server, experiment))
    for entry in found:
        server.delete(f"recurringruns/{entry['recurring_run_id']}")
    return len(found)


def schedules(server: Server, experiment: str) -> list[Json]:
    """All schedules of the experiment."""
    return list(server.list("recurringruns", "recurringRuns", experiment_id=experiment_id(server, experiment)))


def six_fields(cron: str) -> str:
    """KFP's cron expression, seconds first, of one with five or six fields. Raises `FFNError` for any other."""
    parts = cron.split()
    if len(parts) not in (5, 6) or not all(re.fullmatch(r"[\w*/,?#-]+", part) for part in parts):
        raise FFNError(f"--cron {cron!r}: expected five fields (minute hour day month weekday), such as '0 2 * * 0'")
    return " ".join(parts if len(parts) == 6 else ["0", *parts])


def _named(server: Server, name: str, experiment: str) -> list[Json]:
    """Runs of that name that were not archived, the newest last."""
    entries = server.list("runs", "runs", experiment_id=experiment, filter=equals("display_name", name))
    found = [entry for entry in entries if entry.get("display_name") == name and entry.get("storage_state") != "ARCHIVED"]
    return sorted(found, key=_age)


def _scheduled(server: Server, name: str, experiment: str) -> list[Json]:
    entries = server.list("recurringruns", "recurringRuns", experiment_id=experiment, filter=equals("display_name", name))
    return [entry for entry in entries if entry.get("display_name") == name]


def _age(entry: Json) -> tuple[str, str]:
    return entry.get("created_at") or "", entry["run_id"]


def _ours(entry: Json, pipeline: Pipeline) -> bool:
    return f"{MARK}{pipeline.digest}" in (entry.get("description") or "")


def _the_one(server: Server, pipeline: Pipeline, name: str, experiment: str, made: Json) -> Json:
    """The oldest of the runs of this name that go on; the others, made by a job at the same moment, are cancelled."""
    going = [run for run in _named(server, name, experiment) if _ours(run, pipeline) and run.get("state") not in ENDS]
    for other in going[1:]:
        cancel(server, other["run_id"])
    return going[0] if going else made


def _again(server: Server, run: Json) -> Json:
    """The run, going on where it stopped; KFP's own retry, asked for once."""
    path = f"runs/{run['run_id']}"

    def going() -> Json | None:
        now = server.get(path)
        return None if now.get("state") in ("FAILED", "CANCELED") else now

    server.create(f"{path}:retry", {}, going)
    return run


def _news(run: Json, told: dict[str, str]) -> Iterator[str]:
    """A line for the run, each kind of step and each failed task, where it is another than last time; `told` remembers.

    Tasks of one kind are counted together: KFP names all sixteen trainings alike.
    """
    totals, names = _steps(run.get("pipeline_spec") or {})
    states: dict[str, Counter[str]] = {}
    for task in (run.get("run_details") or {}).get("task_details") or []:
        step, state = names.get(task.get("display_name") or ""), task.get("state") or UNKNOWN
        if step and state != UNKNOWN:  # the rest are Argo's own nodes
            states.setdefault(step, Counter())[state.lower()] += 1
            if state == "FAILED" and (said := (task.get("error") or {}).get("message")):
                yield from _once(told, f"{step} {task.get('task_id')}", step, said)
    for step, counts in states.items():
        words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        yield from _once(told, step, step, f"{words} of {totals[step]}" if totals[step] > 1 else next(iter(counts)))
    yield from _once(told, "", "run", (run.get("state") or UNKNOWN).lower())


def _once(told: dict[str, str], key: str, label: str, text: str) -> Iterator[str]:
    if told.get(key) != text:
        told[key] = text
        yield f"{label:<26} {text}"


def _steps(spec: Json) -> tuple[Counter[str], dict[str, str]]:
    """Step -> how many of it a whole run has; name of a task in the graph -> its step."""
    spec = spec.get("pipeline_spec", spec)
    components, totals, names = spec.get("components") or {}, Counter[str](), {}

    def walk(dag: Json, times: int) -> None:
        for key, task in (dag.get("tasks") or {}).items():
            component = components.get(task["componentRef"]["name"], {})
            if "dag" in component:
                loop = task.get("parameterIterator") or {}
                items = json.loads(loop.get("items", {}).get("raw", "[0]"))
                walk(component["dag"], times * len(items))
            else:
                names[key] = step = task["taskInfo"]["name"]
                totals[step] += times

    walk((spec.get("root") or {}).get("dag") or {}, 1)
    return totals, names
