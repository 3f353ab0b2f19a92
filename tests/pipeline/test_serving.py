"""The follower and the probe of the serving pods, against servers that record what they are asked."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ffn.errors import FFNError
from pipeline import serving
from pipeline.serving import ANNOTATION, follow, main, probe

DEPLOYMENT = "/apis/apps/v1/namespaces/ffn/deployments/serving"

SEARCH = "GET /api/2.0/mlflow/registered-models/search"

Answer = tuple[int, Any]


def model(**aliases: str) -> Any:
    """A model of the search's answer."""
    return {"name": "m", "aliases": [{"alias": alias, "version": version} for alias, version in aliases.items()]}


class Server:
    """Answers by `METHOD /path` and remembers every request: method, path, headers, body."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.command, self.path, dict(self.headers), json.loads(body) if body else None))
                status, said = outer.answers[f"{self.command} {self.path.partition('?')[0]}"]
                sent = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            do_GET = do_POST = do_PATCH = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """MLflow and the Kubernetes API at one address; version 3 is champion."""
    started = Server()
    (tmp_path / "token").write_text("of the pod\n")
    monkeypatch.setattr(serving, "ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_API", started.address)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "serving")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of the pods")
    started.answers[SEARCH] = (200, {"registered_models": [model(challenger="4", champion="3")]})
    yield started
    started.http.shutdown()
    started.http.server_close()


def deployment(version: str) -> Any:
    return {"spec": {"template": {"metadata": {"annotations": {ANNOTATION: version}}}}}


def test_the_champion_takes_the_place_of_what_is_served(server: Server) -> None:
    server.answers[f"GET {DEPLOYMENT}"] = (200, deployment("2"))
    server.answers[f"PATCH {DEPLOYMENT}"] = (200, {})
    assert follow("m", DEPLOYMENT) == "m: version 3 takes the place of 2"
    search, read, patched = server.asked
    assert search[1].endswith("?filter=name+%3D+%27m%27")
    assert search[2]["Authorization"] == "Basic " + base64.b64encode(b"serving:of the pods").decode()
    assert read[2]["Authorization"] == patched[2]["Authorization"] == "Bearer of the pod"
    assert patched[2]["Content-Type"] == "application/merge-patch+json"
    assert patched[3] == deployment("3")


def test_what_is_served_already_is_left_alone(server: Server) -> None:
    server.answers[f"GET {DEPLOYMENT}"] = (200, deployment("3"))
    assert follow("m", DEPLOYMENT) == "m: version 3 is served"
    assert [request[0] for request in server.asked] == ["GET", "GET"]


def test_the_first_champion_is_served(server: Server) -> None:
    server.answers[f"GET {DEPLOYMENT}"] = (200, {"spec": {"template": {"metadata": {"labels": {}}}}})
    server.answers[f"PATCH {DEPLOYMENT}"] = (200, {})
    assert follow("m", DEPLOYMENT) == "m: version 3 takes the place of nothing"


@pytest.mark.parametrize("answer", [{}, {"registered_models": [{"name": "m"}]}, {"registered_models": [model(challenger="4")]}])
def test_without_a_champion_nothing_changes(server: Server, answer: Any) -> None:
    """No such model, no alias, another alias.

    Of the model's alias nobody but an administrator may ask before there is a model: MLflow 3.17.2 answers status 403 in place of
    404 (mlflow/server/auth/__init__.py: line 2390 knows no target, 2357 lets nobody read it, 5398 forbids).
    """
    server.answers["GET /api/2.0/mlflow/registered-models/alias"] = (403, "Permission denied")
    server.answers[SEARCH] = (200, answer)
    assert follow("m", DEPLOYMENT).startswith("m: no champion yet")
    assert len(server.asked) == 1


def test_refusals_are_named_and_change_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers[f"GET {DEPLOYMENT}"] = (403, {"message": "forbidden"})
    assert main(["follow", "m", DEPLOYMENT]) == 2
    assert f"ffn: error: GET {DEPLOYMENT}: status 403" in capsys.readouterr().err
    server.answers[SEARCH] = (401, "who?")
    with pytest.raises(FFNError, match="status 401 for the champion of m"):
        follow("m", DEPLOYMENT)
    assert not [request for request in server.asked if request[0] == "PATCH"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    with pytest.raises(FFNError, match="expected the address of an MLflow server"):
        follow("m", DEPLOYMENT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(FFNError, match="no answer from MLflow"):
        follow("m", DEPLOYMENT)


def test_a_pod_fetches_nothing_before_there_is_a_champion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "m", "", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "ffn: error: no champion of m is served yet: promote one\n"


def row(label: str, **probabilities: float) -> Any:
    return {"predictions": [{"label": label, "probability": 1.0, "probabilities": probabilities}]}


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ((200, row("a", a=0.75, b=0.25)), None),
        ((200, row("a", a=0.75, b=0.5)), "sum to 1.25"),
        ((200, row("a", a=float("nan"), b=0.5)), "sum to nan"),
        ((200, row("c", a=0.75, b=0.25)), "label 'c'"),
        ((200, {"predictions": []}), "no prediction for"),
        ((400, {"message": "shape"}), "status 400"),
    ],
)
def test_a_pod_is_ready_when_it_predicts(server: Server, tmp_path: Path, answer: Answer, wrong: str | None) -> None:
    (tmp_path / "serving_input_example.json").write_text('{"inputs": [1]}')
    server.answers["POST /invocations"] = answer
    if wrong:
        with pytest.raises(FFNError, match=wrong):
            probe(tmp_path, server.address)
    else:
        probe(tmp_path, server.address)
        assert server.asked[0][3] == {"inputs": [1]}


def test_a_pod_without_a_model_or_a_server_is_not_ready(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FFNError, match="serving_input_example"):
        probe(tmp_path, server.address)
    (tmp_path / "serving_input_example.json").write_text("{}")
    with pytest.raises(FFNError, match="no prediction for"):
        probe(tmp_path, "http://127.0.0.1:1")
