"""What a step asks of the cluster: image, environment, cache, and where, with what and for how long its pod runs."""

import re

from kfp import dsl, kubernetes

from components.notify import WEBHOOK
from pipeline.settings import Settings

ATTEMPTS = "FFN_ATTEMPTS"
"""Variable with the attempts of a step within its pod: components/attempts.py."""

CACHED = frozenset({"ingest", "evaluate"})
"""Steps whose output a cluster may reuse: the others open runs, resume from a state, or read and change the registry."""

CACHED_LOCALLY = CACHED | {"train", "fuse"}
"""Reused on one machine too. The parent run's id is part of every key but ingestion's, so a new MLflow store finds no training."""

TELLING = frozenset({"finish", "promote"})
"""Steps that notify people."""

HEAVY = frozenset({"train", "evaluate"})
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
    task.set_caching_options(step in (CACHED_LOCALLY if settings.local else CACHED))
    if not settings.local:
        task.set_env_variable("FFN_IMAGE", settings.image)  # what a run says it was made by
        _resources(task, settings, step)
        _pod(task, settings, step)
    return task


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
    if step == "train" and settings.checkpoints_claim and not settings.checkpoints.startswith("s3://"):
        kubernetes.mount_pvc(task, settings.checkpoints_claim, settings.checkpoints)
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
