"""The set between steps: kept once, found again, read by range from a real S3 server, in place from a folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from components import skeletons, storage
from components.evaluate import step as evaluating
from components.ingest import step as ingesting
from ffn.data.store import SkeletonSet
from ffn.data.synth import write_ntu
from ffn.errors import FFNError
from ffn.scores import Scores
from tests.components.test_steps import Pipeline
from tests.components.test_storage import Server, server  # noqa: F401  # a fixture
from tests.conftest import toy_recordings, write_set


@pytest.fixture(params=["folder", "s3"])
def store_at(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where steps keep things: a folder, as a volume is, or a prefix in an object store."""
    if request.param == "folder":
        return str(tmp_path / "volume")
    request.getfixturevalue("server")
    return "s3://bucket/ffn"


def test_a_kept_set_is_opened_with_the_rows_that_are_wanted(store_at: str, toy: SkeletonSet, tmp_path: Path) -> None:
    note = skeletons.keep(store_at, "key", copied(toy))
    assert note["facts"] == {"dropped": 2}
    assert skeletons.found(store_at, "key") == note
    assert skeletons.found(store_at, "another") is None

    told = tmp_path / "data"
    told.write_text(json.dumps(note))
    with skeletons.opened(told, skeletons.held_out("p")) as opened:
        split = opened.split("p")
        assert (opened.digest, opened.ids, opened.layout) == (toy.digest, toy.ids, toy.layout)
        for row in split.test:
            np.testing.assert_array_equal(opened.sample(row), toy.sample(row))
    with skeletons.opened(told, skeletons.training("p")) as opened:
        for row in [*split.train, split.test[0]]:
            np.testing.assert_array_equal(opened.sample(row), toy.sample(row))


def test_the_set_itself_is_opened_as_it_is(toy: SkeletonSet) -> None:
    with skeletons.opened(toy.path, skeletons.example("p")) as opened:
        np.testing.assert_array_equal(opened.keypoints, toy.keypoints)


def test_only_the_bytes_that_are_wanted_are_fetched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Held out is the last third: neither the first two thirds nor anything twice is on its way."""
    arrays, labels = toy_recordings(90)
    whole = write_set(tmp_path / "set.arrow", arrays, "3d", labels=labels)
    note = skeletons.keep("s3://bucket/ffn", "key", copied(whole))
    told = tmp_path / "data"
    told.write_text(json.dumps(note))
    fetched: list[tuple[int, int]] = []
    read: Callable[..., None] = storage.read

    def reading(uri: str, pieces: list[tuple[int, int]], file: Path, **how: str) -> None:
        fetched.extend(pieces)
        read(uri, pieces, file, **how)

    monkeypatch.setattr(storage, "read", reading)
    with skeletons.opened(told, skeletons.held_out("p")) as opened:
        rows = opened.split("p").test
    width = whole.keypoints.itemsize * 25 * 3
    wanted = int((whole.persons[rows] * whole.frames[rows]).sum()) * width
    beside = whole.path.stat().st_size - whole.keypoints.nbytes
    assert sum(end - begin for begin, end in fetched) == wanted + beside
    fetched.clear()
    with skeletons.opened(told) as opened:
        assert len(opened) == 90
    assert sum(end - begin for begin, end in fetched) == beside


def test_near_pieces_are_one_and_far_ones_are_not(toy: SkeletonSet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(skeletons.pieces(toy, np.array([0, 2, 23]), 100)) == 1
    monkeypatch.setattr(skeletons, "GAP", 0)
    width = toy.keypoints.itemsize * 25 * 3
    sizes = toy.persons * toy.frames * width
    assert skeletons.pieces(toy, np.array([3, 0, 1, 1]), 100) == [
        (100, 100 + int(sizes[0] + sizes[1])),
        (100 + int(toy.starts[3]) * width, 100 + int(toy.starts[3]) * width + int(sizes[3])),
    ]
    assert skeletons.pieces(toy, np.array([], np.int64), 100) == []


def test_a_set_that_is_gone_or_another_is_not_found_and_not_opened(
    server: Server, toy: SkeletonSet, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    note = skeletons.keep("s3://bucket/ffn", "key", copied(toy))
    told = tmp_path / "data"
    told.write_text(json.dumps(note))
    kept = server.folder / "bucket" / "ffn" / "data" / "key.arrow"
    content = bytearray(kept.read_bytes())
    content[-20] ^= 1
    kept.write_bytes(content)
    os.utime(kept, (0, 0))
    assert skeletons.found("s3://bucket/ffn", "key") is None
    with pytest.raises(FFNError, match=r"s3://bucket/ffn/data/key.arrow: .*changed"), skeletons.opened(told):
        pass
    kept.unlink()
    assert skeletons.found("s3://bucket/ffn", "key") is None
    with pytest.raises(FFNError, match=r"s3://bucket/ffn/data/key.arrow: "), skeletons.opened(told):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"set": "s3://bucket/', b'{"x": 1}', b"[]", b"ARROW1", b"\xff\xfe{}", None], ids=repr
)
def test_what_is_neither_a_set_nor_a_note_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    data = tmp_path / "data"
    if content is not None:
        data.write_bytes(content)
    with (
        pytest.raises(FFNError, match=rf"^{data}: (not a skeleton set, or cut short|no such skeleton set)"),
        skeletons.opened(data),
    ):
        pass
    assert skeletons.note_in(data) is None


def copied(data: SkeletonSet) -> Callable[[Path], dict[str, int]]:
    """Makes the set `data` at a path, and one fact of it."""

    def make(out: Path) -> dict[str, int]:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(data.path.read_bytes())
        return {"dropped": 2}

    return make


def ingest(source: Path, out: Path, store: str, version: str = "1") -> dict[str, str]:
    names = ingesting.run(source=source, source_version=version, space="3d", store=store, data=out / "data", report=out / "report")
    assert (out / "report").read_text().startswith("# Ingestion of")
    with skeletons.opened(out / "data") as made:
        assert made.digest == names["digest"]
    return names


def test_recordings_are_read_once_for_all_runs(
    store_at: str, store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    raw = tmp_path / "raw"
    write_ntu(raw, repeats=2)
    first = ingest(raw, tmp_path / "1", store_at)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(ingesting, "ingest", refuse)
        assert ingest(raw, tmp_path / "2", store_at) == first
        with pytest.raises(AssertionError):
            ingest(raw, tmp_path / "3", store_at, version="2")  # other recordings
        with pytest.raises(AssertionError):
            ingest(tmp_path, tmp_path / "3", store_at)  # recordings elsewhere, of the same version by name
        patched.setattr(ingesting, "code", lambda *_: "another")
        with pytest.raises(AssertionError):
            ingest(raw, tmp_path / "4", store_at)  # another reader

    kept = request.getfixturevalue("server").folder if storage.remote(store_at) else tmp_path / "volume"
    (arrow,) = kept.rglob("data/*.arrow")
    arrow.unlink()
    assert ingest(raw, tmp_path / "5", store_at) == first  # what is gone is made anew
    assert len(list(kept.rglob("data/*.arrow"))) == 1


def test_a_checkpoint_is_evaluated_once_for_all_runs(
    store_at: str, store: MlflowClient, toy: SkeletonSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Pipeline(toy.path, tmp_path / "run")
    checkpoint = steps.train("j")

    def evaluate(out: Path) -> dict[str, str]:
        return evaluating.run(data=toy.path, checkpoint=checkpoint, parent=steps.parent, store=store_at, scores=out)

    first = evaluate(tmp_path / "1")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(evaluating, "evaluate", refuse)
    assert evaluate(tmp_path / "2") == first
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert Scores.read(tmp_path / "2").stream == "j"
    monkeypatch.setattr(evaluating, "code", lambda: "another")
    with pytest.raises(AssertionError):
        evaluate(tmp_path / "3")
