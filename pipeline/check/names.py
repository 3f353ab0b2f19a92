"""What a run names: the parts that answer, its namespace and account, Secrets, ConfigMaps, volume claims."""

import json
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from components.kube import Json
from pipeline import placement
from pipeline.check.finding import Finding, amount, dots, failed, ok, version_of, warning
from pipeline.settings import Settings

KUBERNETES = (1, 31)
"""The oldest Kubernetes that the manifests are checked against."""
KFP_PROVEN, KFP_OLDEST = (2, 17), (2, 14)
"""From 2.14 on a run's exit handler is told how the pipeline ended."""

PULL_KEYS = {"kubernetes.io/dockerconfigjson": ".dockerconfigjson", "kubernetes.io/dockercfg": ".dockercfg"}
"""Types of Secrets that images are pulled with, and the key of each."""


def kubernetes_version(version: Json) -> Finding:
    """Of `GET /version`."""
    said = str(version.get("gitVersion", "")).removeprefix("v")
    if (found := version_of(said)) and found < KUBERNETES:
        return warning("Kubernetes", f"{said} is older than {dots(KUBERNETES)}", "upgrade it, or try: older ones are not tested")
    return ok("Kubernetes", said)


def kfp_version(healthz: Json, where: str) -> Finding:
    """Of KFP's `healthz`."""
    said = str(healthz.get("tag_name", ""))
    found, what = version_of(said), "Kubeflow Pipelines"
    if found is None:
        return warning(what, f"at {where} does not tell its version ({said or 'none'})", f"runs are proven on {dots(KFP_PROVEN)}")
    if found < KFP_OLDEST:
        return failed(what, f"{said} does not tell a run's end to `finish`", f"upgrade to {dots(KFP_PROVEN)}")
    if found[:2] != KFP_PROVEN:
        return warning(what, f"{said} is not what runs are proven on", f"use {dots(KFP_PROVEN)}, or try")
    return ok(what, said)


def profile(healthz: Json, given: str) -> Iterator[Finding]:
    """Whether KFP's runs have the namespace that we look at: with profiles, one that must be named."""
    if healthz.get("multi_user") and not given:
        yield failed("Profile", "is not named, and this KFP keeps runs in profiles", "export FFN_KFP_NAMESPACE=<your profile>")


def namespace_there(found: Json | None, name: str) -> Finding:
    """Of the namespace where runs live."""
    what = f"Namespace {name}"
    if found is None:
        return failed(what, "is not there", "install KFP or make the profile, or name another in FFN_KFP_NAMESPACE")
    if found.get("status", {}).get("phase") == "Terminating":
        return failed(what, "is being deleted", "wait until it is gone, then make it again")
    return ok(what)


def home(healthz: Json, kfp: str | None, namespace: str) -> Iterator[Finding]:
    """Whether runs go where we look: without profiles KFP keeps them in its own namespace, whatever it is asked.

    Source: ReplaceNamespace, backend/src/apiserver/resource/resource_manager.go:2456 of KFP 2.17.0.
    """
    if healthz and not healthz.get("multi_user") and kfp and kfp != namespace:
        yield failed(
            "Kubeflow Pipelines",
            f"has no profiles and keeps every run in {kfp}, none in {namespace}",
            f"export FFN_KFP_NAMESPACE={kfp}",
        )


def admitted_by_ours(found: Json, settings: Settings) -> Iterator[Finding]:
    """Of the namespace where runs live: whether our MLflow and S3 let its steps in."""
    host = urlsplit(settings.environment.get("MLFLOW_TRACKING_URI", "")).hostname or ""
    name, labels = found["metadata"]["name"], found["metadata"].get("labels") or {}
    if re.search(r"\.ffn(\.svc(\..*)?)?$", host) and labels.get("ffn/runs") != "allowed":
        yield warning(
            f"Namespace {name}",
            f"has no label ffn/runs=allowed: the network rules of {host} let none of its steps in",
            f"kubectl label namespace {name} ffn/runs=allowed",
        )


def account_there(found: Json | None, name: str, namespace: str) -> Finding:
    """Of the account that the pods of a run have."""
    what = f"ServiceAccount {name} in {namespace}"
    if found is None:
        return failed(
            what, "is not there", f"kubectl -n {namespace} apply -f k8s/runs/account.yaml, or name another in FFN_SERVICE_ACCOUNT"
        )
    return ok(what)


def named(settings: Settings) -> Iterator[Finding]:
    """What settings say by themselves."""
    if not settings.pinned:
        yield warning("Image", f"{settings.image} is a tag, which may move", "export FFN_IMAGE=...@sha256:...")
    if not settings.environment.get("MLFLOW_TRACKING_URI"):
        yield failed(
            "MLflow", "is not named: every step would keep its run to itself", "export MLFLOW_TRACKING_URI=http://mlflow.ffn:5000"
        )
    for variable, limit, least in (
        ("FFN_LIGHT_CPU", settings.light_cpu, placement.LIGHT_REQUEST["cpu"]),
        ("FFN_LIGHT_MEMORY", settings.light_memory, placement.LIGHT_REQUEST["memory"]),
    ):
        if amount(limit) < amount(least):
            said = f"{limit} is below the {least} that light steps do well with"
            yield warning(variable, said, f"export {variable}={least} or more")
    if amount(settings.shm) >= amount(settings.memory):
        yield warning(
            "FFN_SHM", f"{settings.shm} counts as memory, of which a heavy step has {settings.memory}", "export FFN_SHM=8Gi"
        )
    if trouble := placement.unkept(settings):
        yield failed("FFN_CHECKPOINTS", f"is {settings.checkpoints or 'not set'}", trouble)


def secret(found: Json | None, *, name: str, namespace: str, keys: Sequence[str]) -> Finding:
    """Of a Secret that steps take variables from."""
    what = f"Secret {name} in {namespace}"
    if found is None:
        values = " ".join(f"--from-literal={key}=..." for key in keys)
        return failed(what, "is not there", f"kubectl -n {namespace} create secret generic {name} {values}")
    data = found.get("data") or {}
    if missing := [key for key in keys if not data.get(key)]:
        patch = json.dumps({"stringData": dict.fromkeys(missing, "...")})
        return failed(
            what, f"lacks {' and '.join(missing)}", f"kubectl -n {namespace} patch secret {name} --type merge -p '{patch}'"
        )
    return ok(what)


def pull_secret(found: Json | None, *, name: str, namespace: str) -> Finding:
    """Of the Secret that the image is pulled with."""
    what = f"Secret {name} in {namespace}"
    made = f"kubectl -n {namespace} create secret docker-registry {name} --docker-server=... --docker-username=..."
    if found is None:
        return failed(what, "is not there", made)
    kind = found.get("type", "")
    if kind not in PULL_KEYS:
        return failed(
            what, f"is of type {kind}, no Secret to pull images with", f"kubectl -n {namespace} delete secret {name}; {made}"
        )
    if not (found.get("data") or {}).get(PULL_KEYS[kind]):
        return failed(what, f"lacks {PULL_KEYS[kind]}", f"kubectl -n {namespace} delete secret {name}; {made}")
    return ok(what)


def authorities(found: Json | None, *, name: str, namespace: str) -> Finding:
    """Of the ConfigMap with the authorities that MLflow and the store are trusted by."""
    what = f"ConfigMap {name} in {namespace}"
    if not ((found or {}).get("data") or {}).get("ca.crt"):
        made = f"kubectl -n {namespace} create configmap {name} --from-file=ca.crt"
        return failed(what, "is not there", made) if found is None else failed(what, "lacks ca.crt", f"delete it, then {made}")
    return ok(what)


def claim(found: Json | None, *, name: str, namespace: str, variable: str, binding: str) -> Finding:
    """Of a volume claim; `binding` is the volumeBindingMode of its class, empty where there is none."""
    what = f"PersistentVolumeClaim {name} in {namespace}"
    if found is None:
        return failed(what, "is not there", f"make it (k8s/components/volume), or name another in {variable}")
    phase, modes = found.get("status", {}).get("phase", ""), found.get("spec", {}).get("accessModes") or []
    if found["metadata"].get("deletionTimestamp"):
        return failed(what, "is being deleted", "wait until it is gone, then make it again")
    if phase == "Lost":
        return failed(
            what,
            "has lost its volume, and what was on it",
            f"delete it (kubectl -n {namespace} delete pvc {name}) and make it again",
        )
    if phase != "Bound" and binding != "WaitForFirstConsumer":
        looks = f"kubectl -n {namespace} describe pvc {name}; kubectl get storageclass,pv"
        return failed(what, "is Pending: no volume is bound to it", looks)
    return ok(what, f"is {phase}, {', '.join(modes)}" + ("" if phase == "Bound" else ", bound by the first pod that mounts it"))


def shared(found: Json, *, namespace: str, nodes: int | None) -> Iterator[Finding]:
    """Of the claim that several trainings write to at once; `nodes` take pods, None where we may not see them."""
    modes = found.get("spec", {}).get("accessModes") or []
    if "ReadWriteMany" in modes or (nodes == 1 and "ReadWriteOnce" in modes):
        return
    what = f"PersistentVolumeClaim {found['metadata']['name']} in {namespace}"
    said, remedy = (
        f"is {', '.join(modes)}, and written to by several trainings at once",
        "name a claim with accessModes [ReadWriteMany]",
    )
    if nodes is None:
        yield warning(what, f"{said}: how many nodes there are we may not see", remedy)
    else:
        yield failed(what, f"{said}, on {nodes} nodes", remedy)
