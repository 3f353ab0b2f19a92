"""What a cluster's runs left behind and nobody needs any more.

Each is found first and told, and goes only if asked to. A model version, whatever became of it, keeps the run that it is from, and
a run that goes on, or ended lately, its trainings' states, which no model needs: nothing of a champion's or a candidate's is found.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.entities import Run

from components import registry, states, tracking  # before mlflow, which reads variables that they set
from ffn.errors import FFNError
from pipeline.server import Json, NotThere, Server, equals
from pipeline.submit import MARK
from pipeline.watch import Status, ended

PAGE = 1000
KFP_ARTIFACTS = "v2/artifacts/ffn/"
"""Where KFP keeps what our steps hand on, below its bucket `mlpipeline`: `<root>/<pipeline>/<run>`, the root being KFP's default.

Source: KFP 2.17.0, backend/src/v2/config/env.go:38, backend/src/v2/metadata/client.go:420.
"""
LEAST_DAYS = 90
"""That they are kept, in what we say to KFP's administrator."""
CLOSED = {Status.SUCCEEDED: "FINISHED", Status.CANCELLED: "KILLED"}
"""How a run ended in KFP -> what MLflow says of it, where that is not FAILED."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """One thing that nobody needs."""

    deed: str
    """What would be done: `remove state`."""
    said: str
    """Which one, and why it may go."""
    clear: Callable[[], object]
    size: int = 0
    """Bytes, where they are known."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What MLflow knows of our runs, in all experiments."""

    parents: dict[str, Run]
    """MLflow's id -> pipeline run."""
    children: dict[str, list[Run]]
    """MLflow's id of a pipeline run -> the work in it."""
    versioned: frozenset[str]
    """MLflow's ids of what versions of registered models were made in, and where their files are: `models:/m-...`."""

    @classmethod
    def read(cls) -> Self:
        client = MlflowClient()
        parents = {run.info.run_id: run for run in _runs(client, f"tags.`{tracking.RUN}` LIKE '%'")}
        children: dict[str, list[Run]] = {}
        for run in _runs(client, f"tags.`{tracking.KIND}` LIKE '%'"):
            children.setdefault(run.data.tags.get(tracking.PARENT, ""), []).append(run)
        versions = _pages(partial(client.search_model_versions, max_results=PAGE))
        made = frozenset(said for one in versions for said in (one.run_id, one.tags.get("mlflow_run"), one.source) if said)
        return cls(parents=parents, children=children, versioned=made)


def sweep(server: Server, *, checkpoints: str, experiment: str, older: timedelta, delete: bool) -> bool:
    """Tell every leftover that is `older`, and clear it if asked to `delete`; whether all could be looked at, and cleared.

    Raises `FFNError` where MLflow does not answer, and what `Server.ask` does.
    """
    limit, troubles, done, room = datetime.now(UTC) - older, 0, Counter[str](), 0
    with registry.asked_by_a_person():
        ledger = Ledger.read()
        closing = list(never_closed(server, ledger, limit))
        over = {run: at for run, at, _ in closing}
        for part in (
            (leftover for *_, leftover in closing),
            ended_long_ago(ledger, limit),
            unused(checkpoints, ledger, over, limit),
            archived(server, experiment, limit),
        ):
            try:
                for leftover in part:
                    print(f"{leftover.deed:<17} {leftover.said}", flush=True)
                    if not delete or _cleared(leftover):
                        done[leftover.deed] += 1
                        room += leftover.size
                    else:
                        troubles += 1
            except FFNError as error:
                print(f"{'not looked at':<17} {error}", flush=True)
                troubles += 1
    sums = ", ".join(f"{deed}: {count}" for deed, count in done.items()) or "nothing is left over"
    print(f"{sums}{f' ({told(room)})' if room else ''}{'' if delete or not done else '; nothing was changed, --delete does it'}")
    return not troubles


def _cleared(leftover: Leftover) -> bool:
    try:
        with registry.asked_by_a_person():
            leftover.clear()
    except FFNError as error:
        print(f"{'':<17} stays: {error}", flush=True)
        return False
    return True


def ended_long_ago(ledger: Ledger, limit: datetime) -> Iterator[Leftover]:
    """Pipeline runs that failed or were killed before `limit`, and no model is from: MLflow's bin keeps them until `mlflow gc`."""
    client = MlflowClient()
    for run_id, run in ledger.parents.items():
        family = [run_id, *(child.info.run_id for child in ledger.children.get(run_id, []))]
        at = _ended(run)
        if run.info.status in ("FAILED", "KILLED") and at and at < limit and not ledger.versioned & set(family):
            yield Leftover(
                deed="delete in MLflow", clear=partial(_delete, client, family[::-1], ledger.versioned),
                said=f"{run.info.run_name}, {len(family) - 1} children: {run.info.status} on {at:%Y-%m-%d}, no model is from it",
            )  # fmt: skip


def never_closed(server: Server, ledger: Ledger, limit: datetime) -> Iterator[tuple[str, datetime, Leftover]]:
    """Pipeline runs that MLflow calls RUNNING and KFP does not: MLflow's id, when they ended in KFP, and what is to be done.

    One that KFP does not know (deleted, or another cluster's) is left alone until it began before `limit`.
    """
    for run_id, run in ledger.parents.items():
        kfp_run = run.data.tags.get(tracking.LINEAGE["kfp_run"])
        if run.info.status != "RUNNING" or not kfp_run:  # a machine's own: its next run closes it
            continue
        try:
            found = server.ask(server.runs.run_service_get_run, kfp_run)
        except NotThere:
            at, state, why = _time(run.info.start_time), "KILLED", "KFP does not know its run any more"
            if at >= limit:
                continue
        else:
            if (status := ended(found)) is None:
                continue
            at, state, why = _at(found), CLOSED.get(status, "FAILED"), f"its run in KFP ended {status.name.lower()}"
        said = f"{run.info.run_name}: RUNNING, and {why} ({at:%Y-%m-%d})"
        yield run_id, at, Leftover(deed="close in MLflow", said=said, clear=partial(tracking.end, run_id, state))


def unused(checkpoints: str, ledger: Ledger, over: dict[str, datetime], limit: datetime) -> Iterator[Leftover]:
    """States, sets and scores that were written before `limit`, and whose last run has ended before it, or is not known.

    `over` are pipeline runs that MLflow calls RUNNING, and when they ended.
    """
    if not checkpoints:
        raise FFNError("states of trainings: `checkpoints` of the cluster's file says where they are, and says nothing")
    used: dict[str, tuple[datetime, str]] = {}
    for parent_id, work in ledger.children.items():
        parent = ledger.parents.get(parent_id)
        going = parent is not None and parent.info.status == "RUNNING"
        for run in work:
            key = run.data.tags.get(tracking.KEY, "")
            at = over.get(parent_id) or (None if going else _ended(run)) or datetime.max.replace(tzinfo=UTC)
            used[key] = max(used.get(key, (at, "")), (at, str(run.info.run_name)))
    for kept in states.kept(checkpoints):
        at, name = used.get(kept.key, (kept.written, "no run in MLflow"))
        if max(at, kept.written) < limit:
            yield Leftover(
                deed=f"remove {kept.kind}", size=kept.size, clear=partial(states.remove, kept),
                said=f"{kept.key}: {told(kept.size)}, of {name}, last used on {max(at, kept.written):%Y-%m-%d}",
            )  # fmt: skip


def archived(server: Server, experiment: str, limit: datetime) -> Iterator[Leftover]:
    """Runs of ours that are archived in KFP, by a person or as a duplicate of one that went on, and ended before `limit`."""
    spot = {"namespace": server.endpoint.namespace}
    for place in server.list(
        server.experiments.experiment_service_list_experiments, filter=equals("display_name", experiment), **spot
    ):
        if place.get("display_name") != experiment:
            continue
        for run in server.list(server.runs.run_service_list_runs, experiment_id=place["experiment_id"]):
            ours = run.get("storage_state") == "ARCHIVED" and MARK in (run.get("description") or "")
            if ours and ended(run) is not None and _at(run) < limit:
                yield Leftover(
                    deed="delete in KFP", clear=partial(server.delete, server.runs.run_service_delete_run, run["run_id"]),
                    said=f"{run['display_name']}: archived, ended on {_at(run):%Y-%m-%d}",
                )  # fmt: skip


def by_hand(days: int) -> str:
    """What takes rights that only the administrators of MLflow and KFP have: commands for them."""
    rule = {"ID": "ffn", "Filter": {"Prefix": KFP_ARTIFACTS}, "Status": "Enabled", "Expiration": {"Days": max(days, LEAST_DAYS)}}
    return f"""\
The room of what is deleted in MLflow (docs/operations.md has the whole command):
    mlflow gc --older-than {days}d
What KFP's steps handed on, in KFP's own store:
    aws s3api put-bucket-lifecycle-configuration --bucket mlpipeline --lifecycle-configuration '{json.dumps({"Rules": [rule]})}'"""


def told(size: int) -> str:
    """Bytes as people say them: `1.5 GB`."""
    for unit, of in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= of:
            return f"{size / of:.1f} {unit}"
    return f"{size} bytes"


def _delete(client: MlflowClient, runs: Iterable[str], versioned: Collection[str]) -> None:
    """Delete the runs, and before each the models that it logged: MLflow keeps those beside it, and would not take them along."""
    for run in runs:
        outputs = client.get_run(run).outputs
        for model in {one.model_id for one in outputs.model_outputs} if outputs else ():
            if f"models:/{model}" not in versioned:
                client.delete_logged_model(model)  # done twice it is done once
        client.delete_run(run)


def _runs(client: MlflowClient, wanted: str) -> Iterator[Run]:
    """The runs of all experiments that a filter finds; those deleted are none."""
    places = [one.experiment_id for one in _pages(partial(client.search_experiments, max_results=PAGE))]
    return _pages(partial(client.search_runs, places, wanted, max_results=PAGE))


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return


def _ended(run: Run) -> datetime | None:
    return _time(run.info.end_time) if run.info.end_time else None


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _at(run: Json) -> datetime:
    """When the run of KFP's ended; it writes 1970 where it does not know."""
    return max(datetime.fromisoformat(run[name]) for name in ("created_at", "finished_at") if run.get(name))
