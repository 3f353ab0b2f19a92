"""The steps one after the other on a toy set, each twice: what is retried is neither a second run nor a second version."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from components import registry, tracking
from components.begin.step import run as begin
from components.evaluate.step import run as evaluate
from components.finish.step import run as finish
from components.finish.step import verdict as let_through
from components.fuse.step import fuse_all, read_fusion
from components.fuse.step import run as fuse
from components.gate.step import Verdict, decide, identity, objection, scores
from components.gate.step import run as gate
from components.promote.step import approve, promote, rollback
from components.promote.step import run as promote_step
from components.register.step import require_fit
from components.register.step import run as register
from components.registry import Version
from components.train.step import run as train
from ffn.checkpoint import Checkpoint
from ffn.config import Policy, preset
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.gate import right
from ffn.inference import FusedModel
from ffn.layouts import NTU25
from ffn.scores import Scores
from pipeline.local import Workspace
from pipeline.models import promote as promote_by_hand
from pipeline.predict import load
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
    assert steps.register() == uri == "models:/ffn-p-candidates/1"

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

    version = registry.version("ffn-p-candidates", alias="challenger")
    assert version
    assert version.tags["data_digest"] == toy.digest
    assert float(version.tags["top1"]) == json.loads((tmp_path / "fused" / "result.json").read_text())["top1"]

    with pytest.raises(SystemExit):
        promote_step(model=uri)  # that no gate let through
    assert gate(model=uri, data=toy.path, **ANY) == "promote"
    assert let_through(registry.at(uri)).endswith("; next: `ffn model promote ffn-p-candidates/1`")
    promote_step(model=uri)
    promote_step(model=uri)
    assert registry.version("ffn-p", alias="previous") is None
    assert gate(model=uri, data=toy.path, **ANY) == "hold"
    champion = registry.champion("ffn-p")
    assert champion
    reason = f"top1 {100 * float(version.tags['top1']):.2f} %, there is no champion yet"
    assert (champion.tags["gate"], champion.tags["promoted_because"]) == ("promote", reason)
    assert champion.tags["digest"] == version.tags["digest"] == registry.sealed(uri, tmp_path / "downloaded")

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
    assert f"- ffn-p-candidates version 1: champion, as ffn-p version 1: {reason}\n" in text
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
    with registry.fused(registry.at(uri)) as folder:
        wanted = FusedModel.load(folder).predict(clips)
    got = np.array([list(row.values()) for row in said["probabilities"]])
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert list(said["label"]) == [toy.classes[k] for k in wanted.argmax(1)]
    with pytest.raises(mlflow.MlflowException, match="shape"):
        model.predict(np.zeros((1, 2, 8, 17, 3), np.float32))


ANY = asdict(Policy(floor=0, significance=0))
"""A policy by which only what is worse is held: of eight samples."""


def version(number: int, name: str = "ffn-p-candidates", **tags: str) -> Version:
    usual = {"protocol": "p", "layout": "ntu25", "space": "3d", "classes_digest": "c", "digest": f"sha256:{number}"}
    return Version(name=name, number=str(number), tags={**usual, **tags})


@pytest.mark.parametrize(
    ("challenger", "reason"),
    [
        ({"classes_digest": "e"}, "not comparable with champion version 1: classes_digest e against c"),
        ({"layout_digest": "l"}, "not comparable with champion version 1: layout_digest l against None"),
        ({"space": "2d"}, "not comparable with champion version 1: space 2d against 3d"),
    ],
)
def test_what_cannot_be_compared_is_held_unmeasured(store: MlflowClient, challenger: dict[str, str], reason: str) -> None:
    verdict = decide(version(2, **challenger), version(1, "ffn-p"), Path("unread"), Policy())
    assert verdict == Verdict(promote=False, reason=reason, digest="sha256:2", champion="1 sha256:1")
    assert Verdict.of(version(2, **verdict.tags)) == verdict
    assert objection(version(2), version(1, "ffn-p", digest="")).startswith("champion version 1 is of earlier days")


def test_champion_and_challenger_are_measured_on_the_challengers_data(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path
) -> None:
    old = Pipeline(toy.path, tmp_path / "old").register()
    assert gate(model=old, data=toy.path, **ANY) == "promote"
    promote_step(model=old)
    arrays, labels = toy_recordings(seed=1)
    fresh = write_set(tmp_path / "fresh.arrow", arrays, "3d", labels=labels)
    new = Pipeline(fresh.path, tmp_path / "new", name="fresh").register("training.epochs=1")
    said = gate(model=new, data=fresh.path, **ANY)
    candidate, champion = registry.at(new), registry.champion("ffn-p")
    assert champion
    verdict = Verdict.of(candidate)
    assert verdict
    assert (verdict.promote, verdict.champion) == (said == "promote", f"1 {champion.tags['digest']}")
    ours, theirs = (float(right(scores(one, fresh)).mean()) for one in (candidate, champion))
    assert verdict.reason.startswith(f"top1 {100 * ours:.2f} % against {100 * theirs:.2f} % of champion version 1: ")
    assert float(candidate.tags["top1"]) == ours
    assert gate(model=new, data=fresh.path, **{**ANY, "floor": 1.0}) == "hold"
    assert registry.at(new).tags["gate_reason"].endswith("below the floor of 100.00 %")


def test_a_model_that_changed_is_neither_measured_nor_promoted_nor_loaded(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = Pipeline(toy.path, tmp_path / "steps").register()
    assert gate(model=uri, data=toy.path, **ANY) == "promote"
    code = files(store, uri) / "code" / "ffn" / "evil.py"
    workspace = Workspace(root=tmp_path)
    whole = registry.at(uri).tags["digest"]

    code.write_text("")  # whose account writes artifacts writes tags of candidates too
    with registry_digest(uri, tmp_path):
        for step, given in ((promote_step, {}), (gate, {"data": toy.path, **ANY})):
            if step is gate:
                registry.mark(registry.at(uri), {"digest": whole})
            with pytest.raises(SystemExit):
                step(model=uri, **given)
        said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "ffn-p-candidates/1: its files have changed since the gate measured them" in said[0]
        assert "ffn-p-candidates/1: its files have changed since it was registered" in said[1]
        assert registry.champion("ffn-p") is None

    code.unlink()
    promote_step(model=uri)
    assert load("ffn-p", [], workspace).classes == toy.classes
    code.write_text("")
    with pytest.raises(FFNError, match=r"ffn-p/1: its files have changed since it was approved: digest .* it is not loaded"):
        load("ffn-p", [], workspace)


@contextlib.contextmanager
def registry_digest(uri: str, tmp_path: Path) -> Iterator[None]:
    """Inside the block the candidate says of itself the digest of what its files are now."""
    candidate = registry.at(uri)
    registry.mark(candidate, {"digest": registry.sealed(uri, tmp_path / "forged")})
    yield
    registry.mark(candidate, {"digest": candidate.tags["digest"]})


def test_what_carries_no_digest_is_not_loaded(store: MlflowClient, tmp_path: Path) -> None:
    with pytest.raises(FFNError, match="ffn-p-candidates/1: it carries no digest of its files"):
        registry.fetch(version(1, digest=""), tmp_path)


def test_what_loading_in_place_leaves_behind_is_not_the_models(store: MlflowClient, toy: SkeletonSet, tmp_path: Path) -> None:
    candidate = registry.at(Pipeline(toy.path, tmp_path / "steps").register())
    compiled = files(store, candidate.uri) / "code" / "ffn" / "__pycache__"
    compiled.mkdir()
    (compiled / "evil.pyc").write_text("")
    with registry.fused(candidate) as folder:
        assert not list(folder.parents[1].rglob("__pycache__"))


def files(store: MlflowClient, uri: str) -> Path:
    """Where the files of a version are."""
    version = registry.at(uri)
    return Path(urlsplit(store.get_model_version_download_uri(version.name, version.number)).path)


def three_candidates(store: MlflowClient) -> list[Version]:
    """Without files."""
    run = store.create_run(store.create_experiment("models")).info.run_id
    return [
        registry.register(
            "ffn-p-candidates", f"runs:/{run}/model-{number}", key=str(number), run=run,
            tags={"top1": "0.5", "digest": f"sha256:{number}"},
        )
        for number in range(3)
    ]  # fmt: skip


def verdict(candidate: Version) -> Verdict:
    """One that lets through, against the present champion."""
    against = identity(registry.champion("ffn-p"))
    return Verdict(promote=True, reason="better", digest=candidate.tags["digest"], champion=against)


def aliases() -> dict[str, str]:
    """Alias -> the candidate that its version was made of."""
    found = {alias: registry.version("ffn-p", alias=alias) for alias in ("champion", "previous")}
    return {alias: version.tags["candidate"].rpartition("/")[2] for alias, version in found.items() if version}


def approved(candidate: Version) -> str:
    return approve(candidate, verdict(candidate), "better")


def test_a_champion_is_a_copy_that_says_what_it_was(store: MlflowClient) -> None:
    one, two, _ = three_candidates(store)
    registry.mark(
        two, {"rolled_back": "long ago", "candidate": "ffn-p-candidates/9", "digest": "sha256:of another", "mlflow.x": "y"}
    )
    assert approved(one) == "ffn-p version 1 is champion: ffn-p-candidates/1"
    assert approve(registry.at(two.uri), verdict(two), "better") == (
        "ffn-p version 2 is champion: ffn-p-candidates/2, version 1 previous"
    )
    champion = registry.champion("ffn-p")
    assert champion
    assert champion.tags.items() >= {
        "candidate": "ffn-p-candidates/2", "replaces": "1", "digest": "sha256:1", "top1": "0.5", "promoted_because": "better",
        "gate": "promote", "gate_champion": "1 sha256:0", "rolled_back": "",
    }.items()  # fmt: skip
    assert "mlflow.x" not in champion.tags
    assert store.get_model_version("ffn-p", "2").source == two.uri
    assert registry.version("ffn-p-candidates", alias="champion") is None


def test_a_champion_that_has_moved_since_the_gate_is_not_replaced(store: MlflowClient, tmp_path: Path) -> None:
    one, two, three = three_candidates(store)
    early = verdict(two)
    approved(one)
    again = "ask the gate again with `ffn model promote ffn-p-candidates/2 --data SET.arrow`, or by a new run"
    for work in (promote, approve):
        with pytest.raises(FFNError, match=f"ffn-p: champion is version 1 now, when the gate compared there was none; {again}"):
            work(two, early, "better")
    middle = verdict(two)
    approved(three)
    with pytest.raises(FFNError, match="ffn-p: champion is version 3 now, when the gate compared it was version 1; "):
        promote(two, middle, "better")
    registry.mark(two, middle.tags)
    with pytest.raises(FFNError, match="ffn-p: champion is version 3 now"):
        promote_by_hand("ffn-p-candidates/2", dry_run=True, workspace=Workspace(root=tmp_path))
    assert aliases() == {"champion": "3", "previous": "1"}
    assert [one.tags["candidate"] for one in registry.rivals("ffn-p", "1")] == ["ffn-p-candidates/3"]


@pytest.mark.parametrize("same", [False, True], ids=["of two candidates", "of one candidate"])
def test_promotions_at_once_end_in_one(store: MlflowClient, same: bool) -> None:
    """Each compared with the same champion; all begin at once."""
    one, two, three = three_candidates(store)
    approved(one)
    tried = [two, two] if same else [two, three]
    verdicts, ready, said = [verdict(candidate) for candidate in tried], threading.Barrier(2), list[str | FFNError]()

    def work(candidate: Version, verdict: Verdict) -> None:
        ready.wait()
        try:
            said.append(approve(candidate, verdict, "better"))
        except FFNError as error:
            said.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(tried, verdicts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [str(answer) for answer in said if isinstance(answer, FFNError)]
    assert len(refused) == (0 if same else 1), said
    (standing,) = registry.rivals("ffn-p", "1")
    champion = registry.champion("ffn-p")
    assert champion
    assert champion.number == standing.number
    if not same:
        assert re.search(r"is being promoted at this moment|champion is version", refused[0])


def test_a_promotion_under_way_is_not_overtaken_and_a_dead_one_not_waited_for(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = three_candidates(store)
    approved(one)
    registry.copy(two, {"candidate": two.called, "replaces": "1"})  # then it died
    with pytest.raises(FFNError, match="ffn-p: ffn-p-candidates/2 is being promoted at this moment, as version 2; ask the gate"):
        approved(three)
    assert [version.number for version in registry.rivals("ffn-p", "1")] == ["2"]
    late = verdict(two)
    monkeypatch.setattr("components.promote.step.PATIENCE", timedelta(0))
    assert approved(three) == "ffn-p version 4 is champion: ffn-p-candidates/3, version 1 previous"
    with pytest.raises(FFNError, match="champion is version 4 now"):
        approve(two, late, "better")


def test_a_rolled_back_candidate_does_not_stand_in_the_way(store: MlflowClient) -> None:
    one, two, three = three_candidates(store)
    approved(one)
    approved(two)
    rollback("ffn-p")
    assert objection(two, registry.champion("ffn-p")).startswith("it was rolled back by hand (2")
    assert approved(three) == "ffn-p version 3 is champion: ffn-p-candidates/3, version 1 previous"
    rollback("ffn-p")
    assert approved(two) == "ffn-p version 4 is champion: ffn-p-candidates/2, version 1 previous"


def test_by_hand_the_gate_decides_too(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pipeline(toy.path, tmp_path / "1").register()
    second = Pipeline(toy.path, tmp_path / "2", name="second").register("training.epochs=1", "training.lr=1e-9")
    workspace = Workspace(root=tmp_path)

    def by_hand(named: str, **how: Any) -> tuple[bool, str]:
        return promote_by_hand(named, workspace=workspace, **how)

    with pytest.raises(FFNError, match="ffn-p-candidates/1: no gate has measured it yet; --data"):
        by_hand("ffn-p-candidates/1")
    monkeypatch.setenv("FFN_FLOOR", "1.0")
    done, said = by_hand("ffn-p-candidates/1", data=toy.path)
    assert (done, aliases()) == (False, {})
    assert re.match(r"ffn-p-candidates version 1 is held: .*; below the floor of 100.00 %; --force promotes it all the same", said)
    monkeypatch.setenv("FFN_FLOOR", "0")
    done, said = by_hand("ffn-p-candidates/1", data=toy.path, dry_run=True)
    assert (done, aliases()) == (True, {})
    assert said.startswith("ffn-p-candidates version 1 would be champion: top1 ")
    assert by_hand("ffn-p-candidates/1", data=toy.path, reason="the first")[0]
    champion = registry.champion("ffn-p")
    assert champion
    assert (champion.tags["promoted_because"], champion.tags["gate_champion"]) == ("the first", "none")
    assert by_hand("ffn-p-candidates/1") == (True, "ffn-p-candidates version 1 is champion already")
    assert by_hand("ffn-p", to="shadow") == (True, "ffn-p-candidates version 2 is shadow")
    with pytest.raises(FFNError, match="ffn-p/1: a version of ffn-p has been approved before; candidates are promoted"):
        by_hand("ffn-p/1")

    gate(model=second, data=toy.path, **{**ANY, "floor": 1.0})
    assert not by_hand("ffn-p")[0]
    done, said = by_hand("ffn-p", force=True)
    assert said == "ffn-p version 2 is champion: ffn-p-candidates/2, version 1 previous: the gate was not asked"
    assert aliases() == {"champion": "2", "previous": "1"}


def test_promotion_and_rollback_move_the_aliases_once(store: MlflowClient) -> None:
    one, two, three = three_candidates(store)
    approved(one)
    with pytest.raises(FFNError, match="no previous one"):
        rollback("ffn-p")
    early = verdict(two)
    approve(two, early, "better")
    assert approve(two, early, "better") == "ffn-p version 2 is champion already: ffn-p-candidates/2"
    assert promote(two, early, "better") == "ffn-p version 2 is champion already: ffn-p-candidates/2"
    assert aliases() == {"champion": "2", "previous": "1"}
    approved(three)
    rollback("ffn-p")
    assert aliases() == {"champion": "2", "previous": "3"}
    rollback("ffn-p")
    assert aliases() == {"champion": "3", "previous": "2"}
    with pytest.raises(FFNError, match="ffn-q: no champion; registered models: ffn-p"):
        rollback("ffn-q")


@pytest.mark.parametrize("calls", range(5))
def test_a_promotion_or_rollback_that_is_cut_off_is_finished_by_the_next(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    one, two, _ = three_candidates(store)
    approved(one)

    def cut_off(work: Callable[[], str]) -> None:
        """Do `work` twice; the first attempt is killed after its calls that change the registry, as many as `calls`."""
        left = iter(range(calls))

        def until_killed(do: Callable[[Version, Any], Any]) -> Callable[[Version, Any], Any]:
            def change(version: Version, what: Any) -> Any:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return do(version, what)

            return change

        with monkeypatch.context() as patched:
            for name in ("mark", "point", "copy"):
                patched.setattr(registry, name, until_killed(getattr(registry, name)))
            with contextlib.suppress(KeyboardInterrupt):
                work()
                return
        work()

    early = verdict(two)
    cut_off(lambda: approve(two, early, "better"))
    assert aliases() == {"champion": "2", "previous": "1"}
    assert [version.number for version in registry.copies(two)] == ["2"]
    cut_off(lambda: rollback("ffn-p"))
    assert aliases() == {"champion": "1", "previous": "2"}
    (first,), (second,) = registry.copies(one), registry.copies(two)
    assert (bool(second.tags["rolled_back"]), first.tags["rolled_back"]) == (True, "")


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
    assert [found.number for found in three_candidates(store)] == ["1", "2", "3"]
    run = store.create_run(store.create_experiment("again")).info.run_id
    assert registry.register("ffn-p-candidates", f"runs:/{run}/model", key="1", run=run, tags={}).number == "2"


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
