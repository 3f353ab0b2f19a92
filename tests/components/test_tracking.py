"""One parent per pipeline run, one child per piece of work, whatever is retried."""

import contextlib
import fcntl
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from components import cluster, registry, tracking
from components.begin.step import run as begin
from components.finish.step import run as finish
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError


def children(store: MlflowClient, parent: str) -> list[mlflow.entities.Run]:
    experiment = store.get_run(parent).info.experiment_id
    return list(store.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'"))


def begun(run: str = "demo", **given: Any) -> str:
    inputs: dict[str, Any] = {
        "job": run, "name": "", "called": "", "resource": "", "resumes": "", "version": "", "source": "here",
        "source_version": "1", "space": "3d", "presets": ["S4"], "seeds": [0], "overrides": [],
    }  # fmt: skip
    return str(begin(**{**inputs, **given})[0])


def ended(run: str, folder: Path, status: str = "SUCCEEDED") -> str:
    """What a person reads after `finish`."""
    finish(job=run, status=status, table=folder / "table", metrics=folder / "metrics", report=folder / "report")
    return (folder / "table").read_text()


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A pod of a cluster; the run's id -> what its Kubernetes says of it."""
    for name in ("ca.crt", "namespace", "token"):
        (tmp_path / name).write_text("runs")
    said: dict[str, str] = {}
    monkeypatch.setattr(cluster, "ACCOUNT", tmp_path)
    monkeypatch.setattr(cluster, "TERMINATION", tmp_path / "termination-log")
    monkeypatch.setattr(cluster, "state", lambda run: said.get(run, "RUNNING"))
    monkeypatch.setattr(cluster, "run", lambda: said.get("this", ""))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("HOSTNAME", "pod-1")
    monkeypatch.setenv("FFN_KFP_UI", "https://kubeflow.example/pipeline")
    monkeypatch.setenv("FFN_IMAGE", "registry.example/ffn@sha256:1")
    return said


def test_a_run_of_the_same_name_is_taken_up_again(store: MlflowClient) -> None:
    first = tracking.begin("demo", {"preset": "S4"})
    store.set_terminated(first, "KILLED")
    assert tracking.begin("demo", {"preset": "S4", "space": "3d"}) == first
    run = store.get_run(first)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"preset": "S4", "space": "3d"}
    assert tracking.begin("other", {}) != first


def test_a_run_of_other_inputs_is_not_taken_up_and_stays_as_it_is(store: MlflowClient, tmp_path: Path) -> None:
    first = tracking.begin("demo", {"preset": "S4"})
    store.set_terminated(first, "FINISHED")
    with pytest.raises(FFNError, match="run 'demo' was begun with preset 'S4', now it is 'S0'; choose another --name"):
        tracking.begin("demo", {"preset": "S0"})
    ended("demo", tmp_path, "FAILED")
    assert store.get_run(first).info.status == "FINISHED"


def test_recordings_of_one_version_may_move(store: MlflowClient) -> None:
    assert begun(source="here") == begun(source="there")


def test_two_runs_of_one_schedule_are_two_and_are_called_by_what_kfp_has(store: MlflowClient, inside: dict[str, str]) -> None:
    """KFP calls a schedule's runs nothing at all: their resource has a name."""
    first, second = begun("id-1", resource="ffn-x7k2p"), begun("id-2", resource="ffn-b9c4q")
    other = begun("id-3", called="Clone of nightly", resource="ffn-q", source_version="2")
    assert [store.get_run(run).info.run_name for run in (first, second, other)] == ["ffn-x7k2p", "ffn-b9c4q", "Clone of nightly"]
    assert begun("id-1", resource="ffn-x7k2p") == first  # Argo made the pod again


def test_a_run_says_where_it_comes_from_and_so_do_its_children(
    store: MlflowClient, inside: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFN_COMMIT", "abc")
    parent = begun("id-1", version="0123-4567")
    tracking.note(parent, {"ffn.data_digest": "d"})
    wanted = {
        "mlflow.source.git.commit": "abc", "ffn.image": "registry.example/ffn@sha256:1", "ffn.kfp_run": "id-1",
        "ffn.kfp_url": "https://kubeflow.example/pipeline/#/runs/details/id-1", "ffn.pipeline_version": "0123-4567",
        "ffn.data_digest": "d",
    }  # fmt: skip
    with tracking.child(parent, key="k", kind="train", names=tracking.names("S4", "p", "j", 0)) as track:
        assert wanted.items() <= store.get_run(track.id).data.tags.items()
        assert store.get_run(track.id).data.tags["ffn.pod"] == "pod-1"
    assert tracking.lineage(parent) == {
        "git_commit": "abc", "image": "registry.example/ffn@sha256:1", "kfp_run": "id-1",
        "kfp_url": wanted["ffn.kfp_url"], "pipeline_version": "0123-4567", "data_digest": "d", "mlflow_run": parent,
        "run": "id-1",
    }  # fmt: skip
    assert tracking.lineage("") == {}


def open_child(parent: str, key: str, name: str = "S4/p/j") -> str:
    """A child whose process was killed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(tracking.LABEL, f"train {name}")
        with contextlib.suppress(ZeroDivisionError), tracking.child(parent, key=key, kind="train", name=name) as track:
            raise ZeroDivisionError
    MlflowClient().update_run(track.id, "RUNNING")
    MlflowClient().delete_tag(track.id, "ffn.error")
    return track.id


def test_a_retry_takes_up_the_run_that_failed_and_ends_it_well(store: MlflowClient, inside: dict[str, str], tmp_path: Path) -> None:
    first = begun("id-1", called="nightly")
    again, left = open_child(first, "again"), open_child(first, "of data that is no more", "S4/p/b")
    tracking.record_failure(first, "train S4/p/j", "no room")
    text = ended("id-1", tmp_path, "FAILED")
    assert text.startswith("# nightly: FAILED\n\n**FAILED**: train S4/p/j: no room (pod pod-1)\n\n")
    assert f"**FAILED**: train S4/p/b: {tracking.LOST}" in text
    assert [store.get_run(run).info.status for run in (first, again, left)] == ["FAILED", "KILLED", "KILLED"]

    assert begun("id-2", called="nightly", resumes="id-1") == first
    assert tracking.failure(first, "train S4/p/j") == ""
    with tracking.child(first, key="again", kind="train", name="S4/p/j"):
        pass
    text = ended("id-2", tmp_path)
    assert text.startswith("# nightly: FINISHED\n\nNo results")
    assert {run.info.run_name: run.info.status for run in [store.get_run(first), *children(store, first)]} == {
        "nightly": "FINISHED", "S4/p/j": "FINISHED",
    }  # fmt: skip
    assert store.get_run(left).info.lifecycle_stage == "deleted"

    # A clone of the retry carries its parameters, and is a run of its own: what it would resume has gone on to finish.
    assert begun("id-3", called="Clone of nightly", resumes="id-1") != first
    assert begun("id-4", called="Clone of nightly", resumes="id-2") != first


def test_a_failed_step_is_never_inside_a_finished_run(store: MlflowClient, tmp_path: Path) -> None:
    parent = begun()
    open_child(parent, "k")
    assert "FAILED" in ended("demo", tmp_path, "SUCCEEDED")
    assert store.get_run(parent).info.status == "FAILED"


@pytest.mark.parametrize(
    ("state", "status"), [("KILLED", "KILLED"), ("FAILED", "FAILED"), ("RUNNING", "RUNNING"), ("FINISHED", "FAILED")]
)
def test_what_a_dead_run_left_open_is_closed_by_the_next_at_that_place(
    store: MlflowClient, inside: dict[str, str], monkeypatch: pytest.MonkeyPatch, state: str, status: str
) -> None:
    dead = begun("id-1")
    child = open_child(dead, "k")
    inside["id-1"] = state
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "where", lambda: "elsewhere")
        begun("id-2")
    assert store.get_run(dead).info.status == "RUNNING"
    begun("id-3")
    assert store.get_run(dead).info.status == status
    assert store.get_run(child).info.status == ("RUNNING" if state == "RUNNING" else "KILLED")


def test_on_one_machine_a_run_is_dead_when_nobody_holds_its_lock(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFN_LOCKS", str(tmp_path / "logs"))
    runs = {}
    for name in ("dead", "alive", "cleared"):
        with monkeypatch.context() as patched:
            patched.setattr(tracking, "close_dead", lambda *_: [])
            runs[name] = begun(name)
    for name in ("dead", "alive"):
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "lock").touch()
    (tmp_path / "logs" / "next").mkdir()
    with (tmp_path / "logs" / "alive" / "lock").open("w") as lock, (tmp_path / "logs" / "next" / "lock").open("w") as own:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fcntl.flock(own, fcntl.LOCK_EX)
        runs["next"] = begun("next")
    assert {name: store.get_run(run).info.status for name, run in runs.items()} == {
        "dead": "KILLED", "alive": "RUNNING", "cleared": "KILLED", "next": "RUNNING",
    }  # fmt: skip


def test_where_no_run_was_opened_the_result_says_so(store: MlflowClient, tmp_path: Path) -> None:
    assert "begin**: no run was opened" in ended("id-9", tmp_path, "FAILED").replace("FAILED**: begin", "begin**")


def test_a_retried_piece_of_work_is_one_run_with_one_value_per_step(store: MlflowClient, toy: SkeletonSet) -> None:
    parent = tracking.begin("demo", {})

    def attempt(fail: bool) -> None:
        with tracking.child(parent, key="k", name="S4/p/j", kind="train") as track:
            track.params({"lr": 0.1, "long": "x" * 9000})
            track.metrics({"samples": 24})
            track.dataset(toy, "training")
            for step in sorted({1, 2} - track.steps("loss")):
                track.metrics({"loss": 1 / step}, step=step)
                if fail:
                    raise FFNError("stopped")

    with pytest.raises(FFNError):
        attempt(fail=True)
    assert children(store, parent)[0].info.status == "FAILED"
    attempt(fail=False)
    (run,) = children(store, parent)
    assert run.info.status == "FINISHED"
    assert [point.step for point in store.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    assert [point.value for point in store.get_metric_history(run.info.run_id, "samples")] == [24]
    assert run.inputs.dataset_inputs[0].dataset.digest == toy.digest
    assert len(run.inputs.dataset_inputs) == 1


def test_two_streams_log_one_data_set_at_once(store: MlflowClient, toy: SkeletonSet, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, log = tracking.begin("demo", {}), MlflowClient.log_inputs
    first, second = (store.create_run(store.get_run(parent).info.experiment_id).info.run_id for _ in "jb")

    def beaten(client: MlflowClient, run: str, inputs: list[mlflow.entities.DatasetInput]) -> None:
        monkeypatch.setattr(MlflowClient, "log_inputs", log)
        log(client, first, inputs)
        raise mlflow.MlflowException("UNIQUE constraint failed: datasets")

    monkeypatch.setattr(MlflowClient, "log_inputs", beaten)
    tracking.Child(id=second, client=store).dataset(toy, "training")
    assert [len(store.get_run(run).inputs.dataset_inputs) for run in (first, second)] == [1, 1]


def test_an_interrupted_piece_of_work_is_killed_not_failed(store: MlflowClient) -> None:
    parent = tracking.begin("demo", {})
    with pytest.raises(KeyboardInterrupt), tracking.child(parent, key="k", name="n", kind="train"):
        raise KeyboardInterrupt
    assert children(store, parent)[0].info.status == "KILLED"


def test_equal_work_under_two_parents_is_two_runs(store: MlflowClient) -> None:
    for name in ("a", "b"):
        with tracking.child(tracking.begin(name, {}), key="k", name="n", kind="train"):
            pass
    assert len(children(store, tracking.begin("a", {}))) == len(children(store, tracking.begin("b", {}))) == 1


def test_a_version_that_is_not_there_is_named(store: MlflowClient) -> None:
    with pytest.raises(FFNError, match=r"models:/ffn-p/7: no such model version"):
        registry.at("models:/ffn-p/7")
    with pytest.raises(FFNError, match="no pipeline run 'demo'"):
        tracking.parent("demo")


@pytest.mark.parametrize(
    ("state", "child", "status"),
    [
        ("SUCCEEDED", "FINISHED", "FINISHED"),
        ("COMPLETE", "FINISHED", "FINISHED"),
        ("CANCELED", "KILLED", "KILLED"),
        ("FAILED", "FINISHED", "FAILED"),
        ("RUNNING", "FINISHED", "FINISHED"),
        ("RUNNING", "FAILED", "FAILED"),
    ],
)
def test_every_way_kfp_says_how_it_ended_is_understood(
    store: MlflowClient, tmp_path: Path, state: str, child: str, status: str
) -> None:
    parent = tracking.begin("demo", {})
    with tracking.child(parent, key="k", name="ingest", kind="ingest") as track:
        pass
    store.set_terminated(track.id, child)
    ended("demo", tmp_path, state)
    assert store.get_run(parent).info.status == status
