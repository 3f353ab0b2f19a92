"""`ffn cluster check` on a real cluster: each thing that a run needs is taken away for real, in a namespace made for that.

    FFN_CLUSTER_KUBECONFIG=~/.kube/config FFN_IMAGE=registry.example/ffn@sha256:... pytest tests/cluster/test_check.py

The kubeconfig's person may make namespaces; the image is the project's, where the cluster's nodes pull it. With FFN_KFP_URL KFP's
API is asked too. Nothing outside the namespace that is made here is changed.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path

import pytest
import yaml
from kubernetes.client import ApiException, CoreV1Api

from components import kube
from components.kube import Json
from pipeline import probe
from pipeline.check.pods import admitted
from pipeline.cli import main
from pipeline.settings import Settings

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
ACCOUNT = ("pipeline", "of-the-pipeline")
POD = {
    "restartPolicy": "Never", "terminationGracePeriodSeconds": 1,
    "securityContext": {
        "runAsUser": 65532, "runAsGroup": 65532, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"},
    },
}  # fmt: skip
RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

SERVER = f"""
import base64, http.server
WANTED = "Basic " + base64.b64encode({":".join(ACCOUNT)!r}.encode()).decode()
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") == WANTED
        said = (b"3.17.2" if self.path == "/version" else b'{{"experiments": []}}') if known else b"You are not authenticated."
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    do_GET = do_POST = answer
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 5000), Handler).serve_forever()
"""
"""Answers what the check asks MLflow's server, to who knows the password."""


@dataclass(frozen=True)
class Cluster:
    """Kubernetes' API by its paths; what is not there is {}."""

    core: CoreV1Api

    def _ask(self, method: str, path: str, body: Json | None = None) -> Json:
        way = {"response_type": "object", "auth_settings": ["BearerToken"], "_return_http_data_only": True}
        try:
            return dict(self.core.api_client.call_api(path, method, body=body, **way))
        except ApiException as error:
            if error.status != 404 or method == "POST":
                raise
            return {}

    get, post, delete = partialmethod(_ask, "GET"), partialmethod(_ask, "POST"), partialmethod(_ask, "DELETE")


@dataclass(kw_only=True)
class Space:
    """A namespace with all that a run needs, and the variables that say so."""

    cluster: Cluster
    namespace: str
    image: str
    variables: dict[str, str] = field(default_factory=dict)

    def make(self, item: Json) -> None:
        """An object of the namespace."""
        group = item["apiVersion"]
        prefix = f"/apis/{group}" if "/" in group else f"/api/{group}"
        kind = {"NetworkPolicy": "networkpolicies"}.get(item["kind"], f"{item['kind'].lower()}s")
        self.cluster.post(f"{prefix}/namespaces/{self.namespace}/{kind}", item)

    def at(self, path: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/{path}"

    def secret(self, name: str, **values: str) -> None:
        self.make({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values})

    def pod(self, name: str, container: Json, **spec: object) -> None:
        main_container = {"name": "main", "image": self.image, "securityContext": RESTRICTED, **container}
        labels = {"app.kubernetes.io/name": name}
        made = {"metadata": {"name": name, "labels": labels}, "spec": {**POD, "containers": [main_container], **spec}}
        self.make({"apiVersion": "v1", "kind": "Pod", **made})

    def until(self, path: str, wanted: Callable[[Json], object], seconds: float = 120) -> bool:
        """Whether the object is as wanted within the time; one that is gone is {}."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if wanted(self.cluster.get(path)):
                return True
            time.sleep(1)
        return False

    def pods(self) -> list[str]:
        """Names of the pods that a check has left."""
        items = self.cluster.get(self.at("pods"))["items"]
        names = (item["metadata"]["name"] for item in items if not item["metadata"].get("deletionTimestamp"))
        return [name for name in names if name.startswith(probe.PREFIX)]


@pytest.fixture(scope="module")
def kubeconfig() -> str:
    for name in ("FFN_CLUSTER_KUBECONFIG", "FFN_IMAGE"):
        if not os.environ.get(name):
            pytest.skip(f"{name} is not set")
    return os.environ["FFN_CLUSTER_KUBECONFIG"]


@pytest.fixture(scope="module")
def space(kubeconfig: str) -> Iterator[Space]:
    """The namespace, for all tests of this file: each leaves it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", kubeconfig)
        cluster = Cluster(CoreV1Api(kube.connect()))
    name = f"check-{secrets.token_hex(3)}"
    labels = {"pod-security.kubernetes.io/enforce": "baseline", "pod-security.kubernetes.io/warn": "restricted"}
    cluster.post("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    space = Space(cluster=cluster, namespace=name, image=os.environ["FFN_IMAGE"])
    try:
        space.variables = {
            "KUBECONFIG": kubeconfig, "FFN_KFP_NAMESPACE": name, "FFN_KFP_URL": os.environ.get("FFN_KFP_URL", ""),
            "FFN_IMAGE": space.image, "FFN_GPUS": "0", "FFN_CPU": "500m", "FFN_MEMORY": "2Gi", "FFN_SHM": "64Mi",
            "FFN_LIGHT_CPU": "1", "FFN_LIGHT_MEMORY": "3Gi", "FFN_MLFLOW_SECRET": "mlflow",
            "FFN_CHECKPOINTS": "/mnt/checkpoints", "FFN_CHECKPOINTS_CLAIM": "states",
            "MLFLOW_TRACKING_URI": f"http://mlflow.{name}:5000",
        }  # fmt: skip
        assert space.until(space.at("serviceaccounts/default"), bool)
        for item in yaml.safe_load_all((ROOT / "k8s/runs/account.yaml").read_text()):
            space.make(item)
        space.secret("mlpipeline-minio-artifact", accesskey="k", secretkey="s")  # as KFP has it in every namespace with runs
        space.secret("mlflow", MLFLOW_TRACKING_USERNAME=ACCOUNT[0], MLFLOW_TRACKING_PASSWORD=ACCOUNT[1])
        space.pod("mlflow", {"command": ["python3", "-c", SERVER]})
        space.make({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "mlflow"},
            "spec": {"selector": {"app.kubernetes.io/name": "mlflow"}, "ports": [{"port": 5000}]},
        })  # fmt: skip
        claim(space, "states")
        assert space.until(space.at("pods/mlflow"), lambda pod: pod["status"]["phase"] == "Running", 300)
        yield space
    finally:
        cluster.delete(f"/api/v1/namespaces/{name}")


def claim(space: Space, name: str, storage_class: str | None = None) -> None:
    spec: Json = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    space.make({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec})


@pytest.fixture
def check(space: Space, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """What the check says of this space: lines that are no `ok`, but for those of the whole cluster."""

    def run(variables: Mapping[str, str] = {}, *, all: bool = False) -> list[str]:
        for name in [name for name in os.environ if name.startswith(("FFN_", "MLFLOW_", "AWS_")) and "_CLUSTER_" not in name]:
            monkeypatch.delenv(name)
        for name, value in {**space.variables, **variables}.items():
            monkeypatch.setenv(name, value)
        status = main(["cluster", "check"])
        lines = capsys.readouterr().out.splitlines()
        assert status == any(line.startswith("FAILED") for line in lines)
        assert space.pods() == []
        if not space.variables["FFN_KFP_URL"]:
            lines = [line for line in lines if "Kubeflow Pipelines" not in line]
        # Of a KFP without profiles no run comes here.
        lines = [line for line in lines if "Argo's retries" not in line and "has no profiles" not in line]
        return lines if all else [line for line in lines if not line.startswith("ok")]

    return run


Check = Callable[..., list[str]]


@pytest.fixture(scope="module")
def handed_over(space: Space) -> None:
    """The states' volume belongs to the steps' group, as k8s/components/volume has it."""
    # A volume that another pod holds is not handed over.
    assert space.until(space.at("pods"), lambda pods: not [pod for pod in pods["items"] if pod["metadata"]["name"] != "mlflow"])
    volume = {"name": "states", "persistentVolumeClaim": {"claimName": "states"}}
    mounted = {"command": ["sh", "-euc", "touch /mnt/states/x"], "volumeMounts": [{"name": "states", "mountPath": "/mnt/states"}]}
    security = {**POD["securityContext"], "fsGroup": 65532}  # type: ignore[dict-item]
    space.pod("hand-over", mounted, volumes=[volume], securityContext=security)
    if not space.until(space.at("pods/hand-over"), lambda pod: pod["status"]["phase"] in ("Succeeded", "Failed")):
        pytest.skip("no volume for a claim with ReadWriteMany of the default storage class")
    assert space.cluster.get(space.at("pods/hand-over"))["status"]["phase"] == "Succeeded"
    space.cluster.delete(space.at("pods/hand-over"))


def test_a_fresh_volume_is_not_the_steps(space: Space, check: Check) -> None:
    """Runs first: afterwards the volume is handed over."""
    said = check()
    if any("found no node" in line for line in said):
        pytest.skip("no volume for a claim with ReadWriteMany of the default storage class")
    (line,) = said
    assert line.startswith("FAILED  In a pod, states: /mnt/checkpoints belongs to 0:")
    assert "steps are 65532:65532" in line


@pytest.mark.usefixtures("handed_over")
class TestWithAVolume:
    def test_all_is_well(self, check: Check) -> None:
        lines = check(all=True)
        assert [line for line in lines if not line.startswith("ok")] == []
        assert "ok      In a pod, states: /mnt/checkpoints, written to as 65532:65532" in lines
        assert "ok      MLflow 3.17.2" in lines

    def test_a_key_that_a_secret_lacks(self, space: Space, check: Check) -> None:
        space.secret("half", MLFLOW_TRACKING_USERNAME="u")
        failed, untried = check({"FFN_MLFLOW_SECRET": "half"})
        assert failed.startswith(f"FAILED  Secret half in {space.namespace} lacks MLFLOW_TRACKING_PASSWORD: kubectl -n")
        assert "was not tried" in untried

    def test_a_wrong_password(self, space: Space, check: Check) -> None:
        space.secret("wrong", MLFLOW_TRACKING_USERNAME="pipeline", MLFLOW_TRACKING_PASSWORD="wrong")
        (line,) = check({"FFN_MLFLOW_SECRET": "wrong"})
        assert line.startswith("FAILED  In a pod, MLflow:")
        assert "401" in line
        assert "FFN_MLFLOW_SECRET names (now wrong)" in line

    def test_a_name_that_does_not_resolve(self, check: Check) -> None:
        (line,) = check({"MLFLOW_TRACKING_URI": "http://mlflow.nowhere-at-all:5000"})
        assert "set MLFLOW_TRACKING_URI to a name within the cluster" in line

    def test_a_network_rule_that_closes_the_way_to_mlflow(self, space: Space, check: Check) -> None:
        rule: Json = {
            "podSelector": {"matchExpressions": [{"key": probe.WORKFLOW_LABEL, "operator": "Exists"}]},
            "policyTypes": ["Egress"],
            "egress": [
                {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]}
            ],
        }
        space.make({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "closed"}, "spec": rule})
        try:
            said = check()
        finally:
            space.cluster.delete(f"/apis/networking.k8s.io/v1/namespaces/{space.namespace}/networkpolicies/closed")
        if not said:
            pytest.skip("nothing enforces network policies in this cluster")
        (line,) = said
        assert line.startswith("FAILED  In a pod, MLflow:")
        assert "the network rules of" in line

    def test_an_image_that_is_not_there(self, space: Space, check: Check) -> None:
        (line,) = check({"FFN_IMAGE": f"{space.image.partition('@')[0]}@sha256:{'0' * 64}"})
        assert line.startswith("FAILED  A pod like a step's cannot be pulled:")
        assert "no such image there" in line

    def test_a_registry_that_is_not_there(self, check: Check) -> None:
        (line,) = check({"FFN_IMAGE": f"127.0.0.1:1/ffn@sha256:{'0' * 64}"})
        assert line.startswith("FAILED  A pod like a step's cannot be pulled:")
        assert "see that nodes reach the registry" in line

    def test_no_node_of_that_kind(self, check: Check) -> None:
        nodes, pod = check({"FFN_NODE_SELECTOR": "ffn.example/nowhere=here"})
        assert "has the labels ffn.example/nowhere=here" in nodes
        assert pod.startswith("FAILED  A pod like a step's found no node: 0/")
        assert "FFN_NODE_SELECTOR" in pod

    def test_ctrl_c_deletes_the_pod(self, space: Space) -> None:
        environment = {**os.environ, **space.variables, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "pipeline.cli", "cluster", "check"]
        for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 130)):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
            end = time.monotonic() + 60
            while not space.pods() and time.monotonic() < end:
                time.sleep(0.2)
            assert space.pods()
            process.send_signal(number)
            process.communicate(timeout=60)
            assert process.returncode == expected
            assert space.pods() == []

    def test_who_may_only_look_at_pods(self, space: Space, check: Check, tmp_path: Path) -> None:
        """Neither nodes nor Secrets nor reviews: the pod's account asks what it may do."""
        config = person(space, tmp_path, [{"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "get", "delete"]}])
        said = check({"KUBECONFIG": str(config)})
        assert not [line for line in said if line.startswith("FAILED")]
        assert "warning Nodes could not be looked at: it takes the right to list nodes" in said
        lines = check({"KUBECONFIG": str(config)}, all=True)
        assert any(line.startswith("ok      ServiceAccount ffn-pipeline") and "may do what" in line for line in lines)

    def test_who_may_do_nothing(self, space: Space, check: Check, tmp_path: Path) -> None:
        config = person(space, tmp_path, [])
        said = check({"KUBECONFIG": str(config)})
        assert not [line for line in said if line.startswith("FAILED")]
        assert any(line.startswith("warning A pod like a step's was not tried") for line in said)


@contextmanager
def limited(space: Space, kind: str, spec: Json) -> Iterator[None]:
    """The space with a quota or a limit range, once it counts."""
    space.make({"apiVersion": "v1", "kind": kind, "metadata": {"name": "small"}, "spec": spec})
    try:
        if kind == "ResourceQuota":
            counted = space.until(space.at("resourcequotas/small"), lambda quota: "used" in quota.get("status", {}))
            assert counted
        time.sleep(2)  # admissions see it when their caches do
        yield
    finally:
        space.cluster.delete(space.at(f"{kind.lower()}s/small"))


def person(space: Space, folder: Path, rules: list[Json]) -> Path:
    """The kubeconfig of somebody with those rights in the space and no other."""
    name = f"person-{secrets.token_hex(2)}"
    space.make({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
    if rules:
        rbac = "rbac.authorization.k8s.io"
        space.make({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": name}, "rules": rules})
        space.make({
            "apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": {"name": name},
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": space.namespace}],
        })  # fmt: skip
    token = space.cluster.post(space.at(f"serviceaccounts/{name}/token"), {"spec": {"expirationSeconds": 3600}})["status"]["token"]
    authority = space.cluster.get(space.at("configmaps/kube-root-ca.crt"))["data"]["ca.crt"]
    server = space.cluster.core.api_client.configuration.host
    there = {"server": server, "certificate-authority-data": b64encode(authority.encode()).decode()}
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "space",
        "clusters": [{"name": "space", "cluster": there}], "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": "space", "context": {"cluster": "space", "user": name}}],
    }  # fmt: skip
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


UNTRIED = {"FFN_CHECKPOINTS_CLAIM": "none"}
"""A claim that is not there: no pod is made."""


def test_nodes_that_are_too_small(check: Check) -> None:
    assert any("none has cpu 500m and memory 900Ti to give" in line for line in check({**UNTRIED, "FFN_MEMORY": "900Ti"}))
    said = check({**UNTRIED, "FFN_GPUS": "1", "FFN_GPU": "example.com/none-such"})
    assert any("offers example.com/none-such: install the vendor's device plugin" in line for line in said)


def test_a_quota_that_never_admits_a_training(space: Space, check: Check) -> None:
    with limited(space, "ResourceQuota", {"hard": {"pods": "0", "requests.memory": "1Gi"}}):
        said = check(UNTRIED)
    assert any("never admits a training: pods 0, it asks for 1; requests.memory 1Gi, it asks for 2Gi" in line for line in said)
    with limited(space, "ResourceQuota", {"hard": {"pods": "0"}}):
        said = check(UNTRIED)
    assert any("A training's pod would be refused: exceeded quota: small" in line for line in said)


def test_a_quota_without_room(space: Space, check: Check) -> None:
    with limited(space, "ResourceQuota", {"hard": {"pods": "4"}}):
        said = check(UNTRIED)
    assert any("has room for 2 trainings now (pods: 1 of 4 used), a protocol starts 4 at once" in line for line in said)


def test_a_quota_on_limits_refuses_argos_containers(space: Space, check: Check) -> None:
    with limited(space, "ResourceQuota", {"hard": {"limits.cpu": "100"}}):
        said = check(UNTRIED)
    assert any("must specify limits.cpu for: init,wait" in line and "a LimitRange" in line for line in said)


def test_a_limit_range_below_a_training(space: Space, check: Check) -> None:
    with limited(space, "LimitRange", {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]}):
        said = check(UNTRIED)
    assert any("a training with memory 2Gi (at most 1Gi a Container)" in line for line in said)
    assert any("maximum memory usage per Container is 1Gi" in line for line in said)


def test_names_that_are_not_there(space: Space, check: Check) -> None:
    said = check({
        "FFN_SERVICE_ACCOUNT": "nobody", "FFN_MLFLOW_SECRET": "none", "FFN_PULL_SECRET": "mlflow", "FFN_CA": "none",
        "FFN_DATA_CLAIM": "none",
    })  # fmt: skip
    text = "\n".join(said)
    for expected in (
        f"ServiceAccount nobody in {space.namespace} is not there", f"Secret none in {space.namespace} is not there",
        f"Secret mlflow in {space.namespace} is of type Opaque", f"ConfigMap none in {space.namespace} is not there",
        f"PersistentVolumeClaim none in {space.namespace} is not there",
        "A light step's pod would be refused: error looking up service account",
    ):  # fmt: skip
        assert f"FAILED  {expected}" in text


def test_a_claim_that_nothing_binds(space: Space, check: Check) -> None:
    claim(space, "unbound", "none-such")
    failed, untried = check({"FFN_CHECKPOINTS_CLAIM": "unbound"})
    assert failed.startswith(f"FAILED  PersistentVolumeClaim unbound in {space.namespace} is Pending: no volume is bound to it")
    assert "was not tried" in untried


def test_an_account_that_may_too_little_and_one_that_may_too_much(space: Space, check: Check) -> None:
    space.make({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "poor"}})
    space.make({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "rich"}})
    rbac = "rbac.authorization.k8s.io"
    space.make({
        "apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": "rich"},
        "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}],
    })  # fmt: skip
    space.make({
        "apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": {"name": "rich"},
        "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "rich"},
        "subjects": [{"kind": "ServiceAccount", "name": "rich", "namespace": space.namespace}],
    })  # fmt: skip
    for account, expected in (
        ("poor", "may not create workflowtaskresults"),
        ("rich", "may create pods, get secrets, list secrets"),
    ):
        said = check({**UNTRIED, "FFN_SERVICE_ACCOUNT": account})
        assert any(account in line and expected in line for line in said)


def test_pod_security_refuses_a_pod_and_warns_of_another(space: Space) -> None:
    pod = probe.train(Settings(image=space.image, gpus=0), name=probe.name(), account="ffn-pipeline")
    outcome, _ = probe.dry_run(space.cluster.core, space.namespace, pod)
    (fine,) = admitted("It", outcome, kube.warnings(space.cluster.core.api_client), space.namespace)
    assert fine.line == "ok      It is admitted"
    container = pod["spec"]["containers"][1]
    container["securityContext"] = {"runAsUser": 0}
    outcome, _ = probe.dry_run(space.cluster.core, space.namespace, pod)
    (warned,) = admitted("It", outcome, kube.warnings(space.cluster.core.api_client), space.namespace)
    assert 'would violate PodSecurity "restricted:latest"' in warned.line
    container["securityContext"] = {"privileged": True}
    outcome, _ = probe.dry_run(space.cluster.core, space.namespace, pod)
    (refused,) = admitted("It", outcome, kube.warnings(space.cluster.core.api_client), space.namespace)
    assert refused.line.startswith('FAILED  It would be refused: violates PodSecurity "baseline:latest"')


def test_a_namespace_that_is_not_there(check: Check) -> None:
    (line,) = check({"FFN_KFP_NAMESPACE": "none-such"})
    assert line.startswith("FAILED  Namespace none-such is not there")
