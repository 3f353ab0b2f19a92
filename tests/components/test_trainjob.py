"""A training by a TrainJob, against an API server that records what it is asked and runs the job's first process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from components import tracking
from components.train import step, trainjob
from components.train.trainjob import Cluster, TrainJobFailed
from ffn import config
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.training import Epoch, train
from tests.components.conftest import TINY

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
SPEC = {
    "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "ffn"},
    "trainer": {"image": "ffn@sha256:0", "numNodes": 2, "numProcPerNode": 1, "resourcesPerNode": {"limits": {"cpu": "8"}}},
}


class FakeKubernetes:
    """TrainJobs, each with one pod whose log is what its command says here."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.log: list[str] = []
        self.tokens: set[str] = set()
        self.troubles: list[int] = []
        self.cut = 0
        """Lines after which a log's connection breaks, once."""
        self.runs = True
        """Whether a job that is made runs; else it goes on for ever."""
        self.outcome = "Complete"
        self.processes = 1

    def make(self, body: dict[str, Any]) -> None:
        self.jobs[body["metadata"]["name"]] = body
        if self.outcome == "Failed":
            body["status"] = {"conditions": [{"type": "Failed", "status": "True", "message": "as told"}]}
        elif self.runs:
            threading.Thread(target=self._run, args=(body,), daemon=True).start()

    def _run(self, body: dict[str, Any]) -> None:
        torchrun, *command = body["spec"]["trainer"]["command"]
        assert torchrun == "torchrun"
        if self.processes > 1:
            command = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], env=environment, text=True, capture_output=True, check=False)
        self.log = done.stdout.splitlines()
        how = "Complete" if done.returncode == 0 else "Failed"
        body["status"] = {"conditions": [{"type": how, "status": "True", "message": done.stderr.strip()}]}

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        name = path.removeprefix(JOBS).strip("/")
        if path == "/api/v1/namespaces/team/pods":
            job = query["labelSelector"].split(",")[0].removeprefix("jobset.sigs.k8s.io/jobset-name=")
            pod = {"metadata": {"name": f"{job}-node-0-0", "creationTimestamp": "1"}, "status": {"phase": "Running"}}
            return 200, {"items": [pod] if self.log else []}
        if path.endswith("/log"):
            return 200, self.log
        if method == "POST":
            if body["metadata"]["name"] in self.jobs:
                return 409, {"message": "already exists"}
            self.make(body)
            return 201, body
        if name not in self.jobs:
            return 404, {"message": "not found"}
        return 200, self.jobs.pop(name) if method == "DELETE" else self.jobs[name]


@pytest.fixture
def kube() -> FakeKubernetes:
    return FakeKubernetes()


@pytest.fixture
def cluster(kube: FakeKubernetes, tmp_path: Path) -> Iterator[Cluster]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            split = urlsplit(self.path)
            kube.asked.append(f"{self.command} {split.path}")
            kube.tokens.add(self.headers["Authorization"])
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
            status, answer = kube.troubles.pop(0) if kube.troubles else 0, {"message": "trouble"}
            if not status:
                status, answer = kube.answer(self.command, split.path, {k: v[0] for k, v in parse_qs(split.query).items()}, body)
            self.send_response(status)
            content = "".join(f"{line}\n" for line in answer) if isinstance(answer, list) else json.dumps(answer)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if isinstance(answer, list) and kube.cut:
                content, kube.cut = "".join(f"{line}\n" for line in answer[: kube.cut]), 0
            self.wfile.write(content.encode())

        do_GET = do_POST = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            pass

    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text("t\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield Cluster(url=f"http://127.0.0.1:{server.server_address[1]}", namespace="team", account=account, poll=0.05, silence=1.0)
    server.shutdown()
    server.server_close()
    thread.join()


RECIPE = config.override(config.preset("S4"), TINY)


def by_job(cluster: Cluster, data: SkeletonSet, root: Path, heard: list[Epoch] | None = None) -> None:
    trainjob.train(
        data.path, protocol="p", stream="j", config=RECIPE, key="0123456789abcdef", out=root / "out", state_dir=root / "states",
        on_epoch=(heard if heard is not None else []).append, spec=SPEC, cluster=cluster,
    )  # fmt: skip


@pytest.mark.slow
def test_the_step_trains_by_a_job_as_it_would_itself(
    kube: FakeKubernetes, cluster: Cluster, toy: SkeletonSet, tmp_path: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFN_TRAINJOB", json.dumps(SPEC))
    monkeypatch.setattr(Cluster, "inside", lambda: cluster)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kube.processes, kube.troubles, kube.cut = 2, [503, 500], 1
    parent = tracking.begin("demo", {})
    step.run(
        data=toy.path, protocol="p", stream="j", preset="S4", seed=0, overrides=TINY, checkpoints=tmp_path / "states",
        parent=parent, out=tmp_path / "out",
    )  # fmt: skip
    (run,) = store.search_runs([store.get_run(parent).info.experiment_id], "tags.`ffn.step` = 'train'")
    assert [point.step for point in store.get_metric_history(run.info.run_id, "train_loss")] == [1, 2]
    here = train(
        toy, protocol="p", stream="j", config=config.recipe("S4", TINY, 0), out=tmp_path / "here", state_dir=tmp_path / "other",
        progress=False,
    )  # fmt: skip
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (here, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(theirs[name], tensor, rtol=1e-3, atol=1e-4, err_msg=name)
    assert kube.jobs == {}
    assert kube.tokens == {"Bearer t"}
    assert list((tmp_path / "states").glob("trainjobs/*")) == [tmp_path / "states" / "trainjobs" / f"{toy.digest}.arrow"]


def test_a_job_that_goes_on_is_taken_up(kube: FakeKubernetes, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    kube.runs = False
    body = trainjob.manifest("ffn-k", Path("/mnt/checkpoints/trainjobs/k"), SPEC)
    kube.make(body)
    cluster.launch(body)
    assert capsys.readouterr().out == "ffn: TrainJob ffn-k goes on\n"
    assert kube.asked == [f"POST {JOBS}", f"GET {JOBS}/ffn-k"]
    body["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
    cluster.launch({**body, "status": {}})
    assert capsys.readouterr().out == "ffn: TrainJob ffn-k launched\n"
    assert f"DELETE {JOBS}/ffn-k" in kube.asked


def test_a_job_asks_for_nodes_and_runs_torchrun() -> None:
    body = trainjob.manifest("ffn-k", Path("/mnt/checkpoints/trainjobs/k"), SPEC)
    assert (body["apiVersion"], body["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert body["spec"]["runtimeRef"]["name"] == "ffn"
    assert body["spec"]["trainer"]["numNodes"] == 2
    assert body["spec"]["trainer"]["command"] == ["torchrun", "-m", "components.train.node", "/mnt/checkpoints/trainjobs/k"]


def test_what_was_heard_is_not_heard_again(kube: FakeKubernetes, cluster: Cluster) -> None:
    kube.runs = False
    kube.make({"metadata": {"name": "ffn-k"}})
    heard: list[str] = []

    def hear(line: str) -> None:
        heard.append(line)
        if line == "b":
            kube.log.append("c")
            kube.jobs["ffn-k"]["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}

    kube.log = ["a", "b"]
    kube.cut = 1
    cluster.follow("ffn-k", hear)
    assert heard[:2] == ["a", "b"]
    assert len(heard) == len(set(heard))


def test_a_failed_job_fails_the_step_and_is_cleared_away(
    kube: FakeKubernetes, cluster: Cluster, toy: SkeletonSet, tmp_path: Path
) -> None:
    kube.outcome = "Failed"
    with pytest.raises(TrainJobFailed, match="TrainJob ffn-0123456789abcdef failed: as told"):
        by_job(cluster, toy, tmp_path)
    assert kube.jobs == {}
    assert not (tmp_path / "out").exists()


def test_a_step_that_may_do_nothing_says_what_it_wanted_first(
    kube: FakeKubernetes, cluster: Cluster, toy: SkeletonSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kube.troubles = [403, 403]
    with pytest.raises(FFNError, match=f"the cluster refuses POST {JOBS[1:]}: 403"):
        by_job(cluster, toy, tmp_path)
    assert "TrainJob ffn-0123456789abcdef was not deleted: the cluster refuses DELETE" in capsys.readouterr().out


def test_a_cluster_without_trainer_is_named(kube: FakeKubernetes, cluster: Cluster) -> None:
    kube.troubles = [404]
    with pytest.raises(FFNError, match="404 trouble; is Kubeflow Trainer installed"):
        cluster.launch(trainjob.manifest("ffn-k", Path("/x"), SPEC))


def test_outside_of_a_cluster_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(FFNError, match="FFN_TRAINJOB is set outside of a cluster"):
        Cluster.inside()


def test_a_cancelled_step_takes_its_job_with_it(kube: FakeKubernetes, cluster: Cluster, toy: SkeletonSet, tmp_path: Path) -> None:
    kube.runs = False
    code = f"""
from pathlib import Path
from components import step
from components.train import trainjob
from tests.components.test_trainjob import RECIPE, SPEC
cluster = trainjob.Cluster(url={cluster.url!r}, namespace="team", account=Path({str(cluster.account)!r}), poll=0.05)
step(lambda: trainjob.train(
    Path({str(toy.path)!r}), protocol="p", stream="j", config=RECIPE, key="k", out=Path({str(tmp_path / "out")!r}),
    state_dir=Path({str(tmp_path / "states")!r}), on_epoch=print, spec=SPEC, cluster=cluster))()
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "ffn-k" not in kube.jobs:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert kube.jobs == {}
