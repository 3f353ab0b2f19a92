"""Runs on a real cluster, from recordings to a served champion, and everything that goes wrong on the way.

What to look at when one fails: the last lines of what it printed (they are the command line's own), then `kubectl -n NAMESPACE get
pods -l pipeline/runid=RUN`, then the run in KFP and in MLflow, whose experiment has the name of the protocol, `lab-<six digits>`.
"""

import json
import os
import subprocess
import sys
import time

import pytest
from mlflow.exceptions import MlflowException

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
    assert not lab.mlflow.search_registered_models(f"name = '{lab.model}'")  # steps make candidates
    assert f"next: `ffn model promote {lab.candidates}/1`" in parent.data.tags["mlflow.note.content"]
    promoted = lab.ffn("model", "promote", lab.model, "--reason", "the first")
    assert promoted.splitlines()[-1].startswith(f"{lab.model} version 1 is champion: {lab.candidates}/1: top1 ")
    version = lab.champion()
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


def test_a_run_touches_nothing_of_other_namespaces(lab: Lab) -> None:
    """Nor the labels of its own; with `FFN_KFP_NAMESPACE` that is a profile's, else KFP's."""
    assert lab.before
    assert lab.elsewhere() == lab.before


def test_every_pod_of_a_run_passes_the_restricted_standard(lab: Lab) -> None:
    run = first_line(lab.submit("first"))
    assert len(lab.pods(run)) > 15
    assert lab.restricted(run) == []


def test_the_second_run_finds_its_ingestion_and_the_gate_holds_what_is_worse(lab: Lab) -> None:
    said = lab.submit("worse", "--watch", settings=("training.epochs=1", "training.lr=1e-9"))
    run = first_line(said)
    (pod,) = lab.pods(run, "ingest")
    assert f"found in {os.environ['FFN_CHECKPOINTS'].rstrip('/')}" in lab.kubectl("logs", pod["metadata"]["name"], "-c", "main")
    challenger = lab.mlflow.get_model_version_by_alias(lab.candidates, "challenger")
    assert (challenger.version, challenger.tags["gate"]) == ("2", "hold")
    assert " of champion version 1: right where it was wrong on " in challenger.tags["gate_reason"]
    assert "is held: top1" in lab.ffn("model", "promote", lab.model, status=1)
    assert lab.champion().version == "1"
    assert f"{lab.candidates} version 2: held by the gate: top1" in lab.parent(run).data.tags["mlflow.note.content"]


def test_the_steps_account_cannot_get_round_an_approval(lab: Lab) -> None:
    for forbidden in (
        lambda: lab.mlflow.set_registered_model_alias(lab.model, "champion", "1"),
        lambda: lab.mlflow.set_model_version_tag(lab.model, "1", "digest", "sha256:of mine"),
        lambda: lab.mlflow.copy_model_version(f"models:/{lab.candidates}/2", lab.model),
    ):
        with pytest.raises(MlflowException, match=r"(?i)permission|403"):
            forbidden()
    code = "code/ffn/inference.py"
    before = lab.overwrite("2", code, b"raise SystemExit('mine')\n")
    said = lab.ffn("model", "promote", f"{lab.candidates}/2", "--force", status=2)
    assert f"{lab.candidates}/2: its files have changed since it was registered" in said
    assert lab.champion().version == "1"
    lab.overwrite("2", code, before)


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
    long = ("training.epochs=450",)
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
    assert logged == list(range(1, 451))


PROMOTE = """
import sys
from components import registry
from components.gate.step import Verdict
from components.promote.step import promote
candidate = registry.at("models:/" + sys.argv[1])
verdict = Verdict(promote=True, reason="at once", digest=candidate.tags["digest"], champion=sys.argv[2])
print(promote(candidate, verdict, "at once"))
"""


def test_of_two_promotions_at_once_one_is_made(lab: Lab) -> None:
    """Of the worse candidate and the long one's, both against the champion of now."""
    before = lab.champion()
    asked = f"{before.version} {before.tags['digest']}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, f"{lab.candidates}/{number}", asked],
            env={**lab.environment, **lab.promoter}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in ("2", "3")
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    (refused,) = [err for process, (_, err) in zip(both, said, strict=True) if process.returncode]
    assert f"{lab.model}: champion is version" in refused or "is being promoted at this moment" in refused
    winner = lab.champion()
    assert (winner.tags["replaces"], winner.version) == (before.version, "2")
    assert lab.mlflow.get_model_version_by_alias(lab.model, "previous").version == before.version
    lab.ffn("model", "rollback", lab.model)
    assert lab.champion().version == before.version


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
    for candidate in ("1", "2"):
        lab.ffn("model", "promote", f"{lab.candidates}/{candidate}", "--force")
        version = lab.champion().version
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

    # A model is code: what was changed after its approval never starts.
    code = "code/ffn/inference.py"
    before = lab.overwrite("2", code, b"raise SystemExit('mine')\n")
    (pod, *_) = serving("get", "pods", "-l", "app.kubernetes.io/name=serving", "-o", "name").split()
    serving("delete", pod, "--wait=true")

    def refusal() -> str:
        told = ["logs", "-l", "app.kubernetes.io/name=serving", "-c", "download", "--tail=-1", "--ignore-errors"]
        return next((line for line in serving(*told).splitlines() if "its files have changed since it was approved" in line), "")

    until("a pod that refuses", refusal)
    lab.overwrite("2", code, before)
    serving("rollout", "status", "deployment/serving", "--timeout=400s")
    serving("set", "env", "deployment/serving", "--containers=download", "MODEL_NAME-")
    serving("patch", "cronjob", "serving-follow", "--patch", '{"spec": {"suspend": false}}')
