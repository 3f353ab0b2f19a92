"""One parent per pipeline run, one child per piece of work, whatever is retried."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from components import tracking
from components.begin.step import run as begin
from components.finish.step import run as finish
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError


def children(store: MlflowClient, parent: str) -> list[mlflow.entities.Run]:
    experiment = store.get_run(parent).info.experiment_id
    return list(store.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'"))


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
    finish(name="demo", state="FAILED", out=tmp_path / "table")
    assert store.get_run(first).info.status == "FINISHED"


def test_recordings_of_one_version_may_move(store: MlflowClient) -> None:
    inputs = {"name": "demo", "source_version": "1", "space": "3d", "presets": ["S4"], "seeds": [0], "overrides": []}
    assert begin(source="here", **inputs) == begin(source="there", **inputs)


def test_the_run_that_kfp_injected_is_the_parent(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = store.create_experiment("given")
    given = store.create_run(experiment).info.run_id
    task = store.create_run(experiment, tags={"mlflow.parentRunId": given}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", task)
    assert tracking.begin("demo", {}) == given
    assert tracking.parent("demo").id == given


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
        tracking.at("models:/ffn-p/7")
    with pytest.raises(FFNError, match="no pipeline run called 'demo'"):
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
    finish(name="demo", state=state, out=tmp_path / "table")
    assert store.get_run(parent).info.status == status
