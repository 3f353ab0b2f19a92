"""What people are told, by a real server that listens; and that a webhook which fails, or is slow, fails nothing."""

import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components import attempts, notify, tracking
from components.finish import step as finish_step
from ffn.report import Result
from ffn.summary import Summary, short
from pipeline.cli import main
from tests.components.test_storage import certificate
from tests.components.test_tracking import begun, ended, inside, open_child
from tests.pipeline.kfp_server import FakeKFP, serving

__all__ = ["inside"]

PATH = "/services/T0/B0/secret"


class Webhook:
    """What arrived, and how it answers."""

    def __init__(self) -> None:
        self.status, self.location = 200, ""
        self.answers = threading.Event()
        self.answers.set()
        self.asked: list[tuple[str, str, str]] = []
        self.texts: list[str] = []

    def heard(self, method: str, path: str, kind: str, body: bytes) -> None:
        self.asked.append((method, path, kind))
        said = json.loads(body)
        assert set(said) == {"text"}
        self.texts.append(said["text"])


def listening(webhook: Webhook) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            webhook.heard(self.command, self.path, self.headers["Content-Type"], body)
            webhook.answers.wait(30)
            self.send_response(webhook.status)
            if webhook.location:
                self.send_header("Location", webhook.location)
            self.end_headers()

        def do_GET(self) -> None:
            webhook.asked.append((self.command, self.path, ""))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    webhook = Webhook()
    server = listening(webhook)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv(notify.WEBHOOK, f"http://127.0.0.1:{server.server_address[1]}{PATH}")
    yield webhook
    webhook.answers.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_slack_takes_arrives(webhook: Webhook, capsys: pytest.CaptureFixture[str]) -> None:
    notify.notify("a < b & c\n<!channel> é")
    assert webhook.asked == [("POST", PATH, "application/json")]
    assert webhook.texts == ["a &lt; b &amp; c\n&lt;!channel&gt; é"]
    assert capsys.readouterr().out == ""


def test_without_a_webhook_nothing_happens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(notify.WEBHOOK, raising=False)
    notify.notify("x")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("status", [404, 500, 302])
def test_a_webhook_that_refuses_is_said_and_fails_nothing(
    webhook: Webhook, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    webhook.status, webhook.location = status, "/elsewhere" if status == 302 else ""
    notify.notify("x")
    assert capsys.readouterr().out == f"ffn: nobody was notified: the webhook answers {status}\n"
    assert len(webhook.asked) == 1


def test_a_slow_webhook_is_not_waited_for(
    webhook: Webhook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notify, "SECONDS", 0.2)
    webhook.answers.clear()
    notify.notify("x")
    out = capsys.readouterr().out
    assert "nobody was notified: the webhook " in out
    assert PATH not in out


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/secret", "does not answer (ConnectionRefusedError)"),
        ("http://no-such-host.invalid/secret", "does not answer (gaierror)"),
        ("http://[/secret", "does not answer (ValueError)"),
        ("http://127.0.0.1:port/secret", "does not answer (InvalidURL)"),
        ("file:///etc/secret", "in FFN_WEBHOOK is no http address"),
        ("secret", "in FFN_WEBHOOK is no http address"),
    ],
)
def test_a_webhook_that_is_not_there_is_said_without_its_address(
    url: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(notify.WEBHOOK, url)
    notify.notify("x")
    out, err = capsys.readouterr()
    assert out == f"ffn: nobody was notified: the webhook {said}\n"
    assert "secret" not in out + err


def test_a_webhook_that_hangs_up_fails_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].close())
        thread.start()
        monkeypatch.setenv(notify.WEBHOOK, f"http://127.0.0.1:{server.getsockname()[1]}/secret")
        notify.notify("x")
        thread.join()
    assert "the webhook does not answer (" in capsys.readouterr().out


def test_an_authority_of_the_clusters_own_is_trusted_beside_the_public_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crt, key = certificate(tmp_path)
    webhook = Webhook()
    server = listening(webhook)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of the client that does not trust it
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        monkeypatch.setenv(notify.WEBHOOK, f"https://127.0.0.1:{server.server_address[1]}{PATH}")
        monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
        notify.notify("x")
        assert capsys.readouterr().out == "ffn: nobody was notified: the webhook does not answer (SSLCertVerificationError)\n"
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(crt))
        notify.notify("y")
        assert webhook.texts == ["y"]
        assert len(notify._trusted().get_ca_certs()) > 100
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.usefixtures("store")
def test_whoever_cancels_tells_it(webhook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step of a cancelled run could."""
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    monkeypatch.delenv("FFN_MLFLOW_UI", raising=False)
    fake = FakeKFP()
    fake.experiments = [{"experiment_id": "e", "display_name": "ffn"}]
    fake.runs = [{"run_id": "r", "display_name": "nightly", "experiment_id": "e", "state": "RUNNING", "created_at": "2026"}]
    with serving(fake) as url:
        monkeypatch.setenv("FFN_KFP_URL", url)
        monkeypatch.setenv("FFN_KFP_UI", "https://kfp.example")
        assert main(["cluster", "cancel", "nightly"]) == 0
    assert webhook.texts == ["nightly: cancelled\nKFP: https://kfp.example/#/runs/details/r"]


# --- what finish says


def test_a_failed_run_is_told_with_step_reason_and_links(
    store: MlflowClient, webhook: Webhook, tmp_path: Path, inside: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFN_MLFLOW_UI", "https://mlflow.example")
    parent = begun("id-1", called="nightly")
    tracking.record_failure(parent, "train S4/p/j", "no room\nat all")
    open_child(parent, "k", "S4/p/b")
    ended("id-1", tmp_path, "FAILED")
    (text,) = webhook.texts
    first, second, *links = text.splitlines()
    assert first == "nightly: FAILED in train S4/p/j: no room at all (pod pod-1)"
    assert second == f"train S4/p/b: {tracking.LOST}"
    assert links == [
        f"MLflow: https://mlflow.example/#/experiments/1/runs/{parent}?workflowType=machine_learning",
        "KFP: https://kubeflow.example/pipeline/#/runs/details/id-1",
    ]


def test_a_run_that_never_began_is_told(webhook: Webhook, store: MlflowClient, tmp_path: Path, inside: dict[str, str]) -> None:
    ended("id-9", tmp_path, "FAILED")
    (text,) = webhook.texts
    assert text.startswith("id-9: FAILED in begin: no run was opened in MLflow")
    assert text.endswith("\nKFP: https://kubeflow.example/pipeline/#/runs/details/id-9")


def test_a_run_that_has_ended_is_told_once(webhook: Webhook, store: MlflowClient, tmp_path: Path) -> None:
    begun()
    ended("demo", tmp_path)
    ended("demo", tmp_path)
    assert [text.splitlines()[0] for text in webhook.texts] == ["demo: FINISHED"]


def test_a_dead_webhook_does_not_keep_a_run_from_its_end(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.WEBHOOK, "http://127.0.0.1:1/secret")
    parent = begun()
    assert ended("demo", tmp_path).startswith("# demo: FINISHED")
    assert store.get_run(parent).info.status == "FINISHED"


def test_finish_itself_that_fails_is_told(webhook: Webhook, store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(job: str) -> Any:
        raise ConnectionError("MLflow is away")

    begun()
    monkeypatch.setattr(finish_step.tracking, "parent", away)
    given = {"job": "demo", "status": "FAILED", **{name: Path("/nowhere") for name in ("table", "metrics", "report")}}
    monkeypatch.setattr(Path, "touch", lambda path: None)
    with pytest.raises(ConnectionError):
        attempts.attempt("finish", given)
    assert webhook.texts == ["demo: its results could not be written, by finish: ConnectionError: MLflow is away"]


def test_what_the_gate_said_and_the_widest_result_are_in_the_message() -> None:
    results = [
        Result(preset="S4", protocol="ntu60-xsub", stream=stream, seed=0, top1=top1) for stream, top1 in (("4s", 0.912), ("j", 0.8))
    ]
    said = short(
        Summary(
            name="nightly", status="FINISHED", results=results, links={"KFP": "https://k"},
            models=["ffn-p version 2: held by the gate: top1 80.0 % is worse than 81.0 % of champion version 1"],
        )
    )  # fmt: skip
    assert said.splitlines() == [
        "nightly: FINISHED",
        "ntu60-xsub 4s: top1 91.2 %",
        "ffn-p version 2: held by the gate: top1 80.0 % is worse than 81.0 % of champion version 1",
        "KFP: https://k",
    ]


def test_sixteen_failures_are_a_message_and_no_flood() -> None:
    failed = {f"train {number}": "x" * 5000 for number in range(16)}
    said = short(Summary(name="n", status="FAILED", failed=failed))
    assert len(said) < 2000
    assert said.endswith("and 11 more")
