"""A real cluster as a person sees it: the command line, KFP's API, MLflow, kubectl's rights."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from ffn.config import digest
from pipeline.server import Json, Server, equals

T = TypeVar("T")

NEEDED = {
    "FFN_CLUSTER_RECORDINGS": "a place in an object store for the tests' recordings, s3://BUCKET/PREFIX",
    "FFN_CLUSTER_S3_URL": "that store's address from here (its keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
    "FFN_CHECKPOINTS": "where trainings keep their states, as pods reach it: s3://BUCKET/PREFIX, or a volume's folder",
    "FFN_CLUSTER_PROMOTER": "MLflow's account that makes champions, as NAME:PASSWORD",
    "FFN_IMAGE": "the image of the steps, by digest",
    "FFN_KFP_URL": "KFP's API",
    "FFN_KFP_UI": "KFP's pages",
    "FFN_MLFLOW_UI": "MLflow's address from here (the steps' account: MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)",
    "MLFLOW_TRACKING_URI": "MLflow's address from a pod",
}
"""What the tests ask of the environment, beside a kubeconfig and what `ffn cluster compile` reads."""

SMALL = {
    "FFN_GPUS": "0", "FFN_CPU": "500m", "FFN_MEMORY": "3Gi", "FFN_LIGHT_CPU": "500m", "FFN_LIGHT_MEMORY": "2Gi", "FFN_SHM": "256Mi",
    "FFN_FLOOR": "0.4",
}  # fmt: skip
"""Two cores run the whole of it; of three classes."""

KINDS = ("serviceaccounts", "roles", "rolebindings", "networkpolicies", "resourcequotas", "limitranges", "configmaps", "secrets")
"""What a namespace's owner sets up."""

TINY = (
    "training.epochs=60", "training.batch_size=8", "model.width=16", "model.depths=1", "clip.frames=16", "clip.test_clips=1",
)  # fmt: skip


@dataclass(kw_only=True)
class Lab:
    """What the tests share: a name of their own, a folder, and the cluster."""

    folder: Path
    suffix: str
    server: Server
    namespace: str
    kfp: str = ""
    """The compiled pipeline."""
    made: list[str] = field(default_factory=list)
    """Schedules to end."""
    before: dict[str, str] = field(default_factory=dict)
    """What `elsewhere` said before the first run."""

    def elsewhere(self) -> dict[str, str]:
        """Object of another namespace, and every namespace's labels -> digest of what it says: none of it is a run's business."""
        found = json.loads(self.kubectl("get", f"namespaces,{','.join(KINDS)}", "--all-namespaces", "-o", "json"))["items"]
        said = {}
        for item in found:
            about = item["metadata"]
            space = about.get("namespace", about["name"])
            if item["kind"] == "Namespace" or space != self.namespace:
                own = {key: value for key, value in item.items() if key not in ("metadata", "status")}
                said[f"{space}/{item['kind']}/{about['name']}"] = digest(own, about.get("labels"))
        return {name: what for name, what in said.items() if not name.startswith(f"restricted-{self.suffix}/")}

    @property
    def protocol(self) -> str:
        return f"lab-{self.suffix}"

    @property
    def model(self) -> str:
        return f"ffn-{self.protocol}"

    @property
    def candidates(self) -> str:
        return f"{self.model}-candidates"

    @property
    def promoter(self) -> dict[str, str]:
        """The environment of who makes champions."""
        name, _, password = os.environ["FFN_CLUSTER_PROMOTER"].partition(":")
        here = {"MLFLOW_TRACKING_URI": os.environ["FFN_MLFLOW_UI"], "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false"}
        return here | {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}

    @property
    def environment(self) -> dict[str, str]:
        return {**SMALL, **os.environ, "MLFLOW_EXPERIMENT_NAME": self.protocol, "PYTHONUNBUFFERED": "1"}

    def ffn(self, *arguments: str, status: int | None = 0, timeout: float = 1200) -> str:
        """What the command line says, stdout and stderr; it must end with `status`, if one is given."""
        command = [sys.executable, "-m", "pipeline.cli", *arguments]
        # What is compiled passes on where pods find MLflow; a person's own verbs find it elsewhere.
        here = self.promoter if arguments[0] == "model" else {}
        done = subprocess.run(
            command,
            env={**self.environment, **here},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
        print(f"$ ffn {' '.join(arguments)}\n{done.stdout}", flush=True)
        assert status is None or done.returncode == status, f"ffn {arguments[:2]} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def submit(self, name: str, *more: str, data: str = "good", settings: tuple[str, ...] = (), status: int | None = 0) -> str:
        """Submit the run called `name`; what was said, the run's id first."""
        sets = [part for setting in (*TINY, *settings) for part in ("--set", setting)]
        source = f"{os.environ['FFN_CLUSTER_RECORDINGS'].rstrip('/')}/{self.suffix}/{data}"
        return self.ffn(
            "cluster", "submit", self.kfp, "--data", source, "--data-version", data, *sets, "--experiment", self.protocol,
            "--name", f"{name}-{self.suffix}", *more, status=status,
        )  # fmt: skip

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(["kubectl", "-n", self.namespace, *arguments], text=True, capture_output=True, check=False)
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def pods(self, run: str, step: str = "") -> list[Json]:
        """The run's pods, or those of one step, the oldest first."""
        labels = f"pipeline/runid={run}" + (f",app.kubernetes.io/component={step}" if step else "")
        found = json.loads(self.kubectl("get", "pods", "-l", labels, "-o", "json"))["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def shown(self, run: str, step: str, artifact: str) -> str:
        """What KFP's pages show of an artifact that a step wrote."""
        (main,) = [container for container in self.pods(run, step)[-1]["spec"]["containers"] if container["name"] == "main"]
        words = [*main["command"], *main["args"]]
        told = json.loads(words[words.index("--executor_input") + 1])["outputs"]["artifacts"][artifact]["artifacts"][0]["uri"]
        store, _, place = told.partition("://")
        bucket, _, key = place.partition("/")
        query = {"source": store, "namespace": self.namespace, "bucket": bucket, "key": key}
        answer = requests.get(f"{os.environ['FFN_KFP_UI']}/artifacts/get", params=query, timeout=60)
        answer.raise_for_status()
        return answer.text

    def run(self, run: str) -> Json:
        return self.server.ask(self.server.runs.run_service_get_run, run)

    def runs(self, schedule: str) -> list[Json]:
        """The runs that the schedule made, the oldest first."""
        found = self.server.list(self.server.runs.run_service_list_runs, filter=equals("recurring_run_id", schedule))
        return sorted(found, key=lambda run: str(run["created_at"]))

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(os.environ["FFN_MLFLOW_UI"])

    def champion(self) -> ModelVersion:
        return self.mlflow.get_model_version_by_alias(self.model, "champion")

    def overwrite(self, candidate: str, path: str, content: bytes) -> bytes:
        """Put other content in a file of the candidate's model, with the account of the steps; what it was."""
        where = self.mlflow.get_model_version_download_uri(self.candidates, candidate).removeprefix("mlflow-artifacts:/")
        url = f"{os.environ['FFN_MLFLOW_UI'].rstrip('/')}/api/2.0/mlflow-artifacts/artifacts/{where}/{path}"
        account = (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
        before = requests.get(url, auth=account, timeout=60)
        for answer in (before, requests.put(url, data=content, auth=account, timeout=60)):
            answer.raise_for_status()
        return before.content

    def parent(self, run: str) -> Run:
        """The one MLflow run of a run of KFP's."""
        experiment = self.mlflow.get_experiment_by_name(self.protocol)
        assert experiment
        found = self.mlflow.search_runs([experiment.experiment_id], f"tags.`ffn.run` = '{run}'")
        assert len(found) == 1, [item.info.run_name for item in found]
        return found[0]

    def children(self, parent: Run) -> dict[str, list[Run]]:
        wanted = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        found: dict[str, list[Run]] = {}
        for run in self.mlflow.search_runs([parent.info.experiment_id], wanted):
            found.setdefault(str(run.info.run_name), []).append(run)
        return found

    def restricted(self, run: str) -> list[str]:
        """What Kubernetes has against the run's pods in a namespace that enforces the restricted standard."""
        refused = []
        for pod in self.pods(run):
            spec = {key: value for key, value in pod["spec"].items() if key != "nodeName"}
            plain = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "restricted-"}, "spec": spec}
            spec["serviceAccountName"] = spec["serviceAccount"] = "default"
            spec["volumes"] = [volume for volume in spec["volumes"] if not volume["name"].startswith("kube-api-access")]
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                container["volumeMounts"] = [
                    mount for mount in container.get("volumeMounts", []) if not mount["name"].startswith("kube-api-access")
                ]
            done = subprocess.run(
                ["kubectl", "-n", f"restricted-{self.suffix}", "create", "--dry-run=server", "-f", "-"],
                input=json.dumps(plain), text=True, capture_output=True, check=False,
            )  # fmt: skip
            if done.returncode:
                refused.append(f"{pod['metadata']['name']}: {done.stderr}")
        return refused


def until(what: str, look: Callable[[], T], seconds: float = 300) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(2)
    return found


def first_line(text: str) -> str:
    """The run's id, which a submission says first."""
    return next(line for line in text.splitlines() if not line.startswith("ffn: "))
