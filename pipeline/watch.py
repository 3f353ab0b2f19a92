"""A run on KFP, watched to its end: what its steps do, which of them fails and why, and what MLflow is to say of it after."""

import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import FrameType
from typing import NoReturn

from ffn.errors import FFNError
from pipeline.server import Json, Refused, Server, Unreachable
from pipeline.workflow import Workflows

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


def ended(run: Json) -> Status | None:
    """How the run ended; None while it goes on.

    KFP calls a run that was cancelled FAILED, and CANCELED never; its history tells.
    """
    status = ENDS.get(run.get("state", ""))
    asked = any(entry.get("state") == "CANCELING" for entry in run.get("state_history") or [])
    return Status.CANCELLED if status is Status.FAILED and asked else status


def watch(
    server: Server,
    run: str,
    *,
    hours: float,
    poll: float = POLL_SECONDS,
    say: Callable[[str], None] = print,
    workflows: Workflows | None = None,
) -> Status:
    """Tell what the run's steps do until it ends, for `hours` at most; how it ended.

    `workflows` tell why a step failed or waits: KFP itself does not know. Raises `Unreachable` where the server gives no answer for
    longer than its patience, `Refused`, `FFNError` for no such run.
    """
    until = time.monotonic() + 3600 * hours
    told: dict[str, str] = {}
    spec: Json = {}
    while True:
        left = until - time.monotonic()
        try:
            now = server.ask(server.runs.run_service_get_run, run, patience=max(0.0, min(server.patience, left)))
        except Unreachable:
            if server.patience > left:
                return Status.TIMED_OUT
            raise
        spec = spec or _spec(server, now)
        for line in _news(now, spec, told):
            say(line)
        for trouble in workflows.troubles(run) if workflows else ():
            for line in _once(told, f"pod {trouble.pod}", trouble.step, f"{trouble.why}\n{'':<26} {trouble.log}"):
                say(line)
        if (status := ended(now)) is not None:
            if said := (now.get("error") or {}).get("message"):
                say(f"run: {said}")
            return status
        left = until - time.monotonic()
        if left <= 0:
            return Status.TIMED_OUT
        time.sleep(min(poll, left))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is Ctrl-C said by a CI system."""


def follow(
    server: Server, run: str, *, hours: float, cancel_on_exit: bool, poll: float = POLL_SECONDS, workflows: Workflows | None = None
) -> int:
    """`watch` for a process: its exit status. Left before the run's end, the run goes on, or is cancelled if `cancel_on_exit`."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        status: int = watch(server, run, hours=hours, poll=poll, say=lambda line: print(line, flush=True), workflows=workflows)
        if status != Status.TIMED_OUT:
            close(run, Status(status))
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
        close(run, Status.CANCELLED)
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
    """End the run, and wait until it has, for `CANCEL_PATIENCE` seconds; a training keeps the states of its epochs."""
    until = time.monotonic() + CANCEL_PATIENCE
    server.ask(server.runs.run_service_terminate_run, run, patience=CANCEL_PATIENCE)
    look = server.runs.run_service_get_run
    with contextlib.suppress(Unreachable):
        while ended(server.ask(look, run, patience=CANCEL_PATIENCE)) is None and time.monotonic() < until:
            time.sleep(1)


def close(run: str, status: Status) -> None:
    """Have MLflow say what became of the run, if it still calls it RUNNING, and say where to see it.

    KFP runs no step of a cancelled run that could do it. MLflow is asked at FFN_MLFLOW_UI; where it cannot be reached from here a
    line says who will close the run.
    """
    uri = os.environ.get("FFN_MLFLOW_UI", "")
    if not uri.startswith("http"):
        if status is not Status.SUCCEEDED:
            print("ffn: FFN_MLFLOW_UI is not set: if MLflow calls the run RUNNING, the next one closes it", file=sys.stderr)
        return
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from components import tracking

    try:
        parent = tracking.anywhere(run)
        if not parent:
            print(f"ffn: MLflow has no run of it at {uri}", file=sys.stderr)
            return
        state = parent.status
        if state == "RUNNING":
            ends = {Status.SUCCEEDED: "FINISHED", Status.CANCELLED: "KILLED"}
            state = tracking.end(parent.id, ends.get(status, "FAILED"))
        print(f"ffn: MLflow  {parent.name} is {state}: {parent.page()}", file=sys.stderr)
    except Exception as error:  # whatever MLflow's client raises
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(
            f"ffn: {uri} does not answer ({said[:200]}): if MLflow calls the run RUNNING, the next one closes it", file=sys.stderr
        )


def page(server: Server, run: str) -> str:
    """Where a person sees the run in KFP."""
    return f"{server.endpoint.ui}/#/runs/details/{run}"


def _spec(server: Server, run: Json) -> Json:
    """The pipeline that the run is of: KFP keeps that of an uploaded version there."""
    reference = run.get("pipeline_version_reference") or {}
    if run.get("pipeline_spec") or not reference.get("pipeline_id"):
        return run.get("pipeline_spec") or {}
    call = server.pipelines.pipeline_service_get_pipeline_version
    version = server.ask(call, reference["pipeline_id"], reference["pipeline_version_id"])
    return version.get("pipeline_spec") or {}


def _news(run: Json, spec: Json, told: dict[str, str]) -> Iterator[str]:
    """A line for the run, each kind of step and each failed task, where it is another than last time; `told` remembers.

    Tasks of one kind are counted together: KFP names all sixteen trainings alike.
    """
    totals, names = _steps(spec)
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
