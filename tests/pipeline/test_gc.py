"""What is left over goes, and nothing that somebody needs: on a real MLflow store and a real S3 server."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, ViewType

from components import registry, states, tracking
from ffn.errors import FFNError
from ffn.training import locked
from pipeline.cli import main
from pipeline.submit import MARK
from tests.components.test_storage import Server, server
from tests.pipeline.kfp_server import FakeKFP, serving

__all__ = ["server"]

NOW = datetime.now(UTC)
LONG, SHORT = NOW - timedelta(days=40), NOW - timedelta(days=1)


def key(name: str) -> str:
    return name.encode().hex().ljust(16, "0")[:16]


class Past:
    """What earlier runs left in MLflow and KFP."""

    def __init__(self, store: MlflowClient) -> None:
        self.store, self.kfp = store, FakeKFP()
        self.kfp.experiments = [{"experiment_id": "e", "display_name": "ffn"}]
        self.experiment = store.create_experiment("ffn", artifact_location=os.environ["FFN_ARTIFACTS"])
        self.ids: dict[str, str] = {}

    def run(
        self, name: str, status: str, at: datetime, *, kfp: str | None = None, version: bool = False, training: str = "",
        child: str = "",
    ) -> str:  # fmt: skip
        """A pipeline run with a training, of which MLflow and KFP say these things."""
        tags = {tracking.RUN: name, **({tracking.LINEAGE["kfp_run"]: name} if kfp is not None else {})}
        parent = self._run(name, status, at, tags)
        work = {tracking.KEY: key(training or name), tracking.KIND: "train", tracking.PARENT: parent}
        self._run("S4/p/j", child or status, at, work)
        if version:
            made = self._run("register", "FINISHED", at, {tracking.KIND: "register", tracking.PARENT: parent})
            self.store.log_text(made, "weights", "model/weights")
            registry.register("ffn-p", f"{self.store.get_run(made).info.artifact_uri}/model", key=name, run=made, tags={})
        if kfp:
            self.kfp_run(name, kfp, at)
        self.ids[name] = parent
        return parent

    def kfp_run(self, name: str, state: str, at: datetime, **more: Any) -> None:
        stamp = at.strftime("%Y-%m-%dT%H:%M:%SZ")
        self.kfp.runs.append(
            {
                "run_id": name, "display_name": name, "experiment_id": "e", "state": state, "created_at": stamp,
                "finished_at": stamp if state != "RUNNING" else "1970-01-01T00:00:00Z", "description": f"S4 · {MARK}0", **more,
            }
        )  # fmt: skip

    def _run(self, name: str, status: str, at: datetime, tags: dict[str, str]) -> str:
        moment = int(at.timestamp() * 1000)
        run = self.store.create_run(self.experiment, start_time=moment, tags=tags, run_name=name).info.run_id
        if status != "RUNNING":
            self.store.set_terminated(run, status, end_time=moment)
        return str(run)

    def statuses(self) -> dict[str, str]:
        """Name -> status of every pipeline run; `deleted` where it is."""
        found = {name: self.store.get_run(run).info for name, run in self.ids.items()}
        return {name: "deleted" if info.lifecycle_stage == "deleted" else info.status for name, info in found.items()}


@pytest.fixture
def past(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Past]:
    for name in ("FFN_MLFLOW_UI", "FFN_CLUSTER", "FFN_WEBHOOK"):
        monkeypatch.delenv(name, raising=False)
    past = Past(store)
    with serving(past.kfp) as url:
        monkeypatch.setenv("FFN_KFP_URL", url)
        yield past


def write(folder: Path, name: str, at: datetime, size: int = 1000) -> None:
    """A state as a training leaves it."""
    (folder / key(name)).mkdir(parents=True, exist_ok=True)
    path = folder / key(name) / "state.safetensors"
    path.write_bytes(b"x" * size)
    os.utime(path, (at.timestamp(), at.timestamp()))


def test_states_of_what_has_ended_go_and_all_else_stays(
    past: Past, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FFN_CHECKPOINTS", "s3://bucket/states/")
    past.run("champion", "FINISHED", LONG, version=True)
    registry.point(registry.at("models:/ffn-p/1"), "champion")
    past.run("failed", "FAILED", LONG)
    past.run("lately", "FAILED", SHORT)
    past.run("again", "FINISHED", LONG)
    past.run("reuse", "FINISHED", SHORT, training="again")
    past.run("going", "RUNNING", LONG, kfp="RUNNING", child="FINISHED")
    past.run("here", "RUNNING", LONG)  # of somebody's machine
    past.run("dead", "RUNNING", LONG, kfp="FAILED")
    folder = server.folder / "bucket" / "states"
    old = ["champion", "failed", "lately", "again", "going", "here", "dead", "unknown"]
    for name in old:
        write(folder, name, LONG)
    write(folder, "fresh", SHORT)  # of a run that is not ours to see
    (folder / "other").mkdir()
    (folder / "other" / "file").write_text("not a state")
    os.utime(folder / "other" / "file", (LONG.timestamp(), LONG.timestamp()))
    write(server.folder / "bucket" / "states-of-others", "failed", LONG)

    assert main(["cluster", "gc"]) == 0
    out, err = capsys.readouterr()
    removed = sorted(line.split()[2].rstrip(":") for line in out.splitlines() if line.startswith("remove state"))
    assert removed == sorted(map(key, ("champion", "failed", "dead", "unknown")))
    assert out.splitlines()[-1] == (
        "close in MLflow: 1, delete in MLflow: 1, remove state: 4 (4.0 kB); nothing was changed, --delete does it"
    )
    assert "mlflow gc --older-than 30d" in err
    assert '"Prefix": "v2/artifacts/ffn/"' in err
    assert len(list(folder.iterdir())) == 10
    before = past.statuses()
    assert before["dead"] == "RUNNING"

    assert main(["cluster", "gc", "--delete"]) == 0
    assert names_of(folder) == {"lately", "again", "going", "here", "fresh", "other"}
    assert names_of(server.folder / "bucket" / "states-of-others") == {"failed"}
    assert past.statuses() == {**before, "dead": "FAILED", "failed": "deleted"}
    assert Path(mlflow.artifacts.download_artifacts("models:/ffn-p@champion")).joinpath("weights").read_text() == "weights"

    capsys.readouterr()
    assert main(["cluster", "gc", "--delete"]) == 0
    assert capsys.readouterr().out == "nothing is left over\n"


def names_of(folder: Path) -> set[str]:
    known = {key(name): name for name in ("champion", "failed", "lately", "again", "going", "here", "dead", "unknown", "fresh")}
    return {known.get(path.name, path.name) for path in folder.iterdir() if any(path.iterdir())}


def test_models_that_a_dead_run_logged_go_with_it_but_not_a_registered_one(
    past: Past, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow keeps a logged model beside its run: only a deleted one gives its room back."""
    monkeypatch.setenv("FFN_CHECKPOINTS", str(tmp_path))
    store, models = past.store, {}
    for name in ("failed", "registered"):
        (child,) = tracking.children(store, past.run(name, "FAILED", LONG))
        models[name] = store.create_logged_model(past.experiment, source_run_id=child.info.run_id).model_id
        store.log_outputs(child.info.run_id, [LoggedModelOutput(model_id=models[name], step=0)])
    store.create_registered_model("by-hand")
    store.create_model_version("by-hand", f"models:/{models['registered']}")
    assert main(["cluster", "gc", "--delete"]) == 0
    assert past.statuses() == {"failed": "deleted", "registered": "FAILED"}
    assert [model.model_id for model in store.search_logged_models([past.experiment])] == [models["registered"]]


def test_a_version_keeps_its_run_whatever_became_of_both(past: Past, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that nobody points to may still be promoted, and a person may look where it is from."""
    monkeypatch.setenv("FFN_CHECKPOINTS", str(tmp_path))
    past.run("failed after it", "FAILED", LONG, version=True)
    past.run("killed", "KILLED", LONG)
    past.run("finished", "FINISHED", LONG)
    assert main(["cluster", "gc", "--delete"]) == 0
    assert past.statuses() == {"failed after it": "FAILED", "killed": "deleted", "finished": "FINISHED"}
    gone = past.store.search_runs([past.experiment], run_view_type=ViewType.DELETED_ONLY)
    assert sorted(run.info.run_name for run in gone) == ["S4/p/j", "killed"]


@pytest.mark.parametrize(
    ("kfp", "at", "status"),
    [
        ("RUNNING", LONG, "RUNNING"), ("FAILED", SHORT, "FAILED"), ("SUCCEEDED", SHORT, "FAILED"), ("CANCELED", SHORT, "KILLED"),
        ("", LONG, "KILLED"), ("", SHORT, "RUNNING"),
    ],
)  # fmt: skip
def test_a_run_that_mlflow_calls_running_is_closed_as_kfp_says(
    past: Past, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kfp: str, at: datetime, status: str
) -> None:
    """A child that was open makes a run that succeeded a failed one, as everywhere; what KFP knows nothing of may be another's."""
    monkeypatch.setenv("FFN_CHECKPOINTS", str(tmp_path))
    past.run("a", "RUNNING", at, kfp=kfp)
    assert main(["cluster", "gc", "--delete"]) == 0
    assert past.statuses() == {"a": status}


def test_only_our_archived_runs_of_long_ago_go(past: Past, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFN_CHECKPOINTS", str(tmp_path))
    past.kfp_run("duplicate", "FAILED", LONG, storage_state="ARCHIVED")
    past.kfp_run("lately", "FAILED", SHORT, storage_state="ARCHIVED")
    past.kfp_run("in use", "FAILED", LONG, storage_state="AVAILABLE")
    past.kfp_run("theirs", "FAILED", LONG, storage_state="ARCHIVED", description="another pipeline")
    past.kfp_run("elsewhere", "FAILED", LONG, storage_state="ARCHIVED", experiment_id="f")
    assert main(["cluster", "gc"]) == 0
    assert len(past.kfp.runs) == 5
    assert main(["cluster", "gc", "--delete"]) == 0
    assert [run["run_id"] for run in past.kfp.runs] == ["lately", "in use", "theirs", "elsewhere"]
    assert main(["cluster", "gc", "--delete", "--older-than", "2h"]) == 0
    assert [run["run_id"] for run in past.kfp.runs] == ["in use", "theirs", "elsewhere"]


def test_states_on_a_volume_are_looked_at_where_it_is_mounted(
    past: Past, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "states"
    monkeypatch.setenv("FFN_CHECKPOINTS", str(folder))
    past.run("failed", "FAILED", LONG)
    assert main(["cluster", "gc", "--delete"]) == 1
    assert f"not looked at     {folder}: no such folder here; where it is a volume, call this where that is mounted" in (
        capsys.readouterr().out
    )
    assert past.statuses() == {"failed": "deleted"}  # the rest was done
    write(folder, "failed", LONG)
    write(folder, "unknown", LONG)
    with locked(folder / key("unknown") / "lock"):
        os.utime(folder / key("unknown") / "lock", (LONG.timestamp(), LONG.timestamp()))
        assert main(["cluster", "gc", "--delete"]) == 1
    assert "stays: " in (out := capsys.readouterr().out)
    assert "a training holds it" in out
    assert [path.name for path in folder.iterdir()] == [key("unknown")]
    assert main(["cluster", "gc", "--delete"]) == 0
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("place", ["s3://bucket/states", "folder"])
def test_a_state_that_is_written_to_meanwhile_stays(server: Server, tmp_path: Path, place: str) -> None:
    folder = server.folder / "bucket" / "states" if place != "folder" else tmp_path / "states"
    place = place if place != "folder" else str(folder)
    write(folder, "a", LONG)
    (found,) = states.kept(place)
    assert (found.key, found.size, abs(found.written - LONG) < timedelta(seconds=1)) == (key("a"), 1000, True)
    write(folder, "a", SHORT)
    with pytest.raises(FFNError, match="was written to a moment ago, and stays"):
        states.remove(found)
    (found,) = states.kept(place)
    states.remove(found)
    assert states.kept(place) == []


@pytest.mark.parametrize("age", ["30", "d", "1y", "-1d"])
def test_an_age_reads_as_days_hours_or_minutes(age: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cluster", "gc", f"--older-than={age}"])
    assert "expected days, hours or minutes, such as 30d" in capsys.readouterr().err


def test_without_mlflow_nothing_is_judged(past: Past, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot see what goes on removes nothing."""
    monkeypatch.setenv("FFN_CHECKPOINTS", str(tmp_path))
    write(tmp_path, "unknown", LONG)
    monkeypatch.setenv("FFN_MLFLOW_UI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["cluster", "gc", "--delete"]) == 2
    monkeypatch.delenv("FFN_MLFLOW_UI")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["cluster", "gc", "--delete"]) == 2
    assert [found.key for found in states.kept(str(tmp_path))] == [key("unknown")]
