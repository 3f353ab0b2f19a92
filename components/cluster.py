"""The cluster that a step runs in: where it is, and what became of another pipeline run. Asked through the Kubernetes API."""

import base64
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""What Kubernetes mounts into a pod: its account's token, its namespace, its cluster's authority."""

RUN_LABEL = "pipeline/runid"
"""Of a run's workflow and of all its pods."""

TERMINATION = Path("/dev/termination-log")
"""What is written there before a container ends is in its pod's status, and Argo's message of the node."""

SHORTEST = 4096
"""Bytes that Kubernetes keeps of it."""


def inside() -> bool:
    """Whether this process runs in a pod."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and (ACCOUNT / "namespace").is_file()


def namespace() -> str:
    """This pod's."""
    return (ACCOUNT / "namespace").read_text().strip()


def pod() -> str:
    """This pod's name; empty outside of one."""
    return os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "") if inside() else ""


def run() -> str:
    """KFP's id of the pipeline run that this pod is of; empty outside of one.

    Raises `FFNError` where the Kubernetes API does not answer or refuses.

    Source: KFP 2.17.0, backend/src/common/util/consts.go:48.
    """
    if not inside():
        return ""
    from kubernetes.client import CoreV1Api

    from components import kube

    found = kube.ask(CoreV1Api(kube.account()).read_namespaced_pod, pod(), namespace())
    return str(found["metadata"].get("labels", {}).get(RUN_LABEL, ""))


def where() -> str:
    """What tells this namespace of this cluster from every other, `kubeflow@1f3a09c27b15`; empty outside of a pod."""
    if not inside():
        return ""
    return f"{namespace()}@{hashlib.sha256((ACCOUNT / 'ca.crt').read_bytes()).hexdigest()[:12]}"


def state(run: str) -> str:
    """What MLflow should say of the pipeline run with that id of KFP, in this namespace: RUNNING, FINISHED, FAILED or KILLED.

    Raises `FFNError` where the Kubernetes API does not answer or refuses.

    Source: KFP 2.17.0 ends a run by a deadline of 0 seconds (backend/src/common/util/execution_spec.go:299, workflow.go:315).
    A workflow that is not there was deleted, with its schedule, by hand, or by Argo some hours after it ended.
    """
    found = _workflows(run)
    if not found:
        return "KILLED"
    phase, spec = found[0].get("status", {}).get("phase", ""), found[0].get("spec", {})
    if phase in ("", "Pending", "Running"):
        return "RUNNING"
    if phase == "Succeeded":
        return "FINISHED"
    return "KILLED" if spec.get("activeDeadlineSeconds") == 0 or spec.get("shutdown") else "FAILED"


def broken(run: str) -> bool:
    """Whether what the exit handler guards failed in the pipeline run of that id, which is still at its end.

    Raises `FFNError` where the Kubernetes API does not answer or refuses.

    Source: KFP 2.17.0 compiles `dsl.ExitHandler` to a task that the SDK calls `exit-handler-1`
    (sdk/python/kfp/compiler/compiler_utils.py); its node fails with any in it.
    """
    nodes = [node for workflow in _workflows(run) for node in argo_nodes(workflow.get("status") or {}).values()]
    guarded = [node for node in nodes if node.get("displayName") == "exit-handler-1"]
    return not guarded or any(node.get("phase") in ("Failed", "Error") for node in guarded)


def argo_nodes(status: dict[str, Any]) -> dict[str, Any]:
    """A workflow's nodes by id; Argo compresses them where they are many."""
    if packed := status.get("compressedNodes"):
        return dict(json.loads(gzip.decompress(base64.b64decode(packed))))
    return dict(status.get("nodes") or {})


def _workflows(run: str) -> list[dict[str, Any]]:
    from components import kube

    return kube.workflows(kube.account(), namespace(), run)


def leave_word(text: str) -> None:
    """What the pod's status is to say of this container when it has ended; nothing happens outside of a pod."""
    if not inside():
        return
    try:
        TERMINATION.write_text(text.encode()[:SHORTEST].decode(errors="ignore"))
    except OSError:
        return  # a courtesy: no step fails for the want of it
