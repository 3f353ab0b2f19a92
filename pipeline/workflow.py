"""Why a step failed, or waits: from the Argo workflow that its run is, because KFP itself does not say.

Argo copies into a node's message what its pod's status says: why it cannot be scheduled, its image not be pulled, how its container
ended, and the last words that the step left there (components/cluster.py).

Source: argo-workflows 4.0.5, workflow/controller/operator.go:1709 (`inferFailedReason`) and `getPendingReason` beside it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from components.attempts import label
from components.cluster import argo_nodes
from ffn.errors import FFNError

Json = dict[str, Any]

WAITING = frozenset({"", "PodInitializing", "ContainerCreating"})
"""Messages of a pod that is on its way."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What a person should know of a step's pod."""

    step: str
    """`train S4/ntu60-xsub/j`."""
    pod: str
    why: str
    log: str
    """The command that shows more."""


@dataclass(frozen=True, kw_only=True)
class Workflows:
    """The workflows of runs in one namespace, seen with a person's rights on Kubernetes."""

    api: Any
    """`kubernetes.client.ApiClient`."""
    namespace: str

    @classmethod
    def reach(cls, namespace: str) -> Self | None:
        """None where there is no kubeconfig, or it is not one."""
        from components import kube

        try:
            return cls(api=kube.connect(), namespace=namespace)
        except FFNError:
            return None

    def troubles(self, run: str) -> list[Trouble]:
        """What failed or waits in the run of that id so far; nothing where Kubernetes does not answer or refuses."""
        from components import kube

        try:
            found = kube.workflows(self.api, self.namespace, run)
        except FFNError:
            return []
        return [trouble for workflow in found for trouble in troubles(workflow)]


def troubles(workflow: Json) -> Iterator[Trouble]:
    """The pods of a workflow that failed, or wait for more than their turn."""
    name, namespace = workflow["metadata"]["name"], workflow["metadata"]["namespace"]
    for node in argo_nodes(workflow.get("status") or {}).values():
        said = node.get("message") or ""
        waits = node.get("phase") == "Pending" and said not in WAITING
        if node.get("type") != "Pod" or not (waits or node.get("phase") in ("Failed", "Error")):
            continue
        pod = f"{name}-{node['templateName']}-{node['id'].rpartition('-')[2]}"
        step, why = step_of(node), reason(said)
        look = f"kubectl -n {namespace} {f'describe pod {pod}' if waits else f'logs {pod} -c main'}"
        yield Trouble(step=step, pod=pod, why=f"waits: {why}" if waits else why.removeprefix(f"{step}: "), log=look)


def reason(message: str) -> str:
    """What a person reads of a node's message: the step's own words where it left any, else how the container ended."""
    ended = re.fullmatch(r"main: (\w+) \(exit code (\d+)\)(?:: (.*))?", message, re.DOTALL)
    if not ended:
        return message or "ended without a word"
    how, status, said = ended.groups()
    if said and how == "Error" and ": " in said:
        return str(said)
    return f"{said}: {how}, exit status {status}" if said else f"{how}, exit status {status}"


def step_of(node: Json) -> str:
    """`train S4/ntu60-xsub/j`, from what KFP's driver told the pod; the node's own name where that says nothing."""
    given = {entry["name"]: entry.get("value", "") for entry in (node.get("inputs") or {}).get("parameters", [])}
    try:
        (container, *_) = json.loads(given["pod-spec-patch"])["containers"]
        words = [*container.get("command", ()), *container.get("args", ())]
        step = words[words.index("--function_to_execute") + 1]
        values = json.loads(words[words.index("--executor_input") + 1])["inputs"]["parameterValues"]
    except (KeyError, ValueError, IndexError, TypeError):
        return f"{given.get('task-name') or node.get('displayName', 'step')} ({node.get('templateName', 'pod')})"
    return label(step, values)
