"""The steps one after the other on a toy set, each twice: what is retried is neither a second run nor a second version."""

import json
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from components import tracking
from components.begin.step import run as begin
from components.evaluate.step import run as evaluate
from components.finish.step import run as finish
from components.fuse.step import run as fuse
from components.gate.step import decide
from components.gate.step import run as gate
from components.promote.step import promote, rollback
from components.promote.step import run as promote_step
from components.register.step import run as register
from components.tracking import Version
from components.train.step import run as train
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.inference import FusedModel
from tests.components.conftest import TINY
from tests.components.test_tracking import children
from tests.conftest import toy_recordings, write_set


@dataclass
class Pipeline:
    """The steps' calls for the protocol `p` of one set, streams j and b."""

    data: Path
    root: Path
    name: str = "demo"

    def __post_init__(self) -> None:
        self.parent = begin(name=self.name, source="toy", source_version="1", preset="S4", overrides=TINY)

    def train(self, stream: str, *overrides: str) -> Path:
        out = self.root / stream / "checkpoint"
        train(
            data=self.data, protocol="p", stream=stream, preset="S4", overrides=[*TINY, *overrides],
            checkpoints=self.root / "states", parent=self.parent, out=out,
        )  # fmt: skip
        return out

    def evaluate(self, stream: str) -> Path:
        out = self.root / stream / "scores"
        evaluate(data=self.data, checkpoint=self.root / stream / "checkpoint", parent=self.parent, out=out)
        return out

    def register(self, *overrides: str) -> str:
        checkpoints = [self.train(stream, *overrides) for stream in ("j", "b")]
        fused = self.root / "fused"
        fuse(scores=[self.evaluate(stream) for stream in ("j", "b")], parent=self.parent, out=fused)
        return register(data=self.data, checkpoints=checkpoints, fused=fused, name=self.name, parent=self.parent)


def test_from_training_to_champion_everything_twice(store: MlflowClient, toy: SkeletonSet, tmp_path: Path) -> None:
    steps = Pipeline(toy.path, tmp_path)
    uri = steps.register()
    assert steps.register() == uri == "models:/ffn-p/1"

    runs = {run.info.run_name: run for run in children(store, steps.parent)}
    assert sorted(runs) == ["S4/p/2s", "S4/p/b", "S4/p/j", "S4/p/register"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    stream = runs["S4/p/j"]
    for metric in ("train_loss", "train_top1", "train_lr", "top1", "loss"):
        steps_logged = [point.step for point in store.get_metric_history(stream.info.run_id, metric)]
        assert steps_logged == ([1, 2] if metric.startswith("train") else [0]), metric
    assert stream.data.params["training.epochs"] == "2"
    contexts = {tag.value for given in stream.inputs.dataset_inputs for tag in given.tags}
    assert contexts == {"training", "evaluation"}
    artifacts = {item.path for item in store.list_artifacts(stream.info.run_id)}
    assert artifacts == {"checkpoint", "figures", "confusion.csv", "per_class.csv"}
    figures = {item.path for item in store.list_artifacts(stream.info.run_id, "figures")}
    assert figures == {"figures/learning_curves.png", "figures/confusion.png", "figures/per_class.png"}
    assert len(stream.outputs.model_outputs) == 1

    version = tracking.version("ffn-p", alias="challenger")
    assert version
    assert version.tags["data_digest"] == toy.digest
    assert float(version.tags["top1"]) == json.loads((tmp_path / "fused" / "fusion.json").read_text())["top1"]

    assert gate(model=uri, data=toy.path) == "promote"
    promote_step(model=uri)
    promote_step(model=uri)
    assert tracking.version("ffn-p", alias="previous") is None
    assert gate(model=uri, data=toy.path) == "hold"
    champion = tracking.version("ffn-p", alias="champion")
    assert champion
    assert champion.tags["gate"] == "promote"
    assert champion.tags["promoted_because"] == "there is no champion yet"

    table = tmp_path / "finish" / "table"
    finish(name="demo", state="SUCCEEDED", out=table)
    parent = store.get_run(steps.parent)
    assert parent.info.status == "FINISHED"
    assert {item.path for item in store.list_artifacts(steps.parent)} == {"results.md", "results.json", "results.png"}
    header, _, row = table.read_text().splitlines()
    assert header.split() == ["|", "protocol", "|", "j", "|", "b", "|", "2s", "|"]
    assert row.split()[-2] == f"{100 * float(version.tags['top1']):.1f}"


def test_the_registered_model_is_the_fused_one_with_preprocessing_inside(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path
) -> None:
    uri = Pipeline(toy.path, tmp_path).register()
    model = mlflow.pyfunc.load_model(uri)
    clips = [np.asarray(toy.sample(row), np.float32) for row in (0, 1)]
    batch = np.zeros((2, 2, max(clip.shape[1] for clip in clips), 25, 3), np.float32)
    for place, clip in zip(batch, clips, strict=True):
        place[: clip.shape[0], : clip.shape[1]] = clip
    said = model.predict(batch)
    assert isinstance(said, pd.DataFrame)
    wanted = FusedModel.load(tracking.download(tracking.at(uri))).predict(clips)
    got = np.array([list(row.values()) for row in said["probabilities"]])
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert list(said["label"]) == [toy.classes[k] for k in wanted.argmax(1)]
    with pytest.raises(mlflow.MlflowException, match="shape"):
        model.predict(np.zeros((1, 2, 8, 17, 3), np.float32))


def version(number: int, **tags: str) -> Version:
    usual = {"protocol": "p", "layout": "ntu25", "space": "3d", "classes_digest": "c", "data_digest": "d", "top1": "0.5"}
    return Version(name="ffn-p", number=str(number), tags={**usual, **tags})


@pytest.mark.parametrize(
    ("challenger", "verdict", "reason"),
    [
        ({"top1": "0.5"}, "promote", "top1 50.00 % is not worse than 50.00 % of champion version 1"),
        ({"top1": "0.499"}, "hold", "top1 49.90 % is worse than 50.00 % of champion version 1"),
        ({"top1": "0.9", "classes_digest": "e"}, "hold", "not comparable with champion version 1: classes_digest e against c"),
        ({"top1": "0.9", "space": "2d"}, "hold", "not comparable with champion version 1: space 2d against 3d"),
        ({"top1": "0.9", "rolled_back": "2026-01-01"}, "hold", "it was rolled back by hand (2026-01-01); promote it by hand"),
    ],
)
def test_the_gate_lets_through_what_is_not_worse(challenger: dict[str, str], verdict: str, reason: str) -> None:
    assert decide(version(2, **challenger), version(1), Path("unused")) == (verdict, reason)


def test_a_champion_of_other_data_is_measured_again_on_the_present(store: MlflowClient, toy: SkeletonSet, tmp_path: Path) -> None:
    old = Pipeline(toy.path, tmp_path / "old").register()
    promote_step(model=old)
    arrays, labels = toy_recordings(seed=1)
    fresh = write_set(tmp_path / "fresh.arrow", arrays, "3d", labels=labels)
    new = Pipeline(fresh.path, tmp_path / "new", name="fresh").register("training.epochs=1")
    gate(model=new, data=fresh.path)
    reason = tracking.at(new).tags["gate_reason"]
    assert reason.endswith(f"of champion version 1, measured again on data {fresh.digest}")


def three_versions(store: MlflowClient) -> list[Version]:
    experiment = store.create_experiment("models")
    run = store.create_run(experiment).info.run_id
    return [
        tracking.register("ffn-p", f"runs:/{run}/model-{number}", key=str(number), run=run, tags={"top1": "0.5"})
        for number in range(3)
    ]


def aliases() -> dict[str, str]:
    found = {alias: tracking.version("ffn-p", alias=alias) for alias in ("champion", "previous")}
    return {alias: version.number for alias, version in found.items() if version}


def test_promotion_and_rollback_move_the_aliases_once(store: MlflowClient) -> None:
    one, two, three = three_versions(store)
    promote(one, "first")
    with pytest.raises(FFNError, match="no previous one"):
        rollback("ffn-p")
    for _ in range(2):
        promote(two, "better")
        assert aliases() == {"champion": "2", "previous": "1"}
    promote(three, "better still")
    rollback("ffn-p")
    assert aliases() == {"champion": "2", "previous": "3"}
    assert tracking.at(three.uri).tags["rolled_back"]
    promote(three, "by hand, after all")
    assert aliases() == {"champion": "3", "previous": "2"}
    assert not tracking.at(three.uri).tags["rolled_back"]
    with pytest.raises(FFNError, match="ffn-q: no champion; registered models: ffn-p"):
        rollback("ffn-q")


def test_registering_again_with_the_same_key_gives_the_same_version(store: MlflowClient) -> None:
    assert [found.number for found in three_versions(store)] == ["1", "2", "3"]
    run = store.create_run(store.create_experiment("again")).info.run_id
    assert tracking.register("ffn-p", f"runs:/{run}/model", key="1", run=run, tags={}).number == "2"


def test_bad_input_leaves_a_failed_run_and_one_line(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Pipeline(toy.path, tmp_path)
    with pytest.raises(SystemExit) as ended:
        train(
            data=toy.path, protocol="q", stream="j", preset="S4", overrides=TINY, checkpoints=tmp_path / "states",
            parent=steps.parent, out=tmp_path / "out",
        )  # fmt: skip
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"ffn: error: {toy.path}: no protocol 'q': expected one of p"
    assert children(store, steps.parent)[0].info.status == "FAILED"
    assert not (tmp_path / "out").exists()
