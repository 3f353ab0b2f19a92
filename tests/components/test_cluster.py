"""What a step asks Kubernetes of its pod and of other runs, of a server that answers as a real one did."""

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.config import incluster_config

from components import cluster
from components.kube import Denied
from ffn.errors import Fault, FFNError
from tests.components.test_storage import certificate
from tests.pipeline.kubernetes_api import FakeKubernetes, denied
from tests.served import served

RUN = "063847e1-ed72-4f71-9237-f6d613e7df76"
POD = "/api/v1/namespaces/kubeflow/pods/pod-1"
WORKFLOWS = f"/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows?pipeline/runid={RUN}"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    """What answers the account of a pod."""
    crt, key = certificate(tmp_path)
    for name, text in (("namespace", "kubeflow\n"), ("token", "of-the-account"), ("ca.crt", crt.read_text())):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(cluster, "ACCOUNT", tmp_path)
    monkeypatch.setenv("HOSTNAME", "pod-1")
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    fake = FakeKubernetes()
    with served(fake.answer, (crt, key)) as address:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", address.rpartition(":")[2])
        yield fake


def test_a_pod_knows_its_run_and_its_place(api: FakeKubernetes) -> None:
    api.objects[POD] = {"metadata": {"labels": {"pipeline/runid": RUN}}}
    assert cluster.run() == RUN
    assert api.who == {"bearer of-the-account"}
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
def test_what_became_of_another_run(api: FakeKubernetes, workflow: dict[str, Any] | None, state: str) -> None:
    items = [workflow] if workflow else []
    api.objects[WORKFLOWS] = {"items": items}
    assert cluster.state(RUN) == state


@pytest.mark.parametrize(("phase", "broken"), [("Succeeded", False), ("Failed", True), ("Error", True), (None, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_whether_what_the_exit_handler_guards_failed(api: FakeKubernetes, phase: str | None, broken: bool, packed: bool) -> None:
    nodes = {"a": {"displayName": "exit-handler-1", "phase": phase}, "b": {"displayName": "finish-driver", "phase": "Failed"}}
    nodes = nodes if phase else {}
    content = base64.b64encode(gzip.compress(json.dumps(nodes).encode())).decode()
    status = {"compressedNodes": content} if packed else {"nodes": nodes}
    api.objects[WORKFLOWS] = {"items": [{"status": status}]}
    assert cluster.broken(RUN) is broken


def test_a_refusal_is_an_error_that_its_caller_knows(api: FakeKubernetes, tmp_path: Path) -> None:
    api.objects[WORKFLOWS] = denied("list", "workflows")
    with pytest.raises(Denied, match=r"^list workflows$"):
        cluster.state(RUN)
    (tmp_path / "token").unlink()
    with pytest.raises(FFNError, match="the pod's account: Service token file does not exist"):
        cluster.state(RUN)


def test_an_api_that_does_not_answer_may_later(api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(Fault, match=r"Kubernetes at https://127.0.0.1:1 does not answer: .*refused"):
        cluster.run()
