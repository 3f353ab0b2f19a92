"""Runs on a real cluster, from recordings to a served champion, and everything that goes wrong on the way.

What to look at when one fails: the last lines of what it printed (they are the command line's own), then `kubectl -n NAMESPACE get
pods -l pipeline/runid=RUN`, then the run in KFP and in MLflow, whose experiment has the name of the protocol, `lab-<six digits>`.
"""

import json
import os
import subprocess
import time

import pytest

from tests.cluster.conftest import upload
from tests.cluster.lab import Lab, first_line, until

pytestmark = pytest.mark.cluster


def test_the_cluster_gives_what_a_run_needs(lab: Lab) -> None:
    assert "FAILED" not in lab.ffn("cluster", "check")


def test_a_run_becomes_one_run_in_mlflow_and_a_champion(lab: Lab) -> None:
    said = lab.submit("first", "--watch")
    run = first_line(said)
    assert "is made" in said
    parent = lab.parent(run)
    assert (parent.info.run_name, parent.info.status) == (f"first-{lab.suffix}", "FINISHED")
    children = lab.children(parent)
    assert {"ingest", f"S4-small/{lab.protocol}/j", f"S4-small/{lab.protocol}/register"} == set(children)
    assert {child.info.status for of in children.values() for child in of} == {"FINISHED"}
    artifacts = {item.path for item in lab.mlflow.list_artifacts(parent.info.run_id)}
    assert artifacts == {"results.md", "results.json", "results.png", "report.html"}
    assert f"{lab.protocol}" in parent.data.tags["mlflow.note.content"]

    tags = parent.data.tags
    assert tags["ffn.kfp_run"] == run
    assert tags["ffn.image"] == os.environ["FFN_IMAGE"]
    assert len(tags["ffn.data_digest"]) == 16
    assert tags["ffn.pipeline_version"].startswith(os.environ["FFN_IMAGE"].rpartition("sha256:")[2][:12])
    version = lab.mlflow.get_model_version_by_alias(lab.model, "champion")
    for what, tag in (("image", "ffn.image"), ("kfp_run", "ffn.kfp_run"), ("data_digest", "ffn.data_digest")):
        assert version.tags[what] == tags[tag], what
    assert version.tags["mlflow_run"] == parent.info.run_id

    assert lab.shown(run, "finish", "table").startswith(f"# first-{lab.suffix}: FINISHED")
    page = lab.shown(run, "finish", "report")
    assert page.count("data:image/png;base64,") == 3  # results, confusion, learning curves
    assert lab.protocol in page

    assert "is found" in lab.submit("first")
    assert first_line(lab.submit("first")) == run
    reference = lab.run(run)["pipeline_version_reference"]
    call = lab.server.pipelines.pipeline_service_get_pipeline_version
    listed = lab.server.ask(call, reference["pipeline_id"], reference["pipeline_version_id"])
    assert listed["display_name"] == tags["ffn.pipeline_version"]
    assert lab.protocol in listed["description"]


def test_every_pod_of_a_run_passes_the_restricted_standard(lab: Lab) -> None:
    run = first_line(lab.submit("first"))
    assert len(lab.pods(run)) > 15
    assert lab.restricted(run) == []


def test_the_second_run_finds_its_ingestion_and_the_gate_holds_what_is_worse(lab: Lab) -> None:
    said = lab.submit("worse", "--watch", settings=("training.epochs=1", "training.lr=1e-9"))
    run = first_line(said)
    assert lab.pods(run, "ingest") == []  # KFP's driver found it
    assert lab.pods(run, "promote") == []
    challenger = lab.mlflow.get_model_version_by_alias(lab.model, "challenger")
    assert (challenger.version, challenger.tags["gate"]) == ("2", "hold")
    assert lab.mlflow.get_model_version_by_alias(lab.model, "champion").version == "1"
    assert f"{lab.model} version 2: held by the gate: top1" in lab.parent(run).data.tags["mlflow.note.content"]


def test_a_mistake_is_told_once_and_mended_by_a_retry(lab: Lab) -> None:
    said = lab.submit("mistake", "--watch", data="late", status=1)
    failed = first_line(said)
    (told,) = [line for line in said.splitlines() if "no such object" in line]
    assert told.split()[0] == "ingest"
    (pod,) = lab.pods(failed, "ingest")  # a mistake is made once
    assert f"kubectl -n {lab.namespace} logs {pod['metadata']['name']} -c main" in said
    parent = lab.parent(failed)
    assert parent.info.status == "FAILED"
    assert parent.data.tags["mlflow.note.content"].splitlines()[2].startswith("**FAILED**: ingest: s3://")

    upload(lab.folder / "recordings", lab.suffix, "late")
    again = lab.submit("mistake", "--retry", "--watch", data="late")
    assert "is retried" in again
    run = first_line(again)
    assert run != failed
    mended = lab.parent(run)
    assert mended.info.run_id == parent.info.run_id
    assert mended.info.status == "FINISHED"
    assert {child.info.status for of in lab.children(mended).values() for child in of} == {"FINISHED"}
    assert first_line(lab.submit("mistake", data="late")) == run


def test_a_lost_pod_a_cancelled_run_and_its_retry(lab: Lab) -> None:
    """The training goes on after its last epoch each time, in one run of MLflow."""
    long = ("training.epochs=900",)
    run = first_line(lab.submit("long", settings=long))
    name = f"S4-small/{lab.protocol}/j"

    def steps() -> list[int]:
        """Epochs that MLflow has of the training; none before it began."""
        try:
            (child,) = lab.children(lab.parent(run))[name]
        except (AssertionError, KeyError):
            return []
        return [point.step for point in lab.mlflow.get_metric_history(child.info.run_id, "train_loss")]

    until("the first epochs", lambda: len(steps()) > 5)
    (lost,) = lab.pods(run, "train")
    lab.kubectl("delete", "pod", lost["metadata"]["name"], "--grace-period=0", "--force")
    until("another pod", lambda: [pod for pod in lab.pods(run, "train") if pod["metadata"]["uid"] != lost["metadata"]["uid"]])
    before = len(steps())
    until("epochs after it", lambda: len(steps()) > before + 5)
    (child,) = lab.children(lab.parent(run))[name]
    logged = steps()
    assert logged == list(range(1, len(logged) + 1))

    said = lab.ffn("cluster", "cancel", f"long-{lab.suffix}", "--experiment", lab.protocol)
    assert "is KILLED" in said
    until("the end", lambda: lab.run(run)["state"] in ("FAILED", "CANCELED"))
    assert "cancelled" in lab.ffn("cluster", "cancel", run, "--experiment", lab.protocol, status=2)
    lab.ffn("cluster", "watch", run, "--experiment", lab.protocol, status=3)
    parent = lab.parent(run)
    assert parent.info.status == "KILLED"
    assert {child.info.status for of in lab.children(parent).values() for child in of} <= {"KILLED", "FINISHED"}

    again = first_line(lab.submit("long", "--retry", "--watch", settings=long))
    after = lab.parent(again)
    assert (after.info.run_id, after.info.status) == (parent.info.run_id, "FINISHED")
    (same,) = [
        run for run in lab.children(after)[name] if run.data.tags["ffn.step"] == "train"
    ]  # the fusion of one stream is called so too
    assert same.info.run_id == child.info.run_id
    logged = [point.step for point in lab.mlflow.get_metric_history(child.info.run_id, "train_loss")]
    assert logged == list(range(1, 901))


def test_schedules_make_runs_of_their_own_and_their_end_harms_none(lab: Lab) -> None:
    """Their recordings are not there, so that a run ends soon."""
    source = f"{os.environ['FFN_CLUSTER_RECORDINGS'].rstrip('/')}/{lab.suffix}/nowhere"
    schedules = {}
    for name in ("one", "two"):
        said = lab.ffn(
            "cluster", "schedule", lab.kfp, "--data", source, "--data-version", name, "--name", f"{name}-{lab.suffix}",
            "--cron", "* * * * *", "--experiment", lab.protocol,
        )  # fmt: skip
        schedules[name] = first_line(said)
        lab.made.append(f"{name}-{lab.suffix}")
    until("a run of the second", lambda: lab.runs(schedules["two"]))
    lab.ffn("cluster", "unschedule", f"two-{lab.suffix}", "--experiment", lab.protocol)
    until("a second run of the first", lambda: len(lab.runs(schedules["one"])) > 1, seconds=420)

    def running() -> str:
        return next((str(run["run_id"]) for run in lab.runs(schedules["one"]) if run["state"] == "RUNNING"), "")

    going = until("one that goes on", running)
    said = lab.ffn("cluster", "unschedule", f"one-{lab.suffix}", "--experiment", lab.protocol)
    assert f"its run {going} goes on" in said
    runs = [run["run_id"] for schedule in schedules.values() for run in lab.runs(schedule)]
    for run in runs:
        until(f"the end of {run}", lambda run=run: lab.run(run)["state"] == "FAILED", seconds=420)
        assert lab.parent(run).info.status == "FAILED"
    assert len({lab.parent(run).info.run_id for run in runs}) == len(runs) >= 3
    for name in schedules:
        lab.ffn("cluster", "unschedule", f"{name}-{lab.suffix}", "--experiment", lab.protocol, status=None)
    assert lab.ffn("cluster", "schedules", "--experiment", lab.protocol) == ""


def test_the_champion_is_served_and_a_new_one_takes_its_place(lab: Lab) -> None:
    there = subprocess.run(["kubectl", "-n", "ffn", "get", "deployment", "serving"], capture_output=True, check=False)
    if there.returncode:
        pytest.skip("the component `serving` is not installed in namespace ffn")

    def serving(*arguments: str) -> str:
        return subprocess.run(["kubectl", "-n", "ffn", *arguments], check=True, text=True, capture_output=True).stdout

    # Its own follower goes on with its own model every two minutes: not during this.
    serving("patch", "cronjob", "serving-follow", "--patch", '{"spec": {"suspend": true}}')
    serving("set", "env", "deployment/serving", "--containers=download", f"MODEL_NAME={lab.model}")
    for version in ("1", "2"):
        lab.ffn("model", "promote", f"{lab.model}/{version}", "--force")
        name = f"follow-{lab.suffix}-{version}"
        job = json.loads(serving("create", "job", name, "--from=cronjob/serving-follow", "--dry-run=client", "-o", "json"))
        (container,) = job["spec"]["template"]["spec"]["containers"]
        container["env"] = [*container.get("env", []), {"name": "MODEL_NAME", "value": lab.model}]
        subprocess.run(["kubectl", "-n", "ffn", "create", "-f", "-"], input=json.dumps(job), text=True, check=True)
        serving("wait", "--for=condition=complete", f"job/{name}", "--timeout=120s")
        serving("rollout", "status", "deployment/serving", "--timeout=400s")
        served = json.loads(serving("get", "deployment", "serving", "-o", "json"))["spec"]["template"]["metadata"]["annotations"]
        assert served["ffn/model-version"] == version
        probe = 'from pathlib import Path; from pipeline.serving import probe; probe(Path("/model"), "http://127.0.0.1:8080")'
        serving("exec", "deployment/serving", "-c", "server", "--", "python", "-c", probe)
    began = time.monotonic()
    (pod, *_) = serving("get", "pods", "-l", "app.kubernetes.io/name=serving", "-o", "name").split()
    serving("delete", pod, "--wait=true")
    assert time.monotonic() - began < 40
    serving("set", "env", "deployment/serving", "--containers=download", "MODEL_NAME-")
    serving("patch", "cronjob", "serving-follow", "--patch", '{"spec": {"suspend": false}}')
