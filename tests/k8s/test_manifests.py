"""Every overlay: valid for three Kubernetes versions, and the facts that no schema knows."""

import itertools
import json
import re
import shutil
import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from pipeline.clusterfile import read
from pipeline.placement import MLFLOW_KEYS, S3_KEYS
from tests.k8s.conftest import K8S, OVERLAYS, ROOT, Objects, changed, containers, env_file, named, overlay, pod, render, with_volume

KUBERNETES = ("1.31", "1.34", "1.37")
RUNS = {"dev": "kubeflow", "prod": "kubeflow", "profile": "team-a"}
"""Overlay -> the namespace where its runs live."""
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_valid(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    distinct = {json.dumps(item): item for item in (*itertools.chain(*map(overlay, OVERLAYS)), *with_volume())}
    for item in distinct.values():
        assert validate(item, version, strict=True) == version


def test_what_overlays_hold() -> None:
    kinds = {name: {(item["kind"], item["metadata"]["name"]) for item in overlay(name)} for name in OVERLAYS}
    assert kinds.keys() == RUNS.keys()
    assert all({("Deployment", "mlflow"), ("ServiceAccount", "ffn-pipeline")} <= of for of in kinds.values())
    assert {("StatefulSet", "postgres"), ("Deployment", "s3")} <= kinds["dev"]
    assert ("Deployment", "serving") in kinds["prod"]
    assert ("StatefulSet", "postgres") not in kinds["prod"]
    assert kinds["profile"] - kinds["prod"] == {("ResourceQuota", "ffn-runs")}
    assert not kinds["prod"] - kinds["profile"]


# A good tenant


def test_runs_live_in_one_namespace_that_one_line_names(tmp_path: Path) -> None:
    for name, space in RUNS.items():
        objects = overlay(name)
        assert {item["metadata"].get("namespace") for item in objects} == {"ffn", space, None}
        moved = render(changed(tmp_path / name, name, f"namespace: {space}}}", "namespace: elsewhere}"))
        as_before = [json.loads(json.dumps(item).replace('"elsewhere"', f'"{space}"')) for item in moved]
        assert sorted(map(json.dumps, as_before)) == sorted(map(json.dumps, objects))
        # What still says `kubeflow` says where KFP is, to steps that call it.
        assert '"namespace": "kubeflow"' not in json.dumps(moved)
        assert "team-a" not in json.dumps(moved)


def test_nothing_of_anyone_elses_is_changed() -> None:
    """Where others run beside us nothing counts, limits or selects what is not ours."""
    ours = {"ServiceAccount", "Role", "RoleBinding", "NetworkPolicy"}
    for objects in (overlay("dev"), overlay("prod"), with_volume()):
        assert [item["metadata"]["name"] for item in objects if item["kind"] == "Namespace"] == ["ffn"]
        there = [item for item in objects if item["metadata"].get("namespace") == "kubeflow"]
        assert {item["kind"] for item in there} <= ours | {"PersistentVolumeClaim", "Job"}
        assert all(item["metadata"]["name"].startswith("ffn-") for item in there)
        policies = [item["spec"] for item in there if item["kind"] == "NetworkPolicy"]
        assert not any(selects(spec["podSelector"], labels) for spec in policies for labels in (OTHER, DRIVER, {}, KFP["api"][1]))
        assert all(selects(spec["podSelector"], step("ingest")) for spec in policies if "egress" in spec)


def test_the_quota_is_where_the_namespace_is_ours_alone() -> None:
    (quota,) = [
        item for item in overlay("profile") if item["kind"] == "ResourceQuota" and item["metadata"]["namespace"] == "team-a"
    ]
    assert quota["spec"]["hard"]["requests.nvidia.com/gpu"] == "16"
    # Argo's containers ask for no cores: a quota on them would refuse every step.
    assert not {"cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"} & set(quota["spec"]["hard"])
    assert quota["metadata"]["name"] != "kf-resource-quota", "that one is the profile's, whose controller changes it back"


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
    assert enforced == {"ffn": "restricted"}
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
        if item["kind"] in ("Deployment", "StatefulSet"):
            for container in made[1]["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), container["name"]


def test_mlflows_servers_are_told_to_end() -> None:
    """As the first process of a container `mlflow` ignores SIGTERM, and the pod would be killed after its whole grace."""
    made = [pod(item) for item in overlay("prod")]
    servers = [container for _, spec in filter(None, made) for container in spec["containers"] if container.get("livenessProbe")]
    assert len(servers) == 2
    for container in servers:
        assert container["lifecycle"]["preStop"]["exec"]["command"][-1].endswith("; kill -s TERM -- -1"), container["name"]


def test_production_runs_images_by_digest() -> None:
    for name in ("prod", "profile"):
        images = {container["image"] for item in overlay(name) if (made := pod(item)) for container in containers(made[1])}
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
    assert {"apiGroups": ["argoproj.io"], "resources": ["workflows"], "verbs": ["list"]} in rules


def test_the_follower_may_change_what_is_served() -> None:
    """As it is sent: kustomize rewrites names that it takes for a generated ConfigMap's."""
    objects = overlay("prod")
    served = named(objects, "Deployment", "serving")
    (rule,) = named(objects, "Role", "serving-follow")["rules"]
    assert rule["apiGroups"] == [served["apiVersion"].split("/")[0]]
    assert rule["resources"] == ["deployments"]
    assert rule["resourceNames"] == [served["metadata"]["name"]]
    job = named(objects, "CronJob", "serving-follow")
    (container,) = containers(pod(job)[1])
    assert container["args"][1] == "/apis/apps/v1/namespaces/ffn/deployments/" + rule["resourceNames"][0]
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
    dev, prod = overlay("dev"), overlay("prod")
    mlflow = ("ffn", {"app.kubernetes.io/name": "mlflow"})
    postgres, s3 = (("ffn", {"app.kubernetes.io/name": name}) for name in ("postgres", "s3"))
    for name, space in RUNS.items():
        objects = overlay(name)
        assert reaches(objects, (space, step("train")), mlflow, 5000)
        assert not reaches(objects, ("default", step("train")), mlflow, 5000), "a namespace without the label"
        for labels in (OTHER, DRIVER, {"app": "ml-pipeline"}):
            assert not reaches(objects, (space, labels), mlflow, 5000)
    assert reaches(dev, mlflow, postgres, 5432)
    assert reaches(dev, mlflow, s3, 9000)
    assert reaches(dev, ("kubeflow", step("train")), s3, 9000)
    assert not reaches(dev, ("kubeflow", OTHER), s3, 9000)
    assert not reaches(dev, ("kubeflow", step("train")), postgres, 5432)
    for kind, name in (("Deployment", "serving"), ("CronJob", "serving-follow")):
        assert reaches(prod, ("ffn", pod(named(prod, kind, name))[0]), mlflow, 5000)


def test_steps_reach_what_they_need_and_no_more(tmp_path: Path) -> None:
    for name, space in RUNS.items():
        objects = overlay(name)
        for component in ("begin", "ingest", "train", "evaluate", "register", "promote", "finish", "check"):
            here = (space, step(component))
            assert reaches(objects, here, ("kube-system", {}), 53)
            assert reaches(objects, here, KFP["store"], 8333)
            assert reaches(objects, here, KFP["metadata"], 8080)
            for target, port in (
                (KFP["api"], 8887),
                (KFP["api"], 8888),
                (KFP["store"], 9333),
                (KFP["database"], 3306),
                ((space, OTHER), 8080),
            ):
                assert not reaches(objects, here, target, port), (target, port)
            assert not reaches(objects, (space, OTHER), here, 8080)
        here = (space, step("train"))
        assert not outside(objects, here, "203.0.113.7", 80)
        assert outside(objects, here, "203.0.113.7", 6443) == (name == "dev")
        assert outside(objects, here, "203.0.113.7", 443)  # dev: the API may be anywhere; the others: the object store is outside
    named_api = render(
        changed(tmp_path, "prod", "cidr: 192.0.2.1/32}}]", "cidr: 198.51.100.4/32}}, {ipBlock: {cidr: 198.51.100.5/32}}]")
    )
    assert outside(named_api, ("kubeflow", step("train")), "198.51.100.5", 6443)
    assert not outside(named_api, ("kubeflow", step("train")), "198.51.100.6", 6443)


def test_secrets_are_named_and_never_kept(objects: Objects, tmp_path: Path) -> None:
    assert not [item for item in objects if item["kind"] == "Secret"]
    folder = shutil.copytree(K8S / "secrets", tmp_path / "secrets")
    for example in folder.rglob("*.env.example"):
        example.rename(example.with_suffix(""))
    made = render(folder)
    keys = {(item["metadata"]["namespace"], item["metadata"]["name"]): set(item["data"]) for item in made}
    assert {space for space, _ in keys} == {"ffn"}
    # The steps' go where `kubectl -n` says, and are what a compiled pipeline takes from them.
    steps = {item["metadata"]["name"]: item for item in render(folder / "steps")}
    assert not any("namespace" in item["metadata"] for item in steps.values())
    assert {name: set(item["data"]) for name, item in steps.items()} == {"ffn-mlflow": set(MLFLOW_KEYS), "ffn-s3": set(S3_KEYS)}
    wanted = [(item["metadata"]["namespace"], container) for item in objects if (p := pod(item)) for container in containers(p[1])]
    for space, container in wanted:
        for source in container.get("envFrom", []):
            if "secretRef" in source:
                assert (space, source["secretRef"]["name"]) in keys
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in keys[space, reference["name"]]


def test_secrets_name_the_services_of_the_cluster() -> None:
    dev = overlay("dev")
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
    service = named(overlay("dev"), "Service", "mlflow")
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

LABELLED = {"kubeflow", "team-a"}
"""Namespaces that were given the label ffn/runs=allowed."""

KFP: dict[str, Place] = {
    "api": ("kubeflow", {"app": "ml-pipeline"}),
    "metadata": ("kubeflow", {"component": "metadata-grpc-server"}),
    "store": ("kubeflow", {"app": "seaweedfs"}),
    "database": ("kubeflow", {"app": "mysql"}),
}
"""Its pods, as manifests/kustomize of KFP 2.17.0 label them."""

DRIVER = {
    "workflows.argoproj.io/workflow": "ffn-1", "workflows.argoproj.io/completed": "false",
    "pipeline/runid": "1", "pipelines.kubeflow.org/v2_component": "true",
}  # fmt: skip
"""What KFP and Argo put on every pod of a run, the drivers' too.

Source: KFP 2.17.0, backend/src/v2/compiler/argocompiler/argo.go:165, backend/src/apiserver/template/v2_template.go:420; Argo 4.0.5,
workflow/controller/workflowpod.go.
"""

OTHER = {**DRIVER, "workflows.argoproj.io/workflow": "another-team-1", "app.kubernetes.io/part-of": "theirs"}
"""A step of another team's."""


def step(component: str) -> dict[str, str]:
    """Labels of a step's pod: pipeline/placement.py."""
    return {**DRIVER, "app.kubernetes.io/part-of": "ffn", "app.kubernetes.io/component": component}


def outside(objects: Objects, source: Place, address: str, port: int) -> bool:
    """Whether the policies let pods at `source` open connections to an address outside of the cluster."""
    return _allowed(objects, source, (address, {}), port, "egress")


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
        return other[0][0].isdigit() and ip_address(other[0]) in ip_network(peer["ipBlock"]["cidr"])
    space = {"kubernetes.io/metadata.name": other[0], **({"ffn/runs": "allowed"} if other[0] in LABELLED else {})}
    same = selects(peer["namespaceSelector"], space) if "namespaceSelector" in peer else own[0] == other[0]
    return same and selects(peer.get("podSelector", {}), other[1])


def test_the_checkpoints_are_proven_writable_for_what_the_steps_are() -> None:
    """A volume is handed over by a pod with fsGroup, and proven by one that has none, as the steps have none."""
    users = set(re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    securities = {
        item["metadata"]["name"]: made[1]["securityContext"]
        for item in with_volume()
        if item["kind"] == "Job" and (made := pod(item))
    }
    assert set(securities) == {"ffn-checkpoints", "ffn-checkpoints-writable"}
    for security in securities.values():
        assert {(str(security["runAsUser"]), str(security["runAsGroup"]))} == users
    assert str(securities["ffn-checkpoints"]["fsGroup"]) == next(iter(users))[1]
    assert not {"fsGroup", "supplementalGroups"} & set(securities["ffn-checkpoints-writable"])


def test_the_proof_fails_where_nothing_can_be_written(tmp_path: Path) -> None:
    (container,) = pod(named(with_volume(), "Job", "ffn-checkpoints-writable"))[1]["containers"]
    writable = tmp_path / "writable"
    writable.mkdir()

    def proven(folder: Path) -> "subprocess.CompletedProcess[str]":
        command = [word.replace("/mnt/checkpoints", str(folder)).replace("seq 600", "seq 1") for word in container["command"]]
        return subprocess.run(command, capture_output=True, text=True)

    assert (proven(writable).returncode, list(writable.iterdir())) == (0, [])
    refused = proven(tmp_path / "missing")
    assert refused.returncode != 0
    assert "cannot write to ffn-checkpoints" in refused.stderr
