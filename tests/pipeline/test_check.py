"""What `ffn cluster check` judges: pure functions of what the APIs say, in their own JSON, and the asking of a fake one."""

import json
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient, CoreV1Api, VersionApi

from components import cluster as in_cluster
from components import kube
from components.kube import Absent, Denied, Rejected
from ffn.errors import Fault, FFNError
from pipeline import health, probe
from pipeline.check import argo, examine, names, pods, resources
from pipeline.check.finding import Finding, State
from pipeline.check.rights import NEEDED, RIGHTS, TOO_MUCH, Right, rights
from pipeline.cli import main
from pipeline.placement import MLFLOW_KEYS
from pipeline.probe import End, Outcome
from pipeline.server import Endpoint, Server
from pipeline.settings import Settings, Toleration
from tests.pipeline import test_compile
from tests.pipeline.kfp_server import FakeKFP, serving
from tests.pipeline.kubernetes_api import FakeKubernetes, denied, kubernetes, status

Json = dict[str, Any]

IMAGE = "registry.example/ffn@sha256:" + "0" * 64
SETTINGS = Settings(
    image=IMAGE, gpus=0, cpu="4", memory="8Gi", shm="1Gi", environment={"MLFLOW_TRACKING_URI": "http://mlflow.ffn:5000"},
    checkpoints="/mnt/checkpoints", checkpoints_claim="ffn-checkpoints",
)  # fmt: skip
ROOT = Path(__file__).parents[2]


def state(finding: Finding) -> str:
    return finding.state.value


def node(
    name: str, *, cpu: str = "8", memory: str = "32Gi", gpus: str = "", labels: Json | None = None,
    taints: list[Json] | None = None, ready: str = "True", cordoned: bool = False,
) -> Json:  # fmt: skip
    allocatable = {"cpu": cpu, "memory": memory, "pods": "110"} | ({"nvidia.com/gpu": gpus} if gpus else {})
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": taints or []} | ({"unschedulable": True} if cordoned else {}),
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": ready}]},
    }


# One line


def test_a_line_says_what_is_wrong_and_what_to_do() -> None:
    found = names.secret({"data": {"MLFLOW_TRACKING_USERNAME": "dQ=="}}, name="ffn-mlflow", namespace="kubeflow", keys=MLFLOW_KEYS)
    assert found.line == (
        "FAILED  Secret ffn-mlflow in kubeflow lacks MLFLOW_TRACKING_PASSWORD: kubectl -n kubeflow patch secret ffn-mlflow "
        """--type merge -p '{"stringData": {"MLFLOW_TRACKING_PASSWORD": "..."}}'"""
    )
    assert names.kubernetes_version({"gitVersion": "v1.34.4+k3s1"}).line == "ok      Kubernetes 1.34.4+k3s1"


# Versions and names


@pytest.mark.parametrize(("said", "expected"), [("v1.30.9", "warning"), ("v1.31.0", "ok"), ("v1.34.4-gke.1", "ok"), ("", "ok")])
def test_kubernetes(said: str, expected: str) -> None:
    assert state(names.kubernetes_version({"gitVersion": said})) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("2.17.0", "ok"),
        ("2.17.3", "ok"),
        ("2.15.0", "warning"),
        ("2.18.0", "warning"),
        ("2.13.0", "FAILED"),
        ("unknown", "warning"),
    ],
)
def test_kfp(said: str, expected: str) -> None:
    assert state(names.kfp_version({"tag_name": said, "commit_sha": "4a3592c", "multi_user": False}, "http://kfp")) == expected


def test_a_profile_must_be_named_where_there_are_profiles() -> None:
    assert not list(names.profile({"multi_user": True}, "team"))
    assert not list(names.profile({"multi_user": False}, ""))
    assert "FFN_KFP_NAMESPACE" in next(names.profile({"multi_user": True}, "")).remedy


def test_names_that_are_there_and_not() -> None:
    assert state(names.namespace_there(None, "x")) == "FAILED"
    assert state(names.namespace_there({"status": {"phase": "Terminating"}}, "x")) == "FAILED"
    assert state(names.namespace_there({"status": {"phase": "Active"}}, "x")) == "ok"
    assert state(names.account_there(None, "ffn-pipeline", "x")) == "FAILED"
    absent = names.secret(None, name="s", namespace="x", keys=("A", "B"))
    assert "create secret generic s --from-literal=A=... --from-literal=B=..." in absent.remedy
    assert state(names.secret({"data": {"A": "eA=="}}, name="s", namespace="x", keys=("A",))) == "ok"
    assert "lacks A and B" in names.secret({"data": {"A": ""}}, name="s", namespace="x", keys=("A", "B")).line
    assert state(names.authorities({"data": {"ca.crt": "-----BEGIN"}}, name="c", namespace="x")) == "ok"
    assert "lacks ca.crt" in names.authorities({"data": {"ca.pem": "-----BEGIN"}}, name="c", namespace="x").line
    assert "is not there" in names.authorities(None, name="c", namespace="x").line


def test_a_pull_secret_has_its_type() -> None:
    good = {"type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": "e30="}}
    assert state(names.pull_secret(good, name="r", namespace="x")) == "ok"
    assert "is of type Opaque" in names.pull_secret({**good, "type": "Opaque"}, name="r", namespace="x").line
    assert "lacks .dockerconfigjson" in names.pull_secret({**good, "data": {}}, name="r", namespace="x").line
    assert "is not there" in names.pull_secret(None, name="r", namespace="x").line


def test_what_settings_say_by_themselves() -> None:
    assert not list(names.named(SETTINGS))
    assert [found.what for found in names.named(replace(SETTINGS, image="ffn:dev"))] == ["Image"]
    assert [found.what for found in names.named(replace(SETTINGS, environment={}))] == ["MLflow"]
    assert [found.line for found in names.named(replace(SETTINGS, light_memory="1Gi", light_cpu="499m"))] == [
        "warning FFN_LIGHT_CPU 499m is below the 500m that light steps do well with: export FFN_LIGHT_CPU=500m or more",
        "warning FFN_LIGHT_MEMORY 1Gi is below the 2Gi that light steps do well with: export FFN_LIGHT_MEMORY=2Gi or more",
    ]
    assert [state(found) for found in names.named(replace(SETTINGS, shm="8Gi"))] == ["warning"]
    assert not list(names.named(replace(SETTINGS, checkpoints_claim="", checkpoints="s3://b/x")))


def test_states_that_would_not_be_kept() -> None:
    (gone,) = names.named(replace(SETTINGS, checkpoints_claim=""))
    assert gone.line.startswith("FAILED  FFN_CHECKPOINTS is /mnt/checkpoints: a folder of the pod itself, and gone with it; name")
    (unset,) = names.named(replace(SETTINGS, checkpoints="", checkpoints_claim=""))
    assert unset.line.startswith("FAILED  FFN_CHECKPOINTS is not set: expected s3://BUCKET/PREFIX, or the folder of a volume")


def test_where_runs_live() -> None:
    assert not list(names.home({}, "kubeflow", "team-a"))  # KFP did not answer
    assert not list(names.home({"multi_user": True}, "kubeflow", "team-a"))
    assert not list(names.home({"multi_user": False}, "kubeflow", "kubeflow"))
    (elsewhere,) = names.home({"multi_user": False}, "kubeflow", "team-a")
    assert elsewhere.line == (
        "FAILED  Kubeflow Pipelines has no profiles and keeps every run in kubeflow, none in team-a: "
        "export FFN_KFP_NAMESPACE=kubeflow"
    )


@pytest.mark.parametrize(
    ("uri", "labels", "told"),
    [
        ("http://mlflow.ffn:5000", {}, True),
        ("http://mlflow.ffn.svc.cluster.local:5000", {"ffn/runs": "no"}, True),
        ("http://mlflow.ffn:5000", {"ffn/runs": "allowed"}, False),
        ("https://mlflow.example", {}, False),
    ],
)
def test_whether_our_mlflow_lets_steps_in(uri: str, labels: dict[str, str], told: bool) -> None:
    settings = replace(SETTINGS, environment={"MLFLOW_TRACKING_URI": uri})
    found = [finding.line for finding in names.admitted_by_ours({"metadata": {"name": "x", "labels": labels}}, settings)]
    assert bool(found) == told
    assert not told or found[0].endswith(": kubectl label namespace x ffn/runs=allowed")


# Claims


def pvc(phase: str, *modes: str, storage_class: str = "nfs") -> Json:
    return {
        "metadata": {"name": "c"},
        "spec": {"accessModes": list(modes), "storageClassName": storage_class},
        "status": {"phase": phase},
    }


@pytest.mark.parametrize(
    ("found", "binding", "expected"),
    [
        (None, "", "is not there"),
        (pvc("Bound", "ReadWriteMany"), "", "is Bound, ReadWriteMany"),
        (pvc("Pending", "ReadWriteMany"), "WaitForFirstConsumer", "bound by the first pod"),
        (pvc("Pending", "ReadWriteMany"), "Immediate", "is Pending: no volume"),
        (pvc("Pending", "ReadWriteMany"), "", "is Pending: no volume"),
        (pvc("Lost", "ReadWriteMany"), "", "has lost its volume"),
        (
            pvc("Bound", "ReadWriteMany") | {"metadata": {"name": "c", "deletionTimestamp": "2026-01-01T00:00:00Z"}},
            "",
            "is being deleted",
        ),
    ],
)
def test_a_claim(found: Json | None, binding: str, expected: str) -> None:
    judged = names.claim(found, name="c", namespace="x", variable="FFN_DATA_CLAIM", binding=binding)
    assert expected in judged.line
    assert (judged.state is State.OK) == ("Bound" in expected or "bound by" in expected)


@pytest.mark.parametrize(
    ("modes", "nodes", "expected"),
    [
        (["ReadWriteMany"], 9, []),
        (["ReadWriteOnce"], 1, []),
        (["ReadWriteOnce"], 2, ["FAILED"]),
        (["ReadWriteOncePod"], 1, ["FAILED"]),
        (["ReadOnlyMany"], 1, ["FAILED"]),
        (["ReadWriteOnce"], None, ["warning"]),
    ],
)
def test_states_are_written_by_several(modes: list[str], nodes: int | None, expected: list[str]) -> None:
    assert [state(found) for found in names.shared(pvc("Bound", *modes), namespace="x", nodes=nodes)] == expected


# Rights


def test_rights() -> None:
    exact = dict.fromkeys(NEEDED, True) | dict.fromkeys(TOO_MUCH, False)
    assert [state(found) for found in rights(exact, "a", "x")] == ["ok"]
    (lacking,) = rights({**exact, Right(verb="list", resource="workflows", group="argoproj.io"): False}, "a", "x")
    assert "may not list workflows" in lacking.line
    fine, more = rights(dict.fromkeys(RIGHTS, True), "pipeline-runner", "x")
    assert (state(fine), state(more)) == ("ok", "warning")
    assert "may create pods, get secrets, list secrets, create workflows of" in more.line


def test_the_role_that_comes_along_gives_what_is_needed_and_no_more() -> None:
    (role,) = (item for item in yaml.safe_load_all((ROOT / "k8s/runs/account.yaml").read_text()) if item["kind"] == "Role")
    given = {
        Right(verb=verb, resource=resource, group=group, name=name)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
        for group in rule["apiGroups"]
        for name in rule.get("resourceNames", [""])
    }
    assert given == set(NEEDED)
    assert not given & set(TOO_MUCH)


# Quotas and limit ranges


def a_quota(hard: Json, used: Json | None = None, **spec: Any) -> Json:
    return {"metadata": {"name": "q"}, "spec": {"hard": hard, **spec}, "status": {"hard": hard, "used": used or {}}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (a_quota({"requests.storage": "2Ti", "count/jobs.batch": "50"}), ""),
        (a_quota({"limits.memory": "4Gi"}), "never admits a training: limits.memory 4Gi, it asks for 8Gi"),
        (a_quota({"requests.cpu": "100m"}), "never admits a training"),
        (a_quota({"limits.memory": "8Gi"}, {"limits.memory": "0"}), "room for 0 trainings now"),
        (a_quota({"cpu": "16500m", "pods": "100"}, {"cpu": "0"}), "ok      ResourceQuota q in x has room for 4 trainings"),
        (a_quota({"cpu": "16500m"}, {"cpu": "12"}), "has room for 1 trainings now (cpu: 12 of 16500m used), a protocol starts 4"),
        (a_quota({"limits.memory": "4Gi"}, scopes=["NotTerminating"]), ""),
        (a_quota({"limits.memory": "4Gi"}, scopes=["Terminating"]), "never admits"),
        (
            a_quota(
                {"pods": "1"},
                scopeSelector={"matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}]},
            ),
            "",
        ),
    ],
)
def test_a_quota(found: Json, expected: str) -> None:
    assert expected in "".join(judged.line for judged in resources.quota(found, SETTINGS, "x")) if expected else True
    assert bool(list(resources.quota(found, SETTINGS, "x"))) == bool(expected)


def test_a_quota_of_accelerators() -> None:
    settings = replace(SETTINGS, gpus=2)
    (none,) = resources.quota(a_quota({"requests.nvidia.com/gpu": "1"}), settings, "x")
    assert "never admits a training: requests.nvidia.com/gpu 1, it asks for 2" in none.line
    (some,) = resources.quota(a_quota({"requests.nvidia.com/gpu": "8"}, {"requests.nvidia.com/gpu": "2"}), settings, "x")
    assert "room for 3 trainings now" in some.line
    assert "FFN_PARALLELISM=3" in some.line
    (few,) = resources.quota(a_quota({"requests.nvidia.com/gpu": "8"}, {}), replace(settings, parallelism=2), "x")
    assert state(few) == "ok"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"type": "Container", "max": {"cpu": "4", "memory": "8Gi"}, "default": {"cpu": "1"}}, ""),
        ({"type": "Container", "max": {"memory": "4Gi"}}, "a training with memory 8Gi (at most 4Gi a Container)"),
        ({"type": "Pod", "max": {"cpu": "1"}}, "a training with cpu 4 (at most 1 a Pod)"),
        ({"type": "Container", "min": {"cpu": "1"}}, "a light step with cpu 500m (at least 1 a Container)"),
        ({"type": "Container", "maxLimitRequestRatio": {"memory": "2"}}, "a light step with memory 2Gi to 8Gi (at most 2 times"),
        ({"type": "PersistentVolumeClaim", "max": {"storage": "1Gi"}}, ""),
    ],
)
def test_a_limit_range(item: Json, expected: str) -> None:
    (judged,) = resources.limit_range({"metadata": {"name": "l"}, "spec": {"limits": [item]}}, SETTINGS, "x")
    assert (state(judged) == "ok") == (not expected)
    assert expected in judged.line


# Nodes


GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("nodes", "changes", "expected"),
    [
        ([], {}, "there are none"),
        ([node("a"), node("b", cpu="2")], {}, "ok      Nodes for trainings: 1 of 2: a"),
        ([node("a")], {"node_selector": {"pool": "train"}}, "none of 1 has the labels pool=train"),
        ([node("a", labels={"pool": "train"})], {"node_selector": {"pool": "train"}}, "1 of 1: a"),
        ([node("a")], {"gpus": 1}, "none of 1 offers nvidia.com/gpu: install the vendor's device plugin"),
        ([node("a", gpus="2")], {"gpus": 4}, "none has 4 nvidia.com/gpu, the most is 2: export FFN_GPUS=2"),
        ([node("a", gpus="8"), node("b", gpus="8")], {"gpus": 4}, "2 of 2: a, b; 16 nvidia.com/gpu in all"),
        (
            [node("a", cpu="1930m", memory="7629Mi")],
            {},
            "none has cpu 4 and memory 8Gi to give: set FFN_CPU below 1.93 and FFN_MEMORY below 7Gi",
        ),
        (
            [node("a", taints=[GPU_TAINT])],
            {},
            "tolerate: nvidia.com/gpu=present:NoSchedule: export FFN_TOLERATIONS=nvidia.com/gpu=present:NoSchedule",
        ),
        ([node("a", taints=[{**GPU_TAINT, "effect": "PreferNoSchedule"}])], {}, "1 of 1: a"),
        ([node("a", ready="Unknown")], {}, "a not ready, or cordoned"),
        (
            [node("a", cordoned=True, taints=[{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}])],
            {},
            "kubectl uncordon a",
        ),
    ],
)
def test_nodes_for_trainings(nodes: list[Json], changes: Json, expected: str) -> None:
    settings = replace(SETTINGS, **changes)
    judged = resources.train_nodes(nodes, settings, probe.tolerations(settings), autoscaled=False)
    assert expected in judged.line
    assert (state(judged) == "ok") == (" of " in expected and "none" not in expected)


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ("nvidia.com/gpu", True),
        ("nvidia.com/gpu=present", True),
        ("nvidia.com/gpu=present:NoSchedule", True),
        ("nvidia.com/gpu:NoExecute", False),
        ("nvidia.com/gpu=absent", False),
        ("other", False),
    ],
)
def test_taints_and_tolerations(toleration: str, tolerated: bool) -> None:
    settings = replace(SETTINGS, tolerations=(Toleration.parse(toleration),))
    judged = resources.train_nodes([node("a", taints=[GPU_TAINT])], settings, probe.tolerations(settings), autoscaled=False)
    assert (state(judged) == "ok") == tolerated
    if not tolerated:
        assert f"FFN_TOLERATIONS={toleration},nvidia.com/gpu=present:NoSchedule" in judged.remedy


def test_what_the_api_tolerates_by_itself_counts() -> None:
    added = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert state(resources.train_nodes([node("a", taints=[GPU_TAINT])], SETTINGS, added, autoscaled=False)) == "ok"


def test_a_cluster_that_makes_nodes_may_have_none() -> None:
    assert state(resources.train_nodes([node("a")], replace(SETTINGS, gpus=1), (), autoscaled=True)) == "warning"


def test_light_steps_go_where_they_like() -> None:
    elsewhere = replace(SETTINGS, node_selector={"pool": "train"}, gpus=1, tolerations=(Toleration(key="nvidia.com/gpu"),))
    assert "1 of 2" in resources.light_nodes([node("a"), node("b", taints=[GPU_TAINT])], elsewhere).line
    assert state(resources.light_nodes([node("b", taints=[GPU_TAINT])], elsewhere)) == "FAILED"
    assert state(resources.light_nodes([node("b", memory="1Gi")], elsewhere)) == "FAILED"


# Argo's retries

SHIPPED = """spec:
  ttlStrategy:
    secondsAfterCompletion: 3600
    secondsAfterSuccess: 3600
    secondsAfterFailure: 3600
  templateDefaults:
    retryStrategy:
      limit: '2'
      retryPolicy: OnError
"""
"""Source: manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml of KFP 2.17.0."""


def configuration(retry: Json | None, **data: str) -> Json:
    spec = {"templateDefaults": {"retryStrategy": retry}} if retry is not None else {}
    return {"data": {"workflowDefaults": yaml.safe_dump({"spec": spec}), **data}}


def test_retries_as_kfp_ships_them() -> None:
    found = argo.retry_policy({"data": {"workflowDefaults": SHIPPED, "executor": "imagePullPolicy: IfNotPresent\n"}}, "kubeflow")
    assert state(found) == "warning"
    assert "with OnError a step whose pod is killed for its memory or evicted is not run again" in found.said
    assert "with limit 2 for every template a pod that is deleted or invalid is tried again on every level" in found.said


def test_secrets_that_argo_mounts_into_every_pod() -> None:
    keys = "s3: {accessKeySecret: {name: m, key: accesskey}, secretKeySecret: {name: m, key: secretkey}}"
    assert argo.artifact_secrets({"data": {"artifactRepository": f"archiveLogs: true\n{keys}\n"}}) == {
        "m": ("accesskey", "secretkey")
    }
    assert argo.artifact_secrets({"data": {"artifactRepository": "s3: {useSDKCreds: true}"}}) == {}
    assert argo.artifact_secrets(None) == {}


def test_the_patch_changes_the_retry_strategy_and_nothing_else() -> None:
    found = argo.retry_policy({"data": {"workflowDefaults": SHIPPED}}, "kubeflow")
    words = shlex.split(found.remedy[found.remedy.index("kubectl") :])
    assert words[:7] == ["kubectl", "-n", "kubeflow", "patch", "configmap", "workflow-controller-configmap", "--type"]
    patch = json.loads(words[-1])
    before, after = yaml.safe_load(SHIPPED), yaml.safe_load(patch["data"]["workflowDefaults"])
    assert after["spec"].pop("templateDefaults") == {"retryStrategy": {"limit": "0", "retryPolicy": "Always"}}
    before["spec"].pop("templateDefaults")
    assert after == before
    assert state(argo.retry_policy({"data": patch["data"]}, "kubeflow")) == "ok"


def test_a_configuration_in_one_item_is_patched_in_it() -> None:
    whole = yaml.safe_dump({"workflowDefaults": yaml.safe_load(SHIPPED), "parallelism": 7})
    found = argo.retry_policy({"data": {"config": whole}}, "argo")
    patched = json.loads(shlex.split(found.remedy[found.remedy.index("kubectl") :])[-1])["data"]
    assert yaml.safe_load(patched["config"])["parallelism"] == 7
    assert state(argo.retry_policy({"data": patched}, "argo")) == "ok"


@pytest.mark.parametrize(
    ("config", "expected", "said"),
    [
        (configuration({"limit": "0", "retryPolicy": "Always"}), "ok", "retryPolicy Always, limit 0"),
        (configuration({"limit": 0, "retryPolicy": "Always"}), "ok", ""),
        (configuration({"limit": "2", "retryPolicy": "Always"}), "warning", "with limit 2 for every template what fails"),
        (configuration({"retryPolicy": "Always"}), "warning", "with limit none for every template what fails"),
        ({"data": {"workflowDefaults": "spec: {retryStrategy: {limit: 0, retryPolicy: Always}}"}}, "warning", "with OnFailure"),
        (configuration({"limit": "0", "retryPolicy": "OnTransientError"}), "warning", "with OnTransientError"),
        (configuration({"limit": "0", "expression": "true"}), "ok", ""),
        (configuration(None), "warning", "with OnFailure a step whose pod is deleted"),
        ({"data": {}}, "warning", "with OnFailure"),
        (configuration(None, workflowDefaults="- a list\n"), "warning", "with OnFailure"),
        (configuration(None, workflowDefaults="a: [b\n"), "warning", "with OnFailure"),
        (None, "warning", "not known"),
    ],
)
def test_other_retries(config: Json | None, expected: str, said: str) -> None:
    found = argo.retry_policy(config, "kubeflow" if config else None)
    assert state(found) == expected
    assert said in found.line


# Admissions

FORBIDDEN = 'pods "ffn-check-0a1b2c" is forbidden: '


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        (
            FORBIDDEN + "exceeded quota: q, requested: limits.memory=8Gi, used: limits.memory=0, limited: limits.memory=4Gi",
            "resourcequota",
        ),
        (FORBIDDEN + "failed quota: q: must specify limits.cpu for: wait", "make a LimitRange in x with defaults"),
        (
            FORBIDDEN + 'violates PodSecurity "restricted:latest": runAsNonRoot != true (pod or container "wait" ...)',
            "enforce=baseline",
        ),
        (FORBIDDEN + "[maximum cpu usage per Container is 4, but limit is 8]", "limitrange"),
        (FORBIDDEN + "memory max limit to request ratio per Container is 2, but provided ratio is 4.000000", "FFN_LIGHT_MEMORY"),
        (FORBIDDEN + 'error looking up service account x/ffn-pipeline: serviceaccount "ffn-pipeline" not found', "account.yaml"),
        (
            'Pod "ffn-check-0a1b2c" is invalid: spec.containers[0].resources.requests: Invalid value: "2Gi": must be less '
            "than or equal to memory limit of 1Gi",
            "FFN_LIGHT_MEMORY",
        ),
        ('admission webhook "policy.example" denied the request: no image of that registry', "webhook"),
    ],
)
def test_refusals(message: str, remedy: str) -> None:
    (found,) = pods.admitted("A training's pod", Outcome(end=End.REFUSED, said=message), [], "x")
    assert state(found) == "FAILED"
    assert "ffn-check-" not in found.line
    assert remedy in found.remedy


def test_an_admission_that_warns() -> None:
    said = 'would violate PodSecurity "restricted:latest": runAsNonRoot != true'
    (found,) = pods.admitted("A training's pod", Outcome(end=End.TOLD), [said], "x")
    assert (state(found), said in found.line) == ("warning", True)
    (fine,) = pods.admitted("A training's pod", Outcome(end=End.TOLD), ["unknown field"], "x")
    assert state(fine) == "ok"


def test_the_level_of_the_namespace() -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    assert "enforces restricted" in pods.security_level({"metadata": {"name": "x", "labels": labels}}).line
    assert "enforces nothing" in pods.security_level({"metadata": {"name": "x"}}).line


# A pod as a step's


def compiled_train(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Settings, Json, Json, Json]:
    """Settings, and what KFP was told of a training and of ingest: container and pod."""
    test_compile.set_up(monkeypatch)
    monkeypatch.setenv("FFN_CHECKPOINTS", "/mnt/checkpoints")
    monkeypatch.setenv("FFN_CHECKPOINTS_CLAIM", "ffn-checkpoints")
    out = folder / "pipeline.yaml"
    assert main(["cluster", "compile", "--protocols", "ntu60-xsub", "--out", str(out)]) == 0
    spec = test_compile.Spec(out)
    return Settings.from_environment(), spec.executors["exec-train"]["container"], spec.pods["exec-train"], spec.pods["exec-ingest"]


def test_the_pod_is_what_kfp_is_told_of_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings, container, told, ingest = compiled_train(monkeypatch, tmp_path)
    pod = probe.train(settings, name="n", account="ffn-pipeline")
    spec, main_container = pod["spec"], pod["spec"]["containers"][0]
    assert main_container["image"] == container["image"]
    plain = {each["name"]: each["value"] for each in main_container["env"] if "value" in each}
    assert plain == {each["name"]: each["value"] for each in container["env"]}
    keys = {
        (each["valueFrom"]["secretKeyRef"]["name"], each["valueFrom"]["secretKeyRef"]["key"])
        for each in main_container["env"]
        if "valueFrom" in each
    }
    assert keys == {(each["secretName"], key["secretKey"]) for each in told["secretAsEnv"] for key in each["keyToEnv"]}
    asked = container["resources"]
    assert main_container["resources"]["limits"] == {
        "cpu": asked["resourceCpuLimit"], "memory": asked["resourceMemoryLimit"],
        asked["accelerator"]["resourceType"]: asked["accelerator"]["resourceCount"],
    }  # fmt: skip
    assert spec["nodeSelector"] == told["nodeSelector"]["labels"]
    assert spec["tolerations"] == [{key: value for key, value in each.items() if value} for each in told["tolerations"]]
    assert [each["name"] for each in spec["imagePullSecrets"]] == [each["secretName"] for each in told["imagePullSecret"]]
    assert pod["metadata"]["labels"].keys() >= told["podMetadata"]["labels"].keys()
    mounts = {each["mountPath"]: each["name"] for each in main_container["volumeMounts"]}
    assert mounts == {
        **{each["mountPath"]: each["constant"] for each in told["pvcMount"]},
        **{each["mountPath"]: each["configMapName"] for each in told["configMapAsVolume"]},
        **{each["mountPath"]: each["volumeName"] for each in told["emptyDirMounts"]},
    }
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert volumes.keys() == set(mounts.values())
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": settings.shm}
    light = probe.ingest(settings, name="n", account="a")["spec"]["containers"][0]
    assert {each["mountPath"]: each["name"] for each in light["volumeMounts"]} == {
        **{each["mountPath"]: each["constant"] for each in ingest["pvcMount"]},
        **{each["mountPath"]: each["configMapName"] for each in ingest["configMapAsVolume"]},
    }


def test_the_probe_mounts_every_volume_and_asks_for_little() -> None:
    settings = replace(SETTINGS, gpus=4, data_claim="recordings", node_selector={"pool": "train"})
    pod = probe.probe(settings, name="ffn-check-1", account="a", rights=[{"verb": "get"}])
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["nodeSelector"] == {"pool": "train"}
    assert container["resources"]["requests"] == {"cpu": "500m", "memory": "2Gi"}
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert {each["mountPath"] for each in container["volumeMounts"]} == {"/mnt/checkpoints", "/mnt/data", "/dev/shm"}
    assert (container["securityContext"]["runAsUser"], container["securityContext"]["runAsGroup"]) == (65532, 65532)
    assert "fsGroup" not in pod["spec"]["securityContext"]
    assert pod["spec"]["activeDeadlineSeconds"] <= 180
    assert pod["metadata"]["labels"]["workflows.argoproj.io/workflow"] == "ffn-check-1"
    assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert json.loads(container["command"][-1]) == [{"verb": "get"}]
    assert {"name": "FFN_CHECKPOINTS", "value": "/mnt/checkpoints"} in container["env"]


def test_states_in_a_store_need_no_claim() -> None:
    pod = probe.probe(replace(SETTINGS, checkpoints="s3://b/states"), name="n", account="a")
    assert [each["name"] for each in pod["spec"]["volumes"]] == ["shm"]


def test_argos_containers_are_as_it_is_configured() -> None:
    config = {"data": {"executor": "resources: {requests: {cpu: 10m}}\nsecurityContext: {runAsUser: 1000}\nargs: [-v]\n"}}
    pod = probe.train(SETTINGS, name="n", account="a", executor=argo.executor(config))
    wait = pod["spec"]["containers"][1]
    assert (wait["name"], wait["resources"], wait["securityContext"]) == ("wait", {"requests": {"cpu": "10m"}}, {"runAsUser": 1000})
    assert "args" not in wait
    assert argo.executor({"data": {"config": "executor: {args: [-v]}"}}) == {"args": ["-v"]}
    assert argo.executor({"data": {}}) == {}
    assert argo.executor(None) == {}


# How a pod ends


def pod_status(state: Json | None = None, **status: Any) -> Json:
    return {"status": status | ({"containerStatuses": [{"name": "main", "state": state}]} if state else {})}


def waiting(reason: str, message: str = "") -> Json:
    return pod_status({"waiting": {"reason": reason, "message": message}}, phase="Pending")


UNSCHEDULABLE = pod_status(
    phase="Pending",
    conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}],
)
TOLD = json.dumps({"parts": [["torch", True, "2.13.0 on CPU"]], "version": "3.17.2", "rights": []})


@pytest.mark.parametrize(
    ("pod", "end"),
    [
        (pod_status(phase="Pending"), None),
        (waiting("ContainerCreating"), None),
        (waiting("PodInitializing"), None),
        (pod_status({"running": {"startedAt": "2026-01-01T00:00:00Z"}}, phase="Running"), None),
        (waiting("ErrImagePull", "manifest unknown"), End.IMAGE),
        (waiting("ImagePullBackOff"), End.IMAGE),
        (waiting("InvalidImageName"), End.IMAGE),
        (waiting("CreateContainerConfigError", 'secret "ffn-mlflow" not found'), End.NOT_STARTED),
        (waiting("RunContainerError"), End.NOT_STARTED),
        (pod_status({"terminated": {"exitCode": 0, "reason": "Completed", "message": TOLD}}, phase="Succeeded"), End.TOLD),
        (pod_status({"terminated": {"exitCode": 0, "reason": "Completed"}}, phase="Succeeded"), End.DIED),
        (pod_status({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, phase="Failed"), End.DIED),
        (
            pod_status({"terminated": {"exitCode": 1, "reason": "Error", "message": "a\nModuleNotFoundError: no"}}, phase="Failed"),
            End.DIED,
        ),
        (pod_status(phase="Failed", reason="Evicted", message="The node was low on resource: memory."), End.DIED),
    ],
)
def test_how_a_pod_ends(pod: Json, end: End | None) -> None:
    found = probe.judge(pod)
    assert (found.end if found else None) == end


def test_a_pod_without_a_node_has_some_time() -> None:
    assert probe.judge(UNSCHEDULABLE) is None
    late = probe.judge(UNSCHEDULABLE, placed_late=True)
    assert late
    assert late.end is End.UNSCHEDULABLE


DIGEST = "registry.example/ffn@sha256:" + "401" * 20 + "4034"


@pytest.mark.parametrize(
    ("outcome", "remedy"),
    [
        (Outcome(end=End.IMAGE, said=f'failed to pull "{DIGEST}": not found'), "no such image there"),
        (
            Outcome(end=End.IMAGE, said="pull access denied, repository does not exist or may require authorization"),
            "FFN_PULL_SECRET",
        ),
        (Outcome(end=End.IMAGE, said="unexpected status: 401 Unauthorized"), "FFN_PULL_SECRET"),
        (
            Outcome(end=End.IMAGE, said='failed to do request: Head "https://r": dial tcp: connect: connection refused'),
            "reach the registry",
        ),
        (Outcome(end=End.IMAGE, said="tls: failed to verify certificate: x509: unknown authority"), "trust the registry"),
        (Outcome(end=End.NOT_STARTED, said='CreateContainerConfigError: secret "s" not found'), "k8s/secrets"),
        (Outcome(end=End.NOT_STARTED, said="CreateContainerConfigError: couldn't find key X in Secret x/s"), "k8s/secrets"),
        (
            Outcome(end=End.NOT_STARTED, said="RunContainerError: exec: python3: executable file not found in $PATH"),
            "set FFN_IMAGE to an image of ffn",
        ),
        (
            Outcome(end=End.UNSCHEDULABLE, said="0/1 nodes are available: 1 node(s) had untolerated taint {a: b}."),
            "FFN_TOLERATIONS",
        ),
        (Outcome(end=End.UNSCHEDULABLE, said="1 node(s) didn't match Pod's node affinity/selector."), "FFN_NODE_SELECTOR"),
        (Outcome(end=End.UNSCHEDULABLE, said="pod has unbound immediate PersistentVolumeClaims."), "kubectl get pv"),
        (Outcome(end=End.UNSCHEDULABLE, said="1 Insufficient memory."), "the nodes are full"),
        (Outcome(end=End.DIED, said="OOMKilled, exit status 137"), "FFN_LIGHT_MEMORY"),
        (Outcome(end=End.DIED, said="Error, exit status 1: No module named pipeline"), "an image of this version"),
        (Outcome(end=End.LATE, said='ContainerCreating after 180 s: FailedMount: configmap "ca" not found'), "FFN_CA"),
        (Outcome(end=End.LATE, said="ContainerCreating after 180 s: FailedAttachVolume: Multi-Attach error"), "cannot be mounted"),
        (Outcome(end=End.REFUSED, said=FORBIDDEN + "exceeded quota: q"), "resourcequota"),
    ],
)
def test_what_to_do_about_a_pod(outcome: Outcome, remedy: str) -> None:
    (found,) = pods.from_pod(outcome, SETTINGS, "x")
    assert state(found) == "FAILED"
    assert remedy in found.remedy


def test_a_pod_that_waits_for_a_node_to_be_made() -> None:
    (found,) = pods.from_pod(Outcome(end=End.UNSCHEDULABLE, said="0/0"), SETTINGS, "x", autoscaled=True)
    assert state(found) == "warning"


@pytest.mark.parametrize(
    ("name", "said", "remedy"),
    [
        ("MLflow", "Failed to resolve 'mlflow' ([Errno -2] Name or service not known)", "MLFLOW_TRACKING_URI"),
        ("MLflow", "Failed to establish a new connection: [Errno 111] Connection refused", "network rules of x"),
        ("MLflow", "error code 401 != 200. Response body: 'You are not authenticated.'", "FFN_MLFLOW_SECRET names (now m)"),
        ("MLflow", "error code 403 != 200. Response body: 'Invalid Host header - possible", "MLFLOW_SERVER_ALLOWED_HOSTS"),
        ("MLflow", "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", "FFN_CA"),
        ("states", "/mnt/c belongs to 0:0, mode 755; steps are 65532:65532", "the volume of ffn-checkpoints to group 65532"),
        ("data", "/mnt/data belongs to 0:0, mode 700; steps are 65532:65532", "readable by user and group 65532"),
        ("scratch", "No usable temporary directory found", "/tmp"),
        ("torch", "CUDA error: no kernel image", "FFN_IMAGE"),
        ("Kubernetes", "timed out", "network rules of x"),
    ],
)  # fmt: skip
def test_what_to_do_about_what_a_pod_met(name: str, said: str, remedy: str) -> None:
    outcome = Outcome(end=End.TOLD, report={"parts": [[name, False, said]], "version": "", "rights": []})
    started, found = pods.from_pod(outcome, replace(SETTINGS, mlflow_secret="m"), "x")
    assert (state(started), state(found)) == ("ok", "FAILED")
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("s3://b/x: refused the keys (SignatureDoesNotMatch)", "FFN_S3_SECRET names (now k)"),
        ("s3://b/x: no bucket b", "make the bucket"),
    ],
)
def test_what_to_do_about_a_store(said: str, remedy: str) -> None:
    assert remedy in pods.part_remedy("states", said, replace(SETTINGS, checkpoints="s3://b/x", s3_secret="k"), "x")


def test_the_server_is_of_the_clients_versions() -> None:
    assert [state(pods.mlflow_version(said)) for said in ("3.17.2", "3.18.0", "3.16.0", "4.0.0", "?")] == [
        "ok",
        "ok",
        "warning",
        "warning",
        "warning",
    ]
    (asked,) = (
        each
        for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if each.startswith("mlflow")
    )
    assert asked == "mlflow>=" + ",<".join(".".join(map(str, bound)) for bound in pods.MLFLOW)


# Within a pod


def in_a_pod(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Of a cluster whose API is not there."""
    (folder / "account").mkdir()
    (folder / "account" / "namespace").write_text("x")
    (folder / "account" / "token").write_text("t")
    monkeypatch.setattr(in_cluster, "ACCOUNT", folder / "account")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")


def test_the_report_of_a_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states, data = tmp_path / "states", tmp_path / "data"
    states.mkdir()
    data.mkdir()
    (data / "recording").touch()
    monkeypatch.setattr(health, "POLICY_SECONDS", 0.0)
    monkeypatch.setattr(health, "PATIENCE", 0.0)
    monkeypatch.setattr(in_cluster, "TERMINATION", tmp_path / "termination-log")
    monkeypatch.setattr(sys, "argv", ["health", "[]"])
    in_a_pod(monkeypatch, tmp_path)
    monkeypatch.setenv("FFN_CHECKPOINTS", str(states))
    monkeypatch.setenv("FFN_DATA", str(data))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    health.main()
    told = (tmp_path / "termination-log").read_text()
    assert json.loads(capsys.readouterr().out) == json.loads(told)
    parts = {name: (works, said) for name, works, said in json.loads(told)["parts"]}
    assert parts["torch"][0]
    assert parts["states"][0]
    assert not list(states.iterdir())
    assert parts["data"] == (True, f"{data}, 1 entries")
    assert not parts["Kubernetes"][0]
    assert len(told) < 4096


def test_a_folder_that_refuses_says_whose_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    in_a_pod(monkeypatch, tmp_path)
    monkeypatch.setenv("FFN_CHECKPOINTS", str(tmp_path))
    monkeypatch.setattr(health.tempfile, "NamedTemporaryFile", refuse)
    (_, works, said) = next(part for part in health.examine() if part[0] == "states")
    assert not works
    assert said.startswith(f"{tmp_path} belongs to ")


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "API request failed with exception HTTPConnectionPool(host='m', port=5000): Max retries exceeded (Caused by "
            "NewConnectionError(\"HTTPConnection(host='m', port=5000): Failed: [Errno 111] Connection refused\"))",
            "HTTPConnection(host='m', port=5000): Failed: [Errno 111] Connection refused",
        ),
        ("error code 401 != 200. Response body: 'no'\nmore", "error code 401 != 200. Response body: 'no'"),
        ("", "ValueError"),
    ],
)
def test_the_cause_of_an_error(said: str, cause: str) -> None:
    assert health._cause(ValueError(said)) == cause


def test_folders_of_the_cluster_are_not_looked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("FFN_CHECKPOINTS", "/mnt/checkpoints")
    monkeypatch.setenv("FFN_DATA", "/mnt/data")
    assert [said for name, _, said in health.examine() if name in ("states", "data")] == [
        "FFN_CHECKPOINTS names none",
        "FFN_DATA names none",
    ]


# Asking


@pytest.fixture
def api() -> FakeKubernetes:
    return FakeKubernetes()


@pytest.fixture
def client(api: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiClient]:
    with kubernetes(api, tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{config}")
        yield kube.connect()


@pytest.fixture
def core(client: ApiClient) -> CoreV1Api:
    return CoreV1Api(client)


def test_answers(api: FakeKubernetes, client: ApiClient, core: CoreV1Api) -> None:
    version = VersionApi(client).get_code
    assert kube.ask(version)["gitVersion"] == "v1.34.4"
    assert api.who == {"Bearer t-o-k-e-n"}
    api.objects["/api/v1/nodes"] = denied("list", "nodes")
    with pytest.raises(Denied, match=r"^list nodes$"):
        kube.ask(core.list_node)
    with pytest.raises(Absent):
        kube.ask(core.read_namespace, "nothing")
    assert kube.or_none(core.read_namespace, "nothing") is None
    api.post = lambda path, body: status(403, FORBIDDEN + "exceeded quota: q")
    with pytest.raises(Rejected, match="exceeded quota"):
        kube.ask(core.create_namespaced_pod, "x", {})
    for code, said, error in ((401, "does not know us: no", FFNError), (500, ": 500 no", Fault), (429, ": 429 no", Fault)):
        api.objects["/version/"] = status(code, "no")
        with pytest.raises(error, match=said):
            kube.ask(version)
    api.warning = 'would violate PodSecurity \\"restricted:latest\\": x'
    api.post = lambda path, body: (201, body)
    kube.ask(core.create_namespaced_pod, "x", {})
    assert kube.warnings(client) == ['would violate PodSecurity "restricted:latest": x']


def test_no_kubeconfig_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert main(["cluster", "check"]) == 2
    assert capsys.readouterr().err == f"ffn: error: no kubeconfig: {tmp_path / 'none'} is not there; KUBECONFIG names another\n"
    (tmp_path / "none").write_text("a: [b")
    assert main(["cluster", "check"]) == 2
    assert "kubeconfig" in capsys.readouterr().err


def test_an_api_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with kubernetes(FakeKubernetes(), tmp_path) as config:
        monkeypatch.setenv("KUBECONFIG", str(config))
    assert main(["cluster", "check"]) == 2
    said = capsys.readouterr().err
    assert "does not answer" in said
    assert said.count("\n") == 1


NAMESPACE = "/api/v1/namespaces/x"


def nothing_there() -> Server:
    raise FFNError("FFN_KFP_URL='': expected an address")


def test_who_may_see_nothing_is_told_which_rights_it_takes(api: FakeKubernetes, client: ApiClient) -> None:
    for path, resource in (
        (NAMESPACE, "namespaces"), (f"{NAMESPACE}/serviceaccounts/a", "serviceaccounts"), ("/api/v1/nodes", "nodes"),
        (f"{NAMESPACE}/secrets/m", "secrets"), (f"{NAMESPACE}/persistentvolumeclaims/ffn-checkpoints", "persistentvolumeclaims"),
        (f"{NAMESPACE}/resourcequotas", "resourcequotas"), (f"{NAMESPACE}/limitranges", "limitranges"),
        (f"{NAMESPACE}/configmaps/workflow-controller-configmap", "configmaps"), ("/api/v1/configmaps", "configmaps"),
        ("/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap", "configmaps"),
        ("/api/v1/namespaces/kube-system/configmaps/cluster-autoscaler-status", "configmaps"),
        ("/apis/karpenter.sh/v1/nodepools", "nodepools"),
    ):  # fmt: skip
        api.objects[path] = denied("get", resource)
    api.post = lambda path, body: denied("create", path.rpartition("/")[2])
    found = list(examine(client, nothing_there, replace(SETTINGS, mlflow_secret="m"), namespace="x", account="a"))
    assert [finding.what for finding in found if finding.state is State.FAILED] == ["Kubeflow Pipelines"]
    assert [finding.what for finding in found if finding.state is State.OK] == ["Kubernetes"]
    assert "warning Nodes could not be looked at: it takes the right to list nodes" in [finding.line for finding in found]


def test_one_pod_is_made_and_deleted(api: FakeKubernetes, client: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    api.objects |= {
        NAMESPACE: {"metadata": {"name": "x", "labels": {"ffn/runs": "allowed"}}, "status": {"phase": "Active"}},
        f"{NAMESPACE}/serviceaccounts/a": {"metadata": {"name": "a"}},
        f"{NAMESPACE}/persistentvolumeclaims/ffn-checkpoints": pvc("Bound", "ReadWriteMany"),
        f"{NAMESPACE}/resourcequotas": {"items": []},
        f"{NAMESPACE}/limitranges": {"items": []},
        "/api/v1/nodes": {"items": [node("n")]},
        "/api/v1/configmaps": {"items": [{"metadata": {"namespace": "kfp"}, "data": {"workflowDefaults": SHIPPED}}]},
    }  # fmt: skip
    name = "ffn-check-0a1b2c"
    monkeypatch.setattr(probe, "name", lambda: name)

    def post(path: str, body: Json) -> tuple[int, Json]:
        if path.endswith("subjectaccessreviews"):
            right = body["spec"]["resourceAttributes"]
            allowed = right in [needed.attributes("x") for needed in NEEDED]
            return 201, {"status": {"allowed": allowed}}
        api.objects[f"{NAMESPACE}/pods/{name}"] = pod_status({"terminated": {"exitCode": 0, "message": TOLD}}, phase="Succeeded")
        return 201, body

    api.post = post
    with serving(FakeKFP()) as url:
        kfp = Server(endpoint=Endpoint(url=url, ui=url))
        found = list(examine(client, lambda: kfp, SETTINGS, namespace="x", account="a"))
    lines = [finding.line for finding in found]
    assert [line for line in lines if not line.startswith("ok")] == [
        line for line in lines if "Kubeflow Pipelines" in line or "Argo's retries (workflow-controller-configmap in kfp)" in line
    ]
    assert "ok      In a pod, torch: 2.13.0 on CPU" in lines
    assert "ok      MLflow 3.17.2" in lines
    assert [asked for asked in api.asked if asked.startswith("DELETE")] == [f"DELETE {NAMESPACE}/pods/{name}"]
    assert len([path for path, _ in api.posted if path.endswith("/pods")]) == 3


def test_a_pod_is_deleted_when_we_are_interrupted(api: FakeKubernetes, core: CoreV1Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe.time, "sleep", interrupt)
    api.objects[f"{NAMESPACE}/pods/ffn-check-1"] = waiting("ContainerCreating")
    with pytest.raises(KeyboardInterrupt):
        probe.run(core, "x", {"metadata": {"name": "ffn-check-1"}})
    assert api.asked[-1] == f"DELETE {NAMESPACE}/pods/ffn-check-1"


def test_a_pod_that_is_late_says_what_kubernetes_warned_of(
    api: FakeKubernetes, core: CoreV1Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SECONDS", -1)
    api.objects[f"{NAMESPACE}/pods/p"] = waiting("ContainerCreating")
    events = [
        {"reason": "Old", "message": "x", "lastTimestamp": "2026-01-01T00:00:00Z"},
        {
            "reason": "FailedMount",
            "message": 'MountVolume.SetUp failed for volume "ca":\nconfigmap "ca" not found',
            "lastTimestamp": "2026-01-01T00:00:09Z",
        },
    ]
    api.objects[f"{NAMESPACE}/events"] = {"items": events}
    outcome = probe.run(core, "x", {"metadata": {"name": "p"}})
    assert outcome.end is End.LATE
    assert outcome.said.endswith('FailedMount: MountVolume.SetUp failed for volume "ca": configmap "ca" not found')


def test_a_namespace_that_is_not_there_ends_it(client: ApiClient) -> None:
    found = list(examine(client, nothing_there, SETTINGS, namespace="x", account="a"))
    assert [finding.what for finding in found] == ["Kubernetes", "Kubeflow Pipelines", "Namespace x"]
