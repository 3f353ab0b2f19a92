"""A KFP API for tests that is as faulty as a test tells it to be: what a network does to it, tests/cluster cannot provoke.

What it answers is what KFP 2.17.0 answers (paths below backend/src/ of kubeflow/pipelines): bodies are what its own client's
models have of backend/api/v2beta1/{run,recurring_run,pipeline,experiment}.proto, and nothing else; a name that is taken is refused
(apiserver/storage/pipeline_store.go:756); a run that was asked to end goes to CANCELING (apiserver/model/run.go:34) and ends
FAILED, as seen on a real server.
"""

import json
import re
import socket
import struct
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kfp_server_api
import yaml

from tests.served import Request, served

Json = dict[str, Any]

KIND = {"runs": "Run", "recurringruns": "RecurringRun", "experiments": "Experiment", "pipelines": "Pipeline"}
IDENTITY = {"runs": "run_id", "recurringruns": "recurring_run_id", "experiments": "experiment_id", "pipelines": "pipeline_id"}


class Fault:
    """What happens to the next request that `matches` (`POST runs`)."""

    def __init__(self, matches: str, kind: str | int, *, applied: bool = False, times: int = 1, location: str = "") -> None:
        self.matches, self.kind, self.applied, self.times, self.location = matches, kind, applied, times, location
        """`kind`: a status, `reset` (the connection breaks), `silent` (no answer), `html`. `applied`: it took effect before."""


class FakeKFP:
    """The state of the server, and what was asked of it."""

    def __init__(self) -> None:
        self.experiments: list[Json] = []
        self.runs: list[Json] = []
        self.recurringruns: list[Json] = []
        self.pipelines: list[Json] = []
        self.versions: list[Json] = []
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.states: list[list[Json]] = []
        """What the next looks at a run show; the last stays."""
        self.token = ""
        self.released = threading.Event()
        self.lock = threading.RLock()

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        kind, _, rest = path.removeprefix("/apis/v2beta1/").partition("/")
        with self.lock:
            if kind == "pipelines" and rest == "upload_version":
                return self._upload(query, body)
            if kind == "pipelines" and "/versions" in rest:
                kind, rest = "versions", rest.partition("/versions")[2].strip("/")
            store: list[Json] = getattr(self, kind, None)  # type: ignore[assignment]
            if store is None:
                return 404, {"code": 5, "message": f"no {path}"}
            if method == "POST" and not rest:
                return self._create(kind, store, body)
            if not rest:
                return self._list(kind, store, query)
            found, _, action = rest.partition(":")
            entry = next((entry for entry in store if found in entry.values()), None)
            if entry is None:
                return 404, {"code": 5, "message": f"{kind} {found} not found", "details": []}
            if method == "DELETE":
                store.remove(entry)
                return 200, {}
            if action == "terminate":
                entry["state"] = "FAILED"
                entry["state_history"] = [{"state": "RUNNING"}, {"state": "CANCELING"}, {"state": "FAILED"}]
            elif action == "archive":
                entry["storage_state"] = "ARCHIVED"
            elif action in ("enable", "disable"):
                entry["status"] = action.upper() + "D"
            elif kind == "runs" and self.states:
                entry.update(self.states.pop(0) if len(self.states) > 1 else self.states[0])  # type: ignore[arg-type]
            return 200, {} if action else entry

    def _create(self, kind: str, store: list[Json], body: Any) -> tuple[int, Any]:
        if not isinstance(body, dict) or not body.get("display_name"):
            return 400, {"code": 3, "message": "display_name is required"}
        models = kfp_server_api.ApiClient()
        known = models.deserialize(SimpleNamespace(data=json.dumps(body)), f"V2beta1{KIND[kind]}")
        if models.sanitize_for_serialization(known) != body:
            return 400, {"code": 3, "message": "unknown field or wrong type"}
        if kind == "recurringruns" and "plugins_input" in body:
            return 400, {"code": 3, "message": "a schedule that says anything of plugins loses its parameters"}
        named = kind in ("experiments", "pipelines")
        if named and any(entry["display_name"] == body["display_name"] for entry in store):
            return 409, {"code": 6, "message": "already exists"}
        if not named and set(body["runtime_config"]) != {"parameters"}:
            return 400, {"code": 3, "message": "runtime_config"}
        if not named and body["pipeline_version_reference"] not in [
            {name: version[name] for name in ("pipeline_id", "pipeline_version_id")} for version in self.versions
        ]:
            return 404, {"code": 5, "message": "no such pipeline version"}
        if kind == "recurringruns" and not re.fullmatch(r"\S+( \S+){5}", body["trigger"]["cron_schedule"]["cron"]):
            return 400, {"code": 3, "message": "cron"}
        made = {**body, "created_at": f"2026-01-01T00:00:{len(store):02d}Z"}
        made[IDENTITY[kind]] = str(uuid.uuid4())
        made |= {"state": "PENDING"} if kind == "runs" else {"status": "ENABLED"} if kind == "recurringruns" else {}
        store.append(made)
        return 200, made

    def _upload(self, query: dict[str, str], file: Any) -> tuple[int, Any]:
        """Source: apiserver/server/pipeline_upload_server.go:245 (`uploadPipelineVersion`)."""
        if b'name="uploadfile"' not in file:
            return 400, {"error_message": "Failed to create a pipeline version"}
        if any(version["display_name"] == query["display_name"] for version in self.versions):
            return 409, {"code": 6, "message": "already exists"}
        made = {
            "pipeline_id": query["pipelineid"], "pipeline_version_id": str(uuid.uuid4()),
            **{name: query[name] for name in ("name", "display_name", "description")},
            "pipeline_spec": next(yaml.safe_load_all(file.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0])),
        }  # fmt: skip
        self.versions.append(made)
        return 200, made

    def _list(self, kind: str, store: list[Json], query: dict[str, str]) -> tuple[int, Any]:
        """Two entries to a page, so that more are on the next."""
        (predicate,) = json.loads(query["filter"])["predicates"] if "filter" in query else (None,)
        experiment = query.get("experiment_id", "")
        found = [
            entry
            for entry in store
            if (not predicate or entry.get(predicate["key"]) == predicate["string_value"])
            and (not experiment or entry.get("experiment_id") == experiment)
        ]
        start = int(query.get("page_token") or 0)
        page = {"recurringruns": "recurringRuns", "versions": "pipeline_versions"}.get(kind, kind)
        more = {"next_page_token": str(start + 2)} if len(found) > start + 2 else {}
        return 200, {page: found[start : start + 2], "total_size": len(found), **more}


@contextmanager
def serving(kfp: FakeKFP, certificate: Sequence[Path] = ()) -> Iterator[str]:
    """Serve `kfp` on this machine; its address."""

    def answer(request: Request) -> None:
        asked = f"{request.command} {request.place.removeprefix('/apis/v2beta1/')}"
        kfp.asked.append(asked)
        kfp.headers.append(dict(request.headers))
        faults = (fault for fault in kfp.faults if fault.times and re.fullmatch(fault.matches, asked))
        fault = next(faults, Fault(asked, "none", applied=True))
        fault.times -= 1
        if fault.kind == "reset" and not fault.applied:
            hang_up(request)  # before the body was read: in mid-upload
            return
        body, status, said = request.body(), 401, {"code": 16, "message": "who are you?"}
        if not kfp.token or request.headers.get("Authorization") == f"Bearer {kfp.token}":
            if fault.applied:
                status, said = kfp.answer(request.command, request.place, request.query, body)
            if isinstance(fault.kind, int):
                status, said = fault.kind, {"code": 13, "message": "trouble"}
        if fault.kind == "reset":
            hang_up(request)
        elif fault.kind == "silent":
            kfp.released.wait(30)
        elif fault.kind == "html":
            request.reply(200, b"<html>Log in</html>", {"Content-Type": "text/html"})
        else:
            request.reply(status, said, {"Location": fault.location} if fault.location else {})

    with served(answer, certificate) as address:
        try:
            yield address
        finally:
            kfp.released.set()


def hang_up(request: Request) -> None:
    """A reset, not an orderly end."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.rfile.close()
    request.connection.close()
    request.close_connection = True
