"""Why a step failed or waits, as Argo's nodes tell it: their shapes and messages are those of a real cluster's."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from components.cluster import argo_nodes
from pipeline.workflow import Workflows, reason, troubles
from tests.pipeline.kubernetes_api import FakeKubernetes, denied, kubernetes

VALUES = {"preset": "S4", "protocol": "ntu60-xsub", "stream": "j", "seed": 0, "overrides": []}


def pod_spec_patch(step: str, values: dict[str, Any]) -> str:
    """What KFP 2.17.0's driver hands to Argo: the launcher's words, then the step's."""
    launch = [
        "/kfp-launcher/launch",
        "--pipeline_name",
        "ffn",
        "--executor_input",
        json.dumps({"inputs": {"parameterValues": values}}),
    ]
    run = ["sh", "-ec", "program", "text", "--executor_input", "{{$}}", "--function_to_execute", step]
    return json.dumps({"containers": [{"name": "main", "command": [*launch, "--"], "args": run}]})


def node(phase: str, message: str | None, *, step: str = "train", values: dict[str, Any] = VALUES, **more: Any) -> dict[str, Any]:
    given = [{"name": "pod-spec-patch", "value": pod_spec_patch(step, values)}]
    return {
        "id": "ffn-5859p-2960298582", "type": "Pod", "phase": phase, "message": message, "displayName": "executor(0)",
        "templateName": "retry-system-container-impl", "inputs": {"parameters": given}, **more,
    }  # fmt: skip


def workflow(*found: dict[str, Any]) -> dict[str, Any]:
    status = {"nodes": {str(number): each for number, each in enumerate(found)}}
    return {"metadata": {"name": "ffn-5859p", "namespace": "kubeflow"}, "status": status}


@pytest.mark.parametrize(
    ("phase", "message", "why"),
    [
        ("Failed", "main: Error (exit code 1): train S4/ntu60-xsub/j: set: no protocol 'q'", "set: no protocol 'q'"),
        ("Failed", "main: OOMKilled (exit code 137): train S4/ntu60-xsub/j", "OOMKilled, exit status 137"),
        ("Failed", "main: Error (exit code 143): train S4/ntu60-xsub/j", "Error, exit status 143"),
        ("Failed", "main: Error (exit code 1)", "Error, exit status 1"),
        ("Failed", "The node was low on resource: memory.", "The node was low on resource: memory."),
        ("Error", "pod deleted", "pod deleted"),
        ("Error", None, "ended without a word"),
        ("Pending", "Unschedulable: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu.", "waits: Unschedulable: 0/1 nodes"),
        ("Pending", 'ImagePullBackOff: Back-off pulling image "x@sha256:1"', "waits: ImagePullBackOff: Back-off"),
        ("Pending", 'CreateContainerConfigError: secret "ffn-mlflow" not found', "waits: CreateContainerConfigError: secret"),
    ],
)
def test_what_a_node_says_is_told_of_its_step(phase: str, message: str | None, why: str) -> None:
    (found,) = troubles(workflow(node(phase, message)))
    assert found.step == "train S4/ntu60-xsub/j"
    assert found.why.startswith(why)
    assert found.pod == "ffn-5859p-retry-system-container-impl-2960298582"
    looks = f"describe pod {found.pod}" if phase == "Pending" else f"logs {found.pod} -c main"
    assert found.log == f"kubectl -n kubeflow {looks}"


def test_what_goes_well_or_has_its_turn_yet_is_not_told() -> None:
    quiet = [node("Pending", word) for word in (None, "", "PodInitializing", "ContainerCreating")]
    quiet += [node("Running", None), node("Succeeded", None), {**node("Failed", "x"), "type": "Retry"}]
    assert list(troubles(workflow(*quiet))) == []
    assert list(troubles({"metadata": {"name": "w", "namespace": "n"}})) == []


def test_a_seed_and_a_driver_are_named() -> None:
    (seeded,) = troubles(workflow(node("Failed", "x", values={**VALUES, "seed": 2.0})))
    assert seeded.step == "train S4/ntu60-xsub/j/seed2"
    driver = node("Failed", "main: Error (exit code 1)", displayName="train-driver(0)", templateName="system-container-driver")
    driver["inputs"] = {"parameters": [{"name": "task-name", "value": "train"}]}
    (found,) = troubles(workflow(driver))
    assert found.step == "train (system-container-driver)"


def test_many_nodes_are_compressed() -> None:
    packed = base64.b64encode(gzip.compress(json.dumps({"a": node("Failed", "x")}).encode())).decode()
    assert argo_nodes({"compressedNodes": packed})["a"]["message"] == "x"
    assert reason("") == "ended without a word"


def test_a_cluster_that_refuses_or_is_away_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api, place = FakeKubernetes(), "/apis/argoproj.io/v1alpha1/namespaces/kubeflow/workflows?pipeline/runid=run"
    with kubernetes(api, tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
        workflows = Workflows.reach("kubeflow")
        assert workflows
        api.objects[place] = {"items": [workflow(node("Failed", "x"))]}
        assert [found.why for found in workflows.troubles("run")] == ["x"]
        api.objects[place] = denied("list", "workflows")
        assert workflows.troubles("run") == []
    assert workflows.troubles("run") == []
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert Workflows.reach("kubeflow") is None
