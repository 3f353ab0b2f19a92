"""Training over several nodes: a TrainJob of Kubeflow Trainer, launched and followed by the train step.

The job's pods find the recordings, and leave states and checkpoint, under the folder of states, which is a volume that all
of them and the step mount. torchrun makes them one training (`components/train/node.py`). The job is named by the training's
key: a step that runs again finds the job that goes on.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import requests

from components import say
from ffn.checkpoint import publishing_folder
from ffn.config import Config, to_dict
from ffn.data.store import SkeletonSet, publishing
from ffn.errors import FFNError
from ffn.training import Epoch

Json = dict[str, Any]

ASKED = "FFN_TRAINJOB"
"""Variable with what the compiled pipeline asks of the job: `runtimeRef` and `trainer` of its spec, as JSON."""

API = "apis/trainer.kubeflow.org/v1alpha1"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EPOCH = "ffn-epoch "
"""Begins the line in which the first process tells of an epoch."""

PATIENCE_SECONDS = 600.0
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


class TrainJobFailed(Exception):
    """The job ended without a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The Kubernetes API, as a pod finds it."""

    url: str
    namespace: str
    account: Path = ACCOUNT
    poll: float = 5.0
    """Seconds between two looks."""
    silence: float = 60.0
    """Seconds without a line of log after which the job is looked at."""

    @classmethod
    def inside(cls) -> Self:
        """The cluster this pod runs in. Raises `FFNError` outside of one."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (ACCOUNT / "namespace").is_file():
            raise FFNError(f"{ASKED} is set outside of a cluster: only a pod with a service account launches a TrainJob")
        return cls(
            url=f"https://{f'[{host}]' if ':' in host else host}:{port}", namespace=(ACCOUNT / "namespace").read_text().strip()
        )

    def launch(self, body: Json) -> None:
        """Create the job, or take up the one of its name; one that failed before is replaced."""
        name = body["metadata"]["name"]
        while self._ask("POST", f"{API}/namespaces/{self.namespace}/trainjobs", body=body).status_code == 409:
            found = self.job(name)
            if found is not None and "Failed" not in ended(found) and not found["metadata"].get("deletionTimestamp"):
                say(f"TrainJob {name} goes on")
                return
            self.delete(name)
            time.sleep(self.poll)
        say(f"TrainJob {name} launched")

    def job(self, name: str) -> Json | None:
        answer = self._ask("GET", f"{API}/namespaces/{self.namespace}/trainjobs/{name}")
        return None if answer.status_code == 404 else answer.json()

    def delete(self, name: str) -> None:
        """Delete the job with its pods; gone already is done."""
        self._ask("DELETE", f"{API}/namespaces/{self.namespace}/trainjobs/{name}", params={"propagationPolicy": "Foreground"})

    def follow(self, name: str, hear: Callable[[str], None]) -> None:
        """Pass on what the first process says until the job is complete. Raises `TrainJobFailed`."""
        heard: dict[str, int] = {}
        while True:
            job = self.job(name)
            if job is None:
                raise TrainJobFailed(f"TrainJob {name} was deleted")
            for pod in self._first_pods(name):
                for number, line in enumerate(self._log(pod)):
                    if number >= heard.get(pod, 0):
                        heard[pod] = number + 1
                        hear(line)
            how = ended(job)
            if "Complete" in how:
                return
            if "Failed" in how:
                raise TrainJobFailed(f"TrainJob {name} failed: {how['Failed']}")
            time.sleep(self.poll)

    def _first_pods(self, name: str) -> list[str]:
        """Pods of the first node that have begun, the newest last."""
        chosen = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"
        pods = self._ask("GET", f"api/v1/namespaces/{self.namespace}/pods", params={"labelSelector": chosen}).json()["items"]
        begun = [pod["metadata"] for pod in pods if pod["status"].get("phase") in ("Running", "Succeeded", "Failed")]
        return [pod["name"] for pod in sorted(begun, key=lambda pod: str(pod.get("creationTimestamp")))]

    def _log(self, pod: str) -> Iterator[str]:
        """The pod's log from its beginning, as long as lines come."""
        try:
            answer = self._ask("GET", f"api/v1/namespaces/{self.namespace}/pods/{pod}/log", params={"follow": "true"}, stream=True)
            if answer.ok:
                for line in answer.iter_lines(decode_unicode=True):
                    yield line if isinstance(line, str) else line.decode(errors="replace")
        except requests.RequestException:
            return  # silent for long, or cut off: it is read again, and what was heard is skipped

    def _ask(
        self, method: str, path: str, *, body: Json | None = None, params: Mapping[str, str] | None = None, stream: bool = False
    ) -> requests.Response:
        """An answer that says something: 2xx, 404 or 409. Every request may be sent twice: names are fixed.

        Raises `FFNError` for what no retry mends.
        """
        until, pause = time.monotonic() + PATIENCE_SECONDS, self.poll / 4
        while True:
            trouble = ""
            try:
                answer = requests.request(
                    method, f"{self.url}/{path}", json=body, params=params, stream=stream, timeout=(10, self.silence),
                    headers={"Authorization": f"Bearer {(self.account / 'token').read_text().strip()}"},
                    verify=str(self.account / "ca.crt") if self.url.startswith("https:") else True,
                )  # fmt: skip
            except requests.RequestException as error:
                trouble = type(error).__name__
            else:
                if answer.ok or (answer.status_code in (404, 409) and not (method == "POST" and answer.status_code == 404)):
                    return answer
                trouble = f"{answer.status_code} {_said(answer)}"
                if answer.status_code not in TRANSIENT:
                    hint = "; is Kubeflow Trainer installed?" if answer.status_code == 404 else ""
                    raise FFNError(f"the cluster refuses {method} {path}: {trouble}{hint}")
            if time.monotonic() > until:
                raise FFNError(f"the cluster does not answer {method} {path}: {trouble}")
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def asked() -> Json | None:
    """What the compiled pipeline asks of a TrainJob; None where a training is the step's own process."""
    text = os.environ.get(ASKED)
    return json.loads(text) if text else None


def train(
    data: Path, *, protocol: str, stream: str, config: Config, key: str, out: Path, state_dir: Path,
    on_epoch: Callable[[Epoch], None], spec: Json, cluster: Cluster | None = None,
) -> None:  # fmt: skip
    """As `ffn.training.train`, by a TrainJob of `spec`: the checkpoint is in `out`, states are under `state_dir`.

    Left before its end, by SIGTERM or an error, the job is deleted; its states stay. Raises `TrainJobFailed`, `FFNError`.
    """
    cluster = cluster or Cluster.inside()
    folder, name = state_dir / "trainjobs" / key, f"ffn-{key[:20]}"
    folder.mkdir(parents=True, exist_ok=True)
    shared = state_dir / "trainjobs" / f"{SkeletonSet.open(data).digest}.arrow"
    if not shared.exists():
        with publishing(shared) as partial:
            shutil.copyfile(data, partial)
    task = {"data": str(shared), "protocol": protocol, "stream": stream, "config": to_dict(config), "state_dir": str(state_dir)}
    with publishing(folder / "task.json") as partial:
        partial.write_text(json.dumps(task))

    def hear(line: str) -> None:
        if line.startswith(EPOCH):
            on_epoch(Epoch(**json.loads(line.removeprefix(EPOCH))))
        else:
            print(line, flush=True)

    try:
        cluster.launch(manifest(name, folder, spec))
        cluster.follow(name, hear)
        if not (folder / "out").is_dir():
            raise TrainJobFailed(f"TrainJob {name} is complete without a checkpoint in {folder / 'out'}")
        with publishing_folder(out) as partial:
            shutil.copytree(folder / "out", partial, dirs_exist_ok=True)
    finally:
        _let_go(cluster, name)
    shutil.rmtree(folder, ignore_errors=True)


def _let_go(cluster: Cluster, name: str) -> None:
    """Delete the job; where the cluster does not let us, that is said, and what went wrong before is what the step ends with."""
    try:
        cluster.delete(name)
    except FFNError as error:
        say(f"TrainJob {name} was not deleted: {error}")


def manifest(name: str, folder: Path, spec: Json) -> Json:
    """The TrainJob called `name` that does what `folder` says."""
    trainer = {**spec["trainer"], "command": ["torchrun", "-m", "components.train.node", str(folder)]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "ffn", "app.kubernetes.io/component": "train"}},
        "spec": {"runtimeRef": spec["runtimeRef"], "trainer": trainer},
    }


def ended(job: Json) -> dict[str, str]:
    """Conditions that hold -> what they say."""
    conditions = job.get("status", {}).get("conditions") or []
    return {each["type"]: str(each.get("message", "")) for each in conditions if each.get("status") == "True"}


def tell(epoch: Epoch) -> None:
    """Say an epoch so that the step that follows understands it."""
    print(f"{EPOCH}{json.dumps(asdict(epoch))}", flush=True)


def _said(answer: requests.Response) -> str:
    try:
        return str(answer.json().get("message"))
    except ValueError:
        return answer.reason or ""
