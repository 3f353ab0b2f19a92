"""The steps one after the other on a toy set, each twice: what is retried is neither a second run nor a second version."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from components import registry, tracking
from components.begin.step import run as begin
from components.evaluate.step import run as evaluate
from components.finish.step import run as finish
from components.fuse.step import fuse_all, read_fusion
from components.fuse.step import run as fuse
from components.gate.step import decide
from components.gate.step import run as gate
from components.promote.step import promote, rollback
from components.promote.step import run as promote_step
from components.register.step import require_fit
from components.register.step import run as register
from components.registry import Version
from components.train.step import run as train
from ffn.checkpoint import Checkpoint
from ffn.config import preset
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.inference import FusedModel
from ffn.layouts import NTU25
from ffn.scores import Scores
from pipeline.local import Workspace
from pipeline.models import promote as promote_by_hand
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
        self.parent, _ = begin(
            job=self.name, name=self.name, called="", resource="", resumes="", version="v", source="toy", source_version="1",
            space="3d", presets=["S4"], seeds=[0], overrides=TINY,
        )  # fmt: skip

    def train(self, stream: str, *overrides: str) -> Path:
        out = self.root / stream / "checkpoint"
        train(
            data=self.data, protocol="p", stream=stream, preset="S4", seed=0, overrides=[*TINY, *overrides],
            checkpoints=self.root / "states", parent=self.parent, checkpoint=out,
        )  # fmt: skip
        return out

    def evaluate(self, stream: str) -> Path:
        out = self.root / stream / "scores"
        evaluate(data=self.data, checkpoint=self.root / stream / "checkpoint", parent=self.parent, store="", scores=out)
        return out

    def register(self, *overrides: str) -> str:
        checkpoints = [self.train(stream, *overrides) for stream in ("j", "b")]
        fused = self.root / "fused"
        scores = [self.evaluate(stream) for stream in ("j", "b")]
        fuse(scores=scores, parent=self.parent, fused=fused, confusion=self.root / "confusion")
        return str(register(data=self.data, checkpoints=checkpoints, fused=fused, parent=self.parent))


def test_from_training_to_champion_everything_twice(store: MlflowClient, toy: SkeletonSet, tmp_path: Path) -> None:
    steps = Pipeline(toy.path, tmp_path)
    uri = steps.register()
    (registered,) = (run for run in children(store, steps.parent) if run.info.run_name == "S4/p/register")
    store.delete_tag(registered.info.run_id, "ffn.model")  # a kill between the model and its tag
    assert steps.register() == uri == "models:/ffn-p/1"

    runs = {run.info.run_name: run for run in children(store, steps.parent)}
    assert sorted(runs) == ["S4/p/2s", "S4/p/b", "S4/p/j", "S4/p/register"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(runs["S4/p/register"].outputs.model_outputs) == 1
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

    version = registry.version("ffn-p", alias="challenger")
    assert version
    assert version.tags["data_digest"] == toy.digest
    assert float(version.tags["top1"]) == json.loads((tmp_path / "fused" / "result.json").read_text())["top1"]

    assert gate(model=uri, data=toy.path) == "promote"
    promote_step(model=uri)
    promote_step(model=uri)
    assert registry.version("ffn-p", alias="previous") is None
    assert gate(model=uri, data=toy.path) == "hold"
    champion = registry.version("ffn-p", alias="champion")
    assert champion
    assert champion.tags["gate"] == "promote"
    assert champion.tags["promoted_because"] == "there is no champion yet"

    tops = ended("demo", tmp_path)
    assert tops == {
        f"p {stream}": pytest.approx(run.data.metrics["top1"]) for stream in ("j", "b", "2s") if (run := runs[f"S4/p/{stream}"])
    }
    parent = store.get_run(steps.parent)
    assert parent.info.status == "FINISHED"
    assert {item.path for item in store.list_artifacts(steps.parent)} == {
        "results.md", "results.json", "results.png", "report.html",
    }  # fmt: skip
    text = (tmp_path / "finish" / "table").read_text()
    assert text.startswith("# demo: FINISHED\n\n| protocol")
    assert "- ffn-p version 1: champion: there is no champion yet" in text
    assert text.endswith(
        f"MLflow: http://127.0.0.1:5000/#/experiments/{parent.info.experiment_id}/runs/{steps.parent}?workflowType=machine_learning\n"
    )
    page = (tmp_path / "finish" / "report").read_text()
    assert page.count("data:image/png;base64,") == 4  # results, two learning curves, the confusion of the fusion
    assert "http://" not in page.replace("http://127.0.0.1:5000", "")
    header, _, row = text.splitlines()[2:5]
    assert header.split() == ["|", "protocol", "|", "j", "|", "b", "|", "2s", "|"]
    assert row.split()[-2] == f"{100 * float(version.tags['top1']):.1f}"


def ended(job: str, root: Path, status: str = "SUCCEEDED") -> dict[str, float]:
    """What `finish` returns; it writes below `root`."""
    folder = root / "finish"
    found = finish(job=job, status=status, table=folder / "table", metrics=folder / "metrics", report=folder / "report")
    return dict(found)


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
    wanted = FusedModel.load(registry.download(registry.at(uri))).predict(clips)
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
        ({"top1": "0.9", "layout_digest": "l"}, "hold", "not comparable with champion version 1: layout_digest l against None"),
        ({"top1": "0.9", "space": "2d"}, "hold", "not comparable with champion version 1: space 2d against 3d"),
        (
            {"top1": "0.9", "rolled_back": "2026-01-01"},
            "hold",
            "it was rolled back by hand (2026-01-01); promote it by hand, with --force",
        ),
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
    reason = registry.at(new).tags["gate_reason"]
    assert reason.endswith(f"of champion version 1, measured again on data {fresh.digest}")


def three_versions(store: MlflowClient) -> list[Version]:
    experiment = store.create_experiment("models")
    run = store.create_run(experiment).info.run_id
    return [
        registry.register("ffn-p", f"runs:/{run}/model-{number}", key=str(number), run=run, tags={"top1": "0.5"})
        for number in range(3)
    ]


def aliases() -> dict[str, str]:
    found = {alias: registry.version("ffn-p", alias=alias) for alias in ("champion", "previous")}
    return {alias: version.number for alias, version in found.items() if version}


def test_by_hand_the_gate_decides_too(store: MlflowClient, tmp_path: Path) -> None:
    one, two, three = three_versions(store)
    same = {"data_digest": "d", "classes_digest": "c"}
    for each, top1 in ((one, "0.5"), (two, "0.4"), (three, "0.6")):
        registry.mark(each, {**same, "top1": top1})

    def by_hand(number: str, **how: Any) -> tuple[bool, str]:
        return promote_by_hand(f"ffn-p/{number}", workspace=Workspace(root=tmp_path), **how)

    assert by_hand("1", reason="the first")[0]
    assert registry.at(one.uri).tags["promoted_because"] == "the first"
    done, said = by_hand("2")
    assert (done, aliases()) == (False, {"champion": "1"})
    assert "40.00 % is worse than 50.00 %" in said
    assert by_hand("3", dry_run=True) == (
        True, "ffn-p version 3 would be champion: top1 60.00 % is not worse than 50.00 % of champion version 1",
    )  # fmt: skip
    assert aliases() == {"champion": "1"}
    assert by_hand("2", force=True)[0]
    assert aliases() == {"champion": "2", "previous": "1"}
    assert by_hand("3", to="shadow") == (True, "ffn-p version 3 is shadow")
    assert by_hand("2") == (True, "ffn-p version 2 is champion already")
    registry.mark(three, {"data_digest": "other"})
    assert "was measured on other data" in by_hand("3")[1]
    assert aliases() == {"champion": "2", "previous": "1"}


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
    assert registry.at(three.uri).tags["rolled_back"]
    promote(three, "by hand, after all")
    assert aliases() == {"champion": "3", "previous": "2"}
    assert not registry.at(three.uri).tags["rolled_back"]
    with pytest.raises(FFNError, match="ffn-q: no champion; registered models: ffn-p"):
        rollback("ffn-q")


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_promotion_or_rollback_that_is_cut_off_is_finished_by_the_next(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    one, two, _ = three_versions(store)
    promote(one, "first")
    registry.mark(two, {"rolled_back": "2026-01-01"})

    def cut_off(work: Callable[[], str]) -> None:
        """Do `work` twice; the first attempt is killed after its calls that change the registry, as many as `calls`."""
        left = iter(range(calls))

        def until_killed(do: Callable[[Version, Any], None]) -> Callable[[Version, Any], None]:
            def change(version: Version, what: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                do(version, what)

            return change

        with monkeypatch.context() as patched:
            for name in ("mark", "point"):
                patched.setattr(registry, name, until_killed(getattr(registry, name)))
            with contextlib.suppress(KeyboardInterrupt):
                work()
                return
        work()

    cut_off(lambda: promote(two, "better"))
    assert aliases() == {"champion": "2", "previous": "1"}
    assert (registry.at(two.uri).tags["promoted_because"], registry.at(two.uri).tags["rolled_back"]) == ("better", "")
    cut_off(lambda: rollback("ffn-p"))
    assert aliases() == {"champion": "1", "previous": "2"}
    assert (bool(registry.at(two.uri).tags["rolled_back"]), registry.at(one.uri).tags["rolled_back"]) == (True, "")


def table(path: Path, *, stream: str = "j", flip: bool = False) -> Path:
    p = np.array([[0.75, 0.25], [0.5, 0.5]], np.float32)
    return Scores(
        ids=("a", "b"), labels=np.array([0, 1]), probabilities=p[:, ::-1] if flip else p, classes=("x", "y"), protocol="p",
        stream=stream, preset="S4", data_digest="d",
    ).write(path)  # fmt: skip


def test_two_inputs_of_one_stream_are_named(tmp_path: Path) -> None:
    first, second = table(tmp_path / "1.arrow"), table(tmp_path / "2.arrow")
    with pytest.raises(FFNError, match=f"{first} and {second}: both of stream j"):
        fuse_all([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_scores_are_another_fusion(store: MlflowClient, tmp_path: Path) -> None:
    parent = tracking.begin("demo", {})
    for flip in (False, True, True):
        scores = [table(tmp_path / "j.arrow", flip=flip), table(tmp_path / "b.arrow", stream="b")]
        facts, classes, matrix = fuse(scores=scores, parent=parent, fused=tmp_path / "fused", confusion=tmp_path / "confusion")
    assert facts == {"preset": "S4", "protocol": "p", "seed": "0", "top1 2s": "0.5000"}
    assert (classes, [sum(row) for row in matrix]) == (["x", "y"], [1, 1])
    assert [run.info.run_name for run in children(store, parent)] == ["S4/p/2s"] * 2


def test_a_fused_model_is_not_fused_scores(tmp_path: Path) -> None:
    for said in ("{}", "[]", json.dumps({"j": 1.0})):
        (tmp_path / "result.json").write_text(said)
        with pytest.raises(FFNError, match="not fused scores"):
            read_fusion(tmp_path)


FUSION = {"protocol": "p", "data_digest": "d", "classes": ["x", "y"], "weights": {"j": 1.0}}


@pytest.mark.parametrize(
    ("digest", "fusion", "said"),
    [
        ("e", FUSION, "j: trained on data d, but set.arrow is e"),
        ("d", {**FUSION, "protocol": "q"}, "j and fused: differ in protocol, p and q"),
        ("d", {**FUSION, "data_digest": "e"}, "j and fused: differ in data, d and e"),
        ("d", {**FUSION, "classes": ["y", "x"]}, "j and fused: differ in classes"),
        ("d", {**FUSION, "weights": {"j": 1.0, "b": 1.0}}, "fused: fused from streams b, j, but the checkpoints are of j"),
    ],
)
def test_what_does_not_belong_together_is_not_registered(digest: str, fusion: dict[str, Any], said: str) -> None:
    meta = Checkpoint(
        config=preset("S4"), layout=NTU25, space="3d", classes=("x", "y"), protocol="p", stream="j", data_digest="d", key="k"
    )
    data = cast(SkeletonSet, SimpleNamespace(digest=digest, path=Path("set.arrow")))
    with pytest.raises(FFNError, match=said):
        require_fit(data, {"j": (Path("j"), meta)}, Path("fused"), fusion)


def test_registering_again_with_the_same_key_gives_the_same_version(store: MlflowClient) -> None:
    assert [found.number for found in three_versions(store)] == ["1", "2", "3"]
    run = store.create_run(store.create_experiment("again")).info.run_id
    assert registry.register("ffn-p", f"runs:/{run}/model", key="1", run=run, tags={}).number == "2"


def test_bad_input_leaves_a_failed_run_and_one_line(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Pipeline(toy.path, tmp_path)
    with pytest.raises(SystemExit) as ended:
        train(
            data=toy.path, protocol="q", stream="j", preset="S4", seed=0, overrides=TINY, checkpoints=tmp_path / "states",
            parent=steps.parent, checkpoint=tmp_path / "out",
        )  # fmt: skip
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"ffn: error: {toy.path}: no protocol 'q': expected one of p"
    (child,) = children(store, steps.parent)
    assert child.info.status == "FAILED"
    assert child.data.tags["ffn.error"] == f"{toy.path}: no protocol 'q': expected one of p"
    assert child.data.tags["mlflow.note.content"].startswith("**Failed**: ")
    assert not (tmp_path / "out").exists()
