"""What a step asks of the cluster: image, environment, cache, and where, with what and for how long its pod runs."""

import re

from kfp import dsl, kubernetes

from components.notify import WEBHOOK
from ffn.errors import FFNError
from pipeline.settings import Settings

ATTEMPTS = "FFN_ATTEMPTS"
"""Variable with the attempts of a step within its pod: components/attempts.py."""

CACHED = frozenset({"ingest", "train", "evaluate", "fuse"})
"""Steps that kfp's cache may answer on one machine, which looks whether the files are still there; a cluster's does not: there the
steps find in the durable store what they made. The parent run's id is part of every key but ingestion's."""

STORES = frozenset({"ingest", "train", "evaluate", "register", "gate"})
"""Steps that read or write the durable store."""

TELLING = frozenset({"finish", "promote"})
"""Steps that notify people."""

HEAVY = frozenset({"train", "evaluate", "gate"})
THREADS = "OMP_NUM_THREADS"
"""Variable with the threads of a process: left to itself it takes one for every core of the node, whatever its limit is."""

MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
WEBHOOK_KEYS = (WEBHOOK,)
"""Keys of the Secrets, which are the variables that steps get from them."""

CA_FOLDER = "/etc/ffn/ca"
CA_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
"""What boto3 and MLflow's client read the authorities' file from."""

LIGHT_REQUEST = {"cpu": "500m", "memory": "2Gi"}
"""What a light step asks for, unless its limits are lower."""

IDENTITY = 65532
"""User and group of every step, of the image, and of the volumes they write to: where a pod names a user and no group, the kubelet
gives it the group root."""

PAUSE = "10s"
"""Before Argo makes a lost pod again; a step that fails is begun again inside its pod (components/attempts.py)."""

HOUR = 3600


def place(task: dsl.PipelineTask, settings: Settings) -> dsl.PipelineTask:
    """The task with its image, environment, cache policy and, on a cluster, its resources."""
    step = task.component_spec.name
    task.set_container_image(settings.image)
    for name, value in settings.environment.items():
        task.set_env_variable(name, value)
    task.set_caching_options(settings.local and step in CACHED)
    if not settings.local:
        task.set_env_variable("FFN_IMAGE", settings.image)  # what a run says it was made by
        _resources(task, settings, step)
        _pod(task, settings, step)
    return task


def unkept(settings: Settings) -> str:
    """Why the states of trainings would not outlive their pods, and what would keep them; empty where they are kept."""
    if not settings.checkpoints.startswith(("s3://", "/")):
        return "expected s3://BUCKET/PREFIX, or the folder of a volume (k8s/components/volume) that FFN_CHECKPOINTS_CLAIM names"
    if settings.checkpoints.startswith("/") and not settings.checkpoints_claim:
        return (
            "a folder of the pod itself, and gone with it; name its volume in FFN_CHECKPOINTS_CLAIM, or expected s3://BUCKET/PREFIX"
        )
    return ""


def lifetime() -> dsl.PipelineConfig:
    """How long Argo keeps a run that has ended, with its pods and their logs: for this pipeline alone.

    Both are said, because KFP's own `ttlStrategy` has both (an hour each), and Argo merges what a workflow leaves out. A day is the
    most there is: then KFP deletes what it has written down. A cancelled run is a failed one here.

    Source: KFP 2.17.0: buildTTLStrategy, backend/src/v2/compiler/argocompiler/argo.go:262,
    manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml:52, TTL_SECONDS_AFTER_WORKFLOW_FINISH of
    base/pipeline/ml-pipeline-persistenceagent-deployment.yaml:71; Argo 4.0.5: ttl, workflow/gccontroller/gc_controller.go:262.
    """
    return dsl.PipelineConfig(ttl_seconds_after_success=HOUR, ttl_seconds_after_failure=24 * HOUR)


def threads(cpu: str) -> int:
    """How many threads a CPU limit has room for: `8` -> 8, `2500m` -> 2, `500m` -> 1."""
    return max(1, int(amount(cpu)))


def amount(quantity: str) -> float:
    """Kubernetes' quantity as a number of cores or bytes: `500m` -> 0.5, `2Gi` -> 2147483648."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", quantity).groups()  # type: ignore[union-attr]  # the settings have checked its form
    return float(number) * UNITS[unit]


UNITS = {"": 1.0, "m": 1e-3} | {
    f"{letter}{suffix}": float(base**power)
    for power, letter in enumerate("KMGTPE", 1)
    for suffix, base in (("", 1000), ("i", 1024))
}


def _resources(task: dsl.PipelineTask, settings: Settings, step: str) -> None:
    heavy = step in HEAVY
    limit = HOUR * (settings.hours if heavy else settings.light_hours)
    cpu, memory = (settings.cpu, settings.memory) if heavy else (settings.light_cpu, settings.light_memory)
    task.set_cpu_limit(cpu).set_memory_limit(memory)
    task.set_env_variable(THREADS, str(threads(cpu)))
    task.set_cpu_request(cpu if heavy else min(LIGHT_REQUEST["cpu"], cpu, key=amount))
    task.set_memory_request(memory if heavy else min(LIGHT_REQUEST["memory"], memory, key=amount))
    task.set_env_variable(ATTEMPTS, str(settings.retries + 1))
    kubernetes.set_timeout(task, limit)
    if settings.retries:
        # KFP gives up an hour after the first attempt began unless told otherwise: no long training would be run again.
        whole = (settings.retries + 1) * (limit + HOUR)
        task.set_retry(settings.retries, backoff_duration=PAUSE, backoff_factor=2, backoff_max_duration=f"{whole}s")
    if not heavy:
        return
    if settings.gpus:
        task.set_accelerator_type(settings.gpu).set_accelerator_limit(settings.gpus if step == "train" else 1)
    # The 64 MiB of a container's own are too few for the processes of one training to talk through.
    kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=settings.shm)
    for label, wanted in settings.node_selector.items():
        kubernetes.add_node_selector(task, label, wanted)
    for taint in settings.tolerations:
        value, effect = taint.value or None, taint.effect or None
        kubernetes.add_toleration(task, key=taint.key, operator="Equal" if value else "Exists", value=value, effect=effect)


def _pod(task: dsl.PipelineTask, settings: Settings, step: str) -> None:
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "ffn")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", step)
    kubernetes.set_security_context(task, run_as_user=IDENTITY, run_as_group=IDENTITY, run_as_non_root=True)
    if settings.pull_secret:
        kubernetes.set_image_pull_secrets(task, [settings.pull_secret])
    if step == "train" and (trouble := unkept(settings)):
        raise FFNError(f"FFN_CHECKPOINTS={settings.checkpoints!r}: {trouble}")
    if step in STORES and settings.states_claim:
        kubernetes.mount_pvc(task, settings.states_claim, settings.checkpoints)
    if step == "ingest" and settings.data_claim:
        kubernetes.mount_pvc(task, settings.data_claim, settings.data)
    for secret, keys in ((settings.mlflow_secret, MLFLOW_KEYS), (settings.s3_secret, S3_KEYS)):
        if secret:
            kubernetes.use_secret_as_env(task, secret, {key: key for key in keys})
    if step in TELLING and settings.webhook_secret:  # optional: without it nobody is told, and all else goes well
        kubernetes.use_secret_as_env(task, settings.webhook_secret, {key: key for key in WEBHOOK_KEYS}, optional=True)
    if settings.ca:
        kubernetes.use_config_map_as_volume(task, settings.ca, CA_FOLDER)
        for name in CA_VARIABLES:
            task.set_env_variable(name, f"{CA_FOLDER}/ca.crt")
