"""What a step asks Kubernetes of its pod and of other runs, of a server that answers as a real one did."""

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from components import cluster

RUN = "063847e1-ed72-4f71-9237-f6d613e7df76"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Path -> what the API answers there, to the account of a pod; what is not there is forbidden."""
    answers: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            split = urlsplit(self.path)
            label = parse_qs(split.query).get("labelSelector", [""])[0]
            found = answers.get(split.path + (f"?{label}" if label else ""))
            known = self.headers["Authorization"] == "Bearer of-the-account"
            content = json.dumps(found if found is not None else {"kind": "Status", "code": 403}).encode()
            self.send_response(200 if known and found is not None else 403)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name, text in (("namespace", "kubeflow\n"), ("token", "of-the-account\n"), ("ca.crt", "an authority")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cluster, "ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_address[1]))
    monkeypatch.setenv("HOSTNAME", "pod-1")
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    get = requests.get
    monkeypatch.setattr(cluster.requests, "get", lambda url, **more: get(url.replace("https:", "http:"), **more))
    yield answers
    server.shutdown()
    server.server_close()


def test_a_pod_knows_its_run_and_its_place(api: dict[str, Any]) -> None:
    api["/api/v1/namespaces/kubeflow/pods/pod-1"] = {"metadata": {"labels": {"pipeline/runid": RUN}}}
    assert cluster.run() == RUN
    assert (cluster.pod(), cluster.namespace()) == ("pod-1", "kubeflow")
    assert cluster.where().startswith("kubeflow@")


def test_outside_of_a_pod_there_is_nothing_to_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ACCOUNT", tmp_path)
    assert (cluster.inside(), cluster.run(), cluster.pod(), cluster.where()) == (False, "", "", "")
    cluster.leave_word("nobody hears")


@pytest.mark.parametrize(
    ("workflow", "state"),
    [
        ({"status": {"phase": "Running"}, "spec": {}}, "RUNNING"),
        ({"status": {}, "spec": {}}, "RUNNING"),
        ({"status": {"phase": "Succeeded"}, "spec": {}}, "FINISHED"),
        ({"status": {"phase": "Failed"}, "spec": {}}, "FAILED"),
        ({"status": {"phase": "Error"}, "spec": {}}, "FAILED"),
        ({"status": {"phase": "Failed"}, "spec": {"activeDeadlineSeconds": 0}}, "KILLED"),
        ({"status": {"phase": "Failed"}, "spec": {"shutdown": "Terminate"}}, "KILLED"),
        (None, "KILLED"),
    ],
)
def test_what_became_of_another_run(api: dict[str, Any], workflow: dict[str, Any] | None, state: str) -> None:
    items = [workflow] if workflow else []
    api[f"/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows?pipeline/runid={RUN}"] = {"items": items}
    assert cluster.state(RUN) == state


@pytest.mark.parametrize(("phase", "broken"), [("Succeeded", False), ("Failed", True), ("Error", True), (None, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_whether_what_the_exit_handler_guards_failed(api: dict[str, Any], phase: str | None, broken: bool, packed: bool) -> None:
    nodes = {"a": {"displayName": "exit-handler-1", "phase": phase}, "b": {"displayName": "finish-driver", "phase": "Failed"}}
    nodes = nodes if phase else {}
    content = base64.b64encode(gzip.compress(json.dumps(nodes).encode())).decode()
    status = {"compressedNodes": content} if packed else {"nodes": nodes}
    api[f"/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows?pipeline/runid={RUN}"] = {"items": [{"status": status}]}
    assert cluster.broken(RUN) is broken


def test_a_refusal_is_an_error_that_its_caller_knows(api: dict[str, Any]) -> None:
    with pytest.raises(requests.RequestException, match="403"):
        cluster.state(RUN)
