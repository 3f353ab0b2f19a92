"""A pod as the steps' are: asked of the API without being made, and made once, to see from within what a step would meet.

What KFP's driver and Argo add to a step's pod is added here too, so that quotas, limit ranges and Pod Security judge what they
will judge in a run.
"""

import contextlib
import json
import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import FrameType
from typing import NoReturn

from kubernetes.client import CoreV1Api

from components import kube
from components.kube import Absent, Denied, Json, Rejected
from pipeline import placement
from pipeline.settings import Settings

PREFIX = "ffn-check-"
SECONDS = 180
"""Within which the pod is scheduled, pulls its image and has told."""
PLACE_SECONDS = 20
"""How long a pod may have no node: a volume is bound, a node becomes free."""
POLL_SECONDS = 1.0

WORKFLOW_LABEL = "workflows.argoproj.io/workflow"
"""Argo puts it on every pod of a run; the network policies select steps by it and by our own."""

WITHOUT_SIDECAR = {"sidecar.istio.io/inject": "false"}
"""KFP keeps Istio out of its pods: in a profile its sidecar would go on after they end.

Source: backend/src/apiserver/template/v2_template.go:410 of KFP 2.17.0.
"""

EXECUTOR_IMAGE = "quay.io/argoproj/argoexec:v4.0.5"
LAUNCHER_IMAGE = "ghcr.io/kubeflow/kfp-launcher:2.17.0"
HARDENED: Json = {
    "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
"""KFP's defaults for containers. Source: backend/src/v2/compiler/argocompiler/security_context.go:22 of KFP 2.17.0."""
LAUNCHER_RESOURCES: Json = {"requests": {"cpu": "100m"}, "limits": {"cpu": "500m", "memory": "256Mi"}}
"""Source: launcherResources, backend/src/v2/compiler/argocompiler/argo.go:570 of KFP 2.17.0."""


class End(StrEnum):
    """How a pod ended, or why it never began."""

    TOLD = "told"
    REFUSED = "refused"
    UNSCHEDULABLE = "found no node"
    IMAGE = "cannot be pulled"
    NOT_STARTED = "does not start"
    DIED = "died"
    LATE = "is late"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a pod."""

    end: End
    said: str = ""
    """By whoever stopped it: the API, the scheduler, the kubelet, the container."""
    report: Json = field(default_factory=dict)
    """What the pod told: see `pipeline.health.report`."""


def name() -> str:
    """A new name. Ours to choose: a pod whose making was cut off can be deleted only by who knows what it is called."""
    return f"{PREFIX}{secrets.token_hex(3)}"


def train(settings: Settings, *, name: str, account: str, executor: Json | None = None) -> Json:
    """The pod of a training, as KFP and Argo make it; `executor` is Argo's configuration of its own containers."""
    asks = {"cpu": settings.cpu, "memory": settings.memory}
    if settings.gpus:
        asks[settings.gpu] = str(settings.gpus)
    made = _pod(settings, name=name, account=account, resources={"requests": asks, "limits": asks}, claims=_states(settings))
    _heavy(made, settings)
    return _of_a_run(made, executor)


def ingest(settings: Settings, *, name: str, account: str, executor: Json | None = None) -> Json:
    """The pod of a light step, the one that reads the recordings."""
    made = _pod(
        settings, name=name, account=account, resources=_light(settings), claims={**_recordings(settings), **_states(settings)}
    )
    return _of_a_run(made, executor)


def probe(settings: Settings, *, name: str, account: str, rights: Sequence[Json] = ()) -> Json:
    """The pod that is made: where a training would run, with every volume of a run, and what a light step asks for.

    `rights` are the `resourceAttributes` that its account is to ask for.
    """
    claims = {**_recordings(settings), **_states(settings)}
    made = _pod(settings, name=name, account=account, resources=_light(settings), claims=claims)
    _heavy(made, settings)
    (main,) = made["spec"]["containers"]
    main["command"] = ["python3", "-m", "pipeline.health", json.dumps(list(rights))]
    main["env"] += [
        {"name": "FFN_CHECKPOINTS", "value": settings.checkpoints},
        *([{"name": "FFN_DATA", "value": settings.data}] if settings.data_claim else []),
    ]
    # Whoever may see the pod may see what it told; its log takes a right of its own.
    main["terminationMessagePolicy"] = "FallbackToLogsOnError"
    made["spec"]["activeDeadlineSeconds"] = SECONDS  # where we are killed before we delete it
    return made


def _states(settings: Settings) -> dict[str, str]:
    """Folder -> claim of the states of epochs."""
    return {settings.checkpoints: settings.states_claim} if settings.states_claim else {}


def _recordings(settings: Settings) -> dict[str, str]:
    return {settings.data: settings.data_claim} if settings.data_claim else {}


def _light(settings: Settings) -> Json:
    return {"requests": light_requests(settings), "limits": {"cpu": settings.light_cpu, "memory": settings.light_memory}}


def light_requests(settings: Settings) -> dict[str, str]:
    """What a light step asks for."""
    limits = {"cpu": settings.light_cpu, "memory": settings.light_memory}
    return {key: min(asked, limits[key], key=placement.amount) for key, asked in placement.LIGHT_REQUEST.items()}


def _pod(settings: Settings, *, name: str, account: str, resources: Json, claims: Mapping[str, str]) -> Json:
    """A step's pod with its own container alone."""
    variables = {
        **settings.environment,
        "FFN_IMAGE": settings.image,
        placement.THREADS: str(placement.threads(resources["limits"]["cpu"])),
        placement.ATTEMPTS: str(settings.retries + 1),
    }
    volumes = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in dict.fromkeys(claims.values())]
    mounts = [{"name": claim, "mountPath": folder} for folder, claim in claims.items()]
    if settings.ca:
        variables |= dict.fromkeys(placement.CA_VARIABLES, f"{placement.CA_FOLDER}/ca.crt")
        volumes.append({"name": settings.ca, "configMap": {"name": settings.ca}})
        mounts.append({"name": settings.ca, "mountPath": placement.CA_FOLDER})
    env: list[Json] = [{"name": key, "value": value} for key, value in variables.items()]
    for secret, keys in ((settings.mlflow_secret, placement.MLFLOW_KEYS), (settings.s3_secret, placement.S3_KEYS)):
        if secret:
            env += [{"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for key in keys]
    main = {
        "name": "main", "image": settings.image, "command": ["true"], "env": env, "resources": resources, "volumeMounts": mounts,
        "securityContext": {**HARDENED, "runAsUser": placement.IDENTITY, "runAsGroup": placement.IDENTITY},
    }  # fmt: skip
    spec: Json = {
        "restartPolicy": "Never", "serviceAccountName": account, "securityContext": {"seccompProfile": HARDENED["seccompProfile"]},
        "containers": [main], "volumes": volumes, "activeDeadlineSeconds": SECONDS,
    }  # fmt: skip
    if settings.pull_secret:
        spec["imagePullSecrets"] = [{"name": settings.pull_secret}]
    labels = {WORKFLOW_LABEL: name, "app.kubernetes.io/part-of": "ffn", "app.kubernetes.io/component": "check"}
    metadata = {"name": name, "labels": labels, "annotations": WITHOUT_SIDECAR}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _heavy(made: Json, settings: Settings) -> None:
    """What heavy steps have besides: their nodes, and a /dev/shm of their own."""
    spec = made["spec"]
    spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}})
    spec["containers"][0]["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        spec["tolerations"] = tolerations(settings)


def tolerations(settings: Settings) -> list[Json]:
    """FFN_TOLERATIONS as pods have them."""
    return [
        {"key": taint.key, "operator": "Equal" if taint.value else "Exists"}
        | ({"value": taint.value} if taint.value else {})
        | ({"effect": taint.effect} if taint.effect else {})
        for taint in settings.tolerations
    ]


def _of_a_run(made: Json, executor: Json | None) -> Json:
    """With the containers that Argo and KFP put beside a step's own; those of Argo ask for nothing unless it is told to.

    Source: newExecContainer, workflow/controller/workflowpod.go:852 of Argo 4.0.5.
    """
    argo = {
        "image": EXECUTOR_IMAGE,
        "securityContext": {**HARDENED, "runAsUser": 65532},
        **{key: value for key, value in (executor or {}).items() if key in ("resources", "securityContext")},
    }
    launcher = {"image": LAUNCHER_IMAGE, "securityContext": HARDENED, "resources": LAUNCHER_RESOURCES}
    made["spec"]["initContainers"] = [{"name": "init", **argo}, {"name": "kfp-launcher", **launcher}]
    made["spec"]["containers"].append({"name": "wait", **argo})
    return made


def dry_run(core: CoreV1Api, namespace: str, pod: Json) -> tuple[Outcome, Json]:
    """Whether the API would take the pod, and the pod as its admissions changed it. Raises `Denied`."""
    try:
        return Outcome(end=End.TOLD), kube.ask(core.create_namespaced_pod, namespace, pod, dry_run="All")
    except (Rejected, Absent) as error:
        return Outcome(end=End.REFUSED, said=str(error)), {}


def run(core: CoreV1Api, namespace: str, pod: Json, *, patience: float = PLACE_SECONDS) -> Outcome:
    """What becomes of the pod within `SECONDS`; it is deleted, whatever happens. Raises `Denied`.

    `patience` is for a node: where a cluster makes nodes as they are needed it takes longer.
    """
    name = pod["metadata"]["name"]
    with _terminable():
        try:
            try:
                kube.ask(core.create_namespaced_pod, namespace, pod)
            except (Rejected, Absent) as error:
                return Outcome(end=End.REFUSED, said=str(error))
            return _follow(core, namespace, name, patience)
        finally:
            with _deaf(), contextlib.suppress(Absent):
                kube.ask(core.delete_namespaced_pod, name, namespace, grace_period_seconds=1)


def _follow(core: CoreV1Api, namespace: str, name: str, patience: float) -> Outcome:
    began = time.monotonic()
    while True:
        try:
            now = kube.ask(core.read_namespaced_pod, name, namespace)
        except Absent:
            return Outcome(end=End.DIED, said="somebody deleted it")
        waited = time.monotonic() - began
        if outcome := judge(now, placed_late=waited > patience):
            return outcome
        if waited > SECONDS:
            return Outcome(end=End.LATE, said=f"{_phase(now)} after {SECONDS} s{_last_event(core, namespace, name)}")
        time.sleep(POLL_SECONDS)


def judge(pod: Json, *, placed_late: bool = False) -> Outcome | None:
    """How the pod ended; None where it may still go well: a pod without a node may until that is `placed_late`."""
    status: Json = pod.get("status") or {}
    container = _container(status)
    if ended := container.get("terminated"):
        return _ended(ended)
    if status.get("phase") == "Failed":  # evicted, or past its deadline, with no container to ask
        return Outcome(end=End.DIED, said=f"{status.get('reason', '')}: {status.get('message', '')}")
    waiting = container.get("waiting") or {}
    reason, said = waiting.get("reason", ""), waiting.get("message") or ""
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"):
        return Outcome(end=End.IMAGE, said=said or reason)
    if reason and reason not in ("ContainerCreating", "PodInitializing"):
        return Outcome(end=End.NOT_STARTED, said=f"{reason}: {said}")
    for condition in status.get("conditions") or []:
        placed = condition["type"] != "PodScheduled" or condition["status"] == "True"
        if not placed and condition.get("reason") == "Unschedulable" and placed_late:
            return Outcome(end=End.UNSCHEDULABLE, said=condition.get("message", ""))
    return None


def _ended(state: Json) -> Outcome:
    message = (state.get("message") or "").strip()
    with contextlib.suppress(ValueError):
        report = json.loads(message)
        if isinstance(report, dict) and "parts" in report:
            return Outcome(end=End.TOLD, report=report)
    last = (message.splitlines() or [""])[-1]
    return Outcome(end=End.DIED, said=f"{state.get('reason', 'ended')}, exit status {state.get('exitCode')}: {last}".rstrip(": "))


def _phase(pod: Json) -> str:
    """Where a pod stands, in a word of Kubernetes' own."""
    status: Json = pod.get("status") or {}
    return (_container(status).get("waiting") or {}).get("reason") or str(status.get("phase"))


def _container(status: Json) -> Json:
    """The state of the one container, once the kubelet has told."""
    told: list[Json] = status.get("containerStatuses") or []
    return (told[0].get("state") or {}) if told else {}


def _last_event(core: CoreV1Api, namespace: str, name: str) -> str:
    """What Kubernetes last warned of about the pod; nothing where we may not see it."""
    with contextlib.suppress(Denied, Absent, Rejected):
        selector = f"involvedObject.name={name},type=Warning"
        events = kube.ask(core.list_namespaced_event, namespace, field_selector=selector)["items"]
        if events:
            newest = max(events, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
            return f": {newest.get('reason')}: {' '.join(str(newest.get('message')).split())}"
    return ""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, through its `finally`."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A second Ctrl-C waits for the block's end."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
