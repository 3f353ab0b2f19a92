"""Every overlay: valid for three Kubernetes versions, and the facts that no schema knows."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.clusterfile import read
from tests.k8s.conftest import K8S, OVERLAYS, ROOT, Objects, containers, env_file, named, pod, render

KUBERNETES = ("1.31", "1.34", "1.37")
CUSTOM = {"InferenceService"}
"""Kinds that Kubernetes has no schema of."""
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_valid(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    distinct = {
        json.dumps(item): item for name in OVERLAYS for item in render(K8S / "overlays" / name) if item["kind"] not in CUSTOM
    }
    for item in distinct.values():
        assert validate(item, version, strict=True) == version


def test_what_overlays_hold() -> None:
    kinds = {name: {(item["kind"], item["metadata"]["name"]) for item in render(K8S / "overlays" / name)} for name in OVERLAYS}
    everywhere = {("Deployment", "mlflow"), ("PersistentVolumeClaim", "ffn-checkpoints"), ("ServiceAccount", "ffn-pipeline")}
    assert all(everywhere <= of for of in kinds.values())
    assert {("StatefulSet", "postgres"), ("Deployment", "s3")} <= kinds["dev"]
    assert {("Deployment", "serving"), ("ResourceQuota", "ffn-gpus")} <= kinds["prod"]
    assert ("StatefulSet", "postgres") not in kinds["prod"]
    assert ("InferenceService", "serving") in kinds["kserve"]
    assert ("Deployment", "serving") not in kinds["kserve"]
    # An API server without the operators of others takes these.
    assert not CUSTOM & {kind for name in ("dev", "prod") for kind, _ in kinds[name]}


def test_pods_pass_the_restricted_security_standard(objects: Objects) -> None:
    found = [(item, made[1]) for item in objects if (made := pod(item))]
    assert len(found) >= 3
    for item, spec in found:
        name = item["metadata"]["name"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"} <= RESTRICTED_VOLUMES, name
        for container in containers(spec):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert own["readOnlyRootFilesystem"] is True, name
            assert not own.get("privileged"), name
            assert not any("hostPort" in port for port in container.get("ports", [])), name


def test_namespaces_enforce_a_security_standard(objects: Objects) -> None:
    enforced = {
        item["metadata"]["name"]: item["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for item in objects if item["kind"] == "Namespace"
    }  # fmt: skip
    assert enforced == {"ffn": "restricted", "kubeflow": "baseline"}
    assert {item["metadata"].get("namespace") for item in objects} <= {"ffn", "kubeflow", None}
    assert {item["kind"] for item in objects if not item["metadata"].get("namespace")} == {"Namespace"}


def test_containers_are_bounded_and_probed(objects: Objects) -> None:
    for item in objects:
        if not (made := pod(item)):
            continue
        for container in containers(made[1]):
            for what in ("requests", "limits"):
                assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][what]), container["name"]
            image = container["image"]
            assert re.search(r"(:\d|:dev$|@sha256:[0-9a-f]{64}$)", image), image
        if item["kind"] in ("Deployment", "StatefulSet", "InferenceService"):
            for container in made[1]["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), container["name"]


def test_mlflows_servers_are_told_to_end() -> None:
    """As the first process of a container `mlflow` ignores SIGTERM, and the pod would be killed after its whole grace."""
    for overlay in ("prod", "kserve"):
        made = [pod(item) for item in render(K8S / "overlays" / overlay)]
        servers = [
            container for _, spec in filter(None, made) for container in spec["containers"] if container.get("livenessProbe")
        ]
        assert len(servers) == 2
        for container in servers:
            assert container["lifecycle"]["preStop"]["exec"]["command"][-1].endswith("; kill -s TERM -- -1"), container["name"]


def test_production_runs_images_by_digest() -> None:
    for overlay in ("prod", "kserve"):
        images = {
            container["image"]
            for item in render(K8S / "overlays" / overlay)
            if (made := pod(item))
            for container in containers(made[1])
        }
        assert len(images) == 1
        assert all("@sha256:" in image for image in images)


def test_roles_name_what_they_allow(objects: Objects) -> None:
    roles = [item for item in objects if item["kind"] in ("Role", "ClusterRole")]
    assert roles
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], role["metadata"]["name"]
            if "secrets" in rule["resources"]:
                assert rule["resourceNames"], role["metadata"]["name"]
                assert rule["verbs"] == ["get"], role["metadata"]["name"]
    bound = {(item["roleRef"]["kind"], item["roleRef"]["name"]) for item in objects if item["kind"].endswith("Binding")}
    assert bound == {(item["kind"], item["metadata"]["name"]) for item in roles}
    accounts = {(item["metadata"]["namespace"], item["metadata"]["name"]) for item in objects if item["kind"] == "ServiceAccount"}
    for item in objects:
        for subject in item.get("subjects", []):
            assert (subject.get("namespace"), subject["name"]) in accounts
        if made := pod(item):
            assert (item["metadata"]["namespace"], made[1]["serviceAccountName"]) in accounts


def test_a_step_may_ask_which_runs_go_on(objects: Objects) -> None:
    rules = named(objects, "Role", "ffn-pipeline")["rules"]
    assert {"apiGroups": ["argoproj.io"], "resources": ["workflows"], "verbs": ["get", "list"]} in rules


@pytest.mark.parametrize(
    ("overlay", "kind", "path"),
    [
        ("prod", "Deployment", "/apis/apps/v1/namespaces/ffn/deployments/"),
        ("kserve", "InferenceService", "/apis/serving.kserve.io/v1beta1/namespaces/ffn/inferenceservices/"),
    ],
)
def test_the_follower_may_change_what_is_served(overlay: str, kind: str, path: str) -> None:
    """As it is sent: kustomize rewrites names that it takes for a generated ConfigMap's."""
    objects = render(K8S / "overlays" / overlay)
    served = named(objects, kind, "serving")
    (rule,) = named(objects, "Role", "serving-follow")["rules"]
    assert rule["apiGroups"] == [served["apiVersion"].split("/")[0]]
    assert rule["resources"] == [f"{kind.lower()}s"]
    assert rule["resourceNames"] == [served["metadata"]["name"]]
    job = named(objects, "CronJob", "serving-follow")
    (container,) = containers(pod(job)[1])
    assert container["args"][1] == path + rule["resourceNames"][0]
    # Where policies are enforced a second after a pod's start, its first question gets no answer.
    assert (job["spec"]["jobTemplate"]["spec"]["backoffLimit"], pod(job)[1]["restartPolicy"]) == (3, "OnFailure")


def test_only_who_asks_the_cluster_gets_its_token(objects: Objects) -> None:
    mounted = {
        item["metadata"]["name"] for item in objects if (made := pod(item)) and made[1].get("automountServiceAccountToken", True)
    }
    assert mounted <= {"serving-follow"}


def test_selectors_find_their_pods(objects: Objects) -> None:
    pods = [(item["metadata"]["namespace"], *made) for item in objects if (made := pod(item))]
    selecting = [item for item in objects if item["kind"] in ("Service", "PodDisruptionBudget", "Deployment", "StatefulSet")]
    for item in selecting:
        selector = item["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        chosen = [
            spec for space, labels, spec in pods if space == item["metadata"]["namespace"] and wanted.items() <= labels.items()
        ]
        assert len(chosen) == 1, item["metadata"]["name"]
        if item["kind"] == "Service":
            offered = {port.get("name") for container in chosen[0]["containers"] for port in container.get("ports", [])}
            assert {port["targetPort"] for port in item["spec"]["ports"]} <= offered
    for item in objects:
        if item["kind"] == "StatefulSet":
            assert named(objects, "Service", item["spec"]["serviceName"])


def test_every_pod_may_speak_only_where_a_policy_says_so(objects: Objects) -> None:
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    for item in objects:
        if not (made := pod(item)):
            continue
        space = item["metadata"]["namespace"]
        ours = [
            policy["spec"] for policy in policies
            if policy["metadata"]["namespace"] == space and selects(policy["spec"]["podSelector"], made[0])
        ]  # fmt: skip
        assert {kind for spec in ours for kind in spec["policyTypes"]} == {"Ingress", "Egress"}, item["metadata"]["name"]


def test_who_may_reach_whom() -> None:
    dev, prod = render(K8S / "overlays" / "dev"), render(K8S / "overlays" / "prod")
    step = {"workflows.argoproj.io/workflow": "run-1", "app.kubernetes.io/part-of": "ffn"}
    mlflow = ("ffn", {"app.kubernetes.io/name": "mlflow"})
    for objects in (dev, prod):
        assert reaches(objects, ("kubeflow", step), mlflow, 5000)
        assert not reaches(objects, ("default", step), mlflow, 5000)
        assert not reaches(objects, ("kubeflow", {"app": "ml-pipeline"}), mlflow, 5000)
    assert reaches(dev, mlflow, ("ffn", {"app.kubernetes.io/name": "postgres"}), 5432)
    assert reaches(dev, mlflow, ("ffn", {"app.kubernetes.io/name": "s3"}), 9000)
    assert reaches(dev, ("kubeflow", step), ("ffn", {"app.kubernetes.io/name": "s3"}), 9000)
    assert not reaches(dev, ("kubeflow", step), ("ffn", {"app.kubernetes.io/name": "postgres"}), 5432)
    for name in ("serving", "serving-follow"):
        assert reaches(prod, ("ffn", pod(named(prod, "Deployment" if name == "serving" else "CronJob", name))[0]), mlflow, 5000)


def test_secrets_are_named_and_never_kept(objects: Objects, tmp_path: Path) -> None:
    assert not [item for item in objects if item["kind"] == "Secret"]
    folder = shutil.copytree(K8S / "secrets", tmp_path / "secrets")
    for example in folder.glob("*.env.example"):
        example.rename(example.with_suffix(""))
    made = render(folder)
    keys = {(item["metadata"]["namespace"], item["metadata"]["name"]): set(item["data"]) for item in made}
    wanted = [(item["metadata"]["namespace"], container) for item in objects if (p := pod(item)) for container in containers(p[1])]
    for space, container in wanted:
        for source in container.get("envFrom", []):
            if "secretRef" in source:
                assert (space, source["secretRef"]["name"]) in keys
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in keys[space, reference["name"]]


def test_secrets_name_the_services_of_the_cluster() -> None:
    dev = render(K8S / "overlays" / "dev")
    port = {name: named(dev, "Service", name)["spec"]["ports"][0]["port"] for name in ("postgres", "s3")}
    database, store = (env_file(K8S / "secrets" / f"{name}.env.example") for name in ("database", "s3"))
    assert (database["PGHOST"], database["PGPORT"]) == ("postgres", str(port["postgres"]))
    # With the namespace: links that MLflow signs lead steps in another one here.
    assert store["MLFLOW_S3_ENDPOINT_URL"] == f"http://s3.ffn:{port['s3']}"


def test_config_maps_are_there(objects: Objects) -> None:
    there = {(item["metadata"]["namespace"], item["metadata"]["name"]) for item in objects if item["kind"] == "ConfigMap"}
    wanted = set()
    for item in objects:
        if made := pod(item):
            space = item["metadata"]["namespace"]
            wanted |= {(space, volume["configMap"]["name"]) for volume in made[1].get("volumes", []) if "configMap" in volume}
            sources = [source for container in containers(made[1]) for source in container.get("envFrom", [])]
            wanted |= {(space, source["configMapRef"]["name"]) for source in sources if "configMapRef" in source}
    assert wanted == there


def test_claims_are_there(objects: Objects) -> None:
    there = {
        (item["metadata"]["namespace"], item["metadata"]["name"]) for item in objects if item["kind"] == "PersistentVolumeClaim"
    }
    used = {
        (item["metadata"]["namespace"], volume["persistentVolumeClaim"]["claimName"])
        for item in objects if (made := pod(item)) for volume in made[1].get("volumes", []) if "persistentVolumeClaim" in volume
    }  # fmt: skip
    assert used == there


def test_pods_fit_the_quota(objects: Objects) -> None:
    hard = named(objects, "ResourceQuota", "ffn")["spec"]["hard"]
    asked = 0.0
    for item in objects:
        if (made := pod(item)) and item["metadata"]["namespace"] == "ffn":
            replicas = item["spec"].get("replicas", made[1].get("maxReplicas", 1))
            asked += replicas * max(
                sum(cores(container["resources"]["requests"]["cpu"]) for container in made[1]["containers"]),
                *(cores(container["resources"]["requests"]["cpu"]) for container in containers(made[1])),
            )
    assert 0 < asked <= cores(hard["requests.cpu"])


def test_kfp_is_installed_in_the_version_that_compiles_and_its_steps_know_mlflow() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    versions = set(re.findall(r"\?ref=([\w.]+)\"", page))
    (pin,) = re.findall(r"^kfp==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert versions == {pin}
    uri = read(ROOT / "cluster" / "example.yaml")["mlflow.uri"]
    service = named(render(K8S / "overlays" / "dev"), "Service", "mlflow")
    assert uri == f"http://mlflow.{service['metadata']['namespace']}:{service['spec']['ports'][0]['port']}"
    hosts = env_file(K8S / "base" / "mlflow.env")["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert uri.removeprefix("http://") in hosts


def cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector chooses what carries `labels`."""
    for rule in selector.get("matchExpressions", []):
        known = rule["key"] in labels
        if rule["operator"] == "Exists" and not known:
            return False
        if rule["operator"] == "In" and labels.get(rule["key"]) not in rule["values"]:
            return False
        assert rule["operator"] in ("Exists", "In")
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


Place = tuple[str, dict[str, str]]
"""Namespace and labels of a pod."""


def reaches(objects: Objects, source: Place, target: Place, port: int) -> bool:
    """Whether the policies let pods at `source` open connections to `target`, as Kubernetes decides it."""
    return _allowed(objects, source, target, port, "egress") and _allowed(objects, target, source, port, "ingress")


def _allowed(objects: Objects, own: Place, other: Place, port: int, direction: str) -> bool:
    here = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy" and item["metadata"]["namespace"] == own[0]]
    policies = [spec for spec in here if selects(spec["podSelector"], own[1]) and direction.capitalize() in spec["policyTypes"]]
    if not policies:
        return True
    for rule in (rule for spec in policies for rule in spec.get(direction, [])):
        ports = {entry["port"] for entry in rule.get("ports", [])}
        peers = rule["to" if direction == "egress" else "from"]
        if (not ports or port in ports) and any(_peer(peer, own, other) for peer in peers):
            return True
    return False


def _peer(peer: dict[str, Any], own: Place, other: Place) -> bool:
    if "ipBlock" in peer:
        return False
    space = {"kubernetes.io/metadata.name": other[0]}
    same = selects(peer["namespaceSelector"], space) if "namespaceSelector" in peer else own[0] == other[0]
    return same and selects(peer.get("podSelector", {}), other[1])


def test_the_checkpoints_are_proven_writable_for_what_the_steps_are() -> None:
    """A volume is handed over by a pod with fsGroup, and proven by one that has none, as the steps have none."""
    users = set(re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    objects = render(K8S / "overlays" / "prod")
    securities = {
        item["metadata"]["name"]: made[1]["securityContext"]
        for item in objects
        if (made := pod(item)) and any("persistentVolumeClaim" in volume for volume in made[1].get("volumes", []))
    }
    assert set(securities) == {"ffn-checkpoints", "ffn-checkpoints-writable"}
    for security in securities.values():
        assert {(str(security["runAsUser"]), str(security["runAsGroup"]))} == users
    assert str(securities["ffn-checkpoints"]["fsGroup"]) == next(iter(users))[1]
    assert not {"fsGroup", "supplementalGroups"} & set(securities["ffn-checkpoints-writable"])


def test_the_proof_fails_where_nothing_can_be_written(tmp_path: Path) -> None:
    (container,) = pod(named(render(K8S / "overlays" / "prod"), "Job", "ffn-checkpoints-writable"))[1]["containers"]
    writable = tmp_path / "writable"
    writable.mkdir()

    def proven(folder: Path) -> "subprocess.CompletedProcess[str]":
        command = [word.replace("/mnt/checkpoints", str(folder)).replace("seq 600", "seq 1") for word in container["command"]]
        return subprocess.run(command, capture_output=True, text=True)

    assert (proven(writable).returncode, list(writable.iterdir())) == (0, [])
    refused = proven(tmp_path / "missing")
    assert refused.returncode != 0
    assert "cannot write to ffn-checkpoints" in refused.stderr
